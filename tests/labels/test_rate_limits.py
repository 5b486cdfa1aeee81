"""Limits, budgets and estimates of the labeler"""

import asyncio
import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from addressvlm import InputError
from addressvlm.config import validate
from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.api_client import AsyncRateLimiter, Budget
from addressvlm.labels.costs import CostEstimate, image_tokens, input_tokens, text_tokens
from addressvlm.labels.facts import Facts
from addressvlm.labels.labelers import Request, state_factory


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
    pace = AsyncRateLimiter(per_minute, tokens_per_minute, clock)
    turns = []
    for pause, tokens in asks:
        clock.now += pause
        wait = pace.reserve_slot(tokens)
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
    pace = AsyncRateLimiter(60, None, clock)
    clock.now += 1000
    assert [round(pace.reserve_slot(0), 6) for _ in range(3)] == [0, 1, 2]
    assert AsyncRateLimiter(None, None, clock).reserve_slot(1e9) == 0


def test_tokens_and_requests_each_have_their_pace() -> None:
    clock = Clock()
    tokens = AsyncRateLimiter(None, 60, clock)
    assert [round(tokens.reserve_slot(n), 6) for n in (10, 20, 5, 0)] == [0, 10, 30, 35]
    both = AsyncRateLimiter(60, 60, clock)
    assert [round(both.reserve_slot(n), 6) for n in (0.5, 3, 0, 0)] == [0, 1, 4, 5]


