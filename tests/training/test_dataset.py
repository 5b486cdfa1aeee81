"""The rows of a training and their order

python -m pytest -q tests/training/test_dataset.py
"""

import itertools
import pickle
import threading
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm import InputError
from addressvlm.models import load_model
from addressvlm.storage import table_index, tables
from addressvlm.storage.files import open_parquet
from addressvlm.storage.table_index import write_indexes
from addressvlm.training import dataset
from addressvlm.training.collator import Collator
from addressvlm.training.dataset import (
    LocatableRows,
    MixedRows,
    Schedule,
    TableRows,
    low_locatability,
)
from tests.support.training_tables import ListTable, picture, table_rows


def named(name: str, count: int) -> ListTable:
    return ListTable([row | {"id": f"{name}{row['id']}"} for row in table_rows(count)])


class Counted(TableRows):
    """A table of which only the number of rows is known."""

    def __init__(self, rows: int, group: int = 64) -> None:
        self.starts = np.array([*range(0, rows, group), rows])
        self.group_count = len(self.starts) - 1


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 300),
    group=st.sampled_from([1, 64]),
    world=st.integers(1, 5),
    per_step=st.integers(5, 24),
    seed=st.integers(0, 5),
)
def test_steps_cover_each_epoch_once_whatever_the_workers(rows: int, group: int, world: int, per_step: int, seed: int) -> None:
    def schedule(seed: int) -> Schedule:
        return Schedule(Counted(rows, group), per_step, seed)

    steps = -(-2 * rows // per_step)
    whole = schedule(seed)
    alone = [i for s in range(steps) for i in whole.indices(s)]
    assert [i for s in range(steps) for r in range(world) for i in schedule(seed).indices(s, r, world)] == alone
    assert sorted(alone[:rows]) == sorted(alone[rows : 2 * rows]) == list(range(rows))
    if rows > 20:
        assert alone[:rows] != alone[rows : 2 * rows]
        assert schedule(seed + 1).indices(0) != whole.indices(0)


@pytest.mark.parametrize(("extra", "epoch"), [(0, 0), (500, 1)])
def test_row_groups_are_dealt_to_workers_whole(extra: int, epoch: int) -> None:
    """In the first epoch, and in one that begins in the middle of a step."""
    rows, world, seen = 64 * 1200 + extra, 64, np.zeros((1210, 64), dtype=bool)
    schedule = Schedule(Counted(rows), 16 * world, 0)
    for step in range(-(-epoch * rows // 1024), (epoch + 1) * rows // 1024):
        every = np.array([schedule._row(step * 16 * world + n) for n in range(16 * world)])
        for rank in range(world):
            seen[every[list(schedule.numbers(rank, world))] // 64, rank] = True
        assert len(set(every // 64)) >= schedule.lanes - 1  # of many groups in every step
    assert schedule.lanes == 64
    assert seen.sum() <= 1.1 * 1208


@pytest.mark.parametrize(
    ("groups", "per_step", "lanes", "window"),
    [(64, 8, 1, 32), (65, 8, 4, 8), (65, 6, 3, 10), (65, 7, 1, 32), (1200, 1024, 64, 1), (128, 4, 4, 8)],
)
def test_lanes_divide_a_step_and_are_long(groups: int, per_step: int, lanes: int, window: int) -> None:
    schedule = Schedule(Counted(64 * groups), per_step, 0)
    assert (schedule.lanes, schedule.window) == (lanes, window)


def test_an_epoch_is_shuffled_once_although_steps_are_read_ahead() -> None:
    shuffled: list[int] = []

    class Shuffled(ListTable):
        def epoch(self, seed: int, epoch: int, window: int = 1) -> np.ndarray:
            shuffled.append(epoch)
            return super().epoch(seed, epoch, window)

    schedule = Schedule(Shuffled(table_rows(10)), 4, 0)
    for step in range(20):
        schedule.prefetch(step + 2)
        schedule.indices(step)
    assert shuffled == list(range(9))


def small_groups(folder: Path, rows: int, in_file: int) -> TableRows:
    """A table of the column id, 0, 1, …"""
    schema = tables.pa.schema([("id", tables.pa.string())])
    tables.write_table(folder, "train", [{"id": str(n)} for n in range(rows)], schema, rows_per_file=in_file)
    return TableRows(folder, "train", ("id",))


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_reads_each_row_group_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    for name, value in {"CACHED_GROUPS": 2, "GROUPS_A_LANE": 5, "SHUFFLED_GROUPS": 8}.items():
        monkeypatch.setattr(dataset, name, value)
    table = small_groups(tmp_path, 120, 3)
    schedule = Schedule(table, 8, 0)
    assert (schedule.lanes, schedule.window) == (8, 1)
    for step in range(15):
        for rank in range(world):
            schedule.prefetch(step, rank, world)
            assert len(schedule.read(step, rank, world)) == 8 // world
    assert 40 <= table.reads <= 52


def test_row_groups_used_last_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "CACHED_GROUPS", 2)
    table = small_groups(tmp_path, 6, 1)
    counts = []
    for row in (0, 1, 0, 2, 0, 2, 1):
        assert table[row] == {"id": str(row)}
        counts.append(table.reads)
    assert counts == [1, 2, 2, 3, 3, 3, 4]  # 1 had to go for 2
    table.prefetch(range(6), 3)
    assert [table[row]["id"] for row in range(6)] == list("012345")
    assert table.reads <= 4 + 5  # none twice
    assert {table[row]["id"] for row in range(6)} == set("012345")
    assert table.reads <= 4 + 5


def test_row_groups_are_read_in_the_order_in_which_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "READERS", 1)
    read, one = [], TableRows._read
    monkeypatch.setattr(TableRows, "_read", lambda self, group: read.append(group) or one(self, group))
    table = small_groups(tmp_path, 12, 2)
    table.prefetch([9, 0, 8, 5, 1], 1)
    assert table[4] == {"id": "4"}
    assert read == [4, 0, 2]


def test_rows_are_found_in_files_of_several_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(dataset, "open_parquet", lambda file: opened.append(file) or open_parquet(file))
    monkeypatch.setattr(dataset, "READERS", 1)
    table = small_groups(tmp_path, 300, 150)
    assert (len(table), table.group_count, table.starts.tolist()) == (300, 6, [0, 64, 128, 150, 214, 278, 300])
    assert [table[n]["id"] for n in range(300)] == [str(n) for n in range(300)]
    assert len(opened) == 2  # each file once


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "OPEN_FILES", 2)
    opened: list[Any] = []

    def watched(file: Path) -> Any:
        parquet = open_parquet(file)
        opened.append(weakref.ref(parquet))
        return parquet

    monkeypatch.setattr(dataset, "open_parquet", watched)
    table = small_groups(tmp_path, 5, 1)
    assert [table[n]["id"] for n in range(5)] == list("01234")
    table._pool.shutdown()
    assert len(opened) == 5
    assert [one() is not None for one in opened] == [False, False, False, True, True]


def test_the_rows_of_a_window_are_of_as_many_groups(tmp_path: Path) -> None:
    table = small_groups(tmp_path, 80, 10)
    order = table.epoch(1, 0, window=2)
    parts = [{int(row) // 10 for row in order[at : at + 20]} for at in range(0, 80, 20)]
    assert [len(part) for part in parts] == [2] * 4
    assert sorted(group for part in parts for group in part) == list(range(8))
    assert sorted(map(tuple, parts)) != [(0, 1), (2, 3), (4, 5), (6, 7)]  # in a random order


def test_each_row_group_is_read_once_and_files_are_opened_when_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = tables.pa.schema([("id", tables.pa.string())])
    tables.write_table(tmp_path, "train", [{"id": str(n)} for n in range(90)], schema, rows_per_file=30)
    write_indexes(tmp_path)
    opened: list[Any] = []
    for module in (dataset, table_index):
        monkeypatch.setattr(module, "open_parquet", lambda file: opened.append(file) or open_parquet(file))
    table = TableRows(tmp_path, "train", ("id",))
    assert (len(table), table.group_count, opened) == (90, 3, [])
    table.prefetch(range(40, 50), 1)
    again = pickle.loads(pickle.dumps(table))
    assert [table[n]["id"] for n in (45, 31, 59)] == ["45", "31", "59"]
    assert (table.reads, len(opened)) == (1, 1)
    assert [again[n]["id"] for n in (89, 0, 45)] == ["89", "0", "45"]


@pytest.mark.parametrize("backwards", [False, True])
def test_rows_come_in_the_order_of_file_names_however_the_folder_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    schema = tables.pa.schema([("id", tables.pa.string())])
    tables.write_table(tmp_path, "train", [{"id": str(n)} for n in range(20)], schema, rows_per_file=2)

    def listed(folder: Path) -> Any:
        return nullcontext(sorted(folder.iterdir(), reverse=backwards))

    monkeypatch.setattr(table_index, "os", SimpleNamespace(scandir=listed))
    for indexed in (False, True):
        if indexed:
            write_indexes(tmp_path)
        table = TableRows(tmp_path, "train", ("id",))
        assert [table[n]["id"] for n in range(20)] == [str(n) for n in range(20)]


def test_an_index_that_no_longer_holds_is_not_believed(tmp_path: Path) -> None:
    schema = tables.pa.schema([("id", tables.pa.string())])
    tables.write_table(tmp_path, "train", [{"id": "a"}] * 5, schema)
    write_indexes(tmp_path)
    tables.write_table(tmp_path, "train", [{"id": "b"}] * 150, schema)
    assert len(TableRows(tmp_path, "train", ("id",))) == 150
    (tmp_path / "train-index.json").write_text("{")
    assert len(TableRows(tmp_path, "train", ("id",))) == 150


@pytest.mark.parametrize("failures", [3, 99])
def test_a_read_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    tables.write_table(tmp_path, "train", [{"id": "a"}], tables.pa.schema([("id", tables.pa.string())]))
    left, waits = [failures], []
    monkeypatch.setattr(dataset.time, "sleep", waits.append)

    def failing(file: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError("AWS Error INTERNAL_FAILURE: HTTP status 500")
        return open_parquet(file)

    table = TableRows(tmp_path, "train", ("id",))
    monkeypatch.setattr(dataset, "open_parquet", failing)
    if failures == 3:
        assert table[0] == {"id": "a"}
        assert waits == [0.5, 1.0, 2.0]
    else:
        with pytest.raises(InputError, match=r"row group 0 of .*train-00000.parquet can't be read after 6 attempts \(AWS"):
            table[0]


def test_an_open_file_is_read_by_one_thread_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.write_table(tmp_path, "train", [{"id": str(n)} for n in range(130)], tables.pa.schema([("id", tables.pa.string())]))
    two, readers = threading.Barrier(2), set()

    class File:
        def read_row_group(self, number: int, columns: list[str]) -> Any:
            two.wait(60)
            readers.add(self)
            return open_parquet(tmp_path / "train-00000.parquet").read_row_group(number, columns)

    table = TableRows(tmp_path, "train", ("id",))
    monkeypatch.setattr(dataset, "open_parquet", lambda file: File())
    table.prefetch([0, 64], 2)
    assert [table[n]["id"] for n in (0, 64)] == ["0", "64"]
    assert len(readers) == 2


def test_rows_that_are_damaged_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "FIRST_WAIT_S", 0.0)
    tables.write_table(tmp_path, "train", [{"id": str(n)} for n in range(9)], tables.pa.schema([("id", tables.pa.string())]))
    table, file = TableRows(tmp_path, "train", ("id",)), tmp_path / "train-00000.parquet"
    content = file.read_bytes()
    file.write_bytes(b"PAR1" + b"?" * (len(content) - 8) + b"PAR1")
    with pytest.raises(InputError, match=r"train-00000.parquet (is damaged|can't be read after 6 attempts) "):
        table[0]


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


@pytest.mark.parametrize(
    ("weights", "counts"), [((1, 1), (6, 9)), ((2, 1), (12, 9)), ((0.5, 3), (3, 27)), ((0.3, 0.01), (2, 1))]
)
def test_a_mix_goes_through_its_tables_as_often_as_they_weigh(weights: tuple, counts: tuple) -> None:
    mix = MixedRows([(named("a", 6), weights[0]), (named("b", 9), weights[1])])
    assert len(mix) == sum(counts)
    seen = [mix[row]["id"] for epoch in range(2) for row in mix.epoch(3, epoch)]
    assert sum(name.startswith("a") for name in seen) == 2 * counts[0]
    for name, size, count in (("a", 6, counts[0]), ("b", 9, counts[1])):
        times = np.bincount([int(row[1:]) for row in seen if row.startswith(name)], minlength=size)
        assert times.max() - times.min() <= 1
        assert times.sum() == 2 * count
    first, second = ("".join(row[0] for row in part) for part in (seen[: len(mix)], seen[len(mix) :]))
    assert len(mix) < 9 or ("ab" in first and "ba" in first and first != second)  # mixed, not one after the other


def test_a_mix_reads_ahead_in_each_of_its_tables() -> None:
    class Asked(ListTable):
        def prefetch(self, indices: Iterable[int], keep: int) -> None:
            self.asked = list(indices), keep

    parts = [Asked(table_rows(6)), Asked(table_rows(9)), Asked([])]
    mix = MixedRows([(parts[0], 1), (parts[1], 2), (parts[2], 1)])
    mix.prefetch([7, 0, 14, 5, 6], 3)
    assert [part.asked for part in parts] == [([0, 5], 3), ([1, 8, 0], 3), ([], 3)]
    assert (mix.group_count, len(mix), mix.counts) == (3, 24, [6, 18, 0])


def test_what_is_below_a_threshold_is_known_of_all_tables_of_a_mix() -> None:
    def below(**why: str) -> LocatableRows:
        table = object.__new__(LocatableRows)
        table.skipped = why
        return table

    mix = object.__new__(MixedRows)
    mix.tables = [below(a="low"), named("c", 2), below(b="lower")]
    assert low_locatability(mix) == {"a": "low", "b": "lower"}
    assert low_locatability(named("c", 2)) == {}


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
        assert [row for share in shares for row in share] == whole


class Question:
    """Keeps the row's question."""

    def encode(self, sample: Any) -> str:
        return sample.rounds[0][0]


def asking(name: str, count: int, broken: Iterable[int] = ()) -> ListTable:
    """Rows whose questions are their ids; of some the image is broken."""
    table = named(name, count)
    for row in table.rows:
        row["rounds"] = [{"question": row["id"], "answer": "a"}]
    for number in broken:
        table.rows[number]["image"] = {"bytes": b"?", "path": None}
    return table


def test_what_replaces_a_row_is_drawn_again_until_one_can_be_used() -> None:
    """From all rows of all tables, by seed and by the row's place in the step."""
    mix = MixedRows([(asking("a", 6, range(6)), 2), (asking("b", 6, [0]), 0.5)])
    drawn: dict[str, set[str]] = {"seed": set(), "number": set()}
    for seed in range(60):
        schedule = Schedule(mix, 4, seed)
        (taken,) = schedule.encode_rows(Question(), 0, 3, [(2, mix[2])])
        drawn["seed"].add(taken)
        assert schedule.rejected.keys() >= {"a2"}
        assert taken not in schedule.rejected
        assert set(schedule.rejected.values()) == {schedule.rejected["a2"]}
    for number in range(60):
        drawn["number"] |= set(Schedule(mix, 4, 0).encode_rows(Question(), 0, number, [(2, mix[2])]))
    assert list(drawn.values()) == [{f"b{n}" for n in range(1, 6)}] * 2
