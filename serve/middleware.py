"""Around every request: its id, API key, rate limit, concurrency limit, one line of access log and its metrics."""

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
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError, error_response, overloaded, to_api_error
from serve.metrics import ServiceMetrics
from serve.requests import BodyReader, Memory, Share
from serve.settings import ServiceSettings, SettingsError

API_KEYS = "ADDRESSVLM_API_KEYS"  # environment variable: keys with commas between them
MIN_KEY_LENGTH = 16
PUBLIC_PATHS = ("/healthz", "/openapi.json")  # and the page
RATE_LIMIT_TIMEOUT_S = 1
LOGGED_METHODS = ("GET", "POST", "OPTIONS", "HEAD")
MAX_CALLERS = 100_000  # remembered by the rate limit, the latest ones
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
logger = logging.getLogger("addressvlm.access")
serve_logger = logging.getLogger("ray.serve")


def key_hashes() -> list[str]:
    """SHA-256 of each API key in the environment, so that no key appears in a configuration or log.

    Raises:
        InputError: a key is too short, or the variable is set and holds none.
    """
    value = os.environ.get(API_KEYS)
    if value is None:
        return []
    keys = [key.strip() for key in value.split(",") if key.strip()]
    if not keys:
        raise SettingsError(f"{API_KEYS} is set and holds no key: give keys, or unset it to let everyone ask.")
    if any(len(key) < MIN_KEY_LENGTH for key in keys):
        raise SettingsError(
            f"a key in {API_KEYS} has fewer than {MIN_KEY_LENGTH} characters: make one with `openssl rand -hex 24`."
        )
    return [_sha256(key) for key in keys]


class RateLimit:
    """A token bucket per caller: `per_minute` requests a minute, and bursts of up to ten seconds' worth."""

    def __init__(self, per_minute: float) -> None:
        self.per_second, self.burst = per_minute / 60, max(1.0, per_minute / 6)
        self.buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # caller -> requests available, at this time

    async def wait(self, caller: str, now: float | None = None) -> float:
        """Take one request; 0, or the seconds until one is available."""
        now = time.monotonic() if now is None else now
        available, updated = self.buckets.pop(caller, (self.burst, now))
        available = min(self.burst, available + (now - updated) * self.per_second)
        allowed = available >= 1
        self.buckets[caller] = (available - allowed, now)
        if len(self.buckets) > MAX_CALLERS:
            self.buckets.popitem(last=False)
        return 0.0 if allowed else (1 - available) / self.per_second


class AccessMiddleware:
    """ASGI middleware.

    Args:
        key_hashes: of the API keys; without any, everyone may call.
        wait: `RateLimit.wait` of the whole service, or None.
        set_request_id: whether to put X-Request-Id on responses; Ray Serve's proxy does so itself.
        routes: those of the application, for the label `route` of the metrics; all other paths count as "other".
        pages: paths that need no key, besides PUBLIC_PATHS.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServiceSettings,
        metrics: ServiceMetrics,
        key_hashes: Sequence[str] = (),
        wait: Callable[[str], Awaitable[float]] | None = None,
        set_request_id: bool = True,
        routes: Sequence[Route] = (),
        pages: Collection[str] = (),
    ) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.key_hashes, self.wait, self.set_request_id, self.routes = key_hashes, wait, set_request_id, routes
        self.public_paths = frozenset({*PUBLIC_PATHS, *pages})
        self.in_flight = 0  # POST requests whose body is here
        self.bodies, self.memory = BodyReader(settings.max_body_mb), Memory(settings.request_memory_mb * 1e6)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        state = scope.setdefault("state", {})
        state["request_id"] = request_id if _REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex
        start, status, size = time.perf_counter(), 0, 0

        async def observed_send(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.set_request_id:
                    MutableHeaders(scope=message)["X-Request-Id"] = state["request_id"]
            size += len(message.get("body", b""))
            await send(message)

        state["memory"] = share = Share(self.memory)
        try:
            await self._check_access(scope, headers)
            if scope["method"] == "POST":
                await self._post(scope, receive, observed_send, headers, share)
            else:
                await self.app(scope, receive, observed_send)
        except ClientDisconnect:
            status = 499
        except Exception as error:
            if status:  # too late for another response
                status = 500
                raise
            await error_response(to_api_error(error))(scope, receive, observed_send)
        finally:
            share.release()
            status = state.get("stream_status", status)
            self._log(scope, status or 499, size, time.perf_counter() - start)  # 499: the caller left before a response

    async def _post(self, scope: Scope, receive: Receive, send: Send, headers: Headers, share: Share) -> None:
        """Read the body, then take one of the places for requests in flight, so that a slow body holds none."""
        if self.in_flight >= self.settings.max_in_flight:
            raise overloaded()
        messages = [{"type": "http.request", "body": await self.bodies.read(headers, receive, share), "more_body": False}]
        if self.in_flight >= self.settings.max_in_flight:
            raise overloaded()

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        self.in_flight += 1
        try:
            await self.app(scope, replay, send)
        finally:
            self.in_flight -= 1

    async def _check_access(self, scope: Scope, headers: Headers) -> None:
        """Check API key and rate limit, except on public paths. ApiError: 401, 429."""
        scope["state"]["caller"] = caller = self._client_address(scope, headers)
        path = get_route_path(scope)  # without the service's route prefix
        if path in self.public_paths:
            return
        if self.key_hashes:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            key_hash = _sha256(key.strip())
            matches = [hmac.compare_digest(key_hash, known) for known in self.key_hashes]  # all of them, in constant time
            if scheme.lower() != "bearer" or not any(matches):
                message = "This service asks for a key: send it as `Authorization: Bearer <key>`."
                raise ApiError(401, message, code="invalid_api_key")
            scope["state"]["caller"] = caller = f"key-{key_hash[:8]}"
        if self.wait is None or path == "/metrics":
            return
        try:
            async with asyncio.timeout(RATE_LIMIT_TIMEOUT_S):
                seconds = await self.wait(caller)
        except Exception as error:  # answering without a limit is better than not answering
            serve_logger.warning("the rate limit can't be checked: %r", error)
            return
        if seconds > 0:
            message = f"More than {self.settings.rate_limit:g} requests a minute: wait {seconds:.0f} s."
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=max(1, round(seconds)))

    def _client_address(self, scope: Scope, headers: Headers) -> str:
        """The caller's IP address; for IPv6 its /64 network, which belongs to one caller."""
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

    def _log(self, scope: Scope, status: int, size: int, seconds: float) -> None:
        """Write the access log line and the metrics; of the body, only the route's `log_fields`."""
        path = get_route_path(scope)
        route = next((route.path_format for route in self.routes if route.path_regex.match(path)), "other")
        method = scope["method"] if scope["method"] in LOGGED_METHODS else "other"
        self.metrics.count("addressvlm_requests", method, route, str(status))
        self.metrics.observe("addressvlm_request_seconds", seconds, route)
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
            **state.get("log_fields", {}),
        }
        logger.info(json.dumps(line, ensure_ascii=False))


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
