"""The log of a training: files, progress line, external loggers

python -m pytest -q tests/training/test_metrics_logger.py
"""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.storage.run_dir import Run
from addressvlm.training import metrics_logger
from addressvlm.training.loader import StepLoader
from addressvlm.training.metrics_logger import peak_of_gpu
from addressvlm.training.trainer import train_system
from tests.support.training_tables import nothing, trained_config


def steps(config: Config, system: str) -> list[dict[str, Any]]:
    path = Run(config).training_dir(system) / "loss.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def progress_of(step: int, **given: Any) -> metrics_logger.StepMetrics:
    seen = {"loss": 2.0, "learning_rate": 0.1, "gradient_norm": 3.0, "samples_per_s": 4.0, "tokens": 5, "tokens_per_s": 60.0}
    return metrics_logger.StepMetrics("localization", step, 9, **{**seen, "mfu": None, "memory_gib": 0.5, **given})


def test_the_line_is_a_mean_over_the_steps_since_the_last_one(tmp_path: Path) -> None:
    account = metrics_logger.MetricsLogger(tmp_path, "system", 4, 10)
    account.began, account.done = 0.0, 6
    account.since_line = [
        progress_of(1, mfu=0.25, seconds=1.0, samples_per_s=8.0, tokens_per_s=80.0),
        progress_of(2, mfu=0.05, rejected=3, seconds=3.0, samples_per_s=4.0, waits={"data": 0.4, "checkpoints": 0.001}),
    ]
    assert account._progress_line(now=10.0) == (
        "localization step 2/9, loss 2.000, 5.0 photos/s, 65 tokens/s, 10.0 % of peak, waiting for data 30 %, 0.5 GiB, "
        "3 rows rejected, 20 s left"
    )


def test_a_line_comes_first_last_and_every_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(metrics_logger.time, "monotonic", lambda: now[0])
    account = metrics_logger.MetricsLogger(tmp_path, "system", 20, 32)
    for step in range(1, 13):
        now[0] += 2.0
        account.log_step(progress_of(step, samples_per_s=float(step), seconds=2.0))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("step ")[1].split("/")[0] for line in lines] == ["1", "4", "7", "10", "12"]
    photos = [line.split(" photos/s")[0].split(", ")[-1] for line in lines]
    assert photos == ["1.0", "3.0", "6.0", "9.0", "11.5"]  # of the steps since the line before
    assert [line.split(", ")[-1] for line in lines] == ["22 s left", "16 s left", "10 s left", "4 s left", "0 s left"]
    assert len((tmp_path / "loss.jsonl").read_text().splitlines()) == 12


def test_a_curve_goes_on_after_the_step_resumed_from(tmp_path: Path) -> None:
    whole = metrics_logger.MetricsLogger(tmp_path, "system", 0, 9)
    for step in range(1, 6):
        whole.log_step(progress_of(step, loss=float(step)))
    resumed = metrics_logger.MetricsLogger(tmp_path, "system", 3, 9)
    resumed.log_step(progress_of(4, loss=40.0))
    lines = [json.loads(line) for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1, 2, 3, 40]
    assert (resumed.done, resumed.first) == (4, 3)


def test_a_step_lasts_until_the_next_and_every_wait_is_a_share_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(metrics_logger.time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    clock = metrics_logger.StepClock(torch.device("cpu"))
    with clock.waiting("data"):
        spend(2.0)
    with clock.collective():
        spend(1.0)
    spend(5.0)
    assert clock.lap() == (8.0, {"data": 0.25, "checkpoints": 0.0, "workers": 0.125, "validation": 0.0})
    with clock.waiting("checkpoints"):
        spend(4.0)
    assert clock.lap() == (4.0, {"data": 0.0, "checkpoints": 1.0, "workers": 0.0, "validation": 0.0})


def test_waits_for_data_and_checkpoints_are_in_the_loss_curve(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics_logger.time, "perf_counter", lambda: now[0])
    whole = StepLoader.__iter__

    def slow(self: StepLoader) -> Any:
        for share in whole(self):
            now[0] += 3.0
            yield share

    def write(metrics: dict[str, Any], checkpoint: Any) -> None:
        now[0] += 1.0

    monkeypatch.setattr(StepLoader, "__iter__", slow)
    config = trained_config(tmp_path, base, checkpoint_every=2)
    config.train.stages["localization"].max_steps = 4
    train_system(config, "stage 2 only", None, write)
    result = steps(config, "stage 2 only")
    assert [step["seconds"] for step in result] == [3.0, 3.0, 4.0, 3.0]
    assert [step["waits"]["data"] for step in result] == [1.0, 1.0, 0.75, 1.0]
    assert [step["waits"]["checkpoints"] for step in result] == [0.0, 0.0, 0.25, 0.0]
    assert [step["samples_per_s"] for step in result] == pytest.approx([4 / 3, 4 / 3, 1.0, 4 / 3])


def test_an_external_logger_gets_the_scalars_by_the_system_s_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    client = ModuleType("mlflow")
    client.__spec__ = ModuleSpec("mlflow", None)
    client.set_experiment = lambda name: sent.append(name)  # type: ignore[attr-defined]
    client.start_run = lambda run_name: sent.append(run_name)  # type: ignore[attr-defined]
    client.log_metrics = lambda values, step: sent.append((values, step))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", client)
    account = metrics_logger.MetricsLogger(tmp_path, "AddressVLM", 4, 10, ["mlflow"], "small")
    account.log_step(progress_of(1, by_kind={"choice": 1.5}))
    account.log_validation("localization", 1, {"A_ds": 0.5})
    assert sent[:2] == ["addressvlm", "small: AddressVLM"]
    values, step = sent[2]
    assert (step, values["localization/loss"], values["localization/loss of choice"]) == (5, 2.0, 1.5)
    assert "localization/mfu" not in values
    assert sent[3] == ({"localization/val/A_ds": 0.5}, 5)


def test_validation_after_the_step_resumed_from_is_forgotten(tmp_path: Path) -> None:
    def journal_of(done: int) -> metrics_logger.MetricsLogger:
        return metrics_logger.MetricsLogger(tmp_path, "system", done, 9)

    before = journal_of(0)
    for before.done in (2, 4, 6):
        before.log_validation("localization", before.done, {"A": 0.5})
    journal_of(4)
    result = (tmp_path / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["done"] for line in result] == [2, 4]


def test_a_missing_external_logger_is_an_error() -> None:
    with pytest.raises(InputError, match=r"train\.loggers names no_such_tracker, which is not installed"):
        metrics_logger.external_logger("no_such_tracker", "run", "system")


def test_the_loss_of_each_kind_of_question_is_logged(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base, peak_tflops=1e-3)
    train_system(config, "stage 2 only", None, nothing)
    last = steps(config, "stage 2 only")[-1]
    assert set(last["by_kind"]) == {"generation", "judgment"}
    assert last["tokens_per_s"] > last["samples_per_s"]
    assert last["mfu"] > 0
    assert last["memory_gib"] > 0.05


def test_peaks_are_found_by_a_part_of_the_name() -> None:
    assert peak_of_gpu("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of_gpu("NVIDIA H100 PCIe") == 756e12
    assert peak_of_gpu("NVIDIA L40S") == 362e12
    assert peak_of_gpu("some other card") is None
    assert metrics_logger.peak_flops(torch.device("cpu"), torch.bfloat16) is None
    assert metrics_logger.peak_flops(torch.device("cpu"), torch.float32, 2.5) == 2.5e12
