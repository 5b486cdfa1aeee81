"""Estimates of tokens, money and time."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from addressvlm import InputError
from addressvlm.config import validate
from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.costs import (
    ANSWER_S,
    CostEstimate,
    LabelStats,
    estimate_cost,
    image_tokens,
    input_tokens,
    label_report,
    report_summary,
    text_tokens,
)
from addressvlm.labels.facts import Facts
from addressvlm.labels.labelers import Request, state_factory
from addressvlm.labels.response_cache import CachedAnswer, open_for_writing
from tests.support.label_requests import GOOD, requests


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


def test_an_estimate_says_rows_tokens_cost_and_time() -> None:
    config = LabelsConfig(
        usd_per_million_in=0.5, usd_per_million_out=2, requests_per_minute=100, tokens_per_minute=60_000, max_tokens=100
    )
    plan = CostEstimate(
        config,
        rows=1000,
        answered=400,
        tokens_in=600_000,
        other_answers=7,
        spent_tokens=12_345,
        spent_usd=0.5,
    )
    assert (plan.rows_left, plan.tokens_out) == (600, 60_000)
    assert plan.minutes() == 11  # 660,000 tokens
    text = plan.text()
    for part in (
        "1,000 rows: 400 have cached answers, 600 will be sent",
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
    text = "".join(m["content"] if isinstance(m["content"], str) else m["content"][1]["text"] for m in row.messages())
    assert 576 + len(text) / 4 <= input_tokens(row) < 576 + len(text) / 4 + 30


def test_an_estimate_uses_the_times_of_earlier_answers(tmp_path: Path) -> None:
    config = LabelsConfig(labeler="openai", model="m")
    rows = requests(3)
    with open_for_writing(tmp_path) as cache:
        for row, seconds in zip(rows[:2], (2.0, 4.0), strict=True):
            cache.add(
                state_factory(config)(row).request_key(),
                CachedAnswer(GOOD, tokens_in=7, tokens_out=3, usd=0.5, seconds=seconds),
            )
        cache.add(state_factory(config)(rows[2]).request_key(), CachedAnswer(failure="500"))
    ids = [row.id for row in rows]
    plan = estimate_cost(config, [*ids, "new"], [state_factory(config)(rows[0])], tmp_path)
    assert (plan.answer_s, plan.spent_tokens, plan.spent_usd, plan.answered) == (3.0, 20, 1.0, 3)
    assert plan.tokens_in == input_tokens(state_factory(config)(rows[0]))
    assert estimate_cost(config, ids, [], tmp_path, retry_failed=True).rows_left == 1
    other = config.model_copy(update={"model": "slow"})
    assert estimate_cost(other, ids, [], tmp_path).answer_s == ANSWER_S  # nothing is known of it
    with open_for_writing(tmp_path) as cache:
        cache.add(state_factory(other)(rows[0]).request_key(), CachedAnswer(GOOD, seconds=100.0))
    times = [(plan.answer_s, plan.other_answers) for plan in (estimate_cost(c, ids, [], tmp_path) for c in (config, other))]
    assert times == [(3.0, 1), (100.0, 2)]


def test_each_answer_counts_as_one_kind() -> None:
    stats = LabelStats(total=10, rows=4, seconds=8.0)
    answers = [
        CachedAnswer("text", tokens_in=100, tokens_out=10, usd=0.5), CachedAnswer(""), CachedAnswer(refusal="no"),
        CachedAnswer(unusable="limit: raise it"), CachedAnswer(refusal="no", tokens_out=5),
    ]  # fmt: skip
    for answer in answers:
        stats.count(answer)
    assert (stats.answered, stats.refused, stats.empty, stats.unusable) == (5, 2, 1, 1)
    stats.count_lost(CachedAnswer(lost="time-out", tokens_in=1000, tokens_out=200, usd=0.25))
    stats.again["429"] += 3
    assert (stats.tokens_in, stats.tokens_out, stats.lost, stats.lost_tokens, stats.usd) == (100, 15, 1, 1200, 0.75)
    assert stats.line() == "label: 4/10 rows labelled, 1,315 tokens, 0.75 US dollars, 3 retries, 12 s left"
    both = stats + LabelStats(total=5, rows=5, usd=0.25, seconds=30.0, again=Counter({"429": 1, "500": 2}))
    assert (both.total, both.rows, both.usd, both.seconds, both.again) == (15, 9, 1.0, 30.0, {"429": 4, "500": 2})
    assert list(both.to_dict()["again"]) == ["429", "500"]


def test_the_report_adds_up_sources_problems_and_all_that_the_run_has_cost(tmp_path: Path) -> None:
    config = LabelsConfig(labeler="openai", model="m")
    with open_for_writing(tmp_path) as cache:
        for number, answer in enumerate((CachedAnswer("a", tokens_in=7, tokens_out=3, usd=0.5),
                                         CachedAnswer(lost="time-out", tokens_in=20, tokens_out=10, usd=0.25))):  # fmt: skip
            cache.add(state_factory(config)(requests(2)[number]).request_key(), answer)
    counts = Counter({"source openai:m": 5, "source fallback:template": 2, "problem length": 4, "problem limit": 1})
    stats = LabelStats(asked=9, refused=1, empty=2, unusable=3, lost=4, again=Counter({"429": 2}))
    report = label_report(config, counts, stats.to_dict(), tmp_path)
    assert (report["rows"], report["writer"], report["sources"]) == (7, "openai:m", {"openai:m": 5, "fallback:template": 2})
    assert (report["problems"], report["run"]) == ({"length": 4, "limit": 1}, {"tokens": 40, "usd": 0.75})
    assert report_summary(report) == (
        "7 labels: 5 openai:m, 2 fallback:template; texts rejected for: 4 length, 1 limit (raise labels.max_tokens); "
        "9 requests (retries: 2 429), answers without a text: 1 refused, 2 empty, 3 unusable, 4 lost; "
        "the run has cost 40 tokens, 0.75 US dollars"
    )
    assert report_summary(label_report(LabelsConfig(), Counter({"source template": 3}), {}, None)) == "3 labels: 3 template"
