"""The table of a comparison as Markdown, CSV, JSON and text for a terminal."""

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from addressvlm.evaluation.metrics import METRICS, Interval
from addressvlm.evaluation.table import percent, span
from addressvlm.stores import AnyPath

HEAD = ["A_ds", "A_s", "A_d", "A", "top 5", "minus main, A_ds", "p", "trained", "training", "ms a photo", "stored"]
ACCURACIES = 4  # of HEAD, which the report shows elsewhere
COSTS = HEAD[7:]
MEGA = 1e6

Row = Mapping[str, Any]


def write(folder: AnyPath, tree: Mapping[str, Any]) -> None:
    """Leave comparison.json, comparison.md and comparison.csv in a folder."""
    (folder / "comparison.json").write_text(json.dumps(tree, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "comparison.md").write_text(markdown(tree), encoding="utf-8")
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, ["name", "kind", "failed", *_columns()], restval="")
    writer.writeheader()
    writer.writerows(_flat(row) for row in tree["systems"])
    (folder / "comparison.csv").write_text(lines.getvalue(), encoding="utf-8")


def markdown(tree: Mapping[str, Any]) -> str:
    """The table with its footnotes."""
    lines = ["| | " + " | ".join(HEAD) + " |", "|---" * (len(HEAD) + 1) + "|"]
    lines += [f"| {row['name']} | " + " | ".join(cells(row, tree["main"])) + " |" for row in tree["systems"]]
    return "\n".join([*lines, "", *_notes(tree)]) + "\n"


def plain(tree: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    body = [[row["name"], *cells(row, tree["main"])] for row in tree["systems"] if "metrics" in row]
    without = [f"{row['name']}: {cells(row, tree['main'])[0]}" for row in tree["systems"] if "metrics" not in row]
    widths = [max(map(len, column)) for column in zip(["", *HEAD], *body, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [["", *HEAD], *body]]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:], rule, *without, *_notes(tree)])


def cost(row: Row) -> dict[str, float | None]:
    """What a row cost: numbers trained, CPU and GPU hours of training (and of an index), ms a photo, bytes stored."""
    of = row.get("cost", {})
    hours = {
        unit: sum(part["seconds"] * part[unit] for what in ("training", "index") if (part := of.get(what))) / 3600
        for unit in ("cpus", "gpus")
    }
    asked = of.get("answering")
    return {
        "parameters": of.get("parameters"),
        "cpu_hours": hours["cpus"],
        "gpu_hours": hours["gpus"],
        "ms_per_photo": 1000 * asked["seconds"] / max(asked["photos"], 1) if asked else None,
        "stored_bytes": of.get("stored_bytes"),
    }


def cells(row: Row, main: str) -> list[str]:
    """The cells of a row below HEAD; of one that failed, why, and nothing else."""
    if "metrics" not in row:
        return [f"not done: {row['failed'] or 'no answers'}", *[""] * (len(HEAD) - 1)]
    of, other = row["metrics"], row["against"]
    return [
        *(_interval(of[name]) for name in ("A_ds", "A_s", "A_d", "A")),
        _interval(row["top"].get("address-5")),
        "" if other is None or row["name"] == main else _difference(other["A_ds"]),
        "" if other is None or row["name"] == main else _p(other["mcnemar"]["p"]),
        *costs(row),
    ]


def costs(row: Row) -> list[str]:
    """The cells of a row below COSTS."""
    took = cost(row)
    ms = took["ms_per_photo"]
    return [
        f"{took['parameters'] / MEGA:.1f} M" if took["parameters"] else "–",
        _hours(took),
        "–" if ms is None else f"{ms:.0f}",
        f"{took['stored_bytes'] / MEGA:.1f} MB" if took["stored_bytes"] else "–",
    ]


def _interval(cell: Interval | None) -> str:
    return f"{percent(cell)} ({span(cell)})" if span(cell) else percent(cell)


def _difference(cell: Interval) -> str:
    """The other row minus the main one, in points; kept is the main one minus the other."""
    if cell["value"] is None or cell["low"] is None or cell["high"] is None:
        return "–"
    value, low, high = (100 * -end for end in (cell["value"], cell["high"], cell["low"]))
    return f"{value:+z.1f} ({low:+z.1f} to {high:+z.1f})"


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _hours(took: Mapping[str, float | None]) -> str:
    cpu, gpu = took["cpu_hours"] or 0.0, took["gpu_hours"] or 0.0
    told = [f"{hours:.2g} {unit} h" for hours, unit in ((gpu, "GPU"), (cpu, "CPU")) if hours]
    return ", ".join(told) or "–"


def _notes(tree: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{tree['city']}: {tree['photos']:,} photos of the split {tree['split']}; percent with 95 % intervals (bootstrap over "
        f"places). A_ds: street and district both right; top 5: the address is among the first five. p: McNemar's test against "
        f"{tree['main']} on A_ds, photo by photo.",
    ]
    for row in tree["systems"]:
        seen = row.get("by_training", {})
        if "unseen" in seen:
            known = f"{_interval(seen['seen'])} of {seen['seen']['n']}" if "seen" in seen else "none asked"
            lines.append(
                f"{row['name']}: A_ds {known} where training has the address, {_interval(seen['unseen'])} of "
                f"{seen['unseen']['n']} where it has not."
            )
        if row.get("within"):
            told = ", ".join(f"{name} {_interval(cell)}" for name, cell in row["within"].items())
            lines.append(f"{row['name']}, coordinates within: {told}.")
    return lines


def _columns() -> list[str]:
    of = [f"{name}{end}" for name in METRICS for end in ("", "_low", "_high")]
    took = ["parameters", "cpu_hours", "gpu_hours", "ms_per_photo", "stored_bytes"]
    return [*of, "address_5", "A_ds_minus_main", "A_ds_minus_main_low", "A_ds_minus_main_high", "mcnemar_p", *took]


def _flat(row: Row) -> dict[str, Any]:
    """A line of the CSV; shares between 0 and 1."""
    flat: dict[str, Any] = {"name": row["name"], "kind": row["kind"], "failed": row["failed"]}
    if "metrics" not in row:
        return flat
    for name, cell in row["metrics"].items():
        flat |= {name: cell["value"], f"{name}_low": cell["low"], f"{name}_high": cell["high"]}
    flat["address_5"] = (row["top"].get("address-5") or {}).get("value")
    if row["against"]:
        cell = row["against"]["A_ds"]
        flat |= {
            f"A_ds_minus_main{end}": None if cell[of] is None else -cell[of]
            for end, of in (("", "value"), ("_low", "high"), ("_high", "low"))
        }
        flat["mcnemar_p"] = row["against"]["mcnemar"]["p"]
    return flat | cost(row)
