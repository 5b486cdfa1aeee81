import json
import math
from pathlib import Path

import pytest

from addressvlm.labels.audit.__main__ import main
from addressvlm.labels.audit.ratings import (
    ALL,
    cohen_kappa,
    krippendorff_alpha,
    parse_levels,
    stratified_share,
    summarize,
    wilson_share,
)
from addressvlm.labels.audit.sheet import LEVELS, Rating, read_ratings, write_ratings
from tests.support.audit_sheets import ratings_of, sheet
from tests.support.openai_endpoint import Endpoint, says


def test_a_judges_lines() -> None:
    assert parse_levels("Truth: right\n**reason**: partly\n- names = WRONG.") == {"truth": 2, "reason": 1, "names": 0}
    assert parse_levels("The text is true and right.") == {}
    assert parse_levels("truth: wrong\ntruth: right") == {"truth": 0}


def test_a_model_judges_the_sheet_and_is_paid_once(tmp_path: Path) -> None:
    table, items = sheet(tmp_path, template=4)
    good, bad = says("truth: right\nreason: partly\nnames: right"), says("I think it is fine.")
    broken = items[0]["label"]
    with Endpoint(lambda number, body: bad if broken in json.dumps(body) else good).running() as endpoint:
        command = ["judge", "--sheet", str(table), "--set", f"labels.base_url={endpoint.url}", "--set", "labels.model=m"]
        command += ["--set", "labels.max_attempts=2", "--out", str(tmp_path / "judge.csv")]
        main(command)
        requests = len(endpoint.requests)
        main(command)
    assert requests == len(endpoint.requests) == 3 + 2  # the broken one is sent twice, the second run sends nothing
    user = endpoint.requests[0]["messages"][1]["content"]
    assert user[0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert "King Street meets Mill Street" in user[1]["text"]
    ratings = read_ratings([tmp_path / "judge.csv"], items)
    assert {r.item for r in ratings} == {item["item"] for item in items[1:]}
    assert ratings[0] == Rating(ratings[0].item, "judge openai:m", {"truth": 2, "reason": 1, "names": 2})


def test_wilson_interval() -> None:
    result = wilson_share(81, 263)  # Newcombe, Statistics in Medicine 1998, table I
    assert (round(result.low, 4), round(result.high, 4)) == (0.2553, 0.3662)
    assert (wilson_share(0, 20).low, round(wilson_share(0, 20).high, 4)) == (0.0, 0.1611)
    assert wilson_share(0, 0).value is None


def test_weighted_share_is_that_of_the_population() -> None:
    assert stratified_share([(100, 81, 263)]) == wilson_share(81, 263)
    both = stratified_share([(900, 45, 50), (100, 10, 50), (50, 0, 0)])
    assert both.value == pytest.approx(0.9 * 0.9 + 0.1 * 0.2)
    assert both.low < both.value < both.high


def test_krippendorffs_alpha_of_his_own_example() -> None:
    """Four observers, twelve units, with gaps: Computing Krippendorff's Alpha-Reliability (2011), section C."""
    a = [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None]
    b = [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3]
    c = [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None]
    d = [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None]
    units = [[None if r is None else r - 1 for r in row] for row in zip(a, b, c, d, strict=True)]
    assert round(krippendorff_alpha(units, 5, ordinal=False).value, 3) == 0.743
    assert round(krippendorff_alpha(units, 5).value, 3) == 0.815
    assert krippendorff_alpha(units, 5).n == 11


def test_cohens_kappa_of_a_known_table() -> None:
    pairs = [(0, 0)] * 20 + [(0, 1)] * 5 + [(1, 0)] * 10 + [(1, 1)] * 15 + [(None, 1)]
    result = cohen_kappa(pairs, 2)
    assert result.value == pytest.approx(0.4)
    assert result.low < 0.4 < result.high
    assert result.n == 50
    assert cohen_kappa([(1, 1)] * 5, 2).value is None  # one level throughout: chance explains it all
    assert krippendorff_alpha([(1, 1)] * 5, 2).value is None


def test_a_weighted_interval_puts_those_of_the_strata_together() -> None:
    first, second, both = wilson_share(45, 50), wilson_share(10, 50), stratified_share([(900, 45, 50), (100, 10, 50)])
    assert both.value - both.low == pytest.approx(math.hypot(0.9 * (0.9 - first.low), 0.1 * (0.2 - second.low)))
    assert both.high - both.value == pytest.approx(math.hypot(0.9 * (first.high - 0.9), 0.1 * (second.high - 0.2)))
    assert both.n == 100


def test_kappa_knows_which_rater_prefers_what_and_alpha_how_far_levels_are() -> None:
    """Three levels by hand: 6 of 10 alike; chance (5*2 + 3*4 + 2*4) / 100."""
    pairs = [(0, 0)] * 2 + [(0, 1)] * 2 + [(0, 2)] + [(1, 1)] * 2 + [(1, 2)] + [(2, 2)] * 2
    assert cohen_kappa(pairs, 3).value == pytest.approx((0.6 - 0.3) / (1 - 0.3))
    near, far = [(0, 0)] * 4 + [(2, 2)] * 4 + [(1, 1)] * 4 + [(0, 1)], [(0, 0)] * 4 + [(2, 2)] * 4 + [(1, 1)] * 4 + [(0, 2)]
    assert krippendorff_alpha(near, 3).value > krippendorff_alpha(far, 3).value
    # nominal alpha of two raters by hand: observed 1/13, expected from 9 zeros, 9 ones and 8 twos of 26
    assert krippendorff_alpha(near, 3, ordinal=False).value == pytest.approx(
        1 - (1 / 13) / ((26**2 - 9**2 - 9**2 - 8**2) / (26 * 25))
    )


def test_summary_weighs_by_what_was_drawn_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, items = sheet(tmp_path, **{"template": 2, "openai:m": 98})
    best = [LEVELS.index("right") if item["source"] == "template" else 0 for item in items]
    write_ratings(tmp_path / "a.csv", ratings_of(items, "Ann", best), items)
    write_ratings(tmp_path / "b.csv", ratings_of(items, "Ben", best), items)
    result = summarize(items, read_ratings([tmp_path / "a.csv", tmp_path / "b.csv"], items))
    shares = result["criteria"]["truth"]["shares"]["Ann"]
    assert shares["template"]["right"]["value"] == 1
    assert shares[ALL]["right"]["value"] == pytest.approx(0.02)
    (agreed,) = result["criteria"]["truth"]["agreement"]
    assert (agreed["same"]["value"], agreed["kappa"]["value"], agreed["alpha"]["value"]) == (1, 1, 1)
    main(
        ["summary", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--sheet", str(table), "--json", str(tmp_path / "s.json")]
    )
    assert "Ann and Ben: the same on 100 (51–100) of 4" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text())["rated"] == {"Ann": 4, "Ben": 4}


def test_each_two_raters_are_compared_with_each_other_and_all_together(tmp_path: Path) -> None:
    _, items = sheet(tmp_path, template=4)
    levels = {"Ann": [0, 0, 2, 2], "Ben": [0, 2, 2, 2], "Cas": [1, 1, 1, 0]}
    ratings = [rating for rater, levels_of_rater in levels.items() for rating in ratings_of(items, rater, levels_of_rater)]
    del ratings[-1]  # Cas left one out
    result = summarize(items, ratings)
    assert result["rated"] == {"Ann": 4, "Ben": 4, "Cas": 3}
    first, second, third, together = result["criteria"]["reason"]["agreement"]
    assert [first["raters"], second["raters"], third["raters"], together["raters"]] == [
        ["Ann", "Ben"], ["Ann", "Cas"], ["Ben", "Cas"], ["Ann", "Ben", "Cas"],
    ]  # fmt: skip
    assert [entry["same"]["value"] for entry in (first, second, third)] == [0.75, 0, 0]
    assert [entry["same"]["n"] for entry in (first, second, third)] == [4, 3, 3]
    assert first["kappa"]["value"] == pytest.approx(0.5)
    two, three = list(zip(levels["Ann"], levels["Ben"], strict=True)), [[0, 0, 1], [0, 2, 1], [2, 2, 1], [2, 2, None]]
    assert first["alpha"]["value"] == krippendorff_alpha(two, 3, resamples=1).value
    assert together["alpha"]["value"] == krippendorff_alpha(three, 3, resamples=1).value
    assert "kappa" not in together
    shares = result["criteria"]["reason"]["shares"]["Ben"][ALL]
    assert [(level, shares[level]["value"]) for level in shares] == [("right", 0.75), ("partly", 0), ("wrong", 0.25)]
