"""Files of a city wherever they are: a local path, or a URI (file://, s3://, gs://, and what fsspec has a package for)."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import IO, Literal

from pyarrow import fs

from addressvlm.stores import filesystem, is_remote, local_path


def join(folder: str, file: str) -> str:
    """A file inside a folder; a URI or an absolute path stays as it is."""
    if "://" in file or (not is_remote(folder) and Path(file).is_absolute()):
        return file
    return f"{folder.rstrip('/')}/{file}" if is_remote(folder) else str(local_path(folder) / file)


def parent(where: str) -> str:
    """The folder that holds it."""
    return where.rstrip("/").rpartition("/")[0] if is_remote(where) else str(local_path(where).parent)


def suffix(where: str) -> str:
    """The ending in small letters, with its dot."""
    return PurePosixPath(where).suffix.lower()


def open_binary(where: str) -> IO[bytes]:
    """Open for reading, at any position.

    Raises:
        InputError: see `filesystem`.
        OSError: there is no such file (FileNotFoundError), or it can't be read.
    """
    if not is_remote(where):
        return local_path(where).open("rb")
    store, path = filesystem(where)
    return store.open_input_file(path)


def read_bytes(where: str) -> bytes:
    """The whole file; raises as `open_binary` does."""
    with open_binary(where) as file:
        return file.read()


def kind(where: str) -> Literal["file", "folder"] | None:
    """What is there, None if nothing is; raises as `open_binary` does."""
    if not is_remote(where):
        path = local_path(where)
        return "folder" if path.is_dir() else "file" if path.exists() else None
    store, inside = filesystem(where)
    found = store.get_file_info(inside.rstrip("/")).type
    return {fs.FileType.File: "file", fs.FileType.Directory: "folder"}.get(found)  # type: ignore[return-value]


def walk(folder: str) -> list[str]:
    """Files below the folder as sorted relative paths with forward slashes; hidden ones are left out."""
    return sorted(file for file in _files(folder) if not any(part.startswith(".") for part in file.split("/")))


def said(error: OSError) -> str:
    """What went wrong in a few words; stores tell whole stories."""
    return error.strerror or shorten(str(error), 160)


def _files(folder: str) -> Iterator[str]:
    if not is_remote(folder):
        top = local_path(folder)
        for here, _, names in os.walk(top):
            inside = Path(here).relative_to(top)
            yield from ((inside / name).as_posix() for name in names)
        return
    store, path = filesystem(folder)
    top_length = len(path.rstrip("/")) + 1
    for info in store.get_file_info(fs.FileSelector(path.rstrip("/"), recursive=True)):
        if info.type == fs.FileType.File:
            yield info.path.lstrip("/")[top_length:]
