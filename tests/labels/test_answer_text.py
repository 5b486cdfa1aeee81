"""What of an endpoint's answer becomes a text, whatever shape it has."""

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from addressvlm import InputError
from addressvlm.labels.answer_text import completion_text, cut_reasoning, token_counts
from addressvlm.labels.api_client import EndpointClient, TransientError
from addressvlm.labels.labelers import FALLBACK
from addressvlm.labels.limits import PROBE
from addressvlm.labels.response_cache import CachedAnswer, ResponseCache
from addressvlm.labels.validator import LabelValidator
from tests.support.label_requests import FACTS, GOOD, config_of, requests, run_labeler
from tests.support.openai_endpoint import Endpoint, Reply, says

THOUGHT = "Let me see: the hint says Mill Street."
WRAPPINGS = [
    "<think>\n{}\n</think>\n\n{}",
    "{}\n</think>\n\n{}",  # the prompt opened it
    "<think></think>{1}",
    "<thinking>{}</thinking>\n{}",
    "<thought>{}</thought>{}",
    "<reasoning effort='low'>{}</reasoning>{}",
    "<think>{0}<think>{0}</think></think>{1}",
    "<seed:think>{}</seed:think>{}",
    "[THINK]{}[/THINK]{}",
    "◁think▷{}◁/think▷{}",
    "<|START_THINKING|>{}<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>",
    "<|begin_of_thought|>{}<|end_of_thought|>\n<|begin_of_solution|>{}<|end_of_solution|>",
    "<think>{}</think><answer>{}</answer>",
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final <|constrain|>text<|message|>{}",
    "analysis{}assistantfinal{}",
    "<|channel>thought\n{}<channel|>{}",
    "```thinking\n{}\n```\n{}",
    "&lt;think&gt;{}&lt;/think&gt;{}",
    '<details type="reasoning" done="true"><summary>Thought</summary>{}</details>{}',
]


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_reasoning_is_cut_off_in_any_wrapping(wrapping: str) -> None:
    assert cut_reasoning(wrapping.format(THOUGHT, GOOD)) == (GOOD, True)
    assert cut_reasoning(f" {GOOD}\n") == (GOOD, False)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("<think>a ``` b</think>c", "c"),  # a fence within a tag ends nothing
        ("```thinking\na </think> b\n```\nc", "c"),
        ("a ``` b", "a ``` b"),  # a fence that no reasoning began
        ("a <think>b</think> c <think>d</think> e", "a  c  e"),
        ("<|channel|>final<|message|>one<|end|><|channel|>analysis<|message|>two<|end|>", "one"),
        ("<|channel|>FINAL<|message|>one<|return|>two", "one"),
        ("<Answer>a</Answer>", "a"),
        ("<|begin_of_box|>a<|end_of_box|>", "a"),
    ],
)
def test_each_mark_ends_what_it_began(text: str, kept: str) -> None:
    assert cut_reasoning(text) == (kept, kept != text)


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{THOUGHT}",
        f'<think effort="low">{THOUGHT}',
        f'<details type="reasoning"><summary>Thought</summary>{THOUGHT}',
        f"<|channel|>analysis<|message|>{THOUGHT}",
        f"analysis{THOUGHT}",
        "[THINK]a",
    ],
)
def test_reasoning_that_never_ends_leaves_no_text(text: str) -> None:
    assert cut_reasoning(text) == ("", True)


@pytest.mark.parametrize(
    "piece",
    ["<think>", "</think>", "<think ", "```thinking", "```", "<|channel|>final<|message|>", "<details ", "analysisAssistant "],
)
def test_cutting_takes_linear_time(piece: str) -> None:
    start = time.process_time()
    cut_reasoning(piece * 20_000)
    assert time.process_time() - start < 3  # quadratic time would be minutes


def completion(content: Any = None, finish: str = "stop", **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content, **fields}, "finish_reason": finish}]}


