"""Recorded responses of vLLM's server, through OpenAI's real client: scores of addresses, answers, streams."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import APIStatusError, AsyncOpenAI
from PIL import Image

from addressvlm import InputError
from addressvlm.answers.address_distribution import Prior
from addressvlm.answers.calibration import Calibration
from addressvlm.answers.types import Completion, Sampling, TextChunk, TokenScore
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.image_decode_worker import decode_image
from addressvlm.inference import Localizer
from addressvlm.questions import ADDRESS_QUESTION
from serve.cities import City
from serve.errors import ApiError
from serve.images import decode_base64
from serve.metrics import ServiceMetrics
from serve.requests import ChatQuery, LocalizeQuery
from serve.settings import ServiceSettings
from serve.vllm_engine import VllmModel, _end_tokens, _image_size, answer_logprobs, openai_request, unique_prefix_lengths
from tests.support.running_service import two_cities

pytestmark = pytest.mark.xdist_group("serve")
PHOTO = np.zeros((20, 30, 3), np.uint8)
PROMPT = [1, 2, 3]
ANSWERS = {  # address -> the tokens of its answer with its end 9, and ln p of each; the length of its shortest unique prefix
    "Mill Street, Harbour": ([5, 6, 7, 9], [-0.5, -0.25, -4.0, -8.0], 2),
    "Mill Road, Harbour": ([5, 8, 7, 9], [-0.5, -2.0, -4.0, -8.0], 2),
    "Oak Avenue, Harbour": ([4, 7, 9], [-1.5, -4.0, -8.0], 1),
    "Mill, Harbour": ([5, 9], [-0.5, -3.0], 2),
}


def vllm(reply: Any, requests: list[dict[str, Any]]) -> VllmModel:
    """The engine with a server that answers `reply(body)`: a status and a body."""

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(json.loads(request.content))
        status, body = reply(requests[-1])
        if isinstance(body, str):
            return httpx.Response(status, text=body, headers={"Content-Type": "text/event-stream"})
        return httpx.Response(status, json=body)

    model = VllmModel.__new__(VllmModel)
    model.name, model.metrics, model.semaphore, model.end_tokens = "merged", ServiceMetrics(), asyncio.Semaphore(2), {9}
    model.gazetteer, model.calibration = Gazetteer([Address(*text.split(", ")) for text in ANSWERS]), Calibration()
    model.prefix_lengths = {text: length for text, (_, _, length) in ANSWERS.items()}
    http = httpx.AsyncClient(transport=httpx.MockTransport(handle))
    model.client = AsyncOpenAI(base_url="http://vllm/v1", api_key="none", max_retries=0, http_client=http)
    return model


def read(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The response of vLLM 0.11 to a prompt; after an answer comes the template's line break."""
    *_, last = body["messages"]
    tokens, log_p = list(PROMPT), [None, -9.0, -9.0]
    if last["role"] == "assistant":
        answer, logprobs, _ = ANSWERS[last["content"]]
        tokens, log_p = [*tokens, *answer, 11], [*log_p, *logprobs, -9.0]
    prompt_logprobs = [
        None if p is None else {str(t): {"logprob": p, "rank": 2}, "77": {"logprob": -0.125, "rank": 1}}
        for t, p in zip(tokens, log_p, strict=True)
    ]
    choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}
    extra = {"prompt_logprobs": prompt_logprobs if body.get("prompt_logprobs") == 0 else None, "prompt_token_ids": tokens}
    return 200, {"id": "1", "object": "chat.completion", "created": 1, "model": "merged", "choices": [choice], **extra}


def test_the_score_of_an_address_is_the_sum_over_its_shortest_unique_prefix() -> None:
    requests: list[dict[str, Any]] = []
    model = vllm(read, requests)
    scores = asyncio.run(model._address_scores("data:image/png;base64,AAAA", list(ANSWERS)))
    assert scores.tolist() == [-0.75, -2.5, -1.5, -3.5]
    assert [body["add_generation_prompt"] for body in requests] == [True, False, False, False, False]
    for body in requests:
        image, text = body["messages"][0]["content"]
        assert (image["image_url"]["url"], text["text"]) == ("data:image/png;base64,AAAA", ADDRESS_QUESTION)
        assert (body["model"], body["max_tokens"], body["return_token_ids"]) == ("merged", 1, True)


