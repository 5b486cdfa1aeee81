"""The rate limit of HTTP requests; the client itself is tested through map tiles and geocoders."""

import itertools
import multiprocessing
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm.storage import http_client
from addressvlm.storage.http_client import RateLimiter, UnavailableError, retry_after
from tests.support.clock import Clock


def test_threads_share_the_rate_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns are handed out in advance, so that several threads can wait for theirs at once."""
    waits: list[float] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    monkeypatch.setattr(http_client, "time", Clock())
    monkeypatch.setattr(http_client, "threading", SimpleNamespace(Event=Event, Lock=threading.Lock))
    limiter = RateLimiter(4.0)
    for _ in range(4):
        limiter.wait()
    limiter.pause(10)
    limiter.wait()
    assert waits == pytest.approx([0, 0.25, 0.5, 0.75, 10])


def test_a_stopped_limiter_gives_nobody_a_turn() -> None:
    limiter = RateLimiter(0.001)
    limiter.wait()
    limiter.stop()
    with pytest.raises(UnavailableError, match="cancelled"):
        limiter.wait()


def test_waits_as_long_as_the_server_says() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"x-ms-retry-after-ms": "40"}) == 0.04
    assert 85 < (retry_after({"retry-after": date}) or 0) <= 90
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert [retry_after({"retry-after": "soon"}), retry_after({})] == [None, None]


def _take(file: Path, turns: int, times: "multiprocessing.Queue[float]") -> None:
    ours = http_client.SharedRateLimiter(file, per_second=50)
    for _ in range(turns):
        ours.wait()
        times.put(time.time())


def test_processes_share_the_rate_limit(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    times: multiprocessing.Queue[float] = context.Queue()
    workers = [context.Process(target=_take, args=(tmp_path / "pace", 5, times)) for _ in range(3)]
    for worker in workers:
        worker.start()
    taken = sorted(times.get() for _ in range(15))
    for worker in workers:
        worker.join()
    assert taken[-1] - taken[0] >= 14 / 50 - 0.02


@settings(max_examples=30)
@given(pauses=st.lists(st.floats(0, 5), max_size=8), per_second=st.floats(0.5, 100))
def test_slots_are_an_interval_apart(tmp_path_factory: pytest.TempPathFactory, pauses: list[float], per_second: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(http_client, "time", clock)
        ours, slots = http_client.SharedRateLimiter(tmp_path_factory.mktemp("pace") / "pace", per_second), []
        for pause in [*pauses, 0.0]:
            paused_at = clock.now
            ours.pause(pause)
            ours.wait()
            assert clock.now >= paused_at + pause
            slots.append(clock.now)
    assert all(b - a >= 1 / per_second - 1e-9 for a, b in itertools.pairwise(slots))


def test_a_clock_set_back_does_not_block_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(http_client, "time", clock)
    (tmp_path / "pace").write_text(repr(clock.now + 1e6))
    http_client.SharedRateLimiter(tmp_path / "pace", 10).wait()
    assert clock.now == 1000.0
