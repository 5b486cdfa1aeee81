"""Rows of images to rows of labels: alignment labels of grafted images, reasoning labels of street views."""

import random
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

from addressvlm.config.labels import LabelsConfig
from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.grafting import decode_photo, display_image
from addressvlm.labels.facts import Facts, photo_facts
from addressvlm.labels.labelers import CachedLabeler, Label, Labeler, Request, make_labeler, state_factory
from addressvlm.labels.prompt import Prompt, configured_prompt
from addressvlm.labels.response_cache import ResponseCache
from addressvlm.questions import SUFFIXES, TEMPLATES
from addressvlm.storage.remote_path import path_of
from addressvlm.storage.shards import ShardResult

LEVELS = {"graft": "alignment", "photo": "reasoning"}  # by what the prompt shows
FACTS_PIXELS = 168  # longer side of a photo whose facts are measured
CHECK_PIXELS = 42  # of an image that is only checked

Row = dict[str, Any]


def label_batch(labels: str, seed: int, gazetteer: str, response_cache: str, rows: Iterable[Row]) -> ShardResult:
    """Rows of GRAFTS to rows of ALIGNMENT, or, by a prompt that shows photos alone, rows of PHOTOS to rows of REASONING.

    Images that can't be decoded become rejects; labels are counted by source, rejected texts by problem. The labeler is kept
    between calls.

    Args:
        labels: a LabelsConfig as JSON.
        gazetteer: path of the city's gazetteer; without that file the validator knows fewer streets.
        response_cache: folder of the response cache that holds all answers; empty: the labeler writes the texts now.
    """
    config = LabelsConfig.model_validate_json(labels)
    prompt, city = configured_prompt(config), load_gazetteer(gazetteer)
    pairs, rejects = label_requests(rows, prompt, city.city if city else "")
    results = _labeler(labels, seed, gazetteer, response_cache).label([request for _, request in pairs])
    counts = Counter(f"source {label.source}" for label in results)
    counts.update(f"problem {kind}" for label in results for kind in label.problems)
    labelled = [_label_row(row, label, config, prompt, seed) for (row, _), label in zip(pairs, results, strict=True)]
    return ShardResult({"train": labelled}, rejects, counts)


def label_requests(rows: Iterable[Row], prompt: Prompt, city: str) -> tuple[list[tuple[Row, Request]], list[Row]]:
    """Rows of GRAFTS or PHOTOS with their requests, and rows of REJECTS for those whose image can't be decoded."""
    pairs, rejects = [], []
    for row in rows:
        try:
            data = display_image(row)
            if prompt.shows == "graft":
                facts = Facts.from_json(row["facts"])
                decode_photo(data, CHECK_PIXELS)
            else:
                facts = photo_facts(row["street"], row["district"], decode_photo(data, FACTS_PIXELS), city)
            pairs.append((row, Request(row["id"], data, facts)))
        except InputError as error:
            rejects.append({"file": row["image"]["path"], "row": None, "id": row["id"], "reason": str(error)})
    return pairs, rejects


@cache
def load_gazetteer(path: str) -> Gazetteer | None:
    """The city's gazetteer, None if there is no such file."""
    return Gazetteer.load(path_of(path)) if path_of(path).is_file() else None


def _label_row(row: Row, label: Label, config: LabelsConfig, prompt: Prompt, seed: int) -> Row:
    """A row of ALIGNMENT or REASONING, without the hint; it begins with a question for the address if the settings say so."""
    rounds = []
    if config.ask_address:
        question = random.Random(f"{seed}:{row['id']}").choice(TEMPLATES["address"])
        answer = Address(row["street"], row["district"]).text()
        rounds.append(("address", "generation", f"{question} {SUFFIXES['generation']}", answer))
    rounds.append((LEVELS[prompt.shows], "explanation", label.question, label.text))
    return {
        **{key: row.get(key) for key in ("id", "place", "image", "tile", "street", "district")},
        "rounds": [
            {"level": level, "kind": kind, "question": question, "answer": answer, "options": []}
            for level, kind, question, answer in rounds
        ],
        "source": label.source,
        "attempts": label.attempts,
    }


@cache
def _labeler(labels: str, seed: int, gazetteer: str, response_cache: str) -> Labeler:
    config, city = LabelsConfig.model_validate_json(labels), load_gazetteer(gazetteer)
    if response_cache:
        return CachedLabeler(state_factory(config, seed, city), ResponseCache(path_of(response_cache)))
    return make_labeler(config, seed, city)
