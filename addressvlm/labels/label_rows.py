"""Rows of images -> rows of labels: of grafted images alignment labels, of street views alone reasoning labels."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from addressvlm.config.labels import LabelsConfig
from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.grafting import decode_photo, display_image
from addressvlm.labels import Label, Labeler, Request, beginning, make_labeler
from addressvlm.labels.cached_labels import CachedLabeler
from addressvlm.labels.facts import Facts, photo_facts
from addressvlm.labels.prompt import Prompt, prompt_of
from addressvlm.labels.response_cache import ResponseCache
from addressvlm.questions import SUFFIXES, TEMPLATES
from addressvlm.storage.remote_path import path_of
from addressvlm.storage.shards import ShardResult

LEVELS = {"graft": "alignment", "photo": "reasoning"}  # by what the prompt shows
FACTS_PIXELS = 168  # longer side of a photo that is only measured
LOOKED_AT_PIXELS = 42  # of an image that need only be whole


def label_batch(labels: str, seed: int, gazetteer: str, ledger: str, rows: Iterable[dict[str, Any]]) -> ShardResult:
    """Rows of GRAFTS to rows of ALIGNMENT, or by a prompt that shows photos alone rows of PHOTOS to rows of REASONING.

    Besides them rejects where the image can't be decoded, and counts of sources and problems. The process keeps the labeler
    between calls.

    Args:
        labels: a LabelsConfig as JSON.
        gazetteer: path of the city's gazetteer; without that file the checks know fewer streets.
        ledger: folder of the answers to rows that were asked about before; empty: the labeler writes.

    Raises:
        InputError: the labeler can't be used, or the ledger lacks an answer.
    """
    config = LabelsConfig.model_validate_json(labels)
    found, rejects = readable_rows(rows, prompt_of(config), city_of(gazetteer))
    written = _kept_labeler(labels, seed, gazetteer, ledger).label([request for _, request in found])
    made = label_row([row for row, _ in found], written, config, prompt_of(config), seed)
    counts = Counter(f"source {label.source}" for label in written)
    counts.update(f"problem {kind}" for label in written for kind in label.problems)
    return ShardResult({"train": made}, rejects, counts)


def readable_rows(
    rows: Iterable[dict[str, Any]], prompt: Prompt, city: str
) -> tuple[list[tuple[dict[str, Any], Request]], list[dict[str, Any]]]:
    """Rows with what a labeler is asked about them, and rows of REJECTS for those whose image can't be decoded."""
    found, rejects = [], []
    for row in rows:
        try:
            request = label_request(row, prompt, city)
            if prompt.shows == "graft":
                decode_photo(request.image, LOOKED_AT_PIXELS)
            found.append((row, request))
        except InputError as error:
            rejects.append({"file": row["image"]["path"], "row": None, "id": row["id"], "reason": str(error)})
    return found, rejects


def city_of(gazetteer: str) -> str:
    """The city's name, empty without a gazetteer."""
    known = _kept_gazetteer(gazetteer)
    return known.city if known else ""


def label_request(row: dict[str, Any], prompt: Prompt, city: str = "") -> Request:
    """What a labeler is asked about a row: of GRAFTS, or of PHOTOS, whose facts are those that need no map.

    Raises:
        InputError: the image of a photo, or one of two images, can't be decoded.
    """
    data = display_image(row)
    if prompt.shows == "graft":
        return Request(row["id"], data, Facts.from_json(row["facts"]))
    return Request(row["id"], data, photo_facts(row["street"], row["district"], decode_photo(data, FACTS_PIXELS), city))


def label_row(
    rows: Sequence[dict[str, Any]], labels: Sequence[Label], config: LabelsConfig, prompt: Prompt, seed: int
) -> list[dict[str, Any]]:
    """Rows of ALIGNMENT or REASONING from the rows that were asked about and their labels: the hint stays behind."""
    level = LEVELS[prompt.shows]
    return [
        {
            **{key: row.get(key) for key in ("id", "place", "image", "tile", "street", "district")},
            "rounds": [*_asked(row, config, seed), _round(level, "explanation", label.question, label.text)],
            "source": label.source,
            "attempts": label.attempts,
        }
        for row, label in zip(rows, labels, strict=True)
    ]


def _asked(row: dict[str, Any], config: LabelsConfig, seed: int) -> list[dict[str, Any]]:
    """The address in stage 2's words, asked before the reasons are, if the settings want it."""
    if not config.ask_address:
        return []
    question = random.Random(f"{seed}:{row['id']}").choice(TEMPLATES["address"])
    answer = Address(row["street"], row["district"]).text()
    return [_round("address", "generation", f"{question} {SUFFIXES['generation']}", answer)]


def _round(level: str, kind: str, question: str, answer: str) -> dict[str, Any]:
    return {"level": level, "kind": kind, "question": question, "answer": answer, "options": []}


@cache
def _kept_gazetteer(path: str) -> Gazetteer | None:
    return Gazetteer.load(path_of(path)) if path_of(path).is_file() else None


@cache
def _kept_labeler(labels: str, seed: int, gazetteer: str, ledger: str) -> Labeler:
    config, known = LabelsConfig.model_validate_json(labels), _kept_gazetteer(gazetteer)
    if ledger:
        return CachedLabeler(beginning(config, seed, known), ResponseCache(path_of(ledger)))
    return make_labeler(config, seed, known)
