"""API keys, rate limit, access log and metrics; the routes without Ray, over a real tiny model."""

import asyncio
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from addressvlm import InputError
from serve.metrics import ServiceMetrics
from serve.middleware import AccessMiddleware, RateLimit, key_hashes
from serve.settings import ServiceSettings
from tests.support.in_process_service import api
from tests.support.running_service import check_error, model_folder, photo

pytestmark = pytest.mark.xdist_group("serve")
KEYS = [f"a-key-of-twenty-{number:04}" for number in range(5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(model_folder(tmp_path_factory.mktemp("access")))


@pytest.fixture
def client(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """A new service; every key may send one request per hundred seconds."""
    monkeypatch.setenv("ADDRESSVLM_API_KEYS", ", ".join(KEYS))
    with api(tmp_path, model=model, rate_limit=0.6, allowed_origins="https://maps.example.org") as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_only_keys_open_the_service(client: TestClient) -> None:
    for headers in ({}, bearer("wrong"), bearer(""), {"Authorization": f"Basic {KEYS[0]}"}, {"Authorization": b"Bearer \xff"}):
        for method, route in (("GET", "/v1/models"), ("POST", "/v1/localize"), ("GET", "/metrics"), ("GET", "/v1/nothing")):
            response = client.request(method, route, headers=headers)
            check_error(response, 401, "asks for a key")
            assert response.headers["www-authenticate"] == "Bearer"
    for route in ("/", "/healthz", "/openapi.json", "/page.js"):
        assert client.get(route).status_code == 200
    assert client.get("/openapi.json").json()["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def test_each_key_has_its_own_rate(client: TestClient) -> None:
    assert client.get("/v1/models", headers=bearer(KEYS[0])).status_code == 200
    response = client.get("/v1/models", headers=bearer(KEYS[0]))
    check_error(response, 429, "0.6 requests a minute")
    assert int(response.headers["retry-after"]) > 1
    assert client.get("/v1/models", headers=bearer(KEYS[1])).status_code == 200
    assert client.get("/metrics", headers=bearer(KEYS[0])).status_code == 200


def test_only_allowed_origins_may_call(client: TestClient) -> None:
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = client.options("/v1/localize", headers={"Origin": "https://maps.example.org", **preflight})
    assert allowed.headers["access-control-allow-origin"] == "https://maps.example.org"
    seen = client.get("/healthz", headers={"Origin": "https://maps.example.org"}).headers["access-control-expose-headers"]
    assert set(seen.split(", ")) == {"X-Request-Id", "Retry-After"}
    assert client.options("/v1/localize", headers={"Origin": "https://evil.example", **preflight}).status_code == 400
    refused = client.get("/healthz", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in refused.headers


def test_the_log_has_a_line_for_each_request_and_no_image(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "addressvlm.access"):
        headers = {**bearer(KEYS[2]), "X-Request-Id": "ours-1"}
        response = client.post("/v1/localize?key=1", files={"file": ("secret.jpg", photo())}, headers=headers)
        client.get("/nowhere", headers={**bearer(KEYS[2]), "X-Request-Id": "new\tline"})
    first, second = (json.loads(record.message) for record in caplog.records)
    assert response.headers["x-request-id"] == first["request_id"] == response.json()["request_id"] == "ours-1"
    assert (first["status"], first["path"], first["city"], first["caller"][:4]) == (200, "/v1/localize", "toytown", "key-")
    assert re.fullmatch("[0-9a-f]{32}", second["request_id"])
    assert (first["bytes"], first["method"]) == (len(response.content), "POST")
    assert second["status"] == 429  # the second within its minute
    text = caplog.text
    assert not any(secret in text for secret in (*KEYS, "secret.jpg", "JFIF", "base64"))


def test_metrics_of_requests(client: TestClient) -> None:
    for _ in range(2):
        client.get("/v1/models", headers=bearer(KEYS[3]))
    client.post("/v1/localize", files={"file": ("photo.jpg", photo())}, headers=bearer(KEYS[4]))
    text = client.get("/metrics", headers=bearer(KEYS[1]))
    assert text.headers["content-type"].startswith("text/plain")
    families = {f.name: f.samples for f in text_string_to_metric_families(text.text)}
    counted = {(s.labels["route"], s.labels["status"]): s.value for s in families["addressvlm_requests"]}
    assert counted == {("/v1/models", "200"): 1, ("/v1/models", "429"): 1, ("/v1/localize", "200"): 1}
    assert {s.labels["city"] for s in families["addressvlm_localized"]} == {"toytown"}
    for name in ("addressvlm_request_seconds", "addressvlm_confidence", "addressvlm_batch_size", "addressvlm_decode_seconds"):
        assert any(s.name.endswith("_count") and s.value >= 1 for s in families[name])
    client.request("BREW", "/nowhere")
    text = client.get("/metrics", headers=bearer(KEYS[1]))
    assert 'method="other",replica="front",route="other",status="401"' in text.text  # callers can't make up labels


def test_the_rate_limit_counts_time_and_forgets_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = RateLimit(60)

    def wait(now: float, caller: str = "a") -> float:
        return asyncio.run(limit.wait(caller, now))

    assert [wait(0) for _ in range(10)] == [0] * 10  # ten seconds' worth at once
    assert wait(0) == pytest.approx(1)
    assert wait(0.5) == pytest.approx(0.5)
    assert wait(1) == 0
    assert wait(1, "b") == 0
    assert [wait(1000) for _ in range(11)] == [*[0] * 10, pytest.approx(1)]  # no more than that after any time
    monkeypatch.setattr("serve.middleware.MAX_CALLERS", 2)
    assert wait(1000, "c") == 0  # in place of b, the least recent caller
    assert list(limit.buckets) == ["a", "c"]


def test_short_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADDRESSVLM_API_KEYS", "short")
    with pytest.raises(InputError, match="openssl rand"):
        key_hashes()
    monkeypatch.setenv("ADDRESSVLM_API_KEYS", f"{'a' * 16},{'b' * 15}")
    with pytest.raises(InputError, match="fewer than 16"):
        key_hashes()
    monkeypatch.setenv("ADDRESSVLM_API_KEYS", f" {'a' * 16} ,{'b' * 17},")
    assert key_hashes() == [hashlib.sha256(key).hexdigest() for key in (b"a" * 16, b"b" * 17)]
    for nothing in ("", " ,"):
        monkeypatch.setenv("ADDRESSVLM_API_KEYS", nothing)
        with pytest.raises(InputError, match="holds no key"):
            key_hashes()
    monkeypatch.delenv("ADDRESSVLM_API_KEYS")
    assert key_hashes() == []


def test_keys_are_required_under_a_route_prefix(client: TestClient) -> None:
    under = TestClient(client.app, root_path="/geo")
    for path in ("/geo/v1/models", "/geo/metrics", "/geo/v1/models/", "/v1/models", "/geo/nothing"):
        check_error(under.get(path), 401, "asks for a key")
    assert under.get("/geo/healthz").status_code == under.get("/geo/page.js").status_code == 200
    text = under.get("/geo/metrics", headers=bearer(KEYS[1])).text
    assert 'route="/v1/models",status="401"' in text


class Around:
    """`AccessMiddleware` around a small application."""

    def __init__(self, app: Any, wait: Any = None, forwarded: bool = True, **more: Any) -> None:
        settings = ServiceSettings(forwarded=forwarded, rate_limit=1, **more)
        self.access = AccessMiddleware(app, settings, ServiceMetrics(), wait=wait)

    def client(self, address: str = "10.0.0.9") -> TestClient:
        return TestClient(self.access, client=(address, 1))


async def fine(scope: Any, receive: Any, send: Any) -> None:
    await Response(scope["state"]["caller"])(scope, receive, send)


@pytest.mark.parametrize(
    ("lines", "caller"),
    [
        ([], "10.0.0.9"),
        (["1.2.3.4"], "1.2.3.4"),
        (["9.9.9.9, 1.2.3.4"], "1.2.3.4"),
        (["9.9.9.9", "8.8.8.8, 1.2.3.4"], "1.2.3.4"),
        (["1.2.3.4, made up"], "10.0.0.9"),
        (["2001:db8:1:2:3::4"], "2001:db8:1:2::/64"),
        (["::ffff:1.2.3.4"], "1.2.3.4"),
    ],
)
def test_callers_behind_a_proxy(lines: list[str], caller: str) -> None:
    headers = [("X-Forwarded-For", line) for line in lines]
    assert Around(fine).client().get("/v1/x", headers=headers).text == caller


def test_without_a_proxy_forwarded_addresses_are_ignored() -> None:
    headers = [("X-Forwarded-For", "1.2.3.4")]
    assert Around(fine, forwarded=False).client().get("/v1/x", headers=headers).text == "10.0.0.9"


def test_the_rate_limit_is_per_caller_and_says_how_long_to_wait() -> None:
    callers = []

    async def wait(caller: str) -> float:
        callers.append(caller)
        return {"1.2.3.4": 0.0, "1.2.3.5": 0.2}.get(caller, 41.6)

    client = Around(fine, wait).client()
    for address, status, after in (("1.2.3.4", 200, None), ("1.2.3.5", 429, "1"), ("1.2.3.6", 429, "42")):
        answer = client.get("/v1/x", headers={"X-Forwarded-For": address})
        assert (answer.status_code, answer.headers.get("retry-after")) == (status, after)
    assert callers == ["1.2.3.4", "1.2.3.5", "1.2.3.6"]


def test_an_ipv6_peer_is_its_network() -> None:
    assert Around(fine).client("2001:db8::1").get("/v1/x").text == "2001:db8::/64"


def test_a_rate_limit_that_does_not_answer_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.middleware.RATE_LIMIT_TIMEOUT_S", 0.01)

    async def never(caller: str) -> float:
        return await asyncio.get_running_loop().create_future()

    assert Around(fine, never).client().get("/v1/x").status_code == 200


def test_a_request_beyond_the_limit_is_refused_at_once() -> None:
    inside, over = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            inside.set()
            await over.wait()
        await fine(scope, receive, send)

    async def send_requests() -> None:
        around = Around(slow, max_queued_requests=0, max_replicas=1, max_ongoing_requests=1, target_ongoing_requests=0.5)
        transport = httpx.ASGITransport(around.access)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            first = asyncio.create_task(client.post("/v1/localize"))
            await inside.wait()
            refused = await client.post("/v1/localize")
            check_error(refused, 503, "busy")
            assert refused.headers["retry-after"] == "1"
            assert (await client.get("/v1/models")).status_code == 200
            over.set()
            assert (await first).status_code == 200
            assert (await client.post("/v1/localize")).status_code == 200

    asyncio.run(send_requests())


def test_a_concurrency_slot_is_released_whatever_happens() -> None:
    ends: list[type[BaseException]] = [RuntimeError, InputError, ClientDisconnect, asyncio.CancelledError]

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        if ends:
            raise ends.pop()
        await fine(scope, receive, send)

    async def body() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def none(*_: Any) -> Any:
        return {}

    async def send_requests() -> None:
        room = {"max_queued_requests": 0, "max_replicas": 1, "max_ongoing_requests": 1, "target_ongoing_requests": 0.5}
        around = Around(fails, **room)
        while ends:
            with suppress(asyncio.CancelledError):
                await around.access({"type": "http", "method": "POST", "path": "/v1/localize", "headers": []}, body, none)
            assert around.access.in_flight == 0
        async with httpx.AsyncClient(transport=httpx.ASGITransport(around.access), base_url="http://test") as client:
            assert (await client.post("/v1/localize")).status_code == 200

    asyncio.run(send_requests())


def test_failures_are_not_logged_as_callers_that_left(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("secret")

    async def breaks_off(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("secret")

    async def left(*_: Any) -> None:
        raise ClientDisconnect

    async def none(*_: Any) -> Any:
        return {}

    async def send_requests(app: Any) -> None:
        with suppress(RuntimeError):
            scope = {"type": "http", "method": "GET", "path": "/v1/x", "headers": []}
            await Around(app).access(scope, none, none)

    with caplog.at_level(logging.INFO, "addressvlm.access"):
        for app in (broken, breaks_off, left):
            asyncio.run(send_requests(app))
    statuses = [json.loads(r.message)["status"] for r in caplog.records if r.name == "addressvlm.access"]
    assert statuses == [500, 500, 499]
    check_error(Around(broken).client().get("/v1/x"), 500, "operator's log")


def test_a_place_that_is_taken_while_a_body_arrives_is_not_given_twice() -> None:
    inside, over = asyncio.Event(), asyncio.Event()
    statuses: dict[str, int] = {}

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        inside.set()
        await over.wait()
        await fine(scope, receive, send)

    async def post(around: Around, name: str, body: Any) -> None:
        async def send(message: Any) -> None:
            statuses.setdefault(name, message.get("status"))

        await around.access({"type": "http", "method": "POST", "path": f"/{name}", "headers": []}, body, send)

    async def at_once() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def late() -> dict[str, Any]:
        await inside.wait()
        return {"type": "http.request", "body": b""}

    async def send_requests() -> None:
        around = Around(slow, max_queued_requests=0, max_replicas=1, max_ongoing_requests=1, target_ongoing_requests=0.5)
        waits = asyncio.create_task(post(around, "late", late))
        await asyncio.sleep(0)
        first = asyncio.create_task(post(around, "first", at_once))
        while "late" not in statuses and around.access.in_flight < 2:
            await asyncio.sleep(0)
        over.set()
        await asyncio.gather(waits, first)

    asyncio.run(send_requests())
    assert statuses == {"late": 503, "first": 200}


def test_a_requests_time_is_logged_in_milliseconds_and_counted_in_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 101.5])
    names = SimpleNamespace(strftime=time.strftime, gmtime=time.gmtime, perf_counter=clock.__next__)
    monkeypatch.setattr("serve.middleware.time", names)
    around = Around(fine)
    with caplog.at_level(logging.INFO, "addressvlm.access"):
        around.client().get("/v1/x")
    assert json.loads(caplog.records[-1].message)["ms"] == 1500
    samples = {s.name: s.value for metric in around.access.metrics.collect() for s in metric.samples}
    assert samples["addressvlm_request_seconds_sum"] == 1.5


def test_limits_of_memory_are_in_millions_of_bytes() -> None:
    access = Around(fine, request_memory_mb=100, max_body_mb=3).access
    assert (access.memory.limit, access.bodies.max_mb) == (100e6, 3)


def test_ray_serves_proxy_sets_the_request_id_itself() -> None:
    for own in (True, False):
        access = AccessMiddleware(fine, ServiceSettings(), ServiceMetrics(), set_request_id=own)
        answer = TestClient(access).get("/v1/x", headers={"X-Request-Id": "ours"})
        assert answer.headers.get("x-request-id") == ("ours" if own else None)
