"""Results as text: metrics of systems for the terminal, and the comparison for the terminal, as Markdown and as CSV."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from addressvlm.evaluation.metrics import METRICS, Interval
from addressvlm.storage.remote_path import AnyPath

HEAD = ["A_ds", "A_s", "A_d", "A", "top 5", "minus main, A_ds", "p", "trained", "training", "ms a photo", "stored"]
ACCURACIES = 4  # of HEAD, which the report shows elsewhere
COSTS = HEAD[7:]
COST_COLUMNS = ["parameters", "cpu_hours", "gpu_hours", "ms_per_photo", "stored_bytes"]
MEGA = 1e6

Row = Mapping[str, Any]


def percent_text(cell: Interval | None) -> str:
    """The value in percent, with one decimal."""
    return "–" if cell is None or cell["value"] is None else f"{100 * cell['value']:.1f}"


def interval_text(cell: Interval | None) -> str:
    """Both ends of its interval in percent, nothing if there is none."""
    if cell is None or cell["low"] is None or cell["high"] is None:
        return ""
    return f"{100 * cell['low']:.0f}–{100 * cell['high']:.0f}"


def percent_with_interval(cell: Interval | None) -> str:
    """`81.5 (76–87)`."""
    return f"{percent_text(cell)} ({interval_text(cell)})" if interval_text(cell) else percent_text(cell)


def metrics_table(systems: Sequence[Row], metrics: Sequence[str] = METRICS) -> str:
    """A table for the terminal, from the `systems` of metrics.json."""
    body = []
    for system in systems:
        cells = [system["metrics"].get(name) for name in metrics]
        body += [[system["name"], *map(percent_text, cells)], ["", *map(interval_text, cells)]]
    return f"{_text_table(['', *metrics], body, str.rjust)}\npercent, 95 % CI below each value (bootstrap over places)"


def decoding_table(decoding: Row) -> str:
    """The decoding modes of one system, from modes.json, and how well its confidence is calibrated."""
    trust = decoding["trust"]
    target = f"{trust['target']:.0%}" if trust["target"] else "no"
    return "\n".join(
        [
            f"{decoding['system']}, decoding modes, {decoding['photos']:,} photos",
            metrics_table(decoding["table"], ["A_ds", "A_s", "A_d"]),
            f"calibration error {percent_with_interval(trust['ece'])} (uncalibrated {100 * trust['ece_uncalibrated']:.1f})",
            f"accuracy on the most confident 50 % {percent_with_interval(trust['half'])}",
            f"at a target of {target} right answers: answers {percent_with_interval(trust['coverage'])} of the photos, "
            f"accuracy {percent_with_interval(trust['precision'])}",
        ]
    )


def write_comparison(folder: AnyPath, comparison: Row) -> None:
    """Write comparison.json, comparison.md and comparison.csv into a folder."""
    (folder / "comparison.json").write_text(json.dumps(comparison, indent=1, ensure_ascii=False), encoding="utf-8")
    lines = ["| | " + " | ".join(HEAD) + " |", "|---" * (len(HEAD) + 1) + "|"]
    lines += [f"| {system['name']} | {' | '.join(cells(system, comparison['main']))} |" for system in comparison["systems"]]
    markdown = "\n".join([*lines, "", *_footnotes(comparison)]) + "\n"
    (folder / "comparison.md").write_text(markdown, encoding="utf-8")
    (folder / "comparison.csv").write_text(_comparison_csv(comparison), encoding="utf-8")


def comparison_text(comparison: Row) -> str:
    """The table of a comparison with its footnotes, for the terminal."""
    systems, main = comparison["systems"], comparison["main"]
    body = [[system["name"], *cells(system, main)] for system in systems if "metrics" in system]
    failures = [f"{system['name']}: {cells(system, main)[0]}" for system in systems if "metrics" not in system]
    return "\n".join([_text_table(["", *HEAD], body, str.ljust), *failures, *_footnotes(comparison)])


def cells(system: Row, main: str) -> list[str]:
    """The cells of a system below HEAD; of one that failed, the reason and nothing else."""
    if "metrics" not in system:
        return [f"not done: {system['failed'] or 'no answers'}", *[""] * (len(HEAD) - 1)]
    metrics, against = system["metrics"], system["against"]
    is_main = against is None or system["name"] == main
    return [
        *(percent_with_interval(metrics[name]) for name in ("A_ds", "A_s", "A_d", "A")),
        percent_with_interval(system["top"].get("address-5")),
        "" if is_main else _difference_text(against["A_ds"]),
        "" if is_main else ("<0.001" if against["mcnemar"]["p"] < 0.001 else f"{against['mcnemar']['p']:.3f}"),
        *cost_cells(system),
    ]


def cost_cells(system: Row) -> list[str]:
    """The cells of a system below COSTS."""
    cost = total_cost(system)
    hours = [f"{cost[key]:.2g} {unit} h" for key, unit in (("gpu_hours", "GPU"), ("cpu_hours", "CPU")) if cost[key]]
    return [
        f"{cost['parameters'] / MEGA:.1f} M" if cost["parameters"] else "–",
        ", ".join(hours) or "–",
        "–" if cost["ms_per_photo"] is None else f"{cost['ms_per_photo']:.0f}",
        f"{cost['stored_bytes'] / MEGA:.1f} MB" if cost["stored_bytes"] else "–",
    ]


def total_cost(system: Row) -> dict[str, float | None]:
    """Trained parameters, CPU and GPU hours of training (and of an index), ms a photo, bytes stored."""
    cost = system.get("cost", {})
    parts, answering = [cost[part] for part in ("training", "index") if cost.get(part)], cost.get("answering")
    return {
        "parameters": cost.get("parameters"),
        "cpu_hours": sum(part["seconds"] * part["cpus"] for part in parts) / 3600,
        "gpu_hours": sum(part["seconds"] * part["gpus"] for part in parts) / 3600,
        "ms_per_photo": 1000 * answering["seconds"] / max(answering["photos"], 1) if answering else None,
        "stored_bytes": cost.get("stored_bytes"),
    }


def _text_table(head: list[str], body: list[list[str]], justify: Any) -> str:
    """Head, rule, body, rule; the first column to the left, the others as `justify` has them."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(justify(cell, width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in [head, *body]
    ]
    return "\n".join([lines[0].rstrip(), rule, *(line.rstrip() for line in lines[1:]), rule])


