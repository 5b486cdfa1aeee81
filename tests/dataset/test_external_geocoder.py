"""External geocoders, against a server on this machine"""

import itertools
import json
import logging
import random
import socket
import sqlite3
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from addressvlm import InputError
from addressvlm.config.city import GeocoderConfig
from addressvlm.dataset import external_geocoder
from addressvlm.dataset.external_geocoder import ReplyCache
from addressvlm.storage import http_client
from tests.support.clock import Clock
from tests.support.http_server import Answer, Request, Server

SECRET = "a-key-that-nobody-may-see"
METRE = 1 / 111_195  # degrees of latitude


Reply = Callable[[int, dict[str, str]], tuple[int, dict[str, str], Any]]


def serving(reply: Reply) -> AbstractContextManager[Server]:
    """A server that answers with JSON, or with bytes as they are, by the number of the request and its query."""

    def answer(request: Request) -> Answer:
        status, headers, body = reply(request.number, request.query)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return status, {"Content-Type": "application/json", **headers}, data

    return Server(answer).running()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """All waits of the client; whoever waits for its end moves the hands."""
    ours = Clock()

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            ours.sleep(timeout or 0.0)
            return self.is_set()

    monkeypatch.setattr(http_client, "time", ours)
    monkeypatch.setattr(http_client, "threading", SimpleNamespace(Event=Event, Lock=threading.Lock))
    monkeypatch.setenv(external_geocoder.API_KEY_VARIABLE, SECRET)
    return ours


ONE_THREAD = {"per_second": 1.0}  # one request after the other, in the order of the places


def road(name: str, **address: str) -> dict[str, Any]:
    return {"category": "highway", "address": {"road": name, "suburb": "Oakland", **address}}


def result(street: str | None, location: str = "RANGE_INTERPOLATED", **others: str) -> dict[str, Any]:
    parts = [{"long_name": street, "short_name": street, "types": ["route"]}] if street else []
    parts += [{"long_name": name, "short_name": name, "types": [kind, "political"]} for kind, name in others.items()]
    return {"address_components": parts, "geometry": {"location_type": location}}


def query(
    where: Server | str, folder: Path, number: int = 1, seed: int = 0, step_m: float = 10.0, order: list[int] | None = None,
    language: str | None = None, **config: Any,
) -> tuple[list[external_geocoder.GeocoderAnswer | None], list[str]]:  # fmt: skip
    """The answers about `number` places in a row to the north."""
    url = where if isinstance(where, str) else f"{where.url}/reverse"
    settings = GeocoderConfig(**{"url": url, "share": 1.0, "per_second": 1000.0, "retries": 2, **config})
    order = order or list(range(number))
    y = np.array(order) * step_m
    ids = [f"p{i:03}" for i in order]
    positions = (40 + y * METRE, np.full(len(y), -80.0), 0 * y, y)
    return external_geocoder.locate_by_geocoder(ids, *positions, settings, folder / "answers.sqlite", seed, language)


def test_nominatim_is_queried_for_streets(tmp_path: Path) -> None:
    with serving(lambda n, q: (200, {}, road("Forbes Avenue"))) as server:
        answers, sources = query(server, tmp_path, user_agent="me@example.org")
    assert answers == [external_geocoder.GeocoderAnswer("Forbes Avenue", "Oakland")]
    assert sources == ["nominatim"]
    assert [request.headers["User-Agent"] for request in server.requests] == ["me@example.org"]
    assert [request.query for request in server.requests] == [
        {"format": "jsonv2", "lat": "40.000000", "lon": "-80.000000", "zoom": "17", "addressdetails": "1"}
    ]


@pytest.mark.parametrize(
    "reply",
    [
        {"error": "Unable to geocode"},
        {"category": "building", "address": {"road": "Forbes Avenue"}},
        {"category": "place", "address": {"road": "Forbes Avenue", "house_number": "5000"}},
        {"category": "boundary", "address": {"suburb": "Oakland"}},
    ],
)
def test_nominatim_buildings_and_errors_are_no_answer(reply: dict[str, Any], tmp_path: Path) -> None:
    with serving(lambda n, q: (200, {}, reply)) as server:
        assert query(server, tmp_path)[0] == [None]


