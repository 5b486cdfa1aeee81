"""The index of a table: what it holds, and when it is believed"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from addressvlm.storage import table_index, tables
from addressvlm.storage.files import open_parquet
from addressvlm.storage.remote_path import AnyPath, RemotePath
from addressvlm.storage.table_index import index_file, row_groups, write_indexes

SCHEMA = pa.schema([("n", pa.int64())])


def write(folder: AnyPath, split: str, rows: int, in_file: int = 2048) -> None:
    tables.write_table(folder, split, [{"n": n} for n in range(rows)], SCHEMA, in_file)


def groups(folder: AnyPath, split: str) -> list[tuple[str, list[int]]]:
    return [(file.name, file.groups) for file in row_groups(folder, split)]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are opened."""
    names: list[str] = []
    monkeypatch.setattr(table_index, "open_parquet", lambda file: names.append(file.name) or open_parquet(file))
    return names


@pytest.mark.parametrize("where", ["disk", "store"])
def test_each_split_has_its_own_files_and_row_groups(
    where: str, tmp_path: Path, memory_store: RemotePath, opened: list[str]
) -> None:
    folder = (tmp_path if where == "disk" else memory_store) / "table"
    write(folder, "train", 150)
    write(folder, "train-2", 70, 64)
    write(folder, "val", 3, 2)
    write(folder / "below", "train", 5)
    (folder / "card.json").write_text("{}")
    expected: dict[str, Any] = {
        "train": [("train-00000.parquet", [64, 64, 22])],
        "train-2": [("train-2-00000.parquet", [64]), ("train-2-00001.parquet", [6])],
        "val": [("val-00000.parquet", [2]), ("val-00001.parquet", [1])],
        "test": [],
    }
    assert {split: groups(folder, split) for split in expected} == expected
    assert sorted(opened) == sorted(name for files in expected.values() for name, _ in files)
    write_indexes(folder)
    opened.clear()
    assert {split: groups(folder, split) for split in expected} == expected
    assert opened == []
    assert sorted(file.name for file in folder.glob("*-index.json")) == [
        "train-2-index.json", "train-index.json", "val-index.json"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", "{}", '{"files": 3}', '{"files": [[1]]}', '{"files": [["a", 1, 2, 3]]}']
)
def test_an_index_that_is_damaged_is_not_needed(tmp_path: Path, opened: list[str], text: str) -> None:
    write(tmp_path, "train", 3)
    index_file(tmp_path, "train").write_text(text)
    assert groups(tmp_path, "train") == [("train-00000.parquet", [3])]
    assert opened == ["train-00000.parquet"]


def test_an_index_of_other_files_is_not_believed(tmp_path: Path) -> None:
    write(tmp_path, "train", 3, 1)
    write_indexes(tmp_path)
    size = (tmp_path / "train-00001.parquet").stat().st_size
    tables.write_table(tmp_path / "other", "train", [{"n": 1}, {"n": 2}], SCHEMA)
    (tmp_path / "other" / "train-00000.parquet").replace(tmp_path / "train-00001.parquet")
    assert (tmp_path / "train-00001.parquet").stat().st_size != size
    assert [rows for _, rows in groups(tmp_path, "train")] == [[1], [2], [1]]
    (tmp_path / "train-00001.parquet").unlink()
    assert [name for name, _ in groups(tmp_path, "train")] == ["train-00000.parquet", "train-00002.parquet"]
    assert groups(tmp_path / "nowhere", "train") == []
