"""HTTP GET for tile servers and geocoders: a rate limit, retries that obey Retry-After, bounds on time and size."""

import http
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import requests
import urllib3
from filelock import FileLock

RETRY_STATUSES = frozenset((408, 425, 429, 500, 502, 503, 504))
MAX_BACKOFF_S = 60.0
MAX_LEAD_S = 3600.0  # a slot further ahead than this comes from a clock that was set back

logging.getLogger("urllib3.connectionpool").setLevel(logging.INFO)  # its DEBUG lines show the API keys in queries


def retry_after(headers: Any) -> float | None:
    """Seconds that a response asks to wait, None if it says nothing that can be read.

    Args:
        headers: have `get`, whatever the case of the names; Retry-After holds seconds or a date, its other forms milliseconds.
    """
    for name in ("retry-after-ms", "x-ms-retry-after-ms"):
        try:
            return max(0.0, float(headers.get(name)) / 1000)
        except (TypeError, ValueError):
            continue
    value = headers.get("retry-after") or ""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


class UnavailableError(Exception):
    """A request failed for now.

    Attributes:
        wait_s: what the server asks to wait, if it does.
        over_quota: it refuses because of too many requests, so the next one would fail as well.
    """

    def __init__(self, message: str, wait_s: float | None = None, over_quota: bool = False) -> None:
        super().__init__(message)
        self.wait_s, self.over_quota = wait_s, over_quota


class RateLimiter:
    """At most `per_second` turns a second among the threads of this process."""

    def __init__(self, per_second: float) -> None:
        self._interval_s, self._slot = 1 / per_second, 0.0
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def wait(self) -> None:
        """Return when it is this caller's turn; UnavailableError after `stop`."""
        with self._lock:
            now = time.monotonic()
            slot = max(self._slot, now)
            self._slot = slot + self._interval_s
        if self._stopped.wait(slot - now):
            raise UnavailableError("cancelled")

    def pause(self, seconds: float) -> None:
        """Allow no turn before `seconds` from now, to any thread."""
        with self._lock:
            self._slot = max(self._slot, time.monotonic() + seconds)

    def stop(self) -> None:
        """Make waiting threads give up."""
        self._stopped.set()


class SharedRateLimiter:
    """At most `per_second` turns a second among all processes that use the same file."""

    def __init__(self, file: Path, per_second: float) -> None:
        self._file, self._interval_s = file, 1 / per_second
        self._lock = FileLock(f"{file}.lock")

    def wait(self) -> None:
        """Return when it is this caller's turn."""
        with self._lock.acquire(poll_interval=0.005):
            now = time.time()
            slot = max(now, self._next_slot(now))
            self._file.write_text(repr(slot + self._interval_s))
        if slot > now:
            time.sleep(slot - now)

    def pause(self, seconds: float) -> None:
        """Allow no turn before `seconds` from now, to any process."""
        with self._lock.acquire(poll_interval=0.005):
            now = time.time()
            self._file.write_text(repr(max(now + seconds, self._next_slot(now))))

    def _next_slot(self, now: float) -> float:
        try:
            slot = float(self._file.read_text())
        except (FileNotFoundError, ValueError):
            return now
        return slot if slot < now + MAX_LEAD_S else now


@dataclass(frozen=True)
class Response:
    """A response whose status is not one of RETRY_STATUSES; `body` is cut off a little beyond the client's `max_bytes`."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def content_type(self) -> str:
        """In small letters, without parameters; "" if the server does not say."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()


class HttpClient:
    """GET requests from any number of threads."""

    def __init__(
        self, limiter: RateLimiter | SharedRateLimiter, headers: Mapping[str, str], timeout_s: float, max_bytes: int,
        max_wait_s: float, backoff_s: float = 1.0, jitter: float = 0.0,
    ) -> None:  # fmt: skip
        """Send nothing yet.

        Args:
            timeout_s: of one request, whole body included.
            max_wait_s: a server that asks to wait longer gets no further request.
            backoff_s: pause after a failed attempt, doubled with each more; the server's own Retry-After goes first.
            jitter: share by which a pause is drawn longer or shorter.
        """
        self._limiter, self._timeout_s, self._max_bytes, self._max_wait_s = limiter, timeout_s, max_bytes, max_wait_s
        self._backoff_s, self._jitter = backoff_s, jitter
        self._session = requests.Session()
        self._session.headers.update({"Accept-Encoding": "identity", **headers})
        self._session.max_redirects = 3

    def get(
        self,
        url: str,
        attempts: int,
        parameters: Mapping[str, str] | None = None,
        check: Callable[[Response], None] = lambda response: None,
    ) -> Response:
        """The response to a GET; `check` may raise UnavailableError for one that is worth another attempt.

        Raises:
            UnavailableError: every attempt failed, or the server asks to wait longer than `max_wait_s`.
        """
        for attempt in range(attempts):
            self._limiter.wait()
            try:
                response = self._request(url, parameters)
                check(response)
                return response
            except UnavailableError as error:
                failure = error
            backoff_s = min(self._backoff_s * 2**attempt, MAX_BACKOFF_S)
            wait_s = failure.wait_s or backoff_s * random.uniform(1 - self._jitter, 1 + self._jitter)
            if wait_s > self._max_wait_s:
                raise UnavailableError(f"{failure}, it asks to wait {wait_s:.0f} s", wait_s, over_quota=True)
            self._limiter.pause(wait_s)
        raise failure

    def _request(self, url: str, parameters: Mapping[str, str] | None) -> Response:
        deadline, body = time.monotonic() + self._timeout_s, bytearray()
        try:
            with self._session.get(url, params=parameters, stream=True, timeout=self._timeout_s) as response:
                while len(body) <= self._max_bytes and (chunk := response.raw.read1(1 << 16)):
                    body += chunk
                    if time.monotonic() > deadline:
                        raise requests.Timeout
        except (requests.Timeout, urllib3.exceptions.TimeoutError):
            raise UnavailableError(f"no answer within {self._timeout_s:g} s") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise UnavailableError(f"no connection, {_cause(error)}") from None
        status = response.status_code
        if status in RETRY_STATUSES:
            raise UnavailableError(status_text(status), retry_after(response.headers), over_quota=status == 429)
        return Response(status, response.headers, bytes(body))


def status_text(status: int) -> str:
    """The number and, where it is a standard one, its phrase: `404 Not Found`."""
    return f"{status} {http.HTTPStatus(status).phrase}" if status in set(http.HTTPStatus) else str(status)


def _cause(error: BaseException) -> str:
    """The operating system's words for an error, else its type; never the URL, which may hold a key."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__
