"""Around every request: its id, who asks and how often they may, one line of log, and the counts."""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError, busy, error_response, user_message
from serve.metrics import ServiceMetrics
from serve.settings import ServiceSettings, SettingsError

API_KEYS = "ADDRESSVLM_API_KEYS"  # environment variable: keys with commas between them
SHORTEST_KEY = 16
OPEN = ("/healthz", "/openapi.json")  # and the page
LIMIT_S = 1  # how long the rate limit may take to judge
METHODS = ("GET", "POST", "OPTIONS", "HEAD")
CALLERS = 100_000  # remembered by the rate limit, those that asked last
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
logger = logging.getLogger("addressvlm.access")
serve_logger = logging.getLogger("ray.serve")


def key_digests() -> list[str]:
    """SHA-256 of each key in the environment: what is handed on, so that no key stands in a configuration or a log.

    Raises:
        InputError: a key is too short to be one, or the variable is set and holds none.
    """
    given = os.environ.get(API_KEYS)
    if given is None:
        return []
    keys = [key.strip() for key in given.split(",") if key.strip()]
    if not keys:
        raise SettingsError(f"{API_KEYS} is set and holds no key: give keys, or unset it to let everyone ask.")
    if any(len(key) < SHORTEST_KEY for key in keys):
        raise SettingsError(
            f"a key in {API_KEYS} has fewer than {SHORTEST_KEY} characters: make one with `openssl rand -hex 24`."
        )
    return [_digest(key) for key in keys]


class RateLimit:
    """So many requests a minute for each caller; what was not used adds up to ten seconds' worth."""

    def __init__(self, per_minute: float) -> None:
        self.per_second, self.most = per_minute / 60, max(1.0, per_minute / 6)
        self.callers: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, and when that was

    async def wait(self, caller: str, now: float | None = None) -> float:
        """Take one request; seconds until there is one if there is none."""
        now = time.monotonic() if now is None else now
        left, then = self.callers.pop(caller, (self.most, now))
        left = min(self.most, left + (now - then) * self.per_second)
        granted = left >= 1
        self.callers[caller] = (left - granted, now)
        if len(self.callers) > CALLERS:
            self.callers.popitem(last=False)
        return 0.0 if granted else (1 - left) / self.per_second


class AccessMiddleware:
    """ASGI middleware.

    Args:
        digests: of the keys; without any, everyone may ask.
        wait: `RateLimit.wait` of the whole service, or None.
        set_id: whether to put X-Request-Id on answers; Ray Serve's proxy does so itself.
        routes: paths that counts name; callers may invent others.
        pages: paths that need no key, beside OPEN.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServiceSettings,
        records: ServiceMetrics,
        digests: Sequence[str] = (),
        wait: Callable[[str], Awaitable[float]] | None = None,
        set_id: bool = True,
        routes: Collection[str] = (),
        pages: Collection[str] = (),
    ) -> None:
        self.app, self.settings, self.records = app, settings, records
        self.digests, self.wait, self.set_id, self.routes = digests, wait, set_id, frozenset(routes)
        self.open = frozenset({*OPEN, *pages})
        self.inside = 0  # questions under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        known = scope.setdefault("state", {})
        known["request_id"] = given if _ID.fullmatch(given) else uuid.uuid4().hex
        begun, status, size = time.perf_counter(), 0, 0

        async def told(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.set_id:
                    MutableHeaders(scope=message)["X-Request-Id"] = known["request_id"]
            size += len(message.get("body", b""))
            await send(message)

        try:
            await self._admit(scope, headers)
            with self._room(scope):
                await self.app(scope, receive, told)
        except ClientDisconnect:
            status = 499
        except Exception as error:
            if status:  # too late for another answer
                status = 500
                raise
            await error_response(user_message(error))(scope, receive, told)
        finally:
            self._note(scope, status or 499, size, time.perf_counter() - begun)  # 499: the caller left before an answer

    async def _admit(self, scope: Scope, headers: Headers) -> None:
        """Judge key and rate; only what `open` names goes without."""
        scope["state"]["caller"] = caller = self._address(scope, headers)
        path = get_route_path(scope)  # as the routes see it, without the prefix of the service
        if path in self.open:
            return
        if self.digests:
            scope["state"]["caller"] = caller = self._key(headers)
        if self.wait is None or path == "/metrics":
            return
        try:
            async with asyncio.timeout(LIMIT_S):
                seconds = await self.wait(caller)
        except Exception as error:  # without a rate limit it is better to answer than not to
            serve_logger.warning("the rate limit can't be asked: %r", error)
            return
        if seconds > 0:
            words = f"More than {self.settings.rate_limit:g} requests a minute: wait {seconds:.0f} s."
            raise ApiError(429, words, code="rate_limit_exceeded", retry_after_s=max(1, round(seconds)))

    @contextmanager
    def _room(self, scope: Scope) -> Iterator[None]:
        """A place for a question while it is under way. One too many is refused before its body is read or decoded."""
        question = scope["method"] == "POST"
        if question and self.inside >= self.settings.at_once:
            raise busy()
        self.inside += question
        try:
            yield
        finally:
            self.inside -= question

    def _key(self, headers: Headers) -> str:
        """The caller's name, from its key; every key is compared, in a time that says nothing."""
        kind, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, one) for one in self.digests]
        if kind.lower() != "bearer" or not any(matches):
            raise ApiError(
                401, "This service asks for a key: send it as `Authorization: Bearer <key>`.", code="invalid_api_key"
            )
        return f"key-{digest[:8]}"

    def _address(self, scope: Scope, headers: Headers) -> str:
        """The caller's address; of IPv6 its network of 64 bits, which one caller has all of."""
        client = scope.get("client")
        peer = client[0] if client else "unknown"
        lines = headers.getlist("x-forwarded-for") if self.settings.forwarded else []
        for text in (*(line.rpartition(",")[2].strip() for line in lines[-1:]), peer):
            try:
                address = ipaddress.ip_address(text)
            except ValueError:
                continue
            address = getattr(address, "ipv4_mapped", None) or address
            return str(address if address.version == 4 else ipaddress.IPv6Network((int(address), 64), strict=False))
        return peer

    def _note(self, scope: Scope, status: int, size: int, seconds: float) -> None:
        """One line of JSON, and the counts; of what was sent, only what the route noted about it."""
        path = get_route_path(scope)
        route = path if path in self.routes else "other"
        method = scope["method"] if scope["method"] in METHODS else "other"
        self.records.count("addressvlm_requests", method, route, str(status))
        self.records.observe("addressvlm_request_seconds", seconds, route)
        state = scope["state"]
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": state["request_id"],
            "caller": state.get("caller"),
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "bytes": size,
            "ms": round(1000 * seconds, 1),
            **state.get("noted", {}),
        }
        logger.info(json.dumps(line, ensure_ascii=False))


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
