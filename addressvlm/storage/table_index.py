"""The index of a table: files of a split, their sizes, rows of their row groups, so that nobody must open all of them.

It is written when a table is published, one `<split>-index.json`; a listing of the folder tells whether it still holds.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from addressvlm.storage.files import atomic_write, open_parquet
from addressvlm.storage.remote_path import AnyPath, RemotePath

OPENED_AT_ONCE = 16


class IndexedFile(NamedTuple):
    """A Parquet file of a table: its name, its size in bytes, the rows of each row group."""

    name: str
    size: int
    groups: list[int]


def index_file(folder: AnyPath, split: str) -> AnyPath:
    """Where the index of a split is."""
    return folder / f"{split}-index.json"


def write_indexes(folder: AnyPath) -> None:
    """Write the index of every split of a folder; every Parquet file of it is opened once."""
    sizes = _sizes(folder)
    for split in sorted({name.rpartition("-")[0] for name in sizes}):
        files = _open_all(folder, split, sizes)
        with atomic_write(index_file(folder, split)) as path:
            path.write_text(json.dumps({"files": files}))


def row_groups(folder: AnyPath, split: str) -> list[IndexedFile]:
    """The sorted files of a split with their row groups, from the index; from the files where it is missing or older."""
    sizes = _sizes(folder)
    mine = {name: size for name, size in sizes.items() if name.rpartition("-")[0] == split}
    try:
        files = [IndexedFile(*file) for file in json.loads(index_file(folder, split).read_text())["files"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        files = []
    if {file.name: file.size for file in files} == mine:
        return files
    return _open_all(folder, split, sizes)


def _sizes(folder: AnyPath) -> dict[str, int]:
    """Size of every Parquet file `<split>-NNNNN.parquet` of a folder, by one listing."""
    if isinstance(folder, RemotePath):
        entries = [(file.name, stat.st_size) for file, stat in folder.walk_files() if file.parent == folder]
    elif folder.is_dir():
        with os.scandir(folder) as found:
            entries = [(entry.name, entry.stat().st_size) for entry in found if entry.is_file()]
    else:
        entries = []
    return {name: size for name, size in sorted(entries) if name.endswith(".parquet") and "-" in name}


def _open_all(folder: AnyPath, split: str, sizes: dict[str, int]) -> list[IndexedFile]:
    names: Sequence[str] = [name for name in sizes if name.rpartition("-")[0] == split]

    def groups(name: str) -> list[int]:
        with open_parquet(folder / name) as parquet:
            return [parquet.metadata.row_group(number).num_rows for number in range(parquet.metadata.num_row_groups)]

    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        return [IndexedFile(name, sizes[name], rows) for name, rows in zip(names, pool.map(groups, names), strict=True)]