def test_only_addresses_that_a_prior_allows_are_scored() -> None:
    requests: list[dict[str, Any]] = []
    model = vllm(read, requests)
    own = tuple(-1.0 if address.street == "Mill" else 0.0 for address in model.gazetteer.addresses)
    model.calibration = Calibration(temperature=0.5, own_prior=own)
    prior = Prior(streets=("Mill Road", "Mill"), weights={"Mill Road": 3})
    result = asyncio.run(model.localize(LocalizeQuery("x", PHOTO, 9, prior, None)))
    scores = np.array([-2.5 / 0.5 + np.log(3), (-3.5 + 1) / 0.5])
    shares = np.exp(scores) / np.exp(scores).sum()
    assert [(c.street, c.probability) for c in result.candidates] == [
        ("Mill Road", pytest.approx(shares[0])),
        ("Mill", pytest.approx(shares[1])),
    ]
    assert len(requests) == 3


def test_answers_keep_their_order_and_token_counts() -> None:
    def token(text: str, log_p: float) -> dict[str, Any]:
        return {
            "token": text,
            "logprob": log_p,
            "bytes": None,
            "top_logprobs": [{"token": "z", "logprob": -0.5, "bytes": None}],
        }

    choices = [
        {
            "index": n,
            "message": {"role": "assistant", "content": text},
            "finish_reason": finish,
            "logprobs": {"content": scores},
        }
        for n, (text, finish, scores) in enumerate([(" A. ", "stop", [token("A.", -1.5)]), (None, "length", None)])
    ]
    usage = {"prompt_tokens": 40, "completion_tokens": 7, "total_tokens": 47}
    full = {"id": "1", "object": "chat.completion", "created": 1, "model": "merged", "choices": choices, "usage": usage}
    model = vllm(lambda body: (200, full), [])
    first, second = asyncio.run(model.chat(ChatQuery("x", [], [], Sampling(n=2))))
    assert first == Completion("A.", "stop", (TokenScore("A.", -1.5, (("z", -0.5),)),), 40, 7)
    assert (second.text, second.finish, second.prompt_tokens, first.tokens + second.tokens) == ("", "length", 40, 7)


def test_a_stream_comes_chunk_by_chunk() -> None:
    def chunk(index: int, text: str | None, finish: str | None, written: int) -> str:
        usage = {"prompt_tokens": 40, "completion_tokens": written, "total_tokens": 40 + written}
        choice = {"index": index, "delta": {"content": text}, "finish_reason": finish}
        body = {
            "id": "1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "merged",
            "choices": [choice],
            "usage": usage,
        }
        return f"data: {json.dumps(body)}\n\n"

    requests: list[dict[str, Any]] = []
    response = chunk(0, "", None, 0) + chunk(0, "A", None, 1) + chunk(1, "B", "length", 1) + chunk(0, None, "stop", 2)
    model = vllm(lambda body: (200, response + "data: [DONE]\n\n"), requests)

    async def listen() -> list[Any]:
        return [piece async for piece in model.stream_chat(ChatQuery("x", [], [], Sampling()))]

    assert asyncio.run(listen()) == [
        TextChunk(0, "A", None, (), 40, 1),
        TextChunk(1, "B", "length", (), 40, 1),
        TextChunk(0, "", "stop", (), 40, 2),
    ]
    assert requests[0]["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_what_vllm_refuses_is_the_callers_error_and_what_fails_is_not() -> None:
    question = ChatQuery("x", [], [], Sampling())
    refuses = vllm(lambda body: (400, {"error": {"message": "The prompt is too long."}}), [])
    response = asyncio.run(refuses.chat(question))
    assert isinstance(response, InputError)
    assert "too long" in str(response)
    with pytest.raises(APIStatusError):
        asyncio.run(vllm(lambda body: (500, {}), []).chat(question))


def test_a_models_ends_and_side_are_read_from_its_files(tmp_path: Path) -> None:
    assert _end_tokens(tmp_path) == set()
    for generation_config, ends in (({"eos_token_id": 7}, {7}), ({"eos_token_id": [7, 8]}, {7, 8}), ({}, set())):
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
        assert _end_tokens(tmp_path) == ends
    for vision, side in (
        ({"image_size": 336}, 336),
        ({"image_size": [224, 448]}, 448),
        ({}, 2048),
        ({"image_size": 9999}, 2048),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"vision_config": vision}))
        assert _image_size(tmp_path) == side


