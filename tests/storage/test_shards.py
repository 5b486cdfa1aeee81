"""Shards without Ray, and a step that dies at every moment of its writing"""

import json
import os
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm import InputError
from addressvlm.storage import tables
from addressvlm.storage.run_dir import (
    WORK_DIR,
    is_done,
    resumable_dir,
)
from addressvlm.storage.shards import (
    FOOTER_BYTES,
    MARKS_DIR,
    Rows,
    Shard,
    ShardResult,
    ShardWork,
    files_fingerprint,
    invalidate_shards,
    plan_file_shards,
    plan_shards,
    process_shard,
    remove_stale_files,
    sources_fingerprint,
)

SCHEMA = pa.schema([("n", pa.int64()), ("text", pa.string())])
SETTINGS = {"seed": 1}


def table(folder: Path, rows: int, rows_per_file: int = 100) -> Path:
    tables.write_table(folder, "all", ({"n": n, "text": "x" * (n % 7)} for n in range(rows)), SCHEMA, rows_per_file)
    return folder


def even_and_odd(rows: Rows) -> ShardResult:
    """Two splits; every tenth row is rejected."""
    good = [row for row in rows if row["n"] % 10]
    rejects = [{"file": "f", "row": row["n"], "id": str(row["n"]), "reason": "ten"} for row in rows if not row["n"] % 10]
    splits = {"even": [r for r in good if not r["n"] % 2], "odd": [r for r in good if r["n"] % 2]}
    return ShardResult(splits, rejects, {"seen": len(rows)})


def step(inputs: Path, out: Path, work: ShardWork, redo: bool = False) -> list[dict[str, Any]]:
    """What a job does, without Ray."""
    shards = plan_shards(inputs, "all", 150)
    with resumable_dir(out, SETTINGS, redo) as folder:
        remove_stale_files(folder, len(shards))
        made = [process_shard(shard, folder, work) for shard in shards]
        remove_stale_files(folder, len(shards), made)
        return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4), shard_rows=st.integers(1, 500), in_file=st.integers(1, 200))
def test_shards_cover_every_row_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], shard_rows: int, in_file: int
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    for number, size in enumerate(sizes):
        tables.write_table(folder, f"all-{number}", ({"n": n, "text": ""} for n in range(size)), SCHEMA, in_file)
    shards = plan_shards(folder, "all", shard_rows)
    numbers = [[row["n"] for batch in shard.batches() for row in batch] for shard in shards]
    assert [n for shard in numbers for n in shard] == [row["n"] for row in tables.iter_rows(folder, "all")]
    assert [len(ns) for ns in numbers] == [shard.rows for shard in shards]
    assert [shard.number for shard in shards] == list(range(len(shards)))
    assert all(shard.rows <= max(shard_rows, tables.ROWS_PER_GROUP) for shard in shards)


def test_a_shard_is_processed_once_and_again_after_a_change(tmp_path: Path) -> None:
    folder, photo, calls = tmp_path / "out", tmp_path / "photo", []
    photo.write_text("one")

    def function(rows: Rows) -> ShardResult:
        calls.append(len(rows))
        return even_and_odd(rows)

    def made(count: int = 100, **about: Any) -> dict[str, Any]:
        (shard,) = plan_shards(table(tmp_path / f"in{count}", count), "all", 1000)
        return process_shard(shard, folder, ShardWork(function, SCHEMA, **about))

    remove_stale_files(folder, 1)
    first = made()
    assert (calls, first["rows"], first["written"], first["counts"]) == ([64, 36], 100, {"even": 40, "odd": 50}, {"seen": 100})
    assert [row["row"] for row in first["rejects"]] == list(range(0, 100, 10))
    assert made() == first
    assert len(calls) == 2
    looks = lambda rows: files_fingerprint(str(photo) for _ in rows)  # noqa: E731
    for number, change in enumerate(
        [
            lambda: made(fingerprint="other settings"),
            lambda: made(99),
            lambda: invalidate_shards(folder, [first]) or made(99),
            lambda: (folder / "odd-00000.parquet").unlink() or made(99),
            lambda: (folder / MARKS_DIR / "00000.json").write_text("{") and made(99),
            lambda: made(99, row_fingerprint=looks),
            lambda: photo.write_text("another") and made(99, row_fingerprint=looks),
        ],
        start=2,
    ):
        change()
        assert len(calls) == 2 * number
    assert tables.count_rows(folder, "even") + tables.count_rows(folder, "odd") == 89


