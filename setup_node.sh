#!/usr/bin/env bash
# Make a machine a node of cluster.yaml: a stock Ubuntu 24.04, or a Deep Learning AMI of it. Run again, it changes nothing.
#
#   bash setup_node.sh [<server>:/<path>]     an NFS share to mount at /shared
#
# Leaves ~/venv (the pinned packages), ~/node.env (environment of `ray start`), /scratch (NVMe where there is one).
set -euo pipefail
cd "$(dirname "$0")"
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

retry() { # for as long as unattended-upgrades holds apt's locks, ten minutes at most
    for _ in $(seq 60); do "$@" && return; sleep 10; done
    echo "error: $* still fails after ten minutes: see the messages above." >&2
    return 1
}

retry as_root apt-get -qq update
retry as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 install -y \
    ca-certificates e2fsprogs nfs-common python3 python3-venv rsync util-linux > /dev/null
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: take an image of Ubuntu 24.04.")'

if [ -n "${1:-}" ] && ! mountpoint -q /shared; then
    as_root mkdir -p /shared
    as_root mount -t nfs4 -o nfsvers=4.1,hard,timeo=600 "$1" /shared
    as_root chown "$(id -u)" /shared
fi

if [ ! -e /scratch ]; then
    disk=$(lsblk -dnpo NAME,MODEL | awk '/Instance Storage/ {print $1; exit}')
    if mountpoint -q /opt/dlami/nvme; then # a Deep Learning AMI has mounted it
        as_root ln -s /opt/dlami/nvme /scratch
    else
        as_root mkdir -p /scratch
        if [ -n "$disk" ]; then
            as_root mkfs.ext4 -q -E nodiscard "$disk"
            as_root mount "$disk" /scratch
        fi
    fi
    as_root chown "$(id -u)" /scratch/
fi
mkdir -p /scratch/spill

# A virtual environment: Ubuntu's own Python takes no packages. Where there is no GPU, CPU_WHEELS saves 3 GB of CUDA wheels: the
# page, or a folder, of PyTorch's CPU wheels (pytorch.org, Get Started; then /torch).
test -x ~/venv/bin/pip || python3 -m venv ~/venv
torch=(torch ${CPU_WHEELS:+--find-links "$CPU_WHEELS"})
if nvidia-smi -L > /dev/null 2>&1; then torch=(torch); fi
~/venv/bin/pip install -q --disable-pip-version-check -c constraints.txt "${torch[@]}"
~/venv/bin/pip install -q --disable-pip-version-check -c constraints.txt . boto3

cat > ~/node.env << 'END'
export PATH=~/venv/bin:$PATH RAY_AUTH_MODE=token RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_USAGE_STATS_ENABLED=0
export HF_HOME=/scratch/huggingface ADDRESSVLM_CACHE=/scratch/addressvlm
END
grep -q node.env ~/.bashrc 2> /dev/null || echo '. ~/node.env' >> ~/.bashrc
