"""Answers of an endpoint, row by row, so that none is paid for twice.

A cache is a folder of segments, one for each job that wrote to it: lines of JSON, append-only, so that it works on any file
system that nodes share. An answer is looked up by what was sent, so another prompt, model, image or setting has none. A line
that a kill cut off does not count. In a store, a segment is several objects, `<segment>.<first byte>-<end byte>.jsonl`.
"""

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from addressvlm.errors import InputError
from addressvlm.storage.files import download, local_folder_for
from addressvlm.storage.remote_path import AnyPath, RemotePath
from addressvlm.storage.run_dir import storage_error, storage_errors

MAX_TEXT = 4000  # characters of an answer; the rest is cut off
MAX_LINE = 32 * 1024  # bytes of an entry with such a text in any script
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_OBJECTS = 64  # of a segment in a store, which are then merged into one
LEASE_RENEWAL_S, LEASE_EXPIRY_S = 15.0, 60.0  # a job that has not renewed its lease for so long counts as dead


@dataclass(frozen=True)
class CachedAnswer:
    """The result of one request. Of `text`, `refusal` and `failure` at most one is set; an empty answer has none."""

    text: str | None = None
    refusal: str | None = None  # why the endpoint or the model refuses to answer
    failure: str | None = None  # why there is no answer after all retries
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class RequestKey:
    """What identifies one request.

    Attributes:
        image: digest of the row's image.
        digest: of everything else that is sent: prompt, model, text, settings of the image.
        number: of the attempt, from 1.
    """

    id: str
    prompt: str
    model: str
    image: str
    digest: str
    number: int

    def cache_key(self) -> bytes:
        """16 bytes that never change for the same request."""
        return blake2b(json.dumps([self.id, self.image, self.digest, self.number]).encode(), digest_size=16).digest()


class ResponseCache:
    """The answers in a folder, to read; `open_for_writing` returns a cache that takes more.

    Attributes:
        tokens, usd, seconds: totals over all answers.
        answers: number of answers by (prompt version, model).
        torn: number of lines that can't be read.
    """

    def __init__(self, folder: AnyPath) -> None:
        """Read all segments; a folder that does not exist is an empty cache."""
        self.folder = folder
        self.remote = RemoteSegments(folder) if isinstance(folder, RemotePath) else None
        self.tokens, self.usd, self.seconds, self.torn = 0, 0.0, 0.0, 0
        self.answers: Counter[tuple[str, str]] = Counter()
        self._index: dict[bytes, tuple[Path, int, int]] = {}  # segment, offset, size in bytes
        self._files: dict[Path, BinaryIO] = {}  # stay open: on a network file system opening is slow
        self._opening = threading.Lock()
        with storage_errors(folder):
            for path in self.remote.fetch() if self.remote else sorted(Path(str(folder)).glob("*.jsonl")):
                self._read(path)

    def get(self, key: RequestKey) -> CachedAnswer | None:
        """The answer to a request, None if there is none."""
        entry = self._index.get(key.cache_key())
        if entry is None:
            return None
        path, offset, size = entry
        with self._opening:  # else two threads open it, and one closes the file that the other reads
            if path not in self._files:
                self._files[path] = path.open("rb", buffering=0)
        return _parse_answer(json.loads(os.pread(self._files[path].fileno(), size, offset)))

    def _read(self, path: Path) -> None:
        offset = 0
        with path.open("rb") as file:
            for line in file:
                content = line.rstrip(b"\0")  # a machine that crashes may leave zeros
                if content:
                    try:
                        entry = json.loads(content)
                        key, answer = RequestKey(**entry["asked"]), _parse_answer(entry)
                    except (ValueError, KeyError, TypeError):
                        self.torn += 1
                    else:
                        self._add_to_index(key, answer, (path, offset, len(content)))
                offset += len(line)

    def _add_to_index(self, key: RequestKey, answer: CachedAnswer, location: tuple[Path, int, int]) -> None:
        name = key.cache_key()
        if answer.failure is None or name not in self._index:  # an answer replaces a failure, whichever is read first
            self._index[name] = location
        self.tokens += answer.tokens_in + answer.tokens_out
        self.usd += answer.usd
        if answer.failure is None:
            self.answers[key.prompt, key.model] += 1
            self.seconds += answer.seconds


