"""Ray Train around the training: two workers, ZeRO-2, and what happens when workers, or the whole job, are killed.

python -m pytest -q tests/integration/test_train.py
"""

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from safetensors.torch import load_file

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.storage.run_dir import LAST_MODEL_FILE, Run, mark_done
from addressvlm.training.trainer import train_system
from ray_jobs import graft, label, prepare, train
from ray_jobs.ray_train import place_timeout_s, run_training, run_worker, to_user_error
from tests.support.tiny import tiny_llava
from tests.support.training_tables import trained_config

pytestmark = pytest.mark.xdist_group("ray")

os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # a report waits for it; the steps here are quicker than 2 s

ROOT = Path(__file__).parents[2]
SYSTEM = "AddressVLM"
STEPS = 24  # of each of the two stages
KILL_AT = 14  # steps done when something is killed; checkpoints are every 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("tiny"))


def ready(folder: Path, base: Path, workers: int, **settings: object) -> Config:
    """A run that has all but the training: 8 rows a step whatever the workers, 24 steps a stage."""
    config = trained_config(folder, base, workers=workers, checkpoint_every=4, **settings)
    config.model.lora_dropout = 0.0  # workers draw their own masks, so only without is their number of no consequence
    for stage in config.train.stages.values():
        stage.batch_size, stage.epochs, stage.learning_rate = 8 // workers, 8, 0.005
    run = Run(config)
    run.grafts.mkdir()
    for made, step in ((run.photos, prepare), (run.grafts, graft), (run.alignment, label)):
        mark_done(made, step.settings(config))
    return config


def lines(config: Config) -> list[str]:
    path = Run(config).training_dir(SYSTEM) / "loss.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def curve(config: Config) -> list[float]:
    steps = [json.loads(line) for line in lines(config)]
    assert [s["step"] for s in steps] == [*range(1, STEPS + 1)] * 2
    return [s["loss"] for s in steps]


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Run(config).model_dir(SYSTEM) / "adapter" / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@contextmanager
def killing(
    config: Config, victims: Callable[[], list[psutil.Process]], ready: Callable[[Config], object] = lambda config: True
) -> Iterator[list[str]]:
    """Kill -9 as soon as the loss curve has `KILL_AT` steps and it is ready; gives the lines that it had then."""
    then: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            if len(lines(config)) >= KILL_AT and ready(config):
                for victim in victims():
                    victim.kill()
                then.extend(lines(config))
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield then
    finally:
        over.set()
        watcher.join()


def a_worker() -> list[psutil.Process]:
    """One of the processes that train for this Ray."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if any("RayTrainWorker" in word for word in child.cmdline())][-1:]


def went_on(config: Config, then: list[str]) -> bool:
    """Whether the steps before the last checkpoint are those of before the kill, their very timings too."""
    kept = checkpointed(then)
    return KILL_AT <= len(then) < 2 * STEPS and lines(config)[:kept] == then[:kept]


def checkpointed(then: list[str]) -> int:
    """The step whose checkpoint was surely listed; the next may have been stored and not listed, the one after under way."""
    return (len(then) - 1) // 4 * 4 - 8


def stored(config: Config, listed: bool) -> list[Path]:
    """The folders of checkpoints that are in Ray's list, or those that are being written or about to be listed."""
    folder = Run(config).training_dir(SYSTEM)
    manifest = folder / "checkpoint_manager_snapshot.json"
    names = manifest.read_text() if manifest.is_file() else ""
    return [path for path in folder.glob("checkpoint_*/") if (path.name in names) == listed]


def being_written(config: Config) -> list[Path]:
    return stored(config, listed=False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Config:
    """Trained without Ray in one process."""
    config = ready(tmp_path_factory.mktemp("alone"), base, workers=1)
    train_system(config, SYSTEM, None, lambda metrics, folder: None)
    return config


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, base: Path, ray_local: None) -> Config:
    """Trained by two workers, undisturbed; their rows are encoded by processes, elsewhere by a thread."""
    config = ready(tmp_path_factory.mktemp("pair"), base, workers=2, loader_processes=1)
    train.run_step(config, False, [SYSTEM])
    return config


def test_two_workers_train_what_one_does_with_twice_the_batch(pair: Config, alone: Config) -> None:
    run = Run(pair)
    assert (run.model_dir(SYSTEM) / "adapter" / "adapter_config.json").is_file()
    assert (run.model_dir(SYSTEM) / "merged" / "model.safetensors").is_file()
    assert (run.folder.parent / LAST_MODEL_FILE).read_text() == f"{run.model_dir(SYSTEM)}/merged\n"
    losses = curve(pair)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert losses == pytest.approx(curve(alone), rel=0.01)


def test_what_is_trained_is_not_trained_again(pair: Config, capsys: pytest.CaptureFixture) -> None:
    train.run_step(pair, False, [SYSTEM])
    assert capsys.readouterr().out == "train: AddressVLM: already done\n"


@pytest.mark.nodes
def test_a_killed_worker_costs_no_more_than_the_steps_since_the_checkpoint(tmp_path: Path, base: Path, pair: Config) -> None:
    config = ready(tmp_path, base, workers=2)
    with killing(config, a_worker) as then:
        train.run_step(config, False, [SYSTEM])
    assert went_on(config, then)
    assert curve(config) == curve(pair)
    assert same(weights(config), weights(pair))


