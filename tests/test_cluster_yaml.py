"""Cluster.yaml against Ray's own schema, and the promises its comments make."""

import re
import shutil
import subprocess
from importlib.metadata import requires
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

FILE = Path(__file__).parents[1] / "cluster.yaml"
SETUP = FILE.with_name("setup_node.sh")


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def test_ray_accepts_it(cluster: dict) -> None:
    validate_config(cluster)
    validate_config(prepare_config(cluster))  # with the provider's defaults filled in, as `ray up` does


def test_ray_rejects_a_mistake(cluster: dict) -> None:
    cluster["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(cluster)


def test_cpu_and_gpu_nodes_scale_from_none(cluster: dict) -> None:
    nodes = cluster["available_node_types"]
    assert nodes["cpu"]["min_workers"] == nodes["gpu"]["min_workers"] == 0
    assert nodes["cpu"]["max_workers"] + nodes["gpu"]["max_workers"] <= cluster["max_workers"]


def test_every_node_asks_for_the_token(cluster: dict) -> None:
    starts = [c for key in ("head_start_ray_commands", "worker_start_ray_commands") for c in cluster[key] if "ray start" in c]
    assert len(starts) == 2
    assert all(command.startswith(". ~/node.env &&") for command in starts)
    assert "RAY_AUTH_MODE=token" in re.findall(r"^export .*$", SETUP.read_text(), re.MULTILINE)[0]
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_commands_are_shell_and_their_flags_are_ray_s(cluster: dict) -> None:
    commands = [c for key in cluster if key.endswith("_commands") for c in cluster[key]]
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    known = {option for parameter in start.params for option in getattr(parameter, "opts", [])}
    for command in commands:
        if "ray start" in command:
            assert set(re.findall(r"--[a-z-]+", command.partition("ray start")[2])) <= known


def test_a_node_is_set_up_by_a_script_of_the_repository(cluster: dict) -> None:
    (command,) = cluster["setup_commands"]
    assert command.startswith(f"bash ~/addressvlm/{SETUP.name} ")
    assert cluster["file_mounts"]["~/addressvlm"] == "."
    subprocess.run(["bash", "-n", str(SETUP)], check=True)
    text = SETUP.read_text()
    assert "pip install --user" not in text
    assert "-m venv ~/venv" in text
    assert all("/scratch" in path for path in re.findall(r"(?:HF_HOME|ADDRESSVLM_CACHE)=(\S+)", text))
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(SETUP)], check=True)


def test_every_cuda_package_of_torch_is_pinned() -> None:
    pinned = {line.partition("==")[0] for line in FILE.with_name("constraints.txt").read_text().splitlines() if "==" in line}
    needed = [Requirement(line) for line in requires("torch") or []]
    gpu = {r.name for r in needed if r.name.startswith(("nvidia", "cuda")) or r.name == "triton"}
    assert gpu <= pinned
