"""The service on a real Ray Serve, two cities in one replica, called by real clients."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import serve as service
from addressvlm.inference import Localizer
from tests.support.running_service import STREETS, chat_messages, check_error, data_url, photo, running_service, two_cities

pytestmark = pytest.mark.xdist_group("ray-answers")
MODEL = "run0/addressvlm"


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return two_cities(tmp_path_factory.mktemp("cities"))


@pytest.fixture(scope="module")
def url(ray_local: None, systems: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = {
        "cities": ",".join(map(str, systems)),
        "max_body_mb": 2,
        "max_megapixels": 4,
        "min_replicas": 1,
        "max_replicas": 1,
    }
    with running_service(tmp_path_factory.mktemp("service"), **settings) as address:
        yield address


def localize(url: str, data: bytes, city: str = "toytown", **fields: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/localize", files={"file": ("photo.jpg", data)}, data={"city": city, **fields}, timeout=120)


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


# ---- addresses


def test_localize_ranks_the_gazetteer(url: str) -> None:
    result = localize(url, photo(), top_k="3").raise_for_status().json()
    shares = [c["probability"] for c in result["candidates"]]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    assert result["known"]
    assert result["address"] == {key: result["candidates"][0][key] for key in ("street", "district")}
    assert {c["street"] for c in result["candidates"]} <= set(STREETS)
    assert (result["city"], result["model"]) == ("Toytown", MODEL)


def test_cities_answer_as_their_merged_models_and_take_turns(url: str, systems: list[Path]) -> None:
    photos = [photo(seed) for seed in range(6)]
    cities = ["toytown", "St. Alder"] * 3
    with ThreadPoolExecutor(6) as pool:
        result = [r.raise_for_status().json() for r in pool.map(lambda p, c: localize(url, p, c), photos, cities)]
    merged = {city: Localizer(systems[n] / "merged") for n, city in enumerate(("toytown", "St. Alder"))}
    for data, city, answer in zip(photos, cities, result, strict=True):
        expected = merged[city].localize(Image.open(BytesIO(data)), top_k=None).candidates
        assert [c["street"] for c in answer["candidates"]] == [c.street for c in expected]
        assert [c["probability"] for c in answer["candidates"]] == pytest.approx(
            [c.probability for c in expected], rel=1e-2, abs=1e-6
        )


def test_cities_are_listed_and_others_refused(url: str) -> None:
    listed = httpx.get(f"{url}/v1/cities").json()["data"]
    assert [(c["id"], c["name"], c["streets"]) for c in listed] == [("toytown", "Toytown", 4), ("st-alder", "St. Alder", 2)]
    check_error(localize(url, photo(), "Atlantis"), 404, "'toytown', 'st-alder'")
    check_error(localize(url, photo(), ""), 400, "Say which city")
    streets = {f["properties"]["name"] for f in httpx.get(f"{url}/v1/map", params={"city": "st-alder"}).json()["features"]}
    assert "Elm Row" in streets


def test_form_and_json_are_equivalent(url: str) -> None:
    form = localize(url, photo()).json()
    for image in (data_url(photo()), base64.b64encode(photo()).decode()):
        response = httpx.post(f"{url}/v1/localize", json={"image": image, "city": "toytown"}, timeout=120)
        answer = response.raise_for_status().json()
        assert answer.pop("request_id") != form["request_id"]
        assert answer == {key: value for key, value in form.items() if key != "request_id"}


# ---- chat, with the real client


def test_openai_client_plain_and_stream(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "run1/addressvlm"]
    request = {"model": MODEL, "messages": chat_messages("Tell me a story.", data_url(photo())), "max_tokens": 8}
    plain = client.chat.completions.create(**request, logprobs=True, top_logprobs=1)
    assert plain.choices[0].finish_reason in ("stop", "length")
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens
    assert plain.usage.prompt_tokens > 16  # the image's 16 patches and the text
    assert len(plain.choices[0].logprobs.content) == plain.usage.completion_tokens
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == plain.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == plain.choices[0].finish_reason
    assert chunks[-1].usage == plain.usage


def test_a_conversation_of_several_turns(client: openai.OpenAI) -> None:
    first = chat_messages("What do you see?", data_url(photo()))
    turns = [{"role": "assistant", "content": "A street."}, {"role": "user", "content": "And what else?"}]
    short = client.chat.completions.create(model=MODEL, messages=first, max_tokens=4)
    long = client.chat.completions.create(model=MODEL, messages=first + turns, max_tokens=4, temperature=0.7, n=2, seed=1)
    assert long.usage.prompt_tokens > short.usage.prompt_tokens
    assert len(long.choices) == 2


def test_stop_cuts_the_answer(client: openai.OpenAI) -> None:
    request = {"model": MODEL, "messages": chat_messages("Tell me a story.", data_url(photo())), "max_tokens": 8}
    full = client.chat.completions.create(**request).choices[0].message.content
    assert len(full) > 1
    cut = client.chat.completions.create(**request, stop=[full[1]]).choices[0]
    assert cut.message.content == full[: full.index(full[1])].strip()
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": chat_messages("Where?", "https://example.org/a.jpg")}, openai.BadRequestError, None),
        ({"messages": chat_messages("Where?", data_url(b"no photo"))}, openai.BadRequestError, None),
        ({"messages": chat_messages("word " * 15_000), "stream": True}, openai.BadRequestError, None),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"model": "gpt-4o"}, openai.NotFoundError, "model"),
    ],
)
def test_openai_client_raises_its_own_errors(client: openai.OpenAI, change: dict, kind: type, param: str | None) -> None:
    request = {"model": MODEL, "messages": chat_messages("Where?", data_url(photo())), "max_tokens": 4}
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{**request, **change})
    assert caught.value.param == param


# ---- page, health, metrics, errors


def test_page_and_health(url: str) -> None:
    page = httpx.get(f"{url}/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for file in (Path(service.__file__).parent / "page").iterdir():
        name = "" if file.name == "index.html" else file.name
        assert httpx.get(f"{url}/{name}").content == file.read_bytes()
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok", "replicas": 1}
    assert {"/v1/localize", "/v1/chat/completions"} <= httpx.get(f"{url}/openapi.json").json()["paths"].keys()


def test_request_ids_and_metrics_of_all_replicas(url: str) -> None:
    answer = httpx.get(f"{url}/v1/models", headers={"X-Request-Id": "ours-7"})
    assert answer.headers.get_list("x-request-id") == ["ours-7"]
    localize(url, photo())
    result = {f.name: f.samples for f in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)}
    front, decoder, model = (
        {sample.labels["replica"] for sample in result[name]}
        for name in ("addressvlm_requests", "addressvlm_decode_seconds", "addressvlm_batch_size")
    )
    assert len(front | decoder | model) == 3


def test_a_caller_who_leaves_a_stream_ends_it_in_the_model(url: str, client: openai.OpenAI) -> None:
    request = {"model": MODEL, "messages": chat_messages("Tell me a story.", data_url(photo())), "temperature": 2}
    for seed in range(8):  # one of them does not end by itself at once
        stream = client.chat.completions.create(**request, n=8, seed=seed, stream=True, max_tokens=400)
        next(iter(stream))
        stream.close()
    left = 'route="/v1/chat/completions",status="499"'
    assert any(left in httpx.get(f"{url}/metrics", timeout=60).text for _ in range(300))
    assert localize(url, photo()).status_code == 200


def test_openai_client_finds_a_model_by_its_name(client: openai.OpenAI) -> None:
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_bad_input_crosses_replicas_as_a_sentence(url: str) -> None:
    check_error(localize(url, b"<html>"), 400, "a web page or XML")
    check_error(localize(url, photo(), prior='{"streets": ["Nowhere"]}'), 400, "no street 'Nowhere'")
    check_error(localize(url, b"\0" * 3_000_000), 413, "larger than 2 MB")
    check_error(httpx.get(f"{url}/v1/localize"), 405, "Method Not Allowed")
