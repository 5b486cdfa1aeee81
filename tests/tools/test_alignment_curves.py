"""Curves over densities: seeds and places of a system together, differences on the same of both."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from addressvlm import InputError
from addressvlm.storage import tables
from addressvlm.storage.run_dir import slug
from addressvlm.tools import alignment_curves
from addressvlm.tools.alignment_curves import curves, read_answers, table


def write(run: Path, name: str, right: list[bool]) -> None:
    """Answers to the question for the whole address, one a place, and one for a street, which does not count."""
    rows: list[dict[str, Any]] = [
        {"id": f"{i}", "place": f"p{i}", "level": level, "kind": "generation", "correct": ok}
        for i, ok in enumerate(right) for level in ("address", "street")
    ]  # fmt: skip
    for row in rows:
        row["correct"] = row["correct"] and row["level"] == "address"
    tables.write_table(run / "answers" / slug(name), "test", rows, tables.ANSWERS)


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, list[str]]:
    """Of forty places stage 2 gets ten, whatever the seed; the map rows get twenty more of them at a quarter of the blocks."""
    names = []
    for share, gain in ((25, 20), (100, 0)):
        for seed in range(3):
            for system, count in (("stage 2 only", 10), ("AddressVLM, map rows", 10 + gain)):
                name = system if (share, seed) == (100, 0) else f"{system}, {share}% of blocks, seed {seed}"
                write(tmp_path, name, [i < count for i in range(40)])
                names.append(name)
    return tmp_path, names


def test_a_gain_is_of_the_same_places_and_seeds(run: tuple[Path, list[str]]) -> None:
    rows = {(row["system"], row["share"]): row for row in curves(read_answers(*run))}
    assert {row["seeds"] for row in rows.values()} == {3}
    assert rows["stage 2 only", 25]["value"] == 0.25
    assert rows["stage 2 only", 25]["against"] is None
    gain = rows["AddressVLM, map rows", 25]["against"]
    assert gain["value"] == pytest.approx(0.5)
    assert 0.3 < gain["low"] < 0.5 < gain["high"] < 0.7
    assert rows["AddressVLM, map rows", 100]["against"] == {"value": 0, "low": 0, "high": 0}
    assert "| 25 % | AddressVLM, map rows | 3 | 75.0" in table(list(rows.values()))
    assert "+50.0 (+" in table(list(rows.values()))


def test_seeds_that_differ_widen_the_interval(tmp_path: Path) -> None:
    widths = []
    for folder, counts in (("same", (20, 20, 20)), ("different", (5, 20, 35))):
        for seed, count in enumerate(counts):
            write(tmp_path / folder, f"stage 2 only, 50% of blocks, seed {seed}", [i < count for i in range(40)])
        names = [f"stage 2 only, 50% of blocks, seed {seed}" for seed in range(3)]
        (row,) = curves(read_answers(tmp_path / folder, names))
        widths.append(row["high"] - row["low"])
    assert widths[1] > 1.3 * widths[0]


def test_a_picture_and_no_answers(run: tuple[Path, list[str]], tmp_path: Path) -> None:
    alignment_curves.draw(curves(read_answers(*run)), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match=r"run ray_jobs/compare\.py first"):
        read_answers(tmp_path, [])
    assert np.isnan(alignment_curves._interval([{0: {"a": (1, 1)}}, {1: {"a": (1, 1)}}], 0)["value"])
