"""The routes over a double of the model: requests reach the model, its results reach the caller."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import shapely
from fastapi.testclient import TestClient

from addressvlm import InputError
from addressvlm.answers.address_distribution import Candidate, Circle, Localization, Prior
from addressvlm.answers.calibration import Calibration
from addressvlm.answers.types import Completion, TextChunk
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.storage.tables import PHOTOS, write_table
from serve.cities import City, CityData
from serve.errors import ApiError
from serve.metrics import ServiceMetrics
from serve.requests import ChatQuery, LocalizeQuery, validate
from serve.routes import Routes
from serve.schemas import CircleFields, LocalizeFields, PriorFields
from serve.settings import ServiceSettings
from tests.support.in_process_service import served
from tests.support.running_service import STREETS, chat_messages, check_error, photo, save_gazetteer

pytestmark = pytest.mark.xdist_group("serve")


class Double:
    """Records the queries and returns a fixed result."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metrics = ServiceMetrics()
        self.result = Localization(
            [Candidate("Oak Avenue", "Harbour", 0.625), Candidate("Quay Lane", "Harbour", 0.25)], True, 0.625, 0.5
        )

    async def read_image(self, source: bytes | str) -> np.ndarray:
        """An image of one pixel whose value is the length of the source."""
        return np.full((1, 1, 3), len(source), np.uint8)

    async def localize(self, query: LocalizeQuery) -> Localization:
        self.requests.append(query)
        return self.result

    async def chat(self, question: ChatQuery) -> list[Completion]:
        self.requests.append(question)
        return [Completion("One.", "stop", (), 40, 3), Completion("Two", "length", (), 40, 5)]

    async def stream_chat(self, question: ChatQuery) -> AsyncIterator[TextChunk]:
        self.requests.append(question)

        async def pieces() -> AsyncIterator[TextChunk]:
            yield TextChunk(0, "One.", "stop", (), 40, 3)

        return pieces()

    async def running_replicas(self) -> int:
        self.requests.append("running_replicas")
        return 0

    async def collect_metrics(self) -> Any:
        return {"front": self.metrics.collect()}


@pytest.fixture
def double() -> Double:
    return Double()


@pytest.fixture
def client(tmp_path: Path, double: Double) -> TestClient:
    cities = []
    for city, streets in {"Toytown": STREETS, "Alder": {"Elm Row": STREETS["Mill Street"]}}.items():
        (tmp_path / city).mkdir()
        save_gazetteer(tmp_path / city, city, streets)
        Calibration(1.0, 0.9, {"0.9": 1.0}, {"places": 12}).save(tmp_path / city)
        cities.append(City(city.lower(), city, f"run/{city.lower()}", tmp_path / city))
    return TestClient(Routes(ServiceSettings(max_tokens=100), cities, double, double.metrics).app())


def test_every_field_of_a_localize_request_reaches_the_model(client: TestClient, double: Double) -> None:
    prior = {
        "districts": ["Harbour"],
        "streets": ["Elm Row"],
        "circle": {"lat": 52.5, "lon": 0.25, "radius_m": 300, "soft": True},
        "weights": {"Elm Row": 2.5},
    }
    expected = Prior(("Harbour",), ("Elm Row",), Circle(52.5, 0.25, 300, soft=True), {"Elm Row": 2.5})
    fields = {"city": "alder", "top_k": 50, "threshold": 0, "prior": prior}
    assert client.post("/v1/localize", json={"image": "abcd", **fields}).status_code == 200
    form = {key: value if key == "city" else json.dumps(value) for key, value in fields.items()}
    assert client.post("/v1/localize", files={"file": b"abcd"}, data=form).status_code == 200
    for query in double.requests:
        assert (query.city, query.pixels[0, 0, 0], query.top_k, query.threshold) == ("alder", 4, 50, 0)
        assert query.threshold is not None
        assert query.prior == expected
    assert client.post("/v1/localize", json={"image": "abcd", "city": "toytown"}).status_code == 200
    query = double.requests[-1]
    assert (query.city, query.top_k, query.threshold, query.prior) == ("toytown", 5, None, Prior())


