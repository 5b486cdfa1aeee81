"""What ratings of labels come to: shares by who wrote the labels, and how far raters agree."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from addressvlm.labels.agreement import alpha, kappa, share, weighted_share
from addressvlm.labels.audit_table import CRITERIA, LEVELS, Rating, Row, sheet_of

ALL = "all labels"


def summarize(items: Sequence[Row], ratings: Iterable[Rating]) -> dict[str, Any]:
    """Shares of each level by criterion, rater and source, and the agreement of every two raters and of all.

    `all labels` is weighted by how many labels each run and source has, for the draw takes equally many of each.

    Args:
        items: rows of `audit_table.DRAWN`.
    """
    by_rater: dict[str, dict[str, Rating]] = defaultdict(dict)
    for rating in ratings:
        by_rater[rating.rater][rating.item] = rating
    runs = len({item["run"] for item in items})
    return {
        "sheet": sheet_of(items),
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


def _shares(items: Sequence[Row], rated: Mapping[str, Rating], criterion: str, name_runs: bool) -> dict[str, Any]:
    """Group -> level -> estimate; a group is a source, with its run where there are several."""
    groups: dict[str, list[int]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for item in items:
        group = f"{item['source']}, {item['run']}" if name_runs else item["source"]
        sizes[group] = item["rows"]
        levels = rated[item["item"]].levels if item["item"] in rated else {}
        if criterion in levels:
            groups[group].append(levels[criterion])
    found = {}
    for index, level in enumerate(LEVELS):
        whole = weighted_share([(sizes[g], values.count(index), len(values)) for g, values in groups.items()])
        found[level] = {ALL: whole} | {g: share(v.count(index), len(v)) for g, v in sorted(groups.items())}
    names = [ALL, *sorted(groups)] if len(groups) > 1 else [ALL]
    return {name: {level: asdict(found[level][name]) for level in reversed(LEVELS)} for name in names}


def _agreement(items: Sequence[Row], by_rater: Mapping[str, Mapping[str, Rating]], criterion: str) -> list[dict[str, Any]]:
    """Every two raters, and all together where they are more than two."""
    found = []
    raters = list(by_rater)
    together = list(combinations(raters, 2)) + ([tuple(raters)] if len(raters) > 2 else [])
    for names in together:
        levels = [[_level(by_rater[name], item, criterion) for name in names] for item in items]
        both = [row for row in levels if None not in row]
        entry: dict[str, Any] = {"raters": list(names), "alpha": asdict(alpha(levels, len(LEVELS)))}
        if len(names) == 2:
            entry["same"] = asdict(share(sum(a == b for a, b in both), len(both)))
            entry["kappa"] = asdict(kappa(levels, len(LEVELS)))
        found.append(entry)
    return found


def _level(rated: Mapping[str, Rating], item: Row, criterion: str) -> int | None:
    rating = rated.get(item["item"])
    return rating.levels.get(criterion) if rating else None


def as_text(found: Mapping[str, Any]) -> str:
    """The summary as lines of plain text."""
    rated = ", ".join(f"{rater} rated {n}" for rater, n in found["rated"].items()) or "nothing is rated yet"
    lines = [f"sheet {found['sheet']}: {found['labels']} labels; {rated}", ""]
    groups = [g for c in found["criteria"].values() for shares in c["shares"].values() for g in shares]
    width = max(map(len, [*groups, *found["rated"], ALL])) + 2
    for criterion, part in found["criteria"].items():
        lines.append(f"{criterion}: {CRITERIA[criterion]}")
        lines.append(f"{'':{width}}   n" + "".join(f"{level:>16}" for level in reversed(LEVELS)))
        for rater, shares in part["shares"].items():
            lines.append(rater)
            for group, levels in shares.items():
                n = next(iter(levels.values()))["n"]
                lines.append(f"  {group:{width - 2}}{n:>4}" + "".join(f"{_percent(cell):>16}" for cell in levels.values()))
        lines += [_agree(entry) for entry in part["agreement"]]
        lines.append("")
    lines.append("percent with 95 % intervals (Wilson); kappa is Cohen's, alpha Krippendorff's for ordered levels")
    return "\n".join(lines) + "\n"


def _agree(entry: Mapping[str, Any]) -> str:
    parts = [f"alpha {_number(entry['alpha'])}"]
    if "same" in entry:
        parts = [f"the same on {_percent(entry['same'])} of {entry['same']['n']}", f"kappa {_number(entry['kappa'])}", *parts]
    return f"{' and '.join(entry['raters'])}: {', '.join(parts)}"


def _percent(cell: Mapping[str, Any]) -> str:
    if cell["value"] is None:
        return "–"
    return f"{100 * cell['value']:.0f} ({100 * cell['low']:.0f}–{100 * cell['high']:.0f})"


def _number(cell: Mapping[str, Any]) -> str:
    if cell["value"] is None:
        return "undefined, for one level was given throughout" if cell["n"] else "–"
    return f"{cell['value']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})"
