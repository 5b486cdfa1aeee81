"""Wrong requests of every kind are answered with what is wrong, and the service stays up. Routes without Ray, a tiny model."""

import asyncio
import json
from collections.abc import Awaitable, Iterator
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from starlette.datastructures import Headers

from serve.errors import ApiError
from serve.requests import BodyReader, Memory, Share
from tests.support.images import BAD, GOOD
from tests.support.in_process_service import api
from tests.support.running_service import chat_messages, check_error, data_url, photo

pytestmark = pytest.mark.xdist_group("serve")


def read(reader: BodyReader, chunks: list[bytes], share: Share | None = None, **headers: str) -> Awaitable[bytes]:
    """The body that comes in these chunks; after an empty one at the end it never ends."""
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        if not left:
            return await asyncio.get_running_loop().create_future()
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or chunks[-1] == b""}

    return reader.read(Headers({key.replace("_", "-"): value for key, value in headers.items()}), receive, share or room())


def room(size: float = 1e6) -> Share:
    return Share(Memory(size))


def test_a_body_may_be_as_large_as_is_allowed_and_no_larger() -> None:
    reader = BodyReader(0.001)
    assert asyncio.run(read(reader, [b"a" * 600, b"b" * 400], content_length="1000")) == b"a" * 600 + b"b" * 400
    for chunks, headers in (([b"a" * 600, b"b" * 401], {}), ([b"a", b""], {"content_length": "1001"})):
        with pytest.raises(ApiError) as caught:
            asyncio.run(read(reader, chunks, **headers))
        assert (caught.value.status, caught.value.code) == (413, "too_large")
    assert not reader.arriving


def test_bodies_that_find_no_room_are_refused_and_give_it_back() -> None:
    memory = Memory(3 * 1000)  # a body counts three times
    first, second = Share(memory), Share(memory)
    assert len(asyncio.run(read(BodyReader(1), [b"a" * 600], first))) == 600
    with pytest.raises(ApiError) as caught:
        asyncio.run(read(BodyReader(1), [b"a" * 300, b"a" * 300], second))
    assert (caught.value.status, caught.value.code) == (503, "overloaded")
    for share in (first, second, second):
        share.release()
    assert memory.used == 0


def test_a_body_that_does_not_come_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.requests.GRACE_S", 0.01)
    with pytest.raises(ApiError) as caught:
        asyncio.run(read(BodyReader(1), [b"a", b""]))
    assert caught.value.status == 408


def test_a_body_has_time_for_all_that_came_of_it_up_to_a_limit() -> None:
    reader, deadlines = BodyReader(10), []
    sizes = [40_000, 8_000, 80_000, 900_000, 40_000]
    left = iter(sizes)

    async def receive() -> dict[str, Any]:
        deadlines.append(next(iter(reader.arriving)).when() or 0)
        size = next(left, 0)
        return {"type": "http.request", "body": b"a" * size, "more_body": size > 0}

    assert len(asyncio.run(reader.read(Headers({}), receive, room(1e9)))) == sum(sizes)
    _, first, *later = deadlines
    assert [round(deadline - first, 3) for deadline in later] == [1, 11, 105, 105]  # after 15 s, until 120