PIXELS = np.random.default_rng(1).integers(0, 255, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return two_cities(tmp_path_factory.mktemp("cities"))


class ScoredByTransformers(VllmModel):
    """The vLLM engine with a merged model of transformers in vLLM's place, which tests don't have."""

    def __init__(self, merged: Path) -> None:
        self.localizer = Localizer(merged)
        self.gazetteer, self.calibration, self.metrics = (
            self.localizer.gazetteer,
            Calibration(temperature=2.0),
            ServiceMetrics(),
        )

    async def _address_scores(self, photo: str, answers: Sequence[str]) -> np.ndarray:
        scores = self.localizer.address_scores([Image.open(BytesIO(decode_base64(photo)))])[0]
        score_of = dict(zip([address.text() for address in self.localizer.require_gazetteer().addresses], scores, strict=True))
        return np.array([score_of[answer] for answer in answers])


def test_vllm_and_transformers_use_the_same_unique_prefixes(systems: list[Path]) -> None:
    localizer = Localizer(systems[0] / "merged")
    texts = [address.text() for address in localizer.require_gazetteer().addresses]
    trie = localizer.trie(texts).unique_prefixes()
    assert list(unique_prefix_lengths(systems[0] / "merged", texts).values()) == trie.depths[trie.ends].tolist()


def test_vllms_scores_give_the_same_ranking(systems: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = ScoredByTransformers(systems[0] / "merged")
    model.localizer.calibration = model.calibration
    for prior in (Prior(), Prior(streets=("Mill Street", "Quay Lane"), weights={"Quay Lane": 3})):
        expected = model.localizer.localize(Image.fromarray(PIXELS), top_k=9, prior=prior)
        result = asyncio.run(model.localize(LocalizeQuery("toytown", PIXELS, 9, prior, None)))
        assert [c.street for c in result.candidates] == [c.street for c in expected.candidates]
        assert result.confidence == pytest.approx(expected.confidence, rel=1e-4)
    model.calibration = Calibration(2.0, 0.8, {"0.8": 0.9999})
    for threshold, known in ((None, False), (0.0, True), (1.0, False)):
        result = asyncio.run(model.localize(LocalizeQuery("toytown", PIXELS, 2, Prior(), threshold)))
        expected_threshold = 0.9999 if threshold is None else threshold
        assert (result.known, result.threshold, len(result.candidates)) == (known, expected_threshold, 2)
    monkeypatch.setattr("serve.vllm_engine.MAX_ADDRESSES", 2)
    two = Prior(streets=("Mill Street", "Quay Lane"))
    assert len(asyncio.run(model.localize(LocalizeQuery("toytown", PIXELS, 9, two, None))).candidates) == 2
    refused = asyncio.run(model.localize(LocalizeQuery("toytown", PIXELS, 9, Prior(), None)))
    assert (refused.status, refused.code) == (501, "not_implemented")


def test_an_addresss_score_is_that_of_its_tokens_up_to_the_end() -> None:
    def logprob(token: int, log_p: float) -> dict[str, dict[str, float]]:
        return {str(token): {"logprob": log_p}, "999": {"logprob": -1.0}}

    log_p = [None, logprob(2, -9), logprob(7, -0.5), logprob(8, -0.25), logprob(3, -0.125), logprob(4, -9)]
    assert answer_logprobs([1, 2], [1, 2, 7, 8, 3, 4], log_p, {3}) == [-0.5, -0.25, -0.125]
    assert answer_logprobs([1, 2], [1, 2, 7, 8, 3, 4], log_p, set()) == [-0.5, -0.25, -0.125, -9]
    assert answer_logprobs([1, 2, 7, 8], [1, 2], log_p, {3}) == []
    assert answer_logprobs([1, 5], [1, 2, 7, 8, 3, 4], log_p, {3}) == [-9, -0.5, -0.25, -0.125]  # the boundary is another token


def test_the_request_to_vllm() -> None:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}
    pixels = np.zeros((20, 30, 3), np.uint8)
    photos = [pixels, pixels + 9]
    request = openai_request(ChatQuery("x", [turn, turn], photos, Sampling(9, 0.5, 0.25, 2, ["."], logprobs=0, seed=0)))
    for message, photo in zip(request.pop("messages"), photos, strict=True):
        image, text = message["content"]
        assert decode_image(decode_base64(image["image_url"]["url"]), 50).rgb == photo.tobytes()
        assert text == turn["content"][1]
    assert request == {
        "max_tokens": 9, "temperature": 0.5, "top_p": 0.25, "n": 2, "stop": ["."], "seed": 0,
        "logprobs": True, "top_logprobs": 0,
    }  # fmt: skip
    plain = openai_request(ChatQuery("x", [turn], [pixels], Sampling(9)))
    assert {key: plain.get(key) for key in ("temperature", "stop", "seed", "logprobs", "top_logprobs")} == {
        "temperature": 0.0, "stop": None, "seed": None, "logprobs": False, "top_logprobs": None
    }  # fmt: skip


def test_a_vllm_server_that_is_gone_is_overloaded() -> None:
    model = VllmModel.__new__(VllmModel)
    model.name, model.client = "x", AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0)
    with pytest.raises(ApiError) as caught:
        asyncio.run(model._create(messages=[{"role": "user", "content": "?"}]))
    assert caught.value.status == 503


