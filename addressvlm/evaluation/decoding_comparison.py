"""One model, its ways of answering side by side: free, constrained, scored, and scored with what is known beforehand.

The priors are those of paper 002 (Table 12), and a rough GPS fix; `evaluation.drawn_priors` says how they are drawn. Beside
them: how far the probabilities can be believed.
"""

import math
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from addressvlm.answers.calibration import Calibration, ece, reliability
from addressvlm.answers.priors import Circle, Prior
from addressvlm.config.compare import KnownConfig
from addressvlm.errors import InputError
from addressvlm.evaluation.likelihood import calibrated_rows, scored_photos
from addressvlm.evaluation.metrics import Interval, share_ci
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.gazetteer.spatial_index import METRES_PER_DEGREE

WITHIN = math.sqrt(-2 * math.log(0.05))  # radius that holds 95 % of a two-dimensional Gaussian, in its deviations

Row = dict[str, Any]


def prior_words(known: KnownConfig) -> str:
    """What is known, for a reader: `the district and GPS within 100 m`; empty if nothing is."""
    parts = [
        "the district" if known.district else "",
        f"{known.streets} street{'s' if known.streets > 1 else ''}" if known.streets else "",
        f"GPS within {known.gps_m:g} m" if known.gps_m else "",
    ]
    return " and ".join(part for part in parts if part)


def restrict_scores(rows: Sequence[Row], known: KnownConfig, gazetteer: Gazetteer, seed: int) -> list[Row]:
    """The same rows of `tables.SCORES` with -inf for each address that is ruled out beforehand.

    A photo of which nothing can be known (no coordinates, a street or district that the gazetteer has not), or of which no
    address would be left, keeps its scores.

    Raises:
        InputError: there are fewer streets than are to be known, or a circle is to choose among streets without shapes.
    """
    city = gazetteer.city or "the city"
    if known.streets and known.streets > len(gazetteer.streets):
        raise InputError(f"a prior of {known.streets} streets, but {city} has {len(gazetteer.streets)}: lower streets.")
    if known.gps_m and not gazetteer.geometry:
        raise InputError(f"no street of {city} has a shape, so no circle can choose: leave gps_m out.")
    return [_restricted(row, known, gazetteer, seed) for row in rows]


def ruled_out(rows: Sequence[Row], gazetteer: Gazetteer) -> dict[str, float]:
    """Of restricted rows: mean number of addresses left, photos with nothing ruled out, photos without their true address."""
    of = scored_photos(rows, gazetteer)
    left = np.isfinite(of.scores).sum(axis=1)
    return {
        "addresses left": float(left.mean()) if len(rows) else 0.0,
        "nothing ruled out": int((left == of.scores.shape[1]).sum()),
        "true address ruled out": int(((of.truth >= 0) & ~of.reachable).sum()),
    }


def _restricted(row: Row, known: KnownConfig, gazetteer: Gazetteer, seed: int) -> Row:
    try:
        weights = _prior(row, known, gazetteer, seed).log_weights(gazetteer)
    except InputError:
        return row
    left = np.array(row["scores"]) + weights
    return {**row, "scores": left.tolist()} if np.isfinite(left).any() else row


def _prior(row: Row, known: KnownConfig, gazetteer: Gazetteer, seed: int) -> Prior:
    return Prior(
        districts=(row["district"],) if known.district else (),
        streets=_some_streets(row, known.streets, gazetteer, seed) if known.streets else (),
        circle=_fix(row, known.gps_m, seed) if known.gps_m else None,
    )


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


STREETS = (20, 10, 5, 2)  # W of paper 002, Table 12
RADII_M = (200, 100, 50)
LEVELS = {"A_ds": "address", "A_s": "street", "A_d": "district"}


@dataclass(frozen=True)
class BootstrapSettings:
    """How intervals and draws are made."""

    resamples: int = 1000
    seed: int = 0


def compare_decoding(
    rows: Sequence[Row],
    gazetteer: Gazetteer,
    calibration: Calibration,
    answered: Mapping[str, Iterable[Row]],
    settings: BootstrapSettings,
) -> dict[str, Any]:
    """The table and the diagram of one model, as modes.json and the report show them.

    Args:
        rows: of `addressvlm.storage.tables.SCORES`, of test photos.
        gazetteer: the model's own.
        calibration: fitted on other photos.
        answered: mode -> its judged rows of `tables.ANSWERS` about the same photos.
    """
    table = [{"name": name, "metrics": _of_answers(list(given), settings)} for name, given in answered.items()]
    believed = calibrated_rows(rows, calibration)
    if calibration.own_prior:
        table.append({"name": "likelihood, own prior left in", "metrics": _of_prior(rows, gazetteer, KnownConfig(), settings)})
    table += [
        {
            "name": f"+ {prior_words(known)}" if prior_words(known) else "likelihood",
            "metrics": _of_prior(believed, gazetteer, known, settings),
        }
        for known in _priors(gazetteer)
    ]
    return {"photos": len(rows), "table": table, "trust": _trust(rows, believed, gazetteer, calibration, settings)}


def _of_answers(answers: Sequence[Row], settings: BootstrapSettings) -> dict[str, Interval]:
    """The accuracy of what was generated."""
    metrics = {}
    for name, level in LEVELS.items():
        asked = [row for row in answers if (row["level"], row["kind"]) == (level, "generation")]
        metrics[name] = _share([row["correct"] for row in asked], [row["place"] for row in asked], settings)
    return metrics


def _of_prior(
    rows: Sequence[Row], gazetteer: Gazetteer, known: KnownConfig, settings: BootstrapSettings
) -> dict[str, Interval]:
    """The accuracy of the likeliest address among those that each photo's prior leaves."""
    left = restrict_scores(rows, known, gazetteer, settings.seed)
    best = [gazetteer.addresses[int(np.argmax(row["scores"]))] for row in left]
    places = [row["place"] for row in rows]
    streets = [address.street == row["street"] for address, row in zip(best, rows, strict=True)]
    districts = [address.district == row["district"] for address, row in zip(best, rows, strict=True)]
    both = [street and district for street, district in zip(streets, districts, strict=True)]
    right = {"A_ds": both, "A_s": streets, "A_d": districts}
    return {name: _share(found, places, settings) for name, found in right.items()}


def _priors(gazetteer: Gazetteer) -> list[KnownConfig]:
    """What is known of each photo, from one line of the table to the next; first nothing."""
    chosen = [KnownConfig(), KnownConfig(district=True)]
    chosen += [KnownConfig(streets=w) for w in STREETS if w < len(gazetteer.streets)]
    return chosen + [KnownConfig(gps_m=radius) for radius in RADII_M if gazetteer.geometry]


def _trust(
    rows: Sequence[Row], believed: Sequence[Row], gazetteer: Gazetteer, calibration: Calibration, settings: BootstrapSettings
) -> dict[str, Any]:
    """Reliability on photos that the calibration has not seen, and what the confidence is good for.

    Args:
        rows: as the model scored them; `believed` are the same calibrated.
    """
    known = scored_photos(believed, gazetteer)
    confidence, right = known.confidences(1.0)
    raw, raw_right = scored_photos(rows, gazetteer).confidences(1.0)
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


def _ece_interval(confidence: np.ndarray, right: np.ndarray, places: Sequence[str], settings: BootstrapSettings) -> Interval:
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


def _share(right: Any, places: Sequence[str], settings: BootstrapSettings) -> Interval:
    return share_ci(right, places, settings.resamples, settings.seed)