def test_the_whole_localization_reaches_the_caller(client: TestClient, double: Double) -> None:
    body = {"image": "abcd", "city": "toytown"}
    response = client.post("/v1/localize", json=body).json()
    assert (response["known"], response["confidence"], response["threshold"]) == (True, 0.625, 0.5)
    assert response["address"] == {"street": "Oak Avenue", "district": "Harbour"}
    assert response["reason"] is None
    assert [(c["street"], c["probability"]) for c in response["candidates"]] == [("Oak Avenue", 0.625), ("Quay Lane", 0.25)]
    assert [(c["lat"], c["lon"]) for c in response["candidates"]] == [pytest.approx((52.01, 0.01))] * 2
    assert (response["city"], response["model"]) == ("Toytown", "run/toytown")
    double.result = Localization(double.result.candidates, False, 0.625, 0.7)
    response = client.post("/v1/localize", json=body).json()
    assert (response["known"], response["address"], len(response["candidates"])) == (False, None, 2)
    assert response["reason"] == "The confidence, 0.625, is not above 0.700, from which on a precision of 90% is promised."
    text = client.get("/metrics").text
    for known in ("true", "false"):
        assert f'addressvlm_localized_total{{city="toytown",known="{known}",replica="front"}} 1.0' in text
    double.result = Localization(double.result.candidates, False, 0.625, 1.0)
    assert "The 12 places that the model was checked on" in client.post("/v1/localize", json=body).json()["reason"]
    assert "requested threshold, 1." in client.post("/v1/localize", json=body | {"threshold": 1}).json()["reason"]


def test_lists_of_cities_and_models(client: TestClient) -> None:
    assert client.get("/v1/cities").json()["data"] == [
        {"id": "toytown", "name": "Toytown", "model": "run/toytown", "streets": 4, "districts": 1, "addresses": 4},
        {"id": "alder", "name": "Alder", "model": "run/alder", "streets": 1, "districts": 1, "addresses": 1},
    ]
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["run/toytown", "run/alder"]
    assert client.get("/v1/models/run/alder").json() == client.get("/v1/models/run%2Falder").json() == models[1]
    check_error(client.get("/v1/models/gpt-4o"), 404, "'run/toytown', 'run/alder'")
    for city, streets in (("toytown", set(STREETS)), ("alder", {"Elm Row"})):
        shapes = client.get("/v1/map", params={"city": city}).json()["features"]
        assert streets <= {shape["properties"]["name"] for shape in shapes}


def test_without_a_model_replica_the_service_is_not_healthy_unless_it_may_scale_to_none(
    client: TestClient, double: Double
) -> None:
    check_error(client.get("/healthz"), 503, "No model replica")
    idle = TestClient(Routes(ServiceSettings(min_replicas=0), [], double, double.metrics).app())
    assert idle.get("/healthz").json() == {"status": "ok", "replicas": 0}


def test_the_controller_is_asked_once_a_second_however_many_want_to_know(client: TestClient, double: Double) -> None:
    for _ in range(5):
        check_error(client.get("/healthz"), 503, "No model replica")
    assert double.requests == ["running_replicas"]


def test_a_wrong_prior_is_refused_before_the_photo_is_read(client: TestClient, double: Double) -> None:
    for prior in ({"streets": ["Nowhere"]}, {"circle": {"lat": 5, "lon": 0, "radius_m": 10}}):
        check_error(client.post("/v1/localize", json={"image": "abcd", "city": "toytown", "prior": prior}), 400, "")
    assert double.requests == []


def test_photos_beyond_the_memory_of_requests_are_refused(tmp_path: Path, double: Double) -> None:
    async def read_image(source: bytes | str) -> np.ndarray:
        return np.zeros((1000, 1000, 3), np.uint8)

    double.read_image = read_image  # type: ignore[method-assign]
    save_gazetteer(tmp_path, "Toytown", STREETS)
    settings = ServiceSettings(request_memory_mb=5, max_body_mb=1)
    client = TestClient(Routes(settings, [City("t", "T", "t", tmp_path)], double, double.metrics).app())
    for images, status in ((1, 200), (2, 503), (1, 200)):
        body = {"model": "t", "messages": chat_messages("Where?", *["data:1"] * images)}
        assert client.post("/v1/chat/completions", json=body).status_code == status


def test_a_photo_that_fails_ends_the_reading_of_the_others(client: TestClient, double: Double) -> None:
    """Else they would be counted as memory of a request that is over, which nobody gives back."""
    ended: list[str] = []

    async def read_image(source: str) -> np.ndarray:
        if source == "data:bad":
            raise InputError("The image is damaged.")
        try:
            return await asyncio.Future()
        finally:
            ended.append(source)

    async def status() -> int:
        body = {"model": "run/alder", "messages": chat_messages("Where?", "data:slow", "data:bad")}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://x") as caller:
            response = await caller.post("/v1/chat/completions", json=body)
            assert ended == ["data:slow"]
            return response.status_code

    double.read_image = read_image  # type: ignore[method-assign, assignment]
    assert asyncio.run(status()) == 400


