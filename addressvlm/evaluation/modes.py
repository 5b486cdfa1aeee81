"""One model, its ways of answering side by side: free, constrained, scored, and scored with what is known beforehand.

The priors are those of paper 002 (Table 12), and a rough GPS fix; `evaluation.drawn_priors` says how they are drawn. Beside
them: how far the probabilities can be believed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from addressvlm.addresses import Gazetteer
from addressvlm.answers.calibration import Calibration, ece, reliability
from addressvlm.config_compare import Known
from addressvlm.evaluation.drawn_priors import restricted, words
from addressvlm.evaluation.metrics import Interval, share
from addressvlm.evaluation.scores import calibrated, scored

STREETS = (20, 10, 5, 2)  # W of paper 002, Table 12
RADII_M = (200, 100, 50)
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
    believed = calibrated(rows, calibration)
    if calibration.own_prior:
        table.append({"name": "scored, own prior left in", "metrics": _of_prior(rows, gazetteer, Known(), settings)})
    table += [
        {"name": f"+ {words(known)}" if words(known) else "scored", "metrics": _of_prior(believed, gazetteer, known, settings)}
        for known in _priors(gazetteer)
    ]
    return {"photos": len(rows), "table": table, "trust": _trust(rows, believed, gazetteer, calibration, settings)}


def _of_answers(answers: Sequence[Row], settings: Settings) -> dict[str, Interval]:
    """The accuracy of what was generated."""
    metrics = {}
    for name, level in LEVELS.items():
        asked = [row for row in answers if (row["level"], row["kind"]) == (level, "generation")]
        metrics[name] = _share([row["correct"] for row in asked], [row["place"] for row in asked], settings)
    return metrics


def _of_prior(rows: Sequence[Row], gazetteer: Gazetteer, known: Known, settings: Settings) -> dict[str, Interval]:
    """The accuracy of the likeliest address among those that each photo's prior leaves."""
    left = restricted(rows, known, gazetteer, settings.seed)
    best = [gazetteer.addresses[int(np.argmax(row["scores"]))] for row in left]
    places = [row["place"] for row in rows]
    streets = [address.street == row["street"] for address, row in zip(best, rows, strict=True)]
    districts = [address.district == row["district"] for address, row in zip(best, rows, strict=True)]
    both = [street and district for street, district in zip(streets, districts, strict=True)]
    right = {"A_ds": both, "A_s": streets, "A_d": districts}
    return {name: _share(found, places, settings) for name, found in right.items()}


def _priors(gazetteer: Gazetteer) -> list[Known]:
    """What is known of each photo, from one line of the table to the next; first nothing."""
    chosen = [Known(), Known(district=True)]
    chosen += [Known(streets=w) for w in STREETS if w < len(gazetteer.streets)]
    return chosen + [Known(gps_m=radius) for radius in RADII_M if gazetteer.geometry]


def _trust(
    rows: Sequence[Row], believed: Sequence[Row], gazetteer: Gazetteer, calibration: Calibration, settings: Settings
) -> dict[str, Any]:
    """Reliability on photos that the calibration has not seen, and what the confidence is good for.

    Args:
        rows: as the model scored them; `believed` are the same calibrated.
    """
    known = scored(believed, gazetteer)
    confidence, right = known.confidences(1.0)
    raw, raw_right = scored(rows, gazetteer).confidences(1.0)
    half = np.argsort(-confidence, kind="stable")[: (len(rows) + 1) // 2]
    sure = confidence > calibration.threshold
    return {
        "temperature": calibration.temperature,
        "own_prior": bool(calibration.own_prior),
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
