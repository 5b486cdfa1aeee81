"""Statistics of systems on the same photos, beyond the metrics of each: top k, paired tests, accuracy by photo groups.

And the decoding modes of one model side by side: free, constrained, likelihood, and likelihood with simulated priors; beside
them, how well its probabilities are calibrated.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from addressvlm.answers import calibration
from addressvlm.answers.calibration import Calibration, ece, reliability
from addressvlm.config.compare import SimulatedPriorConfig
from addressvlm.evaluation import metrics
from addressvlm.evaluation.likelihood import calibrated_rows, chunks, prior_words, restrict_scores, scored_photos
from addressvlm.evaluation.metrics import Interval, share_ci
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.gazetteer.spatial_index import METRES_PER_DEGREE
from addressvlm.storage import tables
from addressvlm.storage.remote_path import AnyPath

TOP = 5
BANDS = 4  # of equally many photos, by distance to the nearest training photo
STREETS = (20, 10, 5, 2)  # W of paper 002, Table 12
RADII_M = (200, 100, 50)
LEVELS = {"A_ds": "address", "A_s": "street", "A_d": "district"}

Row = dict[str, Any]


@dataclass(frozen=True)
class StoredAnswers:
    """A table of `tables.ANSWERS`, read row by row; in memory are only its answers to the question for the whole address."""

    folder: AnyPath
    split: str

    def __iter__(self) -> Iterator[Row]:
        return tables.iter_rows(self.folder, self.split)

    def __len__(self) -> int:
        return tables.count_rows(self.folder, self.split)

    @cached_property
    def addresses(self) -> list[Row]:
        """The answers to the question for the whole address, one a photo."""
        return [row for row in self if row["level"] == "address"]


Answers = StoredAnswers | Sequence[Row]  # judged, of one system


def address_answers(answers: Answers) -> list[Row]:
    """The answers to the question for the whole address, one a photo."""
    if isinstance(answers, StoredAnswers):
        return answers.addresses
    return [row for row in answers if row["level"] == "address"]


def top_k_accuracy(
    rows: Iterable[Row], gazetteer: Gazetteer, resamples: int, seed: int, main_streets: Mapping[str, str] | None = None
) -> dict[str, Interval]:
    """Accuracy among the first one and the first five of a ranking (paper 002, Sec. 6.1).

    Args:
        rows: of `tables.SCORES`; an address at -inf has no rank.
        main_streets: sub-street -> its street, where addresses name sub-streets.

    Returns:
        `address-1` and `address-5`, where an address is a street, or a sub-street, with its district (SSA if the city answers
        with sub-streets, SA if with streets); `street-1` and `street-5`, of the street or sub-street alone; with
        `main_streets` also `main-1` and `main-5`, of the street with its district (SA, of the same ranking); nothing without
        rows.
    """
    main_streets = {sub: street for sub, street in (main_streets or {}).items() if sub != street}

    def main(street: str, district: str) -> str:
        return Address(main_streets.get(street, street), district).text()

    names = {"address": [a.text() for a in gazetteer.addresses], "street": [a.street for a in gazetteer.addresses]}
    if main_streets:
        names["main"] = [main(a.street, a.district) for a in gazetteer.addresses]
    places: list[str] = []
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for row in rows:
        scores = np.array(row["scores"])
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] > -np.inf]
        truth = {
            "address": Address(row["street"], row["district"]).text(), "street": row["street"],
            "main": main(row["street"], row["district"]),
        }  # fmt: skip
        places.append(row["place"])
        for level, level_names in names.items():
            ranked = list(dict.fromkeys(level_names[i] for i in order))[:TOP]
            for k in (1, TOP):
                right[f"{level}-{k}"].append(truth[level] in ranked[:k])
    return {name: share_ci(hits, places, resamples, seed) for name, hits in right.items()}


def by_training(answers: Answers, trained: Collection[Address], resamples: int, seed: int) -> dict[str, Interval]:
    """Accuracy on whole addresses that training photos show, and that they don't (`seen`, `unseen`)."""
    groups: dict[str, list[Row]] = {"seen": [], "unseen": []}
    for row in address_answers(answers):
        groups["seen" if Address(row["street"], row["district"]) in trained else "unseen"].append(row)
    return {name: _accuracy(rows, resamples, seed) for name, rows in groups.items() if rows}


