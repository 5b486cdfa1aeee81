"""Process a table shard by shard, so that an interrupted step resumes and any number of workers can share it.

A shard is a range of rows of an input table. Its output goes to files `<split>-NNNNN.parquet` with the shard's number, each
written atomically, and a marker `_work/shards/NNNNN.json` comes last. The marker holds a fingerprint of the shard's inputs; it
is valid while the fingerprint is the same and the files exist.
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
from addressvlm.storage.run_dir import WORK_DIR, storage_errors

Rows = list[dict[str, Any]]
Summary = dict[str, Any]

MARKS_DIR = f"{WORK_DIR}/shards"
FOOTER_BYTES = 65536  # the end of a Parquet file holds the sizes and extremes of all its columns


@dataclass(frozen=True)
class Shard:
    """Rows of a table: row groups `first` to `last` (exclusive) of each of its files."""

    number: int
    rows: int
    groups: tuple[tuple[str, int, int], ...]  # file, first, last
    picked: tuple[int, ...] | None = None  # ascending indices, from 0 over all groups, of its rows; None: all

    def batches(self, columns: list[str] | None = None) -> Iterator[Rows]:
        """The rows in order, `tables.ROWS_PER_GROUP` at a time; at most one row group is in memory."""
        rows = self._rows(columns)
        while batch := list(islice(rows, tables.ROWS_PER_GROUP)):
            yield batch

    def _rows(self, columns: list[str] | None) -> Iterator[dict[str, Any]]:
        start = 0
        for name, first, last in self.groups:
            with open_parquet(path_of(name)) as file:
                for group in range(first, last):
                    for batch in file.iter_batches(tables.ROWS_PER_GROUP, row_groups=[group], columns=columns):
                        end = start + batch.num_rows
                        if self.picked is not None:
                            batch = batch.take(pa.array([i - start for i in self.picked if start <= i < end], pa.int64()))
                        start = end
                        yield from batch.to_pylist()

    def fingerprint(self) -> str:
        """Changes when the rows do."""
        groups = [[*_footer_digest(path_of(file)), first, last] for file, first, last in self.groups]
        return digest([groups, self.picked])


@dataclass
class ShardResult:
    """Output of some rows: rows of the output tables by split, rows of `tables.REJECTS`, and counts to sum up."""

    tables: dict[str, Rows]
    rejects: Rows = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardWork:
    """How a step processes a shard.

    Attributes:
        function: called with up to `tables.ROWS_PER_GROUP` rows that have these columns.
        schema: of the output tables.
        fingerprint: of everything else that the result depends on and that may change between two attempts.
        row_fingerprint: the same for what single rows refer to, such as files; called with the shard's rows.
    """

    function: Callable[[Rows], ShardResult]
    schema: pa.Schema
    columns: list[str] | None = None
    fingerprint: str = ""
    row_fingerprint: Callable[[Iterable[dict[str, Any]]], str] | None = None


def plan_shards(folder: AnyPath, split: str, rows: int) -> list[Shard]:
    """The shards of a table, of about `rows` rows: whole row groups, of one file unless files are smaller.

    Raises:
        InputError: the split has no files.
    """
    return plan_file_shards(tables.table_files(folder, split), rows)


def plan_file_shards(files: Iterable[AnyPath], rows: int) -> list[Shard]:
    """The shards of Parquet files, as `plan_shards`."""
    shards: list[Shard] = []
    groups: list[tuple[str, int, int]] = []
    count = 0

    def close() -> None:
        nonlocal groups, count
        if groups:
            shards.append(Shard(len(shards), count, tuple(groups)))
        groups, count = [], 0

    for path in files:
        with open_parquet(path) as file:
            metadata = file.metadata
        if count + metadata.num_rows > rows:
            close()
        for group in range(metadata.num_row_groups):
            size = metadata.row_group(group).num_rows
            if count and count + size > rows:
                close()
            if groups and groups[-1][0] == str(path):
                groups[-1] = (str(path), groups[-1][1], group + 1)
            else:
                groups.append((str(path), group, group + 1))
            count += size
    close()
    return shards


def process_shard(shard: Shard, folder: AnyPath, work: ShardWork) -> Summary:
    """Write the shard's files to `folder`, unless a valid marker says that it is done; return the marker.

    It has the keys number, rows, written (rows by split), rejects, counts.

    Raises:
        InputError: `work` raises it, or the folder can't be written.
    """
    marker = folder / MARKS_DIR / f"{shard.number:05d}.json"
    rows = (row for batch in shard.batches(work.columns) for row in batch)
    fingerprint = digest([shard.fingerprint(), work.fingerprint, work.row_fingerprint(rows) if work.row_fingerprint else ""])
    try:
        summary: Summary = json.loads(marker.read_text())
        is_complete = all((folder / name).stat().st_size == size for name, size in summary["files"].items())
        if is_complete and summary["fingerprint"] == fingerprint:
            return summary
    except (OSError, ValueError, KeyError):
        pass  # there is no marker, or it is damaged
    marker.unlink(missing_ok=True)
    summary = {"number": shard.number, "rows": shard.rows, "fingerprint": fingerprint, "rejects": [], "counts": {}}
    with _ShardWriter(folder, shard.number, work.schema) as writer:
        for batch in shard.batches(work.columns):
            result = work.function(batch)
            for split, split_rows in result.tables.items():
                writer.add(split, split_rows)
            summary["rejects"] += result.rejects
            for key, count in result.counts.items():
                summary["counts"][key] = summary["counts"].get(key, 0) + count
        summary |= writer.publish()
        with storage_errors(folder), atomic_write(marker) as temporary:
            temporary.write_text(json.dumps(summary))
    return summary


def remove_stale_files(folder: AnyPath, shards: int, summaries: Iterable[Summary] | None = None) -> None:
    """Remove the files of other shard plans and of killed writers; with all shards' summaries every file they don't name."""
    current = None if summaries is None else {name for summary in summaries for name in summary["files"]}
    (folder / MARKS_DIR).mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("*"), *folder.glob(f"{MARKS_DIR}/*")]:
        number = path.stem.rpartition("-")[2]
        stale = number.isdigit() and int(number) >= shards and path.suffix in (".parquet", ".json")
        stale |= current is not None and number.isdigit() and path.suffix == ".parquet" and path.name not in current
        if path.suffix == TEMPORARY_SUFFIX or stale:
            path.unlink(missing_ok=True)


def invalidate_shards(folder: AnyPath, summaries: Iterable[Summary]) -> None:
    """Remove the markers of these shards, so that they are processed again."""
    for summary in summaries:
        (folder / MARKS_DIR / f"{summary['number']:05d}.json").unlink(missing_ok=True)


def sources_fingerprint(*sources: str | None) -> str:
    """Changes when the content of one of these files does, local or remote; a web address or None counts by its name."""

    def is_file(source: str) -> bool:
        return source.partition("://")[0] not in ("http", "https") and "{" not in source and path_of(source).is_file()

    return digest([_footer_digest(path_of(s)) if s and is_file(s) else [s] for s in sources])


def files_fingerprint(paths: Iterable[str]) -> str:
    """Changes when the size or modification time of a local file does; other paths count by their name."""
    entries = []
    for path in paths:
        file = path_of(path)
        try:
            stat = file.stat() if isinstance(file, Path) else None
        except (OSError, ValueError):
            stat = None
        entries.append([path, stat.st_size, stat.st_mtime_ns] if stat else [path])
    return digest(entries)


def _footer_digest(path: AnyPath) -> list[Any]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - FOOTER_BYTES))
        return [path.name, size, hashlib.sha256(file.read()).hexdigest()]


class _ShardWriter:
    """Writes the Parquet files of one shard; a block that ends with an error leaves none of them."""

    def __init__(self, folder: AnyPath, number: int, schema: pa.Schema) -> None:
        self.folder, self.number, self.schema = folder, number, schema
        self._files: dict[str, tuple[AtomicFile, pq.ParquetWriter]] = {}
        self._buffers: dict[str, Rows] = {}
        self._written: dict[str, int] = {}

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file, writer in self._files.values():
            writer.close()
            file.discard()

    def add(self, split: str, rows: Rows) -> None:
        """Append rows; full row groups are written at once."""
        buffer = self._buffers.setdefault(split, [])
        buffer += rows
        while len(buffer) >= tables.ROWS_PER_GROUP:
            self._write(split, buffer[: tables.ROWS_PER_GROUP])
            del buffer[: tables.ROWS_PER_GROUP]

    def publish(self) -> Summary:
        """Write the rest and move all files to their final names."""
        for split, rows in self._buffers.items():
            if rows:
                self._write(split, rows)
        sizes = {}
        with storage_errors(self.folder):
            for split in list(self._files):
                file, writer = self._files[split]
                writer.close()
                sizes[file.target.name] = file.publish()
                del self._files[split]
        return {"written": self._written, "files": sizes}

    def _write(self, split: str, rows: Rows) -> None:
        with storage_errors(self.folder):
            if split not in self._files:
                file = AtomicFile(self.folder / f"{split}-{self.number:05d}.parquet")
                self._files[split] = (file, pq.ParquetWriter(file.path, self.schema))
            self._files[split][1].write_table(pa.Table.from_pylist(rows, schema=self.schema))
        self._written[split] = self._written.get(split, 0) + len(rows)
