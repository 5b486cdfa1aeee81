"""Test photos through a model: every question of their rounds, batched with questions of about the same length."""

import io
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from addressvlm.config import EvaluateConfig
from addressvlm.evaluation.parsing import Judge
from addressvlm.inference import Localizer

COLUMNS = ["id", "place", "lat", "lon", "street", "district", "image", "rounds"]  # of tables.PHOTOS, needed to ask

Row = dict[str, Any]


def ask(localizer: Localizer, photos: Sequence[Row], config: EvaluateConfig, seed: int) -> Iterator[list[Row]]:
    """Rows of `tables.ANSWERS` without `correct`, a batch at a time; each photo is decoded once.

    Args:
        photos: rows of `tables.PHOTOS` with COLUMNS.
        seed: with the questions themselves, decides what sampling draws, whichever worker asks them.
    """
    pictures = {photo["id"]: Image.open(io.BytesIO(photo["image"]["bytes"])).convert("RGB") for photo in photos}
    questions = sorted((q for photo in photos for q in questions_of(photo)), key=lambda q: len(q["question"]))
    for start in range(0, len(questions), config.batch_size):
        batch = questions[start : start + config.batch_size]
        texts = [q["question"] for q in batch]
        torch.manual_seed(zlib.crc32(repr((seed, batch[0]["id"], texts)).encode()))
        answers = localizer.answer([pictures[q["id"]] for q in batch], texts, config.max_new_tokens, config.temperature)
        yield [{**question, "answer": answer} for question, answer in zip(batch, answers, strict=True)]


def questions_of(photo: Row) -> list[Row]:
    """The rounds of a photo, each on its own, with what is needed to judge and to group its answer."""
    kept = {key: photo[key] for key in COLUMNS if key not in ("image", "rounds")}
    return [
        kept | {key: asked[key] for key in ("level", "kind", "question", "options")} | {"expected": asked["answer"]}
        for asked in photo["rounds"]
    ]


def judged(answers: Iterable[Mapping[str, Any]], judge: Judge) -> list[Row]:
    """The same rows with `correct`."""
    return [
        {
            **row,
            "correct": judge.correct(
                row["level"], row["kind"], row["expected"], row["answer"], row["options"], street=row["street"]
            ),
        }
        for row in answers
    ]
