"""Systems side by side on the same photos: what the table of a comparison says beyond the metrics of each."""

import csv
import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from addressvlm.answers import calibration
from addressvlm.evaluation import metrics
from addressvlm.evaluation.likelihood import scored_photos
from addressvlm.evaluation.metrics import METRICS, Interval
from addressvlm.evaluation.text_table import interval_text, percent_text
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.gazetteer.spatial_index import METRES_PER_DEGREE
from addressvlm.storage.remote_path import AnyPath

TOP = 5
BANDS = 4  # of equally many photos, by distance to the nearest training photo

Row = dict[str, Any]


def whole_addresses(answers: Sequence[Row]) -> list[Row]:
    """The answers to the question for the whole address, one a photo."""
    return [row for row in answers if row["level"] == "address"]


def top_k_accuracy(rows: Sequence[Row], gazetteer: Gazetteer, resamples: int, seed: int) -> dict[str, Interval]:
    """Accuracy among the first one and the first five of a ranking (paper 002, Sec. 6.1).

    Args:
        rows: of `tables.SCORES`; an address at -inf has no rank.

    Returns:
        `address-1` and `address-5`, where an address is a street, or a sub-street, with its district (SSA if the city answers
        with sub-streets, SA if with streets); `street-1` and `street-5`, of the street or sub-street alone.
    """
    if not rows:
        return {}
    scores = np.array([row["scores"] for row in rows])
    order = [line[left[line]] for line, left in zip(np.argsort(-scores, axis=1, kind="stable"), scores > -np.inf, strict=True)]
    names = {"address": [a.text() for a in gazetteer.addresses], "street": [a.street for a in gazetteer.addresses]}
    truth = {"address": [Address(r["street"], r["district"]).text() for r in rows], "street": [r["street"] for r in rows]}
    places = [row["place"] for row in rows]
    found = {}
    for level, of in names.items():
        ranked = [list(dict.fromkeys(of[i] for i in line)) for line in order]
        for first in (1, TOP):
            right = [t in line[:first] for t, line in zip(truth[level], ranked, strict=True)]
            found[f"{level}-{first}"] = metrics.share_ci(right, places, resamples, seed)
    return found


def by_training(answers: Sequence[Row], learnt: Collection[Address], resamples: int, seed: int) -> dict[str, Interval]:
    """Whole addresses right where training has photos of the address, and where it has none (`seen`, `unseen`)."""
    groups: dict[str, list[Row]] = {"seen": [], "unseen": []}
    for row in whole_addresses(answers):
        groups["seen" if Address(row["street"], row["district"]) in learnt else "unseen"].append(row)
    return {name: _right(rows, resamples, seed) for name, rows in groups.items() if rows}


def mcnemar(main: Sequence[Row], other: Sequence[Row]) -> Row:
    """McNemar's exact test on whole addresses that both were asked about.

    Returns:
        `better` and `worse`, photos that only the main or only the other system got right; `p`, two-sided. It takes photos as
        independent, which those of one place are not: the paired interval over places is the safer of the two.
    """
    right = {row["id"]: bool(row["correct"]) for row in whole_addresses(other)}
    pairs = [(bool(row["correct"]), right[row["id"]]) for row in whole_addresses(main) if row["id"] in right]
    better, worse = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    n, least = better + worse, min(better, worse)
    p = min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)
    return {"better": better, "worse": worse, "p": p}


def paired_difference(main: Sequence[Row], other: Sequence[Row], resamples: int, seed: int) -> Row:
    """The main system minus another on the questions that both answered; McNemar's test beside it."""
    return {**metrics.paired_difference_ci(main, other, resamples=resamples, seed=seed), "mcnemar": mcnemar(main, other)}


def confidence_accuracy(validation: Sequence[Row], test: Sequence[Row], gazetteer: Gazetteer) -> Row | None:
    """Reliability of a ranking whose temperature is fitted on validation photos; None if there are none it could be fitted on.

    Both are rows of `tables.SCORES`.
    """
    if not validation or not test or not scored_photos(validation, gazetteer).reachable.any():
        return None
    temperature = calibration.fit_calibration(scored_photos(validation, gazetteer), 0.0).temperature
    confidence, right = scored_photos(test, gazetteer).confidences(temperature)
    return {
        "temperature": temperature,
        "bins": calibration.reliability(confidence, right),
        "ece": calibration.ece(confidence, right),
    }


