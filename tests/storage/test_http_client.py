"""The rate limit of HTTP requests; the client itself is tested through map tiles and geocoders."""

import threading
from types import SimpleNamespace

import pytest

from addressvlm.storage import http_client
from addressvlm.storage.http_client import RateLimiter, UnavailableError
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