@pytest.mark.parametrize("limits", [(60, None), (None, 60)])
def test_one_limit_alone_is_waited_for(limits: tuple[float | None, float | None], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []

    async def noted(seconds: float) -> None:
        told.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", noted)
    pace = AsyncRateLimiter(*limits, Clock())

    async def story() -> None:
        for _ in range(3):
            await pace.wait(1)

    asyncio.run(story())
    assert told == [0, 1, 2]


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
def test_the_last_ask_may_use_up_the_budget_and_not_more(limits: dict[str, float], fits: bool) -> None:
    async def story() -> None:
        await Budget(priced(**limits), tokens=40, usd=50).reserve(20, 10)  # 30 tokens, 40 dollars

    if fits:
        asyncio.run(story())
    else:
        with pytest.raises(InputError, match="label budget exhausted"):
            asyncio.run(story())


def priced(**limits: Any) -> LabelsConfig:
    return LabelsConfig(usd_per_million_in=1e6, usd_per_million_out=2e6, **limits)  # a dollar a token sent, two a token written


def test_asks_in_flight_count_against_the_budget() -> None:
    async def story() -> list[str]:
        budget, told = Budget(priced(budget_tokens=100), tokens=40), []
        await budget.reserve(20, 10)
        await budget.reserve(20, 10)  # 40 spent and 60 set aside: full
        third = asyncio.create_task(budget.reserve(20, 10))
        await asyncio.sleep(0)
        told.append("waits" if not third.done() else "goes")
        budget.spend(5, 5)
        budget.release(20, 10)  # the first cost 10 of its 30: 50 spent and 30 set aside
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        told.append("waits" if not third.done() else "goes")
        budget.spend(20, 10)
        budget.release(20, 10)  # 80 spent, nothing in flight
        with pytest.raises(InputError, match=r"80 of labels.budget_tokens=100 tokens spent on this run\): raise it"):
            await third
        return told

    assert asyncio.run(story()) == ["waits", "waits"]


@settings(deadline=None, max_examples=40)
@given(
    costs=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=40),
    limit=st.integers(1, 800),
    in_flight=st.integers(1, 8),
    by=st.sampled_from(["budget_tokens", "budget_usd"]),
)
def test_a_budget_is_never_overshot_by_what_costs_no_more_than_was_set_aside(
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


def test_a_budget_in_money_needs_prices() -> None:
    with pytest.raises(InputError, match="budget_usd needs the prices usd_per_million_in and usd_per_million_out"):
        validate({"labels": {"budget_usd": 5}}, "test")


@pytest.mark.parametrize(
    ("rule", "size", "tokens"),
    [
        ({"image_base": 85, "image_each": 170}, (336, 336), 85 + 170),
        ({"image_base": 85, "image_each": 170}, (1024, 1024), 765),
        ({"image_base": 85, "image_each": 170}, (2048, 4096), 1105),
        ({"image_base": 85, "image_each": 170, "image_detail": "low"}, (2048, 4096), 85),
        ({}, (336, 336), 2833 + 5667),
        ({"image_rule": "patches", "image_each": 1.0}, (1024, 1024), 1024),
        ({"image_rule": "patches", "image_each": 1.62}, (336, 336), 197),
        ({"image_rule": "patches", "image_each": 1.0}, (4000, 4000), 1536),
        ({"image_rule": "fixed", "image_base": 576}, (336, 336), 576),
        ({"image_base": 85, "image_each": 170, "image_pixels": 512}, (1024, 1024), 85 + 170),
        ({"send_image": False}, (336, 336), 0),
    ],
)
def test_tokens_of_an_image(rule: dict[str, Any], size: tuple[int, int], tokens: int) -> None:
    assert image_tokens(LabelsConfig(**rule), *size) == tokens


def test_tokens_of_a_text() -> None:
    assert text_tokens("The camera looks along the road.") == 8
    assert text_tokens("東京都の道") == 5


def test_a_plan_says_what_it_costs() -> None:
    config = LabelsConfig(
        usd_per_million_in=0.5, usd_per_million_out=2, requests_per_minute=100, tokens_per_minute=60_000, max_tokens=100
    )
    plan = CostEstimate(
        config,
        rows=1000,
        answered=400,
        partly_answered=10,
        tokens_in=600_000,
        other_answers=7,
        spent_tokens=12_345,
        spent_usd=0.5,
    )
    assert (plan.rows_left, plan.tokens_out) == (600, 60_000)
    assert plan.minutes() == 11  # 660,000 tokens
    text = plan.text()
    for part in (
        "1,000 rows: 400 have cached answers, 600 will be sent (10 of them again)",
        "7 cached answers are to other prompts",
        "about 600,000 in (1,000 a row), at most 60,000 out",
        "at most 0.42 US dollars (0.3 for tokens in, 0.12 for tokens out); spent so far 12,345 tokens, 0.5 US dollars",
        "about 11.0 min with 16 requests in flight",
    ):
        assert part in text
    assert "cost: unknown without labels.usd_per_million_in" in CostEstimate(LabelsConfig(), rows=1).text()
    assert "tokens: " not in CostEstimate(LabelsConfig(), rows=1, answered=1).text()


@pytest.mark.parametrize(
    ("limits", "minutes"),
    [
        ({}, 5.0),  # 600 rows, ten at a time, 5 s each
        ({"requests_per_minute": 100}, 6.0),
        ({"tokens_per_minute": 33_000}, 20.0),
        ({"requests_per_minute": 1000, "tokens_per_minute": 1e9}, 5.0),
        ({"requests_per_minute": 20, "tokens_per_minute": 33_000}, 30.0),
    ],
)
def test_the_tightest_limit_decides_how_long_it_takes(limits: dict[str, float], minutes: float) -> None:
    config = LabelsConfig(concurrency=10, max_tokens=100, **limits)
    assert CostEstimate(config, rows=1000, answered=400, tokens_in=600_000).minutes() == pytest.approx(minutes)


def test_an_estimate_counts_the_prompt_and_the_image() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (336, 336)).save(buffer, "PNG")
    config = LabelsConfig(labeler="openai", base_url="http://localhost/v1", image_rule="fixed", image_base=576)
    row = state_factory(config)(Request("1", buffer.getvalue(), Facts("Mill Street", "Harbour")))
    said = "".join(m["content"] if isinstance(m["content"], str) else m["content"][1]["text"] for m in row.messages())
    assert 576 + len(said) / 4 <= input_tokens(row) < 576 + len(said) / 4 + 30
