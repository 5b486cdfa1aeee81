"""Steps made ready by processes and by a thread: the same, and errors of either are sentences

python -m pytest -q tests/training/test_loader.py
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from addressvlm import InputError
from addressvlm.config.train import AugmentConfig, StageConfig, TrainConfig
from addressvlm.models import load_model
from addressvlm.training.collator import Collator
from addressvlm.training.dataset import Schedule
from addressvlm.training.loader import StepBatches, StepLoader, loader_processes
from addressvlm.training.stages import Stage
from tests.support.training_tables import ListTable, table_rows


class Killed(Collator):
    """Ends the process that encodes, as the kernel does when memory runs out."""

    def encode(self, sample: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def stage_of(rows: list[dict[str, Any]], steps: int = 4) -> Stage:
    settings = StageConfig(data="photos", batch_size=2, isolate_questions=True)
    return Stage("s", settings, Schedule(ListTable(rows), 4, 0, AugmentConfig(crop=0.5, colour=0.2)), steps, 0)


def same(one: StepBatches, other: StepBatches) -> bool:
    pairs = zip(one.batches, other.batches, strict=True)
    return one.tokens == other.tokens and all(torch.equal(a[key], b[key]) for a, b in pairs for key in a | b)


@pytest.mark.parametrize(
    ("chosen", "cpus", "on_gpu", "processes"),
    [(None, 8, True, 7), (None, 1, True, 1), (None, 8, False, 0), (0, 8, True, 0), (3, 8, True, 3), (3, 8, False, 3)],
)
def test_how_many_processes_encode_rows(chosen: int | None, cpus: int, on_gpu: bool, processes: int) -> None:
    assert loader_processes(TrainConfig(loader_processes=chosen, cpus_per_worker=cpus), on_gpu) == processes


def test_processes_make_what_a_thread_makes_in_the_same_order(base: Path) -> None:
    collator = Collator(load_model(str(base))[1], isolate_questions=True, use_bytes=True)
    rows = table_rows(12)
    rows[3]["image"] = {"bytes": b"?", "path": None}
    alone, stage = stage_of(rows), stage_of(rows)
    expected = list(StepLoader(alone, collator, 0, 0, 1))
    made = list(StepLoader(stage, collator, 0, 0, 1, processes=2))
    assert len(made) == 4
    assert all(map(same, made, expected))
    assert all(map(same, StepLoader(stage_of(rows), collator, 2, 0, 1), expected[2:]))  # as after a resume
    assert list(stage.schedule.rejected) == list(alone.schedule.rejected) == ["3"]


def test_a_loader_process_that_is_killed_is_one_sentence(base: Path) -> None:
    loader = StepLoader(stage_of(table_rows(12)), Killed(load_model(str(base))[1]), 0, 0, 1, processes=1)
    with pytest.raises(InputError, match=r"a process that encodes training rows ended \(.*\), most likely for lack of memory"):
        list(loader)


@pytest.mark.parametrize("processes", [0, 1])
def test_rows_that_can_t_be_used_end_the_stage_with_their_sentence(base: Path, processes: int) -> None:
    broken = [row | {"image": {"bytes": b"no picture", "path": None}} for row in table_rows(5)]
    collator = Collator(load_model(str(base))[1])
    with pytest.raises(InputError, match=r"^none of 17 training rows tried one after the other can be used"):
        list(StepLoader(stage_of(broken), collator, 0, 0, 1, processes))
