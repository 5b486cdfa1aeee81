"""Files whole or not at all, tables, and paths of stores, on a store in memory"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from addressvlm import InputError
from addressvlm.storage import files, tables
from addressvlm.storage.files import (
    CACHE_VARIABLE,
    atomic_replace_dir,
    atomic_write,
    cache_folder,
    digest,
    local_copy,
    local_model_copy,
    write_parquet,
)
from addressvlm.storage.remote_path import RemotePath, is_remote, path_of
from addressvlm.storage.run_dir import (
    BEGUN_FILE,
    begin_or_resume,
    fresh_dir,
    is_done,
    is_unfinished,
    parse_model_flag,
    resumable_dir,
    storage_error,
)
from addressvlm.storage.shards import (
    Shard,
    ShardResult,
    ShardWork,
    plan_file_shards,
    plan_shards,
    process_shard,
    remove_stale_files,
    sources_fingerprint,
)

SCHEMA = pa.schema([("n", pa.int64()), ("text", pa.string())])


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return RemotePath(f"memory://bucket/{tmp_path.name}")


def numbers(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"n": n, "text": str(n)} for n in range(first, first + count)]


# Paths


def test_a_store_path_is_used_like_a_path(tmp_path: Path, store: RemotePath) -> None:
    here = tmp_path / "tree"
    for name in ("a.txt", "b.json", "sub/a.txt", "sub/c.parquet", "sub/deep/a.txt", "x-00001.parquet"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
        (store / name).write_text(name)
    for pattern in ("*", "*.txt", "x-*.parquet", "?.*", "[ab].*", "sub/*", "sub/a.txt", "sub/none", "sub/deep/*.txt", "none/*"):
        assert sorted(str(p.relative_to(store)) for p in store.glob(pattern)) == sorted(
            str(p.relative_to(here)) for p in here.glob(pattern)
        ), pattern
    assert [(str(p.relative_to(store)), stat.st_size) for p, stat in store.walk_files()] == sorted(
        (str(p.relative_to(here)), p.stat().st_size) for p in here.rglob("*") if p.is_file()
    )
    for name in ("a.txt", "sub", "sub/deep/a.txt", "none"):
        local, remote = here / name, store / name
        assert (remote.name, remote.stem, remote.suffix) == (local.name, local.stem, local.suffix)
        assert (remote.exists(), remote.is_file(), remote.is_dir()) == (local.exists(), local.is_file(), local.is_dir())
        assert remote.with_suffix(".md").relative_to(store) == local.with_suffix(".md").relative_to(here)
        assert remote.parent.relative_to(store) == local.parent.relative_to(here)
    assert RemotePath("s3://bucket/a/b").parents == (RemotePath("s3://bucket/a"), RemotePath("s3://bucket"))
    assert RemotePath("s3://bucket/a/") == RemotePath("s3://bucket/a")
    assert RemotePath("s3://bucket/a") < RemotePath("s3://bucket/b")
    with (store / "a.txt").open() as file:
        file.seek(2)
        assert file.read() == b"txt"
    (store / "sub").remove_tree()
    assert [p.name for p, _ in store.walk_files()] == ["a.txt", "b.json", "x-00001.parquet"]
    (store / "sub").remove_tree()
    (store / "a.txt").unlink()
    (store / "a.txt").unlink(missing_ok=True)
    for gone in ((store / "a.txt").unlink, (store / "a.txt").stat, (store / "a.txt").read_bytes):
        with pytest.raises(FileNotFoundError):
            gone()
    with pytest.raises(ValueError, match="is a bucket"):
        RemotePath("memory://bucket").remove_tree()


def test_where_a_name_points_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert path_of("~/a b") == path_of("file:///home/ann/a%20b") == Path("/home/ann/a b")
    assert path_of("a%20b") == Path("a%20b")
    assert [is_remote(where) for where in ("s3://b/a", "file:///a", "a", "c:/a")] == [True, False, False, False]
    remote = path_of("s3://bucket/a")
    assert path_of(remote) is remote


def test_a_model_has_the_name_that_it_is_given_or_that_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "town" / "merged").mkdir(parents=True)
    (tmp_path / "a=b").mkdir()
    merged, odd = str(tmp_path / "town" / "merged"), str(tmp_path / "a=b")
    assert parse_model_flag(merged) == ("town", merged)
    assert parse_model_flag(f"mine={merged}") == ("mine", merged)
    assert parse_model_flag(odd) == ("a=b", odd)
    assert parse_model_flag("mine=s3://bucket/x/merged") == ("mine", "s3://bucket/x/merged")
    assert parse_model_flag("s3://bucket/x/merged") == ("x", "s3://bucket/x/merged")
    assert parse_model_flag("owner/small") == ("small", "owner/small")


# Files


@pytest.mark.parametrize("where", ["disk", "store"])
def test_a_file_is_there_whole_or_as_it_was(where: str, tmp_path: Path, store: RemotePath) -> None:
    target = (tmp_path if where == "disk" else store) / "sub" / "file.txt"
    with suppress(ZeroDivisionError), atomic_write(target) as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert not target.exists()
    for text in ("one", "two", ""):
        with atomic_write(target) as path:
            path.write_text(text)
            assert path.suffix == ".tmp"
        assert target.read_text() == text
    with suppress(ZeroDivisionError), atomic_write(target) as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == ""
    assert not path.exists()
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_a_folder_takes_the_place_of_another_one_only_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "left").write_text("by a job that was killed")
    with atomic_replace_dir(folder) as new:
        (new / "a").write_text("one")
    with suppress(ZeroDivisionError), atomic_replace_dir(folder) as new:
        (new / "a").write_text("half")
        raise ZeroDivisionError
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("a", "one")]
    with atomic_replace_dir(folder) as new:
        (new / "b").write_text("two")
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("b", "two")]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("model")) == ["model"]


def test_in_a_store_what_makes_a_folder_a_model_goes_first_and_comes_last(
    store: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, told = store / "model", []
    upload, unlink = files.upload, RemotePath.unlink
    monkeypatch.setattr(files, "upload", lambda file, target: (told.append(("put", target.name)), upload(file, target)))
    monkeypatch.setattr(RemotePath, "unlink", lambda path, **how: (told.append(("gone", path.name)), unlink(path, **how)))
    for _ in range(2):
        with atomic_replace_dir(folder) as new:
            for name in ("a.txt", "config.json", "z.safetensors"):
                (new / name).write_text(name)
    one = [("put", "a.txt"), ("put", "z.safetensors"), ("put", "config.json")]
    assert told == [*one, ("gone", "config.json"), ("gone", "a.txt"), ("gone", "z.safetensors"), *one]


def test_a_copy_is_made_once_and_of_each_place_its_own(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/x.txt", "b/x.txt"):
        (store / name).write_text(name)
    first, second = local_copy(store / "a/x.txt"), local_copy(str(store / "b/x.txt"))
    assert (first.read_text(), second.read_text()) == ("a/x.txt", "b/x.txt")
    assert first.is_relative_to(cache_folder())
    monkeypatch.setattr(files, "download", None)  # nothing is fetched twice
    assert local_copy(store / "a/x.txt") == first
    assert local_copy(first) == first
    with pytest.raises(FileNotFoundError):
        local_copy(store / "a/none.txt")
    assert digest(["a", "bc"]) != digest(["ab", "c"])
    assert len(digest("")) == 32


def test_only_what_can_not_run_is_fetched_of_a_model(store: RemotePath) -> None:
    for name in ("config.json", "model.safetensors", "chat.jinja", "evil.py", "model.bin", "deep/x.json"):
        (store / "m" / name).write_text(name)
    assert sorted(p.name for p in local_model_copy(store / "m").iterdir()) == ["chat.jinja", "config.json", "model.safetensors"]
    (store / "n" / "model.safetensors").write_text("")
    with pytest.raises(InputError, match="holds no model"):
        local_model_copy(store / "n")


# Tables


@pytest.mark.parametrize(
    ("rows", "in_file"), [(0, 10), (9, 10), (10, 10), (11, 10), (250, 100), (200, 64), (130, 65), (129, 128)]
)
def test_a_file_holds_as_many_rows_as_it_shall(tmp_path: Path, rows: int, in_file: int) -> None:
    assert tables.write_table(tmp_path, "train", iter(numbers(rows)), SCHEMA, in_file) == rows
    assert tables.count_rows(tmp_path, "train") == rows
    wanted = [in_file] * (rows // in_file) + [rows % in_file] * (rows % in_file > 0)
    found = sorted(tmp_path.iterdir())
    assert [p.name for p in found] == [f"train-{number:05d}.parquet" for number in range(len(wanted))]
    assert [tables.count_file_rows(path) for path in found] == wanted
    if rows:
        assert list(tables.iter_rows(tmp_path, "train")) == numbers(rows) == tables.read_table(tmp_path, "train").to_pylist()
        assert list(tables.iter_rows(tmp_path, "train", ["text"])) == [{"text": row["text"]} for row in numbers(rows)]
        groups = [
            g
            for path in found
            for g in [
                tables.open_parquet(path).metadata.row_group(i).num_rows
                for i in range(tables.open_parquet(path).num_row_groups)
            ]
        ]
        assert max(groups) <= tables.ROWS_PER_GROUP
    else:
        with pytest.raises(InputError, match="no table"):
            tables.table_files(tmp_path, "train")


def test_a_split_is_that_of_its_name_alone(tmp_path: Path) -> None:
    tables.write_table(tmp_path, "train", numbers(3), SCHEMA)
    tables.write_table(tmp_path, "val", numbers(2), SCHEMA)
    assert (tables.count_rows(tmp_path, "train"), tables.count_rows(tmp_path, "val"), tables.count_rows(tmp_path, "test")) == (
        3,
        2,
        0,
    )


# Shards


def test_a_shard_may_leave_rows_out_and_read_some_columns(tmp_path: Path) -> None:
    tables.write_table(tmp_path / "in", "all", numbers(150), SCHEMA, 64)
    (shard,) = plan_shards(tmp_path / "in", "all", 1000)
    left = {0, 63, 64, 149}
    some = Shard(0, 146, shard.groups, frozenset(left))
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


def test_each_file_and_each_run_of_rows_has_its_own_fingerprint(tmp_path: Path) -> None:
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


def test_the_fingerprint_of_sources_is_of_their_content_and_order(tmp_path: Path) -> None:
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


# Runs


def test_what_differs_from_a_finished_step_is_named(tmp_path: Path) -> None:
    settings = {"a": 1, "b": {"c": [1, 2], "d": None}, "e": 5, "f": 6}
    with fresh_dir(tmp_path / "step", settings):
        pass
    assert is_done(tmp_path / "step", {"f": 6, "e": 5, "b": {"d": None, "c": (1, 2)}, "a": 1})  # as JSON has it
    for change, said in (
        ({"b": {"c": [1], "d": None}}, r"\(b.c: \[1, 2\] -> \[1\]\)"),
        ({"g": 7}, r"\(g: None -> 7\)"),
        ({"a": 2, "e": 6, "f": 7}, r"\(a: 1 -> 2, e: 5 -> 6, f: 6 -> 7\)"),
        ({"a": 2, "b": {}, "e": 6, "f": 7}, r"\(a: 1 -> 2, b\.c: \[1, 2\] -> None, e: 5 -> 6, …\)"),
    ):
        with pytest.raises(InputError, match=said):
            is_done(tmp_path / "step", settings | change)


def test_a_training_is_gone_on_with_by_the_same_settings_alone(tmp_path: Path) -> None:
    folder = tmp_path / "training"
    begin_or_resume(folder, {"a": 1})
    (folder / "checkpoint").write_text("x")
    begin_or_resume(folder, {"a": 1})
    assert (folder / "checkpoint").is_file()
    with pytest.raises(InputError, match="a: 1 -> 2"):
        begin_or_resume(folder, {"a": 2})
    assert (folder / "checkpoint").is_file()
    begin_or_resume(folder, {"a": 2}, redo=True)
    assert not (folder / "checkpoint").exists()
    assert is_done(folder, {"a": 2})


def test_a_step_in_a_store_is_unfinished_until_its_last_mark(store: RemotePath) -> None:
    folder = store / "step"
    assert not is_unfinished(folder)
    with resumable_dir(folder, {"a": 1}) as partial:
        assert is_unfinished(folder)
        tables.write_table(partial, "train", numbers(3), SCHEMA)
        with pytest.raises(InputError, match="no table"):
            tables.table_files(folder, "train")
    assert not is_unfinished(folder)
    assert not (folder / BEGUN_FILE).exists()
    assert tables.count_rows(folder, "train") == 3
    with fresh_dir(folder, {"a": 2}) as partial:
        assert is_unfinished(folder)
        write_parquet(pa.Table.from_pylist(numbers(2), SCHEMA), partial / "val-00000.parquet")
    assert (tables.count_rows(folder, "train"), tables.count_rows(folder, "val")) == (0, 2)  # what was there is gone


@pytest.mark.parametrize(
    ("number", "said"), [(13, "can't be written"), (17, "can't be written"), (28, "is full"), (122, "is full")]
)
def test_errors_of_a_disk_are_sentences_and_others_stay(number: int, said: str) -> None:
    assert said in str(storage_error(OSError(number, "so it says"), Path("/x")))
    other = OSError(5, "Input/output error")
    assert storage_error(other, Path("/x")) is other
