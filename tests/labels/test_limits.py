"""Limits that all tasks of a job share."""

import asyncio
from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm.config.labels import LabelsConfig
from addressvlm.labels import limits
from addressvlm.labels.costs import LabelStats, price
from addressvlm.labels.limits import (
    PROBE,
    SILENT_S,
    Budget,
    Grant,
    LimitsClient,
    MinuteRateLimiter,
    Report,
    RequestLimits,
    StoppedError,
    fair_shares,
)


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
    limiter = MinuteRateLimiter(per_minute, tokens_per_minute, clock)
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
    limiter = MinuteRateLimiter(60, None, clock)
    clock.now += 1000
    assert [round(limiter.reserve_slot(0), 6) for _ in range(3)] == [0, 1, 2]
    assert MinuteRateLimiter(None, None, clock).reserve_slot(1e9) == 0


def test_tokens_and_requests_each_have_their_pace() -> None:
    clock = Clock()
    tokens = MinuteRateLimiter(None, 60, clock)
    assert [round(tokens.reserve_slot(n), 6) for n in (10, 20, 5, 0)] == [0, 10, 30, 35]
    both = MinuteRateLimiter(60, 60, clock)
    assert [round(both.reserve_slot(n), 6) for n in (0.5, 3, 0, 0)] == [0, 1, 4, 5]


def test_money_is_that_of_tokens_in_and_out_each_at_its_price() -> None:
    config = LabelsConfig(usd_per_million_in=2, usd_per_million_out=8)
    budget = Budget(config)
    assert (price(config, 1_000_000, 0), price(config, 500_000, 250_000), price(LabelsConfig(), 10**9, 10**9)) == (2, 3, 0)
    budget.spend(500_000, 250_000)
    assert (budget.tokens, budget.usd) == (750_000, 3)


@pytest.mark.parametrize(
    ("limits", "fits"),
    [({"budget_tokens": 70}, True), ({"budget_tokens": 69}, False), ({"budget_usd": 90}, True), ({"budget_usd": 89}, False)],
)
def test_the_last_request_may_use_up_the_budget_and_not_more(limits: dict[str, float], fits: bool) -> None:
    ours = RequestLimits(priced(**limits), tokens=40, usd=50)
    grant = ours.exchange(Report(turns=((20, 10),)))  # 30 tokens, 40 dollars
    assert (len(grant.waits), grant.stop is None) == (fits, fits)
    assert fits or "label budget exhausted" in str(grant.stop)


def priced(**limits: Any) -> LabelsConfig:
    return LabelsConfig(usd_per_million_in=1e6, usd_per_million_out=2e6, **limits)  # a dollar a token sent, two a token written


def test_requests_in_flight_count_against_the_budget_of_all_tasks() -> None:
    ours = RequestLimits(priced(budget_tokens=100), tokens=40)
    turn = (20, 10)
    assert len(ours.exchange(Report("a", turns=(turn, turn, turn))).waits) == 2  # 40 spent and 60 set aside: full
    assert ours.exchange(Report("b", turns=(turn,))).waits == ()
    assert ours.exchange(Report("a", released=turn, spent=(5, 5))).stop is None  # 50 spent and 30 set aside
    assert ours.exchange(Report("b", turns=(turn,))).waits == ()
    ours.exchange(Report("a", released=turn, spent=(20, 10)))  # 80 spent, nothing in flight
    grant = ours.exchange(Report("b", turns=(turn,)))
    assert "80 of labels.budget_tokens=100 tokens spent on this run): raise it" in str(grant.stop)
    assert ours.exchange(Report("a")).stop == grant.stop


@settings(deadline=None, max_examples=40)
@given(
    costs=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=40),
    limit=st.integers(1, 800),
    by=st.sampled_from(["budget_tokens", "budget_usd"]),
    in_flight=st.integers(1, 8),
)
def test_a_budget_is_never_overshot_by_requests_that_cost_no_more_than_reserved(
    costs: list[tuple[int, int]], limit: int, by: str, in_flight: int
) -> None:
    ours, flying = RequestLimits(priced(**{by: limit})), deque[tuple[str, tuple[int, int]]]()
    for number, (sent, written) in enumerate(costs):
        task = "abc"[number % 3]
        if ours.exchange(Report(task, turns=((sent, 50),))).waits:
            flying.append((task, (sent, written)))
        while len(flying) >= in_flight:
            name, cost = flying.popleft()
            ours.exchange(Report(name, released=(cost[0], 50), spent=cost))
    for name, cost in flying:
        ours.exchange(Report(name, released=(cost[0], 50), spent=cost))
    assert (ours.budget.tokens if by == "budget_tokens" else ours.budget.usd) <= limit
    assert ours.budget.reserved == (0, 0)


