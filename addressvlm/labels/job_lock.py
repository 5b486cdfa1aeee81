"""One job at a time has a response cache: a lock on this machine, a lease in a store."""

import fcntl
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from addressvlm.errors import InputError
from addressvlm.storage.files import local_folder_for
from addressvlm.storage.remote_path import AnyPath, RemotePath
from addressvlm.storage.run_dir import storage_errors

LEASE_RENEWAL_S, LEASE_EXPIRY_S = 15.0, 60.0  # a job that has not renewed its lease for so long counts as dead


@contextmanager
def job_lock(folder: AnyPath) -> Iterator["JobLock"]:
    """Keep other jobs from a cache: on this machine by a locked file, on others by a lease in the store.

    Raises:
        InputError: another job has it.
    """
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
            deadline = time.monotonic() + LEASE_EXPIRY_S  # Ray ends the tasks of a killed job before
            while any(map(is_written, [*local.glob("*.jsonl"), *local.glob("unsent/*.jsonl")])) and time.monotonic() < deadline:
                time.sleep(0.1)
            for reserve in local.glob("*.reserve"):
                reserve.unlink()  # of killed tasks
        lease = JobLock(folder)
        try:
            yield lease
        finally:
            lease.release()
    finally:
        lock.release()


class JobLock:
    """A job's lease on a cache in a store, an object that it renews; on a file system it does nothing.

    Stores have no locks that all of them share. But whoever lists objects sees every object written before. So a job first
    writes its claim, then looks for others', and withdraws if there is one: of two jobs at the same moment at least one sees
    the other. A claim that is not renewed expires.
    """

    def __init__(self, folder: AnyPath) -> None:
        """Claim the cache; an InputError if another machine's job has it."""
        self.folder = folder
        self._claim = folder / f"holder-{secrets.token_hex(8)}.json" if isinstance(folder, RemotePath) else None
        self._renewed = -math.inf
        self._lock = threading.RLock()
        self.renew()

    def renew(self) -> None:
        """Write every LEASE_RENEWAL_S that the job is alive; an InputError if it has lost the cache to another.

        Any thread may call it; after `release` it does nothing.
        """
        with self._lock:
            self._renew()

    def _renew(self) -> None:
        now = time.monotonic()
        if self._claim is None or now - self._renewed < LEASE_RENEWAL_S:
            return
        host = socket.gethostname()
        job = {"host": host, "process": os.getpid(), "at": datetime.now(UTC).isoformat()}
        self._claim.write_text(json.dumps(job))
        expired = now - self._renewed > LEASE_EXPIRY_S  # then others may have taken it, else a new one withdraws
        self._renewed = now
        for other in self.folder.glob("holder-*.json") if expired else ():
            holder = _read_holder(other)
            if other == self._claim or holder is None:
                continue
            age = (datetime.now(UTC) - datetime.fromisoformat(holder["at"])).total_seconds()
            if holder["host"] == host or age >= LEASE_EXPIRY_S:  # the locked file keeps out those of this machine
                other.unlink(missing_ok=True)
            else:
                self.release()
                raise InputError(
                    f"another job labels {self.folder.parent} (process {holder['process']} on {holder['host']}, seen "
                    f"{age:.0f} s ago): wait until it has ended, or {LEASE_EXPIRY_S:.0f} s after it was killed."
                )

    def release(self) -> None:
        """Let the next job have the cache at once."""
        with self._lock:
            if self._claim is not None:
                self._claim.unlink(missing_ok=True)
            self._claim = None


def is_written(segment: Path) -> bool:
    """Whether a task on this machine still writes to a segment."""
    with segment.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _read_holder(file: AnyPath) -> dict[str, Any] | None:
    """The job that has the cache, None if there is none or its file is unreadable."""
    try:
        job: dict[str, Any] = json.loads(file.read_text())
        return job if {"host", "process"} < job.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
