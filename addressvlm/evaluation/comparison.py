"""Statistics of systems on the same photos, beyond the metrics of each: top k, paired tests, and accuracy by photo groups."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from addressvlm.answers import calibration
from addressvlm.evaluation import metrics
from addressvlm.evaluation.likelihood import scored_photos
from addressvlm.evaluation.metrics import Interval
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.gazetteer.spatial_index import METRES_PER_DEGREE

TOP = 5
BANDS = 4  # of equally many photos, by distance to the nearest training photo

Row = dict[str, Any]


def address_answers(answers: Sequence[Row]) -> list[Row]:
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
    order = np.argsort(-scores, axis=1, kind="stable")
    rankings = [line[possible[line]] for line, possible in zip(order, scores > -np.inf, strict=True)]
    names = {"address": [a.text() for a in gazetteer.addresses], "street": [a.street for a in gazetteer.addresses]}
    truth = {"address": [Address(r["street"], r["district"]).text() for r in rows], "street": [r["street"] for r in rows]}
    places = [row["place"] for row in rows]
    accuracy = {}
    for level, level_names in names.items():
        ranked = [list(dict.fromkeys(level_names[i] for i in line)) for line in rankings]
        for k in (1, TOP):
            right = [t in line[:k] for t, line in zip(truth[level], ranked, strict=True)]
            accuracy[f"{level}-{k}"] = metrics.share_ci(right, places, resamples, seed)
    return accuracy


def by_training(answers: Sequence[Row], trained: Collection[Address], resamples: int, seed: int) -> dict[str, Interval]:
    """Accuracy on whole addresses that training photos show, and that they don't (`seen`, `unseen`)."""
    groups: dict[str, list[Row]] = {"seen": [], "unseen": []}
    for row in address_answers(answers):
        groups["seen" if Address(row["street"], row["district"]) in trained else "unseen"].append(row)
    return {name: _accuracy(rows, resamples, seed) for name, rows in groups.items() if rows}


def split_verdicts(main: Sequence[Row], other: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Ids of photos whose whole address only the main system, and only the other, got right."""
    right = {row["id"]: bool(row["correct"]) for row in address_answers(other)}
    pairs = [(row["id"], bool(row["correct"]), right[row["id"]]) for row in address_answers(main) if row["id"] in right]
    return [photo for photo, a, b in pairs if a and not b], [photo for photo, a, b in pairs if b and not a]


def mcnemar(main: Sequence[Row], other: Sequence[Row]) -> Row:
    """McNemar's exact test on whole addresses that both answered.

    Returns:
        `better` and `worse`, photos that only the main or only the other system got right; `p`, two-sided. It takes photos as
        independent, which those of one place are not: the paired interval over places is the safer of the two.
    """
    better, worse = map(len, split_verdicts(main, other))
    n, least = better + worse, min(better, worse)
    p = min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)
    return {"better": better, "worse": worse, "p": p}


def paired_difference(main: Sequence[Row], other: Sequence[Row], resamples: int, seed: int) -> Row:
    """The main system minus another on the questions that both answered; McNemar's test beside it."""
    return {**metrics.paired_difference_ci(main, other, resamples=resamples, seed=seed), "mcnemar": mcnemar(main, other)}


def confidence_accuracy(validation: Sequence[Row], test: Sequence[Row], gazetteer: Gazetteer) -> Row | None:
    """Reliability of a ranking with a temperature fitted on validation photos; None if there are none to fit it on.

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
    bands = [band.tolist() for band in np.array_split(np.array(order, dtype=object), min(BANDS, len(order)))] if order else []
    return [(distances_m[band[0]], distances_m[band[-1]], band) for band in bands]


def by_distance(answers: Sequence[Row], distances_m: Mapping[str, float], resamples: int, seed: int) -> list[Row]:
    """Accuracy on whole addresses in each of `distance_bands`: `from_m`, `to_m` and the interval."""
    rows = {row["id"]: row for row in address_answers(answers)}
    return [
        {"from_m": low, "to_m": high, **_accuracy([rows[i] for i in ids if i in rows], resamples, seed)}
        for low, high, ids in distance_bands(distances_m)
        if any(i in rows for i in ids)
    ]


def nearest_training_m(photos: Sequence[Row], training: Sequence[Row]) -> dict[str, float]:
    """Photo -> metres to the nearest training photo; photos without coordinates are left out. Rows with id, lat, lon."""
    known = [(row["lat"], row["lon"]) for row in training if row["lat"] is not None and row["lon"] is not None]
    queries = [row for row in photos if row["lat"] is not None and row["lon"] is not None]
    if not known or not queries:
        return {}
    scale = np.array([METRES_PER_DEGREE, METRES_PER_DEGREE * math.cos(math.radians(queries[0]["lat"]))])
    points = np.unique(np.array(known), axis=0) * scale
    return {row["id"]: float(np.hypot(*(points - np.array([row["lat"], row["lon"]]) * scale).T).min()) for row in queries}


def neighbours(answers: Sequence[Row], gazetteer: Gazetteer, near: int = 5) -> Row | None:
    """How many of the wrong streets that answers name are among the `near` nearest to the true one; None without shapes."""
    wrong = [
        (row["street"], named)
        for row in address_answers(answers)
        if not row["correct"] and (named := gazetteer.find_street(row["answer"])) and named != row["street"]
    ]
    if not gazetteer.geometry or not wrong:
        return None
    close = sum(named in gazetteer.nearest(true, near) for true, named in wrong if true in gazetteer.geometry)
    return {"wrong": len(wrong), "near": close, "of": near}


def _accuracy(rows: Sequence[Row], resamples: int, seed: int) -> Interval:
    return metrics.share_ci([bool(row["correct"]) for row in rows], [row["place"] for row in rows], resamples, seed)
