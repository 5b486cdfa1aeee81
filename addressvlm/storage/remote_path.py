"""Where files are: a local path, or a URI of a store (s3://, gs://, and what fsspec has a package for).

A store is spoken to through `pyarrow.fs`, as Parquet and Ray Train do, so that there is one way to give credentials: the
environment. A `StorePath` is used like a `pathlib.Path`. A store has no rename and no locks; what it offers is that an object
is there whole or not at all, and all that is written here rests on that alone.
"""

import fnmatch
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, total_ordering
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import IO, Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

import fsspec
import pyarrow as pa
from fsspec.registry import known_implementations
from pyarrow import fs

from addressvlm.errors import InputError

GCS_RETRY_S = 60  # its default is 15 minutes


def is_remote(where: str) -> bool:
    """Whether this is a URI of something that is not a local file."""
    return "://" in where and not where.startswith("file://")


def path_of(where: "str | Path | StorePath") -> "AnyPath":
    """The path of a local name, of a file:// URI, or of a URI in a store; `~` is the home folder."""
    if isinstance(where, StorePath):
        return where
    if isinstance(where, str) and is_remote(where):
        return StorePath(where)
    return local_path(str(where))


def local_path(where: str) -> Path:
    """The path that a local name or file:// URI means; `~` is the home folder."""
    return Path(unquote(urlsplit(where).path)) if where.startswith("file://") else Path(where).expanduser()


def filesystem(where: str) -> tuple[fs.FileSystem, str]:
    """The remote file system and the path in it.

    Raises:
        InputError: nothing is known by this scheme, the package for it is not installed, or the URI holds credentials.
        OSError: the store can't be reached.
    """
    scheme, _, path = where.partition("://")
    bucket = path.partition("/")[0]
    if "@" in bucket and scheme in ("s3", "gs", "gcs"):
        raise InputError(f"a {scheme}:// address holds credentials: leave them out, they are taken from the environment.")
    return _filesystem(scheme, bucket), path


@lru_cache(maxsize=64)
def _filesystem(scheme: str, bucket: str) -> fs.FileSystem:
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")  # a store that is not Amazon's
        if endpoint or {"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys():
            return fs.S3FileSystem(endpoint_override=endpoint, allow_delayed_open=True)
        return fs.S3FileSystem(region=fs.resolve_s3_region(bucket), allow_delayed_open=True)  # small objects in one request
    if scheme in ("gs", "gcs"):
        emulator = urlsplit(os.environ.get("STORAGE_EMULATOR_HOST", ""))
        if emulator.netloc:
            return fs.GcsFileSystem(anonymous=True, scheme=emulator.scheme, endpoint_override=emulator.netloc)
        return fs.FileSystem.from_uri(f"gs://{bucket}?retry_limit_seconds={GCS_RETRY_S}")[0]
    try:
        return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(scheme)))
    except ValueError:
        raise InputError(f"{scheme}://{bucket} can't be read: write a local path, or an s3:// or gs:// address.") from None
    except ImportError:
        package = known_implementations[scheme]["class"].partition(".")[0]
        raise InputError(f"{scheme}://{bucket} needs a Python package that is missing: pip install {package}.") from None


class Stat(NamedTuple):
    """Of `os.stat_result` what stores know."""

    st_size: int
    st_mtime_ns: int

    @property
    def st_mtime(self) -> float:
        return self.st_mtime_ns / 1e9


