"""Tables made shard by shard, so that an interrupted step goes on where it was and any number of workers can share it.

A shard is a run of rows of an input table. What is made of it goes into files `<split>-NNNNN.parquet` under the shard's
number, each of which appears whole; a mark `_work/shards/NNNNN.json` comes last. The mark holds a fingerprint of what the
shard was made from, and counts for as long as that is the same and the files are there.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from addressvlm.storage import tables
from addressvlm.storage.files import TEMPORARY_SUFFIX, AtomicFile, atomic_write, digest, open_parquet
from addressvlm.storage.remote_path import AnyPath, path_of
from addressvlm.storage.run_dir import WORK_DIR, storage_error

Rows = list[dict[str, Any]]
Summary = dict[str, Any]

MARKS_DIR = f"{WORK_DIR}/shards"
TAIL = 65536  # bytes; the end of a Parquet file holds the sizes and extremes of all its columns


@dataclass(frozen=True)
class Shard:
    """Rows of a table: row groups `first` to `last` (exclusive) of each of its files."""

    number: int
    rows: int
    groups: tuple[tuple[str, int, int], ...]  # file, first, last
    left_out: frozenset[int] = frozenset()  # which of all their rows, from 0, don't belong to it

    def batches(self, columns: list[str] | None = None) -> Iterator[Rows]:
        """The rows in order, `tables.ROWS_PER_GROUP` at a time; no more than a row group is in memory."""
        rows = (row for at, row in enumerate(self._rows(columns)) if at not in self.left_out)
        while batch := list(islice(rows, tables.ROWS_PER_GROUP)):
            yield batch

    def _rows(self, columns: list[str] | None) -> Iterator[dict[str, Any]]:
        for file, first, last in self.groups:
            with open_parquet(path_of(file)) as opened:
                for group in range(first, last):
                    for batch in opened.iter_batches(tables.ROWS_PER_GROUP, row_groups=[group], columns=columns):
                        yield from batch.to_pylist()

    def fingerprint(self) -> str:
        """Changes when the rows do."""
        return digest([[*_end(path_of(file)), first, last] for file, first, last in self.groups])


@dataclass
class ShardResult:
    """What came of some rows: rows of the output tables by split, rows of `tables.REJECTS`, and anything to count."""

    tables: dict[str, Rows]
    rejects: Rows = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardWork:
    """What a step does with a shard.

    Attributes:
        function: gets up to `tables.ROWS_PER_GROUP` rows with these columns.
        schema: of the output tables.
        made_from: fingerprint of everything else the result depends on and that may change between two attempts.
        made_from_rows: the same for what single rows point to, such as files; gets the shard's rows.
    """

    function: Callable[[Rows], ShardResult]
    schema: pa.Schema
    columns: list[str] | None = None
    made_from: str = ""
    made_from_rows: Callable[[Iterable[dict[str, Any]]], str] | None = None


def plan_shards(folder: AnyPath, split: str, rows: int) -> list[Shard]:
    """The shards of a table, of about `rows` rows: of whole row groups, and of one file unless files are smaller.

    Raises:
        InputError: the split has no files.
    """
    return plan_file_shards(tables.table_files(folder, split), rows)


def plan_file_shards(files: Iterable[AnyPath], rows: int) -> list[Shard]:
    """The same of Parquet files."""
    shards: list[Shard] = []
    groups: list[tuple[str, int, int]] = []
    count = 0

    def close() -> None:
        nonlocal groups, count
        if groups:
            shards.append(Shard(len(shards), count, tuple(groups)))
        groups, count = [], 0

    for file in files:
        with open_parquet(file) as opened:
            about = opened.metadata
        if count + about.num_rows > rows:
            close()
        for group in range(about.num_row_groups):
            size = about.row_group(group).num_rows
            if count and count + size > rows:
                close()
            if groups and groups[-1][0] == str(file):
                groups[-1] = (str(file), groups[-1][1], group + 1)
            else:
                groups.append((str(file), group, group + 1))
            count += size
    close()
    return shards


def remove_stale_files(folder: AnyPath, shards: int, made: Iterable[Summary] | None = None) -> None:
    """Remove what is left of other plans and of writers that were stopped; when all shards are made, all but their files."""
    kept = None if made is None else {name for summary in made for name in summary["files"]}
    (folder / MARKS_DIR).mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("*"), *folder.glob(f"{MARKS_DIR}/*")]:
        number = path.stem.rpartition("-")[2]
        stale = number.isdigit() and int(number) >= shards and path.suffix in (".parquet", ".json")
        stale |= kept is not None and number.isdigit() and path.suffix == ".parquet" and path.name not in kept
        if path.suffix == TEMPORARY_SUFFIX or stale:
            path.unlink(missing_ok=True)


def process_shard(shard: Shard, folder: AnyPath, work: ShardWork) -> Summary:
    """Make the shard's files in `folder`, unless its mark is there, and return the mark.

    It has the keys number, rows, written (rows by split), rejects, counts.

    Raises:
        InputError: `work` raises it, or the folder can't be written.
    """
    mark = folder / MARKS_DIR / f"{shard.number:05d}.json"
    point_to = work.made_from_rows(row for batch in shard.batches(work.columns) for row in batch) if work.made_from_rows else ""
    made_from = digest([shard.fingerprint(), work.made_from, point_to])
    kept = _kept(mark, folder, made_from)
    if kept:
        return kept
    mark.unlink(missing_ok=True)
    summary: Summary = {"number": shard.number, "rows": shard.rows, "made_from": made_from, "rejects": [], "counts": {}}
    with _Files(folder, shard.number, work.schema) as files:
        for batch in shard.batches(work.columns):
            made = work.function(batch)
            for split, rows in made.tables.items():
                files.add(split, rows)
            summary["rejects"] += made.rejects
            for key, count in made.counts.items():
                summary["counts"][key] = summary["counts"].get(key, 0) + count
        summary |= files.publish()
        files.mark(mark, summary)
    return summary


def invalidate_shards(folder: AnyPath, summaries: Iterable[Summary]) -> None:
    """Take away the marks of these shards, so that they are made again."""
    for summary in summaries:
        (folder / MARKS_DIR / f"{summary['number']:05d}.json").unlink(missing_ok=True)


def sources_fingerprint(*sources: str | None) -> str:
    """Changes when one of these files does, in a store too; what is no file is known by its name."""
    return digest([_end(path_of(s)) if s and _is_file(s) else [s] for s in sources])


def files_fingerprint(paths: Iterable[str]) -> str:
    """The same for many files, by their sizes and times of change."""
    return digest([[path, *_changed(path)] for path in paths])


def _changed(path: str) -> list[int]:
    file = path_of(path)
    try:
        about = file.stat() if isinstance(file, Path) else None
    except (OSError, ValueError):  # absent, or no local file
        return []
    return [about.st_size, about.st_mtime_ns] if about else []


def _is_file(source: str) -> bool:
    """Whether it can be read: in a store that holds runs; an address of http and the like is known by its name alone."""
    return source.partition("://")[0] not in ("http", "https") and "{" not in source and path_of(source).is_file()


def _end(path: AnyPath) -> list[Any]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL))
        return [path.name, size, hashlib.sha256(file.read()).hexdigest()]


def _kept(mark: AnyPath, folder: AnyPath, made_from: str) -> Summary | None:
    """The mark of an earlier attempt if it holds for what is to be made now."""
    try:
        summary: Summary = json.loads(mark.read_text())
        whole = all((folder / name).stat().st_size == size for name, size in summary["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return summary if whole and summary["made_from"] == made_from else None


class _Files:
    """The Parquet files of one shard; a block that ends with an error leaves none of them."""

    def __init__(self, folder: AnyPath, number: int, schema: pa.Schema) -> None:
        self.folder, self.number, self.schema = folder, number, schema
        self._open: dict[str, tuple[AtomicFile, pq.ParquetWriter]] = {}
        self._waiting: dict[str, Rows] = {}
        self._written: dict[str, int] = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        for file, writer in self._open.values():
            writer.close()
            file.discard()

    def add(self, split: str, rows: Rows) -> None:
        """Append rows; whole row groups are written at once."""
        waiting = self._waiting.setdefault(split, [])
        waiting += rows
        while len(waiting) >= tables.ROWS_PER_GROUP:
            self._write(split, waiting[: tables.ROWS_PER_GROUP])
            del waiting[: tables.ROWS_PER_GROUP]

    def publish(self) -> Summary:
        """Close all files and give them their names."""
        for split, rows in self._waiting.items():
            if rows:
                self._write(split, rows)
        sizes = {}
        try:
            for split in list(self._open):
                file, writer = self._open[split]
                writer.close()
                sizes[file.target.name] = file.publish()
                del self._open[split]
        except OSError as error:
            raise storage_error(error, self.folder) from error
        return {"written": self._written, "files": sizes}

    def mark(self, path: AnyPath, summary: Summary) -> None:
        """Write the mark, whole or not at all."""
        try:
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(summary))
        except OSError as error:
            raise storage_error(error, self.folder) from error

    def _write(self, split: str, rows: Rows) -> None:
        try:
            if split not in self._open:
                file = AtomicFile(self.folder / f"{split}-{self.number:05d}.parquet")
                self._open[split] = (file, pq.ParquetWriter(file.path, self.schema))
            self._open[split][1].write_table(pa.Table.from_pylist(rows, schema=self.schema))
        except OSError as error:
            raise storage_error(error, self.folder) from error
        self._written[split] = self._written.get(split, 0) + len(rows)