def usable(config: LabelsConfig, clock: Clock | None = None) -> RequestLimits:
    ours = RequestLimits(config, clock=clock or Clock())
    ours.usable = 1
    return ours


def test_places_in_flight_are_shared_and_never_more_than_allowed() -> None:
    ours = usable(LabelsConfig(concurrency=10))
    assert ours.exchange(Report("a", first=True, waiting=20)).in_flight == 10
    assert ours.exchange(Report("b", first=True, waiting=20)).in_flight == 0  # the first one has them all
    assert ours.exchange(Report("a", in_flight=10, waiting=10)).in_flight == 5
    assert ours.exchange(Report("b", waiting=20)).in_flight == 0  # it still has ten
    assert ours.exchange(Report("a", in_flight=5, waiting=10)).in_flight == 5
    assert ours.exchange(Report("b", waiting=20)).in_flight == 5
    ours.exchange(Report("a", last=True))
    assert ours.exchange(Report("b", in_flight=5, waiting=20)).in_flight == 10


@given(limit=st.integers(0, 100), demands=st.dictionaries(st.text("abcdef", max_size=2), st.integers(0, 90), min_size=1))
def test_fair_shares(limit: int, demands: dict[str, int]) -> None:
    shares = fair_shares(limit, demands)
    assert sum(shares.values()) <= limit
    if sum(demands.values()) >= limit:
        assert sum(shares.values()) == limit
    assert all(shares[name] >= min(demand, limit // len(demands)) for name, demand in demands.items())


def test_a_task_that_counted_as_dead_gives_back_nothing_twice() -> None:
    clock = Clock()
    ours = usable(priced(concurrency=4, budget_tokens=1000), clock)
    ours.exchange(Report("a", waiting=4, turns=((20, 10),)))
    clock.now += SILENT_S - 1
    assert ours.exchange(Report("b", waiting=4)).in_flight == 0
    assert (ours.budget.tokens, ours.budget.reserved) == (0, (20, 10))  # so far it is only slow
    clock.now += 2
    ours.exchange(Report("b", in_flight=1, turns=((7, 3),)))
    assert (ours.budget.tokens, ours.budget.reserved) == (30, (7, 3))
    ours.exchange(Report("a", in_flight=1, released=(20, 10), spent=(20, 5)))
    assert (ours.budget.tokens, ours.budget.reserved) == (55, (7, 3))
    ours.exchange(Report("b", released=(7, 3)))
    assert ours.budget.reserved == (0, 0)


def test_what_is_in_flight_counts_as_needed() -> None:
    ours = usable(LabelsConfig(concurrency=10))
    assert ours.exchange(Report("a", waiting=6)).in_flight == 10
    ours.exchange(Report("b", waiting=20))
    assert ours.exchange(Report("a", in_flight=6)).in_flight == 5
    assert ours.exchange(Report("b", waiting=20)).in_flight == 4  # the other one has six


def test_turns_keep_both_paces_and_end_with_the_job() -> None:
    clock = Clock()
    ours = usable(LabelsConfig(requests_per_minute=60, tokens_per_minute=1200), clock)
    assert ours.exchange(Report("a", turns=((5, 5), (20, 40), (1, 1), (1, 1)))).waits == pytest.approx((0, 1, 4, 5))
    assert ours.exchange(Report("b", turns=((1, 1),))).waits == pytest.approx((6,))
    reserved = ours.budget.reserved
    grant = ours.exchange(Report("b", waiting=1, turns=((1, 1),), error="the disk is full"))
    assert (grant.in_flight, grant.waits, grant.stop) == (0, (), "the disk is full")
    assert ours.budget.reserved == reserved
    assert ours.exchange(Report("a", waiting=2, turns=((1, 1),), error="another reason")) == Grant(
        0, False, (), "the disk is full"
    )


def test_figures_are_of_all_tasks_those_that_ended_too() -> None:
    clock = Clock()
    ours = usable(LabelsConfig(), clock)
    ours.exchange(Report("a", stats=LabelStats(asked=1)))
    ours.exchange(Report("a", stats=LabelStats(asked=3)))
    ours.exchange(Report("b", stats=LabelStats(asked=10)))
    assert ours.stats().asked == 13
    ours.exchange(Report("a", first=True, stats=LabelStats(asked=100)))  # began anew
    ours.exchange(Report("b", last=True, stats=LabelStats(asked=20)))
    assert ours.stats().asked == 123
    clock.now += SILENT_S + 1
    ours.exchange(Report("c"))
    assert ours.stats().asked == 123


def test_a_task_that_dies_leaves_its_places_and_what_it_may_have_spent() -> None:
    clock = Clock()
    ours = usable(priced(concurrency=4, budget_tokens=100), clock)
    assert len(ours.exchange(Report("a", waiting=4, turns=((20, 10),) * 2)).waits) == 2
    assert ours.exchange(Report("b", waiting=4)).in_flight == 0
    clock.now += SILENT_S + 1
    assert ours.exchange(Report("b", waiting=4)).in_flight == 4
    assert (ours.budget.tokens, ours.budget.reserved) == (60, (0, 0))
    ours.exchange(Report("b", turns=((20, 10),)))
    ours.exchange(Report("b", first=True))  # its task was killed and began anew
    assert (ours.budget.tokens, ours.budget.reserved) == (90, (0, 0))


@pytest.mark.parametrize("silent", [False, True])
def test_what_a_task_settled_is_not_given_back_or_spent_again_when_it_ends(silent: bool) -> None:
    clock = Clock()
    ours = usable(priced(budget_tokens=1000), clock)
    ours.exchange(Report("a", waiting=2, turns=((20, 10),) * 2))
    ours.exchange(Report("b", waiting=1, turns=((7, 3),)))
    ours.exchange(Report("a", released=(40, 20), spent=(30, 5)))
    if silent:
        clock.now += SILENT_S / 2
        ours.exchange(Report("b", in_flight=1))
        clock.now += SILENT_S / 2 + 1
        ours.exchange(Report("b", in_flight=1))
    else:
        ours.exchange(Report("a", last=True))
    assert (ours.budget.tokens, ours.budget.reserved) == (35, (7, 3))


def test_a_dozen_useless_answers_and_no_usable_one_end_the_job() -> None:
    ours = RequestLimits(LabelsConfig(concurrency=64, model="m"))
    assert ours.exchange(Report("a", waiting=64)).in_flight == PROBE
    grant = ours.exchange(Report("a", in_flight=0, waiting=64, useless=Counter({"limit: raise it": PROBE - 1})))
    assert (grant.in_flight, grant.probing, grant.stop) == (1, True, None)
    grant = ours.exchange(Report("a", waiting=64, useless=Counter({"empty: it has no text": 1})))
    assert grant.in_flight == 0
    assert "first 12 answers of m are all useless (11 times: limit: raise it; 1 times: empty" in str(grant.stop)
    fine = RequestLimits(LabelsConfig(concurrency=64))
    fine.exchange(Report("a", usable=1))
    assert fine.exchange(Report("a", waiting=64, useless=Counter({"limit": 99}))) == Grant(64)
    each = {f"reason {n}": n for n in range(1, 5)}
    why = str(RequestLimits(LabelsConfig()).exchange(Report("a", useless=Counter({**each, "worst": 6}))).stop)
    assert "first 16 answers" in why
    assert "(6 times: worst; 4 times: reason 4; 3 times: reason 3)" in why


def client_of(*grants: Grant, **settings: Any) -> tuple[LimitsClient, list[Report]]:
    """A client, and the reports that it makes; the last grant goes on for ever."""
    reports: list[Report] = []
    left = list(grants)

    async def exchange(report: Report) -> Grant:
        reports.append(report)
        return left.pop(0) if len(left) > 1 else left[0]

    return LimitsClient(exchange, LabelsConfig(**settings), LabelStats(asked=7), "a"), reports


def test_the_first_and_the_last_report_are_called_so_and_hold_what_was_done() -> None:
    async def story() -> list[Report]:
        client, reports = client_of(Grant(4), budget_tokens=100)
        run = asyncio.create_task(client.run())
        waiting = asyncio.create_task(client.acquire(lambda: (5, 6)))
        while not client._turns:
            await asyncio.sleep(0)
        client.stop("the disk is full")
        with pytest.raises(StoppedError):
            await waiting
        client.settle((5, 6), (5, 1), answered=True)
        client.judge(None)
        client.judge("empty")
        await client.close(run)
        return reports

    reports = asyncio.run(story())
    assert [report.first for report in reports] == [True] + [False] * (len(reports) - 1)
    assert [report.last for report in reports] == [False] * (len(reports) - 1) + [True]
    assert {(report.task, report.stats.asked) for report in reports} == {("a", 7)}
    last = reports[-1]
    assert (last.error, last.released, last.spent) == ("the disk is full", (5, 6), (5, 1))
    assert (sum(report.usable for report in reports), last.useless) == (1, {"empty": 1})


@pytest.mark.parametrize("key", ["budget_tokens", "budget_usd", "requests_per_minute", "tokens_per_minute", None])
def test_each_limit_alone_makes_a_request_wait_for_its_turn(monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds:
            slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(limits.asyncio, "sleep", note)
    prices = {"usd_per_million_in": 1.0, "usd_per_million_out": 1.0}

    async def story() -> tuple[int, int]:
        client, reports = client_of(Grant(4, waits=(2.5,)), **({key: 10**6, **prices} if key else {}))
        run = asyncio.create_task(client.run())
        reserved = await client.acquire(lambda: (5, 6))
        asked = [report.turns for report in reports if report.turns]
        assert asked == ([((5, 6),)] if key else [])
        await client.close(run)
        return reserved

    assert asyncio.run(story()) == (5, 6)
    assert slept == ([2.5] if key else [])


def test_a_request_that_is_given_up_leaves_its_place() -> None:
    async def story() -> None:
        client, _ = client_of(Grant(1))
        run = asyncio.create_task(client.run())

        def fails() -> tuple[int, int]:
            raise KeyError

        for _ in range(3):
            with pytest.raises(KeyError):
                await client.acquire(fails)
        first = await client.acquire(lambda: (1, 1))
        given_up, waits = (asyncio.create_task(client.acquire(lambda: (2, 2))) for _ in range(2))
        await asyncio.sleep(0)
        given_up.cancel()
        client.settle(first)
        assert await waits == (2, 2)
        await client.close(run)

    asyncio.run(asyncio.wait_for(story(), 60))


def test_while_answers_are_on_trial_each_is_judged_before_the_next_request() -> None:
    async def story() -> tuple[bool, int]:
        client, reports = client_of(Grant(1, probing=True))
        run = asyncio.create_task(client.run())
        first = await client.acquire(lambda: (1, 1))
        following = asyncio.create_task(client.acquire(lambda: (1, sum(report.useless.total() for report in reports))))
        await asyncio.sleep(0)
        client.settle(first, answered=True)
        for _ in range(5):
            await asyncio.sleep(0)
        unjudged = following.done()
        client.judge("empty")
        told = (await following)[1]
        await client.close(run)
        return unjudged, told

    assert asyncio.run(asyncio.wait_for(story(), 60)) == (False, 1)  # it was told when the next one began


def test_reasons_of_useless_answers_are_kept_only_until_one_is_usable() -> None:
    limits = RequestLimits(LabelsConfig())
    limits.exchange(Report(useless=Counter({"refused: a": 1})))
    for number in range(3):
        limits.exchange(Report(usable=1, useless=Counter({f"refused: {number}": 1})))
    assert list(limits.useless) == ["refused: a"]


def test_a_task_takes_no_further_place_while_its_report_is_on_its_way() -> None:
    """Others may get at that moment what the report leaves."""

    async def story() -> bool:
        arrives = asyncio.Event()
        arrives.set()

        async def exchange(report: Report) -> Grant:
            await arrives.wait()
            return Grant(4)

        client = LimitsClient(exchange, LabelsConfig(), LabelStats())
        run = asyncio.create_task(client.run())
        for _ in range(2):
            await client.acquire(lambda: (1, 1))
        arrives.clear()
        client._changed.set()
        for _ in range(5):
            await asyncio.sleep(0)
        third = asyncio.create_task(client.acquire(lambda: (1, 1)))
        for _ in range(5):
            await asyncio.sleep(0)
        waits = not third.done()
        arrives.set()
        await third
        await client.close(run)
        return waits

    assert asyncio.run(story())
