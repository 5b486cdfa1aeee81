"""Finished, unfinished and resumed steps of a run."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from addressvlm import InputError
from addressvlm.config import load
from addressvlm.storage import tables
from addressvlm.storage.files import (
    write_parquet,
)
from addressvlm.storage.remote_path import RemotePath
from addressvlm.storage.run_dir import (
    BEGUN_FILE,
    Run,
    begin_or_resume,
    fresh_dir,
    is_done,
    is_unfinished,
    parse_model_flag,
    resumable_dir,
    slug,
    storage_dir,
    storage_error,
)

SCHEMA = pa.schema([("n", pa.int64()), ("text", pa.string())])


def numbers(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"n": n, "text": str(n)} for n in range(first, first + count)]


def test_a_model_flag_has_a_name_or_takes_that_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "town" / "merged").mkdir(parents=True)
    (tmp_path / "a=b").mkdir()
    merged, odd = str(tmp_path / "town" / "merged"), str(tmp_path / "a=b")
    assert parse_model_flag(merged) == ("town", merged)
    assert parse_model_flag(f"mine={merged}") == ("mine", merged)
    assert parse_model_flag(odd) == ("a=b", odd)
    assert parse_model_flag("mine=s3://bucket/x/merged") == ("mine", "s3://bucket/x/merged")
    assert parse_model_flag("s3://bucket/x/merged") == ("x", "s3://bucket/x/merged")
    assert parse_model_flag("owner/small") == ("small", "owner/small")


def test_settings_that_differ_from_a_finished_step_are_named(tmp_path: Path) -> None:
    settings = {"a": 1, "b": {"c": [1, 2], "d": None}, "e": 5, "f": 6}
    with fresh_dir(tmp_path / "step", settings):
        pass
    assert is_done(tmp_path / "step", {"f": 6, "e": 5, "b": {"d": None, "c": (1, 2)}, "a": 1})  # as JSON has it
    for change, message in (
        ({"b": {"c": [1], "d": None}}, r"\(b.c: \[1, 2\] -> \[1\]\)"),
        ({"g": 7}, r"\(g: None -> 7\)"),
        ({"a": 2, "e": 6, "f": 7}, r"\(a: 1 -> 2, e: 5 -> 6, f: 6 -> 7\)"),
        ({"a": 2, "b": {}, "e": 6, "f": 7}, r"\(a: 1 -> 2, b\.c: \[1, 2\] -> None, e: 5 -> 6, …\)"),
    ):
        with pytest.raises(InputError, match=message):
            is_done(tmp_path / "step", settings | change)


def test_a_training_resumes_only_with_the_same_settings(tmp_path: Path) -> None:
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


def test_a_remote_step_is_unfinished_until_its_done_marker(memory_store: RemotePath) -> None:
    folder = memory_store / "step"
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
    ("number", "message"), [(13, "can't be written"), (17, "can't be written"), (28, "is full"), (122, "is full")]
)
def test_disk_errors_become_sentences_and_others_are_unchanged(number: int, message: str) -> None:
    assert message in str(storage_error(OSError(number, "so it says"), Path("/x")))
    other = OSError(5, "Input/output error")
    assert storage_error(other, Path("/x")) is other


def test_slug() -> None:
    assert slug("stage 2 only, equal steps") == "stage-2-only-equal-steps"


def test_storage_outlives_a_packaged_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage_dir("runs") == tmp_path / "runs"
    copy = tmp_path / "working_dir_files" / "pkg"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage_dir("runs") == tmp_path / "home" / "addressvlm" / "runs"
    assert storage_dir("/shared/runs") == Path("/shared/runs")


def test_a_step_is_done_only_with_the_same_settings(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    assert not is_done(folder, {"a": 1})
    with fresh_dir(folder, {"a": 1, "b": {"c": 2}}) as partial:
        (partial / "table").write_text("x")
        assert not folder.exists()
    assert is_done(folder, {"a": 1, "b": {"c": 2}})
    assert (folder / "table").is_file()
    with pytest.raises(InputError, match=r"b.c: 2 -> 3.*--redo"):
        is_done(folder, {"a": 1, "b": {"c": 3}})
    assert not is_done(folder, {"a": 2}, redo=True)


def test_a_failed_step_leaves_the_last_good_one(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    with fresh_dir(folder, {"a": 1}) as partial:
        (partial / "table").write_text("good")

    def fail() -> None:
        with fresh_dir(folder, {"a": 2}) as partial:
            (partial / "table").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (folder / "table").read_text() == "good"


def test_a_folder_that_cant_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be written"), fresh_dir(tmp_path / "file" / "step", {}):
        pass
    with pytest.raises(InputError, match="can't be written"):
        begin_or_resume(tmp_path / "file" / "training", {})


def test_run_keeps_everything_below_its_name(tmp_path: Path) -> None:
    run = Run(load("demo", [f"storage={tmp_path}", "name=x"], {}))
    paths = [value for value in vars(run).values() if isinstance(value, Path)]
    assert all(path.is_relative_to(tmp_path / "x") for path in paths)
    assert run.model_dir("stage 2 only").name == "stage-2-only"
