"""What a model holds of each test photo: its score of every address, from which all answers of the mode `scored_photos` follow."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from addressvlm.answers.address_distribution import AddressDistribution
from addressvlm.answers.calibration import Calibration, ScoredPhotos
from addressvlm.evaluation.run_questions import photo_image, questions_of
from addressvlm.gazetteer.gazetteer import Address, Gazetteer

COLUMNS = ["id", "place", "lat", "lon", "street", "district", "image"]  # of tables.PHOTOS, needed to score

Row = dict[str, Any]


def score_photos(
    scores_of: Callable[[Sequence[Image.Image]], np.ndarray], photos: Sequence[Row], at_once: int
) -> Iterator[list[Row]]:
    """Rows of `tables.SCORES`, `at_once` photos at a time, from rows of `tables.PHOTOS` with COLUMNS.

    Args:
        scores_of: images -> ln p of all addresses up to a constant, float64 (images, addresses).
    """
    for start in range(0, len(photos), at_once):
        batch = photos[start : start + at_once]
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


def calibrated_rows(rows: Iterable[Row], calibration: Calibration) -> list[Row]:
    """Rows of `tables.SCORES` as the model's calibration has them.

    Raises:
        InputError: it is of another number of addresses.
    """
    return [{**row, "scores": calibration.apply(np.array(row["scores"])).tolist()} for row in rows]


def answers_from_scores(rows: Iterable[Row], photos: Mapping[str, Row], gazetteer: Gazetteer) -> Iterator[Row]:
    """Rows of `tables.ANSWERS` without `correct`: every question of the photos, answered by their scores.

    Args:
        rows: of `tables.SCORES`.
        photos: id -> row of `tables.PHOTOS`, at least its `rounds` and what `questions_of` keeps.
    """
    for row in rows:
        beliefs = AddressDistribution(gazetteer.addresses, np.array(row["scores"]))
        for question in questions_of(photos[row["id"]]):
            yield {**question, "answer": _answer(beliefs, question)}


def _answer(beliefs: AddressDistribution, question: Row) -> str:
    level, options = question["level"], question["options"]
    if question["kind"] == "judgment":
        return "Yes" if beliefs.judge(options[0], level) else "No"
    return beliefs.choose(options, level) if question["kind"] == "choice" else beliefs.name(level)
