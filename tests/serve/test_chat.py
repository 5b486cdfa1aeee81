"""The OpenAI chat format: conversations, sampling parameters, responses and streams."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from addressvlm.answers.types import Completion, Sampling, TextChunk, TokenScore
from serve.chat import ChatResponse, conversation, parse_chat, strip_stream
from serve.errors import ApiError
from serve.schemas import ChatRequest

pytestmark = pytest.mark.xdist_group("serve")


def user(*parts: str) -> dict[str, Any]:
    """A turn; what begins with `data:` is an image."""
    content = [
        {"type": "image_url", "image_url": {"url": part}} if part.startswith("data:") else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


def test_a_conversation_keeps_its_order() -> None:
    turns = [
        {"role": "developer", "content": "Be short."},
        user("first", "data:1", "second", "data:22"),
        {"role": "assistant", "content": None},
        user("data:333", "third"),
    ]
    messages, urls = conversation(parse_chat({"model": "x", "messages": turns}))
    assert urls == ["data:1", "data:22", "data:333"]
    image, text = {"type": "image"}, lambda content: {"type": "text", "text": content}
    assert messages == [
        {"role": "system", "content": [text("Be short.")]},
        {"role": "user", "content": [image, image, text("first"), text("second")]},
        {"role": "assistant", "content": []},
        {"role": "user", "content": [image, text("third")]},
    ]


@pytest.mark.parametrize(
    ("turns", "fine"),
    [
        ([user("a" * 50_000), user("b" * 50_000)], True),
        ([user("a" * 50_000), user("b" * 50_001)], False),
        ([user(*["data:"] * 5), user(*["data:"] * 3)], True),
        ([user(*["data:"] * 5), user(*["data:"] * 4)], False),
    ],
)
def test_limits_of_a_conversation_count_all_its_turns(turns: list[dict[str, Any]], fine: bool) -> None:
    def read() -> Any:
        return conversation(parse_chat({"model": "x", "messages": turns}))

    if fine:
        assert read()
        return
    with pytest.raises(ApiError, match="at most"):
        read()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Sampling(100)),
        ({"max_tokens": 7}, Sampling(7)),
        ({"max_tokens": 7, "max_completion_tokens": 9}, Sampling(9)),
        ({"max_completion_tokens": 101}, Sampling(100)),
        ({"temperature": 0.5, "top_p": 0.25, "n": 3, "seed": 0}, Sampling(100, 0.5, 0.25, 3, seed=0)),
        ({"temperature": 1e-38}, Sampling(100)),
        ({"temperature": 0.009}, Sampling(100)),
        ({"temperature": 0.01}, Sampling(100, 0.01)),
        ({"stop": "ab"}, Sampling(100, stop=["ab"])),
        ({"stop": ["a", "", "b"]}, Sampling(100, stop=["a", "b"])),
        ({"logprobs": True}, Sampling(100, logprobs=0)),
        ({"logprobs": True, "top_logprobs": 4}, Sampling(100, logprobs=4)),
        ({"logprobs": False}, Sampling(100)),
    ],
)
def test_sampling_parameters(fields: dict[str, Any], expected: Sampling) -> None:
    sampling = ChatRequest.model_validate({"model": "x", "messages": [user("a")], **fields}).sampling(100)
    assert replace(sampling, stop=tuple(sampling.stop)) == replace(expected, stop=tuple(expected.stop))


def test_log_probabilities_reach_whoever_asks_for_them() -> None:
    answers = [Completion("A b", "stop", (TokenScore("A", -0.5), TokenScore(" b", -1.5)), 9, 3)]
    body = ChatResponse("x", logprobs=True).completion(answers)
    completion = openai.types.chat.ChatCompletion.model_validate(body)
    assert [(t.token, t.logprob) for t in completion.choices[0].logprobs.content] == [("A", -0.5), (" b", -1.5)]
    assert ChatResponse("x", logprobs=False).completion(answers)["choices"][0]["logprobs"] is None


def events(reply: ChatResponse, *chunks: TextChunk | Exception, usage: bool = True) -> list[Any]:
    async def come() -> AsyncIterator[TextChunk]:
        for chunk in chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    async def listen() -> list[str]:
        return [event async for event in reply.events(come(), usage)]

    lines = [event.removeprefix("data: ").strip() for event in asyncio.run(listen())]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_two_answers_in_turns() -> None:
    reply = ChatResponse("x", logprobs=True)
    score = TokenScore("é", float("-inf"), (("a", -0.5),))
    *chunks, usage, done = events(
        reply,
        TextChunk(0, " A ", None, (), 9, 1),
        TextChunk(1, "  ", None, (), 9, 1),
        TextChunk(0, "b ", None, (score,), 9, 2),
        TextChunk(1, " C", "stop", (), 9, 3),
        TextChunk(0, "", "length", (), 9, 4),
    )
    choices = [(c["choices"][0]["index"], c["choices"][0]["delta"], c["choices"][0]["finish_reason"]) for c in chunks]
    assert choices == [
        (0, {"role": "assistant", "content": ""}, None),
        (0, {"content": "A"}, None),
        (1, {"role": "assistant", "content": ""}, None),
        (0, {"content": " b"}, None),
        (1, {"content": "C"}, None),
        (1, {}, "stop"),
        (0, {}, "length"),
    ]
    assert chunks[3]["choices"][0]["logprobs"]["content"] == [
        {
            "token": "é",
            "logprob": -9999.0,
            "bytes": [195, 169],
            "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
        }
    ]
    assert (usage["choices"], usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"]) == ([], 9, 7)
    assert done == "[DONE]"
    assert reply.usage == (9, 7)
    assert len({chunk["id"] for chunk in (*chunks, usage)}) == 1
    for chunk in (*chunks, usage):
        openai.types.chat.ChatCompletionChunk.model_validate(chunk)
    assert all(chunk["usage"] is None for chunk in chunks)  # as OpenAI does, where usage comes at the end


def test_without_usage_no_chunk_has_it() -> None:
    chunk, *_ = events(ChatResponse("x", logprobs=False), TextChunk(0, "A", "stop", (), 9, 1), usage=False)
    assert "usage" not in chunk


def test_a_stream_that_fails_ends_with_an_error_event() -> None:
    response = ChatResponse("x", logprobs=False)
    *_, last = events(response, TextChunk(0, "A", None, (), 9, 1), RuntimeError("secret"))
    assert response.error.status == 500
    assert last["error"]["type"] == "server_error"
    assert "secret" not in str(last)


@given(st.lists(st.text(alphabet="ab \n", max_size=4)))
def test_a_stripped_stream_is_the_stripped_text(chunks: list[str]) -> None:
    text_so_far, blanks = "", ""
    for chunk in chunks:
        text, blanks = strip_stream(blanks, chunk, not text_so_far)
        text_so_far += text
    assert text_so_far == "".join(chunks).strip()


@pytest.mark.parametrize(
    ("turns", "param"),
    [
        ([user("a"), {"role": "assistant", "content": user("data:")["content"]}, user("b")], "messages.1.content"),
        ([user("a"), {"role": "user", "content": [{"type": "image_url"}]}], "messages.1.content"),
        ([user("a"), {"role": "user", "content": [{"type": "text", "text": 5}]}], "messages.1.content"),
        ([{"role": "system", "content": user("data:")["content"]}, user("b")], "messages.0.content"),
    ],
)
def test_an_error_names_the_turn_that_is_wrong(turns: list[dict[str, Any]], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        conversation(parse_chat({"model": "x", "messages": turns}))
    assert (caught.value.status, (caught.value.param or "")[: len(param)]) == (400, param)


def test_what_is_not_supported_is_told_apart_from_what_is_wrong() -> None:
    for fields, message in (
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"modalities": ["text", "audio"]}, "modalities is not supported"),
        ({"temperature": 3}, "less than or equal to 2"),
    ):
        with pytest.raises(ApiError, match=message):
            parse_chat({"model": "x", "messages": [user("a")], **fields})


def test_a_responses_time_is_in_seconds_as_openai_has_it() -> None:
    before = int(time.time())
    head = ChatResponse("x", logprobs=False).head
    assert before <= head["created"] <= time.time()
    assert head["id"] != ChatResponse("x", logprobs=False).head["id"]


LIMITS = {"n": 8, "temperature": 2, "top_p": 1, "seed": 2**63 - 1, "max_tokens": 10**9, "top_logprobs": 20, "logprobs": True}


@pytest.mark.parametrize("change", [
    {}, {"seed": -(2**63), "temperature": 0, "top_p": 1e-9, "n": 1, "top_logprobs": 0, "max_tokens": 1},
    {"stop": ["a" * 200] * 4}, {"stop": "a" * 200}, {"messages": [user("a")] * 64},
])  # fmt: skip
def test_what_is_just_allowed(change: dict[str, Any]) -> None:
    assert parse_chat({"model": "x", "messages": [user("a")], **LIMITS, **change})


@pytest.mark.parametrize("change", [
    {"seed": -(2**63) - 1}, {"seed": 2**63}, {"temperature": -0.01}, {"temperature": 2.01}, {"top_p": 1.01}, {"n": 9},
    {"top_logprobs": 21}, {"top_logprobs": -1}, {"stop": ["a"] * 5}, {"stop": ["a" * 201]}, {"max_tokens": 0},
    {"messages": [user("a")] * 65}, {"max_completion_tokens": 0},
])  # fmt: skip
def test_what_is_just_not_allowed(change: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat({"model": "x", "messages": [user("a")], **LIMITS, **change})
    assert (caught.value.param or "").partition(".")[0] == next(iter(change))
