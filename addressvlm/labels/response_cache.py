"""What was asked and what came back, row by row, so that nothing is paid for twice.

A ledger is a folder of segments, one for each process that ever wrote to it: lines of JSON that are only appended to, which
works on any file system that nodes share. An answer is found by what was asked, so another prompt, model, image or setting
finds nothing. A line that a kill cut off counts as not there; zeros at the end of a segment are room kept for answers that
are still on their way when the disk fills up. A ledger in a store is kept as addressvlm/labels/response_cache.py says.
"""

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
from addressvlm.storage.run_dir import storage_error

MOST_PARTS = 64  # objects that are then put into one
SIGNED_EVERY_S, FORGOTTEN_S = 15.0, 60.0  # a job that has not signed for so long is taken for dead


class RemoteResponseCache:
    """What this machine has of a ledger: copies of its objects, and segments that are not sent yet."""

    def __init__(self, folder: RemotePath) -> None:
        self.folder = folder
        self.local = local_folder_for(folder)
        self.spool = self.local / "unsent"
        self.spool.mkdir(parents=True, exist_ok=True)
        self._parts: list[RemotePath] = []
        self._joined = 0  # up to here the segment is in few objects
        self._signed = 0.0

    def fetch(self) -> list[Path]:
        """Copies of all objects that are not part of another one, in order."""
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

    def send_left(self) -> None:
        """Send what jobs of this machine wrote that were killed."""
        for left in sorted(self.spool.glob("*.jsonl")):
            lines = left.read_bytes().rstrip(b"\0")
            lines = lines[: lines.rfind(b"\n") + 1]  # of the last one a kill may have cut off the end
            if lines:
                self._name(left, 0, len(lines)).write_bytes(lines)
            left.unlink()

    def send(self, segment: Path, file: int, start: int, end: int) -> None:
        """Send the bytes `start` to `end` of a segment that is open as `file`."""
        part = self._name(segment, start, end)
        part.write_bytes(os.pread(file, end - start, start))
        self._parts.append(part)
        if len(self._parts) >= MOST_PARTS:
            self.join(segment, file, end)

    def join(self, segment: Path, file: int, end: int) -> None:
        """Replace the objects that were sent one by one by a single one."""
        if len(self._parts) > 1:
            self._name(segment, self._joined, end).write_bytes(os.pread(file, end - self._joined, self._joined))
            for part in self._parts:
                part.unlink(missing_ok=True)
        self._joined, self._parts = end, []

    def _name(self, segment: Path, start: int, end: int) -> RemotePath:
        return self.folder / f"{segment.stem}.{start:012d}-{end:012d}.jsonl"

    def sign(self) -> None:
        """Say now and then that this job has the ledger.

        Raises:
            InputError: another job has it.
        """
        now = time.monotonic()
        if self._signed and now - self._signed < SIGNED_EVERY_S:
            return
        holder = self._holder()
        if holder and holder["host"] != socket.gethostname() and holder["seen"] < FORGOTTEN_S:
            raise InputError(
                f"another job asks for the labels of {self.folder.parent} (process {holder['process']} on {holder['host']}, "
                f"seen {holder['seen']:.0f} s ago): wait until it has ended, or {FORGOTTEN_S:.0f} s after it was killed."
            )
        mine = {"host": socket.gethostname(), "process": os.getpid(), "at": datetime.now(UTC).isoformat()}
        (self.folder / "holder.json").write_text(json.dumps(mine))
        self._signed = now

    def release(self) -> None:
        """Say that it is free."""
        (self.folder / "holder.json").unlink(missing_ok=True)

    def _holder(self) -> dict[str, Any] | None:
        try:
            told = json.loads((self.folder / "holder.json").read_text())
            return {**told, "seen": (datetime.now(UTC) - datetime.fromisoformat(told["at"])).total_seconds()}
        except (OSError, ValueError, KeyError):
            return None


