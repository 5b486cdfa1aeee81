"""What vLLM's server replies, as recorded, through OpenAI's real client: scores of addresses, answers, streams."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import APIStatusError, AsyncOpenAI

from addressvlm import InputError
from addressvlm.answers.calibration import Calibration
from addressvlm.answers.priors import Prior
from addressvlm.answers.types import Completion, Sampling, TextChunk, TokenScore
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.questions import ADDRESS_QUESTION
from serve.metrics import ServiceMetrics
from serve.requests import ChatQuery, LocalizeQuery
from serve.vllm_engine import VllmModel, _end_tokens, _image_size

pytestmark = pytest.mark.xdist_group("serve")
PHOTO = np.zeros((20, 30, 3), np.uint8)
PROMPT = [1, 2, 3]
SAID = {  # address -> the tokens of its answer with its end 9, and ln p of each; how many of them tell it from the others
    "Mill Street, Harbour": ([5, 6, 7, 9], [-0.5, -0.25, -4.0, -8.0], 2),
    "Mill Road, Harbour": ([5, 8, 7, 9], [-0.5, -2.0, -4.0, -8.0], 2),
    "Oak Avenue, Harbour": ([4, 7, 9], [-1.5, -4.0, -8.0], 1),
    "Mill, Harbour": ([5, 9], [-0.5, -3.0], 2),
}


def vllm(reply: Any, asked: list[dict[str, Any]]) -> VllmModel:
    """The engine before a server that gives `reply(body)`: a status and a body."""

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        status, body = reply(asked[-1])
        if isinstance(body, str):
            return httpx.Response(status, text=body, headers={"Content-Type": "text/event-stream"})
        return httpx.Response(status, json=body)

    model = VllmModel.__new__(VllmModel)
    model.name, model.metrics, model.semaphore, model.end_tokens = "merged", ServiceMetrics(), asyncio.Semaphore(2), {9}
    model.gazetteer, model.calibration = Gazetteer([Address(*text.split(", ")) for text in SAID]), Calibration()
    model.prefix_lengths = {text: telling for text, (_, _, telling) in SAID.items()}
    http = httpx.AsyncClient(transport=httpx.MockTransport(handle))
    model.client = AsyncOpenAI(base_url="http://vllm/v1", api_key="none", max_retries=0, http_client=http)
    return model


def read(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """What a server of vLLM 0.11 tells of a prompt; after an answer it has a line break of its template."""
    *_, last = body["messages"]
    tokens, log_p = list(PROMPT), [None, -9.0, -9.0]
    if last["role"] == "assistant":
        said, known, _ = SAID[last["content"]]
        tokens, log_p = [*tokens, *said, 11], [*log_p, *known, -9.0]
    told = [
        None if p is None else {str(t): {"logprob": p, "rank": 2}, "77": {"logprob": -0.125, "rank": 1}}
        for t, p in zip(tokens, log_p, strict=True)
    ]
    choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}
    more = {"prompt_logprobs": told if body.get("prompt_logprobs") == 0 else None, "prompt_token_ids": tokens}
    return 200, {"id": "1", "object": "chat.completion", "created": 1, "model": "merged", "choices": [choice], **more}


def test_the_score_of_an_address_is_the_sum_of_the_tokens_that_tell_it() -> None:
    asked: list[dict[str, Any]] = []
    model = vllm(read, asked)
    scores = asyncio.run(model._address_scores("data:image/png;base64,AAAA", list(SAID)))
    assert scores.tolist() == [-0.75, -2.5, -1.5, -3.5]
    assert [body["add_generation_prompt"] for body in asked] == [True, False, False, False, False]
    for body in asked:
        image, text = body["messages"][0]["content"]
        assert (image["image_url"]["url"], text["text"]) == ("data:image/png;base64,AAAA", ADDRESS_QUESTION)
        assert (body["model"], body["max_tokens"], body["return_token_ids"]) == ("merged", 1, True)


def test_only_addresses_that_a_prior_leaves_are_scored_each_as_its_own() -> None:
    asked: list[dict[str, Any]] = []
    model = vllm(read, asked)
    own = tuple(-1.0 if address.street == "Mill" else 0.0 for address in model.gazetteer.addresses)
    model.calibration = Calibration(temperature=0.5, own_prior=own)
    prior = Prior(streets=("Mill Road", "Mill"), weights={"Mill Road": 3})
    found = asyncio.run(model.localize(LocalizeQuery("x", PHOTO, 9, prior, None)))
    scores = np.array([-2.5 / 0.5 + np.log(3), (-3.5 + 1) / 0.5])
    shares = np.exp(scores) / np.exp(scores).sum()
    assert [(c.street, c.probability) for c in found.candidates] == [
        ("Mill Road", pytest.approx(shares[0])),
        ("Mill", pytest.approx(shares[1])),
    ]
    assert len(asked) == 3


def test_answers_keep_their_order_and_what_they_cost() -> None:
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
    whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "merged", "choices": choices, "usage": usage}
    model = vllm(lambda body: (200, whole), [])
    first, second = asyncio.run(model.chat(ChatQuery("x", [], [], Sampling(n=2))))
    assert first == Completion("A.", "stop", (TokenScore("A.", -1.5, (("z", -0.5),)),), 40, 7)
    assert (second.text, second.finish, second.prompt_tokens, first.tokens + second.tokens) == ("", "length", 40, 7)


def test_a_stream_is_told_piece_by_piece() -> None:
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

    asked: list[dict[str, Any]] = []
    told = chunk(0, "", None, 0) + chunk(0, "A", None, 1) + chunk(1, "B", "length", 1) + chunk(0, None, "stop", 2)
    model = vllm(lambda body: (200, told + "data: [DONE]\n\n"), asked)

    async def listen() -> list[Any]:
        return [piece async for piece in model.stream_chat(ChatQuery("x", [], [], Sampling()))]

    assert asyncio.run(listen()) == [
        TextChunk(0, "A", None, (), 40, 1),
        TextChunk(1, "B", "length", (), 40, 1),
        TextChunk(0, "", "stop", (), 40, 2),
    ]
    assert asked[0]["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_what_vllm_refuses_is_the_callers_and_what_fails_is_not() -> None:
    question = ChatQuery("x", [], [], Sampling())
    refuses = vllm(lambda body: (400, {"error": {"message": "The prompt is too long."}}), [])
    told = asyncio.run(refuses.chat(question))
    assert isinstance(told, InputError)
    assert "too long" in str(told)
    with pytest.raises(APIStatusError):
        asyncio.run(vllm(lambda body: (500, {}), []).chat(question))


def test_a_models_ends_and_side_are_read_from_its_files(tmp_path: Path) -> None:
    assert _end_tokens(tmp_path) == set()
    for told, ends in (({"eos_token_id": 7}, {7}), ({"eos_token_id": [7, 8]}, {7, 8}), ({}, set())):
        (tmp_path / "generation_config.json").write_text(json.dumps(told))
        assert _end_tokens(tmp_path) == ends
    for vision, side in (
        ({"image_size": 336}, 336),
        ({"image_size": [224, 448]}, 448),
        ({}, 2048),
        ({"image_size": 9999}, 2048),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"vision_config": vision}))
        assert _image_size(tmp_path) == side
