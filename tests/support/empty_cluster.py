"""A Ray that starts empty: its head takes no tasks, and its autoscaler starts fake nodes on this machine."""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from uuid import uuid4

from ray.autoscaler._private import fake_multi_node
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.support.nodes import PROGRAMS, REPOSITORY, wait_for

LISTS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
    "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip
TYPES = {
    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "cpu": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 1},
    "gpu": {"resources": {"CPU": 2, "GPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 1},
}
CONFIG = {
    "cluster_name": "empty", "max_workers": 2, "upscaling_speed": 1.0, "idle_timeout_minutes": 5, "auth": {},
    "file_mounts": {}, "file_mounts_sync_continuously": False, "head_node_type": "ray.head.default",
    "available_node_types": TYPES,
    "provider": {"type": "fake_multinode", "launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID},
    **{name: [] for name in LISTS},
}  # fmt: skip
ADDRESS = "127.0.0.1:6379"  # where the fake nodes expect the head


@contextmanager
def empty_cluster(launched: bool) -> Iterator[dict[str, str]]:
    """The environment of a job on it.

    Args:
        launched: the head has the file that `ray up` leaves there.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # paths of sockets are short
    example = Path(fake_multi_node.__file__).with_name("example.yaml")
    if not example.exists():  # the wheel lacks the file from which the provider reads its defaults
        example.write_text(json.dumps(CONFIG))
    for name in ("cluster.json", *(["ray_bootstrap_config.yaml"] if launched else [])):
        (folder / name).write_text(json.dumps(CONFIG))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid4().hex}
    environment = {**os.environ, **token, "PYTHONPATH": str(REPOSITORY), "RAY_TMPDIR": str(folder), "HOME": str(folder)}
    of_head = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }  # fmt: skip
    log = folder / "head.log"
    command = [
        str(PROGRAMS / "ray"), "start", "--head", "--block", "--port=6379", "--num-cpus=0", "--include-dashboard=false",
        "--disable-usage-stats", "--object-store-memory=80000000", f"--autoscaling-config={folder / 'cluster.json'}",
    ]  # fmt: skip
    with log.open("w") as output:
        head = subprocess.Popen(
            command, env={**environment, **of_head, "PYTHONUNBUFFERED": "1"}, cwd=REPOSITORY, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text() or head.poll() is not None)
        assert head.poll() is None, log.read_text()
        yield {**environment, "RAY_ADDRESS": ADDRESS}
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):  # the fake nodes are in the head's process group
            with suppress(ProcessLookupError):
                os.killpg(head.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                head.wait(10)
        rmtree(folder, ignore_errors=True)