LONGEST_TEXT = 4000  # characters that are kept of an answer
LONGEST_LINE = 32 * 1024  # bytes, of an entry with such a text in any script
ROOM = 1 << 20  # bytes that are allocated at a time
FULL = (27, 28, 122)  # EFBIG, ENOSPC, EDQUOT


@dataclass(frozen=True)
class CachedAnswer:
    """What one ask brought. Of `text`, `refusal` and `failure` at most one is set; none of them is an empty answer."""

    text: str | None = None
    refusal: str | None = None  # why the endpoint or the model would not answer
    failure: str | None = None  # why there was no answer although it was tried again and again
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class RequestKey:
    """What identifies one ask.

    Attributes:
        image: digest of the row's image.
        digest: of everything else that was sent and may change: prompt, model, text, settings of the image.
        number: 1 for the first ask of a row.
    """

    id: str
    prompt: str
    model: str
    image: str
    digest: str
    number: int

    def key(self) -> bytes:
        """Short name of the ask, the same for all times."""
        return blake2b(json.dumps([self.id, self.image, self.digest, self.number]).encode(), digest_size=16).digest()


class ResponseCache:
    """The answers of a folder; `open_for_writing` gives one that takes more.

    Attributes:
        tokens, usd: of all answers, whatever was asked.
        answers: number of answers by (prompt version, model).
        torn: lines that are cut off.
    """

    def __init__(self, folder: AnyPath) -> None:
        """Read what is there; a folder that is not there is an empty ledger.

        Raises:
            InputError: it can't be read.
        """
        self.folder = folder
        self.mirror = RemoteResponseCache(folder) if isinstance(folder, RemotePath) else None
        self.tokens, self.usd, self.torn, self.seconds = 0, 0.0, 0, 0.0
        self.answers: Counter[tuple[str, str]] = Counter()
        self._at: dict[bytes, tuple[Path, int, int]] = {}  # segment, first byte, bytes
        self._files: dict[Path, BinaryIO] = {}  # stay open: on a network file system opening takes long
        self._opening = threading.Lock()
        try:
            for path in self.mirror.fetch() if self.mirror else sorted(Path(str(folder)).glob("*.jsonl")):
                self._read(path)
        except OSError as error:
            raise storage_error(error, self.folder) from error

    def get(self, asked: RequestKey) -> CachedAnswer | None:
        """The answer to an ask, None if it was never answered."""
        found = self._at.get(asked.key())
        if found is None:
            return None
        path, offset, size = found
        with self._opening:  # two threads would each open it, and one close what the other reads
            if path not in self._files:
                self._files[path] = path.open("rb", buffering=0)
        return _answer(json.loads(os.pread(self._files[path].fileno(), size, offset)))

    def _read(self, path: Path) -> None:
        offset = 0
        with path.open("rb") as file:
            for line in file:
                content = line.rstrip(b"\0")
                if content:
                    try:
                        entry = json.loads(content)
                        asked, answer = RequestKey(**entry["asked"]), _answer(entry)
                    except (ValueError, KeyError, TypeError):
                        self.torn += 1
                    else:
                        self._note(asked, answer, (path, offset, len(content)))
                offset += len(line)

    def _note(self, asked: RequestKey, answer: CachedAnswer, at: tuple[Path, int, int]) -> None:
        key = asked.key()
        if answer.failure is None or key not in self._at:  # in whatever order segments are read, an answer beats a failure
            self._at[key] = at
        self.tokens += answer.tokens_in + answer.tokens_out
        self.usd += answer.usd
        if answer.failure is None:
            self.answers[asked.prompt, asked.model] += 1
            self.seconds += answer.seconds


