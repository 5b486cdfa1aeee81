"""report.html: one self-contained page with tables, maps of right and wrong answers, examples, loss curves and the data.

Every folder of the run that is there adds a section; none is required.
"""

import base64
import io
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from addressvlm.evaluation.comparison import Answers, address_answers, split_verdicts
from addressvlm.evaluation.metrics import DESCRIPTIONS, MEANS, METRICS, paired_difference_ci
from addressvlm.evaluation.plots import CityMap, distance_curves, interval_bar, loss_curves, reliability_diagram
from addressvlm.evaluation.result_tables import ACCURACIES, HEAD, cells
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.grafting import display_image
from addressvlm.labels.costs import report_summary
from addressvlm.storage import tables
from addressvlm.storage.remote_path import AnyPath, list_files
from addressvlm.storage.run_dir import slug
from addressvlm.storage.tables import read_table_file

MAIN = "AddressVLM"  # the system that the others are compared with; the last one if there is none of this name
EXAMPLES = 8
GRAFTS = 4
HUES = 12
DISAGREEMENTS = 3  # photos of each kind of disagreement
THUMBNAIL = 360  # pixels, longer side
ONLY_IN_CARD = ("rejected", "sources", "questions_by_kind", "places_per")  # details of card.json that the page leaves there

Row = dict[str, Any]


@dataclass(frozen=True)
class ReportSources:
    """Folders of a run that the report shows; None or empty ones are left out."""

    photos: AnyPath | None = None
    alignment: AnyPath | None = None
    training: AnyPath | None = None
    rejects: AnyPath | None = None


def write_report(
    path: AnyPath,
    metrics: Mapping[str, Any],
    answers: Mapping[str, Answers],
    gazetteer: Gazetteer | None = None,
    sources: ReportSources | None = None,
    seed: int = 0,
    resamples: int = 1000,
    modes: Mapping[str, Any] | None = None,
    comparison: Mapping[str, Any] | None = None,
) -> None:
    """Write the page.

    Args:
        metrics: of metrics.json: city, split, systems; `modes` and `comparison`: of modes.json and comparison.json.
        answers: system name -> its rows of `tables.ANSWERS`.
        gazetteer: for the streets on the map.
        seed: decides which examples are shown.
        resamples: of the bootstrap of the differences between systems.
    """
    sources = sources or ReportSources()
    systems = [{**system, "hue": i % HUES} for i, system in enumerate(metrics["systems"])]
    named = main_system([system["name"] for system in systems])
    main = next(system for system in systems if system["name"] == named)
    rows = answers[main["name"]]
    card = card_section(sources.photos)
    labels = sources.alignment / "labels.json" if sources.alignment else None
    differences = _differences(systems, main, answers, resamples, seed)
    page = _template().render(
        city=metrics["city"] or "a city",
        split=metrics["split"],
        systems=systems,
        main=main,
        metrics=METRICS,
        means={*MEANS, "A_ds"},
        descriptions=DESCRIPTIONS,
        photos=len({row["id"] for row in rows}),
        places=len({row["place"] for row in rows}),
        questions=len(rows),
        differences=differences,
        reach=_reach(differences),
        maps=_maps(systems, answers, gazetteer),
        examples=_examples(systems, main, answers, metrics["split"], sources.photos, seed),
        confusions=_confusions(rows),
        grafts=_grafts(sources.alignment, seed),
        labels=report_summary(json.loads(labels.read_text(encoding="utf-8"))) if labels and labels.is_file() else "",
        curves=_curves(systems, sources.training),
        card=card,
        rejects=rejects_section(sources.rejects),
        attribution=list(dict.fromkeys([*(gazetteer.attribution if gazetteer else []), *card["attribution"]])),
        interval_bar=interval_bar,
        modes=modes,
        comparison=comparison_section(comparison, systems, answers, sources.photos, seed) if comparison else None,
        reliability_diagram=reliability_diagram,
    )
    path.write_text(page, encoding="utf-8")


def main_system(names: Sequence[str]) -> str:
    """The system that a report is about."""
    return MAIN if MAIN in names else names[-1]


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["percent"] = lambda share: "–" if share is None else f"{100 * share:.1f}"
    environment.filters["points"] = lambda share: "–" if share is None else f"{100 * share:+z.1f}".replace("-", "−")
    environment.filters["metric"] = _metric_name
    environment.filters["words"] = words
    return environment.get_template("report.html")


def _metric_name(name: str) -> Any:
    """`A_d_G` as A with its indices set as in the paper."""
    _, *indices = name.split("_")
    over = f"<sup>{indices[1]}</sup>" if len(indices) > 1 else ""
    under = f"<sub>{indices[0]}</sub>" if indices else ""
    bar = " class='mean'" if name in MEANS else ""
    return jinja2.utils.markupsafe.Markup(f"<i{bar}>A</i>{under}{over}")


def _differences(systems: list[Row], main: Row, answers: Mapping[str, Answers], resamples: int, seed: int) -> list[Row]:
    """The main system minus each other one."""
    ours = answers[main["name"]]
    return [
        {**other, "gain": paired_difference_ci(ours, answers[other["name"]], resamples=resamples, seed=seed)}
        for other in systems
        if other is not main
    ]


