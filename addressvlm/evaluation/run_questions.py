"""Ask a model every question about test photos, batched with questions of about the same length, and judge the answers."""

import io
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from PIL import Image

from addressvlm.answers.trie import Trie
from addressvlm.config.compare import EvaluateConfig
from addressvlm.evaluation.parsing import Judge
from addressvlm.inference import Localizer

COLUMNS = ["id", "place", "lat", "lon", "street", "district", "image", "rounds"]  # of tables.PHOTOS, needed to ask
KINDS = ("generation", "judgment", "choice")
MIN_ANSWER_TOKENS, WORDS_AROUND = 24, 8

Row = dict[str, Any]


def run_questions(
    localizer: Localizer, photos: Sequence[Row], config: EvaluateConfig, seed: int, kinds: Collection[str] = KINDS
) -> Iterator[list[Row]]:
    """Rows of `tables.ANSWERS` without `correct`, a batch at a time; each photo is decoded once.

    Args:
        photos: rows of `tables.PHOTOS` with COLUMNS.
        config: `answers` is the decoding mode, free or constrained; likelihood: see `addressvlm.evaluation.likelihood`.
        seed: decides sampled answers, together with the questions of a batch, whichever worker asks them.
        kinds: of questions.
    """
    images = {photo["id"]: photo_image(photo) for photo in photos}
    questions = [question for photo in photos for question in questions_of(photo) if question["kind"] in kinds]
    questions.sort(key=lambda question: len(question["question"]))
    limit = config.max_new_tokens or answer_limit(localizer)
    for start in range(0, len(questions), config.batch_size):
        batch = questions[start : start + config.batch_size]
        batch_images, texts = [images[q["id"]] for q in batch], [q["question"] for q in batch]
        torch.manual_seed(zlib.crc32(repr((seed, batch[0]["id"], texts)).encode()))
        if config.answers == "constrained":
            allowed = [_allowed_answers(localizer, question) for question in batch]
            decoded = localizer.answer_from(batch_images, texts, [_trie(localizer, answers) for answers in allowed])
            answers = [names[one.index] for names, one in zip(allowed, decoded, strict=True)]
        else:
            answers = localizer.answer(batch_images, texts, limit, config.temperature)
        yield [{**question, "answer": answer} for question, answer in zip(batch, answers, strict=True)]


def answer_limit(localizer: Localizer) -> int:
    """Tokens of the longest address that the model may have to name, with room for a few words around it."""
    addresses = localizer.gazetteer.addresses if localizer.gazetteer else []
    tokens = localizer.tokenizer([address.text() for address in addresses] or [""], add_special_tokens=False)["input_ids"]
    return max(MIN_ANSWER_TOKENS, max(map(len, tokens)) + WORDS_AROUND)


def photo_image(photo: Row) -> Image.Image:
    """The decoded photo of a row of `tables.PHOTOS`."""
    return Image.open(io.BytesIO(photo["image"]["bytes"])).convert("RGB")


def questions_of(photo: Row) -> list[Row]:
    """The questions about a photo, a row for each, with what is needed to judge and to group its answer."""
    columns = {key: photo[key] for key in COLUMNS if key not in ("image", "rounds")}
    return [
        columns | {key: turn[key] for key in ("level", "kind", "question", "options")} | {"expected": turn["answer"]}
        for turn in photo["rounds"]
    ]


def in_order(questions: Iterable[Row]) -> list[Row]:
    """The questions about a photo, or their answers, in the order of `tables.ANSWERS`."""
    return sorted(questions, key=lambda row: (row["level"], row["kind"], row["question"]))


def judge_answers(answers: Iterable[Mapping[str, Any]], judge: Judge) -> list[Row]:
    """The same rows with `correct`."""
    keys = ("level", "kind", "expected", "answer", "options", "street")
    return [{**row, "correct": judge.correct(**{key: row[key] for key in keys})} for row in answers]


def _allowed_answers(localizer: Localizer, question: Row) -> tuple[str, ...]:
    """The only answers that constrained decoding allows: Yes and No, the options, or names of the gazetteer."""
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
