import csv
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from addressvlm import InputError
from addressvlm.labels.audit.__main__ import main
from addressvlm.labels.audit.sheet import COLUMNS, Rating, draw, read_ratings, write_ratings
from tests.support.audit_sheets import ratings_of, run_with, sheet

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


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


def test_of_a_row_that_is_given_twice_the_last_counts(tmp_path: Path) -> None:
    _, items = sheet(tmp_path, template=4)
    write_ratings(tmp_path / "a.csv", ratings_of(items, "Ann", [0, 0, 0, 0]), items)
    write_ratings(tmp_path / "b.csv", ratings_of(items[:1], "Ann", [2]), items)
    ratings = read_ratings([tmp_path / "a.csv", tmp_path / "b.csv"], items)
    assert [rating.levels["truth"] for rating in ratings] == [2, 0, 0, 0]


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
        assert "write it first" in page.locator("#message").inner_text()
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
