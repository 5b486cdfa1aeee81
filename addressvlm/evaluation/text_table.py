"""Systems x metrics as text: percent with the 95 % interval below each value."""

from collections.abc import Mapping, Sequence
from typing import Any

from addressvlm.evaluation.metrics import METRICS, Interval


def metrics_table(systems: Sequence[Mapping[str, Any]], metrics: Sequence[str] = METRICS) -> str:
    """A table for the terminal, from the `systems` of metrics.json."""
    head = ["", *metrics]
    body = []
    for system in systems:
        cells = [system["metrics"].get(name) for name in metrics]
        body.append([system["name"], *(percent_text(cell) for cell in cells)])
        body.append(["", *(interval_text(cell) for cell in cells)])
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [_line(head, widths), rule]
    lines += [_line(row, widths) for row in body]
    return "\n".join([*lines, rule, "percent, below each its 95 % interval (bootstrap over places)"])


def decoding_table(compared: Mapping[str, Any]) -> str:
    """The ways of answering of one model, from modes.json, and what its confidence is worth."""
    trust = compared["trust"]
    target = f"{trust['target']:.0%}" if trust["target"] else "no"
    return "\n".join(
        [
            f"{compared['system']}, ways of answering, {compared['photos']:,} photos",
            metrics_table(compared["table"], ["A_ds", "A_s", "A_d"]),
            f"calibration error {_words(trust['ece'])} (uncalibrated {100 * trust['ece_uncalibrated']:.1f})",
            f"right among the surer half {_words(trust['half'])}",
            f"for {target} right answers: knows {_words(trust['coverage'])} of the photos, right {_words(trust['precision'])}",
        ]
    )


def _words(cell: Interval) -> str:
    return f"{percent_text(cell)} ({interval_text(cell)})" if interval_text(cell) else percent_text(cell)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip()


def percent_text(cell: Interval | None) -> str:
    """The value, with one decimal."""
    return "–" if cell is None or cell["value"] is None else f"{100 * cell['value']:.1f}"


def interval_text(cell: Interval | None) -> str:
    """Both ends of its interval, nothing if there is none."""
    if cell is None or cell["low"] is None or cell["high"] is None:
        return ""
    return f"{100 * cell['low']:.0f}–{100 * cell['high']:.0f}"
