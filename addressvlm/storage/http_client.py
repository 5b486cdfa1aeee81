"""How long a server asks to be left alone."""

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from addressvlm.errors import InputError


def retry_after(headers: Any) -> float | None:
    """Seconds that an answer asks to wait, None if it says nothing that can be read.

    Args:
        headers: have `get`, whatever the case of the names; Retry-After holds seconds or a date, its other forms milliseconds.
    """
    for name in ("retry-after-ms", "x-ms-retry-after-ms"):
        try:
            return max(0.0, float(headers.get(name)) / 1000)
        except (TypeError, ValueError):
            continue
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


FIRST_PAUSE_S = 1.0  # before the second try; doubles, with jitter
LONGEST_PAUSE_S = 60.0
LONGEST_WAIT_S = 300.0  # a server that asks for more is over its quota for now
MOST_BYTES = 4 << 20
FOR_NOW = (408, 425, 429, 500, 502, 503, 504)


class UnavailableError(Exception):
    """The server did not answer for now; `quota` if it said that it was asked too often."""

    def __init__(self, what: str, quota: bool = False, wait_s: float | None = None) -> None:
        super().__init__(what)
        self.quota, self.wait_s = quota, wait_s


class GeocoderClient:
    """Asks one address with changing parameters, from any number of threads."""

    def __init__(
        self,
        url: str,
        refused: str,
        per_second: float,
        timeout_s: float,
        retries: int,
        user_agent: str,
        check: Callable[[dict[str, Any]], None],
    ) -> None:
        """Nothing is sent yet.

        Args:
            refused: what to do when the server refuses us, as the end of a sentence.
            check: raises InputError or UnavailableError for a reply that is JSON but no answer.
        """
        self.url, self.refused, self._check = url, refused, check
        self.host = urllib.parse.urlsplit(url).hostname or url
        self._timeout_s, self._retries = timeout_s, retries
        self._headers = {"User-Agent": user_agent, "Accept": "application/json"}
        self._stopped = threading.Event()
        self._gap_s, self._next, self._lock = 1 / per_second, 0.0, threading.Lock()
        self._jitter = random.Random()

    def ask(self, parameters: Mapping[str, str]) -> dict[str, Any]:
        """The reply to a GET, a JSON object, after as many tries as are allowed.

        Raises:
            UnavailableError: it failed for now, every time.
            InputError: the server refuses us, is not what we think, or asks to come back much later.
        """
        pause = FIRST_PAUSE_S
        for attempt in range(self._retries + 1):
            if self._stopped.wait(self._until_my_turn()):
                raise UnavailableError("was not asked")
            try:
                return self._once(parameters)
            except UnavailableError as trouble:
                if attempt == self._retries:
                    raise
                wait = pause * self._jitter.uniform(0.5, 1.5) if trouble.wait_s is None else trouble.wait_s
            if wait > LONGEST_WAIT_S:
                raise InputError(f"{self.host} asks to wait {wait:.0f} s before the next request: run the same command later.")
            self._hold(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        raise AssertionError("the last attempt returns or raises")

    def stop(self) -> None:
        """Make waiting threads give up."""
        self._stopped.set()

    def _until_my_turn(self) -> float:
        """Take the next turn; seconds until then."""
        with self._lock:
            now = time.monotonic()
            turn = max(self._next, now)
            self._next = turn + self._gap_s
            return turn - now

    def _hold(self, seconds: float) -> None:
        """No turn before `seconds` from now, for any thread."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def _once(self, parameters: Mapping[str, str]) -> dict[str, Any]:
        request = urllib.request.Request(f"{self.url}?{urllib.parse.urlencode(parameters)}", headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                body, kind = response.read(MOST_BYTES), response.headers.get_content_type()
        except urllib.error.HTTPError as error:
            with error:
                raise self._status(error.code, retry_after(error.headers)) from None
        except urllib.error.URLError as error:
            raise UnavailableError(f"can't be reached: {_reason(error.reason)}") from None
        except (TimeoutError, OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"breaks off: {_reason(error)}") from None
        return self._object(body, kind)

    def _status(self, status: int, wait_s: float | None) -> Exception:
        if status in FOR_NOW:
            said = "too many requests" if status == 429 else "the server has a problem"
            return UnavailableError(f"answers {status}, {said}", status == 429, wait_s)
        if status in (401, 403):
            return InputError(f"{self.host} refuses us ({status}): {self.refused}.")
        return InputError(f"{self.host} answers {status} instead of an address: check city.geocoder.url.")

    def _object(self, body: bytes, kind: str) -> dict[str, Any]:
        try:
            reply = json.loads(body)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            what = "a web page" if kind == "text/html" or body.lstrip()[:1] == b"<" else "something else"
            raise InputError(
                f"{self.host} answers with {what} instead of JSON: check city.geocoder.url, and that no login page is between."
            )
        self._check(reply)
        return reply


def _reason(error: Any) -> str:
    """An operating system's words, without the address."""
    return getattr(error, "strerror", None) or ("timed out" if isinstance(error, TimeoutError) else type(error).__name__)
