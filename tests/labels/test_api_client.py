"""Requests to an endpoint, rate limits and the budget."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm import InputError
from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.api_client import AsyncRateLimiter, Budget
from addressvlm.labels.labelers import Request, state_factory
from addressvlm.labels.request_scheduler import OpenAILabeler
from tests.support.label_requests import FACTS, GOOD, KEY, config_of, estimate, requests, run_labeler
from tests.support.openai_endpoint import Endpoint, Reply, refuses, says


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@settings(deadline=None)
@given(
    asks=st.lists(st.tuples(st.floats(0, 30), st.integers(0, 5000)), min_size=1, max_size=40),
    per_minute=st.none() | st.floats(1, 10_000),
    tokens_per_minute=st.none() | st.floats(100, 1e6),
    window=st.floats(0.01, 120),
)
def test_no_window_holds_more_than_its_share(
    asks: list[tuple[float, int]], per_minute: float | None, tokens_per_minute: float | None, window: float
) -> None:
    clock = Clock()
    limiter = AsyncRateLimiter(per_minute, tokens_per_minute, clock)
    turns = []
    for pause, tokens in asks:
        clock.now += pause
        wait = limiter.reserve_slot(tokens)
        assert wait >= 0
        turns.append((clock.now + wait, tokens))
    assert turns == sorted(turns, key=lambda turn: turn[0])
    for start, _ in turns:
        inside = [tokens for at, tokens in turns if start <= at < start + window]
        if per_minute:
            assert len(inside) <= 1 + per_minute / 60 * window + 1e-6
        if tokens_per_minute:
            assert sum(inside[:-1]) <= tokens_per_minute / 60 * window + 1e-3


def test_a_pace_that_is_not_used_up_does_not_pile_up() -> None:
    clock = Clock()
    limiter = AsyncRateLimiter(60, None, clock)
    clock.now += 1000
    assert [round(limiter.reserve_slot(0), 6) for _ in range(3)] == [0, 1, 2]
    assert AsyncRateLimiter(None, None, clock).reserve_slot(1e9) == 0


def test_tokens_and_requests_each_have_their_pace() -> None:
    clock = Clock()
    tokens = AsyncRateLimiter(None, 60, clock)
    assert [round(tokens.reserve_slot(n), 6) for n in (10, 20, 5, 0)] == [0, 10, 30, 35]
    both = AsyncRateLimiter(60, 60, clock)
    assert [round(both.reserve_slot(n), 6) for n in (0.5, 3, 0, 0)] == [0, 1, 4, 5]


@pytest.mark.parametrize("limits", [(60, None), (None, 60)])
def test_one_limit_alone_is_waited_for(limits: tuple[float | None, float | None], monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[float] = []

    async def record(seconds: float) -> None:
        events.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", record)
    limiter = AsyncRateLimiter(*limits, Clock())

    async def story() -> None:
        for _ in range(3):
            await limiter.wait(1)

    asyncio.run(story())
    assert events == [0, 1, 2]


def test_money_is_that_of_tokens_in_and_out_each_at_its_price() -> None:
    budget = Budget(LabelsConfig(usd_per_million_in=2, usd_per_million_out=8))
    assert budget.price(1_000_000, 0) == 2
    assert budget.price(500_000, 250_000) == 3
    assert (budget.spend(500_000, 250_000), budget.tokens, budget.usd) == (3, 750_000, 3)
    assert Budget(LabelsConfig()).price(10**9, 10**9) == 0


@pytest.mark.parametrize(
    ("limits", "fits"),
    [({"budget_tokens": 70}, True), ({"budget_tokens": 69}, False), ({"budget_usd": 90}, True), ({"budget_usd": 89}, False)],
)
def test_the_last_request_may_use_up_the_budget_and_not_more(limits: dict[str, float], fits: bool) -> None:
    async def story() -> None:
        await Budget(priced(**limits), tokens=40, usd=50).reserve(20, 10)  # 30 tokens, 40 dollars

    if fits:
        asyncio.run(story())
    else:
        with pytest.raises(InputError, match="label budget exhausted"):
            asyncio.run(story())


def priced(**limits: Any) -> LabelsConfig:
    return LabelsConfig(usd_per_million_in=1e6, usd_per_million_out=2e6, **limits)  # a dollar a token sent, two a token written


def test_requests_in_flight_count_against_the_budget() -> None:
    async def story() -> list[str]:
        budget, events = Budget(priced(budget_tokens=100), tokens=40), []
        await budget.reserve(20, 10)
        await budget.reserve(20, 10)  # 40 spent and 60 set aside: full
        third = asyncio.create_task(budget.reserve(20, 10))
        await asyncio.sleep(0)
        events.append("waits" if not third.done() else "goes")
        budget.spend(5, 5)
        budget.release(20, 10)  # the first cost 10 of its 30: 50 spent and 30 set aside
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        events.append("waits" if not third.done() else "goes")
        budget.spend(20, 10)
        budget.release(20, 10)  # 80 spent, nothing in flight
        with pytest.raises(InputError, match=r"80 of labels.budget_tokens=100 tokens spent on this run\): raise it"):
            await third
        return events

    assert asyncio.run(story()) == ["waits", "waits"]


@settings(deadline=None, max_examples=40)
@given(
    costs=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=40),
    limit=st.integers(1, 800),
    in_flight=st.integers(1, 8),
    by=st.sampled_from(["budget_tokens", "budget_usd"]),
)
def test_a_budget_is_never_overshot_by_requests_that_cost_no_more_than_reserved(
    costs: list[tuple[int, int]], limit: int, in_flight: int, by: str
) -> None:
    async def story() -> Budget:
        budget, slots = Budget(priced(**{by: limit})), asyncio.Semaphore(in_flight)

        async def ask(sent: int, written: int) -> None:
            async with slots:
                try:
                    await budget.reserve(sent, 50)
                except InputError:
                    return
                await asyncio.sleep(0)
                budget.spend(sent, written)
                budget.release(sent, 50)

        await asyncio.gather(*(ask(*cost) for cost in costs))
        return budget

    budget = asyncio.run(story())
    assert (budget.tokens if by == "budget_tokens" else budget.usd) <= limit


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (refuses(401, f"Incorrect API key provided: {KEY}. Get one."), r"401: Incorrect API key provided: …\. Get one\."),
        (refuses(403, f"header Bearer {KEY}x is not allowed"), "403: header … is not allowed"),
        (refuses(400, "no such parameter"), "400: no such parameter"),
        (refuses(404, "The model `m` does not exist"), "404: The model `m` does not exist.*check .*labels.model"),
        ((404, {}, "<html><title>Not found</title><p>Nothing here</html>"), "404: Not found Nothing here"),
        ((200, {}, {"error": {"message": "invalid model", "code": 404}}), "404: invalid model"),
        (refuses(413, "Payload too large"), "image as too large .413: Payload too large.: lower labels.image_pixels"),
        (refuses(400, "image exceeds the maximum of 5 MB"), "image as too large .400.*lower labels.image_pixels"),
        ((429, {}, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}), "no credit left"),
        (refuses(429, "come back", Retry_After="4000"), "asks to wait 4,000 s"),
    ],
)
def test_what_ends_the_job_at_once(
    endpoint: Endpoint, tmp_path: Path, reply: Reply, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    endpoint.reply = lambda n, body: says(GOOD) if n <= 3 else reply
    with pytest.raises(InputError, match=sentence) as caught:
        run_labeler(config_of(endpoint, concurrency=1), tmp_path, requests(20))
    assert len(endpoint.requests) == 4
    assert estimate(config_of(endpoint), tmp_path, requests(20)).answered == 3
    everything = str(caught.value) + caplog.text + "".join(p.read_text() for p in tmp_path.glob("*.json*"))
    assert KEY not in everything
    assert endpoint.keys[0] == f"Bearer {KEY}"


def test_the_key_never_gets_into_the_cache(endpoint: Endpoint, tmp_path: Path) -> None:
    replies = [says(f"{GOOD} {KEY}"), refuses(400, f"content policy {KEY}"), says(GOOD)]
    endpoint.reply = lambda n, body: replies[min(n, 3) - 1]
    run_labeler(config_of(endpoint, concurrency=1), tmp_path, requests(3))
    assert KEY not in "".join(p.read_text() for p in tmp_path.iterdir())


def test_a_label_keeps_its_words(endpoint: Endpoint, tmp_path: Path) -> None:
    text = GOOD.replace("A row", "The standard bearer stands before a row")
    endpoint.reply = lambda n, body: says(text)
    assert run_labeler(config_of(endpoint), tmp_path, requests(1))[0][0].text == text


def test_the_key_comes_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    config = LabelsConfig(labeler="openai")
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        OpenAILabeler(config, state_factory(config))
    with pytest.raises(ValueError, match="keys come from OPENAI_API_KEY alone"):
        LabelsConfig(base_url="https://me:secret@host/v1")


def filtered() -> Reply:
    reply = says("The street")
    reply[2]["choices"][0]["finish_reason"] = "content_filter"  # type: ignore[index]
    return reply


def refusal() -> Reply:
    reply = says("")
    reply[2]["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "I can't help with that."}  # type: ignore[index]
    return reply


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (filtered(), "refused"),
        (refusal(), "refused"),
        (refuses(400, "The response was filtered due to the content management policy"), "refused"),
        (refuses(400, "Could not process image"), "refused"),
        (says("  "), "empty"),
        ((200, {}, {"choices": []}), "empty"),
    ],
)
def test_refusals_and_empty_answers_are_recorded(endpoint: Endpoint, tmp_path: Path, reply: Reply, problem: str) -> None:
    endpoint.reply = lambda n, body: reply
    labels, stats = run_labeler(config_of(endpoint, max_attempts=2), tmp_path, requests(2))
    assert {(label.source, label.attempts, label.problems) for label in labels.values()} == {
        ("fallback:template", 2, (problem, problem))
    }
    assert (stats.refused, stats.empty) == ((4, 0) if problem == "refused" else (0, 4))
    assert run_labeler(config_of(endpoint, max_attempts=2), tmp_path, requests(2))[1].asked == 0


def test_an_image_that_is_none_is_left_out(endpoint: Endpoint, tmp_path: Path) -> None:
    rows = [*requests(2), Request("bad", b"no picture", FACTS)]
    labels, stats = run_labeler(config_of(endpoint), tmp_path, rows)
    assert (sorted(labels), stats.unreadable, len(endpoint.requests)) == ([0, 1], 1, 2)
    with pytest.raises(InputError, match="image of row bad can't be decoded"):
        OpenAILabeler(config_of(endpoint), state_factory(config_of(endpoint))).label(rows)
