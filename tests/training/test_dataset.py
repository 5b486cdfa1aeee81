"""The rows of a training and their order

python -m pytest -q tests/training/test_dataset.py
"""

import itertools
import pickle
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from addressvlm import InputError
from addressvlm.config import load
from addressvlm.config.train import AugmentConfig
from addressvlm.models import load_model
from addressvlm.storage import table_index, tables
from addressvlm.storage.files import open_parquet
from addressvlm.storage.table_index import write_indexes
from addressvlm.training import dataset
from addressvlm.training.collator import Collator
from addressvlm.training.dataset import ASPECT, MixedRows, Schedule, TableRows, augment_photo
from tests.support.images import encoded
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


def test_row_groups_are_dealt_to_workers_whole() -> None:
    rows, world, seen = 64 * 1200, 64, np.zeros((1200, 64), dtype=bool)
    schedule = Schedule(Counted(rows), 16 * world, 0)
    for step in range(rows // (16 * world)):
        every = np.array([schedule._row(step * 16 * world + n) for n in range(16 * world)])
        for rank in range(world):
            seen[every[list(schedule.numbers(rank, world))] // 64, rank] = True
        assert len(set(every // 64)) >= schedule.lanes - 1  # of many groups in every step
    assert schedule.lanes == 64
    assert seen.sum() <= 1.1 * 1200


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
        assert [row for share in shares for row in share] == whole


CHANGED = AugmentConfig(crop=0.5, colour=0.3)


def noise(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Seen:
    """Keeps what would be shown."""

    def encode(self, sample: Any) -> Image.Image:
        return sample.image


def shown(schedule: Schedule, step: int, rank: int = 0, world: int = 1) -> list[bytes]:
    return [image.tobytes() for image in schedule.encoded(Seen(), step, rank, world)]


def photos(count: int) -> ListTable:
    image = {"bytes": encoded(noise(), "PNG"), "path": None}
    return ListTable([{"id": str(i), "image": image, "rounds": [{"question": "q", "answer": "a"}]} for i in range(count)])


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.05, 0.99), st.integers(0, 99))
def test_a_crop_is_a_part_of_the_photo_of_at_least_its_share(width: int, height: int, share: float, seed: int) -> None:
    made = augment_photo(Image.new("RGB", (width, height)), AugmentConfig(crop=share), np.random.default_rng(seed))
    wide, high = made.width / width, made.height / height
    assert 0 < wide <= 1
    assert 0 < high <= 1
    pixel = 1 / width + 1 / height  # of rounding
    assert wide * high >= share / ASPECT - pixel
    assert high / ASPECT - pixel * ASPECT <= wide <= high * ASPECT + pixel * ASPECT


def test_a_crop_is_taken_from_where_it_is() -> None:
    photo = noise()
    made = np.asarray(augment_photo(photo, AugmentConfig(crop=0.4), np.random.default_rng(3)))
    whole = np.asarray(photo)
    places = [
        (y, x)
        for y in range(whole.shape[0] - made.shape[0] + 1)
        for x in range(whole.shape[1] - made.shape[1] + 1)
        if np.array_equal(whole[y : y + made.shape[0], x : x + made.shape[1]], made)
    ]
    assert len(places) == 1


def test_colours_change_and_the_size_does_not() -> None:
    grey = Image.new("RGB", (8, 8), (100, 120, 140))
    values = [
        augment_photo(grey, AugmentConfig(colour=0.3), np.random.default_rng(seed)).getpixel((3, 3)) for seed in range(40)
    ]
    brightness = np.array(values, dtype=float).sum(axis=1) / 360
    assert len(set(values)) > 30
    assert 0.68 < brightness.min() < 0.85
    assert 1.15 < brightness.max() < 1.32
    assert augment_photo(grey, CHANGED.model_copy(update={"crop": 1.0}), np.random.default_rng(0)).size == (8, 8)


def test_nothing_is_changed_by_default() -> None:
    table = photos(6)
    assert set(shown(Schedule(table, 3, 0), 0)) == {noise().tobytes()}


def test_what_is_shown_depends_on_seed_and_step_alone() -> None:
    table, whole = photos(6), Schedule(photos(6), 6, 4, CHANGED)
    first = shown(whole, 0)
    assert shown(whole, 1) != first
    assert len(set(first)) == 6
    assert shown(Schedule(table, 6, 4, CHANGED), 0) == first  # as after a resume
    dealt = [shown(Schedule(table, 6, 4, CHANGED), 0, rank, 2) for rank in range(2)]
    assert [image for share in dealt for image in share] == first
    assert shown(Schedule(table, 6, 5, CHANGED), 0) != first


def test_a_grafted_image_is_not_cropped() -> None:
    stages = "{alignment: {data: [photos, alignment], augment: {crop: 0.5}}, localization: {data: photos}}"
    with pytest.raises(InputError, match=r"augment\.crop is 0\.5, which cuts the map off a grafted image: leave it at 1"):
        load("demo", [f"train.stages={stages}"])
