"""The decoding modes of one model side by side: free, constrained, likelihood, and likelihood with simulated priors.

Beside them, how well its probabilities are calibrated.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from addressvlm.answers.calibration import Calibration, ece, reliability
from addressvlm.config.compare import SimulatedPriorConfig
from addressvlm.evaluation.likelihood import calibrated_rows, prior_words, restrict_scores, scored_photos
from addressvlm.evaluation.metrics import Interval, share_ci
from addressvlm.gazetteer.gazetteer import Gazetteer

STREETS = (20, 10, 5, 2)  # W of paper 002, Table 12
RADII_M = (200, 100, 50)
LEVELS = {"A_ds": "address", "A_s": "street", "A_d": "district"}

Row = dict[str, Any]


@dataclass(frozen=True)
class BootstrapSettings:
    """How intervals and priors are drawn."""

    resamples: int = 1000
    seed: int = 0


def compare_decoding(
    rows: Sequence[Row],
    gazetteer: Gazetteer,
    calibration: Calibration,
    answers: Mapping[str, Iterable[Row]],
    settings: BootstrapSettings,
) -> dict[str, Any]:
    """The table and the reliability diagram of one model, as modes.json and the report show them.

    Args:
        rows: of `addressvlm.storage.tables.SCORES`, of test photos, as the model scored them.
        gazetteer: the model's own.
        calibration: fitted on other photos.
        answers: mode -> its judged rows of `tables.ANSWERS` about the same photos.
    """
    priors = [SimulatedPriorConfig(), SimulatedPriorConfig(district=True)]
    priors += [SimulatedPriorConfig(streets=w) for w in STREETS if w < len(gazetteer.streets)]
    priors += [SimulatedPriorConfig(gps_m=radius) for radius in RADII_M if gazetteer.geometry]
    calibrated = calibrated_rows(rows, calibration)

    metrics = {mode: _answer_metrics(list(mode_rows), settings) for mode, mode_rows in answers.items()}
    if calibration.own_prior:
        metrics["likelihood, own prior left in"] = _prior_metrics(rows, gazetteer, priors[0], settings)
    for prior in priors:
        name = f"+ {prior_words(prior)}" if prior_words(prior) else "likelihood"
        metrics[name] = _prior_metrics(calibrated, gazetteer, prior, settings)
    table = [{"name": name, "metrics": cells} for name, cells in metrics.items()]
    return {"photos": len(rows), "table": table, "trust": _trust(rows, calibrated, gazetteer, calibration, settings)}


def _answer_metrics(answers: Sequence[Row], settings: BootstrapSettings) -> dict[str, Interval]:
    """Accuracy of generated answers."""
    metrics = {}
    for name, level in LEVELS.items():
        generated = [row for row in answers if (row["level"], row["kind"]) == (level, "generation")]
        metrics[name] = _share([row["correct"] for row in generated], [row["place"] for row in generated], settings)
    return metrics


def _prior_metrics(
    rows: Sequence[Row], gazetteer: Gazetteer, prior: SimulatedPriorConfig, settings: BootstrapSettings
) -> dict[str, Interval]:
    """Accuracy of the likeliest address among those that each photo's prior leaves."""
    restricted = restrict_scores(rows, prior, gazetteer, settings.seed)
    best = [gazetteer.addresses[int(np.argmax(row["scores"]))] for row in restricted]
    streets = [address.street == row["street"] for address, row in zip(best, rows, strict=True)]
    districts = [address.district == row["district"] for address, row in zip(best, rows, strict=True)]
    both = [street and district for street, district in zip(streets, districts, strict=True)]
    places = [row["place"] for row in rows]
    return {name: _share(r, places, settings) for name, r in {"A_ds": both, "A_s": streets, "A_d": districts}.items()}


def _trust(
    rows: Sequence[Row], calibrated: Sequence[Row], gazetteer: Gazetteer, calibration: Calibration, settings: BootstrapSettings
) -> dict[str, Any]:
    """Reliability on photos that the calibration was not fitted on, and accuracy above its threshold."""
    photos = scored_photos(calibrated, gazetteer)
    places = photos.places
    confidence, right = photos.confidences(1.0)
    raw_confidence, raw_right = scored_photos(rows, gazetteer).confidences(1.0)
    half = np.argsort(-confidence, kind="stable")[: (len(rows) + 1) // 2]
    sure = confidence > calibration.threshold
    return {
        "temperature": calibration.temperature,
        "own_prior": bool(calibration.own_prior),
        "bins": reliability(confidence, right),
        "ece": _ece_interval(confidence, right, places, settings),
        "ece_uncalibrated": ece(raw_confidence, raw_right),
        "half": _share(right[half], [places[i] for i in half], settings),
        "target": calibration.target,
        "threshold": calibration.threshold,
        "coverage": _share(sure, places, settings),
        "precision": _share(right[sure], [place for place, s in zip(places, sure, strict=True) if s], settings),
    }


def _ece_interval(confidence: np.ndarray, right: np.ndarray, places: Sequence[str], settings: BootstrapSettings) -> Interval:
    """The calibration error with its 95 % interval from resampling places."""
    photos: dict[str, list[int]] = {}
    for number, place in enumerate(places):
        photos.setdefault(place, []).append(number)
    groups, rng = [np.array(group) for group in photos.values()], np.random.default_rng(settings.seed)
    samples = [
        np.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))]) for _ in range(settings.resamples)
    ]
    low, high = np.percentile([ece(confidence[sample], right[sample]) for sample in samples], [2.5, 97.5])
    value = ece(confidence, right)
    return {"value": value, "low": min(float(low), value), "high": max(float(high), value), "n": len(right)}


def _share(right: Any, places: Sequence[str], settings: BootstrapSettings) -> Interval:
    return share_ci(right, places, settings.resamples, settings.seed)
