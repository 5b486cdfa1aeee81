"""Tables of Parquet files."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from addressvlm import InputError
from addressvlm.storage import tables

SCHEMA = pa.schema([("n", pa.int64()), ("text", pa.string())])


def numbers(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"n": n, "text": str(n)} for n in range(first, first + count)]


@pytest.mark.parametrize(
    ("rows", "in_file"), [(0, 10), (9, 10), (10, 10), (11, 10), (250, 100), (200, 64), (130, 65), (129, 128)]
)
def test_files_have_the_requested_number_of_rows(tmp_path: Path, rows: int, in_file: int) -> None:
    assert tables.write_table(tmp_path, "train", iter(numbers(rows)), SCHEMA, in_file) == rows
    assert tables.count_rows(tmp_path, "train") == rows
    expected = [in_file] * (rows // in_file) + [rows % in_file] * (rows % in_file > 0)
    files = sorted(tmp_path.iterdir())
    assert [p.name for p in files] == [f"train-{number:05d}.parquet" for number in range(len(expected))]
    assert [tables.count_file_rows(path) for path in files] == expected
    if rows:
        assert list(tables.iter_rows(tmp_path, "train")) == numbers(rows) == tables.read_table(tmp_path, "train").to_pylist()
        assert list(tables.iter_rows(tmp_path, "train", ["text"])) == [{"text": row["text"]} for row in numbers(rows)]
        groups = [
            g
            for path in files
            for g in [
                tables.open_parquet(path).metadata.row_group(i).num_rows
                for i in range(tables.open_parquet(path).num_row_groups)
            ]
        ]
        assert max(groups) <= tables.ROWS_PER_GROUP
    else:
        with pytest.raises(InputError, match="no table"):
            tables.table_files(tmp_path, "train")


def test_splits_are_separate(tmp_path: Path) -> None:
    tables.write_table(tmp_path, "train", numbers(3), SCHEMA)
    tables.write_table(tmp_path, "val", numbers(2), SCHEMA)
    assert (tables.count_rows(tmp_path, "train"), tables.count_rows(tmp_path, "val"), tables.count_rows(tmp_path, "test")) == (
        3,
        2,
        0,
    )
