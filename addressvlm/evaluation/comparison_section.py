"""What the report shows of a comparison: costs, accuracy by distance, reliability, photos that systems disagree about."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from addressvlm.evaluation.comparison import split_verdicts, whole_addresses
from addressvlm.evaluation.comparison_files import ACCURACIES, HEAD, cells
from addressvlm.evaluation.figures import distance_curves
from addressvlm.evaluation.pictures import pictures
from addressvlm.evaluation.reliability import reliability_diagram

SHOWN = 3  # photos of each kind of disagreement

Row = dict[str, Any]


def section(
    tree: Mapping[str, Any], systems: Sequence[Row], answers: Mapping[str, Sequence[Row]], photos: Path | None, seed: int
) -> Row:
    """What comparison.html is rendered with.

    Args:
        tree: what comparison.json holds.
        systems: the rows that have answers, with their hue.
        photos: folder of the photos table, for pictures.
        seed: decides which photos are shown.
    """
    hues = {system["name"]: system["hue"] for system in systems}
    rows = [
        {**row, "hue": hues.get(row["name"], 0), "cells": cells(row, tree["main"])[ACCURACIES if "metrics" in row else 0 :]}
        for row in tree["systems"]
    ]
    done = [row for row in rows if "metrics" in row]
    return {
        "main": tree["main"],
        "head": HEAD[ACCURACIES:],
        "rows": rows,
        "curves": distance_curves([row for row in done if row["by_distance"]]),
        "bands": next((row["by_distance"] for row in done if row["by_distance"]), []),
        "trusted": [{**row, "diagram": reliability_diagram(row["trust"]["bins"])} for row in done if row["trust"]],
        "neighbours": [row for row in done if row["neighbours"]],
        "apart": [row for row in done if "unseen" in row["by_training"]],
        "disagreements": _disagreements(tree, done, answers, photos, seed),
    }


def _disagreements(
    tree: Mapping[str, Any], rows: Sequence[Row], answers: Mapping[str, Sequence[Row]], photos: Path | None, seed: int
) -> list[Row]:
    """Photos that only the main system, and only the best other one, got right."""
    main = tree["main"]
    others = [row for row in rows if row["name"] != main and row["metrics"]["A_ds"]["value"] is not None]
    if not photos or main not in answers or not others:
        return []
    best = max(others, key=lambda row: row["metrics"]["A_ds"]["value"])["name"]
    ours, theirs = split_verdicts(answers[main], answers[best])
    chosen = [*((photo, main) for photo in _some(ours, seed)), *((photo, best) for photo in _some(theirs, seed))]
    shown = pictures(photos, tree["split"], {photo for photo, _ in chosen})
    said = {name: {row["id"]: row for row in whole_addresses(answers[name])} for name in (main, best)}
    return [
        {
            "picture": shown[photo],
            "expected": said[main][photo]["expected"],
            "right": right,
            "said": [(name, said[name][photo]) for name in (main, best)],
        }
        for photo, right in chosen
        if photo in shown
    ]


def _some(photos: Sequence[str], seed: int) -> list[str]:
    """Up to SHOWN of them, spread over the list."""
    step = max(len(photos) // SHOWN, 1)
    return list(photos)[seed % step :: step][:SHOWN]