def distance_bands(distances_m: Mapping[str, float]) -> list[tuple[float, float, list[str]]]:
    """Photos in bands of about equally many by distance to the nearest training photo: least and most metres, ids."""
    order = sorted(distances_m, key=lambda photo: (distances_m[photo], photo))
    parts = [part.tolist() for part in np.array_split(np.array(order, dtype=object), min(BANDS, len(order)))] if order else []
    return [(distances_m[part[0]], distances_m[part[-1]], part) for part in parts]


def by_distance(answers: Sequence[Row], distances_m: Mapping[str, float], resamples: int, seed: int) -> list[Row]:
    """Whole addresses right in each of `distance_bands`: `from_m`, `to_m` and the interval."""
    rows = {row["id"]: row for row in whole_addresses(answers)}
    return [
        {"from_m": low, "to_m": high, **_right([rows[i] for i in ids if i in rows], resamples, seed)}
        for low, high, ids in distance_bands(distances_m)
        if any(i in rows for i in ids)
    ]


def nearest_training_m(photos: Sequence[Row], training: Sequence[Row]) -> dict[str, float]:
    """Photo -> metres to the nearest training photo; photos without coordinates are left out. Rows with id, lat, lon."""
    placed = [row for row in training if row["lat"] is not None and row["lon"] is not None]
    here = [row for row in photos if row["lat"] is not None and row["lon"] is not None]
    if not placed or not here:
        return {}
    squeeze = math.cos(math.radians(here[0]["lat"]))
    scale = np.array([METRES_PER_DEGREE, METRES_PER_DEGREE * squeeze])
    known = np.unique(np.array([(row["lat"], row["lon"]) for row in placed]), axis=0) * scale
    return {row["id"]: float(np.hypot(*(known - np.array([row["lat"], row["lon"]]) * scale).T).min()) for row in here}


def split_verdicts(main: Sequence[Row], other: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Ids of photos whose whole address only the main system, and only the other, got right."""
    right = {row["id"]: bool(row["correct"]) for row in whole_addresses(other)}
    both = [(row["id"], bool(row["correct"]), right[row["id"]]) for row in whole_addresses(main) if row["id"] in right]
    return [i for i, a, b in both if a and not b], [i for i, a, b in both if b and not a]


def neighbours(answers: Sequence[Row], gazetteer: Gazetteer, near: int = 5) -> Row | None:
    """Of the wrong streets that were named, how many are among the `near` nearest to the true one; None without shapes."""
    wrong = [
        (row["street"], named)
        for row in whole_addresses(answers)
        if not row["correct"] and (named := gazetteer.find_street(row["answer"])) and named != row["street"]
    ]
    if not gazetteer.geometry or not wrong:
        return None
    close = sum(named in gazetteer.nearest(true, near) for true, named in wrong if true in gazetteer.geometry)
    return {"wrong": len(wrong), "near": close, "of": near}


def _right(rows: Sequence[Row], resamples: int, seed: int) -> Interval:
    return metrics.share_ci([bool(row["correct"]) for row in rows], [row["place"] for row in rows], resamples, seed)


HEAD = ["A_ds", "A_s", "A_d", "A", "top 5", "minus main, A_ds", "p", "trained", "training", "ms a photo", "stored"]
ACCURACIES = 4  # of HEAD, which the report shows elsewhere
COSTS = HEAD[7:]
MEGA = 1e6

Row = Mapping[str, Any]


def write_comparison(folder: AnyPath, tree: Mapping[str, Any]) -> None:
    """Leave comparison.json, comparison.md and comparison.csv in a folder."""
    (folder / "comparison.json").write_text(json.dumps(tree, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "comparison.md").write_text(comparison_markdown(tree), encoding="utf-8")
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, ["name", "kind", "failed", *_columns()], restval="")
    writer.writeheader()
    writer.writerows(_flat(row) for row in tree["systems"])
    (folder / "comparison.csv").write_text(lines.getvalue(), encoding="utf-8")


def comparison_markdown(tree: Mapping[str, Any]) -> str:
    """The table with its footnotes."""
    lines = ["| | " + " | ".join(HEAD) + " |", "|---" * (len(HEAD) + 1) + "|"]
    lines += [f"| {row['name']} | " + " | ".join(cells(row, tree["main"])) + " |" for row in tree["systems"]]
    return "\n".join([*lines, "", *_notes(tree)]) + "\n"


def comparison_text(tree: Mapping[str, Any]) -> str:
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
    return f"{percent_text(cell)} ({interval_text(cell)})" if interval_text(cell) else percent_text(cell)


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
