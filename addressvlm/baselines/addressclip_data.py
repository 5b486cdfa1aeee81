"""What AddressCLIP sees at each step: photos with their address, caption and position, cut into steps as all training is."""

import hashlib
import math
import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from addressvlm.baselines.dual_encoder import DualEncoder, Tensors
from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import Address
from addressvlm.labels.facts import photo_facts
from addressvlm.labels.templates import describe
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.training.collator import image_from_row
from addressvlm.training.dataset import RowSource, Schedule

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


def caption_texts(run: Run, kind: str) -> Captions:
    """The captions of a run's training photos.

    Raises:
        InputError: explanations are wanted and there are none.
    """
    if kind != "alignment":
        return Captions(kind)
    if not tables.count_rows(run.alignment, "train"):
        raise InputError(
            f"captions are to be the explanations of {run.alignment}, which are not there: run ray_jobs/label.py first, or set "
            "captions to template."
        )
    wanted = set(tables.read_table(run.photos, "train", ["id"])["id"].to_pylist())
    rows = tables.iter_rows(run.alignment, "train", ["id", "rounds"])
    found = {row["id"]: row["rounds"][-1]["answer"] for row in rows if row["id"] in wanted and row["rounds"]}
    return Captions(kind, found, len(wanted))


COLUMNS = ("id", "image", "street", "district", "lat", "lon")  # of tables.PHOTOS


@dataclass(frozen=True)
class ClipExample:
    """One training photo.

    Attributes:
        image: None if what the encoder makes of it is already known.
        lonlat: degrees; NaN if unknown.
    """

    index: int
    image: Image.Image | None
    address: str
    caption: str | None
    lonlat: tuple[float, float]


@dataclass(frozen=True)
class ClipBatch:
    """A worker's photos of a step; `pixels` are those of the photos that have an image, in order."""

    lessons: list[ClipExample]
    pixels: Tensors | None

    @property
    def positions(self) -> torch.Tensor:
        """Longitudes and latitudes in degrees (N, 2), float64."""
        return torch.tensor([lesson.lonlat for lesson in self.lessons], dtype=torch.float64)


class ClipData(Schedule):
    """The photos of every step.

    Attributes:
        known: lessons whose photo need not be looked at again, by row.
    """

    def __init__(self, rows: RowSource, per_step: int, seed: int, captions: Captions, encoder: DualEncoder) -> None:
        super().__init__(rows, per_step, seed)
        self.captions, self.encoder = captions, encoder
        self.known: dict[int, ClipExample] = {}

    def sample(self, index: int) -> Any:
        """The lesson of a row.

        Raises:
            UnusableError: its image can't be decoded.
        """
        if index in self.known:
            return self.known[index]
        row = self.rows[index]
        image, address = image_from_row(row), Address(row["street"], row["district"]).text()
        lon, lat = (math.nan if row[axis] is None else float(row[axis]) for axis in ("lon", "lat"))
        return ClipExample(index, image, address, self.captions.of(row, address, image), (lon, lat))

    def encode(self, lesson: ClipExample) -> ClipExample:
        """A lesson is what is collated; see `Schedule.encoded`."""
        return lesson

    def keep(self, lesson: ClipExample) -> None:
        """Its photo will not be needed again."""
        self.known[lesson.index] = replace(lesson, image=None)

    def batch(self, step: int, rank: int = 0, world: int = 1, most: int | None = None) -> ClipBatch:
        """The worker's share of a step, at most the first `most` photos."""
        lessons: list[ClipExample] = self.encoded(self, step, rank, world)[:most]
        images = [lesson.image for lesson in lessons if lesson.image is not None]
        return ClipBatch(lessons, self.encoder.pixels(images) if images else None)

    def batches(self, start: int, steps: int, rank: int, world: int) -> Iterator[tuple[int, ClipBatch]]:
        """Every step's number and batch, the next one's being made while this one is computed."""
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(self.batch, start, rank, world) if start < steps else None
            for number in range(start, steps):
                assert pending is not None
                batch = pending.result()
                if number + 1 < steps:
                    pending = pool.submit(self.batch, number + 1, rank, world)
                yield number, batch


def text_number(text: str) -> int:
    """A number that is the same for equal texts, on all workers; 63 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
