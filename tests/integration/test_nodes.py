"""All jobs and the service on three Ray nodes, one of which is lost now and then

One command makes the whole run; while it grafts, asks for labels and trains, a node and all its processes get kill -9 and
another one comes. What a step needs of the others lies in the run's folder, which all nodes see; nothing else is shared.
"""

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import yaml

from addressvlm.config import Config
from addressvlm.config.train import SystemConfig
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.storage.shards import MARKS_DIR, plan_shards
from addressvlm.training.checkpoint import TrainingCheckpoint
from ray_jobs import graft
from tests.integration.test_interrupted import city, partial_of
from tests.support.nodes import PROGRAMS, REPOSITORY, Nodes, free_port, running, wait_for
from tests.support.openai_endpoint import Endpoint, says
from tests.support.running_service import photo
from tests.support.tiny import tiny_llava

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.nodes]

PHOTOS = 1200
STEPS = 10  # of each stage
KILL_AT = 13  # steps of both
SYSTEM = "AddressVLM"
CLIENTS = 4


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running() as nodes:
        yield nodes


class Kills:
    """Loses a node in the middle of each step, and remembers what was done by then."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.grafted: list[str] = []
        self.trained: list[str] = []
        self.asked = 0

    def reply(self, number: int, body: dict[str, Any]) -> Any:
        """A good label for what is asked; one answer waits until a node is lost."""
        if number == 100:
            self.nodes.replace("raylet")
        street = re.findall(r"Street [ABC]", json.dumps(body))[0]
        return says(
            "The road leads on between two plain walls here, and the map shows it running straight from west to east. "
            f"This is {street} in Centre."
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, nodes: Nodes) -> Iterator[tuple[Config, Kills, Endpoint, str]]:
    """A run made by one command on the cluster, with a node lost while it grafts, asks for labels and trains."""
    folder = tmp_path_factory.mktemp("cluster")
    base, kills = tiny_llava(folder / "base"), Kills(nodes)
    with Endpoint(kills.reply).running() as endpoint:
        config = config_of(folder, base, endpoint.url)
        run, command = Run(config), job(folder, config, "train", "--evaluate")
        with subprocess.Popen(command, cwd=REPOSITORY, env=environment(nodes), stdout=subprocess.PIPE, text=True) as process:
            marks, losses = partial_of(run.grafts) / MARKS_DIR, run.training_dir(SYSTEM) / "loss.jsonl"
            wait_for(lambda: list(marks.glob("*.json")), process)
            kills.grafted = [mark.name for mark in marks.glob("*.json")]
            nodes.replace("ray::FlatMap")
            wait_for(lambda: losses.is_file() and len(losses.read_text().splitlines()) >= KILL_AT, process)
            nodes.replace("RayTrainWorker")
            kills.trained = losses.read_text().splitlines()
            text, _ = process.communicate()
        assert process.returncode == 0, text
        yield config, kills, endpoint, text


def config_of(folder: Path, base: Path, url: str) -> Config:
    """A town, a tiny base, and one system that is trained by two workers in both stages."""
    tree = city(folder, PHOTOS).model_dump()
    stage = {"batch_size": 4, "max_steps": STEPS, "learning_rate": 0.01}
    tree["model"] |= {"base": str(base), "llm": {"rank": 4, "alpha": 8}, "vision": {"rank": 2, "alpha": 4}}
    tree["labels"] |= {"labeler": "openai", "model": "m", "base_url": url, "concurrency": 8}
    tree["train"] |= {
        "workers": 2,
        "checkpoint_every": 2,
        "precision": "float32",
        "stages": {"alignment": {"data": "alignment", **stage}, "localization": {"data": "photos", **stage}},
        "systems": [{"name": SYSTEM, "stages": ["alignment", "localization"]}],
    }
    tree["evaluate"] |= {"workers": 2, "max_photos": 6, "max_new_tokens": 4, "bootstrap": 100}
    return Config.model_validate(tree)


def job(folder: Path, config: Config, name: str, *flags: str) -> list[str]:
    file = folder / "town.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return [sys.executable, f"ray_jobs/{name}.py", "--config", str(file), *flags]


def environment(nodes: Nodes) -> dict[str, str]:
    return {**nodes.environment, "OPENAI_API_KEY": "sk-test-0123456789abcdef"}


def ids(folder: Path, split: str = "train") -> list[str]:
    return [row["id"] for row in tables.iter_rows(folder, split, ["id"])]


def test_photos_are_grafted_once_when_a_node_is_lost(made: tuple[Config, Kills, Endpoint, str]) -> None:
    config, kills, _, text = made
    run = Run(config)
    assert 0 < len(kills.grafted) < len(plan_shards(run.photos, "train", graft.SHARD_ROWS))
    photos = ids(run.photos)
    assert len(photos) > 600
    assert ids(run.grafts) == photos
    assert f"graft: {len(photos):,} grafted images" in text


def test_no_label_is_paid_twice_but_those_in_flight_on_the_lost_node(made: tuple[Config, Kills, Endpoint, str]) -> None:
    config, _, endpoint, _ = made
    run = Run(config)
    labels = list(tables.iter_rows(run.alignment, "train", ["id", "source"]))
    assert [row["id"] for row in labels] == ids(run.grafts)
    assert Counter(row["source"] for row in labels) == {"openai:m": len(labels)}
    in_flight = config.labels.concurrency  # of a task on the lost node, which nobody recorded
    assert len(endpoint.requests) <= len(labels) + in_flight


def test_training_resumes_from_the_checkpoint(made: tuple[Config, Kills, Endpoint, str]) -> None:
    config, kills, _, text = made
    run = Run(config)
    lines = (run.training_dir(SYSTEM) / "loss.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, STEPS + 1)] * 2
    resumed = [int(step) for step in re.findall(r"resuming after step (\d+) of 20", text)]  # anew while a node is missing
    assert 0 < min(resumed, default=0) <= len(kills.trained) < 2 * STEPS
    assert lines[: min(resumed)] == kills.trained[: min(resumed)]  # not trained again, their very timings are kept
    assert (run.model_dir(SYSTEM) / "merged" / "model.safetensors").is_file()


def test_the_model_is_evaluated(made: tuple[Config, Kills, Endpoint, str]) -> None:
    config, *_ = made
    (system,) = json.loads(Run(config).metrics.read_text())["systems"]
    assert system["name"] == SYSTEM
    assert len(ids(Run(config).answers / "addressvlm", "test")) > 6


def test_photos_are_localized_once_when_a_node_is_lost(
    made: tuple[Config, Kills, Endpoint, str], nodes: Nodes, tmp_path: Path
) -> None:
    config, *_ = made
    run, out = Run(config), tmp_path / "found"
    command = job(tmp_path, config, "localize", "--photos", str(run.photos), "--split", "val", "--out", str(out))
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment(nodes), stdout=subprocess.PIPE, text=True) as process:
        nodes.replace("ray::ShardActor")
        text, _ = process.communicate()
    assert process.returncode == 0, text
    assert sorted(ids(out, "located")) == sorted(ids(run.photos, "val"))
    assert pq.read_metadata(out / "rejects.parquet").num_rows == 0


def test_the_service_loses_only_requests_in_flight(
    made: tuple[Config, Kills, Endpoint, str], nodes: Nodes, tmp_path: Path
) -> None:
    """serve/production.yaml with this model, without GPUs, and one proxy, since all nodes are on this machine."""
    config, *_ = made
    tree, port = yaml.safe_load((REPOSITORY / "serve" / "production.yaml").read_text()), free_port()
    tree |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}
    (application,) = tree["applications"]
    mine = {"num_gpus": 0, "num_cpus": 0.4, "dtype": "float32", "image_cpus": 0.1, "image_processes": 1, "rate_limit": 0}
    application["args"] |= {"model": str(Run(config).model_dir(SYSTEM) / "merged"), **mine}
    file, url = tmp_path / "service.yaml", f"http://127.0.0.1:{port}"
    file.write_text(yaml.safe_dump(tree))
    with subprocess.Popen(
        ["env", "--default-signal=INT", str(PROGRAMS / "serve"), "run", str(file)], cwd=REPOSITORY, env=nodes.environment
    ) as process:
        wait_for(lambda: up(url), process)
        with ThreadPoolExecutor(CLIENTS) as clients:
            asked = [clients.submit(locate, url, number) for number in range(80)]
            wait_for(lambda: sum(one.done() for one in asked) >= 10, process)
            nodes.replace("ServeReplica:addressvlm:Localizer")
            failed = [one.result() for one in asked]
        process.send_signal(signal.SIGINT)  # ends the application too
    assert sum(failed) <= CLIENTS


def up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def locate(url: str, number: int) -> bool:
    """Whether the first of two tries failed; the second must not."""
    for again in (False, True):
        try:
            answer = httpx.post(f"{url}/v1/localize", files={"file": ("p.jpg", photo(number))}, timeout=120)
        except httpx.HTTPError:
            continue
        if answer.status_code == 200:
            assert answer.json()["candidates"][0]["street"].startswith("Street")
            return again
    raise AssertionError(f"photo {number} failed twice")


def test_training_continues_with_fewer_workers_after_a_node_loss(nodes: Nodes, tmp_path: Path) -> None:
    """The last one, for the cluster stays with one node that takes tasks; by itself: -k fewer_workers."""
    config, steps = config_of(tmp_path, tiny_llava(tmp_path / "base"), "http://127.0.0.1"), 4 * STEPS
    config.train.min_workers, config.train.systems = 1, [SystemConfig(name="stage 2 only", stages=["localization"])]
    config.train.stages["localization"].max_steps = steps
    journal = Run(config).training_dir("stage 2 only")
    losses, command = journal / "loss.jsonl", job(tmp_path, config, "train")
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment(nodes), stdout=subprocess.PIPE, text=True) as process:
        wait_for(lambda: losses.is_file() and len(losses.read_text().splitlines()) >= STEPS, process)
        nodes.lose("RayTrainWorker")
        trained = losses.read_text().splitlines()
        text, _ = process.communicate()
    assert process.returncode == 0, text
    lines = losses.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, steps + 1)]
    resumed = [int(step) for step in re.findall(rf"resuming after step (\d+) of {steps}", text)]
    assert 0 < min(resumed, default=0) <= len(trained) < steps
    assert lines[: min(resumed)] == trained[: min(resumed)]
    listed = json.loads((journal / "checkpoint_manager_snapshot.json").read_text())["checkpoint_results"]
    for name in [result["checkpoint_dir_name"] for result in listed]:
        assert TrainingCheckpoint.read(journal / name).step <= steps  # each is whole
