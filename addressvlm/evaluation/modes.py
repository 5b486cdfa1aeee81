"""One model, its ways of answering side by side: free, constrained, scored, and scored with what is known beforehand.

The priors are those of paper 002 (Table 12): the district, or W streets with the true one among them; and a rough GPS fix,
drawn so that 95 of 100 lie within the radius of the true place. Beside them: how far the probabilities can be believed.
"""

import math
import random
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from addressvlm.addresses import Gazetteer
from addressvlm.answers.calibration import Calibration, ece, reliability
from addressvlm.answers.priors import Circle, Prior
from addressvlm.errors import InputError
from addressvlm.evaluation.metrics import Interval, share
from addressvlm.evaluation.scores import scored
from addressvlm.nearby import METRES_PER_DEGREE

STREETS = (20, 10, 5, 2)  # W of paper 002, Table 12
RADII_M = (200, 100, 50)
WITHIN = math.sqrt(-2 * math.log(0.05))  # radius that holds 95 % of a two-dimensional Gaussian, in its deviations
LEVELS = {"A_ds": "address", "A_s": "street", "A_d": "district"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How intervals and draws are made."""

    resamples: int = 1000
    seed: int = 0


def compare(
    rows: Sequence[Row],
    gazetteer: Gazetteer,
    calibration: Calibration,
    answered: Mapping[str, Iterable[Row]],
    settings: Settings,
) -> dict[str, Any]:
    """The table and the diagram of one model, as modes.json and the report show them.

    Args:
        rows: of `addressvlm.tables.SCORES`, of test photos.
        gazetteer: the model's own.
        calibration: fitted on other photos.
        answered: mode -> its judged rows of `tables.ANSWERS` about the same photos.
    """
    table = [{"name": name, "metrics": _of_answers(list(given), settings)} for name, given in answered.items()]
    table += [
        {"name": name, "metrics": _of_prior(rows, gazetteer, make, settings)} for name, make in _priors(gazetteer, settings)
    ]
    return {"photos": len(rows), "table": table, "trust": _trust(rows, gazetteer, calibration, settings)}


def _of_answers(answers: Sequence[Row], settings: Settings) -> dict[str, Interval]:
    """The accuracy of what was generated."""
    metrics = {}
    for name, level in LEVELS.items():
        asked = [row for row in answers if (row["level"], row["kind"]) == (level, "generation")]
        metrics[name] = _share([row["correct"] for row in asked], [row["place"] for row in asked], settings)
    return metrics


def _of_prior(
    rows: Sequence[Row], gazetteer: Gazetteer, make: Callable[[Row], Prior], settings: Settings
) -> dict[str, Interval]:
    """The accuracy of the likeliest address among those that each photo's prior leaves."""
    best = [gazetteer.addresses[int(np.argmax(np.array(row["scores"]) + _weights(make(row), gazetteer)))] for row in rows]
    places = [row["place"] for row in rows]
    streets = [address.street == row["street"] for address, row in zip(best, rows, strict=True)]
    districts = [address.district == row["district"] for address, row in zip(best, rows, strict=True)]
    both = [street and district for street, district in zip(streets, districts, strict=True)]
    right = {"A_ds": both, "A_s": streets, "A_d": districts}
    return {name: _share(found, places, settings) for name, found in right.items()}


def _weights(prior: Prior, gazetteer: Gazetteer) -> np.ndarray:
    """As the prior says; nothing is ruled out where it would leave no address."""
    try:
        return prior.log_weights(gazetteer)
    except InputError:
        return np.zeros(len(gazetteer.addresses))


def _priors(gazetteer: Gazetteer, settings: Settings) -> list[tuple[str, Callable[[Row], Prior]]]:
    """Name and maker of each prior; the first is none at all."""
    chosen: list[tuple[str, Callable[[Row], Prior]]] = [("scored", lambda row: Prior())]
    chosen.append(("+ the district", lambda row: Prior(districts=(row["district"],))))
    chosen += [
        (f"+ {w} streets", lambda row, w=w: Prior(streets=_some_streets(row, w, gazetteer, settings.seed)))  # type: ignore[misc]
        for w in STREETS if w < len(gazetteer.streets)
    ]  # fmt: skip
    chosen += [
        (f"+ GPS within {radius} m", lambda row, radius=radius: Prior(circle=_fix(row, radius, settings.seed)))  # type: ignore[misc]
        for radius in RADII_M if gazetteer.geometry
    ]  # fmt: skip
    return chosen


def _rng(row: Row, what: str, seed: int) -> random.Random:
    return random.Random(zlib.crc32(repr((seed, what, row["id"])).encode()))


def _some_streets(row: Row, count: int, gazetteer: Gazetteer, seed: int) -> tuple[str, ...]:
    """The true street and others drawn at random, `count` together."""
    others = [street for street in gazetteer.streets if street != row["street"]]
    return (row["street"], *_rng(row, "streets", seed).sample(others, count - 1))


def _fix(row: Row, radius_m: float, seed: int) -> Circle | None:
    """A GPS fix that is off by chance, and the circle in which it says the place is; None for a photo without coordinates."""
    if row["lat"] is None or row["lon"] is None:
        return None
    rng, deviation = _rng(row, "fix", seed), radius_m / WITHIN
    east, north = rng.gauss(0, deviation), rng.gauss(0, deviation)
    lat = row["lat"] + north / METRES_PER_DEGREE
    lon = row["lon"] + east / (METRES_PER_DEGREE * math.cos(math.radians(row["lat"])))
    return Circle(lat, lon, radius_m)


def _trust(rows: Sequence[Row], gazetteer: Gazetteer, calibration: Calibration, settings: Settings) -> dict[str, Any]:
    """Reliability on photos that the calibration has not seen, and what the confidence is good for."""
    known = scored(rows, gazetteer)
    confidence, right = known.confidences(calibration.temperature)
    raw, raw_right = known.confidences(1.0)
    half = np.argsort(-confidence, kind="stable")[: (len(rows) + 1) // 2]
    sure = confidence > calibration.threshold
    return {
        "temperature": calibration.temperature,
        "bins": reliability(confidence, right),
        "ece": _ece_interval(confidence, right, known.places, settings),
        "ece_uncalibrated": ece(raw, raw_right),
        "half": _share(right[half], [known.places[i] for i in half], settings),
        "target": calibration.target,
        "threshold": calibration.threshold,
        "coverage": _share(sure, known.places, settings),
        "precision": _share(right[sure], [p for p, s in zip(known.places, sure, strict=True) if s], settings),
    }


def _ece_interval(confidence: np.ndarray, right: np.ndarray, places: Sequence[str], settings: Settings) -> Interval:
    """The calibration error with its 95 % interval from resampling places."""
    of: dict[str, list[int]] = {}
    for i, place in enumerate(places):
        of.setdefault(place, []).append(i)
    groups, rng = [np.array(group) for group in of.values()], np.random.default_rng(settings.seed)
    drawn = [
        np.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))]) for _ in range(settings.resamples)
    ]
    low, high = np.percentile([ece(confidence[d], right[d]) for d in drawn], [2.5, 97.5])
    value = ece(confidence, right)
    return {"value": value, "low": min(float(low), value), "high": max(float(high), value), "n": len(right)}


def _share(right: Any, places: Sequence[str], settings: Settings) -> Interval:
    return share(right, places, settings.resamples, settings.seed)
