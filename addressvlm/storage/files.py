"""Atomic writes, Parquet files, and cached local copies, for local paths and object stores alike."""

import codecs
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from addressvlm.errors import InputError
from addressvlm.storage.remote_path import AnyPath, RemotePath, Stat, path_of

TEMPORARY_SUFFIX = ".tmp"
CACHE_VARIABLE = "ADDRESSVLM_CACHE"  # environment variable: the folder of local copies, default ~/.cache/addressvlm
MODEL_SUFFIXES = {".safetensors", ".json", ".jinja", ".txt", ".model", ".geojson", ".md"}  # no executable code
# A folder without any of these is no model, so they are uploaded last and removed first
MODEL_CONFIG_FILES = ("config.json", "adapter_config.json", "open_clip_config.json")


_BYTE_ORDER_MARKS = (  # UTF-32 first: it begins like UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


class AtomicFile:
    """A file that is either complete or absent: write to the local file `path`, then `publish` it."""

    def __init__(self, target: AnyPath) -> None:
        self.target = target
        name = f"{target.stem}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
        self.path = target.with_name(name) if isinstance(target, Path) else Path(tempfile.gettempdir(), name)

    def publish(self) -> int:
        """Move it to its target; its size in bytes."""
        size = self.path.stat().st_size
        if isinstance(self.target, Path):
            self.path.replace(self.target)
        else:
            upload(self.path, self.target)
            self.path.unlink()
        return size

    def discard(self) -> None:
        """Remove what was written and not published."""
        self.path.unlink(missing_ok=True)


@contextmanager
def atomic_write(target: AnyPath) -> Iterator[Path]:
    """A local file to write; it replaces `target` when the block ends without an error. Creates the parent folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file = AtomicFile(target)
    try:
        yield file.path
        file.publish()
    finally:
        file.discard()


@contextmanager
def atomic_replace_dir(folder: AnyPath) -> Iterator[Path]:
    """A local folder to write; it replaces `folder` when the block ends without an error.

    In an object store the replacement is not atomic, but a model's config files are absent while it lasts.
    """
    if isinstance(folder, Path):
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        return
    with tempfile.TemporaryDirectory() as name:
        local = Path(name)
        yield local
        for old, _ in sorted(folder.walk_files(), key=lambda entry: entry[0].name not in MODEL_CONFIG_FILES):
            old.unlink(missing_ok=True)
        new = [file for file in sorted(local.rglob("*")) if file.is_file()]
        for file in sorted(new, key=lambda file: file.name in MODEL_CONFIG_FILES):
            upload(file, folder / file.relative_to(local).as_posix())


def remove_tree(folder: AnyPath) -> None:
    """Remove a folder and everything below it, if it exists."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        folder.remove_tree()


def open_parquet(file: AnyPath) -> pq.ParquetFile:
    """A Parquet file to read; of a remote one only the requested parts are downloaded."""
    if isinstance(file, Path):
        return pq.ParquetFile(file)
    with file.filesystem() as (store, path):
        return pq.ParquetFile(path, filesystem=store, pre_buffer=True)


def write_parquet(table: pa.Table, target: AnyPath) -> None:
    """Write a table as one Parquet file, atomically; creates the parent folder."""
    with atomic_write(target) as path:
        pq.write_table(table, path)


def open_text(file: IO[bytes], newline: str | None = None) -> TextIO:
    """Text in UTF-8, or in the encoding that its byte-order mark tells, without that mark; UnicodeError while it is read."""
    head = file.read(4)
    file.seek(0)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if head.startswith(mark)), "utf-8")
    return io.TextIOWrapper(file, encoding=encoding, newline=newline)


def upload(file: Path, target: RemotePath) -> None:
    """Copy a local file to an object store."""
    if file.stat().st_size:
        with pa.memory_map(str(file)) as content:
            target.write_bytes(content.read_buffer())
    else:
        target.write_bytes(b"")


def download(file: RemotePath, local: Path) -> None:
    """Copy an object to a local file, atomically."""
    with atomic_write(local) as path, file.filesystem(), file.open() as source, path.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 24)


def cache_folder() -> Path:
    """This machine's folder for local copies of remote files."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "addressvlm").expanduser()


def local_folder_for(folder: AnyPath) -> Path:
    """The folder itself, or a local folder reserved for a remote one: for SQLite and others that need a disk."""
    return folder if isinstance(folder, Path) else cache_folder() / "beside" / digest(str(folder))


def local_copy(where: str | AnyPath) -> Path:
    """The path itself, or a cached local copy of a remote file.

    Raises:
        FileNotFoundError: there is no such remote file.
        InputError: the store can't be used.
    """
    file = path_of(where)
    return file if isinstance(file, Path) else _cached_copy(file, file.stat())


def local_model_copy(where: str | AnyPath) -> Path:
    """The folder itself, or a cached local copy of a remote model's weights, JSON and text files.

    When the remote folder changes, a new copy is made that shares the unchanged files.

    Raises:
        InputError: the store can't be used, or the folder holds no model.
    """
    folder = path_of(where)
    if isinstance(folder, Path):
        return folder
    entries = [(file, stat) for file, stat in folder.walk_files() if file.suffix in MODEL_SUFFIXES and file.parent == folder]
    if not any(file.name in MODEL_CONFIG_FILES for file, _ in entries):
        raise InputError(f"{folder} holds no model (no config.json): give the folder that save_pretrained wrote.")
    local = cache_folder() / "models" / digest([[str(file), *stat] for file, stat in entries]) / folder.name
    local.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{local.parent}.lock"):
        if not local.is_dir():
            partial = local.with_name(f"{local.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for file, stat in entries:
                os.link(_cached_copy(file, stat), partial / file.name)
            partial.rename(local)
    return local


def _cached_copy(file: RemotePath, stat: Stat) -> Path:
    local = cache_folder() / "files" / digest([str(file), *stat]) / file.name
    if not local.is_file():
        local.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{local.parent}.lock"):
            if not local.is_file():
                download(file, local)
    return local


def digest(value: object) -> str:
    """A hash (32 hexadecimal characters) of anything that JSON can represent."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]
