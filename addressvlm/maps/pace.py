"""A pace that all processes of a machine keep together, through a small file.

The file holds the time of the next free slot. Whoever wants to ask takes the slot under a file lock and sleeps until
then, so the rate holds for any number of workers and nobody has to know how many there are; a worker that dies leaves
no more than an unused slot. Where several machines share the folder they share the pace too.
"""

import time
from pathlib import Path

from filelock import FileLock

LONGEST_S = 3600.0  # a slot further ahead than this is a clock that was set back


class Pace:
    """At most `per_second` turns a second among all that use the same file."""

    def __init__(self, file: Path, per_second: float) -> None:
        self._file, self._step = file, 1 / per_second
        self._lock = FileLock(f"{file}.lock")

    def wait(self) -> None:
        """Return when it is this caller's turn."""
        with self._lock.acquire(poll_interval=0.005):
            now = time.time()
            slot = max(now, self._read(now))
            self._file.write_text(repr(slot + self._step))
        if slot > now:
            time.sleep(slot - now)

    def pause(self, seconds: float) -> None:
        """Nobody's turn comes before `seconds` from now."""
        with self._lock.acquire(poll_interval=0.005):
            now = time.time()
            self._file.write_text(repr(max(now + seconds, self._read(now))))

    def _read(self, now: float) -> float:
        try:
            slot = float(self._file.read_text())
        except (FileNotFoundError, ValueError):
            return now
        return slot if slot < now + LONGEST_S else now