def _reach(differences: list[Row]) -> float:
    """End of the axis that all differences are drawn on: the largest, rounded up to a tenth."""
    ends = [abs(cell[end] or 0) for other in differences for cell in other["gain"].values() for end in ("low", "high")]
    return max(0.1, math.ceil(10 * max(ends, default=0)) / 10)


def _maps(systems: list[Row], answers: Mapping[str, Answers], gazetteer: Gazetteer | None) -> Row | None:
    """A map for each system: at every test place the share of its photos whose address was right."""
    located = [row for rows in answers.values() for row in address_answers(rows) if row["lat"] is not None]
    if not located:
        return None
    city = CityMap([(row["lat"], row["lon"]) for row in located], gazetteer)
    drawn = [{**system, "svg": city.draw(_places(answers[system["name"]]))} for system in systems]
    return {"defs": city.defs, "systems": drawn}


def _places(rows: Answers) -> list[Row]:
    """What `CityMap.draw` takes of each place."""
    by_place: dict[str, list[Row]] = {}
    for row in address_answers(rows):
        if row["lat"] is not None:
            by_place.setdefault(row["place"], []).append(row)
    places = []
    for group in by_place.values():
        right = sum(row["correct"] for row in group)
        answer = Counter(row["answer"] for row in group).most_common(1)[0][0]
        note = f"{group[0]['expected']}: {right} of {len(group)} right; answered “{answer}”"
        places.append({"lat": group[0]["lat"], "lon": group[0]["lon"], "share": right / len(group), "note": note})
    return places


