"""The service on a real Ray Serve, asked by real clients: python -m pytest tests/test_serve.py"""

import base64
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image

import serve as service
from tests.service import STREETS, check_error, photo, running_service

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def url(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_service(tmp_path_factory.mktemp("service"), max_body_mb=2, max_megapixels=4) as address:
        yield address


def data_url(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def asks(text: str, *images: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *parts]}]


def localize(url: str, data: bytes, name: str = "photo.jpg", **fields: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/localize", files={"file": (name, data)}, data=fields, timeout=120)


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


# ---- what it is for


def test_localize_ranks_the_gazetteer(url: str) -> None:
    found = localize(url, photo(), top_k="3").raise_for_status().json()
    shares = [c["probability"] for c in found["candidates"]]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    assert found["address"] == {key: found["candidates"][0][key] for key in ("street", "district")}
    assert {c["street"] for c in found["candidates"]} <= set(STREETS)
    assert (found["city"], found["model"]) == ("Toytown", "toytown/addressvlm")


def test_form_and_json_mean_the_same(url: str) -> None:
    form = localize(url, photo()).json()
    for image in (data_url(photo()), base64.b64encode(photo()).decode()):
        got = httpx.post(f"{url}/v1/localize", json={"image": image}, timeout=120)
        assert got.raise_for_status().json()["address"] == form["address"]
        for a, b in zip(got.json()["candidates"], form["candidates"], strict=True):
            assert a["probability"] == pytest.approx(b["probability"], rel=1e-4)


def test_many_at_once_get_each_their_own(url: str) -> None:
    photos = [photo(seed) for seed in range(6)]
    alone = [localize(url, p).json()["candidates"] for p in photos]
    with ThreadPoolExecutor(6) as pool:
        together = [r.json()["candidates"] for r in pool.map(lambda p: localize(url, p), photos)]
    for a, b in zip(alone, together, strict=True):
        assert {c["street"]: pytest.approx(c["probability"], rel=1e-3) for c in a} == {c["street"]: c["probability"] for c in b}


def test_openai_client_plain_and_stream(client: openai.OpenAI) -> None:
    name = client.models.list().data[0].id
    plain = client.chat.completions.create(model=name, messages=asks("Which street?", data_url(photo())), max_tokens=8)
    assert plain.choices[0].finish_reason in ("stop", "length")
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens
    assert plain.usage.prompt_tokens > 16  # the image's 16 patches and the text
    chunks = list(
        client.chat.completions.create(
            model=name,
            messages=asks("Which street?", data_url(photo())),
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == plain.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == plain.choices[0].finish_reason
    assert chunks[-1].usage == plain.usage


def test_a_conversation_goes_on(client: openai.OpenAI) -> None:
    first = asks("Which street?", data_url(photo()))
    turns = [{"role": "assistant", "content": "Mill Street"}, {"role": "user", "content": "And which district?"}]
    short = client.chat.completions.create(model="addressvlm", messages=first, max_tokens=4)
    long = client.chat.completions.create(model="addressvlm", messages=first + turns, max_tokens=4, temperature=0.7)
    assert long.usage.prompt_tokens > short.usage.prompt_tokens


def test_stop_cuts_the_answer(client: openai.OpenAI) -> None:
    asked = {"model": "addressvlm", "messages": asks("Which street?", data_url(photo())), "max_tokens": 8}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    assert len(whole) > 1
    cut = client.chat.completions.create(**asked, stop=[whole[1]]).choices[0]
    assert cut.message.content == whole[: whole.index(whole[1])]
    assert cut.finish_reason == "stop"


def test_page_map_and_health(url: str) -> None:
    page = httpx.get(f"{url}/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    folder = Path(service.__file__).parent / "page"
    assert page.content == (folder / "index.html").read_bytes()
    for name in ("page.css", "page.js", "map.js"):
        assert httpx.get(f"{url}/{name}").content == (folder / name).read_bytes()
        assert "http://" not in (folder / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in (folder / name).read_text()
    streets = {f["properties"]["name"] for f in httpx.get(f"{url}/v1/map").json()["features"]}
    assert set(STREETS) <= streets
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok", "replicas": 1}
    assert {"/v1/localize", "/v1/chat/completions"} <= httpx.get(f"{url}/openapi.json").json()["paths"].keys()


# ---- what comes in wrong


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few dozen bytes that says it is enormous."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def gif() -> bytes:
    out = BytesIO()
    Image.new("RGB", (8, 8)).save(out, "GIF")
    return out.getvalue()


BAD_IMAGES = {
    "empty": (b"", "0 bytes"),
    "truncated": (photo()[: len(photo()) // 2], "damaged or cut off"),
    "text": (b"just some text", "not a JPEG, PNG or WebP"),
    "html": (b"<!doctype html><script>alert(1)</script>", "not a JPEG, PNG or WebP"),
    "gif": (gif(), "not a JPEG, PNG or WebP"),
    "large": (png_header(3000, 2000), "at most 4 are accepted"),
    "bomb": (png_header(60000, 60000), "at most 4"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused_in_words(url: str, case: str) -> None:
    data, words = BAD_IMAGES[case]
    check_error(localize(url, data), 400, words)
    check_error(httpx.post(f"{url}/v1/localize", json={"image": data_url(data)}), 400, words)
    body = {"model": "addressvlm", "messages": asks("Where?", data_url(data))}
    check_error(httpx.post(f"{url}/v1/chat/completions", json=body), 400, words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"image": "%%%not base64%%%"}, "not valid base64"),
        ({"image": "data:image/png,abc"}, "not base64"),
        ({"image": "http://169.254.169.254/latest"}, "not fetched"),
        ({"image": " HTTPS://example.org/a.jpg"}, "not fetched"),
        ({"image": "file:///etc/passwd"}, "not fetched"),
        ({"image": 3}, '"image"'),
        ({"picture": "abc"}, '"image"'),
        (["image"], '"image"'),
        ({"image": data_url(photo()), "top_k": 0}, "top_k"),
        ({"image": data_url(photo()), "top_k": True}, "top_k"),
    ],
)
def test_wrong_json_is_refused_in_words(url: str, body: object, words: str) -> None:
    check_error(httpx.post(f"{url}/v1/localize", json=body), 400, words)


def test_wrong_forms_and_types(url: str) -> None:
    place = f"{url}/v1/localize"
    check_error(httpx.post(place, files={"image": b"x"}), 400, "field 'file'")
    check_error(localize(url, photo(), top_k="many"), 400, "top_k")
    check_error(httpx.post(place, content=b"x", headers={"content-type": "multipart/form-data"}), 400, "boundary")
    check_error(httpx.post(place, content=b"{", headers={"content-type": "application/json"}), 400, "JSON")
    check_error(httpx.post(place, content=b"[" * 99999, headers={"content-type": "application/json"}), 400, "JSON")
    check_error(httpx.post(place, content=photo(), headers={"content-type": "image/jpeg"}), 415, "multipart/form-data")
    check_error(httpx.get(place), 405, "Method Not Allowed")
    check_error(httpx.get(f"{url}/v2/localize"), 404, "Not Found")


def test_large_bodies_are_refused(url: str) -> None:
    check_error(localize(url, b"\0" * 3_000_000), 413, "larger than 2 MB")
    parts = (b"\0" * 100_000 for _ in range(30))  # without a length announced
    check_error(
        httpx.post(f"{url}/v1/localize", content=parts, headers={"content-type": "application/json"}), 413, "larger than 2 MB"
    )


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": "hello"}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, openai.BadRequestError, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, openai.BadRequestError, "messages"),
        ({"messages": asks("Where?", "https://example.org/a.jpg")}, openai.BadRequestError, None),
        ({"messages": asks("Where?", *[data_url(photo())] * 9)}, openai.BadRequestError, "messages"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"n": 2}, openai.BadRequestError, "n"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format"),
        ({"messages": asks("word " * 20_000)}, openai.BadRequestError, None),
        ({"model": "gpt-4o"}, openai.NotFoundError, "model"),
    ],
)
def test_openai_client_sees_its_own_errors(client: openai.OpenAI, change: dict, kind: type, param: str | None) -> None:
    request = {"model": "addressvlm", "messages": asks("Where?", data_url(photo())), "max_tokens": 4}
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{**request, **change})
    assert caught.value.param == param
