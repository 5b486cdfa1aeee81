"""A model's score of every address for test photos: computed, calibrated, restricted by a prior, and turned into answers.

Simulated priors are those of paper 002 (Table 12) and a rough GPS fix, drawn by seed from a photo's true address: its district,
the true street among others drawn at random, or a position that is off by a Gaussian error.
"""

import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from addressvlm.answers.address_distribution import AddressDistribution, Circle, Prior
from addressvlm.answers.calibration import Calibration, ScoredPhotos
from addressvlm.config.compare import SimulatedPriorConfig
from addressvlm.errors import InputError
from addressvlm.evaluation.run_questions import in_order, photo_image, questions_of
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.gazetteer.spatial_index import METRES_PER_DEGREE
from addressvlm.storage import tables
from addressvlm.storage.remote_path import AnyPath

CHUNK = 64  # photos whose scores are in memory
COLUMNS = ["id", "place", "lat", "lon", "street", "district", "image"]  # of tables.PHOTOS, needed to score
DEVIATIONS_95 = math.sqrt(-2 * math.log(0.05))  # radius that holds 95 % of a two-dimensional Gaussian, in deviations

Row = dict[str, Any]


@dataclass(frozen=True)
class ScoreTables:
    """Stored scores of a system, read piece by piece: photos times addresses need not fit into memory.

    Attributes:
        folders: split -> folder of its table, whose columns include those of `tables.SCORES`.
        calibration: applied to the rows.
    """

    folders: Mapping[str, AnyPath]
    calibration: Calibration = field(default_factory=Calibration)

    def rows(self, split: str) -> Iterator[Row]:
        """Rows of `tables.SCORES`, in the order of the photos table; none for a split without scores."""
        if split in self.folders:
            rows = tables.iter_rows(self.folders[split], split, tables.SCORES.names)
            yield from calibrated_rows(rows, self.calibration)

    def photos(self, split: str, gazetteer: Gazetteer) -> ScoredPhotos:
        """All scores of a split in memory: for the few photos that something is fitted to."""
        return scored_photos(list(self.rows(split)), gazetteer)


def chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Up to CHUNK rows at a time."""
    remaining = iter(rows)
    while chunk := list(islice(remaining, CHUNK)):
        yield chunk


def score_photos(
    scores_of: Callable[[Sequence[Image.Image]], np.ndarray], photos: Sequence[Row], batch_size: int
) -> Iterator[list[Row]]:
    """Rows of `tables.SCORES`, a batch at a time, from rows of `tables.PHOTOS` with COLUMNS.

    Args:
        scores_of: images -> ln p of all addresses up to a constant, float64 (images, addresses).
    """
    for start in range(0, len(photos), batch_size):
        batch = photos[start : start + batch_size]
        scores = scores_of([photo_image(photo) for photo in batch])
        yield [
            {key: photo[key] for key in COLUMNS if key != "image"} | {"scores": row.tolist()}
            for photo, row in zip(batch, scores, strict=True)
        ]


def scored_photos(rows: Sequence[Row], gazetteer: Gazetteer) -> ScoredPhotos:
    """Rows of `tables.SCORES` as arrays."""
    number = {address: i for i, address in enumerate(gazetteer.addresses)}
    truth = [number.get(Address(row["street"], row["district"]), -1) for row in rows]
    scores = np.array([row["scores"] for row in rows], dtype=np.float64).reshape(len(rows), len(number))
    return ScoredPhotos(scores, np.array(truth, dtype=np.int64), [row["place"] for row in rows])


def calibrated_rows(rows: Iterable[Row], calibration: Calibration) -> Iterator[Row]:
    """Rows of `tables.SCORES` with calibrated scores."""
    for row in rows:
        yield {**row, "scores": calibration.apply(np.array(row["scores"])).tolist()}


def answers_from_scores(rows: Iterable[Row], photos: Iterable[Row], gazetteer: Gazetteer) -> Iterator[Row]:
    """Rows of `tables.ANSWERS` without `correct`: every question of the photos, answered by their scores.

    Args:
        rows: of `tables.SCORES`.
        photos: rows of `tables.PHOTOS` in the same order, and perhaps others between them; at least what `questions_of` needs.
    """
    remaining = iter(photos)
    for row in rows:
        distribution = AddressDistribution(gazetteer.addresses, np.array(row["scores"]))
        photo = next(photo for photo in remaining if photo["id"] == row["id"])
        for question in in_order(questions_of(photo)):
            level, options = question["level"], question["options"]
            if question["kind"] == "judgment":
                answer = "Yes" if distribution.judge(options[0], level) else "No"
            elif question["kind"] == "choice":
                answer = distribution.choose(options, level)
            else:
                answer = distribution.name(level)
            yield {**question, "answer": answer}


def prior_words(prior: SimulatedPriorConfig) -> str:
    """The prior for a reader: `the district and GPS within 100 m`; empty if it says nothing."""
    parts = [
        "the district" if prior.district else "",
        f"{prior.streets} street{'s' if prior.streets > 1 else ''}" if prior.streets else "",
        f"GPS within {prior.gps_m:g} m" if prior.gps_m else "",
    ]
    return " and ".join(part for part in parts if part)


def restrict_scores(rows: Sequence[Row], prior: SimulatedPriorConfig, gazetteer: Gazetteer, seed: int) -> list[Row]:
    """The same rows of `tables.SCORES` with -inf for each address that the simulated prior rules out.

    A photo without a prior (no coordinates, a street or district that the gazetteer has not), or of which no address would be
    left, keeps its scores.

    Raises:
        InputError: the city has fewer streets than the prior, or a circle is to choose among streets without shapes.
    """
    city = gazetteer.city or "the city"
    if prior.streets and prior.streets > len(gazetteer.streets):
        raise InputError(f"a prior of {prior.streets} streets, but {city} has {len(gazetteer.streets)}: lower streets.")
    if prior.gps_m and not gazetteer.geometry:
        raise InputError(f"no street of {city} has a shape, so no circle can choose: leave gps_m out.")
    restricted = []
    for row in rows:
        try:
            scores = np.array(row["scores"]) + simulated_prior(row, prior, gazetteer, seed).log_weights(gazetteer)
        except InputError:
            restricted.append(row)
            continue
        restricted.append({**row, "scores": scores.tolist()} if np.isfinite(scores).any() else row)
    return restricted


def simulated_prior(row: Row, prior: SimulatedPriorConfig, gazetteer: Gazetteer, seed: int) -> Prior:
    """The prior of one photo, drawn from its true address and position."""

    def rng(purpose: str) -> random.Random:
        return random.Random(zlib.crc32(repr((seed, purpose, row["id"])).encode()))

    streets: tuple[str, ...] = ()
    if prior.streets:
        others = [street for street in gazetteer.streets if street != row["street"]]
        streets = (row["street"], *rng("streets").sample(others, prior.streets - 1))
    circle = None
    if prior.gps_m and row["lat"] is not None and row["lon"] is not None:
        fix, deviation = rng("fix"), prior.gps_m / DEVIATIONS_95
        east, north = fix.gauss(0, deviation), fix.gauss(0, deviation)
        lat = row["lat"] + north / METRES_PER_DEGREE
        lon = row["lon"] + east / (METRES_PER_DEGREE * math.cos(math.radians(row["lat"])))
        circle = Circle(lat, lon, prior.gps_m)
    return Prior((row["district"],) if prior.district else (), streets, circle)


def restriction_stats(rows: Iterable[Row], gazetteer: Gazetteer) -> dict[str, float]:
    """Of restricted rows: mean number of addresses left, photos with nothing ruled out, photos without their true address."""
    left: list[int] = []
    without_truth = 0
    for chunk in chunks(rows):
        photos = scored_photos(chunk, gazetteer)
        left += np.isfinite(photos.scores).sum(axis=1).tolist()
        without_truth += int(((photos.truth >= 0) & ~photos.reachable).sum())
    return {
        "addresses left": float(np.mean(left)) if left else 0.0,
        "nothing ruled out": sum(count == len(gazetteer.addresses) for count in left),
        "true address ruled out": without_truth,
    }
