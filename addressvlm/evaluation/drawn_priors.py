"""What is known of a photo beforehand, drawn by chance from its true address, and what it leaves (paper 002, D.1, Table 12).

The district is the true one. Of W streets one is the true one, the others are drawn at random. A GPS fix is off by chance, so
that 95 of 100 lie within the radius of the true place. A draw depends on the photo and the seed alone, so all systems know the
same.
"""

import math
import random
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from addressvlm.addresses import Gazetteer
from addressvlm.answers.priors import Circle, Prior
from addressvlm.config_compare import Known
from addressvlm.errors import InputError
from addressvlm.evaluation.scores import scored
from addressvlm.nearby import METRES_PER_DEGREE

WITHIN = math.sqrt(-2 * math.log(0.05))  # radius that holds 95 % of a two-dimensional Gaussian, in its deviations

Row = dict[str, Any]


def words(known: Known) -> str:
    """What is known, for a reader: `the district and GPS within 100 m`; empty if nothing is."""
    parts = [
        "the district" if known.district else "",
        f"{known.streets} street{'s' if known.streets > 1 else ''}" if known.streets else "",
        f"GPS within {known.gps_m:g} m" if known.gps_m else "",
    ]
    return " and ".join(part for part in parts if part)


def restricted(rows: Sequence[Row], known: Known, gazetteer: Gazetteer, seed: int) -> list[Row]:
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
    of = scored(rows, gazetteer)
    left = np.isfinite(of.scores).sum(axis=1)
    return {
        "addresses left": float(left.mean()) if len(rows) else 0.0,
        "nothing ruled out": int((left == of.scores.shape[1]).sum()),
        "true address ruled out": int(((of.truth >= 0) & ~of.reachable).sum()),
    }


def _restricted(row: Row, known: Known, gazetteer: Gazetteer, seed: int) -> Row:
    try:
        weights = _prior(row, known, gazetteer, seed).log_weights(gazetteer)
    except InputError:
        return row
    left = np.array(row["scores"]) + weights
    return {**row, "scores": left.tolist()} if np.isfinite(left).any() else row


def _prior(row: Row, known: Known, gazetteer: Gazetteer, seed: int) -> Prior:
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
