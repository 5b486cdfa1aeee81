"""Answers of an endpoint, row by row, so that none is paid for twice.

A cache is a folder of segments, one for each task that wrote to it: lines of JSON, append-only, so that it works on any file
system that nodes share. An answer is looked up by what was sent, so another prompt, model, image or setting has none. A line
that a kill cut off does not count. In a store, a segment is several objects, `<segment>.<first byte>-<end byte>.jsonl`.
One job at a time has a cache (`job_lock`); its tasks write segments of their own.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
from collections import Counter, defaultdict
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Self

from addressvlm.errors import InputError
from addressvlm.labels.job_lock import JobLock, is_written, job_lock
from addressvlm.storage.files import download, local_folder_for
from addressvlm.storage.remote_path import AnyPath, RemotePath
from addressvlm.storage.run_dir import storage_error, storage_errors

MAX_TEXT = 4000  # characters of an answer; the rest is cut off
MAX_LINE = 32 * 1024  # bytes of an entry with such a text in any script
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
FETCH_ATTEMPTS = 5
MAX_OBJECTS = 64  # of a segment in a store, which are then merged into one


@dataclass(frozen=True)
class CachedAnswer:
    """The result of one request. At most one of the first five is set; an empty answer has none."""

    text: str | None = None
    refusal: str | None = None  # why the endpoint or the model refuses to answer
    unusable: str | None = None  # a kind and a sentence, `limit: …`, why what came holds no text
    failure: str | None = None  # why there is no answer after all retries
    lost: str | None = None  # why the answer was lost, `time-out`; it counts as spent, and the request is sent again
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class RequestKey:
    """What identifies one request.

    Attributes:
        settings: digest of what is the same for all rows: prompt, model, endpoint, settings of the request.
        image: digest of the row's image.
        digest: of the row's text.
        number: of the attempt, from 1.
    """

    id: str
    prompt: str
    model: str
    settings: str
    image: str
    digest: str
    number: int

    def cache_key(self) -> bytes:
        """16 bytes that never change for the same request."""
        return blake2b(
            json.dumps([self.id, self.settings, self.image, self.digest, self.number]).encode(), digest_size=16
        ).digest()


Location = tuple[Path, int, int]  # segment, offset, size in bytes


def read_answers(folder: AnyPath) -> Iterator[tuple[RequestKey, CachedAnswer, Location] | None]:
    """Every answer of a cache; None for a line that can't be read. A folder that does not exist is an empty cache."""
    with storage_errors(folder):
        segments = RemoteSegments(folder).fetch() if isinstance(folder, RemotePath) else sorted(Path(folder).glob("*.jsonl"))
        for path in segments:
            offset = 0
            with path.open("rb") as file:
                for line in file:
                    content = line.rstrip(b"\0")  # a machine that crashes may leave zeros
                    if content:
                        try:
                            entry = json.loads(content)
                            yield RequestKey(**entry["asked"]), _parse_answer(entry), (path, offset, len(content))
                        except (ValueError, KeyError, TypeError):
                            yield None
                    offset += len(line)


class ResponseCache:
    """The answers in a folder, to read; `open_for_writing` returns a cache that takes more.

    Attributes:
        tokens, usd, seconds: totals over all answers.
        answers: number of answers by (prompt version, model).
        torn: number of lines that can't be read.
    """

    def __init__(self, folder: AnyPath, ids: Container[str] | None = None) -> None:
        """Read all segments; only answers for rows of `ids`, by default all, can be looked up."""
        self.folder, self._ids = folder, ids
        self.tokens, self.usd, self.seconds, self.torn = 0, 0.0, 0.0, 0
        self.answers: Counter[tuple[str, str]] = Counter()
        self._index: dict[bytes, Location] = {}
        self._files: dict[Path, BinaryIO] = {}  # stay open: on a network file system opening is slow
        self._opening = threading.Lock()
        for entry in read_answers(folder):
            if entry is None:
                self.torn += 1
            else:
                self._add_to_index(*entry)

    def get(self, key: RequestKey) -> CachedAnswer | None:
        """The answer to a request, None if there is none."""
        location = self._index.get(key.cache_key())
        if location is None:
            return None
        path, offset, size = location
        with self._opening:  # else two threads open it, and one closes the file that the other reads
            if path not in self._files:
                self._files[path] = path.open("rb", buffering=0)
        return _parse_answer(json.loads(os.pread(self._files[path].fileno(), size, offset)))

    def _add_to_index(self, key: RequestKey, answer: CachedAnswer, location: Location) -> None:
        self.tokens += answer.tokens_in + answer.tokens_out
        self.usd += answer.usd
        if answer.failure is None and answer.lost is None:
            self.answers[key.prompt, key.model] += 1
            self.seconds += answer.seconds
        if answer.lost is None and (self._ids is None or key.id in self._ids):
            name = key.cache_key()
            if answer.failure is None or name not in self._index:  # an answer replaces a failure, whichever is read first
                self._index[name] = location