@pytest.mark.nodes
def test_a_killed_job_goes_on_when_the_command_is_given_again(tmp_path: Path, base: Path, alone: Config) -> None:
    config = ready(tmp_path, base, workers=1)
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(config.model_dump()))
    command = [sys.executable, "ray_jobs/train.py", "--config", str(file), "--system", SYSTEM]
    environment = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    def all_of_it() -> list[psutil.Process]:
        return [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]

    with killing(config, all_of_it, being_written) as then:
        assert job.wait() == -9
    positions = [json.loads((path / "position.json").read_text()) for path in stored(config, listed=True)]
    listed = max(STEPS * at["stage"] + at["step"] for at in positions)
    assert not Run(config).model_dir(SYSTEM).exists()
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    message = re.search(r"resuming after step (\d+) of 48", again.stdout)
    assert message
    assert checkpointed(then) <= int(message[1]) == listed <= len(then)
    assert went_on(config, then)
    assert curve(config) == curve(alone)
    assert same(weights(config), weights(alone))


def test_a_diverging_loss_is_told_at_once_and_the_checkpoint_stays(tmp_path: Path, base: Path, ray_local: None) -> None:
    config = ready(tmp_path, base, workers=1)
    config.train.checkpoint_every = 1
    for stage in config.train.stages.values():
        stage.learning_rate, stage.max_grad_norm = 1e30, 1e30
    with pytest.raises(InputError, match=r"the loss is nan .*at step \d+: lower train.stages.localization.learning_rate"):
        train.run_step(config, False, ["stage 2 only"])
    folder = Run(config).training_dir("stage 2 only")
    assert len(list((folder / "tensorboard").iterdir())) == 1  # one start, no second attempt
    (checkpoint,) = folder.glob("checkpoint_*/state.pt")
    assert all(w.isfinite().all() for w in torch.load(checkpoint, weights_only=True)["adapter"].values())
    assert not Run(config).model_dir("stage 2 only").exists()


def test_a_worker_s_error_is_told_while_the_other_waits_for_it_without_end(tmp_path: Path, base: Path, ray_local: None) -> None:
    config = ready(tmp_path, base, workers=2)

    def work(config: Config, checkpoint: Path | None, device: torch.device) -> None:
        if torch.distributed.get_rank() == 1:
            (tmp_path / "raised").touch()
            raise InputError("the second worker can't go on: do this")
        torch.distributed.recv(torch.zeros(1), src=1)  # ends with the other's process alone

    with pytest.raises(InputError, match=r"^the second worker can't go on: do this$"):
        run_training(config, SYSTEM, lambda arguments: run_worker(arguments, work), {})
    assert time.time() - (tmp_path / "raised").stat().st_mtime < 20


def test_a_checkpoint_that_cant_be_stored_is_one_sentence(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    failed = WorkerGroupError("", {0: UserExceptionWithTraceback(full, "")})
    assert "can't be written (No space left on device): free space" in str(to_user_error(failed, config, SYSTEM))
    assert to_user_error(WorkerGroupError("", {0: UserExceptionWithTraceback(KeyError("x"), "")}), config, SYSTEM) is None


def test_more_workers_than_the_cluster_has_is_told(tmp_path: Path, base: Path, ray_local: None) -> None:
    config = ready(tmp_path, base, workers=2)
    config.train.cpus_per_worker = 32
    with pytest.raises(InputError, match=r"needs 64 CPUs and the cluster has 4: lower train.workers"):
        train.run_step(config, False, [SYSTEM])
    config.train.cpus_per_worker, config.train.gpus_per_worker = 1, 16
    with pytest.raises(InputError, match=r"needs 32 GPUs and the cluster has 0: lower train.workers"):
        train.run_step(config, False, [SYSTEM])


def test_room_that_went_away_is_not_waited_for_when_fewer_workers_will_do() -> None:
    config = Config.model_validate({"name": "x", "train": {"max_failures": 2}})
    counted_every = _AutoscalingCoordinatorActor.TICK_INTERVAL_S
    fewer, all_of_them = (float(place_timeout_s(config, workers)) for workers in (1, None))
    assert counted_every < fewer < all_of_them == config.cluster.wait_s  # so the second try knows what is left


def test_labels_are_made_only_for_systems_that_learn_from_them(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, made = trained_config(tmp_path, base), []
    for step in (prepare, graft, label):
        monkeypatch.setattr(step, "run_step", lambda *_, name=step.__name__: made.append(name.split(".")[-1]))
    by_name = {s.name: train.tables_of(config, s) for s in config.train.systems}
    assert by_name["stage 2 only"] == {"photos"}
    assert by_name["stage 2 only, equal steps"] == by_name["AddressVLM"] == {"alignment", "photos"}
    train.make_data(config, False, by_name["stage 2 only"])
    assert made == ["prepare"]
    train.make_data(config, False, by_name["AddressVLM"])
    assert made == ["prepare", "prepare", "graft", "label"]
    before = train.settings(config, config.train.systems[1])
    config.labels.labeler = "local"
    assert train.settings(config, config.train.systems[1]) == before


def test_a_missing_base_model_is_told(tmp_path: Path, base: Path, ray_local: None) -> None:
    config = ready(tmp_path, base, workers=1)
    config.model.base = str(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"no model folder .*nothing: give an existing folder"):
        train.run_step(config, False, [SYSTEM])