def test_an_error_leaves_no_file_and_stale_shards_are_removed(tmp_path: Path) -> None:
    inputs, folder = table(tmp_path / "in", 300), tmp_path / "out"

    def refuse(rows: Rows) -> ShardResult:
        if rows[0]["n"] >= 64:
            raise InputError("the second batch is bad.")
        return even_and_odd(rows)

    remove_stale_files(folder, 2)
    shards = plan_shards(inputs, "all", 150)
    with pytest.raises(InputError, match="second batch"):
        process_shard(shards[0], folder, ShardWork(refuse, SCHEMA))
    assert [p for p in folder.rglob("*") if p.is_file()] == []
    for shard in shards:
        process_shard(shard, folder, ShardWork(even_and_odd, SCHEMA))
    (folder / "odd-00001.0123.tmp").write_text("half")
    remove_stale_files(folder, 1)
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["00000.json", "even-00000.parquet", "odd-00000.parquet"]


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard,) = plan_shards(table(tmp_path / "in", 10), "all", 100)
    remove_stale_files(tmp_path / "out", 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
    with pytest.raises(InputError, match=r"the disk of .* is full: .* rerun to resume"):
        process_shard(shard, tmp_path / "out", ShardWork(even_and_odd, SCHEMA))


def test_other_settings_or_redo_start_from_scratch(tmp_path: Path) -> None:
    def attempt(settings: dict[str, Any], redo: bool = False) -> list[str]:
        """What an attempt that fails finds there."""
        leftover: list[str] = []
        with suppress(ZeroDivisionError), resumable_dir(tmp_path / "step", settings, redo) as folder:
            leftover += sorted(p.name for p in folder.iterdir() if p.name != WORK_DIR)
            (folder / f"file{len(leftover)}").write_text("")
            raise ZeroDivisionError
        return leftover

    assert attempt({"a": 1}) == []
    assert attempt({"a": 1}) == ["file0"]
    assert attempt({"a": 2}) == []
    assert attempt({"a": 2}, redo=True) == []
    assert attempt({"a": 2}, redo=True) == ["file0"]
    assert attempt({"a": 2}) == ["file0", "file1"]


def _attempt(inputs: Path, out: Path, die_at: int, redo: bool) -> None:
    """The step in a process that is gone, like one that gets kill -9, at its `die_at`-th change of the folder."""
    changes = 0

    def dying(change: Any) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal changes
            changes += 1
            if changes == die_at:
                os._exit(9)
            return change(*args, **options)

        return counted

    for name in ("rename", "replace", "unlink", "mkdir", "write_text"):
        setattr(Path, name, dying(getattr(Path, name)))
    shutil.rmtree = partial(_slow_rmtree, dying(lambda: None))
    step(inputs, out, ShardWork(even_and_odd, SCHEMA), redo)
    os._exit(0)


def _slow_rmtree(moment: Any, folder: Path, ignore_errors: bool = False) -> None:
    """Remove file by file in the order that hurts: what is named last first."""
    for path in sorted(Path(folder).rglob("*"), reverse=True):
        moment()
        (path.rmdir if path.is_dir() else partial(os.unlink, path))()
    if Path(folder).exists():
        Path(folder).rmdir()


@pytest.mark.parametrize("redo", [False, True])
def test_a_step_killed_at_any_moment_is_completed_by_the_next_attempt(tmp_path: Path, redo: bool) -> None:
    inputs = table(tmp_path / "in", 230)
    step(inputs, tmp_path / "undisturbed", ShardWork(even_and_odd, SCHEMA))
    expected = contents(tmp_path / "undisturbed")
    assert not any(WORK_DIR in name for name in expected)

    def attempt(out: Path, die_at: int) -> int:
        if child := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            _attempt(inputs, out, die_at, redo)
        finally:
            os._exit(1)

    die_at, died = 0, True
    while died:
        die_at += 1
        out = tmp_path / str(die_at)
        if redo:
            shutil.copytree(tmp_path / "undisturbed", out)
            (out / "even-00000.parquet").write_text("made by an older version")
        died = attempt(out, die_at) == 9
        if redo or not is_done(out, SETTINGS):
            step(inputs, out, ShardWork(even_and_odd, SCHEMA), redo)
        assert is_done(out, SETTINGS)
        assert contents(out) == expected
    assert die_at > 20
    assert json.loads(expected["_done.json"]) == SETTINGS


def numbers(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"n": n, "text": str(n)} for n in range(first, first + count)]