class WritableResponseCache(ResponseCache):
    """A ledger with a segment of its own. Safe to use from several threads."""

    def __init__(self, folder: AnyPath) -> None:
        """Read the folder and begin a segment.

        Raises:
            InputError: the folder can't be written.
        """
        super().__init__(folder)
        stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._path = (self.mirror.spool if self.mirror else Path(str(folder))) / f"{stamp}.jsonl"
        self._lock = threading.Lock()
        self._end = self._allocated = self._synced = 0
        try:
            self._file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        except OSError as error:
            raise storage_error(error, self.folder) from error

    def has_room(self, answers: int) -> bool:
        """Whether that many more answers surely find room on the disk."""
        return self._end + answers * LONGEST_LINE <= self._allocated

    def make_room(self, answers: int) -> None:
        """Allocate room for that many more answers.

        Raises:
            InputError: the disk is full.
        """
        with self._lock:
            try:
                while not self.has_room(answers):
                    self._allocated += os.pwrite(self._file, bytes(ROOM), self._allocated)
                    os.fsync(self._file)  # a network file system tells only now
            except OSError as error:
                if error.errno not in FULL:
                    raise storage_error(error, self.folder) from error
                raise InputError(
                    f"the disk of {self.folder} is full: free room or set `storage` elsewhere, then run the same command "
                    "again; every answer so far is kept."
                ) from None

    def add(self, asked: RequestKey, answer: CachedAnswer) -> None:
        """Keep an answer: it survives the end of this process when this returns, that of the machine after `sync`.

        Raises:
            InputError: it can't be written.
        """
        cut = {k: v[:LONGEST_TEXT] if isinstance(v, str) else v for k, v in vars(answer).items()}
        entry = {"asked": vars(asked), **cut, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            try:
                written = 0
                while written < len(line):
                    written += os.pwrite(self._file, line[written:], self._end + written)
            except OSError as error:
                raise storage_error(error, self.folder) from error
            self._note(asked, answer, (self._path, self._end, len(line)))
            self._end += len(line)
            self._allocated = max(self._allocated, self._end)

    def sync(self) -> None:
        """Return when all answers so far survive the end of the machine.

        Raises:
            InputError: the disk fails, the store can't be written, or another machine's job writes to it.
        """
        if self.mirror:
            self.mirror.sign()
        end = self._end
        if end > self._synced:
            try:
                os.fsync(self._file)
            except OSError as error:
                raise InputError(f"{self.folder} can't be written ({error.strerror}): see to its disk.") from None
            if self.mirror:
                self.mirror.send(self._path, self._file, self._synced, end)
            self._synced = end

    def close(self) -> None:
        """Give back the room that was not needed.

        Raises:
            InputError: it can't be written.
        """
        if self.mirror:
            self.sync()
            self.mirror.join(self._path, self._file, self._end)
        try:
            os.ftruncate(self._file, self._end)
            os.fsync(self._file)
            os.close(self._file)
            for file in self._files.values():
                file.close()
            if self.mirror or not self._end:
                self._path.unlink()
        except OSError as error:
            raise storage_error(error, self.folder) from error


@contextmanager
def open_for_writing(folder: AnyPath) -> Iterator[WritableResponseCache]:
    """The ledger of a folder for one job alone.

    Raises:
        InputError: another job has it, or the folder can't be written.
    """
    here = local_folder_for(folder)
    holder = here / "holder.json"
    lock = FileLock(here / "lock")
    try:
        here.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another job asks for the labels of {folder.parent} ({_holder(holder)}): wait until it has ended, or stop it."
        ) from None
    except OSError as error:
        raise storage_error(error, folder) from error
    try:
        _sign(holder)
        if isinstance(folder, RemotePath):
            left = RemoteResponseCache(folder)
            left.sign()
            left.send_left()
        ledger = WritableResponseCache(folder)
        try:
            yield ledger
        finally:
            ledger.close()
            if ledger.mirror:
                ledger.mirror.release()
    finally:
        lock.release()


def _sign(holder: Path) -> None:
    started = f"{datetime.now():%Y-%m-%d %H:%M}"
    try:
        holder.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "started": started}))
    except OSError as error:
        raise storage_error(error, holder.parent) from error


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['process']} on {holder['host']} since {holder['started']}"
    except (OSError, ValueError, KeyError):
        return "it has only just begun"


def _answer(entry: dict[str, object]) -> CachedAnswer:
    return CachedAnswer(**{name: entry[name] for name in CachedAnswer.__dataclass_fields__})  # type: ignore[arg-type]
