"""The decoding modes of one model side by side: free, constrained, likelihood, and likelihood with simulated priors.

Beside them, how well its probabilities are calibrated.
"""

from collections.abc import Iterable, Mapping, Sequence
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


def compare_decoding(
    rows: Sequence[Row],
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
        answers: mode -> its judged rows of `tables.ANSWERS` about the same photos.
        bootstrap: number of resamples, and the seed of intervals and priors.
    """
    priors = [SimulatedPriorConfig(), SimulatedPriorConfig(district=True)]
    priors += [SimulatedPriorConfig(streets=w) for w in STREETS if w < len(gazetteer.streets)]
    priors += [SimulatedPriorConfig(gps_m=radius) for radius in RADII_M if gazetteer.geometry]
    calibrated = calibrated_rows(rows, calibration)

    metrics: dict[str, dict[str, Interval]] = {}
    for mode, mode_rows in answers.items():
        generated = [row for row in mode_rows if row["kind"] == "generation"]
        by_level = {name: [row for row in generated if row["level"] == level] for name, level in LEVELS.items()}
        metrics[mode] = {
            name: share_ci([row["correct"] for row in level_rows], [row["place"] for row in level_rows], *bootstrap)
            for name, level_rows in by_level.items()
        }
    if calibration.own_prior:
        metrics["likelihood, own prior left in"] = _prior_metrics(rows, gazetteer, priors[0], bootstrap)
    for prior in priors:
        name = f"+ {prior_words(prior)}" if prior_words(prior) else "likelihood"
        metrics[name] = _prior_metrics(calibrated, gazetteer, prior, bootstrap)
    table = [{"name": name, "metrics": cells} for name, cells in metrics.items()]
    return {"photos": len(rows), "table": table, "trust": _trust(rows, calibrated, gazetteer, calibration, bootstrap)}


def _prior_metrics(
    rows: Sequence[Row], gazetteer: Gazetteer, prior: SimulatedPriorConfig, bootstrap: tuple[int, int]
) -> dict[str, Interval]:
    """Accuracy of the likeliest address among those that each photo's prior leaves."""
    restricted = restrict_scores(rows, prior, gazetteer, bootstrap[1])
    best = [gazetteer.addresses[int(np.argmax(row["scores"]))] for row in restricted]
    streets = [address.street == row["street"] for address, row in zip(best, rows, strict=True)]
    districts = [address.district == row["district"] for address, row in zip(best, rows, strict=True)]
    both = [street and district for street, district in zip(streets, districts, strict=True)]
    places = [row["place"] for row in rows]
    return {name: share_ci(r, places, *bootstrap) for name, r in {"A_ds": both, "A_s": streets, "A_d": districts}.items()}


def _trust(
    rows: Sequence[Row], calibrated: Sequence[Row], gazetteer: Gazetteer, calibration: Calibration, bootstrap: tuple[int, int]
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