class WritableResponseCache(ResponseCache):
    """A cache with a segment to append to, from any thread. Methods raise InputError: the disk is full or can't be written.

    A full disk must not lose answers that are already paid for. So a reserve file takes the space that the requests in flight
    may need; when the disk is full it is deleted, which leaves room for their answers, and `check_space` stops new requests.
    """

    def __init__(self, folder: AnyPath) -> None:
        """Read the folder and begin a segment."""
        super().__init__(folder)
        stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        local = local_folder_for(folder)
        self._path = (self.remote.unsent if self.remote else local) / f"{stamp}.jsonl"
        self._reserve = local / "reserve"
        self._full = False
        self._lock = threading.Lock()
        self._end = self._synced = 0
        with self._writing():
            self._file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)

    def reserve_space(self, answers: int) -> None:
        """Reserve disk space for as many answers as may be in flight."""
        with self._writing():
            try:
                file = os.open(self._reserve, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
                try:
                    _write_at(file, os.urandom(answers * MAX_LINE), 0)  # some file systems store zeros in no space
                    os.fsync(file)  # a network file system reports a full disk only here
                finally:
                    os.close(file)
            except OSError:
                self._reserve.unlink(missing_ok=True)
                raise

    def check_space(self) -> None:
        """Call before each request: raises if the disk is full."""
        if self._full:
            raise storage_error(OSError(errno.ENOSPC, "full"), self.folder)

    def add(self, key: RequestKey, answer: CachedAnswer) -> None:
        """Append an answer: it survives a kill of this process when this returns, a crash of the machine after `sync`."""
        texts = {name: value[:MAX_TEXT] if isinstance(value, str) else value for name, value in vars(answer).items()}
        entry = {"asked": vars(key), **texts, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        with self._lock, self._writing():
            try:
                _write_at(self._file, line, self._end)
            except OSError as error:
                if error.errno not in DISK_FULL or self._full:
                    raise
                self._full = True
                self._reserve.unlink(missing_ok=True)
                _write_at(self._file, line, self._end)
            self._add_to_index(key, answer, (self._path, self._end, len(line)))
            self._end += len(line)

    def sync(self) -> None:
        """Return when all answers so far survive a crash of the machine; in a store, renew the lease and send them."""
        if self.remote:
            self.remote.renew_lease()
        end = self._end
        if end > self._synced:
            with self._writing():
                os.fsync(self._file)
            if self.remote:
                self.remote.send(self._path, self._file, self._synced, end)
            self._synced = end

    def close(self) -> None:
        """Finish the segment; one without answers is removed."""
        if self.remote:
            self.sync()
            self.remote.merge(self._path, self._file, self._end)
        with self._writing():
            self._reserve.unlink(missing_ok=True)
            os.ftruncate(self._file, self._end)  # less the part of a line that a full disk refused
            os.fsync(self._file)
            os.close(self._file)
            for file in self._files.values():
                file.close()
            if self.remote or not self._end:
                self._path.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise every OSError as an InputError."""
        try:
            with storage_errors(self.folder):
                yield
        except OSError as error:
            raise InputError(f"{self.folder} can't be written ({error.strerror}): check its disk.") from None


@contextmanager
def open_for_writing(folder: AnyPath) -> Iterator[WritableResponseCache]:
    """The cache of a folder, for one job at a time; an InputError if another job has it open."""
    local = local_folder_for(folder)
    holder, lock = local / "holder.json", FileLock(local / "lock")
    with storage_errors(folder):
        local.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            job = _read_holder(holder)
            who = f"process {job['process']} on {job['host']} since {job['started']}" if job else "just started"
            raise InputError(f"another job labels {folder.parent} ({who}): wait until it has ended, or stop it.") from None
    try:
        job = {"host": socket.gethostname(), "process": os.getpid(), "started": f"{datetime.now():%Y-%m-%d %H:%M}"}
        with storage_errors(folder):
            holder.write_text(json.dumps(job))
        if isinstance(folder, RemotePath):
            remote = RemoteSegments(folder)
            remote.renew_lease()
            remote.send_unsent()
        cache = WritableResponseCache(folder)
        try:
            yield cache
        finally:
            cache.close()
            if cache.remote:
                cache.remote.release_lease()
    finally:
        lock.release()


class RemoteSegments:
    """A cache in a store: copies of its objects on this machine, and the segment that is not sent yet."""

    def __init__(self, folder: RemotePath) -> None:
        self.folder = folder
        self.local = local_folder_for(folder)
        self.unsent = self.local / "unsent"
        self.unsent.mkdir(parents=True, exist_ok=True)
        self._objects: list[RemotePath] = []
        self._merged = 0  # bytes of the segment that are in merged objects
        self._renewed = 0.0

    def fetch(self) -> list[Path]:
        """Local copies of all objects, in order, less those that are part of a merged one."""
        segments: dict[str, list[tuple[int, int, RemotePath]]] = defaultdict(list)
        for file in self.folder.glob("*.jsonl"):
            name, _, span = file.stem.rpartition(".")
            start, end = (int(byte) for byte in span.split("-"))
            segments[name].append((start, end, file))
        chosen = []
        for name in sorted(segments):
            reached = 0
            for start, end, file in sorted(segments[name], key=lambda part: (part[0], -part[1])):
                if start >= reached:
                    chosen.append(file)
                    reached = end
        for file in chosen:
            if not (self.local / file.name).is_file():
                download(file, self.local / file.name)
        return [self.local / file.name for file in chosen]

    def send_unsent(self) -> None:
        """Send the segments of this machine's killed jobs."""
        for segment in sorted(self.unsent.glob("*.jsonl")):
            content = segment.read_bytes().rstrip(b"\0")
            content = content[: content.rfind(b"\n") + 1]  # the last line may be cut off
            if content:
                self._object(segment, 0, len(content)).write_bytes(content)
            segment.unlink()

    def send(self, segment: Path, file: int, start: int, end: int) -> None:
        """Send the bytes `start` to `end` of a segment that is open as `file`."""
        part = self._object(segment, start, end)
        part.write_bytes(os.pread(file, end - start, start))
        self._objects.append(part)
        if len(self._objects) >= MAX_OBJECTS:
            self.merge(segment, file, end)

    def merge(self, segment: Path, file: int, end: int) -> None:
        """Replace the objects since the last merge by one."""
        if len(self._objects) > 1:
            self._object(segment, self._merged, end).write_bytes(os.pread(file, end - self._merged, self._merged))
            for part in self._objects:
                part.unlink(missing_ok=True)
        self._merged, self._objects = end, []

    def _object(self, segment: Path, start: int, end: int) -> RemotePath:
        return self.folder / f"{segment.stem}.{start:012d}-{end:012d}.jsonl"

    def renew_lease(self) -> None:
        """Write into the store every LEASE_RENEWAL_S that this machine's job has the cache open."""
        now = time.monotonic()
        if self._renewed and now - self._renewed < LEASE_RENEWAL_S:
            return
        file, host = self.folder / "holder.json", socket.gethostname()
        job = _read_holder(file)
        if job and job["host"] != host:
            age = (datetime.now(UTC) - datetime.fromisoformat(job["at"])).total_seconds()
            if age < LEASE_EXPIRY_S:
                raise InputError(
                    f"another job labels {self.folder.parent} (process {job['process']} on {job['host']}, seen {age:.0f} s "
                    f"ago): wait until it has ended, or {LEASE_EXPIRY_S:.0f} s after it was killed."
                )
        file.write_text(json.dumps({"host": host, "process": os.getpid(), "at": datetime.now(UTC).isoformat()}))
        self._renewed = now

    def release_lease(self) -> None:
        """Let the next job have it at once."""
        (self.folder / "holder.json").unlink(missing_ok=True)


def _read_holder(file: AnyPath) -> dict[str, Any] | None:
    """The job that has the cache, None if there is none or its file is unreadable."""
    try:
        job: dict[str, Any] = json.loads(file.read_text())
        return job if {"host", "process"} < job.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _parse_answer(entry: dict[str, Any]) -> CachedAnswer:
    return CachedAnswer(**{name: entry[name] for name in CachedAnswer.__dataclass_fields__})


def _write_at(file: int, data: bytes, offset: int) -> None:
    while data:
        size = os.pwrite(file, data, offset)
        data, offset = data[size:], offset + size
