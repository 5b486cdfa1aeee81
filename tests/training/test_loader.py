"""Steps made ready by processes and by a thread: the same, and errors of either are sentences

python -m pytest -q tests/training/test_loader.py
"""

import os
import resource
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from addressvlm import InputError
from addressvlm.config.train import AugmentConfig, StageConfig, TrainConfig
from addressvlm.models import load_model
from addressvlm.training import loader
from addressvlm.training.collator import Collator, EncodedSample, Sample
from addressvlm.training.dataset import Schedule
from addressvlm.training.loader import READ_AHEAD, StepBatches, StepLoader, loader_processes
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


class Watched(ListTable):
    """Rows whose questions are their numbers; notes what is read, and what is read ahead."""

    def __init__(self, count: int) -> None:
        rows = [row | {"rounds": [{"question": str(n), "answer": "a"}]} for n, row in enumerate(table_rows(count))]
        super().__init__(rows)
        self.events: list[tuple[str, list[int]]] = []

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.events.append(("read", [index]))
        return super().__getitem__(index)

    def prefetch(self, indices: Iterable[int], keep: int) -> None:
        self.events.append(("ahead", list(indices)))


class Plain:
    """Stands for a collator whose only token is the row's number."""

    packed = False

    def encode(self, sample: Sample) -> EncodedSample:
        return EncodedSample(ids=[int(sample.rounds[0][0])])

    def batch(self, rows: list[EncodedSample]) -> dict[str, torch.Tensor]:
        return {"ids": torch.tensor([row.ids[0] for row in rows])}


def row_numbers(share: StepBatches) -> list[int]:
    return [number for batch in share.batches for number in batch["ids"].tolist()]


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_each_worker_s_rows_are_read_ahead_once_and_no_further_than_the_stage(rank: int, start: int) -> None:
    table = Watched(24)
    stage = Stage("s", StageConfig(data="photos", batch_size=2), Schedule(table, 4, 0), 9, 0)
    made = [row_numbers(share) for share in StepLoader(stage, Plain(), start, rank, 2)]
    expected = [stage.schedule.indices(step, rank, 2) for step in range(start, 9)]
    assert made == expected
    assert [numbers for kind, numbers in table.events if kind == "ahead"] == expected
    begun = read = 0
    for kind, _ in table.events:
        begun += kind == "ahead"
        if kind == "read":
            assert begun == min(read // 2 + 1 + READ_AHEAD, len(expected))
            read += 1


def test_batches_for_a_gpu_lie_in_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1000)
    share = StepBatches([{"ids": torch.tensor([1, 2])}, {"ids": torch.tensor([3])}], 7, {"3": "why"}).pin_memory()
    assert (row_numbers(share), share.tokens, share.rejected) == ([1001, 1002, 1003], 7, {"3": "why"})
    stage = Stage("s", StageConfig(data="photos", batch_size=2), Schedule(Watched(8), 4, 0), 2, 0)
    pinned, plain = (list(StepLoader(stage, Plain(), 0, 0, 1, pin=pin)) for pin in (True, False))
    assert [row_numbers(one) for one in pinned] == [[1000 + n for n in row_numbers(one)] for one in plain]
    broken = ListTable([row | {"image": {"bytes": b"?", "path": None}} for row in table_rows(5)])
    stage = Stage("s", StageConfig(data="photos", batch_size=2), Schedule(broken, 4, 0), 2, 0)
    with pytest.raises(InputError, match="none of 17 training rows"):
        list(StepLoader(stage, Plain(), 0, 0, 1, pin=True))


@pytest.mark.parametrize(
    ("message", "error"),
    [("DataLoader worker (pid(s) 7) exited unexpectedly", InputError), ("CUDA error: no kernel", RuntimeError)],
)
def test_only_a_loader_process_that_ended_is_told_as_one(
    monkeypatch: pytest.MonkeyPatch, message: str, error: type[Exception]
) -> None:
    given: dict[str, Any] = {}

    class Processes:
        def __init__(self, dataset: StepLoader, **options: Any) -> None:
            given.update(options)

        def __iter__(self) -> Iterator[StepBatches]:
            yield StepBatches([], 5, {"3": "why"})
            raise RuntimeError(message)

    monkeypatch.setattr(loader, "DataLoader", Processes)
    stage = stage_of(table_rows(4))
    shares = iter(StepLoader(stage, Plain(), 0, 0, 1, processes=3, pin=True))
    assert next(shares).tokens == 5
    assert stage.schedule.rejected == {"3": "why"}  # of another process
    assert (given["num_workers"], given["pin_memory"], given["batch_size"]) == (3, True, None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard
    with pytest.raises(error, match="most likely for lack of memory" if error is InputError else "^CUDA error: no kernel$"):
        next(shares)


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
