"""What a training job hands to Ray Train, and what its result depends on, without Ray"""

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.config.train import StageConfig
from addressvlm.storage.run_dir import Run
from addressvlm.training.checkpoint import TrainingCheckpoint
from ray_jobs import graft, label, prepare, ray_train, train
from ray_jobs.cluster import Workers
from ray_jobs.ray_train import CheckpointReporter, run_training, training_workers
from tests.support.training_tables import trained_config


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What `TorchTrainer` is given instead of being made."""
    made: list[SimpleNamespace] = []

    class Trainer:
        def __init__(self, worker: Any, **given: Any) -> None:
            made.append(SimpleNamespace(worker=worker, **given))

        def fit(self) -> None:
            if error := getattr(made[-1].worker, "error", None):
                raise error

    monkeypatch.setattr(ray_train, "TorchTrainer", Trainer)
    monkeypatch.setattr(ray_train, "make_notice", lambda: "notice")
    monkeypatch.setattr(ray_train, "noticed_error", lambda notice: None)
    monkeypatch.setattr(ray_train, "PLACE_TIMEOUT_SET", None)
    monkeypatch.setenv(ray_train.PLACE_TIMEOUT, "")
    return made


def config_of(folder: Path, **settings: Any) -> Config:
    defaults = {"workers": 3, "cpus_per_worker": 2, "gpus_per_worker": 0.5, "max_failures": 4, "keep_checkpoints": 5}
    return trained_config(folder, folder / "base", rows=1, **{**defaults, **settings})


def test_ray_train_is_given_the_settings(trainers: list[SimpleNamespace], tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run_training(config, "stage 2 only", print, {"system": "s"})
    run_training(config_of(tmp_path, gpus_per_worker=0), "stage 2 only", print, {}, min_workers=2)
    whole, fewer = trainers
    assert whole.train_loop_config == {"config": config.model_dump(), "notice": "notice", "system": "s"}
    assert whole.scaling_config.num_workers == 3
    assert whole.scaling_config.use_gpu
    assert whole.scaling_config.resources_per_worker == {"CPU": 2, "GPU": 0.5}
    assert fewer.scaling_config.num_workers == (2, 3)
    assert not fewer.scaling_config.use_gpu
    assert (whole.run_config.name, whole.run_config.storage_path) == ("stage-2-only", str(Run(config).training))
    assert whole.run_config.checkpoint_config.num_to_keep == 5
    limits = [
        (t.run_config.failure_config.max_failures, t.run_config.failure_config.controller_failure_limit) for t in trainers
    ]
    assert limits == [(4, 4), (4, 4)]  # a worker that is lost while it starts, or late nodes, end no training at once


def test_a_worker_s_sentence_goes_before_that_of_ray(
    trainers: list[SimpleNamespace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        error = ray.train.TrainingFailedError("lost")

    with pytest.raises(ray.train.TrainingFailedError):
        run_training(config_of(tmp_path), "s", Failing(), {})  # type: ignore[arg-type]
    monkeypatch.setattr(ray_train, "noticed_error", lambda notice: InputError(f"said in the {notice}"))
    for worker in (Failing(), print):  # a worker that gave up may also end as if all were well
        with pytest.raises(InputError, match="said in the notice"):
            run_training(config_of(tmp_path), "s", worker, {})  # type: ignore[arg-type]


def test_paths_mean_the_same_in_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    config = Config(name="x", storage="runs")
    config.model.base = "./base"
    made = ray_train.with_absolute_paths(config)
    assert (made.storage, made.model.base) == (str(tmp_path / "runs"), str(tmp_path / "base"))
    assert (config.storage, config.model.base) == ("runs", "./base")


def test_nodes_are_needed_for_all_workers_or_for_the_fewest(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    all_of_them, fewest = training_workers(config, "s"), training_workers(config, "s", 2)
    assert all_of_them == Workers("training 's' with 3 workers", 3, 2, 0.5, "train", "train.workers")
    assert fewest == Workers("training 's' with 2 workers", 2, 2, 0.5, "train", "train.min_workers")


def test_a_node_that_will_be_taken_away_leads_to_one_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, notices, asked = [0.0], [None, object(), object()], []
    monkeypatch.setattr(ray_train.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda steps: steps)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: asked.append(clock[0]) or notices.pop(0))
    reporter, due = CheckpointReporter(), []
    for step in range(1, 20):
        if reporter.is_due():
            due.append(step)
        clock[0] += 0.5  # seconds a step: every fourth asks
    assert due == [8]
    assert asked == [1.5, 3.5]


def test_a_checkpoint_is_written_while_training_continues_and_the_next_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Storage:
        def persist_current_checkpoint(self, checkpoint: Any, name: str) -> Any:
            return Path(checkpoint.path).rename(tmp_path / name)

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(ray.train, "report", lambda metrics, **given: seen.append({"metrics": metrics, **given}))
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=Storage))
    report, checkpoint = CheckpointReporter(), TrainingCheckpoint(1, 2, {}, {})
    report({"step": 1}, None)
    report({"step": 2}, checkpoint)
    assert not report.stored.is_set()
    store = threading.Thread(target=lambda: seen[1]["checkpoint_upload_fn"](seen[1]["checkpoint"], "first"))
    waiting = report.stored.wait
    monkeypatch.setattr(report.stored, "wait", lambda: (store.start(), waiting()))
    report({"step": 3}, checkpoint)
    assert (TrainingCheckpoint.read(tmp_path / "first").stage, TrainingCheckpoint.read(tmp_path / "first").step) == (1, 2)
    assert [given["metrics"]["step"] for given in seen] == [1, 2, 3]
    assert "checkpoint" not in seen[0]
    assert {given["checkpoint_upload_mode"].name for given in seen} == {"ASYNC"}


def test_a_checkpoint_that_fails_lets_the_next_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    given: dict[str, Any] = {}
    monkeypatch.setattr(ray.train, "report", lambda metrics, **arguments: given.update(arguments))
    monkeypatch.setattr(
        ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: SimpleNamespace(persist_current_checkpoint=full))
    )
    report = CheckpointReporter()
    report({}, TrainingCheckpoint(0, 1, {}, {}))
    with pytest.raises(OSError, match="No space left"):
        given["checkpoint_upload_fn"](given["checkpoint"], "name")
    assert report.stored.is_set()


def test_an_error_that_a_user_can_fix_ends_the_run_and_others_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[str] = []
    write = SimpleNamespace(remote=notices.append)
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray_train, "noticed_error", lambda notice: None)
    callback = ray_train.UserErrorCallback(config_of(tmp_path), SimpleNamespace(write=write))
    callback.after_exception(None, {0: RuntimeError("connection closed by peer")})
    assert notices == []
    failed = UserExceptionWithTraceback(InputError("lower the rate"), "")
    with pytest.raises(InputError, match="lower the rate"):
        callback.after_exception(None, {0: RuntimeError("connection closed by peer"), 1: failed})
    assert notices == ["lower the rate"]
    monkeypatch.setattr(ray_train, "noticed_error", lambda notice: InputError("written down before"))
    with pytest.raises(InputError, match="written down before"):
        callback.after_exception(None, {0: RuntimeError("connection closed by peer")})


def _set(path: str, value: Any) -> Callable[[Config], None]:
    *names, last = path.split(".")

    def change(config: Config) -> None:
        at: Any = config
        for name in names:
            at = at[name] if isinstance(at, dict) else getattr(at, name)
        setattr(at, last, value)

    return change


RESULT = [
    ("train.workers", 7), ("train.strategy", "fsdp2"), ("train.precision", "bfloat16"), ("train.packing", "off"),
    ("train.cities", {"small": 2.0}), ("train.checkpoint_to_merge", "best"), ("train.seed", 5), ("seed", 5),
    ("model.base", "other"),
    ("model.llm.rank", 3), ("model.llm.alpha", 3.0), ("model.vision.dropout", 0.5), ("model.lora_dropout", 0.5),
    ("model.dtype", "bfloat16"), ("labels.prompt", "grounded"), ("city.manifest", "other.csv"),
    *[(f"train.stages.localization.{name}", value) for name, value in (
        ("parts", ["llm"]), ("isolate_questions", True), ("epochs", 9.0), ("max_steps", 9), ("batch_size", 9),
        ("gradient_accumulation_steps", 9),
        ("learning_rate", 9.0), ("learning_rates", {"llm": 9.0}), ("warmup_ratio", 0.9),
        ("weight_decay", 9.0), ("max_grad_norm", 9.0),
        ("augment", {"colour": 0.5}),
    )],
    ("train.stages.alignment.epochs", 9.0),
]  # fmt: skip
NO_MATTER = [
    ("train.checkpoint_every", 9), ("train.checkpoint_minutes", 9.0), ("train.loader_processes", 9), ("train.compile", True),
    ("train.keep_checkpoints", 9), ("train.loggers", ["wandb"]), ("train.max_failures", 9),
    ("train.peak_tflops", 9.0), ("train.mfu", 0.1), ("train.gpu_memory_gib", 9.0), ("train.cpus_per_worker", 9.0),
    ("train.checkpoint_activations", True), ("train.validate_every", 9), ("evaluate.max_new_tokens", 9),
]  # fmt: skip


def settings_after(folder: Path, path: str, value: Any, system: str) -> Any:
    config = trained_config(folder, folder / "base", rows=1)
    if path:
        if path.endswith("augment"):
            value = StageConfig(data="photos", augment=value).augment
        _set(path, value)(config)
    return train.settings(config, next(s for s in config.train.systems if s.name == system))


@pytest.mark.parametrize(("path", "value"), RESULT)
def test_what_changes_a_model_begins_it_anew(tmp_path: Path, path: str, value: Any) -> None:
    for system in ("AddressVLM", "stage 2 only, equal steps"):  # the latter by the number of its steps
        assert settings_after(tmp_path, path, value, system) != settings_after(tmp_path, "", None, system)


@pytest.mark.parametrize(("path", "value"), NO_MATTER)
def test_what_changes_no_model_does_not(tmp_path: Path, path: str, value: Any) -> None:
    assert settings_after(tmp_path, path, value, "AddressVLM") == settings_after(tmp_path, "", None, "AddressVLM")


@pytest.mark.parametrize("name", ["validate_every", "validate_photos"])
def test_a_model_that_validated_best_depends_on_how_it_was_validated(tmp_path: Path, name: str) -> None:
    config = config_of(tmp_path, checkpoint_to_merge="best", validate_every=5)
    before = train.settings(config, config.train.systems[-1])
    setattr(config.train, name, 9)
    assert train.settings(config, config.train.systems[-1]) != before


def test_systems_are_trained_in_the_order_of_the_configuration(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    names = [system.name for system in train.select_systems(config, None)]
    assert names == ["stage 2 only", "stage 2 only, equal steps", "AddressVLM"]
    assert [system.name for system in train.select_systems(config, ["AddressVLM", "stage 2 only"])] == [
        "stage 2 only",
        "AddressVLM",
    ]
    for unknown in ("zero-shot", "Addressvlm"):
        with pytest.raises(InputError, match=f"--system {unknown}: systems that can be trained are stage 2 only, "):
            train.select_systems(config, [unknown])


def test_data_of_other_cities_must_be_there_and_is_never_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for step in (prepare, graft, label):
        monkeypatch.setattr(step, "run_step", lambda config, *_, name=step.__name__: made.append((name, config.labels.prompt)))
    config = config_of(tmp_path)
    joint = config.model_copy(deep=True)
    joint.name, joint.train.cities = "joint", {"small": 1.0}
    train.make_data(joint, False, {"photos", "alignment"})
    assert made == []
    joint.train.cities = {"small": 1.0, "joint": 1.0}
    train.make_data(joint, False, {"photos"})
    assert [name for name, _ in made] == ["ray_jobs.prepare"]
    joint.train.cities = {"elsewhere": 1.0}
    with pytest.raises(
        InputError, match=r"train\.cities names elsewhere, which has no photos in .*elsewhere: run ray_jobs/prep"
    ):
        train.make_data(joint, False, {"photos"})
    made.clear()
    train.make_data(config, False, {"reasoning"})
    assert made == [("ray_jobs.prepare", config.labels.prompt), ("ray_jobs.label", "reasoning")]