def test_slow_bodies_keep_out_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.requests.MAX_ARRIVING", 3)

    async def arrive() -> tuple[list[Any], list[bytes]]:
        reader = BodyReader(1)
        sizes = (900_000, 1, 500_000)  # what has come of each; the second has least time left
        slow = [asyncio.ensure_future(read(reader, [b"a" * size, b""], room(1e9))) for size in sizes]
        while len(reader.arriving) < 3 or len({timeout.when() for timeout in reader.arriving}) < 3:
            await asyncio.sleep(0)
        bodies = await asyncio.gather(*(read(reader, [b"fast"]) for _ in range(5)))
        (done,), waiting = await asyncio.wait(slow, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        return [slow.index(done), done.exception()], bodies

    (index, error), bodies = asyncio.run(arrive())
    assert (index, error.status, bodies) == (1, 408, [b"fast"] * 5)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with api(tmp_path_factory.mktemp("input"), max_body_mb=2, max_megapixels=4) as client:
        yield client
        assert client.post("/v1/localize", files={"file": photo()}).status_code == 200  # still there


PHOTO = data_url(photo())
CHAT = {"model": "addressvlm", "messages": chat_messages("Where?", PHOTO), "max_tokens": 4}


@pytest.mark.parametrize("case", BAD)
def test_bad_images(client: TestClient, case: str) -> None:
    data, message = BAD[case]
    check_error(client.post("/v1/localize", files={"file": ("photo.jpg", data)}), 400, message)
    check_error(client.post("/v1/localize", json={"image": data_url(data)}), 400, message)
    check_error(
        client.post("/v1/chat/completions", json=CHAT | {"messages": chat_messages("Where?", data_url(data))}), 400, message
    )


@pytest.mark.parametrize("case", GOOD)
def test_unusual_images(client: TestClient, case: str) -> None:
    assert client.post("/v1/localize", files={"file": GOOD[case][0]}).status_code == 200


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("%%%not base64%%%", "not valid base64"),
        ("abc", "not valid base64"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64,", "0 bytes"),
        ("http://169.254.169.254/latest", "not fetched"),
        ("http://127.0.0.1:8000/", "not fetched"),
        (" HTTPS://example.org/a.jpg", "not fetched"),
        ("file:///etc/passwd", "not fetched"),
        ("gopher://example.org", "not fetched"),
        ("\x00" * 100, "not valid base64"),
    ],
)
def test_images_that_are_none(client: TestClient, image: str, message: str) -> None:
    check_error(client.post("/v1/localize", json={"image": image}), 400, message)
    check_error(client.post("/v1/chat/completions", json=CHAT | {"messages": chat_messages("Where?", image)}), 400, message)


WRONG_JSON: list[tuple[Any, str]] = [
    ({"image": 3}, "image"),
    ({}, "image"),
    ({"picture": "abc", "image": PHOTO}, "picture: there is no such field"),
    (["image"], "JSON object"),
    ("image", "JSON object"),
    (0, "JSON object"),
    ({"image": PHOTO, "top_k": 0}, "top_k"),
    ({"image": PHOTO, "top_k": -3}, "top_k"),
    ({"image": PHOTO, "top_k": 51}, "top_k"),
    ({"image": PHOTO, "top_k": 10**30}, "top_k"),
    ({"image": PHOTO, "top_k": True}, "top_k"),
    ({"image": PHOTO, "top_k": 2.5}, "top_k"),
    ({"image": PHOTO, "threshold": 1.5}, "threshold"),
    ({"image": PHOTO, "threshold": "high"}, "threshold"),
    ({"image": PHOTO, "city": 3}, "city"),
    ({"image": PHOTO, "city": ["toytown"]}, "city"),
    ({"image": PHOTO, "prior": "Harbour"}, "prior"),
    ({"image": PHOTO, "prior": {"district": ["Harbour"]}}, "no such field"),
    ({"image": PHOTO, "prior": {"districts": "Harbour"}}, "prior.districts"),
    ({"image": PHOTO, "prior": {"districts": [""]}}, "prior.districts"),
    ({"image": PHOTO, "prior": {"streets": [1]}}, "prior.streets"),
    ({"image": PHOTO, "prior": {"streets": ["Mill Street"] * 1001}}, "prior.streets"),
    ({"image": PHOTO, "prior": {"streets": ["Nowhere Road"]}}, "no street 'Nowhere Road'"),
    ({"image": PHOTO, "prior": {"weights": {"Mill Street": -1}}}, "prior.weights"),
    ({"image": PHOTO, "prior": {"circle": {"lat": 52}}}, "prior.circle"),
    ({"image": PHOTO, "prior": {"circle": {"lat": 91, "lon": 0, "radius_m": 5}}}, "prior.circle.lat"),
    ({"image": PHOTO, "prior": {"circle": {"lat": 5, "lon": 0, "radius_m": 0}}}, "radius_m"),
    ({"image": PHOTO, "prior": {"circle": {"lat": 5, "lon": 0, "radius_m": 10}}}, "left by the prior"),
]


