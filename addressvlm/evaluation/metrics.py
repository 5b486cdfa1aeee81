"""The metrics of paper 001 (Sec. 4.1) with 95 % intervals, and differences between systems on the same questions.

Averages are over questions, as in the paper's tables; judgments, asked with Yes and with No, weigh twice.

Photos of one place look alike, so the unit that intervals resample is the place (a cluster bootstrap), not the question.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

Interval = dict[str, float | int | None]

CELLS = {
    "A_d_G": ("district", "generation"),
    "A_d_J": ("district", "judgment"),
    "A_d_M": ("district", "choice"),
    "A_s_G": ("street", "generation"),
    "A_s_J": ("street", "judgment"),
    "A_s_M": ("street", "choice"),
    "A_ds": ("address", "generation"),
}  # mean over the questions of one level and kind
MEANS = {"A_d": ("district",), "A_s": ("street",), "A": ("district", "street")}  # over all questions of these levels
DESCRIPTIONS = {
    "A_d_G": "district, generated",
    "A_d_J": "district, yes or no",
    "A_d_M": "district, chosen from options",
    "A_d": "district, over all questions",
    "A_s_G": "street, generated",
    "A_s_J": "street, yes or no",
    "A_s_M": "street, chosen from options",
    "A_s": "street, over all questions",
    "A": "district and street, over all questions",
    "A_ds": "street and district both right in one generated answer",
}
METRICS = list(DESCRIPTIONS)
TAIL = 0.025  # on either side of a 95 % interval


def compute_metrics(answers: Iterable[Mapping[str, Any]], resamples: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """All metrics of one system, from rows of `tables.ANSWERS`.

    Returns:
        For each of METRICS `value`, `low`, `high` (shares between 0 and 1; None without questions) and `n`, the
        number of questions.
    """
    right, total = _count(answers)
    values = _values(right.sum(axis=0), total.sum(axis=0))
    weights = _resample(len(right), resamples, seed)
    samples = _values(weights @ right, weights @ total)
    n = _questions(total)
    return {name: _interval(values[name], samples[name], n[name], places=len(right)) for name in METRICS}


def paired_difference_ci(
    answers_a: Iterable[Mapping[str, Any]],
    answers_b: Iterable[Mapping[str, Any]],
    metrics: Iterable[str] = ("A", "A_ds"),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """How much better a is than b on the questions that both answered: the same resampled places for both.

    Returns:
        For each metric `value` (a minus b, between -1 and 1), its `low` and `high`, and `n`, the questions in common.
    """
    key = itemgetter("id", "level", "kind", "question", "expected")
    places: dict[str, str] = {}
    a: dict[tuple[str, ...], bool] = {}
    for row in answers_a:
        a[key(row)], places[row["id"]] = bool(row["correct"]), row["place"]
    b = {key(row): bool(row["correct"]) for row in answers_b}
    common = [question for question in a if question in b]

    def count(right: Mapping[tuple[str, ...], bool]) -> tuple[np.ndarray, np.ndarray]:
        return _count({"place": places[q[0]], "level": q[1], "kind": q[2], "correct": right[q]} for q in common)

    (right_a, total), (right_b, _) = count(a), count(b)
    weights = _resample(len(total), resamples, seed)
    values_a, values_b = (_values(right.sum(axis=0), total.sum(axis=0)) for right in (right_a, right_b))
    samples_a, samples_b = (_values(weights @ right, weights @ total) for right in (right_a, right_b))
    n = _questions(total)
    return {name: _interval(values_a[name] - values_b[name], samples_a[name] - samples_b[name], n[name]) for name in metrics}


def share_ci(right: Sequence[float] | np.ndarray, places: Sequence[str], resamples: int = 1000, seed: int = 0) -> Interval:
    """Mean of a value of each photo (1 for a right answer), with its interval from resampling places."""
    numbers = {place: i for i, place in enumerate(dict.fromkeys(places))}
    place = np.array([numbers[name] for name in places], dtype=int)
    sums, counts = np.bincount(place, np.asarray(right, dtype=float), len(numbers)), np.bincount(place, minlength=len(numbers))
    weights = _resample(len(numbers), resamples, seed)
    with np.errstate(invalid="ignore"):
        return _interval(sums.sum() / counts.sum(), (weights @ sums) / (weights @ counts), len(place), places=len(numbers))


def averages(shares: Mapping[str, float], questions: Mapping[str, float]) -> dict[str, float]:
    """A_d, A_s and A from the shares of right answers in each of CELLS and the numbers of questions, as paper 001 has them.

    Judgments are asked twice, once with Yes and once with No: of four questions a level, A_d is (G + 2 J + M) / 4.
    """
    total = np.array([questions.get(cell, 0) for cell in CELLS], dtype=float)
    values = _values(total * [shares.get(cell, 0.0) for cell in CELLS], total)
    return {name: float(values[name]) for name in MEANS}


def _count(rows: Iterable[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Right answers and questions, both (places, cells)."""
    cells = {cell: i for i, cell in enumerate(CELLS.values())}
    places: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros((2, len(cells))))
    for row in rows:
        places[row["place"]][:, cells[row["level"], row["kind"]]] += bool(row["correct"]), 1
    right, total = np.array(list(places.values())).reshape(-1, 2, len(cells)).swapaxes(0, 1)
    return right, total


def _resample(places: int, resamples: int, seed: int) -> np.ndarray:
    """How often each place is drawn, (resamples, places)."""
    if places == 0:
        return np.zeros((resamples, 0))
    return np.random.default_rng(seed).multinomial(places, np.full(places, 1 / places), size=resamples).astype(float)


def _values(right: np.ndarray, total: np.ndarray) -> dict[str, Any]:
    """Every metric from sums over places (..., cells); NaN where no question is left."""
    with np.errstate(invalid="ignore"):
        shares = right / total
    values = {name: shares[..., i] for i, name in enumerate(CELLS)}
    for name, levels in MEANS.items():
        cells = [[i for i, (level, _) in enumerate(CELLS.values()) if level == wanted] for wanted in levels]
        sums = [(right[..., of_level].sum(axis=-1), total[..., of_level].sum(axis=-1)) for of_level in cells]
        with np.errstate(invalid="ignore"):
            empty = np.any([n == 0 for _, n in sums], axis=0)
            values[name] = np.where(empty, np.nan, sum(r for r, _ in sums) / sum(n for _, n in sums))
    return values


def _questions(total: np.ndarray) -> dict[str, int]:
    """How many questions each metric is of."""
    n = dict(zip(CELLS, total.sum(axis=0).astype(int).tolist(), strict=True))
    return n | {name: sum(n[c] for c, (level, _) in CELLS.items() if level in levels) for name, levels in MEANS.items()}


def _interval(value: Any, samples: np.ndarray, n: int, places: int | None = None) -> Interval:
    """Value with the percentiles of its resamples, widened to include the value.

    Where all answers are right or all are wrong, all resamples agree, which says nothing about the next place: with `places`,
    the open end is then the exact binomial (Clopper-Pearson) bound for that many places.
    """
    if math.isnan(value):
        return {"value": None, "low": None, "high": None, "n": n}
    low, high = np.nanpercentile(samples, [100 * TAIL, 100 * (1 - TAIL)])
    low, high, value = min(float(low), float(value)), max(float(high), float(value)), float(value)
    if places and value == 0:
        high = 1 - TAIL ** (1 / places)
    if places and value == 1:
        low = TAIL ** (1 / places)
    return {"value": value, "low": low, "high": high, "n": n}