def _difference_text(cell: Interval) -> str:
    """The other system minus the main one, in points; the cell is the main one minus the other."""
    if cell["value"] is None or cell["low"] is None or cell["high"] is None:
        return "–"
    value, low, high = (100 * -end for end in (cell["value"], cell["high"], cell["low"]))
    return f"{value:+z.1f} ({low:+z.1f} to {high:+z.1f})"


def _footnotes(comparison: Row) -> list[str]:
    lines = [
        f"{comparison['city']}: {comparison['photos']:,} photos of the split {comparison['split']}; percent with 95 % "
        "intervals (bootstrap over places). A_ds: street and district both right; top 5: the address is among the first five. "
        f"p: McNemar's test against {comparison['main']} on A_ds, photo by photo.",
    ]
    for system in comparison["systems"]:
        seen = system.get("by_training", {})
        if "unseen" in seen:
            known = f"{percent_with_interval(seen['seen'])} of {seen['seen']['n']}" if "seen" in seen else "no questions"
            lines.append(
                f"{system['name']}: A_ds {known} where training has the address, {percent_with_interval(seen['unseen'])} of "
                f"{seen['unseen']['n']} where it has not."
            )
        if system.get("within"):
            shares = ", ".join(f"{radius} {percent_with_interval(cell)}" for radius, cell in system["within"].items())
            lines.append(f"{system['name']}, coordinates within: {shares}.")
    return lines


TOP_COLUMNS = ("address_5", "main_1", "main_5")  # of a city whose addresses are sub-streets: SSA-5, SA-1 and SA-5


def _comparison_csv(comparison: Row) -> str:
    """A line for each system; shares between 0 and 1."""
    ends = ("", "_low", "_high")
    columns = ["name", "kind", "failed", *(f"{metric}{end}" for metric in METRICS for end in ends), *TOP_COLUMNS]
    columns += [*(f"A_ds_minus_main{end}" for end in ends), "mcnemar_p", *COST_COLUMNS]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    for system in comparison["systems"]:
        line: dict[str, Any] = {"name": system["name"], "kind": system["kind"], "failed": system["failed"]}
        if "metrics" in system:
            for metric, cell in system["metrics"].items():
                line |= {metric: cell["value"], f"{metric}_low": cell["low"], f"{metric}_high": cell["high"]}
            line |= {name: (system["top"].get(name.replace("_", "-")) or {}).get("value") for name in TOP_COLUMNS}
            line |= total_cost(system)
            if system["against"]:
                cell = system["against"]["A_ds"]
                minus = {key: None if cell[key] is None else -cell[key] for key in ("value", "low", "high")}
                line |= {"A_ds_minus_main": minus["value"], "A_ds_minus_main_low": minus["high"]}
                line |= {"A_ds_minus_main_high": minus["low"], "mcnemar_p": system["against"]["mcnemar"]["p"]}
        writer.writerow(line)
    return text.getvalue()