def test_google_results_vote_without_rooftops(tmp_path: Path) -> None:
    results = [
        result("Fifth Avenue", "ROOFTOP", neighborhood="Oakland"),
        result("Fifth Avenue", "ROOFTOP"),
        result("Forbes Avenue", neighborhood="Oakland"),
        result("Craig Street", "GEOMETRIC_CENTER", neighborhood="Oakland"),
        result("Forbes Avenue", "GEOMETRIC_CENTER", neighborhood="Shadyside"),
        result(None, "APPROXIMATE", locality="Pittsburgh"),
    ]
    with serving(lambda n, q: (200, {}, {"status": "OK", "results": results})) as server:
        answers, sources = query(server, tmp_path, service="google")
    assert answers == [external_geocoder.GeocoderAnswer("Forbes Avenue", "Oakland", "Craig Street", tie=False)]
    assert sources == ["google"]
    assert [request.query for request in server.requests] == [{"latlng": "40.000000,-80.000000", "key": SECRET}]


@pytest.mark.parametrize(
    ("results", "answer"),
    [
        ([result("A Street"), result("B Street")], external_geocoder.GeocoderAnswer("A Street", None, "B Street", tie=True)),
        ([result("A Street", "ROOFTOP")], None),
        ([], None),
    ],
)
def test_google_ties_and_nothing_left(
    results: list[Any], answer: external_geocoder.GeocoderAnswer | None, tmp_path: Path
) -> None:
    reply = {"status": "OK" if results else "ZERO_RESULTS", "results": results}
    with serving(lambda n, q: (200, {}, reply)) as server:
        assert query(server, tmp_path, service="google")[0] == [answer]


# sample, neighbours, cache


def test_a_sample_is_requested_and_the_rest_filled_from_the_nearest(tmp_path: Path) -> None:
    with serving(lambda n, q: (200, {}, road(f"Street {q['lat']}"))) as server:
        answers, sources = query(server, tmp_path, 40, share=0.25)
        assert len(server.requests) == 10
        latitudes = {request.query["lat"] for request in server.requests}
        known = [i for i in range(40) if sources[i] == "nominatim"]
        assert {f"{40 + i * 10 * METRE:.6f}" for i in known} == latitudes
        for i in range(40):
            nearest = min(abs(i - k) for k in known)
            assert answers[i] in [answers[k] for k in known if abs(i - k) == nearest]
            assert sources[i] == ("nominatim" if i in known else "neighbour")
        shuffled = random.Random(3).sample(range(40), 40)
        again, sources_again = query(server, tmp_path, 40, share=0.25, order=shuffled)
        assert [sources_again[shuffled.index(i)] for i in range(40)] == sources
        assert [again[i] for i, j in enumerate(shuffled) if j in known] == [answers[j] for j in shuffled if j in known]
        assert len(server.requests) == 10  # all from the cache
        query(server, tmp_path, 40, share=0.25, seed=1)
        assert len(server.requests) > 10


def test_too_far_from_an_answer_is_no_answer(tmp_path: Path) -> None:
    with serving(lambda n, q: (200, {}, road("Forbes Avenue"))) as server:
        answers, sources = query(server, tmp_path, 2, share=0.5, step_m=external_geocoder.MAX_FILL_M + 1)
    assert answers.count(None) == 1
    assert sources[answers.index(None)] == "neighbour"


def test_places_without_an_answer_take_the_neighbours(tmp_path: Path) -> None:
    with serving(lambda n, q: (200, {}, road("Forbes Avenue") if q["lat"] == "40.000000" else {"error": "none"})) as server:
        answers, sources = query(server, tmp_path, 3)
    assert [a and a.street for a in answers] == ["Forbes Avenue"] * 3
    assert sources == ["nominatim", "neighbour", "neighbour"]


def test_answers_are_cached_and_requests_limited(tmp_path: Path) -> None:
    with serving(lambda n, q: (200, {}, road("Forbes Avenue"))) as server:
        query(server, tmp_path, 10, max_requests=4)
        assert len(server.requests) == 4
        query(server, tmp_path, 10, max_requests=4)
        assert len(server.requests) == 8
        query(server, tmp_path, 10)
        assert len({request.query["lat"] for request in server.requests}) == len(server.requests) == 10
    rows = sqlite3.connect(tmp_path / "answers.sqlite").execute("SELECT service, lat, reply FROM answers").fetchall()
    assert len(rows) == 10
    assert ("nominatim", "40.000000", json.dumps(road("Forbes Avenue"))) in rows


