"""Rows of grafted images -> rows of alignment labels."""

import random
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from addressvlm.addresses import Address, Gazetteer
from addressvlm.config_labels import LabelsConfig
from addressvlm.labels import Labeler, Request, make_labeler
from addressvlm.labels.facts import Facts
from addressvlm.questions import SUFFIXES, TEMPLATES


def label_rows(labels: str, seed: int, gazetteer: str, grafts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of GRAFTS to rows of ALIGNMENT, with a labeler that the process keeps between calls.

    Args:
        labels: a LabelsConfig as JSON.
        gazetteer: path of the city's gazetteer; without that file the checks know fewer streets.

    Raises:
        InputError: the labeler can't be used.
    """
    grafts = list(grafts)
    config = LabelsConfig.model_validate_json(labels)
    requests = [Request(row["id"], row["image"]["bytes"], Facts.from_json(row["facts"])) for row in grafts]
    written = _kept_labeler(labels, seed, gazetteer).label(requests)
    return [
        {
            **{key: row[key] for key in ("id", "place", "image", "street", "district")},
            "rounds": [*_asked(row, config, seed), _round("alignment", "explanation", label.question, label.text)],
            "source": label.source,
            "attempts": label.attempts,
        }
        for row, label in zip(grafts, written, strict=True)
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
def _kept_labeler(labels: str, seed: int, gazetteer: str) -> Labeler:
    streets = Gazetteer.load(Path(gazetteer)).streets if Path(gazetteer).is_file() else []
    return make_labeler(LabelsConfig.model_validate_json(labels), seed, streets)
