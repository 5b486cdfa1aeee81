"""The rate limit of HTTP requests; the client itself is tested through map tiles and geocoders."""

import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import pytest

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