def test_answers_before_a_failure_are_cached(tmp_path: Path) -> None:
    def reply(n: int, query: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        return (200, {}, road("Forbes Avenue")) if n < 4 else (403, {}, {})

    with serving(reply) as server, pytest.raises(InputError, match="refuses us"):
        query(server, tmp_path, 10, per_second=1.99)  # one thread
    cache = ReplyCache(tmp_path / "answers.sqlite", "nominatim", f"{server.url}/reverse", None)
    assert len(cache) == 3


def test_a_file_that_is_no_cache_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "answers.sqlite").write_text("not a database, certainly not one of answers")
    with pytest.raises(InputError, match=r"can't be stored in .*answers\.sqlite .*city\.geocoder\.cache"):
        query("http://127.0.0.1:9/", tmp_path)


def test_replies_are_cached_by_service_server_language_and_position(tmp_path: Path) -> None:
    """Service, server, language, latitude and longitude: another one is another question."""
    known = {"service": "nominatim", "server": "https://one/reverse", "language": "de", "lat": 52.1, "lon": 13.4}
    others = {"service": "google", "server": "https://two/reverse", "language": None, "lat": 13.4, "lon": 52.1}

    def cache(row: dict[str, Any]) -> ReplyCache:
        return ReplyCache(tmp_path / "a.sqlite", row["service"], row["server"], row["language"])

    cases = [known, *(known | {field: other} for field, other in others.items())]
    for number, row in enumerate(cases):
        assert cache(row).get(row["lat"], row["lon"]) is None
        cache(row).put(row["lat"], row["lon"], {"number": number})
    assert [cache(row).get(row["lat"], row["lon"]) for row in cases] == [{"number": n} for n in range(len(cases))]
    assert cache(known).get(known["lat"] + 4e-7, known["lon"]) == {"number": 0}  # below the precision of a request
    assert cache(known).get(known["lat"] + 1e-6, known["lon"]) is None
    assert len(cache(known)) == 3