@pytest.mark.parametrize(
    "response",
    [
        completion([{"type": "text", "text": GOOD[:20]}, {"type": "text", "text": GOOD[20:]}]),
        completion(
            [{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]}, {"type": "text", "text": GOOD}]
        ),  # Mistral
        completion([{"type": "reasoning", "text": THOUGHT}, {"type": "output_text", "text": GOOD}]),
        completion([{"type": "text", "text": {"value": GOOD}}]),
        completion([GOOD]),
        completion(GOOD, reasoning_content=THOUGHT),  # vLLM, DeepSeek
        completion(GOOD, reasoning=THOUGHT, reasoning_details=[{"type": "reasoning.text", "text": THOUGHT}]),  # OpenRouter
        completion(GOOD, refusal=None, annotations=[], tool_calls=[]),
    ],
)
def test_the_text_is_that_of_its_parts_without_reasoning(response: Any) -> None:
    assert completion_text(response, 256) == (GOOD, None, None)


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (completion(None, "length", reasoning_content=THOUGHT), "limit: labels.max_tokens=256 was used up by reasoning"),
        (completion(f"<think>{THOUGHT}", "length"), "limit: labels.max_tokens=256 was used up by reasoning"),
        (completion("", "length"), "limit: labels.max_tokens=256 was reached before the text"),
        (completion(None, "MAX_TOKENS", reasoning=THOUGHT), "raise labels.max_tokens"),
        *((completion("", finish), "limit: .*was reached") for finish in ("MODEL_LENGTH", "max_tokens", "max_output_tokens")),
        (completion(None, reasoning_content=GOOD), "reasoning: .*reasoning parser"),
        *((completion("", **{field: THOUGHT}), "reasoning: ") for field in ("reasoning", "reasoning_details", "thinking")),
        (completion([{"type": "redacted_thinking", "data": "x"}]), "reasoning: "),
        (completion([{"thinking": THOUGHT}]), "reasoning: "),
        (completion(None, function_call={"name": "f"}, thinking=THOUGHT), "shape: it calls a tool"),
        (completion(None, "tool_calls", tool_calls=[{"id": "1"}]), "shape: it calls a tool"),
        (completion({"a": 1}), "shape: its content is neither"),
        (completion(7), "shape: its content"),
        ({"choices": "x"}, "shape"),
        ({"choices": {"0": 1}}, "shape"),
        ({"choices": [None]}, "shape"),
        ({"choices": [{"message": "text"}]}, "shape"),
        ({"message": {"content": GOOD}, "done": True}, "shape"),  # Ollama's own route
        ([1], "shape"),
        ("text", "shape"),
        (None, "shape"),
    ],
)
def test_where_there_is_no_text_the_reason_is_named(response: Any, why: str) -> None:
    text, refusal, unusable = completion_text(response, 256)
    assert (text, refusal) == (None, None)
    assert unusable is not None
    assert re.search(why, unusable), unusable


@pytest.mark.parametrize(
    ("response", "refusal"),
    [
        (completion([{"type": "refusal", "refusal": "I can't."}]), "I can't."),
        (completion([{"type": "refusal", "text": "I won't."}, {"refusal": "No."}]), "I won't. No."),
        (completion([{"type": "refusal"}, {"type": "text", "text": GOOD}]), "refused"),
        (completion(None, refusal="I can't."), "I can't."),
        (completion(GOOD, refusal="I can't."), "I can't."),
        (completion(GOOD, "Content_Filter"), "content filter"),
    ],
)
def test_refusals_in_any_place(response: Any, refusal: str) -> None:
    assert completion_text(response, 256) == (None, refusal, None)


@pytest.mark.parametrize(
    "response",
    [{"choices": []}, completion(""), completion(None), completion([]), completion(" \n", reasoning=None, tool_calls=[])],
)
def test_an_answer_may_be_empty(response: Any) -> None:
    assert completion_text(response, 256) == (None, None, None)


@pytest.mark.parametrize(
    ("value", "count"),
    [(3, 3), (3.9, 3), (0, 0), (10**8, 10**8), (10**8 + 1, 0), (-1, 0), (True, 0), ("7", 0), (None, 0), (float("nan"), 0)],
)
def test_tokens_in_and_out_are_those_of_the_endpoint(value: Any, count: int) -> None:
    assert token_counts({"prompt_tokens": value, "completion_tokens": 5}) == (count, 5)
    assert token_counts({"prompt_tokens": 4, "completion_tokens": value}) == (4, count)


