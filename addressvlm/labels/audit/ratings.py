"""Ratings of labels: by a model behind an endpoint, their shares with 95 % intervals, agreement of raters beyond chance.

Ratings are whole numbers from 0 (the worst) to `levels` - 1; None is a missing rating.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from addressvlm.config import Config
from addressvlm.labels.audit.sheet import CRITERIA, LEVELS, Item, Rating, sheet_id
from addressvlm.labels.facts import Facts
from addressvlm.labels.labelers import Request, RetryState, label_source
from addressvlm.labels.prompt import configured_prompt
from addressvlm.labels.request_scheduler import OpenAILabeler
from addressvlm.labels.response_cache import open_for_writing
from addressvlm.labels.validator import LabelValidator, Problem

JUDGE_PROMPT = Path(__file__).with_name("judge.md")
Z = 1.959963984540054  # of the normal distribution, two-sided 95 %
TAIL = 2.5  # percent
ALL = "all labels"
_LINE = re.compile(rf"\b({'|'.join(CRITERIA)})\b\W{{0,6}}({'|'.join(LEVELS)})\b", re.IGNORECASE)

Ratings = Sequence[Sequence[int | None]]  # a row per label, a column per rater


def judge(items: Sequence[Item], config: Config, prompt: str, cache: Path) -> list[Rating]:
    """Ratings of the items whose answer rates every criterion.

    Args:
        items: rows of `sheet.ITEMS`.
        config: its section `labels` names the judge.
        prompt: name or path of a prompt file; {question} in it is the text to judge.
        cache: folder of the judge's answers.
    """
    labels = config.labels.model_copy(update={"labeler": "openai", "prompt": prompt})
    template = configured_prompt(labels)
    texts = {item["item"]: item["label"] for item in items}

    def new_state(request: Request) -> RetryState:
        return RetryState(request, replace(template, questions=(texts[request.id],)), RatingValidator(), labels, config.seed)

    requests = [
        Request(
            item["item"],
            item["image"]["bytes"],
            Facts.from_json(item["facts"]) if item["facts"] else Facts(item["street"], item["district"]),
        )
        for item in items
    ]
    with open_for_writing(cache) as responses:
        answers = OpenAILabeler(labels, new_state, responses, lambda line: print(line, flush=True)).label(requests)
    source = label_source(labels)
    return [
        Rating(request.id, f"judge {source}", parse_levels(answer.text))
        for request, answer in zip(requests, answers, strict=True)
        if answer.source == source
    ]


class RatingValidator(LabelValidator):
    """Accepts an answer that rates every criterion."""

    def problems(self, text: str, facts: Facts) -> list[Problem]:
        """The criteria that the answer does not rate."""
        levels = parse_levels(text)
        return [
            Problem("rating", f"it lacks the line “{criterion}:” with one of the words {', '.join(LEVELS)}")
            for criterion in CRITERIA
            if criterion not in levels
        ]


def parse_levels(text: str) -> dict[str, int]:
    """Criterion -> level of the lines `truth: right`; the first of each counts."""
    levels: dict[str, int] = {}
    for criterion, level in _LINE.findall(text):
        levels.setdefault(criterion.lower(), LEVELS.index(level.lower()))
    return levels


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, from `n` ratings or labels; all None where it is undefined."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0


def wilson_share(hits: int, n: int) -> Estimate:
    """The share `hits` / `n` with its Wilson score interval, which has a width even for shares of 0 and 1."""
    if n == 0:
        return Estimate()
    p = hits / n
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Estimate(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)), n)


def stratified_share(strata: Sequence[tuple[float, int, int]]) -> Estimate:
    """The share in a population from which strata were sampled unevenly.

    Each stratum is (rows in the population, hits, ratings); those without ratings are ignored. The interval combines the
    strata's Wilson intervals (MOVER; Zou and Donner, Statistics in Medicine 2008).
    """
    parts = [(rows, wilson_share(hits, n)) for rows, hits, n in strata if n]
    total = sum(rows for rows, _ in parts)
    if not parts or total <= 0:
        return Estimate()
    value = sum(rows / total * (part.value or 0) for rows, part in parts)
    below = math.sqrt(sum((rows / total * ((part.value or 0) - (part.low or 0))) ** 2 for rows, part in parts))
    above = math.sqrt(sum((rows / total * ((part.high or 0) - (part.value or 0))) ** 2 for rows, part in parts))
    return Estimate(value, max(0.0, value - below), min(1.0, value + above), sum(part.n for _, part in parts))


def krippendorff_alpha(ratings: Ratings, levels: int, ordinal: bool = True, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Krippendorff's alpha: 1 for raters who always agree, 0 for agreement by chance.

    Any number of raters, missing ratings allowed; with `ordinal`, neighbouring levels count as nearer than distant ones. The
    interval is a bootstrap over labels. None if all ratings are the same, which leaves chance agreement undefined.
    """
    coincidences = []  # of the ratings of one label, (levels, levels)
    for row in ratings:
        counts = np.bincount([r for r in row if r is not None], minlength=levels).astype(float)
        if counts.sum() > 1:
            coincidences.append((np.outer(counts, counts) - np.diag(counts)) / (counts.sum() - 1))
    return _bootstrap(np.array(coincidences), lambda o: _alpha(o, ordinal), resamples, seed)


