"""Test photos through a model: every question of their rounds, batched with questions of about the same length."""

import io
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from PIL import Image

from addressvlm.answers.trie import Trie
from addressvlm.config.evaluate import EvaluateConfig
from addressvlm.evaluation.parsing import Judge
from addressvlm.inference import Localizer

COLUMNS = ["id", "place", "lat", "lon", "street", "district", "image", "rounds"]  # of tables.PHOTOS, needed to ask
KINDS = ("generation", "judgment", "choice")

Row = dict[str, Any]


def run_questions(
    localizer: Localizer, photos: Sequence[Row], config: EvaluateConfig, seed: int, kinds: Collection[str] = KINDS
) -> Iterator[list[Row]]:
    """Rows of `tables.ANSWERS` without `correct`, a batch at a time; each photo is decoded once.

    Args:
        photos: rows of `tables.PHOTOS` with COLUMNS.
        config: `answers` says how they are found; `likelihood` is for `addressvlm.evaluation.likelihood`.
        seed: with the questions themselves, decides what sampling draws, whichever worker asks them.
        kinds: of questions that are asked.
    """
    pictures = {photo["id"]: photo_image(photo) for photo in photos}
    questions = sorted(
        (q for photo in photos for q in questions_of(photo) if q["kind"] in kinds), key=lambda q: len(q["question"])
    )
    for start in range(0, len(questions), config.batch_size):
        batch = questions[start : start + config.batch_size]
        images, texts = [pictures[q["id"]] for q in batch], [q["question"] for q in batch]
        torch.manual_seed(zlib.crc32(repr((seed, batch[0]["id"], texts)).encode()))
        if config.answers == "constrained":
            answers = _constrained(localizer, images, batch)
        else:
            answers = localizer.answer(images, texts, config.max_new_tokens, config.temperature)
        yield [{**question, "answer": answer} for question, answer in zip(batch, answers, strict=True)]


def photo_image(photo: Row) -> Image.Image:
    """The decoded photo of a row of `tables.PHOTOS`."""
    return Image.open(io.BytesIO(photo["image"]["bytes"])).convert("RGB")


def questions_of(photo: Row) -> list[Row]:
    """The rounds of a photo, each on its own, with what is needed to judge and to group its answer."""
    kept = {key: photo[key] for key in COLUMNS if key not in ("image", "rounds")}
    return [
        kept | {key: asked[key] for key in ("level", "kind", "question", "options")} | {"expected": asked["answer"]}
        for asked in photo["rounds"]
    ]


def judge_answers(answers: Iterable[Mapping[str, Any]], judge: Judge) -> list[Row]:
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


def _constrained(localizer: Localizer, images: Sequence[Image.Image], questions: Sequence[Row]) -> list[str]:
    """The answers when only names of the gazetteer, Yes and No, or the options can be said."""
    allowed = [_allowed(localizer, question) for question in questions]
    tries = [_trie(localizer, answers) for answers in allowed]
    found = localizer.answer_from(images, [q["question"] for q in questions], tries)
    return [answers[decoded.index] for answers, decoded in zip(allowed, found, strict=True)]


def _allowed(localizer: Localizer, question: Row) -> tuple[str, ...]:
    """What a question can be answered with."""
    if question["kind"] == "judgment":
        return ("Yes", "No")
    if question["kind"] == "choice":
        return tuple(question["options"])
    gazetteer = localizer.require_gazetteer()
    names = {"street": gazetteer.streets, "district": gazetteer.districts, "address": [a.text() for a in gazetteer.addresses]}
    return tuple(names[question["level"]])


@lru_cache(maxsize=512)
def _trie(localizer: Localizer, answers: tuple[str, ...]) -> Trie:
    return localizer.trie(answers)
