"""Rows of grafted images -> rows of alignment labels."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from addressvlm.addresses import Gazetteer
from addressvlm.config import LabelsConfig
from addressvlm.labels import Labeler, Request, make_labeler
from addressvlm.labels.facts import Facts


def label_rows(labels: str, seed: int, gazetteer: str, grafts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of GRAFTS to rows of ALIGNMENT, with a labeler that the process keeps between calls.

    Args:
        labels: a LabelsConfig as JSON.
        gazetteer: path of the city's gazetteer; without that file the checks know fewer streets.

    Raises:
        InputError: the labeler can't be used.
    """
    grafts = list(grafts)
    requests = [Request(row["id"], row["image"]["bytes"], Facts.from_json(row["facts"])) for row in grafts]
    written = _kept_labeler(labels, seed, gazetteer).label(requests)
    return [
        {
            **{key: row[key] for key in ("id", "place", "image", "street", "district")},
            "rounds": [
                {"level": "alignment", "kind": "explanation", "question": label.question, "answer": label.text, "options": []}
            ],
            "source": label.source,
            "attempts": label.attempts,
        }
        for row, label in zip(grafts, written, strict=True)
    ]


@cache
def _kept_labeler(labels: str, seed: int, gazetteer: str) -> Labeler:
    streets = Gazetteer.load(Path(gazetteer)).streets if Path(gazetteer).is_file() else []
    return make_labeler(LabelsConfig.model_validate_json(labels), seed, streets)
