"""Rows are paid for once, within the limits, and failed requests are retried."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from addressvlm import InputError
from addressvlm.config.labels import LabelsConfig
from addressvlm.labels import request_scheduler
from addressvlm.labels.facts import Facts
from addressvlm.labels.labelers import CachedLabeler, Request, state_factory
from addressvlm.labels.limits import MinuteRateLimiter, RequestLimits
from addressvlm.labels.request_scheduler import OpenAILabeler
from addressvlm.labels.response_cache import MAX_LINE, MAX_TEXT, ResponseCache, open_for_writing
from tests.support.full_disk import disk_of
from tests.support.label_requests import BAD, FACTS, GOOD, config_of, estimate, requests, run_labeler
from tests.support.openai_endpoint import Endpoint, Reply, cuts, drops, refuses, says


def test_only_rows_without_a_cached_answer_are_sent(endpoint: Endpoint, tmp_path: Path) -> None:
    config = config_of(endpoint)
    labels, _ = run_labeler(config, tmp_path, requests(20))
    assert {(label.text, label.source, label.attempts) for label in labels.values()} == {(GOOD, "openai:m", 1)}
    assert run_labeler(config, tmp_path, requests(20))[1].asked == 0
    second, stats = run_labeler(config, tmp_path, requests(30))
    assert (stats.asked, len(endpoint.requests)) == (10, 30)
    assert {n: second[n] for n in labels} == labels
    changed = [*requests(28), Request("row28", requests(1)[0].image + b"another", FACTS), requests(30)[29]]
    assert run_labeler(config, tmp_path, changed)[1].asked == 1
    assert CachedLabeler(state_factory(config), ResponseCache(tmp_path)).label(requests(30)) == [second[n] for n in range(30)]
    with pytest.raises(InputError, match="lacks the answer for row row30"):
        CachedLabeler(state_factory(config), ResponseCache(tmp_path)).label(requests(31))


def test_answers_to_another_prompt_or_model_are_not_used(endpoint: Endpoint, tmp_path: Path) -> None:
    config = config_of(endpoint)
    run_labeler(config, tmp_path / "cache", requests(5))
    file = tmp_path / "mine.md"
    shipped = Path(request_scheduler.__file__).parent / "prompts" / "alignment.md"
    file.write_text(shipped.read_text().replace("35 to 80 words", "30 to 90 words"))
    for change in ({"prompt": str(file)}, {"model": "n"}, {"max_tokens": 99}):
        plan = estimate(config.model_copy(update=change), tmp_path / "cache", requests(5))
        assert (plan.answered, plan.rows_left) == (0, 5)
    text = estimate(config.model_copy(update={"model": "n"}), tmp_path / "cache", requests(6)).text()
    assert "6 rows: 0 have cached answers, 6 will be sent" in text
    assert "5 cached answers are to other prompts or from other models" in text
    assert estimate(config.model_copy(update={"concurrency": 9, "retries": 0}), tmp_path / "cache", requests(5)).rows_left == 0


def test_what_is_sent_is_what_the_settings_say(endpoint: Endpoint, tmp_path: Path) -> None:
    config = config_of(endpoint, max_tokens=77, temperature=0.25, extra_body={"top_p": 0.5, "seed": 3})
    run_labeler(config, tmp_path, requests(1))
    extra_body = {"max_tokens": None, "max_completion_tokens": 55}
    run_labeler(config.model_copy(update={"extra_body": extra_body}), tmp_path, requests(1))
    first, second = ({k: v for k, v in body.items() if k != "messages"} for body in endpoint.requests)
    assert first == {"model": "m", "max_tokens": 77, "temperature": 0.25, "top_p": 0.5, "seed": 3}
    assert second == {"model": "m", "temperature": 0.25, "max_completion_tokens": 55}


def test_each_row_gets_its_own_answer_whatever_fails_on_the_way(endpoint: Endpoint, tmp_path: Path) -> None:
    names = ["Mill Street", "Elm Road", "Castle Hill", "Green Lane", "Broadway", "North Terrace", "Corn Exchange Street"]
    rows = [replace(row, facts=Facts(name, "Harbour")) for row, name in zip(requests(len(names)), names, strict=True)]

    def reply(n: int, body: dict[str, Any]) -> Reply:
        (name,) = [name for name in names if name in body["messages"][1]["content"][1]["text"]]
        if n and name in names[:2]:  # postponed to the final pass, which fails as well
            return refuses(500, "no")
        if n % 3 == 2:
            return refuses(503, "busy")
        text = f"A row of red brick houses stands on the left and the camera looks along the road. This is {name} in Harbour."
        return says(text.replace("Harbour", "town") if n % 4 == 1 else text)

    endpoint.reply = reply
    config = config_of(endpoint, concurrency=3, retries=2, max_attempts=9)
    labels, stats = run_labeler(config, tmp_path, rows)
    assert stats.rows == len(labels) == len(rows)
    endpoint.reply = lambda n, body: reply(0, body)
    labels, _ = run_labeler(config, tmp_path, rows, retry_failed=True)
    assert [labels[n].text.partition("This is ")[2] for n in range(len(rows))] == [f"{name} in Harbour." for name in names]
    assert CachedLabeler(state_factory(config), ResponseCache(tmp_path)).label(rows) == [labels[n] for n in range(len(rows))]
    assert (
        CachedLabeler(state_factory(config), ResponseCache(tmp_path)).label(rows[::-1])
        == [labels[n] for n in range(len(rows))][::-1]
    )


def test_an_error_of_reading_ends_the_job_as_its_sentence(endpoint: Endpoint, tmp_path: Path) -> None:
    def rows() -> Iterator[Request]:
        yield from requests(40)
        raise InputError("the table can't be read")

    config = config_of(endpoint)
    with pytest.raises(InputError, match=r"^the table can't be read$"), open_for_writing(tmp_path) as cache:
        OpenAILabeler(config, state_factory(config), cache).run(rows(), 41)


def test_rows_of_one_id_are_sent_once(endpoint: Endpoint, tmp_path: Path) -> None:
    labels, stats = run_labeler(config_of(endpoint, concurrency=8), tmp_path, requests(1) * 9)
    assert (len(labels), stats.asked, len(endpoint.requests)) == (9, 1, 1)


def test_rejected_texts_are_retried_and_replayed(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda n, body: says(GOOD if len(body["messages"]) > 2 else BAD)
    labels, _ = run_labeler(config_of(endpoint), tmp_path, requests(2))
    assert [(label.text, label.attempts) for label in labels.values()] == [(GOOD, 2)] * 2
    assert any("does not name the street Mill Street" in str(body["messages"][3:]) for body in endpoint.requests)
    assert run_labeler(config_of(endpoint), tmp_path, requests(2))[0] == labels
    assert len(endpoint.requests) == 4
    one_of_two = next(tmp_path.glob("*.jsonl"))
    one_of_two.write_text("".join(line for line in one_of_two.read_text().splitlines(True) if '"number": 1' in line))
    assert run_labeler(config_of(endpoint), tmp_path, requests(2))[1].asked == 2


def used(text: str, sent: int, written: int) -> Reply:
    status, headers, body = says(text)
    assert isinstance(body, dict)
    return status, headers, {**body, "usage": {"prompt_tokens": sent, "completion_tokens": written}}


@pytest.mark.parametrize("limit", [{"budget_tokens": 20_000}, {"budget_usd": 0.02}])
def test_a_budget_stops_the_job_and_a_larger_one_goes_on(endpoint: Endpoint, tmp_path: Path, limit: dict[str, float]) -> None:
    prices = {"usd_per_million_in": 1.0, "usd_per_million_out": 1.0, "image_rule": "fixed", "image_base": 600}
    endpoint.reply = lambda n, body: used(GOOD, 900, 100)
    config = config_of(endpoint, concurrency=8, max_tokens=100, **prices, **limit)
    with pytest.raises(InputError, match=r"label budget exhausted .*labels\.budget_.*raise it and rerun to resume"):
        run_labeler(config, tmp_path, requests(40))
    assert len(endpoint.requests) == 20  # a thousand tokens each, and not one more although eight are in flight
    with pytest.raises(InputError, match="20,000 of" if "budget_tokens" in limit else "0.02 of"):
        run_labeler(config, tmp_path, requests(40))
    assert len(endpoint.requests) == 20
    more = config.model_copy(update={key: 3 * value for key, value in limit.items()})
    run_labeler(more, tmp_path, requests(40))
    cache = ResponseCache(tmp_path)
    assert (len(endpoint.requests), cache.tokens, round(cache.usd, 6)) == (40, 40_000, 0.04)


def test_every_reservation_of_the_budget_is_released_whatever_the_response(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[RequestLimits] = []
    monkeypatch.setattr(request_scheduler, "RequestLimits", lambda *about: made.append(RequestLimits(*about)) or made[-1])
    bad = [
        lambda: refuses(500, "oops"),
        lambda: refuses(429, "slow down"),
        drops,
        lambda: (200, {}, "<html>"),
        lambda: says(""),
    ]
    endpoint.reply = lambda n, body: bad[n - 1]() if n <= len(bad) else used(GOOD, 900, 100)
    prices = {"usd_per_million_in": 1e6, "usd_per_million_out": 2e6, "budget_usd": 1e9, "budget_tokens": 10**9}
    _, stats = run_labeler(config_of(endpoint, concurrency=2, **prices), tmp_path, requests(6))
    budget = made[0].budget
    assert budget.reserved == (0, 0)
    assert budget.tokens == stats.tokens_in + stats.tokens_out + stats.lost_tokens
    assert stats.lost == 2  # of the connection that broke and of the page nobody knows whether they were charged
    cache = ResponseCache(tmp_path)
    assert (cache.tokens, cache.usd) == (budget.tokens, budget.usd) == (budget.tokens, stats.usd)
    assert stats.again == {"500": 1, "429": 1, "connection": 1, "no JSON": 1}


def test_input_and_output_tokens_are_counted_apart(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda n, body: used(GOOD, 900, 100)
    _, stats = run_labeler(config_of(endpoint, usd_per_million_in=1e6, usd_per_million_out=2e6), tmp_path, requests(2))
    assert (stats.tokens_in, stats.tokens_out, stats.usd, ResponseCache(tmp_path).usd) == (1800, 200, 2200, 2200)
    assert "2/2 rows labelled, 2,000 tokens, 2,200 US dollars" in stats.line()


def test_an_endpoint_that_does_not_count_is_estimated(endpoint: Endpoint, tmp_path: Path) -> None:
    config = config_of(endpoint, image_rule="fixed", image_base=600)
    _, stats = run_labeler(config, tmp_path, requests(3))
    assert 3 * 700 < stats.tokens_in < 3 * 1200
    assert stats.tokens_out == 3 * -(-len(GOOD) // 4)


def test_a_full_disk_ends_the_job_and_nothing_paid_is_lost(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda n, body: says(GOOD + "…" * MAX_TEXT)  # 12 kB each
    config = config_of(endpoint, concurrency=8, max_attempts=1)
    with disk_of((8 + 16) * MAX_LINE, tmp_path), pytest.raises(InputError, match=r"disk of .* is full"):
        run_labeler(config, tmp_path, requests(100))
    assert sum(ResponseCache(tmp_path).answers.values()) == len(endpoint.requests)
    assert 0 < len(endpoint.requests) < 100
    run_labeler(config, tmp_path, requests(100))
    assert len(endpoint.requests) == 100


def test_every_request_takes_its_turn(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[float] = []
    monkeypatch.setattr(MinuteRateLimiter, "reserve_slot", lambda limiter, tokens: (turns.append(tokens), 0.0)[1])
    endpoint.reply = lambda n, body: refuses(500, "oops") if n % 4 == 0 else used(GOOD, 900, 100)
    config = config_of(endpoint, requests_per_minute=1e6, max_tokens=50, concurrency=1, image_rule="fixed", image_base=600)
    _, stats = run_labeler(config, tmp_path, requests(12))
    assert len(turns) == stats.asked == 12 + stats.again["500"]
    assert 700 < turns[0] < 1200  # an estimate at first, later what answers took
    assert set(turns[1:]) == {900 + 50}


def after(first: Callable[[], Reply], times: int = 1) -> Callable[[int, dict[str, Any]], Reply]:
    """A few bad replies, then good ones."""
    return lambda n, body: first() if n <= times else says(GOOD)


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (lambda: refuses(429, "slow down", Retry_After="0"), "429"),
        (lambda: refuses(500, "oops"), "500"),
        (lambda: refuses(408, "took long"), "408"),
        (lambda: refuses(409, "locked"), "409"),
        (lambda: refuses(425, "early"), "425"),
        (lambda: refuses(503, "busy"), "503"),
        (drops, "connection"),
        (lambda: cuts(says(GOOD)), "connection"),
        (lambda: (200, {}, "<html>Bad gateway</html>"), "no JSON"),
        (lambda: (200, {}, json.dumps(says(GOOD)[2])[:50]), "no JSON"),
        (lambda: (200, {}, {"error": {"message": "model overloaded", "code": None}}), "500"),
        (lambda: (200, {}, {"error": {"message": "slow down", "code": 429}}), "429"),
    ],
)
def test_what_fails_for_now_is_tried_again(endpoint: Endpoint, tmp_path: Path, reply: Callable[[], Reply], kind: str) -> None:
    endpoint.reply = after(reply, times=2)
    labels, stats = run_labeler(config_of(endpoint, concurrency=1), tmp_path, requests(2))
    assert {label.source for label in labels.values()} == {"openai:m"}
    assert (stats.asked, stats.again) == (4, Counter({kind: 2}))
    assert labels[0].attempts == 1  # the failed requests do not count


def test_a_slow_answer_is_given_up(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint._server.drip_s = 0.01
    with pytest.raises(InputError, match=r"keeps failing \(no answer within 0.2 s\)"):
        run_labeler(config_of(endpoint, timeout_s=0.2, retries=0), tmp_path, requests(1))


def waits_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the engine waits between tries, with its usual constants; nobody really waits."""
    waits: list[float] = []

    async def at_once(waiter: Any, seconds: float) -> None:
        waiter.close()
        waits.append(seconds)
        raise TimeoutError

    monkeypatch.setattr(request_scheduler, "FIRST_WAIT_S", 0.5)
    monkeypatch.setattr(request_scheduler, "MAX_WAIT_S", 3.0)
    monkeypatch.setattr(request_scheduler.asyncio, "wait_for", at_once)
    return waits