class WritableResponseCache(ResponseCache):
    """A cache with a segment to append to, from any thread, inside `job_lock` or in one of the job's tasks.

    Methods raise InputError: the disk is full or can't be written.

    A full disk must not lose answers that are already paid for. So a reserve file takes the space that the requests in flight
    may need; when the disk is full it is deleted, which leaves room for their answers, and `check_space` stops new requests.
    """

    def __init__(self, folder: AnyPath, ids: Container[str] | None = None, lock: JobLock | None = None) -> None:
        """Read the folder as ResponseCache and begin a segment; `sync` renews `lock`."""
        local, self._lock_of_job = local_folder_for(folder), lock
        self.remote = RemoteSegments(folder) if isinstance(folder, RemotePath) else None
        if self.remote:
            self.remote.send_unsent()
        super().__init__(folder, ids)
        stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._path = (self.remote.unsent if self.remote else local) / f"{stamp}.jsonl"
        self._reserve = local / f"{stamp}.reserve"
        self._full = False
        self._lock = threading.Lock()
        self._end = self._synced = 0
        with self._writing():
            local.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
            with suppress(OSError):  # not every network file system has locks
                fcntl.flock(self._file, fcntl.LOCK_EX)  # until this process ends: see `is_written`

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        if self._lock_of_job:
            self._lock_of_job.renew()
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
    with job_lock(folder) as lock, WritableResponseCache(folder, lock=lock) as cache:
        yield cache


class RemoteSegments:
    """A cache in a store: copies of its objects on this machine, and the segment that is not sent yet."""

    def __init__(self, folder: RemotePath) -> None:
        self.folder = folder
        self.local = local_folder_for(folder)
        self.unsent = self.local / "unsent"
        self.unsent.mkdir(parents=True, exist_ok=True)
        self._objects: list[RemotePath] = []
        self._merged = 0  # bytes of the segment that are in merged objects

    def fetch(self) -> list[Path]:
        """Local copies of all objects, in order, less those that are part of a merged one."""
        for _ in range(FETCH_ATTEMPTS - 1):
            try:
                return self._fetch()
            except FileNotFoundError:
                continue  # another task has just merged some
        return self._fetch()

    def _fetch(self) -> list[Path]:
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
        """Send the segments of this machine's killed tasks."""
        for segment in sorted(self.unsent.glob("*.jsonl")):
            try:
                if is_written(segment):
                    continue
                content = segment.read_bytes().rstrip(b"\0")
            except FileNotFoundError:
                continue  # another task has just sent it
            content = content[: content.rfind(b"\n") + 1]  # the last line may be cut off
            if content:
                self._object(segment, 0, len(content)).write_bytes(content)
            segment.unlink(missing_ok=True)

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


def _parse_answer(entry: dict[str, Any]) -> CachedAnswer:
    return CachedAnswer(**{name: entry[name] for name in CachedAnswer.__dataclass_fields__})


def _write_at(file: int, data: bytes, offset: int) -> None:
    while data:
        size = os.pwrite(file, data, offset)
        data, offset = data[size:], offset + size