def test_vllm_is_started_as_the_service_is_set(systems: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    @contextmanager
    def serving(config: Any, log: Path) -> Iterator[str]:
        started.append(config)
        if config.vllm_python == "/nowhere":
            raise InputError("labels.vllm_python: /nowhere can't be run: give a Python interpreter.")
        yield "http://vllm/v1"

    monkeypatch.setattr("serve.vllm_engine.serving", serving)
    monkeypatch.setattr("serve.vllm_engine.export_for_vllm", lambda folder, out: out.mkdir())
    city = City("toytown", "Toytown", "toytown", systems[0] / "merged")

    def start(**settings: Any) -> VllmModel:
        return VllmModel(ServiceSettings(engine="vllm", **settings), [city])

    model = start(vllm_options="--seed,1", vllm_python="/python", dtype="bfloat16", trust_remote_code=True, request_s=7)
    (config,) = started
    assert (config.vllm_python, config.dtype, config.vllm_arguments) == (
        "/python", "bfloat16", ["--seed", "1", "--trust-remote-code"]
    )  # fmt: skip
    assert Path(config.model).is_dir()
    assert (model.name, model.client.timeout, str(model.client.base_url)) == (config.model, 7, "http://vllm/v1/")
    assert set(model.prefix_lengths) == {address.text() for address in model.gazetteer.addresses}
    assert (model.side, model.end_tokens) == (32, Localizer(city.folder).end_tokens)
    model.resources.close()
    assert not Path(config.model).exists()
    start().resources.close()
    assert started[1].vllm_arguments == []
    with pytest.raises(InputError, match=r"^vllm_python: /nowhere"):
        start(vllm_python="/nowhere")


def test_no_more_addresses_are_scored_at_once_than_is_set() -> None:
    model, now, most = vllm(read, []), 0, 0

    async def handle(request: httpx.Request) -> httpx.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        for _ in range(9):
            await asyncio.sleep(0)
        now -= 1
        return httpx.Response(200, json=read(json.loads(request.content))[1])

    http = httpx.AsyncClient(transport=httpx.MockTransport(handle))
    model.client = AsyncOpenAI(base_url="http://vllm/v1", api_key="none", max_retries=0, http_client=http)
    scores = asyncio.run(model._address_scores("data:image/png;base64,AAAA", list(ANSWERS)))
    assert scores.tolist() == [-0.75, -2.5, -1.5, -3.5]
    assert most == 2
