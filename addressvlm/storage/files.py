"""Files that appear whole or not at all, Parquet wherever it is, and copies of a store's files for what reads local ones."""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from addressvlm.errors import InputError
from addressvlm.storage.remote_path import AnyPath, RemotePath, Stat, path_of

TEMPORARY_SUFFIX = ".tmp"
CACHE_VARIABLE = "ADDRESSVLM_CACHE"  # environment variable: the folder of copies, default ~/.cache/addressvlm
MODEL_SUFFIXES = {".safetensors", ".json", ".jinja", ".txt", ".model", ".geojson", ".md"}  # nothing that could run
# Without one of them a folder is no model, so they are sent last and removed first
MODEL_CONFIG_FILES = ("config.json", "adapter_config.json", "open_clip_config.json")


class AtomicFile:
    """A file that appears at its place whole or not at all: write `path`, a local file, then `publish` it."""

    def __init__(self, target: AnyPath) -> None:
        self.target = target
        name = f"{target.stem}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
        self.path = target.with_name(name) if isinstance(target, Path) else Path(tempfile.gettempdir(), name)

    def publish(self) -> int:
        """Put it in its place; bytes."""
        size = self.path.stat().st_size
        if isinstance(self.target, Path):
            self.path.replace(self.target)
        else:
            upload(self.path, self.target)
            self.path.unlink()
        return size

    def discard(self) -> None:
        """Forget what was written."""
        self.path.unlink(missing_ok=True)


@contextmanager
def atomic_write(target: AnyPath) -> Iterator[Path]:
    """A local file to write, which is at its place when the block ends without an error; its folder is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file = AtomicFile(target)
    try:
        yield file.path
        file.publish()
    finally:
        file.discard()


def upload(file: Path, target: RemotePath) -> None:
    """Send a local file."""
    if file.stat().st_size:
        with pa.memory_map(str(file)) as content:
            target.write_bytes(content.read_buffer())
    else:
        target.write_bytes(b"")


def open_parquet(file: AnyPath) -> pq.ParquetFile:
    """A Parquet file to read; of a store's only the parts that are wanted come."""
    if isinstance(file, Path):
        return pq.ParquetFile(file)
    with file.filesystem() as (store, path):
        return pq.ParquetFile(path, filesystem=store, pre_buffer=True)


def write_parquet(table: pa.Table, target: AnyPath) -> None:
    """A table as one Parquet file, there whole or not at all; its folder is made."""
    with atomic_write(target) as path:
        pq.write_table(table, path)


def remove_tree(folder: AnyPath) -> None:
    """Remove a folder and all below it, if it is there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        folder.remove_tree()


def cache_folder() -> Path:
    """This machine's folder for what is kept of stores."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "addressvlm").expanduser()


def local_folder_for(folder: AnyPath) -> Path:
    """The folder itself, or one of this machine that belongs to a store's folder: for what only works on a disk."""
    return folder if isinstance(folder, Path) else cache_folder() / "beside" / digest(str(folder))


def local_copy(where: str | AnyPath) -> Path:
    """A local path with the same content: the path itself, or this machine's copy of a store's file.

    Raises:
        FileNotFoundError: the store has no such file.
        InputError: the store can't be used.
    """
    file = path_of(where)
    return file if isinstance(file, Path) else _copy(file, file.stat())


def local_model_copy(where: str | AnyPath) -> Path:
    """The same of a model's folder; of the files in it only weights, JSON and text are copied.

    A folder that changed since is another copy, whose unchanged files are the same on the disk.

    Raises:
        InputError: the store can't be used, or the folder holds no model.
    """
    folder = path_of(where)
    if isinstance(folder, Path):
        return folder
    about = [(file, stat) for file, stat in folder.walk_files() if file.suffix in MODEL_SUFFIXES and file.parent == folder]
    if not any(file.name in MODEL_CONFIG_FILES for file, _ in about):
        raise InputError(f"{folder} holds no model (no config.json): give the folder that save_pretrained wrote.")
    local = cache_folder() / "models" / digest([[str(file), *stat] for file, stat in about]) / folder.name
    local.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{local.parent}.lock"):
        if not local.is_dir():
            partial = local.with_name(f"{local.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for file, stat in about:
                os.link(_copy(file, stat), partial / file.name)
            partial.rename(local)
    return local


def _copy(file: RemotePath, stat: Stat) -> Path:
    local = cache_folder() / "files" / digest([str(file), *stat]) / file.name
    if not local.is_file():
        local.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{local.parent}.lock"):
            if not local.is_file():
                download(file, local)
    return local


def download(file: RemotePath, local: Path) -> None:
    """Bring a store's object; its folder must be there."""
    with atomic_write(local) as path, file.filesystem(), file.open() as source, path.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 24)


@contextmanager
def atomic_replace_dir(folder: AnyPath) -> Iterator[Path]:
    """A local folder to write, which takes the place of another one when the block ends without an error.

    In a store the files of a model that tell that it is one are gone while it is replaced.
    """
    if isinstance(folder, Path):
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)
        for old, _ in sorted(folder.walk_files(), key=lambda found: found[0].name not in MODEL_CONFIG_FILES):
            old.unlink(missing_ok=True)
        new = [file for file in sorted(Path(made).rglob("*")) if file.is_file()]
        for file in sorted(new, key=lambda file: file.name in MODEL_CONFIG_FILES):
            upload(file, folder / file.relative_to(made).as_posix())


def digest(what: object) -> str:
    """32 characters that change when anything in it does; of what JSON can hold."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