def split_verdicts(main: Answers, other: Answers) -> tuple[list[str], list[str]]:
    """Ids of photos whose whole address only the main system, and only the other, got right."""
    right = {row["id"]: bool(row["correct"]) for row in address_answers(other)}
    pairs = [(row["id"], bool(row["correct"]), right[row["id"]]) for row in address_answers(main) if row["id"] in right]
    return [photo for photo, a, b in pairs if a and not b], [photo for photo, a, b in pairs if b and not a]


def mcnemar(main: Answers, other: Answers) -> Row:
    """McNemar's exact test on whole addresses that both answered.

    Returns:
        `better` and `worse`, photos that only the main or only the other system got right; `p`, two-sided. It takes photos as
        independent, which those of one place are not: the paired interval over places is the safer of the two.
    """
    better, worse = map(len, split_verdicts(main, other))
    n, least = better + worse, min(better, worse)
    p = min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)
    return {"better": better, "worse": worse, "p": p}


def paired_difference(main: Answers, other: Answers, resamples: int, seed: int) -> Row:
    """The main system minus another on the questions that both answered; McNemar's test beside it."""
    return {**metrics.paired_difference_ci(main, other, resamples=resamples, seed=seed), "mcnemar": mcnemar(main, other)}


def confidence_accuracy(validation: Sequence[Row], test: Iterable[Row], gazetteer: Gazetteer) -> Row | None:
    """Reliability of a ranking with a temperature fitted on validation photos; None if there are none to fit it on.

    Both are rows of `tables.SCORES`.
    """
    if not validation or not scored_photos(validation, gazetteer).reachable.any():
        return None
    temperature = calibration.fit_calibration(scored_photos(validation, gazetteer), 0.0).temperature
    parts = [scored_photos(chunk, gazetteer).confidences(temperature) for chunk in chunks(test)]
    if not parts:
        return None
    confidence, right = map(np.concatenate, zip(*parts, strict=True))
    return {"temperature": temperature, "bins": reliability(confidence, right), "ece": ece(confidence, right)}


def distance_bands(distances_m: Mapping[str, float]) -> list[tuple[float, float, list[str]]]:
    """Photos in bands of about equally many by distance to the nearest training photo: least and most metres, ids."""
    order = sorted(distances_m, key=lambda photo: (distances_m[photo], photo))
    bands = [band.tolist() for band in np.array_split(np.array(order, dtype=object), min(BANDS, len(order)))] if order else []
    return [(distances_m[band[0]], distances_m[band[-1]], band) for band in bands]


def by_distance(answers: Answers, distances_m: Mapping[str, float], resamples: int, seed: int) -> list[Row]:
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


def neighbours(answers: Answers, gazetteer: Gazetteer, near: int = 5) -> Row | None:
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


