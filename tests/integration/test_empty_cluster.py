"""Jobs on a Ray whose nodes come only when they are asked for: a head without CPUs, an autoscaler, fake nodes

GPUs are only said to be there, so training uses gloo and the CPU. Port 6379 must be free.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from addressvlm.storage.run_dir import Run
from tests.integration.test_nodes import config_of, ids
from tests.support.empty_cluster import empty_cluster
from tests.support.nodes import REPOSITORY
from tests.support.tiny import tiny_llava

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.nodes]

ON_CPU = """
import functools, sys
import ray.train.torch, torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray_jobs import ray_train, train
from ray_jobs.common import run_main

def on_cpu(worker, arguments):
    ray.train.torch.get_device = lambda: torch.device("cpu")
    worker(arguments)

class Trainer(TorchTrainer):
    def __init__(self, worker, **settings):
        super().__init__(functools.partial(on_cpu, worker), torch_config=TorchConfig(backend="gloo"), **settings)

ray_train.TorchTrainer = Trainer
run_main(train.main)
"""


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with empty_cluster(launched=True) as environment:
        yield environment


def train(folder: Path, environment: dict[str, str], **settings: object) -> tuple[subprocess.CompletedProcess[str], Run]:
    config = config_of(folder, folder / "base", "http://127.0.0.1")
    config.labels.labeler, config.train.gpus_per_worker = "template", 1
    for stage in config.train.stages.values():
        stage.max_steps = 2
    tree = config.model_dump(mode="json")
    tree["train"] |= settings
    file = folder / "town.yaml"
    file.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-c", ON_CPU, "--config", str(file)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True), Run(config)


def test_training_waits_for_the_nodes_that_it_asks_for(environment: dict[str, str], tmp_path: Path) -> None:
    tiny_llava(tmp_path / "base")
    done, run = train(tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert "waiting for 1 CPUs: 0 of 1 there, 0 s" in done.stdout
    assert ids(run.alignment) == ids(run.photos)
    assert (run.model_dir("AddressVLM") / "merged" / "model.safetensors").is_file()


def test_what_no_node_type_holds_is_refused(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(tiny_llava(tmp_path / "other"))
    done, run = train(tmp_path, environment, cpus_per_worker=3, workers=1, gpus_per_worker=2)
    assert done.returncode == 1
    assert "the cluster can have at most room for 0 of them: lower train.workers or train.gpus_per_worker" in done.stderr
    assert not run.photos.exists()
