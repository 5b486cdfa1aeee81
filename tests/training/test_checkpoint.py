"""Checkpoints that are incomplete or of another model, and the best adapter

python -m pytest -q tests/training/test_checkpoint.py
"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from addressvlm import InputError
from addressvlm.storage.run_dir import Run
from addressvlm.training import trainer
from addressvlm.training.checkpoint import TrainingCheckpoint, better_adapter
from addressvlm.training.trainer import train_system
from tests.support.tiny import tiny_llava
from tests.support.training_tables import keeping, nothing, trained_config


@pytest.mark.parametrize("name", ["state.pt", "position.json"])
def test_an_incomplete_checkpoint_is_an_error(tmp_path: Path, base: Path, name: str) -> None:
    config = trained_config(tmp_path, base)
    config.train.stages["localization"].max_steps = 2
    kept: list[Path] = []
    train_system(config, "stage 2 only", None, keeping(kept, tmp_path))
    content = (kept[0] / name).read_bytes()
    (kept[0] / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"the checkpoint in .* is incomplete \(.*: remove it to resume from the one before"):
        train_system(config, "stage 2 only", kept[0], nothing)


def test_a_checkpoint_of_an_earlier_format_is_refused(tmp_path: Path) -> None:
    TrainingCheckpoint(0, 4, {}, {}).write(tmp_path)
    (tmp_path / "position.json").write_text('{"stage": 0, "step": 4}')
    with pytest.raises(InputError, match=r"is of another version of this program, whose rows came in another order: finish"):
        TrainingCheckpoint.read(tmp_path)


def test_a_disk_that_is_full_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(torch, "save", fail)
    checkpoint = TrainingCheckpoint(0, 4, {"weights": torch.zeros(1000)}, {})
    with pytest.raises(RuntimeError):
        checkpoint.write(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=999))
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.write(tmp_path)
    assert not (tmp_path / "position.json").exists()


def test_checkpoints_come_by_the_clock_of_the_first_worker(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    config = trained_config(tmp_path, base, checkpoint_every=None, checkpoint_minutes=1.0)
    config.train.stages["localization"].max_steps = 7
    one_step = trainer.Trainer.train_step

    def half_a_minute(self: Any, *args: Any) -> Any:
        now[0] += 30.0
        return one_step(self, *args)

    monkeypatch.setattr(trainer.Trainer, "train_step", half_a_minute)
    kept: list[Path] = []
    train_system(config, "stage 2 only", None, keeping(kept, tmp_path))
    assert [TrainingCheckpoint.read(folder).step for folder in kept] == [2, 4, 6, 7]


def test_checkpoint_of_another_rank_is_refused(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    kept: list[Path] = []
    train_system(config, "stage 2 only", None, keeping(kept, tmp_path))
    config.model.llm.rank = 3
    with pytest.raises(InputError, match="another base model or other LoRA settings"):
        train_system(config, "stage 2 only", kept[0], nothing)


def test_a_checkpoint_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    config = trained_config(tmp_path, base)
    kept: list[Path] = []
    train_system(config, "stage 2 only", None, keeping(kept, tmp_path))
    config.model.base = str(tiny_llava(tmp_path / "other", seed=1, patch=16))
    with pytest.raises(InputError, match="another base model or other LoRA settings"):
        train_system(config, "stage 2 only", kept[0], nothing)
    assert torch.load(kept[-1] / "state.pt", weights_only=True)["adapter"]


def test_the_adapter_that_validated_best_is_kept_and_can_be_merged(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result: dict[str, dict[str, torch.Tensor]] = {}
    for merge in ("last", "best"):
        config = trained_config(tmp_path / merge, base, checkpoint_to_merge=merge, validate_every=2)
        config.train.stages["localization"].max_steps = 8
        turns = [0.5, 0.75, 0.75, 0.25]
        monkeypatch.setattr(trainer, "Validation", lambda *_, turns=turns, **__: lambda *_: {"A_ds": turns.pop(0)})
        kept: list[Path] = []
        train_system(config, "stage 2 only", None, keeping(kept, tmp_path / merge))
        folder = Run(config).model_dir("stage 2 only")
        result[merge] = load_file(folder / "adapter" / "adapter_model.safetensors")
        if merge == "last":
            result["kept"] = load_file(folder / "best" / "adapter_model.safetensors")
        held = TrainingCheckpoint.read(kept[-1]).best
        assert held is not None
        assert (held.step, held.metric, held.value) == (6, "A_ds", 0.75)  # of equal ones the later
        turns.append(0.5)
        train_system(config, "stage 2 only", kept[-2], nothing)  # goes on after the best
        again = load_file(Run(config).model_dir("stage 2 only") / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(again[name], result[merge][name]) for name in again)
    assert all(torch.equal(result["best"][name], result["kept"][name]) for name in result["best"])
    assert any(not torch.equal(result["best"][name], result["last"][name]) for name in result["best"])


def test_what_validates_best_is_of_the_last_stage_and_by_the_first_metric_there_is(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained_config(tmp_path, base, validate_every=2)
    for stage in config.train.stages.values():
        stage.max_steps = 3
    turns = [{"A_ds": 0.9, "A": 0.9}, {"A_ds": 0.8, "A": 0.9}, {"A_ds": 0.5, "A": 0.1}, {"A_ds": 0.25, "A": 0.9}]
    monkeypatch.setattr(trainer, "Validation", lambda *_, **__: lambda *_: turns.pop(0))
    kept: list[Path] = []
    train_system(config, "AddressVLM", None, keeping(kept, tmp_path))
    assert not turns  # after the second and the last step of each stage
    held = [TrainingCheckpoint.read(folder) for folder in kept]
    assert [(one.stage, one.step, one.best and (one.best.step, one.best.metric, one.best.value)) for one in held] == [
        (0, 2, None), (0, 3, None), (1, 2, (2, "A_ds", 0.5)), (1, 3, (2, "A_ds", 0.5)),
    ]  # fmt: skip
    last = held[-1].best
    assert last is not None
    assert all(torch.equal(last.adapter[name], weights) for name, weights in held[2].adapter.items())
    assert better_adapter(last, 9, {}, {}) is last
    assert better_adapter(None, 9, {}, {}) is None
    names = [
        (result := better_adapter(None, 1, dict.fromkeys(given, 0.5), {})) and result.metric
        for given in (["A_s_G", "A_s"], ["A_s", "A"])
    ]
    assert names == ["A_s", "A"]
