"""Local paths and URIs of object stores (s3://, gs://, and every scheme that fsspec has a package for) behind one interface.

Stores are read through `pyarrow.fs`, as Parquet and Ray Train do, so credentials come from one place: the environment. An
object store has neither rename nor locks; the code that writes relies only on objects being written atomically.
"""

import fnmatch
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, total_ordering
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import fsspec
import pyarrow as pa
from fsspec.registry import known_implementations
from pyarrow import fs

from addressvlm.errors import InputError

GCS_RETRY_S = 60  # the default is 15 minutes


def is_remote(where: str) -> bool:
    """Whether this is a URI other than file://."""
    return "://" in where and not where.startswith("file://")


def path_of(where: "str | Path | RemotePath") -> "AnyPath":
    """A local path (`~` is expanded), a file:// URI or the URI of an object store as a path."""
    if isinstance(where, RemotePath):
        return where
    text = str(where)
    if is_remote(text):
        return RemotePath(text)
    return Path(unquote(urlsplit(text).path)) if text.startswith("file://") else Path(text).expanduser()


def filesystem(where: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI and the path in it.

    Raises:
        InputError: the scheme is unknown, its package is not installed, or the URI contains credentials.
        OSError: the store can't be reached.
    """
    scheme, _, path = where.partition("://")
    bucket = path.partition("/")[0]
    if "@" in bucket and scheme in ("s3", "gs", "gcs"):
        raise InputError(f"a {scheme}:// address contains credentials: remove them, they are read from the environment.")
    return _filesystem(scheme, bucket), path


@lru_cache(maxsize=64)
def _filesystem(scheme: str, bucket: str) -> fs.FileSystem:
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")  # another S3-compatible store
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
        raise InputError(f"{scheme}://{bucket} can't be read: give a local path, or an s3:// or gs:// address.") from None
    except ImportError:
        package = known_implementations[scheme]["class"].partition(".")[0]
        raise InputError(f"{scheme}://{bucket} needs a Python package that is missing: pip install {package}.") from None


class Stat(NamedTuple):
    """The fields of `os.stat_result` that object stores have."""

    st_size: int
    st_mtime_ns: int

    @property
    def st_mtime(self) -> float:
        return self.st_mtime_ns / 1e9


@total_ordering
class RemotePath:
    """An object or folder of an object store, with the interface of `pathlib.Path`; a folder is a prefix with objects below.

    Methods raise FileNotFoundError if there is no such object, InputError if the store denies access or can't be reached.
    """

    __slots__ = ("uri",)

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")

    def __str__(self) -> str:
        return self.uri

    def __repr__(self) -> str:
        return f"RemotePath({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.uri == other.uri

    def __lt__(self, other: "RemotePath") -> bool:
        return self.uri < other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def __truediv__(self, below: str | PurePosixPath) -> "RemotePath":
        return RemotePath(f"{self.uri}/{below}")

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
    def parent(self) -> "RemotePath":
        return RemotePath(f"{self.uri.partition('://')[0]}://{self._pure.parent}") if len(self.parts) > 1 else self

    @property
    def parents(self) -> tuple["RemotePath", ...]:
        above = [self.parent]
        while above[-1].parent != above[-1]:
            above.append(above[-1].parent)
        return tuple(above)

    def with_name(self, name: str) -> "RemotePath":
        return self.parent / name

    def with_suffix(self, suffix: str) -> "RemotePath":
        return self.with_name(self.stem + suffix)

    def absolute(self) -> "RemotePath":
        return self

    def resolve(self) -> "RemotePath":
        return self

    def relative_to(self, above: "RemotePath") -> PurePosixPath:
        return self._pure.relative_to(above._pure)

    @contextmanager
    def filesystem(self) -> Iterator[tuple[fs.FileSystem, str]]:
        """The store and the path in it; errors inside the block are raised as those of this class."""
        try:
            yield filesystem(self.uri)
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError)
            for pattern, cause in _STORAGE_ERRORS[:1] if is_missing else _STORAGE_ERRORS:
                if re.search(pattern, str(error)):
                    raise InputError(f"{self} can't be used, {cause}.") from error
            if is_missing:
                raise
            raise InputError(f"{self} can't be used ({error_text(error)}): check the store, then rerun.") from error

    def _info(self) -> fs.FileInfo:
        with self.filesystem() as (store, path):
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

    def iterdir(self) -> Iterator["RemotePath"]:
        return (self / info.base_name for info in self._list(recursive=False))

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """As `Path.glob`, without `**`."""
        first, _, rest = pattern.partition("/")
        is_wild = any(c in first for c in "*?[")
        matches = (p for p in self.iterdir() if fnmatch.fnmatchcase(p.name, first)) if is_wild else iter([self / first])
        if rest:
            return (below for p in matches for below in p.glob(rest))
        return matches if is_wild else (p for p in matches if p.exists())

    def walk_files(self) -> list[tuple["RemotePath", Stat]]:
        """All objects below, sorted."""
        depth = self.uri.partition("://")[2].count("/") + 1
        return sorted(
            (self / "/".join(info.path.strip("/").split("/")[depth:]), Stat(info.size, info.mtime_ns or 0))
            for info in self._list(recursive=True)
            if info.type == fs.FileType.File
        )

    def _list(self, recursive: bool) -> list[fs.FileInfo]:
        with self.filesystem() as (store, path):
            return store.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))

    def open(self, mode: str = "rb", **_: Any) -> IO[bytes]:
        """Open for random-access reading."""
        if mode != "rb":
            raise ValueError(f"objects are only opened to read bytes, not as {mode!r}: write with `files.atomic_write`")
        with self.filesystem() as (store, path):
            return store.open_input_file(path)

    def read_bytes(self) -> bytes:
        with self.open() as file, self.filesystem():
            return file.read()

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, data: "bytes | pa.Buffer") -> None:
        with self.filesystem() as (store, path), store.open_output_stream(path) as out:
            out.write(data)  # one call: a failed upload never becomes an object

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def mkdir(self, parents: bool = False, exist_ok: bool = True) -> None:
        """Do nothing: stores have no folders, and buckets are not created here."""

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with self.filesystem() as (store, path):
                store.delete_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        """Remove all objects below."""
        if len(self.parts) < 2:
            raise ValueError(f"{self} is a bucket")
        try:
            with self.filesystem() as (store, path):
                store.delete_dir(path)
        except FileNotFoundError:
            return


AnyPath = Path | RemotePath


def list_files(folder: AnyPath, pattern: str) -> list[Any]:
    """The sorted entries of a folder that match, of the folder's own path type."""
    return sorted(folder.glob(pattern))


def walk_files(folder: str) -> list[str]:
    """Files below the folder as sorted relative paths with forward slashes, without hidden ones.

    Linked folders count as folders, unless what they lead to was walked already (so loops end).
    """
    top, files = path_of(folder), []
    if isinstance(top, RemotePath):
        files = [file.relative_to(top).as_posix() for file, _ in top.walk_files()]
    else:
        walked = [top.resolve()]
        for parent, folders, names in os.walk(top, followlinks=True):
            inside = Path(parent).relative_to(top)
            files += [(inside / name).as_posix() for name in names]
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in [name for name in folders if Path(parent, name).is_symlink()]:
                target = Path(parent, name).resolve()
                if any(target.is_relative_to(root) or root.is_relative_to(target) for root in walked):
                    folders.remove(name)
                else:
                    walked.append(target)
    return sorted(file for file in files if not any(part.startswith(".") for part in file.split("/")))


def join(folder: str, file: str) -> str:
    """A file inside a folder; a URI or an absolute local path stays as it is."""
    if "://" in file or (not is_remote(folder) and Path(file).is_absolute()):
        return file
    return str(path_of(folder) / file)


def error_text(error: OSError) -> str:
    """The cause in a few words; the messages of stores are long."""
    return error.strerror or shorten(str(error), 160)


# Pattern in the message of a store -> cause and fix; the first also for a FileNotFoundError.
_STORAGE_ERRORS = (
    (r"NO_?SUCH_?BUCKET|Bucket '[^']*' not found|bucket does not exist",
     "there is no such bucket: create it, or fix `storage`"),
    (r"ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE|EXPIRED|UNRECOGNIZED_CLIENT|HTTP status 40[13]|"
     r"PERMISSION_DENIED|UNAUTHENTICATED|credentials|Forbidden|AccessDenied",
     "access is denied: set credentials in the environment that may list, read, write and delete there"),
    (r"NETWORK_CONNECTION|curl|resolve host|onnection|timed? ?out|UNAVAILABLE",
     "the store can't be reached: check the address, the network and AWS_ENDPOINT_URL, then rerun to resume"),
)  # fmt: skip
