"""The rows of a training and their order

python -m pytest -q tests/training/test_dataset.py
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm import InputError
from addressvlm.models import load_model
from addressvlm.storage import tables
from addressvlm.training.collator import Collator
from addressvlm.training.dataset import MixedRows, Schedule, TableRows
from tests.support.training_tables import ListTable, picture, table_rows


def named(name: str, count: int) -> ListTable:
    return ListTable([row | {"id": f"{name}{row['id']}"} for row in table_rows(count)])


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 300),
    world=st.sampled_from([1, 2, 4]),
    per_rank=st.integers(1, 6),
    seed=st.integers(0, 5),
)
def test_steps_cover_each_epoch_once_whatever_the_workers(rows: int, world: int, per_rank: int, seed: int) -> None:
    class Counted(TableRows):
        def __init__(self) -> None:
            bounds = [*range(0, rows, 64), rows]
            self.groups = [(0, i, b - a) for i, (a, b) in enumerate(itertools.pairwise(bounds))]
            self.starts = torch.tensor(bounds).numpy()

    per_step = world * per_rank
    schedule = Schedule(Counted(), per_step, seed)
    steps = -(-2 * rows // per_step)
    seen = [i for s in range(steps) for i in sorted(x for r in range(world) for x in schedule.indices(s, r, world))]
    alone = [i for s in range(steps) for i in sorted(schedule.indices(s))]
    assert seen == alone
    stream = [schedule._row(p) for p in range(2 * rows)]
    assert sorted(stream[:rows]) == sorted(stream[rows:]) == list(range(rows))
    if rows > 20:
        other = [Schedule(Counted(), per_step, seed + 1)._row(p) for p in range(rows)]
        assert stream[:rows] != stream[rows:]
        assert other not in (stream[:rows], stream[rows:], list(range(rows)))


def test_rows_of_far_groups_are_mixed(tmp_path: Path) -> None:
    schema = tables.pa.schema([("id", tables.pa.string())])
    tables.write_table(tmp_path, "train", [{"id": str(n)} for n in range(80)], schema, rows_per_file=20)
    order = TableRows(tmp_path, "train", ("id",)).epoch(0, 0)
    assert len({int(row) // 20 for row in order[:10]}) > 1
    assert any(later - earlier != 1 for earlier, later in itertools.pairwise(order))


def test_rows_are_those_of_the_table(tmp_path: Path) -> None:
    rows = table_rows(150)
    schema = tables.with_features(tables.pa.schema([tables.PHOTOS.field(c) for c in ("id", "image", "rounds")]))
    tables.write_table(tmp_path, "train", rows, schema, rows_per_file=64)
    table = TableRows(tmp_path, "train", ("id", "rounds"))
    assert len(table) == 150
    assert [table[i]["id"] for i in (149, 0, 64, 63)] == ["149", "0", "64", "63"]


@pytest.mark.parametrize(("weights", "counts"), [((1, 1), (6, 9)), ((2, 1), (12, 9)), ((0.5, 3), (3, 27))])
def test_a_mix_goes_through_its_tables_as_often_as_they_weigh(weights: tuple, counts: tuple) -> None:
    mix = MixedRows([(named("a", 6), weights[0]), (named("b", 9), weights[1])])
    assert len(mix) == sum(counts)
    seen = [mix[row]["id"] for epoch in range(2) for row in mix.epoch(3, epoch)]
    assert sum(name.startswith("a") for name in seen) == 2 * counts[0]
    for name, size, count in (("a", 6, counts[0]), ("b", 9, counts[1])):
        times = np.bincount([int(row[1:]) for row in seen if row.startswith(name)], minlength=size)
        assert times.max() - times.min() <= 1
        assert times.sum() == 2 * count
    first = "".join(row[0] for row in seen[: len(mix)])
    assert "ab" in first
    assert "ba" in first  # mixed, not one after the other


def test_the_order_of_a_mix_is_that_of_seed_and_step_alone() -> None:
    def schedule(seed: int) -> Schedule:
        return Schedule(MixedRows([(named("a", 6), 1), (named("b", 9), 1)]), 4, seed)

    whole, late = schedule(1), schedule(1)
    every = [whole.indices(step) for step in range(12)]
    assert [late.indices(step) for step in (11, 7, 8)] == [every[11], every[7], every[8]]
    assert schedule(2).indices(0) != every[0]
    shares = [sorted(i for rank in range(2) for i in whole.indices(step, rank, 2)) for step in range(12)]
    assert shares == [sorted(rows) for rows in every]


def test_images_that_are_all_corrupt_are_an_error(tmp_path: Path, base: Path) -> None:
    broken = ListTable([row | {"image": {"bytes": b"not a picture", "path": None}} for row in table_rows(9)])
    with pytest.raises(InputError, match=r"none of 17 training rows .* can be used \(row \d: the image can't be decoded"):
        Schedule(broken, 3, 0).encoded(Collator(load_model(str(base))[1]), 0)


def test_replacing_a_row_is_the_same_after_a_resume(base: Path) -> None:
    table = named("a", 12)
    for row in (2, 5, 9):
        table.rows[row]["image"] = picture("red") | {"bytes": b"?"}

    class Kept:
        def encode(self, sample: Any) -> Any:
            return sample.image.tobytes()

    once = [Schedule(table, 4, 1).encoded(Kept(), step) for step in range(6)]
    late = Schedule(table, 4, 1)
    assert [late.encoded(Kept(), step) for step in (5, 4)] == [once[5], once[4]]
    assert all(len(rows) == 4 for rows in once)


def test_replacing_a_row_is_the_same_whatever_the_workers() -> None:
    table = named("a", 12)
    for row in (2, 5, 9):
        table.rows[row]["image"] = picture("red") | {"bytes": b"?"}

    class Kept:
        def encode(self, sample: Any) -> Any:
            return sample.rounds, sample.image.tobytes()

    for step in range(6):
        whole = Schedule(table, 4, 1).encoded(Kept(), step)
        shares = [Schedule(table, 4, 1).encoded(Kept(), step, rank, 2) for rank in range(2)]
        assert [row for pair in zip(*shares, strict=True) for row in pair] == whole