def test_a_shard_can_skip_rows_and_read_some_columns(tmp_path: Path) -> None:
    tables.write_table(tmp_path / "in", "all", numbers(150), SCHEMA, 64)
    (shard,) = plan_shards(tmp_path / "in", "all", 1000)
    left = {0, 63, 64, 149}
    some = Shard(0, 146, shard.groups, tuple(n for n in range(150) if n not in left))
    assert [row["n"] for batch in some.batches() for row in batch] == [n for n in range(150) if n not in left]
    assert [len(batch) for batch in some.batches()] == [64, 64, 18]
    seen: list[set[str]] = []

    def function(rows: list[dict[str, Any]]) -> ShardResult:
        seen.extend(set(row) for row in rows)
        return ShardResult({"out": [{"n": row["n"], "text": None} for row in rows]}, counts={"rows": len(rows), "most": 1})

    (tmp_path / "out").mkdir()
    remove_stale_files(tmp_path / "out", 1)
    made = process_shard(some, tmp_path / "out", ShardWork(function, SCHEMA, ["n"]))
    assert (made["rows"], made["written"], made["counts"]) == (146, {"out": 146}, {"rows": 146, "most": 3})
    assert seen == [{"n"}] * 146


def test_every_range_of_rows_has_its_own_fingerprint(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 500)):
        tables.write_table(tmp_path / name, "all", numbers(256, first), SCHEMA)
    shards = plan_shards(tmp_path / "a", "all", 64)
    assert len({shard.fingerprint() for shard in [*shards, *plan_shards(tmp_path / "b", "all", 64)]}) == 8
    assert [shard.fingerprint() for shard in plan_shards(tmp_path / "a", "all", 64)] == [
        shard.fingerprint() for shard in shards
    ]
    files_of = tables.table_files(tmp_path / "a", "all") + tables.table_files(tmp_path / "b", "all")
    assert [shard.rows for shard in plan_file_shards(files_of, 300)] == [256, 256]
    assert [shard.rows for shard in plan_file_shards(files_of, 512)] == [512]


def test_sources_fingerprint_depends_on_content_and_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    two.write_text("2")
    before = sources_fingerprint(str(one), str(two), None, "https://host/{z}")
    assert sources_fingerprint(str(one), str(two), None, "https://host/{z}") == before
    two.write_text("3")
    others = [
        (str(one), str(two), None, "https://host/{z}"),
        (str(two), str(one), None, "https://host/{z}"),
        (str(one), str(two), None, None),
    ]
    assert len({before, *(sources_fingerprint(*other) for other in others)}) == 4


def test_a_file_that_was_written_again_has_another_fingerprint(tmp_path: Path) -> None:
    photo, names = tmp_path / "photo.jpg", [str(tmp_path / "photo.jpg"), str(tmp_path / "gone.jpg"), "s3://bucket/a.jpg"]
    photo.write_text("one")
    os.utime(photo, ns=(10**18, 10**18))
    seen = [files_fingerprint(names), files_fingerprint(names[::-1]), files_fingerprint(names[:1])]
    assert files_fingerprint(names) == seen[0]
    os.utime(photo, ns=(10**18, 10**18 + 1))  # as long as before
    seen.append(files_fingerprint(names))
    photo.write_text("longer")
    os.utime(photo, ns=(10**18, 10**18 + 1))
    seen.append(files_fingerprint(names))
    assert len(set(seen)) == 5


def test_a_large_source_is_told_by_its_size_and_its_end(tmp_path: Path) -> None:
    file, size = tmp_path / "streets.osm.pbf", 3 * FOOTER_BYTES
    content, seen = bytearray(size), []
    for change in (None, size - 1, size - FOOTER_BYTES):
        if change is not None:
            content[change] = 1
        file.write_bytes(content)
        seen.append(sources_fingerprint(str(file)))
    file.write_bytes(b"\0" + content)
    seen.append(sources_fingerprint(str(file)))
    assert len(set(seen)) == 4
    other = file.rename(tmp_path / "other.osm.pbf")
    assert sources_fingerprint(str(other)) not in seen