@given(
    usage=st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens"]), inner)
        ),
    )
)
def test_counts_of_any_shape_are_numbers(usage: Any) -> None:
    assert all(isinstance(count, int) and 0 <= count <= 10**8 for count in token_counts(usage))


SHAPES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.sampled_from([GOOD, "<think>", "stop", "length", "text", "²", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "choices message content finish_reason usage error code status refusal reasoning type text thinking tool_calls "
                "prompt_tokens completion_tokens".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(response=SHAPES)
def test_an_answer_of_any_shape_has_one_outcome(response: Any) -> None:
    for shape in (response, {"choices": [response]}, {"choices": [{"message": response}]}, completion(response)):
        outcome = completion_text(shape, 256)
        assert sum(part is not None for part in outcome) <= 1
        assert all(part is None or (isinstance(part, str) and part) for part in outcome)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"Sure! {GOOD}", "speaks to the reader"),
        (f"Here is the explanation: {GOOD}", "speaks to the reader"),
        (f"Certainly, this is it. {GOOD}", "speaks to the reader"),
        (f"{GOOD} Let me know if you need more.", "speaks to the reader"),
        (f"{GOOD} (52 words)", "speaks to the reader"),
        (f"Voici la description : {GOOD}", "speaks to the reader"),
        (f"assistant: {GOOD}", "role"),
        (f"assistant\n{GOOD}", "role"),
        (f"**Answer:** {GOOD}", "markup"),
        (f"Explanation: {GOOD}", "role"),
        (f"{GOOD}\nUser: What is this?", "role"),
        (f'{{"label": "{GOOD}"}}', "JSON"),
        (f'"{GOOD}"', "quotation marks"),
        (f"<p>{GOOD}</p>", "special token or a tag"),
        (f"{GOOD}<|im_end|>", "special token"),
        (f"{GOOD}</s>", "special token"),
        (f"<image> {GOOD}", "special token"),
        (f"[INST] {GOOD}", "special token"),
        (f"{GOOD}<｜end▁of▁sentence｜>", "special token"),
        (f"{GOOD} €PAD€", "special token"),  # of the base model alone
        (GOOD.replace(" ", "\u200b ", 1), "control"),
        (GOOD.replace(" ", "\x1b[0m ", 1), "control"),
        (GOOD.replace("Mill Street", "[Mill Street](https://x.y)"), "markup"),
        (GOOD.replace("Mill Street", "*Mill Street*"), "markup"),
        (GOOD.replace("Mill Street", "`Mill Street`"), "markup"),
        (GOOD.replace("Mill", "Mill &amp;"), "markup"),
        (f"1. {GOOD}", "markup"),
    ],
)
def test_what_is_no_plain_text_is_refused_with_the_reason(text: str, why: str) -> None:
    validator = LabelValidator(["Mill Street", "King Street"], ["Harbour"], special_tokens=["€PAD€", ""])
    assert validator.problems(GOOD, FACTS) == []
    assert why in "; ".join(problem.text for problem in validator.problems(text, FACTS))


def reply_of(body: Any) -> Reply:
    return 200, {"Content_Type": "application/json"}, body if isinstance(body, str) else json.loads(json.dumps(body))


ODD = [
    {"choices": "x"}, {"choices": [1]}, [], "[" * 100_000, {"choices": [{"message": {"content": GOOD}}], "usage": [1]}, "7",
    {"choices": [{"message": {"content": [None]}}]}, {"error": {"code": "²"}}, {"error": [1]},
    {"choices": [{"error": {"code": 502, "message": "gone"}, "message": {"content": "Half"}}]},
]  # fmt: skip


