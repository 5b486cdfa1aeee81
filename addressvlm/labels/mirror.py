"""A ledger in a store: objects that are only added, each the lines of a segment from one byte to another.

A store can't append, so a job writes its segment on its own disk and sends what is new. Many small objects are now and then
replaced by one that holds the same lines; where both are there, the larger one is read.
"""

import json
import os
import socket
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from addressvlm.errors import InputError
from addressvlm.files import download, on_disk
from addressvlm.stores import StorePath

MOST_PARTS = 64  # objects that are then put into one
SIGNED_EVERY_S, FORGOTTEN_S = 15.0, 60.0  # a job that has not signed for so long is taken for dead


class Mirror:
    """What this machine has of a ledger: copies of its objects, and segments that are not sent yet."""

    def __init__(self, folder: StorePath) -> None:
        self.folder = folder
        self.local = on_disk(folder)
        self.spool = self.local / "unsent"
        self.spool.mkdir(parents=True, exist_ok=True)
        self._parts: list[StorePath] = []
        self._joined = 0  # up to here the segment is in few objects
        self._signed = 0.0

    def fetch(self) -> list[Path]:
        """Copies of all objects that are not part of another one, in order."""
        segments: dict[str, list[tuple[int, int, StorePath]]] = defaultdict(list)
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

    def _name(self, segment: Path, start: int, end: int) -> StorePath:
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