@pytest.mark.parametrize(
    ("headers", "asked_s"), [({"Retry_After": "7"}, 7.0), ({"Retry_After_Ms": "1500"}, 1.5), ({"Retry_After": "0"}, 0.0)]
)
@pytest.mark.parametrize("status", [429, 503])
def test_the_next_try_waits_as_long_as_the_endpoint_says_and_a_little_more(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, headers: dict[str, str], asked_s: float
) -> None:
    waits = waits_of(monkeypatch)
    endpoint.reply = after(lambda: refuses(status, "slow down", **headers), times=3)
    run_labeler(config_of(endpoint), tmp_path, requests(1))
    assert len(waits) == 3
    assert all(asked_s <= seconds <= asked_s + 0.5 * step for seconds, step in zip(waits, (0.5, 1.0, 2.0), strict=True)), waits


def test_where_the_endpoint_does_not_say_how_long_the_wait_doubles_up_to_a_limit(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = waits_of(monkeypatch)
    endpoint.reply = after(lambda: refuses(500, "oops"), times=5)
    run_labeler(config_of(endpoint), tmp_path, requests(1))
    assert all(0.5 * most <= seconds <= most for seconds, most in zip(waits, (0.5, 1, 2, 3, 3), strict=True)), waits


@pytest.mark.parametrize(("status", "tries"), [(500, 3), (429, 9)])
def test_a_busy_endpoint_is_tried_longer_than_one_that_fails(
    endpoint: Endpoint, tmp_path: Path, status: int, tries: int
) -> None:
    (bad,) = requests(1)
    marked = state_factory(config_of(endpoint))(bad).messages()[1]["content"][0]["image_url"]["url"]
    endpoint.reply = lambda n, body: refuses(status, "no") if marked in str(body) else says(GOOD)
    labels, stats = run_labeler(config_of(endpoint, retries=2), tmp_path, requests(3))
    assert (labels[0].source, stats.again[str(status)]) == ("fallback:template", 2 * tries)


def failing(config: LabelsConfig, bad: list[Request]) -> Callable[[int, dict[str, Any]], Reply]:
    marked = {state_factory(config)(row).messages()[1]["content"][0]["image_url"]["url"] for row in bad}
    return lambda n, body: refuses(500, "no") if body["messages"][1]["content"][0]["image_url"]["url"] in marked else says(GOOD)


def test_an_answer_in_between_shows_that_the_endpoint_works(endpoint: Endpoint, tmp_path: Path) -> None:
    config = config_of(endpoint, concurrency=1, retries=0)
    endpoint.reply = failing(config, requests(40)[:30:2])  # 15 rows, each tried in vain twice: more than MAX_FAILED_IN_A_ROW
    labels, stats = run_labeler(config, tmp_path, requests(40))
    assert (len(labels), stats.failed, stats.answered) == (40, 15, 25)


def test_not_more_rows_than_fit_into_memory_wait_for_the_last_round(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_scheduler, "MAX_POSTPONED", 3)
    config = config_of(endpoint, concurrency=1, retries=0)
    endpoint.reply = failing(config, requests(8)[::2][:3])
    assert run_labeler(config, tmp_path / "three", requests(8))[1].failed == 3
    endpoint.reply = failing(config, requests(8)[::2])
    with pytest.raises(InputError, match="keeps failing"):
        run_labeler(config, tmp_path / "four", requests(8))


def test_a_row_that_the_endpoint_fails_for_falls_back_when_others_are_answered(endpoint: Endpoint, tmp_path: Path) -> None:
    poison = next(iter(requests(1)))
    marked = state_factory(config_of(endpoint))(poison).messages()[1]["content"][0]["image_url"]["url"]
    endpoint.reply = lambda n, body: refuses(500, "no") if marked in str(body) else says(GOOD)
    labels, stats = run_labeler(config_of(endpoint, retries=1), tmp_path, requests(6))
    assert [labels[n].source for n in range(6)] == ["fallback:template"] + ["openai:m"] * 5
    assert (labels[0].problems, stats.failed, stats.again["500"]) == (("no answer",), 1, 4)  # two tries, and two at the end
    assert run_labeler(config_of(endpoint), tmp_path, requests(6))[1].asked == 0
    endpoint.reply = lambda n, body: says(GOOD)
    assert run_labeler(config_of(endpoint), tmp_path, requests(6), retry_failed=True)[0][0].source == "openai:m"
    assert CachedLabeler(state_factory(config_of(endpoint)), ResponseCache(tmp_path)).label(requests(1))[0].text == GOOD


def test_an_endpoint_that_keeps_failing_ends_the_job_and_answers_are_kept(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda n, body: says(GOOD) if n <= 10 else refuses(503, "overloaded")
    with pytest.raises(InputError, match=r"keeps failing \(503: overloaded\): rerun later to resume; all answers"):
        run_labeler(config_of(endpoint, retries=0), tmp_path, requests(60))
    assert len(endpoint.requests) < 40
    assert estimate(config_of(endpoint), tmp_path, requests(60)).answered == 10
    endpoint.reply = lambda n, body: says(GOOD)
    assert run_labeler(config_of(endpoint), tmp_path, requests(60))[1].asked == 50


def test_an_endpoint_that_never_answers_gives_no_templates(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda n, body: drops()
    with pytest.raises(InputError, match="keeps failing"):
        run_labeler(config_of(endpoint, retries=0), tmp_path, requests(3))
    gone = config_of(endpoint, retries=0).model_copy(update={"base_url": "http://127.0.0.1:9/v1"})
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9/v1/ keeps failing \(the connection failed"):
        run_labeler(gone, tmp_path, requests(3))
