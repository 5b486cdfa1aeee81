"""Cluster.yaml against Ray's own schema, and the promises its comments make."""

from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

FILE = Path(__file__).parents[1] / "cluster.yaml"


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
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert "~/.ray/auth_token" in cluster["file_mounts"]
