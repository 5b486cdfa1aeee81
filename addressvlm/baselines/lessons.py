"""What AddressCLIP sees at each step: photos with their address, caption and position, cut into steps as all training is."""

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from addressvlm.addresses import Address
from addressvlm.baselines.captions import Captions
from addressvlm.baselines.dual_encoder import DualEncoder, Tensors
from addressvlm.training.collate import image_of
from addressvlm.training.rows import Schedule, Table

COLUMNS = ("id", "image", "street", "district", "lat", "lon")  # of tables.PHOTOS


@dataclass(frozen=True)
class Lesson:
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
class Batch:
    """A worker's photos of a step; `pixels` are those of the photos that have an image, in order."""

    lessons: list[Lesson]
    pixels: Tensors | None

    @property
    def positions(self) -> torch.Tensor:
        """Longitudes and latitudes in degrees (N, 2), float64."""
        return torch.tensor([lesson.lonlat for lesson in self.lessons], dtype=torch.float64)


class Lessons(Schedule):
    """The photos of every step.

    Attributes:
        known: lessons whose photo need not be looked at again, by row.
    """

    def __init__(self, rows: Table, per_step: int, seed: int, captions: Captions, encoder: DualEncoder) -> None:
        super().__init__(rows, per_step, seed)
        self.captions, self.encoder = captions, encoder
        self.known: dict[int, Lesson] = {}

    def sample(self, index: int) -> Any:
        """The lesson of a row.

        Raises:
            UnusableError: its image can't be decoded.
        """
        if index in self.known:
            return self.known[index]
        row = self.rows[index]
        image, address = image_of(row), Address(row["street"], row["district"]).text()
        lon, lat = (math.nan if row[axis] is None else float(row[axis]) for axis in ("lon", "lat"))
        return Lesson(index, image, address, self.captions.of(row, address, image), (lon, lat))

    def encode(self, lesson: Lesson) -> Lesson:
        """A lesson is what is collated; see `Schedule.encoded`."""
        return lesson

    def keep(self, lesson: Lesson) -> None:
        """Its photo will not be needed again."""
        self.known[lesson.index] = replace(lesson, image=None)

    def batch(self, step: int, rank: int = 0, world: int = 1, most: int | None = None) -> Batch:
        """The worker's share of a step, at most the first `most` photos."""
        lessons: list[Lesson] = self.encoded(self, step, rank, world)[:most]
        images = [lesson.image for lesson in lessons if lesson.image is not None]
        return Batch(lessons, self.encoder.pixels(images) if images else None)

    def batches(self, start: int, steps: int, rank: int, world: int) -> Iterator[tuple[int, Batch]]:
        """Every step's number and batch, the next one's being made while this one is computed."""
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(self.batch, start, rank, world) if start < steps else None
            for number in range(start, steps):
                assert pending is not None
                batch = pending.result()
                if number + 1 < steps:
                    pending = pool.submit(self.batch, number + 1, rank, world)
                yield number, batch


def number_of(text: str) -> int:
    """A number that is the same for equal texts, on all workers; 63 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