@pytest.mark.parametrize(("body", "message"), WRONG_JSON)
def test_wrong_json(client: TestClient, body: Any, message: str) -> None:
    check_error(client.post("/v1/localize", json=body), 400, message)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[" * 99999, b"\xff\xfe\xff", b'{"image": NaN}', b'{"image": "a", "city": "\\ud800"}', b"1" * 5000],
)
def test_what_is_no_json(client: TestClient, body: bytes) -> None:
    for route in ("/v1/localize", "/v1/chat/completions"):
        check_error(client.post(route, content=body, headers={"content-type": "application/json"}), 400, "")


def test_a_prior_is_used(client: TestClient) -> None:
    fields = {"prior": json.dumps({"streets": ["Quay Lane"]}), "threshold": "0.5", "top_k": "3"}
    result = client.post("/v1/localize", files={"file": photo()}, data=fields).json()
    assert [(c["street"], c["probability"]) for c in result["candidates"]] == [("Quay Lane", 1.0)]
    assert (result["known"], result["threshold"]) == (True, 0.5)
    assert result["candidates"][0]["geometry"]["type"] == "LineString"
    assert result["candidates"][0]["lon"] == pytest.approx(0.01)


def test_below_the_threshold_no_address_is_named(client: TestClient) -> None:
    result = client.post("/v1/localize", json={"image": PHOTO, "threshold": 1}).json()
    assert (result["known"], result["address"]) == (False, None)
    assert len(result["candidates"]) == 4
    assert result["confidence"] == result["candidates"][0]["probability"]


def test_forms_and_types(client: TestClient) -> None:
    file = {"file": photo()}
    check_error(client.post("/v1/localize", files={"image": b"x"}), 400, "field 'file'")
    check_error(client.post("/v1/localize", data={"file": "x"}), 415, "multipart/form-data")
    check_error(client.post("/v1/localize", files=file, data={"top_k": "many"}), 400, "top_k")
    check_error(client.post("/v1/localize", files=file, data={"top_k": "-1"}), 400, "top_k")
    check_error(client.post("/v1/localize", files=file, data={"prior": "{"}), 400, "'prior' is not valid JSON")
    check_error(client.post("/v1/localize", files=file, data={"city": "Atlantis"}), 404, "'toytown'")
    check_error(client.post("/v1/localize", files=file, data={"x": "y"}), 400, "no such field")
    check_error(client.post("/v1/localize", content=b"x", headers={"content-type": "multipart/form-data"}), 400, "boundary")
    check_error(
        client.post("/v1/localize", content=photo(), headers={"content-type": "image/jpeg"}), 415, "multipart/form-data"
    )
    check_error(
        client.post("/v1/chat/completions", content=b"x", headers={"content-type": "text/plain"}), 415, "application/json"
    )
    check_error(client.get("/v1/localize"), 405, "Method Not Allowed")
    check_error(client.get("/v2/localize"), 404, "Not Found")
    check_error(client.get("/v1/map", params={"city": "Atlantis"}), 404, "'toytown'")


def test_large_bodies(client: TestClient) -> None:
    check_error(client.post("/v1/localize", files={"file": b"\0" * 3_000_000}), 413, "larger than 2 MB")
    parts = (b"\0" * 100_000 for _ in range(30))  # without a length announced
    headers = {"content-type": "application/json"}
    check_error(client.post("/v1/localize", content=parts, headers=headers), 413, "larger than 2 MB")


def test_the_map_travels_compressed_to_those_who_read_that(client: TestClient) -> None:
    plain, zipped = (client.get("/v1/map", headers={"Accept-Encoding": kind}) for kind in ("identity", "gzip"))
    assert plain.json() == zipped.json()
    assert "content-encoding" not in plain.headers
    assert (zipped.headers["content-encoding"], zipped.headers["vary"]) == ("gzip", "Accept-Encoding")


WRONG_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "user", "content": "x"}] * 10_000}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": PHOTO}]}]},
        "messages.0.content.0.image_url",
    ),
    (
        {"messages": [{"role": "system", "content": chat_messages("", PHOTO)[0]["content"]}, *chat_messages("x")]},
        "messages.0.content",
    ),
    ({"messages": chat_messages("Where?", *[PHOTO] * 9)}, "messages"),
    ({"messages": chat_messages("word " * 30_000)}, "messages"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"n": 9}, "n"),
    ({"n": 0}, "n"),
    ({"top_p": 0}, "top_p"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": "a" * 201}, "stop"),
    ({"stop": ["a", "b" * 201]}, "stop"),
    ({"presence_penalty": 1.0}, "presence_penalty"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"logit_bias": {"50256": -100}}, "logit_bias"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"top_k": 5}, "top_k"),
    ({"temperature": 10**400}, "temperature"),
    ({"seed": 2**63}, "seed"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"stream": "yes"}, "stream"),
]