def _examples(
    systems: list[Row], main: Row, answers: Mapping[str, Answers], split: str, photos: AnyPath | None, seed: int
) -> list[Row]:
    """Photos of different places with each system's address; as many right as wrong ones of the main system."""
    if not photos:
        return []
    rows = list(address_answers(answers[main["name"]]))
    random.Random(seed).shuffle(rows)
    per_place = list({row["place"]: row for row in reversed(rows)}.values())
    right = [row for row in per_place if row["correct"]]
    wrong = [row for row in per_place if not row["correct"]]
    n_right = min(len(right), max(EXAMPLES // 2, EXAMPLES - len(wrong)))
    chosen = [*right[:n_right], *wrong[: EXAMPLES - n_right]]
    images = thumbnails(photos, split, {row["id"] for row in chosen})
    rows_of = {s["name"]: {row["id"]: row for row in address_answers(answers[s["name"]])} for s in systems}
    return [
        {
            **row,
            "thumbnail": images[row["id"]],
            "answers": [{**s, "row": rows_of[s["name"]][row["id"]]} for s in systems if row["id"] in rows_of[s["name"]]],
        }
        for row in chosen
        if row["id"] in images
    ]


def _confusions(rows: Answers, top: int = 8) -> list[Row]:
    """The wrong street answers that came most often, counted by photo."""
    wrong = [row for row in rows if row["level"] == "street" and row["kind"] == "generation" and not row["correct"]]
    counts = Counter((row["expected"], row["answer"]) for row in wrong).most_common(top)
    return [{"expected": expected, "answer": answer, "n": n} for (expected, answer), n in counts if n > 1]


def _grafts(alignment: AnyPath | None, seed: int) -> list[Row]:
    """Some grafted images with the label that stage 1 learns from."""
    if not alignment or not tables.count_rows(alignment, "train"):
        return []
    ids = tables.read_table(alignment, "train", ["id"])["id"].to_pylist()
    chosen = set(random.Random(seed).sample(ids, min(GRAFTS, len(ids))))
    rows = [row for row in tables.iter_rows(alignment, "train") if row["id"] in chosen]
    return [{**row, "thumbnail": data_url(display_image(row)), "round": row["rounds"][-1]} for row in rows]


def _curves(systems: list[Row], training: AnyPath | None) -> list[Row]:
    """A drawing for each system that has a loss curve, all on the same axes."""
    curves = {s["name"]: stages for s in systems if training and (stages := _losses(training / slug(s["name"]) / "loss.jsonl"))}
    if not curves:
        return []
    losses = [loss for stages in curves.values() for points in stages.values() for _, loss in points]
    top = max(min(max(losses), 3 * sorted(losses)[len(losses) * 19 // 20]), 1e-3)
    steps = max(step for stages in curves.values() for points in stages.values() for step, _ in points)
    return [
        {**s, "stages": list(curves[s["name"]]), "svg": loss_curves(curves[s["name"]], top, steps)}
        for s in systems
        if s["name"] in curves
    ]


def _losses(path: AnyPath) -> dict[str, list[tuple[float, float]]]:
    """Stage -> (step counted over all stages, loss); of a step logged twice (a resumed run) the later entry counts."""
    if not path.is_file():
        return {}
    losses: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        losses.setdefault(entry["stage"], {})[entry["step"]] = entry["loss"]
    first, stages = 0, {}
    for stage, points in losses.items():
        stages[stage] = [(float(first + step), points[step]) for step in sorted(points)]
        first += max(points)
    return stages


def comparison_section(
    comparison: Mapping[str, Any],
    systems: Sequence[Row],
    answers: Mapping[str, Answers],
    photos: AnyPath | None,
    seed: int,
) -> Row:
    """What comparison.html is rendered with; `systems`: those that have answers, with their hue."""
    hues, main = {system["name"]: system["hue"] for system in systems}, comparison["main"]
    entries = [
        {**system, "hue": hues.get(system["name"], 0), "cells": cells(system, main)[ACCURACIES if "metrics" in system else 0 :]}
        for system in comparison["systems"]
    ]
    done = [system for system in entries if "metrics" in system]
    with_trust = [system for system in done if system["trust"]]
    return {
        "main": main,
        "head": HEAD[ACCURACIES:],
        "systems": entries,
        "curves": distance_curves([system for system in done if system["by_distance"]]),
        "calibrated": [{**system, "diagram": reliability_diagram(system["trust"]["bins"])} for system in with_trust],
        "neighbours": [system for system in done if system["neighbours"]],
        "unseen": [system for system in done if "unseen" in system["by_training"]],
        "disagreements": _disagreements(comparison, done, answers, photos, seed),
    }


def _disagreements(
    comparison: Mapping[str, Any],
    systems: Sequence[Row],
    answers: Mapping[str, Answers],
    photos: AnyPath | None,
    seed: int,
) -> list[Row]:
    """Photos that only the main system, and only the best other one, got right; spread over the table."""
    main = comparison["main"]
    others = [s for s in systems if s["name"] != main and s["metrics"]["A_ds"]["value"] is not None]
    if not photos or main not in answers or not others:
        return []
    best = max(others, key=lambda system: system["metrics"]["A_ds"]["value"])["name"]
    chosen: list[tuple[str, str]] = []
    for winner, ids in zip((main, best), split_verdicts(answers[main], answers[best]), strict=True):
        step = max(len(ids) // DISAGREEMENTS, 1)
        chosen += [(photo, winner) for photo in ids[seed % step :: step][:DISAGREEMENTS]]
    images = thumbnails(photos, comparison["split"], {photo for photo, _ in chosen})
    rows = {name: {row["id"]: row for row in address_answers(answers[name])} for name in (main, best)}
    return [
        {
            "thumbnail": images[photo],
            "expected": rows[main][photo]["expected"],
            "right": winner,
            "answers": [(name, rows[name][photo]) for name in (main, best)],
        }
        for photo, winner in chosen
        if photo in images
    ]


def card_section(photos: AnyPath | None) -> Row:
    """The dataset card: counts of each split as a table, and the other plain facts in order."""
    file = photos / "card.json" if photos else None
    card = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
    splits = card.pop("splits", {})
    columns = list(dict.fromkeys(key for counts in splits.values() for key in counts))
    facts = list(_flat({key: value for key, value in card.items() if key not in ONLY_IN_CARD}))
    leak = {key: card.get(key) for key in ("min_train_to_held_out_m", "split_buffer_m")}
    return {"splits": splits, "columns": columns, "facts": facts, "attribution": card.get("attribution", []), **leak}


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of numbers and short texts, nested ones under `outer, inner`."""
    for key, value in tree.items():
        name = f"{before}{words(key)}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}, ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        elif isinstance(value, str) and 0 < len(value) <= 80:
            yield name, value


def words(key: str) -> str:
    """`split_buffer_m` as `split buffer (m)`."""
    text = key.replace("_", " ")
    return f"{text[:-2]} (m)" if text.endswith(" m") else text


def rejects_section(folder: AnyPath | None) -> list[tuple[str, str, int]]:
    """(step, reason, rows), the most frequent first; a reason ends at its colon, after which come details of one row."""
    counts: Counter[tuple[str, str]] = Counter()
    for file in list_files(folder, "*.parquet") if folder else []:
        reasons = read_table_file(file, ["reason"])["reason"].to_pylist()
        counts.update((file.stem, reason.partition(":")[0]) for reason in reasons)
    return [(step, reason, n) for (step, reason), n in counts.most_common(20)]


def thumbnails(folder: AnyPath, split: str, ids: set[str]) -> dict[str, str]:
    """Data URLs of some photos of a split."""
    if not ids or not tables.count_rows(folder, split):
        return {}
    return {
        row["id"]: data_url(row["image"]["bytes"])
        for row in tables.iter_rows(folder, split, ["id", "image"])
        if row["id"] in ids
    }


def data_url(encoded: bytes) -> str:
    """Encoded image -> a data URL, a JPEG of at most THUMBNAIL pixels; small files go in as they are."""
    image = Image.open(io.BytesIO(encoded))
    kind = f"image/{(image.format or 'jpeg').lower()}"
    if max(image.size) > THUMBNAIL or len(encoded) > 60_000:
        image.draft("RGB", (THUMBNAIL, THUMBNAIL))
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=82)
        encoded, kind = buffer.getvalue(), "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(encoded).decode()}"
