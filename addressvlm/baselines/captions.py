"""The texts that AddressCLIP learns from besides addresses: what a photo shows, and its address (paper 002, Sec. 4.2).

Photos that are asked about have none.
"""

import random
from collections.abc import Mapping
from typing import Any

from PIL import Image

from addressvlm import tables
from addressvlm.errors import InputError
from addressvlm.labels.facts import photo_facts
from addressvlm.labels.template import describe
from addressvlm.run import Run

Row = dict[str, Any]


class Captions:
    """Captions of one kind, see `compare.systems` `captions`.

    Attributes:
        missing: training photos that have no explanation, and for which the address alone stands.
    """

    def __init__(self, kind: str, explanations: Mapping[str, str] | None = None, photos: int = 0) -> None:
        self.kind, self.explanations = kind, explanations or {}
        self.missing = photos - len(self.explanations) if kind == "alignment" else 0

    def of(self, row: Row, address: str, image: Image.Image) -> str | None:
        """The caption of a row of `tables.PHOTOS`: the address, which is never cut off in front, then what the photo shows."""
        if self.kind == "none":
            return None
        if self.kind == "template":
            return f"{address}. {describe(photo_facts(row['street'], row['district'], image), random.Random(row['id']))}"
        return f"{address}. {self.explanations[row['id']]}" if row["id"] in self.explanations else address


def captions_of(run: Run, kind: str) -> Captions:
    """The captions of a run's training photos.

    Raises:
        InputError: explanations are wanted and there are none.
    """
    if kind != "alignment":
        return Captions(kind)
    if not tables.count(run.alignment, "train"):
        raise InputError(
            f"captions are to be the explanations of {run.alignment}, which are not there: run ray_jobs/label.py first, or set "
            "captions to template."
        )
    wanted = set(tables.read(run.photos, "train", ["id"])["id"].to_pylist())
    rows = tables.rows(run.alignment, "train", ["id", "rounds"])
    found = {row["id"]: row["rounds"][-1]["answer"] for row in rows if row["id"] in wanted and row["rounds"]}
    return Captions(kind, found, len(wanted))