@pytest.mark.parametrize(("change", "param"), WRONG_CHATS)
def test_wrong_chats(client: TestClient, change: dict[str, Any], param: str) -> None:
    response = client.post("/v1/chat/completions", json=CHAT | change)
    check_error(response, 400, "")
    assert response.json()["error"]["param"].split(".")[0] == param.split(".")[0]


def test_fields_that_change_nothing_are_accepted(client: TestClient) -> None:
    neutral = {"logit_bias": {}, "tools": [], "tool_choice": "none", "modalities": ["text"], "user": "me", "temperature": 1e-38}
    assert client.post("/v1/chat/completions", json=CHAT | neutral).status_code == 200


def test_json_of_very_many_values(client: TestClient) -> None:
    body = b'{"image": "", "prior": {"streets": [' + b'"",' * 300_000 + b'""]}}'
    headers = {"content-type": "application/json"}
    check_error(client.post("/v1/localize", content=body, headers=headers), 400, "commas and brackets")


def test_another_model(client: TestClient) -> None:
    for name in ("gpt-4o", "", "x" * 100_000, "\x00"):
        response = client.post("/v1/chat/completions", json=CHAT | {"model": name})
        check_error(response, 404, "'toytown/addressvlm'")
        assert response.json()["error"]["code"] == "model_not_found"
        assert len(response.text) < 500


def test_longer_than_the_context(client: TestClient) -> None:
    body = CHAT | {"messages": chat_messages("word " * 19_000)}
    check_error(client.post("/v1/chat/completions", json=body), 400, "tokens and the model reads")
    check_error(client.post("/v1/chat/completions", json=body | {"stream": True}), 400, "tokens and the model reads")


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_what_a_stream_says_is_the_whole_answer(client: TestClient) -> None:
    body = CHAT | {"messages": chat_messages("Tell me a story.", PHOTO), "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    full = client.post("/v1/chat/completions", json=body).json()
    streamed = events(
        client.post("/v1/chat/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}})
    )
    choices = [event["choices"][0] for event in streamed[:-1]]
    assert "".join(c["delta"].get("content", "") for c in choices) == full["choices"][0]["message"]["content"]
    assert choices[-1]["finish_reason"] == full["choices"][0]["finish_reason"] == "length"
    assert streamed[-1]["usage"] == full["usage"]
    assert len(choices) > 4  # piece by piece
    tokens = [token for c in choices if c["logprobs"] for token in c["logprobs"]["content"]]
    scores = full["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in tokens] == [token["token"] for token in scores]
    assert len(scores) == 12
    assert all(token["top_logprobs"][0]["logprob"] == pytest.approx(token["logprob"]) for token in scores)  # greedy


def test_several_answers_and_seeds(client: TestClient) -> None:
    body = CHAT | {"messages": chat_messages("Tell me a story.", PHOTO), "temperature": 1.5, "n": 3, "seed": 5}
    first, second = (client.post("/v1/chat/completions", json=body).json() for _ in range(2))
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in second["choices"]]
    assert len(set(texts)) > 1
    streamed = events(client.post("/v1/chat/completions", json=body | {"stream": True}))
    assert {event["choices"][0]["index"] for event in streamed} == {0, 1, 2}


def test_chats_about_the_address_agree_with_the_ranking(client: TestClient) -> None:
    best = client.post("/v1/localize", json={"image": PHOTO}).json()["candidates"][0]["street"]

    def answer(text: str) -> str:
        body = CHAT | {"messages": chat_messages(text, PHOTO), "max_tokens": 20}
        streamed = events(client.post("/v1/chat/completions", json=body | {"stream": True}))
        full = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in streamed) == full
        return full

    assert answer("Which street is this?") == best
    assert answer(f"Is this {best}?") == "Yes"
    assert answer(f"Is this {'Mill Street' if best != 'Mill Street' else 'Oak Avenue'}?") == "No"