def cohen_kappa(ratings: Ratings, levels: int, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Cohen's kappa of two raters over the labels that both rated; None if all ratings are the same."""
    both = [row for row in ratings if None not in row]
    tables = np.zeros((len(both), levels, levels))
    for table, (first, second) in zip(tables, both, strict=True):
        table[first, second] = 1
    return _bootstrap(tables, _kappa, resamples, seed)


def _alpha(coincidences: np.ndarray, ordinal: bool) -> float:
    counts = coincidences.sum(axis=1)
    total = counts.sum()
    if ordinal:
        rank = np.cumsum(counts) - counts / 2  # the distance of two levels is the mass between their middles
        distance = (rank[:, None] - rank[None, :]) ** 2
    else:
        distance = 1 - np.eye(len(counts))
    expected = counts @ distance @ counts / (total - 1)
    return float(1 - (coincidences * distance).sum() / expected) if expected > 0 else math.nan


def _kappa(table: np.ndarray) -> float:
    shares = table / table.sum()
    chance = float(shares.sum(axis=1) @ shares.sum(axis=0))
    return (float(np.trace(shares)) - chance) / (1 - chance) if chance < 1 - 1e-12 else math.nan


def _bootstrap(tables: np.ndarray, statistic: Callable[[np.ndarray], float], resamples: int, seed: int) -> Estimate:
    """A statistic of the sum of tables (labels, levels, levels) with its bootstrap percentile interval over labels."""
    n = len(tables)
    if n == 0 or math.isnan(value := statistic(tables.sum(axis=0))):
        return Estimate(n=n)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    values = np.array([statistic(table) for table in np.tensordot(weights, tables, axes=1)])
    values = values[~np.isnan(values)]
    low, high = np.percentile(values, [TAIL, 100 - TAIL]) if len(values) else (value, value)
    return Estimate(value, min(float(low), value), max(float(high), value), n)


def summarize(items: Sequence[Item], ratings: Iterable[Rating]) -> dict[str, Any]:
    """Shares of each level by criterion, rater and source, and the agreement of every two raters and of all.

    `all labels` is weighted by the number of labels of each run and source, since the draw takes equally many of each.

    Args:
        items: rows of `sheet.ITEMS`.
    """
    by_rater: dict[str, dict[str, Rating]] = defaultdict(dict)
    for rating in ratings:
        by_rater[rating.rater][rating.item] = rating
    runs = len({item["run"] for item in items})
    return {
        "sheet": sheet_id(items),
        "labels": len(items),
        "rated": {rater: len(rated) for rater, rated in by_rater.items()},
        "criteria": {
            criterion: {
                "shares": {rater: _shares(items, rated, criterion, runs > 1) for rater, rated in by_rater.items()},
                "agreement": _agreement(items, by_rater, criterion),
            }
            for criterion in CRITERIA
        },
    }


def _shares(items: Sequence[Item], rated: Mapping[str, Rating], criterion: str, name_runs: bool) -> dict[str, Any]:
    """Group -> level -> estimate; a group is a source, with its run where there are several."""
    groups: dict[str, list[int]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for item in items:
        group = f"{item['source']}, {item['run']}" if name_runs else item["source"]
        sizes[group] = item["rows"]
        levels = rated[item["item"]].levels if item["item"] in rated else {}
        if criterion in levels:
            groups[group].append(levels[criterion])
    shares = {}
    for index, level in enumerate(LEVELS):
        total = stratified_share([(sizes[g], values.count(index), len(values)) for g, values in groups.items()])
        shares[level] = {ALL: total} | {g: wilson_share(v.count(index), len(v)) for g, v in sorted(groups.items())}
    names = [ALL, *sorted(groups)] if len(groups) > 1 else [ALL]
    return {name: {level: asdict(shares[level][name]) for level in reversed(LEVELS)} for name in names}


def _agreement(items: Sequence[Item], by_rater: Mapping[str, Mapping[str, Rating]], criterion: str) -> list[dict[str, Any]]:
    """Agreement of every two raters, and of all where they are more than two."""
    entries = []
    raters = list(by_rater)
    for names in [*combinations(raters, 2), *([tuple(raters)] if len(raters) > 2 else [])]:
        levels = [
            [by_rater[name][item["item"]].levels.get(criterion) if item["item"] in by_rater[name] else None for name in names]
            for item in items
        ]
        both = [row for row in levels if None not in row]
        entry: dict[str, Any] = {"raters": list(names), "alpha": asdict(krippendorff_alpha(levels, len(LEVELS)))}
        if len(names) == 2:
            entry["same"] = asdict(wilson_share(sum(a == b for a, b in both), len(both)))
            entry["kappa"] = asdict(cohen_kappa(levels, len(LEVELS)))
        entries.append(entry)
    return entries


def format_summary(summary: Mapping[str, Any]) -> str:
    """The summary as lines of plain text."""
    rated = ", ".join(f"{rater} rated {n}" for rater, n in summary["rated"].items()) or "no ratings yet"
    lines = [f"sheet {summary['sheet']}: {summary['labels']} labels; {rated}", ""]
    groups = [g for c in summary["criteria"].values() for shares in c["shares"].values() for g in shares]
    width = max(map(len, [*groups, *summary["rated"], ALL])) + 2
    for criterion, part in summary["criteria"].items():
        lines.append(f"{criterion}: {CRITERIA[criterion]}")
        lines.append(f"{'':{width}}   n" + "".join(f"{level:>16}" for level in reversed(LEVELS)))
        for rater, shares in part["shares"].items():
            lines.append(rater)
            for group, levels in shares.items():
                n = next(iter(levels.values()))["n"]
                lines.append(f"  {group:{width - 2}}{n:>4}" + "".join(f"{_percent(cell):>16}" for cell in levels.values()))
        for entry in part["agreement"]:
            kappa = ""
            if "same" in entry:
                kappa = f"the same on {_percent(entry['same'])} of {entry['same']['n']}, kappa {_number(entry['kappa'])}, "
            lines.append(f"{' and '.join(entry['raters'])}: {kappa}alpha {_number(entry['alpha'])}")
        lines.append("")
    lines.append("percent with 95 % intervals (Wilson); kappa is Cohen's, alpha Krippendorff's for ordered levels")
    return "\n".join(lines) + "\n"


def _percent(cell: Mapping[str, Any]) -> str:
    if cell["value"] is None:
        return "–"
    return f"{100 * cell['value']:.0f} ({100 * cell['low']:.0f}–{100 * cell['high']:.0f})"


def _number(cell: Mapping[str, Any]) -> str:
    if cell["value"] is None:
        return "undefined, since all ratings are the same" if cell["n"] else "–"
    return f"{cell['value']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})"