def test_streams_that_fail_are_counted_as_failures(client: TestClient, double: Double) -> None:
    async def stream_chat(question: ChatQuery) -> AsyncIterator[TextChunk]:
        async def pieces() -> AsyncIterator[TextChunk]:
            yield TextChunk(0, "One.", None, (), 40, 3)
            raise TimeoutError

        return pieces()

    double.stream_chat = stream_chat  # type: ignore[method-assign]
    body = {"model": "run/alder", "messages": chat_messages("Where?"), "stream": True}
    assert "overloaded" in client.post("/v1/chat/completions", json=body).text
    text = client.get("/metrics").text
    assert 'method="POST",replica="front",route="/v1/chat/completions",status="503"' in text
    assert 'route="/v1/chat/completions",status="200"' not in text


def test_another_method_is_told_which_is_allowed(client: TestClient) -> None:
    response = client.get("/v1/localize")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


def test_a_citys_name_in_a_form_may_be_a_number(client: TestClient) -> None:
    check_error(client.post("/v1/localize", files={"file": b"abcd"}, data={"city": "12"}), 404, "No city '12'")


def test_a_chat_gets_no_more_tokens_than_the_service_allows(client: TestClient, double: Double) -> None:
    body = {"model": "run/alder", "messages": chat_messages("Where?"), "max_tokens": 101}
    streamed = client.post("/v1/chat/completions", json=body | {"stream": True, "stream_options": {"include_usage": False}})
    assert double.requests[-1].sampling.max_tokens == 100
    assert "usage" not in streamed.text


def test_a_street_is_placed_on_its_longest_part(tmp_path: Path) -> None:
    parts = shapely.MultiLineString([[(0, 52), (0, 52.001)], [(1, 52), (1, 52.02)], [(2, 52), (2, 52.01)]])
    ring = shapely.box(3, 52, 3.2, 52.1)
    city = Gazetteer([Address(s, "A") for s in ("One", "Two", "Three")], {"One": parts, "Two": ring}, {}, city="X")
    city.save(tmp_path / "gazetteer.geojson")
    data = CityData(City("x", "X", "x", tmp_path))
    one, two, three = (data.candidate(street, "A", 0.5) for street in ("One", "Two", "Three"))
    assert (one["lat"], one["lon"], one["geometry"]["type"]) == (pytest.approx(52.01), 1, "MultiLineString")
    assert (two["lat"], two["lon"]) == pytest.approx((52.05, 3.1))
    assert three == {"street": "Three", "district": "A", "probability": 0.5, "lat": None, "lon": None, "geometry": None}


def test_samples_are_one_photo_of_each_street_from_the_runs_test_split(tmp_path: Path) -> None:
    model = tmp_path / "run" / "models" / "addressvlm" / "merged"
    model.mkdir(parents=True)
    assert CityData(City("x", "X", "x", model)).samples == []
    images = [
        ("Mill Street", photo(1)),
        ("Mill Street", photo(2)),
        ("Oak Avenue", b"\x89PNG"),
        *((f"S{n}", photo(n)) for n in range(9)),
    ]
    rows = [{"id": str(n), "street": s, "image": {"bytes": data, "path": None}} for n, (s, data) in enumerate(images)]
    write_table(tmp_path / "run" / "photos", "test", rows, PHOTOS)
    assert CityData(City("x", "X", "x", model)).samples == [photo(1), *(photo(n) for n in range(5))]


def test_parts_of_a_prior_are_independent() -> None:
    assert PriorFields().prior() == Prior()
    assert PriorFields(districts=["a"]).prior() == Prior(districts=("a",))
    assert PriorFields(weights={"a": 0}).prior() == Prior(weights={"a": 0})
    circle = CircleFields(lat=1, lon=2, radius_m=3)
    assert PriorFields(circle=circle).prior() == Prior(circle=Circle(1, 2, 3, soft=False))