@total_ordering
class StorePath:
    """A place in a store, used like a `pathlib.Path`: folders are prefixes, which are there as long as something is below.

    Errors are FileNotFoundError where there is no such object, and InputError where the store refuses or can't be reached.
    """

    __slots__ = ("uri",)

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")

    def __str__(self) -> str:
        return self.uri

    def __repr__(self) -> str:
        return f"StorePath({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and self.uri == other.uri

    def __lt__(self, other: "StorePath") -> bool:
        return self.uri < other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def __truediv__(self, below: str | PurePosixPath) -> "StorePath":
        return StorePath(f"{self.uri}/{below}")

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self.uri.partition("://")[2])

    @property
    def name(self) -> str:
        return self._pure.name

    @property
    def stem(self) -> str:
        return self._pure.stem

    @property
    def suffix(self) -> str:
        return self._pure.suffix

    @property
    def parts(self) -> tuple[str, ...]:
        return self._pure.parts

    @property
    def parent(self) -> "StorePath":
        return StorePath(f"{self.uri.partition('://')[0]}://{self._pure.parent}") if len(self.parts) > 1 else self

    @property
    def parents(self) -> tuple["StorePath", ...]:
        above = [self.parent]
        while above[-1].parent != above[-1]:
            above.append(above[-1].parent)
        return tuple(above)

    def with_name(self, name: str) -> "StorePath":
        return self.parent / name

    def with_suffix(self, suffix: str) -> "StorePath":
        return self.with_name(self.stem + suffix)

    def absolute(self) -> "StorePath":
        return self

    def resolve(self) -> "StorePath":
        return self

    def relative_to(self, above: "StorePath") -> PurePosixPath:
        return self._pure.relative_to(above._pure)

    @contextmanager
    def opened(self) -> Iterator[tuple[fs.FileSystem, str]]:
        """The store and the path in it; what goes wrong inside the block is told as this class tells it."""
        try:
            yield filesystem(self.uri)
        except OSError as error:
            raise storage_problem(error, self) from error

    def _info(self) -> fs.FileInfo:
        with self.opened() as (store, path):
            return store.get_file_info(path)

    def exists(self) -> bool:
        return self._info().type != fs.FileType.NotFound

    def is_file(self) -> bool:
        return self._info().type == fs.FileType.File

    def is_dir(self) -> bool:
        return self._info().type == fs.FileType.Directory

    def stat(self) -> Stat:
        info = self._info()
        if info.type != fs.FileType.File:
            raise FileNotFoundError(2, "No such object", self.uri)
        return Stat(info.size, info.mtime_ns or 0)

    def iterdir(self) -> Iterator["StorePath"]:
        return (self / info.base_name for info in self._listed(recursive=False))

    def glob(self, pattern: str) -> Iterator["StorePath"]:
        """As `pathlib` does, without `**`."""
        first, _, rest = pattern.partition("/")
        wild = any(c in first for c in "*?[")
        found = (p for p in self.iterdir() if fnmatch.fnmatchcase(p.name, first)) if wild else iter([self / first])
        if rest:
            return (below for p in found for below in p.glob(rest))
        return found if wild else (p for p in found if p.exists())

    def walk_files(self) -> list[tuple["StorePath", Stat]]:
        """All objects below, in order."""
        below = self.uri.partition("://")[2].count("/") + 1
        found = [
            (self / "/".join(info.path.strip("/").split("/")[below:]), Stat(info.size, info.mtime_ns or 0))
            for info in self._listed(recursive=True)
            if info.type == fs.FileType.File
        ]
        return sorted(found)

    def _listed(self, recursive: bool) -> list[fs.FileInfo]:
        with self.opened() as (store, path):
            return store.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))

    def open(self, mode: str = "rb", **_: Any) -> IO[bytes]:
        """For reading bytes, at any position."""
        if mode != "rb":
            raise ValueError(f"a store's object is opened to read bytes, not as {mode!r}: write it with `files.Whole`")
        with self.opened() as (store, path):
            return store.open_input_file(path)

    def read_bytes(self) -> bytes:
        with self.open() as file, self.opened():
            return file.read()

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, data: "bytes | pa.Buffer") -> None:
        with self.opened() as (store, path), store.open_output_stream(path) as out:
            out.write(data)  # at once: an object of which a part can't be sent is never completed

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def mkdir(self, parents: bool = False, exist_ok: bool = True) -> None:
        """Nothing: a store has no folders that need to be made, and a bucket is not ours to make."""

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with self.opened() as (store, path):
                store.delete_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        """Remove all that is below."""
        if len(self.parts) < 2:
            raise ValueError(f"{self} is a whole bucket")
        try:
            with self.opened() as (store, path):
                store.delete_dir(path)
        except FileNotFoundError:
            return


AnyPath = Path | StorePath


def files_in(folder: AnyPath, pattern: str) -> list[Any]:
    """What is in a folder by that pattern, in order, `Path` or `StorePath` as the folder is."""
    return sorted(folder.glob(pattern))


# What stores say -> what it means.
MEANINGS = (
    (r"NO_?SUCH_?BUCKET|Bucket '[^']*' not found|bucket does not exist", "there is no such bucket: make it, or mend `storage`"),
    (
        r"ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE|EXPIRED|UNRECOGNIZED_CLIENT|HTTP status 40[13]|"
        r"PERMISSION_DENIED|UNAUTHENTICATED|credentials|Forbidden|AccessDenied",
        "the store refuses: give credentials in the environment that may list, read, write and delete there",
    ),
    (
        r"NETWORK_CONNECTION|curl|resolve host|onnection|timed? ?out|UNAVAILABLE",
        "the store can't be reached: see to the network and AWS_ENDPOINT_URL, then run the same command again to go on",
    ),
)


def storage_problem(error: OSError, where: StorePath) -> Exception:
    """What an error of a store is for those who use a StorePath: FileNotFoundError, or one sentence without the store's own."""
    text = str(error)
    for pattern, meaning in MEANINGS[:1] if isinstance(error, FileNotFoundError) else MEANINGS:
        if re.search(pattern, text):
            return InputError(f"{where} can't be used, {meaning}.")
    if isinstance(error, FileNotFoundError):
        return error
    return InputError(f"{where} can't be used ({shorten(error.strerror or text, 160)}): see to the store, then run again.")


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


def walk_files(folder: str) -> list[str]:
    """Files below the folder as sorted relative paths with forward slashes; hidden ones are left out."""
    return sorted(file for file in _files(folder) if not any(part.startswith(".") for part in file.split("/")))


def error_text(error: OSError) -> str:
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
