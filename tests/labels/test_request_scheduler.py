"""Rows are paid for once, within limits"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from addressvlm import InputError
from addressvlm.config.labels import LabelsConfig
from addressvlm.labels import request_scheduler
from addressvlm.labels.api_client import AsyncRateLimiter, Budget
from addressvlm.labels.costs import estimate_cost
from addressvlm.labels.facts import Facts
from addressvlm.labels.labelers import CachedLabeler, Request, state_factory
from addressvlm.labels.request_scheduler import OpenAILabeler
from addressvlm.labels.response_cache import MAX_LINE, MAX_TEXT, CachedAnswer, ResponseCache, open_for_writing
from tests.support.full_disk import disk_of
from tests.support.label_requests import BAD, FACTS, GOOD, config_of, left, requests, settle
from tests.support.openai_endpoint import Endpoint, Reply, drops, refuses, says

pytestmark = pytest.mark.usefixtures("hurry")


# Paid once


def test_only_what_is_missing_is_asked(endpoint: Endpoint, tmp_path: Path) -> None:
    config = config_of(endpoint)
    labels, _ = settle(config, tmp_path, requests(20))
    assert {(label.text, label.source, label.attempts) for label in labels.values()} == {(GOOD, "openai:m", 1)}
    assert settle(config, tmp_path, requests(20))[1].asked == 0
    again, tally = settle(config, tmp_path, requests(30))
    assert (tally.asked, len(endpoint.asked)) == (10, 30)
    assert {n: again[n] for n in labels} == labels
    changed = [*requests(28), Request("row28", requests(1)[0].image + b"another", FACTS), requests(30)[29]]
    assert settle(config, tmp_path, changed)[1].asked == 1
    assert CachedLabeler(state_factory(config), ResponseCache(tmp_path)).label(requests(30)) == [again[n] for n in range(30)]
    with pytest.raises(InputError, match="lacks the answer for row row30"):
        CachedLabeler(state_factory(config), ResponseCache(tmp_path)).label(requests(31))


# Settings of a labeler that change what an answer may be, each with another value.
SHAPING = {
    "labeler": "vllm",
    "prompt": "grounded",
    "model": "n",
    "base_url": "http://h/v1",
    "send_image": False,
    "image_pixels": 64,
    "image_quality": 60,
    "image_detail": "high",
    "language": "de",
    "temperature": 0.5,
    "max_tokens": 99,
    "extra_body": {"top_p": 0.5},
}


def test_every_setting_that_shapes_an_answer_is_part_of_what_was_asked_and_no_other(tmp_path: Path) -> None:
    """A new setting must be put into SHAPING here, or be found not to change any answer."""
    row, config = requests(1)[0], LabelsConfig(labeler="openai", model="m")
    plain = state_factory(config)(row).request_key()
    others = {
        "words": (9, 99), "distance_tolerance": 0.5, "ask_address": True, "concurrency": 9, "max_attempts": 9, "timeout_s": 9.0,
        "retries": 9, "requests_per_minute": 9.0, "tokens_per_minute": 9.0, "budget_tokens": 9, "budget_usd": 9.0,
        "usd_per_million_in": 9.0, "usd_per_million_out": 9.0, "image_rule": "fixed", "image_base": 9, "image_each": 9.0,
        "workers": 9, "cpus_per_worker": 9.0, "gpus_per_worker": 9.0, "batch_size": 9, "dtype": "float32",
        "tensor_parallel": 9, "vllm_python": "python9", "vllm_arguments": ["--seed=9"], "vllm_start_s": 9.0,
    }  # fmt: skip
    assert SHAPING.keys() | others.keys() == LabelsConfig.model_fields.keys()
    start = state_factory(config)
    for changes in (SHAPING, others):
        for key, value in changes.items():
            changed = config.model_copy(update={key: value})
            begin = start if key in ("send_image", "language") else state_factory(changed)  # the prompt would refuse them
            row_of = begin(row)
            row_of.config = changed
            assert (row_of.request_key().cache_key() == plain.cache_key()) == (changes is others), key
    nested = [config.model_copy(update={"extra_body": {"response_format": {"type": kind}}}) for kind in ("text", "json_object")]
    assert len({state_factory(c)(row).request_key().cache_key() for c in nested}) == 2


def test_another_row_image_fact_or_question_is_another_ask() -> None:
    row, config = requests(1)[0], LabelsConfig(labeler="openai", model="m", prompt="grounded")
    begin = state_factory(config)
    changed = [
        replace(row, id="other"),
        replace(row, image=row.image + b"x"),
        replace(row, facts=replace(FACTS, facing="west")),
    ]
    assert len({begin(r).request_key().cache_key() for r in [row, *changed]}) == 4
    named = LabelsConfig(labeler="openai", model="m")  # its prompt holds the question
    of_question = {s.question: s.request_key().cache_key() for s in (state_factory(named, seed)(row) for seed in range(9))}
    assert len(set(of_question.values())) == len(of_question) > 1


def test_answers_to_another_prompt_or_model_are_not_used(endpoint: Endpoint, tmp_path: Path) -> None:
    config = config_of(endpoint)
    settle(config, tmp_path / "cache", requests(5))
    file = tmp_path / "mine.md"
    shipped = Path(request_scheduler.__file__).parent / "prompts" / "alignment.md"
    file.write_text(shipped.read_text().replace("35 to 80 words", "30 to 90 words"))
    for change in ({"prompt": str(file)}, {"model": "n"}, {"max_tokens": 99}):
        plan = left(config.model_copy(update=change), tmp_path / "cache", requests(5))
        assert (plan.answered, plan.rows_left) == (0, 5)
    text = left(config.model_copy(update={"model": "n"}), tmp_path / "cache", requests(6)).text()
    assert "6 rows: 0 have cached answers, 6 will be sent" in text
    assert "5 cached answers are to other prompts or from other models" in text
    assert left(config.model_copy(update={"concurrency": 9, "retries": 0}), tmp_path / "cache", requests(5)).rows_left == 0


def test_a_plan_knows_how_long_answers_took(tmp_path: Path) -> None:
    config = LabelsConfig(labeler="openai", model="m")
    rows = requests(3)
    with open_for_writing(tmp_path) as cache:
        for row, seconds in zip(rows[:2], (2.0, 4.0), strict=True):
            cache.add(
                state_factory(config)(row).request_key(),
                CachedAnswer(GOOD, tokens_in=7, tokens_out=3, usd=0.5, seconds=seconds),
            )
        cache.add(state_factory(config)(rows[2]).request_key(), CachedAnswer(failure="500"))
    plan = estimate_cost(config, state_factory(config), rows, ResponseCache(tmp_path))
    assert (plan.answer_s, plan.spent_tokens, plan.spent_usd, plan.answered) == (3.0, 20, 1.0, 3)
    assert estimate_cost(config, state_factory(config), rows, ResponseCache(tmp_path), retry_failed=True).rows_left == 1


def test_what_is_sent_is_what_the_settings_say(endpoint: Endpoint, tmp_path: Path) -> None:
    config = config_of(endpoint, max_tokens=77, temperature=0.25, extra_body={"top_p": 0.5, "seed": 3})
    settle(config, tmp_path, requests(1))
    settle(config.model_copy(update={"extra_body": {"max_tokens": None, "max_completion_tokens": 55}}), tmp_path, requests(1))
    first, second = ({k: v for k, v in body.items() if k != "messages"} for body in endpoint.asked)
    assert first == {"model": "m", "max_tokens": 77, "temperature": 0.25, "top_p": 0.5, "seed": 3}
    assert second == {"model": "m", "temperature": 0.25, "max_completion_tokens": 55}


def test_each_row_gets_its_own_answer_whatever_fails_on_the_way(endpoint: Endpoint, tmp_path: Path) -> None:
    names = ["Mill Street", "Elm Road", "Castle Hill", "Green Lane", "Broadway", "North Terrace", "Corn Exchange Street"]
    rows = [replace(row, facts=Facts(name, "Harbour")) for row, name in zip(requests(len(names)), names, strict=True)]

    def reply(n: int, body: dict[str, Any]) -> Reply:
        (name,) = [name for name in names if name in body["messages"][1]["content"][1]["text"]]
        if n and name in names[:2]:  # put off to the last round, and given up
            return refuses(500, "no")
        if n % 3 == 2:
            return refuses(503, "busy")
        text = f"A row of red brick houses stands on the left and the camera looks along the road. This is {name} in Harbour."
        return says(text.replace("Harbour", "town") if n % 4 == 1 else text)

    endpoint.reply = reply
    config = config_of(endpoint, concurrency=3, retries=2, max_attempts=9)
    labels, tally = settle(config, tmp_path, rows)
    assert tally.rows == len(labels) == len(rows)
    endpoint.reply = lambda n, body: reply(0, body)
    labels, _ = settle(config, tmp_path, rows, retry_failed=True)
    assert [labels[n].text.partition("This is ")[2] for n in range(len(rows))] == [f"{name} in Harbour." for name in names]
    assert CachedLabeler(state_factory(config), ResponseCache(tmp_path)).label(rows) == [labels[n] for n in range(len(rows))]
    assert (
        CachedLabeler(state_factory(config), ResponseCache(tmp_path)).label(rows[::-1])
        == [labels[n] for n in range(len(rows))][::-1]
    )


def test_models_of_one_name_in_two_folders_are_two_and_a_server_of_ours_may_move(tmp_path: Path) -> None:
    row = requests(1)[0]

    def digest(**settings: str) -> tuple[str, str]:
        asked = state_factory(LabelsConfig(labeler="vllm", **settings))(row).request_key()  # type: ignore[arg-type]
        return asked.model, asked.digest

    first, second = digest(model="/a/small"), digest(model="/b/small")
    assert first[0] == second[0] == "vllm:small"
    assert first[1] != second[1]
    assert digest(model="/a/small", base_url="http://127.0.0.1:9/v1") == first
    assert digest(model="owner/small")[0] == "vllm:owner/small"


def test_an_error_of_reading_ends_the_job_as_its_sentence(endpoint: Endpoint, tmp_path: Path) -> None:
    def rows() -> Iterator[Request]:
        yield from requests(40)
        raise InputError("the table can't be read")

    config = config_of(endpoint)
    with pytest.raises(InputError, match=r"^the table can't be read$"), open_for_writing(tmp_path) as cache:
        OpenAILabeler(config, state_factory(config), cache).run(rows(), 41)


def test_rows_of_one_id_are_asked_once(endpoint: Endpoint, tmp_path: Path) -> None:
    labels, tally = settle(config_of(endpoint, concurrency=8), tmp_path, requests(1) * 9)
    assert (len(labels), tally.asked, len(endpoint.asked)) == (9, 1, 1)


def test_bad_texts_are_asked_again_and_replayed(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda n, body: says(GOOD if len(body["messages"]) > 2 else BAD)
    labels, _ = settle(config_of(endpoint), tmp_path, requests(2))
    assert [(label.text, label.attempts) for label in labels.values()] == [(GOOD, 2)] * 2
    assert any("does not name the street Mill Street" in str(body["messages"][3:]) for body in endpoint.asked)
    assert settle(config_of(endpoint), tmp_path, requests(2))[0] == labels
    assert len(endpoint.asked) == 4
    one_of_two = next(tmp_path.glob("*.jsonl"))
    one_of_two.write_text("".join(line for line in one_of_two.read_text().splitlines(True) if '"number": 1' in line))
    assert left(config_of(endpoint), tmp_path, requests(2)).partly_answered == 2
    assert settle(config_of(endpoint), tmp_path, requests(2))[1].asked == 2


# Money and room


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
        settle(config, tmp_path, requests(40))
    assert len(endpoint.asked) == 20  # a thousand tokens each, and not one more although eight are in flight
    with pytest.raises(InputError, match="20,000 of" if "budget_tokens" in limit else "0.02 of"):
        settle(config, tmp_path, requests(40))
    assert len(endpoint.asked) == 20
    more = config.model_copy(update={key: 3 * value for key, value in limit.items()})
    settle(more, tmp_path, requests(40))
    cache = ResponseCache(tmp_path)
    assert (len(endpoint.asked), cache.tokens, round(cache.usd, 6)) == (40, 40_000, 0.04)


def test_what_was_set_aside_is_given_back_whatever_comes_of_an_ask(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets: list[Budget] = []
    monkeypatch.setattr(request_scheduler, "Budget", lambda *about: budgets.append(Budget(*about)) or budgets[-1])
    bad = [
        lambda: refuses(500, "oops"),
        lambda: refuses(429, "slow down"),
        drops,
        lambda: (200, {}, "<html>"),
        lambda: says(""),
    ]
    endpoint.reply = lambda n, body: bad[n - 1]() if n <= len(bad) else used(GOOD, 900, 100)
    prices = {"usd_per_million_in": 1e6, "usd_per_million_out": 2e6, "budget_usd": 1e9, "budget_tokens": 10**9}
    _, tally = settle(config_of(endpoint, concurrency=2, **prices), tmp_path, requests(6))
    (budget,) = budgets
    assert (budget._reservations, budget._reserved_tokens, budget._reserved_usd) == (0, 0, 0)
    assert (budget.tokens, budget.usd) == (tally.tokens_in + tally.tokens_out, tally.tokens_in + 2 * tally.tokens_out)
    kept = ResponseCache(tmp_path)
    assert (kept.tokens, kept.usd) == (budget.tokens, budget.usd)
    assert tally.again == {"500": 1, "429": 1, "connection": 1, "no JSON": 1}


def test_tokens_sent_and_written_are_told_apart(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda n, body: used(GOOD, 900, 100)
    _, tally = settle(config_of(endpoint, usd_per_million_in=1e6, usd_per_million_out=2e6), tmp_path, requests(2))
    assert (tally.tokens_in, tally.tokens_out, tally.usd, ResponseCache(tmp_path).usd) == (1800, 200, 2200, 2200)
    assert "2/2 rows labelled, 2,000 tokens, 2,200 US dollars" in tally.line()


def test_an_endpoint_that_does_not_count_is_estimated(endpoint: Endpoint, tmp_path: Path) -> None:
    config = config_of(endpoint, image_rule="fixed", image_base=600)
    _, tally = settle(config, tmp_path, requests(3))
    assert 3 * 700 < tally.tokens_in < 3 * 1200
    assert tally.tokens_out == 3 * -(-len(GOOD) // 4)


def test_a_full_disk_ends_the_job_and_nothing_paid_is_lost(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda n, body: says(GOOD + "…" * MAX_TEXT)  # 12 kB each
    config = config_of(endpoint, concurrency=8, max_attempts=1)
    with disk_of((8 + 16) * MAX_LINE, tmp_path), pytest.raises(InputError, match=r"disk of .* is full"):
        settle(config, tmp_path, requests(100))
    assert sum(ResponseCache(tmp_path).answers.values()) == len(endpoint.asked)
    assert 0 < len(endpoint.asked) < 100
    settle(config, tmp_path, requests(100))
    assert len(endpoint.asked) == 100


def test_every_request_takes_its_turn(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[float] = []
    monkeypatch.setattr(AsyncRateLimiter, "reserve_slot", lambda pace, tokens: (turns.append(tokens), 0.0)[1])
    endpoint.reply = lambda n, body: refuses(500, "oops") if n % 4 == 0 else used(GOOD, 900, 100)
    config = config_of(endpoint, requests_per_minute=1e6, max_tokens=50, concurrency=1, image_rule="fixed", image_base=600)
    _, tally = settle(config, tmp_path, requests(12))
    assert len(turns) == tally.asked == 12 + tally.again["500"]
    assert 700 < turns[0] < 1200  # an estimate at first, later what answers took
    assert set(turns[1:]) == {900 + 50}
