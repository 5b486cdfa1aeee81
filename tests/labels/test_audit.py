import csv
import io
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from addressvlm import InputError
from addressvlm.labels.audit.__main__ import main
from addressvlm.labels.audit.agreement import ALL, cohen_kappa, krippendorff_alpha, stratified_share, summarize, wilson_share
from addressvlm.labels.audit.judge import parse_levels
from addressvlm.labels.audit.sheet import COLUMNS, CRITERIA, LEVELS, Rating, draw, read_items, read_ratings, write_ratings
from addressvlm.labels.facts import Facts
from addressvlm.storage import tables
from tests.support.openai_endpoint import Endpoint, says

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FACTS = Facts("Mill Street", "Harbour", ("Mill Street", "King Street"), "east-west", "along", "east", "King Street", 40, "east")


def run_with(folder: Path, sources: dict[str, int], views: int = 2) -> Path:
    """A run with so many labels of each source, `views` of each place."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (90, 120, 90)).save(buffer, "JPEG")
    image = {"bytes": buffer.getvalue(), "path": None}
    rows = []
    for i, source in enumerate(source for source, n in sources.items() for _ in range(n)):
        said = {
            "level": "alignment",
            "kind": "explanation",
            "question": "Where?",
            "answer": f"Text <{i}> & more.",
            "options": [],
        }
        rows.append(
            {
                "id": f"photo{i}", "place": f"place{i // views}", "image": image, "street": "Mill Street",
                "district": "Harbour", "rounds": [said], "source": source, "attempts": 1, "facts": FACTS.to_json(), "names": [],
            }
        )  # fmt: skip
    tables.write_table(folder / "alignment", "train", rows, tables.ALIGNMENT)
    tables.write_table(folder / "grafts", "train", rows, tables.GRAFTS)
    return folder


def sheet(folder: Path, **sources: int) -> tuple[Path, list[dict[str, Any]]]:
    main(["draw", "--run", str(run_with(folder / "run", sources)), "--n", "4", "--out", str(folder / "audit.html")])
    return folder / "audit.parquet", read_items(folder / "audit.parquet")


# Figures with known values


def test_wilson_interval() -> None:
    found = wilson_share(81, 263)  # Newcombe, Statistics in Medicine 1998, table I
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
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
    found = cohen_kappa(pairs, 2)
    assert found.value == pytest.approx(0.4)
    assert found.low < 0.4 < found.high
    assert found.n == 50
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


# Draw


def test_a_draw_is_even_over_sources_and_spread_over_places(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", {"template": 30, "openai:m": 30, "fallback:template": 2})
    items = draw([run], 20, seed=3)
    assert Counter(item["source"] for item in items) == {"template": 9, "openai:m": 9, "fallback:template": 2}
    assert max(Counter(i["place"] for i in items if i["source"] == "template").values()) == 1
    assert items == draw([run], 20, seed=3) != draw([run], 20, seed=4)
    assert {item["rows"] for item in items if item["source"] == "template"} == {30}
    assert len(draw([run], 100, seed=0)) == 62
    one_source = run_with(tmp_path / "one", {"template": 30})
    for seed in range(3):  # 15 places of two views: all of them once before any twice
        assert set(Counter(item["place"] for item in draw([one_source], 15, seed)).values()) == {1}


def test_two_runs_are_mixed(tmp_path: Path) -> None:
    runs = [run_with(tmp_path / name, {source: 8}) for name, source in (("a", "template"), ("b", "openai:m"))]
    items = draw(runs, 8, seed=0)
    assert Counter(item["source"] for item in items) == {"template": 4, "openai:m": 4}
    assert len({item["item"] for item in items}) == 8


def test_the_sheet_shows_the_label_and_not_who_wrote_it(tmp_path: Path) -> None:
    _, items = sheet(tmp_path, **{"openai:secret-writer": 4})
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "secret-writer" not in page
    assert all(f"Text &lt;{item['id'].removeprefix('photo')}&gt; &amp; more." in page for item in items)
    assert page.count("data:image/jpeg;base64,") == 4
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["draw", "--run", "nowhere"], "no table nowhere/alignment/train-*.parquet"),
        (["draw", "--run", "nowhere", "--out", "sheet"], "ends in .html"),
        (["summary", "r.csv", "--sheet", "none.parquet"], "none.parquet can't be read as a draw"),
    ],
)
def test_what_can_go_wrong_ends_in_a_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert sentence in str(stopped.value)


# Ratings


def ratings_of(items: list[dict[str, Any]], rater: str, levels: list[int]) -> list[Rating]:
    return [Rating(i["item"], rater, dict.fromkeys(CRITERIA, level)) for i, level in zip(items, levels, strict=True)]


def test_ratings_survive_the_way_through_a_file(tmp_path: Path) -> None:
    _, items = sheet(tmp_path, template=4)
    ratings = [
        Rating(items[0]["item"], 'Ann "A", x', {"truth": 2}, "two\nlines, “quoted”"),
        *ratings_of(items[1:], "Ben", [0, 1, 2]),
    ]
    write_ratings(tmp_path / "r.csv", ratings, items)
    assert read_ratings([tmp_path / "r.csv", tmp_path / "r.csv"], items) == ratings


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda row: row | {"truth": "good"}, "line 2: 'good' in column truth is none of wrong, partly, right"),
        (lambda row: row | {"sheet": "00000000"}, "these ratings are of another sheet (00000000"),
        (lambda row: row | {"item": "0"}, "of another sheet"),
        (lambda row: {k: v for k, v in row.items() if k != "note"}, "lacks the column 'note'"),
    ],
)
def test_ratings_that_do_not_belong(change: Any, sentence: str, tmp_path: Path) -> None:
    _, items = sheet(tmp_path, template=4)
    write_ratings(tmp_path / "r.csv", ratings_of(items, "Ann", [2, 2, 2, 2]), items)
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = [change(row) for row in csv.DictReader(file)]
    with (tmp_path / "bad.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(InputError, match=r"bad\.csv") as stopped:
        read_ratings([tmp_path / "bad.csv"], items)
    assert sentence in str(stopped.value)


def test_summary_weighs_by_what_was_drawn_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn, items = sheet(tmp_path, **{"template": 2, "openai:m": 98})
    best = [LEVELS.index("right") if item["source"] == "template" else 0 for item in items]
    write_ratings(tmp_path / "a.csv", ratings_of(items, "Ann", best), items)
    write_ratings(tmp_path / "b.csv", ratings_of(items, "Ben", best), items)
    found = summarize(items, read_ratings([tmp_path / "a.csv", tmp_path / "b.csv"], items))
    shares = found["criteria"]["truth"]["shares"]["Ann"]
    assert shares["template"]["right"]["value"] == 1
    assert shares[ALL]["right"]["value"] == pytest.approx(0.02)
    (agreed,) = found["criteria"]["truth"]["agreement"]
    assert (agreed["same"]["value"], agreed["kappa"]["value"], agreed["alpha"]["value"]) == (1, 1, 1)
    main(
        ["summary", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--sheet", str(drawn), "--json", str(tmp_path / "s.json")]
    )
    assert "Ann and Ben: the same on 100 (51–100) of 4" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text())["rated"] == {"Ann": 4, "Ben": 4}


def test_each_two_raters_are_compared_with_each_other_and_all_together(tmp_path: Path) -> None:
    _, items = sheet(tmp_path, template=4)
    levels = {"Ann": [0, 0, 2, 2], "Ben": [0, 2, 2, 2], "Cas": [1, 1, 1, 0]}
    ratings = [rating for rater, given in levels.items() for rating in ratings_of(items, rater, given)]
    del ratings[-1]  # Cas left one out
    found = summarize(items, ratings)
    assert found["rated"] == {"Ann": 4, "Ben": 4, "Cas": 3}
    first, second, third, together = found["criteria"]["reason"]["agreement"]
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
    shares = found["criteria"]["reason"]["shares"]["Ben"][ALL]
    assert [(level, shares[level]["value"]) for level in shares] == [("right", 0.75), ("partly", 0), ("wrong", 0.25)]


def test_of_a_row_that_is_given_twice_the_last_counts(tmp_path: Path) -> None:
    _, items = sheet(tmp_path, template=4)
    write_ratings(tmp_path / "a.csv", ratings_of(items, "Ann", [0, 0, 0, 0]), items)
    write_ratings(tmp_path / "b.csv", ratings_of(items[:1], "Ann", [2]), items)
    found = read_ratings([tmp_path / "a.csv", tmp_path / "b.csv"], items)
    assert [rating.levels["truth"] for rating in found] == [2, 0, 0, 0]


# Judge


def test_a_judges_lines() -> None:
    assert parse_levels("Truth: right\n**reason**: partly\n- names = WRONG.") == {"truth": 2, "reason": 1, "names": 0}
    assert parse_levels("The text is true and right.") == {}
    assert parse_levels("truth: wrong\ntruth: right") == {"truth": 0}


def test_a_model_judges_the_sheet_and_is_paid_once(tmp_path: Path) -> None:
    drawn, items = sheet(tmp_path, template=4)
    good, bad = says("truth: right\nreason: partly\nnames: right"), says("I think it is fine.")
    broken = items[0]["label"]
    with Endpoint(lambda number, body: bad if broken in json.dumps(body) else good).running() as endpoint:
        command = ["judge", "--sheet", str(drawn), "--set", f"labels.base_url={endpoint.url}", "--set", "labels.model=m"]
        command += ["--set", "labels.max_attempts=2", "--out", str(tmp_path / "judge.csv")]
        main(command)
        asked = len(endpoint.asked)
        main(command)
    assert asked == len(endpoint.asked) == 3 + 2  # the broken one is asked twice, the second run asks nothing
    user = endpoint.asked[0]["messages"][1]["content"]
    assert user[0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert "King Street meets Mill Street" in user[1]["text"]
    found = read_ratings([tmp_path / "judge.csv"], items)
    assert {r.item for r in found} == {item["item"] for item in items[1:]}
    assert found[0] == Rating(found[0].item, "judge openai:m", {"truth": 2, "reason": 1, "names": 2})


# The page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (install the package `chromium`)")
def test_rate_by_keyboard_download_and_sum_up(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    _, items = sheet(tmp_path, template=4)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(viewport={"width": 390, "height": 844})
        page = context.new_page()
        defects: list[str] = []
        page.on("pageerror", lambda error: defects.append(str(error)))
        page.goto((tmp_path / "audit.html").as_uri())
        for key in "123":
            page.keyboard.press(key)
        assert page.locator("#progress").inner_text() == "1 of 4 rated"
        page.keyboard.press("ArrowDown")
        page.keyboard.press("3")
        page.keyboard.press("n")
        page.keyboard.type('say "no", 1')
        page.reload()  # marks are kept
        page.keyboard.press("h")
        assert page.get_by_text("Mill Street, Harbour").locator("visible=true").count() == 1
        page.click("#download")
        assert "write it first" in page.locator("#said").inner_text()
        page.keyboard.type("Ann")
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "ratings.csv")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert defects == []
        browser.close()
    assert tuple((tmp_path / "ratings.csv").read_text().splitlines()[0].split(",")) == COLUMNS
    first, second = read_ratings([tmp_path / "ratings.csv"], items)
    assert first == Rating(items[0]["item"], "Ann", {"truth": 2, "reason": 1, "names": 0})
    assert second == Rating(items[1]["item"], "Ann", {"reason": 0}, 'say "no", 1')