def test_every_field_of_a_chat_request_reaches_the_model(client: TestClient, double: Double) -> None:
    body = {"model": "run/alder", "messages": chat_messages("Where?", "data:1", "data:22"), "max_tokens": 7, "temperature": 0.5}
    response = client.post("/v1/chat/completions", json=body).json()
    streamed = client.post("/v1/chat/completions", json=body | {"stream": True}).text
    for question in double.requests:
        assert (question.city, question.sampling.max_tokens, question.sampling.temperature) == ("alder", 7, 0.5)
        assert [image[0, 0, 0] for image in question.images] == [6, 7]
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in response["choices"]] == [
        (0, "One.", "stop"),
        (1, "Two", "length"),
    ]
    assert response["usage"] == {"prompt_tokens": 40, "completion_tokens": 8, "total_tokens": 48}
    assert response["model"] == "run/alder"
    assert "usage" not in streamed
    text = client.get("/metrics").text
    assert 'addressvlm_tokens_total{kind="prompt",replica="front"} 80.0' in text
    assert 'addressvlm_tokens_total{kind="completion",replica="front"} 11.0' in text
    check_error(client.post("/v1/chat/completions", json=body | {"model": "addressvlm"}), 404, "'run/toytown', 'run/alder'")


def test_slow_bodies_and_callers_who_leave_a_stream_hold_no_place(tmp_path: Path, double: Double) -> None:
    """Over real connections, to a service with one place and a model that never ends."""
    left = threading.Event()

    async def stream_chat(question: ChatQuery) -> AsyncIterator[TextChunk]:
        async def pieces() -> AsyncIterator[TextChunk]:
            try:
                while True:
                    yield TextChunk(0, "On and on.", None, (), 40, 3)
                    await asyncio.sleep(0.001)
            finally:
                left.set()

        return pieces()

    double.stream_chat = stream_chat  # type: ignore[method-assign]
    one_place = {"max_queued_requests": 0, "max_replicas": 1, "max_ongoing_requests": 1, "target_ongoing_requests": 0.5}
    app = Routes(ServiceSettings(**one_place), [City("x", "X", "x", tmp_path)], double, double.metrics).app()
    body = {"model": "x", "messages": chat_messages("Tell me all.")}
    with served(app) as url, ExitStack() as slow:
        for _ in range(5):
            connection = slow.enter_context(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))))
            connection.sendall(b"POST /v1/localize HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        chat = f"{url}/v1/chat/completions"
        with httpx.stream("POST", chat, json=body | {"stream": True}, timeout=60) as stream:
            lines = stream.iter_lines()  # closes the stream when it is collected
            assert next(lines).startswith("data: ")
            check_error(httpx.post(chat, json=body, timeout=60), 503, "busy")  # the one place is taken
        assert left.wait(60)
        while (response := httpx.post(chat, json=body, timeout=60)).status_code == 503:
            pass
        assert response.status_code == 200
        assert 'route="/v1/chat/completions",status="499"' in httpx.get(f"{url}/metrics", timeout=60).text


def test_empty_fields_of_a_form_are_as_if_they_were_not_there(client: TestClient, double: Double) -> None:
    fields = {"city": "alder", "top_k": "", "threshold": "", "prior": ""}
    assert client.post("/v1/localize", files={"file": b"abcd"}, data=fields).status_code == 200
    query = double.requests[-1]
    assert (query.city, query.top_k, query.threshold, query.prior) == ("alder", 5, None, Prior())
    two = [("file", b"abcd"), ("file", b"efgh")]
    check_error(client.post("/v1/localize", files=two, data={"city": "alder"}), 400, "form can't be read")


@pytest.mark.parametrize("kind", [None, "application/json", "Application/JSON; charset=utf-8"])
def test_json_may_come_with_or_without_its_type(client: TestClient, kind: str | None) -> None:
    body = json.dumps({"model": "run/alder", "messages": chat_messages("Where?")})
    headers = {"Content-Type": kind} if kind else {}
    assert client.post("/v1/chat/completions", content=body, headers=headers).status_code == 200
    localize = json.dumps({"image": "abcd", "city": "alder"})
    assert client.post("/v1/localize", content=localize, headers=headers).status_code == (200 if kind else 415)


def test_samples_are_found_by_their_addresses(tmp_path: Path, double: Double) -> None:
    cities = [City(name, name, name, tmp_path / name / "models" / "addressvlm" / "merged") for name in ("a", "b+c & d")]
    for city, seeds in zip(cities, ((1,), (2, 3)), strict=True):
        city.folder.mkdir(parents=True)
        rows = [{"id": str(n), "street": str(n), "image": {"bytes": photo(n), "path": None}} for n in seeds]
        write_table(tmp_path / city.id / "photos", "test", rows, PHOTOS)
    client = TestClient(Routes(ServiceSettings(), cities, double, double.metrics).app())
    for city, seeds in zip(cities, ((1,), (2, 3)), strict=True):
        listed = client.get("/v1/samples", params={"city": city.id}).json()["data"]
        assert [sample["id"] for sample in listed] == [*range(len(seeds))]
        assert [client.get("/" + sample["url"]).content for sample in listed] == [photo(n) for n in seeds]
    for number in ("1", "-1", "00", "x"):
        check_error(client.get(f"/v1/samples/{number}", params={"city": "a"}), 404, "No sample photo")


def test_health_is_what_the_controller_said_in_the_last_second(
    client: TestClient, double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, said = [100.0], iter([3, TimeoutError(), 0, 2])

    async def running_replicas() -> int:
        result = next(said)
        if isinstance(result, Exception):
            raise result
        return result

    double.running_replicas = running_replicas  # type: ignore[method-assign]
    monkeypatch.setattr("serve.routes.time", SimpleNamespace(monotonic=lambda: clock[0]))
    for now, replicas in ((100.0, 3), (100.9, 3), (101.1, None), (102.0, None), (102.2, 0), (103.3, 2), (104.2, 2)):
        clock[0] = now
        answer = client.get("/healthz")
        if replicas:
            assert answer.json() == {"status": "ok", "replicas": replicas}
        else:
            check_error(answer, 503, "No model replica" if replicas == 0 else "does not say")


def test_the_controller_is_asked_once_by_callers_who_come_together(client: TestClient, double: Double) -> None:
    asked = []

    async def running_replicas() -> int:
        asked.append(1)
        for _ in range(9):
            await asyncio.sleep(0)
        return 2

    double.running_replicas = running_replicas  # type: ignore[method-assign]

    async def ask() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://test") as together:
            return [answer.status_code for answer in await asyncio.gather(*(together.get("/healthz") for _ in range(4)))]

    assert (asyncio.run(ask()), len(asked)) == ([200] * 4, 1)


def test_files_of_the_page_come_with_their_type_and_run_no_other_scripts(client: TestClient) -> None:
    kinds = {"/": "text/html", "/docs": "text/html", "/page.js": "text/javascript", "/page.css": "text/css"}
    for path, kind in kinds.items():
        answer = client.get(path)
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy
    assert len({client.get(path).text for path in kinds}) == len(kinds)


FIELDS = {"top_k": 1, "threshold": 0.0}
CIRCLE = {"lat": 90, "lon": 180, "radius_m": 1}


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 50, "threshold": 1.0, "city": "a" * 200},
        {"prior": {"circle": CIRCLE}},
        {"prior": {"circle": {"lat": -90.0, "lon": -180.0, "radius_m": 1e6, "soft": True}}},
        {"prior": {"streets": ["a" * 200] * 1000, "districts": ["a"] * 1000, "weights": {str(n): 0 for n in range(1000)}}},
    ],
)
def test_what_is_just_allowed(fields: dict[str, Any]) -> None:
    assert validate(LocalizeFields, FIELDS | fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_k": 51}, "top_k"),
        ({"threshold": 1.01}, "threshold"),
        ({"threshold": -0.01}, "threshold"),
        ({"city": "a" * 201}, "city"),
        ({"prior": {"circle": CIRCLE | {"lat": 90.1}}}, "prior.circle.lat"),
        ({"prior": {"circle": CIRCLE | {"lat": -90.1}}}, "prior.circle.lat"),
        ({"prior": {"circle": CIRCLE | {"lon": 180.1}}}, "prior.circle.lon"),
        ({"prior": {"circle": CIRCLE | {"lon": -180.1}}}, "prior.circle.lon"),
        ({"prior": {"circle": CIRCLE | {"radius_m": 0.9}}}, "prior.circle.radius_m"),
        ({"prior": {"circle": CIRCLE | {"radius_m": 1000001}}}, "prior.circle.radius_m"),
        ({"prior": {"streets": ["a", "b" * 201]}}, "prior.streets.1"),
        ({"prior": {"districts": ["a"] * 1001}}, "prior.districts"),
        ({"prior": {"weights": {"a": -1}}}, "prior.weights.a"),
        ({"prior": {"weights": {str(n): 0 for n in range(1001)}}}, "prior.weights"),
    ],
)
def test_what_is_just_not_allowed_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        validate(LocalizeFields, FIELDS | fields)
    assert (caught.value.status, caught.value.param) == (400, param)