@pytest.mark.parametrize(("service", "key"), [("nominatim", "accept-language"), ("google", "language")])
def test_the_language_is_requested_and_cached_separately(service: str, key: str, tmp_path: Path) -> None:
    def reply(n: int, query: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        name = f"Street in {query.get(key)}"
        return 200, {}, road(name) if service == "nominatim" else {"status": "OK", "results": [result(name)]}

    with serving(reply) as server:
        for language in ("de", None, "fr", "de"):
            (answer,), _ = query(server, tmp_path, language=language, service=service)
            assert answer is not None
            assert answer.street == f"Street in {language}"
        assert len(server.requests) == 3


def test_requests_keep_the_rate_limit(clock: Clock, tmp_path: Path) -> None:
    at: list[float] = []

    def reply(n: int, query: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        at.append(clock.now)
        return 200, {}, road("Forbes Avenue")

    with serving(reply) as server:
        query(server, tmp_path, 4, per_second=0.5)
    assert [after - before for before, after in itertools.pairwise(at)] == pytest.approx([2.0] * 3)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_temporary_failures_are_retried(status: int, tmp_path: Path) -> None:
    with serving(lambda n, q: (200, {}, road("Forbes Avenue")) if n > 2 else (status, {}, {})) as server:
        answers, _ = query(server, tmp_path)
    assert [a and a.street for a in answers] == ["Forbes Avenue"]
    assert len(server.requests) == 3


NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize("after", ["300", format_datetime(NOW + timedelta(seconds=300), usegmt=True)])
def test_retry_after_is_waited_for(after: str, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also of requests about other places; a wait beyond five minutes ends the run."""
    monkeypatch.setattr(http_client, "datetime", SimpleNamespace(now=lambda zone: NOW))
    at: list[float] = []

    def reply(n: int, query: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        at.append(clock.now)
        return (200, {}, road("A")) if n > 1 else (429, {"Retry-After": after}, {})

    with serving(reply) as server:
        query(server, tmp_path, 2, **ONE_THREAD)
    assert [when - at[0] for when in at] == pytest.approx([0, 300, 301])


def test_pauses_double_with_jitter(clock: Clock, tmp_path: Path) -> None:
    at: list[float] = []

    def reply(n: int, query: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        at.append(clock.now)
        return 500, {}, {}

    with serving(reply) as server:
        query(server, tmp_path, retries=7)
    pauses = [after - before for before, after in itertools.pairwise(at)]
    assert len(pauses) == 7
    for pause, middle in zip(pauses, [1, 2, 4, 8, 16, 32, 60], strict=True):
        assert 0.5 * middle <= pause <= 1.5 * middle
    assert len({round(pause / middle, 3) for pause, middle in zip(pauses, [1, 2, 4, 8, 16, 32, 60], strict=True)}) > 3


def test_a_server_that_hangs_times_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        assert query(url, tmp_path, timeout_s=0.2, retries=1)[0] == [None]


def test_single_failures_are_filled_and_requested_next_time(tmp_path: Path) -> None:
    broken = [True]

    def reply(n: int, query: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        return (500, {}, {}) if broken[0] and query["lat"] == "40.000000" else (200, {}, road("Forbes Avenue"))

    with serving(reply) as server:
        answers, sources = query(server, tmp_path, 3, retries=0)
        assert sources == ["neighbour", "nominatim", "nominatim"]
        assert all(answers)
        broken[0] = False
        assert query(server, tmp_path, 3, retries=0)[1] == ["nominatim"] * 3
        assert len(server.requests) == 4


PAGE = b"<!DOCTYPE html><html>Please log in</html>"
GOOGLE = {"service": "google"}


@pytest.mark.parametrize(
    ("reply", "config", "message"),
    [
        ((401, {}, {}), {}, r"127\.0\.0\.1 refuses us \(401\): set city\.geocoder\.user_agent"),
        ((403, {}, {}), {}, r"refuses us \(403\): set city\.geocoder\.user_agent"),
        ((403, {}, {}), GOOGLE, r"refuses us \(403\): check GOOGLE_MAPS_API_KEY"),
        ((404, {}, {}), {}, r"answers 404 instead of an address: check city\.geocoder\.url"),
        (
            (429, {}, {}),
            {},
            r"not available \(429 Too Many Requests\): the 0 answers so far are in .*answers\.sqlite, rerun the same command",
        ),
        (
            (429, {"Retry-After": "301"}, {}),
            {},
            r"429 Too Many Requests, it asks to wait 301 s\): .* rerun the same command later",
        ),
        ((200, {"Content-Type": "text/html"}, PAGE), {}, r"answers with a web page instead of JSON: check city\.geocoder\.url"),
        ((200, {}, PAGE), {}, "answers with a web page instead of JSON"),
        ((200, {}, b"[1, 2"), {}, "answers with something else instead of JSON"),
        ((200, {}, [1, 2]), {}, "answers with something else instead of JSON"),
        ((200, {}, {"hello": 1}), {}, "has no address: check that city.geocoder.url is Nominatim's"),
        (
            (200, {}, {"status": "REQUEST_DENIED", "error_message": SECRET}),
            GOOGLE,
            r"refuses us \(REQUEST_DENIED\): check GOOGLE",
        ),
        ((200, {}, {"status": "OVER_DAILY_LIMIT"}), GOOGLE, "OVER_DAILY_LIMIT: check the billing and the quota"),
        ((200, {}, {"status": "OVER_QUERY_LIMIT"}), GOOGLE, r"says OVER_QUERY_LIMIT\): the 0 answers so far"),
        ((200, {}, {"hello": 1}), GOOGLE, r"says 'None' instead of an address"),
    ],
)
def test_refusals_are_one_sentence(
    reply: tuple[int, dict[str, str], Any], config: dict[str, str], message: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    with serving(lambda n, q: reply) as server, pytest.raises(InputError, match=message) as error:
        query(server, tmp_path, **config)
    assert SECRET not in str(error.value) + caplog.text
    assert "\n" not in str(error.value)
    assert SECRET.encode() not in (tmp_path / "answers.sqlite").read_bytes()


def test_a_server_that_keeps_failing_ends_the_run(tmp_path: Path) -> None:
    with (
        serving(lambda n, q: (500, {}, {})) as server,
        pytest.raises(InputError, match=r"not available \(500 Internal Server Error\)"),
    ):
        query(server, tmp_path, 100, retries=0)
    assert external_geocoder.MAX_FAILURES <= len(server.requests) < 100


def test_failures_between_answers_do_not_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(external_geocoder, "as_completed", list)  # in the order of the requests
    many = 4 * external_geocoder.MAX_FAILURES
    with serving(lambda n, q: (500, {}, {}) if n % external_geocoder.MAX_FAILURES else (200, {}, road("A"))) as server:
        _, sources = query(server, tmp_path, many, retries=0, **ONE_THREAD)
    assert sources.count("nominatim") == 4
    assert len(server.requests) == many


def test_an_unreachable_server_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
    with pytest.raises(InputError, match=r"127\.0\.0\.1 is not available \(no connection, Connection refused\)"):
        query(f"{url}?key={SECRET}", tmp_path, 20, retries=0)


def test_google_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(external_geocoder.API_KEY_VARIABLE)
    with pytest.raises(InputError, match="GOOGLE_MAPS_API_KEY is not set"):
        query("http://127.0.0.1:9/", tmp_path, service="google")
