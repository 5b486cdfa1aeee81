"""Shares of ratings with 95 % intervals, and how far raters agree beyond chance.

Ratings are whole numbers from 0 (the worst) to `levels` - 1; None stands for no rating.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # of the normal distribution, both sides of 95 %
TAIL = 2.5  # percent

Ratings = Sequence[Sequence[int | None]]  # one row a label, one column a rater


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, from `n` ratings or labels; all None where nothing can be said."""

    value: float | None
    low: float | None
    high: float | None
    n: int


NOTHING = Estimate(None, None, None, 0)


def share(hits: int, n: int) -> Estimate:
    """`hits` of `n` with the Wilson score interval, which stays open where all or none hit."""
    if n == 0:
        return NOTHING
    p = hits / n
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Estimate(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)), n)


def weighted_share(strata: Sequence[tuple[float, int, int]]) -> Estimate:
    """The share in a population from which strata were sampled unevenly.

    Each stratum is (rows in the population, hits, ratings); those without ratings are left out. The interval puts the
    strata's Wilson intervals together (the MOVER of Zou and Donner, Statistics in Medicine 2008).
    """
    parts = [(rows, share(hits, n)) for rows, hits, n in strata if n]
    total = sum(rows for rows, _ in parts)
    if not parts or total <= 0:
        return NOTHING
    value = sum(rows / total * (part.value or 0) for rows, part in parts)
    below = math.sqrt(sum((rows / total * ((part.value or 0) - (part.low or 0))) ** 2 for rows, part in parts))
    above = math.sqrt(sum((rows / total * ((part.high or 0) - (part.value or 0))) ** 2 for rows, part in parts))
    return Estimate(value, max(0.0, value - below), min(1.0, value + above), sum(part.n for _, part in parts))


def alpha(ratings: Ratings, levels: int, ordinal: bool = True, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Krippendorff's alpha: 1 for raters who always agree, 0 for agreement by chance.

    Any number of raters, missing ratings allowed; with `ordinal`, neighbouring levels count as nearer than far ones. The
    interval resamples labels. None if everybody gave one and the same rating throughout, for then nothing tells agreement
    from chance.
    """
    pairs = np.array([_pairs(row, levels) for row in ratings if sum(r is not None for r in row) > 1])
    return _resampled(pairs, lambda o: _alpha(o, ordinal), resamples, seed)


def kappa(ratings: Ratings, levels: int, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Cohen's kappa of two raters over the labels that both rated; None if both gave one and the same rating throughout."""
    both = [row for row in ratings if None not in row]
    tables = np.zeros((len(both), levels, levels))
    for table, (first, second) in zip(tables, both, strict=True):
        table[first, second] = 1
    return _resampled(tables, _kappa, resamples, seed)


def _pairs(row: Sequence[int | None], levels: int) -> np.ndarray:
    """Coincidences of the values that one label was given, (levels, levels)."""
    counts = np.bincount([r for r in row if r is not None], minlength=levels).astype(float)
    return (np.outer(counts, counts) - np.diag(counts)) / (counts.sum() - 1)


def _alpha(coincidences: np.ndarray, ordinal: bool) -> float:
    counts = coincidences.sum(axis=1)
    total = counts.sum()
    if ordinal:
        upto = np.cumsum(counts) - counts / 2  # ranks: the distance of two levels is the mass between their middles
        distance = (upto[:, None] - upto[None, :]) ** 2
    else:
        distance = 1 - np.eye(len(counts))
    expected = counts @ distance @ counts / (total - 1)
    return float(1 - (coincidences * distance).sum() / expected) if expected > 0 else math.nan


def _kappa(table: np.ndarray) -> float:
    shares = table / table.sum()
    chance = float(shares.sum(axis=1) @ shares.sum(axis=0))
    return (float(np.trace(shares)) - chance) / (1 - chance) if chance < 1 - 1e-12 else math.nan


def _resampled(tables: np.ndarray, statistic: Callable[[np.ndarray], float], resamples: int, seed: int) -> Estimate:
    """A statistic of the sum of tables (labels, levels, levels) with the percentiles over resampled labels."""
    n = len(tables)
    if n == 0 or math.isnan(value := statistic(tables.sum(axis=0))):
        return Estimate(None, None, None, n)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    spread = np.array([statistic(table) for table in np.tensordot(weights, tables, axes=1)])
    spread = spread[~np.isnan(spread)]
    low, high = np.percentile(spread, [TAIL, 100 - TAIL]) if len(spread) else (value, value)
    return Estimate(value, min(float(low), value), max(float(high), value), n)
