"""Who may ask, how often, and what is noted about it; the routes without Ray, over a real tiny model."""

import asyncio
import json
import logging
import re
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from addressvlm import InputError
from serve.access import RateLimit, key_digests
from tests.inprocess import api
from tests.service import check_error, photo

pytestmark = pytest.mark.xdist_group("serve")
KEYS = [f"a-key-of-twenty-{number:04}" for number in range(5)]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ADDRESSVLM_API_KEYS", ", ".join(KEYS))
        limits = {"rate_limit": 0.6, "allowed_origins": "https://maps.example.org"}  # one now, the next in 100 s
        with api(tmp_path_factory.mktemp("access"), **limits) as client:
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


def test_other_origins_are_told_apart(client: TestClient) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = client.options("/v1/localize", headers={"Origin": "https://maps.example.org", **asks})
    assert allowed.headers["access-control-allow-origin"] == "https://maps.example.org"
    assert client.options("/v1/localize", headers={"Origin": "https://evil.example", **asks}).status_code == 400
    refused = client.get("/healthz", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in refused.headers


def test_the_log_has_a_line_for_each_request_and_no_image(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "addressvlm.access"):
        headers = {**bearer(KEYS[2]), "X-Request-Id": "ours-1"}
        response = client.post("/v1/localize?key=1", files={"file": ("secret.jpg", photo())}, headers=headers)
        client.get("/nowhere", headers={"X-Request-Id": "new\tline"})
    first, second = (json.loads(record.message) for record in caplog.records)
    assert response.headers["x-request-id"] == first["request_id"] == response.json()["request_id"] == "ours-1"
    assert (first["status"], first["path"], first["city"], first["caller"][:4]) == (200, "/v1/localize", "toytown", "key-")
    assert re.fullmatch("[0-9a-f]{32}", second["request_id"])
    assert second["status"] == 404
    text = caplog.text
    assert not any(secret in text for secret in (*KEYS, "secret.jpg", "JFIF", "base64"))


def test_what_is_counted(client: TestClient) -> None:
    text = client.get("/metrics", headers=bearer(KEYS[1]))
    assert text.headers["content-type"].startswith("text/plain")
    found = {f.name: f.samples for f in text_string_to_metric_families(text.text)}
    counted = {(s.labels["route"], s.labels["status"]): s.value for s in found["addressvlm_requests"]}
    assert counted["/v1/localize", "200"] == 1
    assert counted["/v1/models", "429"] >= 1
    assert {s.labels["city"] for s in found["addressvlm_localized"]} == {"toytown"}
    for name in ("addressvlm_request_seconds", "addressvlm_confidence", "addressvlm_batch_size", "addressvlm_decode_seconds"):
        assert any(s.name.endswith("_count") and s.value >= 1 for s in found[name])
    assert "nowhere" not in text.text  # callers can't make up labels


def test_the_rate_limit_counts_time_and_forgets_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = RateLimit(60)

    def ask(now: float, caller: str = "a") -> float:
        return asyncio.run(limit.wait(caller, now))

    assert [ask(0) for _ in range(10)] == [0] * 10  # ten seconds' worth at once
    assert ask(0) == pytest.approx(1)
    assert ask(0.5) == pytest.approx(0.5)
    assert ask(1) == 0
    assert ask(1, "b") == 0
    monkeypatch.setattr("serve.access.CALLERS", 1)
    assert ask(1, "c") == 0
    assert list(limit.callers) == ["b", "c"]


def test_short_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADDRESSVLM_API_KEYS", "short")
    with pytest.raises(InputError, match="openssl rand"):
        key_digests()
    monkeypatch.setenv("ADDRESSVLM_API_KEYS", " ,")
    assert key_digests() == []