def test_an_odd_answer_is_the_failure_of_its_row_alone(endpoint: Endpoint, tmp_path: Path) -> None:
    """All other answers are recorded, and none is paid twice."""
    endpoint.reply = lambda n, body: reply_of(ODD[n // 6 % len(ODD)]) if n % 6 == 5 else says(GOOD)
    labels, stats = run_labeler(config_of(endpoint, concurrency=8), tmp_path, requests(100))
    assert {label.source for label in labels.values()} == {"openai:m"}
    assert len(labels) == 100
    assert (stats.unusable > 5, stats.again.keys()) == (True, {"500", "no JSON", "broken off"})
    assert ResponseCache(tmp_path).answers.total() == stats.answered
    assert run_labeler(config_of(endpoint, concurrency=8), tmp_path, requests(100))[1].asked == 0


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            completion(None, "length", reasoning_content=THOUGHT),
            r"labels\.max_tokens=256 was used up by reasoning .*raise labels\.max_tokens",
        ),
        (completion(f"```json\n{{}}\n```\n{GOOD}"), "form"),
        (completion(None), "empty"),
        (completion(None, refusal="no"), "refused: no"),
        ({"choices": "x"}, "shape"),
        (
            completion(
                "Das ist die Mill Street und sie liegt in Harbour, wo viele alte Häuser aus Stein stehen und Bäume wachsen."
            ),
            "language",
        ),
    ],
)
def test_a_setting_that_makes_every_answer_useless_stops_the_job(
    endpoint: Endpoint, tmp_path: Path, body: Any, why: str
) -> None:
    endpoint.reply = lambda n, _: reply_of(body)
    with pytest.raises(InputError, match=f"first {PROBE} answers of m are all useless .*{why}"):
        run_labeler(config_of(endpoint, concurrency=64), tmp_path, requests(40))
    assert len(endpoint.requests) == PROBE


def test_a_few_useless_answers_among_others_are_counted(endpoint: Endpoint, tmp_path: Path) -> None:
    used_up = completion(None, "length", reasoning_content=THOUGHT)
    endpoint.reply = lambda n, _: reply_of(used_up) if n > 2 else says(GOOD)
    labels, stats = run_labeler(config_of(endpoint, max_attempts=2, concurrency=1), tmp_path, requests(20))
    assert (stats.unusable, len(labels)) == (36, 20)
    assert labels[19].problems == ("limit", "limit")
    assert labels[19].source == FALLBACK


def test_a_request_that_timed_out_counts_as_spent(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been charged, so the budget of this job and of the next counts it in full."""
    send, failures = EndpointClient.send, [TransientError("no answer within 60 s", "time-out", paid=True)]

    async def time_out_once(client: EndpointClient, body: bytes) -> CachedAnswer:
        if failures:
            raise failures.pop()
        return await send(client, body)

    monkeypatch.setattr(EndpointClient, "send", time_out_once)
    prices = {"usd_per_million_in": 1e6, "usd_per_million_out": 1e6, "image_rule": "fixed", "image_base": 600}
    config = config_of(endpoint, concurrency=1, **prices)
    _, stats = run_labeler(config, tmp_path, requests(2))
    assert (stats.lost, stats.again["time-out"], stats.rows) == (1, 1, 2)
    assert stats.lost_tokens > 600 + config.max_tokens
    assert ResponseCache(tmp_path).tokens == stats.lost_tokens + stats.tokens_in + stats.tokens_out == stats.usd


def test_a_clock_that_fails_ends_the_job_and_keeps_its_answers(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from addressvlm.labels import request_scheduler

    async def broken(_: Any) -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    monkeypatch.setattr(request_scheduler.RequestScheduler, "_tick", broken)
    with pytest.raises(ZeroDivisionError):
        run_labeler(config_of(endpoint), tmp_path, requests(200))
    assert ResponseCache(tmp_path).answers.total() == len(endpoint.requests) < 200


def test_a_text_that_the_validator_cannot_read_is_rejected(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def problems(self: LabelValidator, text: str, facts: Any) -> list[Any]:
        return [] if "again" in text else [][1]

    monkeypatch.setattr(LabelValidator, "problems", problems)
    endpoint.reply = lambda n, body: says(GOOD if n == 1 else f"{GOOD} again")
    labels, _ = run_labeler(config_of(endpoint, concurrency=1), tmp_path, requests(3))
    assert sorted(label.problems for label in labels.values()) == [(), (), ("text",)]