def compare_decoding(
    rows: Iterable[Row],
    gazetteer: Gazetteer,
    calibration: Calibration,
    answers: Mapping[str, Iterable[Row]],
    bootstrap: tuple[int, int] = (1000, 0),
) -> dict[str, Any]:
    """The table and the reliability diagram of one model, as modes.json and the report show them.

    Args:
        rows: of `addressvlm.storage.tables.SCORES`, of test photos, as the model scored them.
        gazetteer: the model's own.
        calibration: fitted on other photos.
        answers: mode -> its judged rows of `tables.ANSWERS`; those about other photos don't count.
        bootstrap: number of resamples, and the seed of intervals and priors.
    """
    priors = [SimulatedPriorConfig(), SimulatedPriorConfig(district=True)]
    priors += [SimulatedPriorConfig(streets=w) for w in STREETS if w < len(gazetteer.streets)]
    priors += [SimulatedPriorConfig(gps_m=radius) for radius in RADII_M if gazetteer.geometry]
    modes = {f"+ {prior_words(prior)}" if prior_words(prior) else "likelihood": prior for prior in priors}
    right: dict[str, list[list[bool]]] = {"likelihood, own prior left in": []} if calibration.own_prior else {}
    right |= {mode: [] for mode in modes}  # mode -> for each photo whether street and district, and each of them, are right
    places: dict[str, str] = {}
    confidences: list[tuple[np.ndarray, ...]] = []
    for chunk in chunks(rows):
        calibrated = list(calibrated_rows(chunk, calibration))
        if calibration.own_prior:
            right["likelihood, own prior left in"] += _right(chunk, gazetteer)
        for mode, prior in modes.items():
            right[mode] += _right(restrict_scores(calibrated, prior, gazetteer, bootstrap[1]), gazetteer)
        photos = scored_photos(calibrated, gazetteer)
        confidences.append((*photos.confidences(1.0), *scored_photos(chunk, gazetteer).confidences(1.0)))
        places |= {row["id"]: row["place"] for row in chunk}

    table: dict[str, dict[str, Interval]] = {}
    for mode, mode_rows in answers.items():
        generated = [row for row in mode_rows if row["kind"] == "generation" and row["id"] in places]
        by_level = {name: [row for row in generated if row["level"] == level] for name, level in LEVELS.items()}
        table[mode] = {
            name: share_ci([row["correct"] for row in level_rows], [row["place"] for row in level_rows], *bootstrap)
            for name, level_rows in by_level.items()
        }
    of_photo = list(places.values())
    for mode, hits in right.items():
        table[mode] = {
            name: share_ci(column, of_photo, *bootstrap) for name, column in zip(LEVELS, zip(*hits, strict=True), strict=True)
        }
    confidence, correct, raw_confidence, raw_correct = map(np.concatenate, zip(*confidences, strict=True))
    return {
        "photos": len(places),
        "table": [{"name": name, "metrics": cells} for name, cells in table.items()],
        "trust": _trust(confidence, correct, raw_confidence, raw_correct, of_photo, calibration, bootstrap),
    }


def _right(rows: Sequence[Row], gazetteer: Gazetteer) -> list[list[bool]]:
    """Whether the likeliest address is right for each of LEVELS."""
    best = [gazetteer.addresses[int(np.argmax(row["scores"]))] for row in rows]
    street = [address.street == row["street"] for address, row in zip(best, rows, strict=True)]
    district = [address.district == row["district"] for address, row in zip(best, rows, strict=True)]
    return [[s and d, s, d] for s, d in zip(street, district, strict=True)]


def _trust(
    confidence: np.ndarray, right: np.ndarray, raw_confidence: np.ndarray, raw_right: np.ndarray, places: Sequence[str],
    calibration: Calibration, bootstrap: tuple[int, int],
) -> dict[str, Any]:  # fmt: skip
    """Reliability on photos that the calibration was not fitted on, and accuracy above its threshold; arrays by photo."""
    half = np.argsort(-confidence, kind="stable")[: (len(places) + 1) // 2]
    sure = confidence > calibration.threshold
    return {
        "temperature": calibration.temperature,
        "own_prior": bool(calibration.own_prior),
        "bins": reliability(confidence, right),
        "ece": _ece_interval(confidence, right, places, *bootstrap),
        "ece_uncalibrated": ece(raw_confidence, raw_right),
        "half": share_ci(right[half], [places[i] for i in half], *bootstrap),
        "target": calibration.target,
        "threshold": calibration.threshold,
        "coverage": share_ci(sure, places, *bootstrap),
        "precision": share_ci(right[sure], [place for place, s in zip(places, sure, strict=True) if s], *bootstrap),
    }


def _ece_interval(confidence: np.ndarray, right: np.ndarray, places: Sequence[str], resamples: int, seed: int) -> Interval:
    """The calibration error with its 95 % interval from resampling places."""
    photos: dict[str, list[int]] = {}
    for number, place in enumerate(places):
        photos.setdefault(place, []).append(number)
    groups, rng = [np.array(group) for group in photos.values()], np.random.default_rng(seed)
    samples = [np.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))]) for _ in range(resamples)]
    low, high = np.percentile([ece(confidence[sample], right[sample]) for sample in samples], [2.5, 97.5])
    value = ece(confidence, right)
    return {"value": value, "low": min(float(low), value), "high": max(float(high), value), "n": len(right)}
