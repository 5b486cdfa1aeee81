"""Two workers on gloo: whatever is cut among them, the same losses, metrics and adapter, and checkpoints that fit all.

python -m pytest -q tests/training/test_strategies.py
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from addressvlm.config import Config
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.training.checkpoint import TrainingCheckpoint
from addressvlm.training.trainer import train_system
from tests.support.training_tables import keeping, nothing, table_rows, trained_config

pytestmark = pytest.mark.xdist_group("strategies")

SYSTEM = "AddressVLM"
KINDS = ("ddp", "fsdp2", "zero2", "zero3")
STEPS = 5  # of each of the two stages
RESUMED = 3  # number of the snapshot gone on from: after two steps of the second stage


def config_of(folder: Path, base: Path, **train: Any) -> Config:
    """A run of four rows a step, whatever the workers, which validates after its last step."""
    settings = {"workers": 2, "checkpoint_every": 2, "validate_every": 99, "validate_photos": 2, **train}
    config = trained_config(folder, base, **settings)
    config.model.lora_dropout = 0.0  # workers draw their own masks
    config.evaluate.max_new_tokens = 4
    for stage in config.train.stages.values():
        stage.batch_size, stage.gradient_accumulation_steps, stage.max_steps = 1, 2, STEPS
    of_place = {"lat": 0.0, "lon": 0.0, "street": "Mill Street", "district": "Harbour", "heading": None}
    columns = ("id", "place", "lat", "lon", "street", "district", "image", "rounds")
    schema = tables.with_features(tables.pa.schema([tables.PHOTOS.field(c) for c in columns]))
    tables.write_table(Run(config).photos, "val", [row | of_place for row in table_rows(4)], schema)
    return config


def work(rank: int, folder: Path, base: Path) -> None:
    """What each worker does: train with every strategy, then go on from a snapshot of that and of another."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for kind in KINDS:
        config = config_of(folder / kind, base, strategy=kind)
        train_system(config, SYSTEM, None, first_only(rank, folder / kind))
        dist.barrier()
        whole = keep(rank, config, "whole")
        train_system(config, SYSTEM, whole / f"checkpoint{RESUMED}", nothing)
    for kind in KINDS:
        settings = {"strategy": kind, "checkpoint_activations": True, "precision": "bfloat16"}
        config = config_of(folder / f"{kind} in bfloat16", base, **settings)
        config.model.dtype = "bfloat16"
        train_system(config, "stage 2 only", None, nothing)
    dist.destroy_process_group()


def first_only(rank: int, folder: Path) -> Any:
    """A report that keeps the first worker's snapshots."""
    return keeping([], folder) if rank == 0 else nothing


def keep(rank: int, config: Config, name: str) -> Path:
    """Put the trained adapter and the curve where the next training does not find them; the run's folder."""
    folder = Path(config.storage).parent
    if rank == 0:
        Run(config).model_dir(SYSTEM).rename(folder / name)
        (Run(config).training_dir(SYSTEM) / "loss.jsonl").rename(folder / name / "loss.jsonl")
    dist.barrier()
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The folder in which two workers have trained with every strategy."""
    folder = tmp_path_factory.mktemp("pair")
    mp.spawn(work, (folder, base), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Config:
    """The same, trained by one process."""
    config = config_of(tmp_path_factory.mktemp("alone"), base)
    train_system(config, SYSTEM, None, nothing)
    return config


def curve(file: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether adapters are the same but for rounding, which AdamW's first steps make large where gradients are next to none."""
    far = sum(int(((one[name] - other[name]).abs() > 2e-3).sum()) for name in one)
    return one.keys() == other.keys() and far < 0.01 * sum(weights.numel() for weights in one.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_strategy_trains_what_one_process_does(kind: str, pair: Path, alone: Config) -> None:
    expected, run = curve(Run(alone).training_dir(SYSTEM) / "loss.jsonl"), Run(alone)
    assert len(expected) == 2 * STEPS
    assert curve(pair / kind / "whole" / "loss.jsonl") == pytest.approx(expected, rel=2e-3)
    assert close(adapter(pair / kind / "whole"), adapter(run.model_dir(SYSTEM)))
    merged = load_file(pair / kind / "whole" / "merged" / "model.safetensors")
    assert {name: weights.shape for name, weights in merged.items()} == {
        name: weights.shape for name, weights in load_file(run.model_dir(SYSTEM) / "merged" / "model.safetensors").items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_strategy_validates_as_one_process_does(kind: str, pair: Path, alone: Config) -> None:
    name = f"training/{Run(alone).training_dir(SYSTEM).name}/validation.jsonl"
    result = [json.loads(line) for line in (pair / kind / "runs" / "small" / name).read_text().splitlines()]
    expected = [json.loads(line) for line in (Run(alone).folder / name).read_text().splitlines()]
    assert [line["done"] for line in expected] == [STEPS, 2 * STEPS]
    assert result[-1] == expected[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_strategy_goes_on_from_its_own_checkpoint_to_equal_weights(kind: str, pair: Path) -> None:
    again, whole = adapter(pair / kind / "runs" / "small" / "models" / "addressvlm"), adapter(pair / kind / "whole")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_from_the_checkpoint_of_two_workers(kind: str, pair: Path, base: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, base, strategy=kind)
    train_system(config, SYSTEM, pair / kind / f"checkpoint{RESUMED}", nothing)
    assert close(adapter(Run(config).model_dir(SYSTEM)), adapter(pair / kind / "whole"))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights_learn_alike_with_activations_computed_twice(kind: str, pair: Path) -> None:
    losses = curve(pair / f"{kind} in bfloat16" / "runs" / "small" / "training" / "stage-2-only" / "loss.jsonl")
    assert losses[-1] < 0.95 * losses[0]
    other = curve(pair / "ddp in bfloat16" / "runs" / "small" / "training" / "stage-2-only" / "loss.jsonl")
    assert losses == pytest.approx(other, rel=0.03)


def test_only_adapter_and_moments_are_kept(pair: Path) -> None:
    sizes = set()
    for kind in KINDS:
        held = TrainingCheckpoint.read(pair / kind / f"checkpoint{RESUMED}")
        assert all("lora_" in name or "modules_to_save" in name for name in held.adapter)
        assert held.optimizer_state.keys() <= held.adapter.keys()
        assert {key for state in held.optimizer_state.values() for key in state} == {"exp_avg", "exp_avg_sq", "step"}
        assert {float(state["step"]) for state in held.optimizer_state.values()} == {2.0}
        assert all(state["exp_avg"].shape == held.adapter[name].shape for name, state in held.optimizer_state.items())
        sizes.add(sum(weights.numel() for weights in held.adapter.values()))
    assert len(sizes) == 1
