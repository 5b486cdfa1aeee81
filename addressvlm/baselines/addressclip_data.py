"""AddressCLIP's training data (paper 002): photos with their address, caption and position, in steps."""

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
EXPLAINED = ("alignment", "reasoning")  # captions that are labels of that table


class Captions:
    """Captions of one kind, see the setting `captions` of `compare.systems`.

    Attributes:
        missing: number of training photos without an explanation, whose caption is the address alone.
    """

    def __init__(self, kind: str, explanations: Mapping[str, str] | None = None, photos: int = 0) -> None:
        self.kind, self.explanations = kind, explanations or {}
        self.missing = photos - len(self.explanations) if kind in EXPLAINED else 0

    def caption(self, row: Row, address: str, image: Image.Image) -> str | None:
        """The caption of a row of `tables.PHOTOS`: the address, first so that it is never cut off, and what the photo shows."""
        if self.kind == "none":
            return None
        if self.kind == "template":
            return f"{address}. {describe(photo_facts(row['street'], row['district'], image), random.Random(row['id']))}"
        return f"{address}. {self.explanations[row['id']]}" if row["id"] in self.explanations else address


def caption_texts(run: Run, kind: str) -> Captions:
    """The captions of a run's training photos; InputError where they are to be explanations that are not there."""
    if kind not in EXPLAINED:
        return Captions(kind)
    folder = getattr(run, kind)
    if not tables.count_rows(folder, "train"):
        prompt = " --set labels.prompt=reasoning" if kind == "reasoning" else ""
        raise InputError(
            f"captions are to be the explanations of {folder}, which are not there: run ray_jobs/label.py{prompt} first, or "
            "set captions to template."
        )
    photos = set(tables.read_table(run.photos, "train", ["id"])["id"].to_pylist())
    rows = tables.iter_rows(folder, "train", ["id", "rounds"])
    explanations = {row["id"]: row["rounds"][-1]["answer"] for row in rows if row["id"] in photos and row["rounds"]}
    return Captions(kind, explanations, len(photos))


COLUMNS = ("id", "image", "street", "district", "lat", "lon")  # of tables.PHOTOS


@dataclass(frozen=True)
class ClipSample:
    """One training photo."""

    index: int
    image: Image.Image | None  # None if the frozen encoder's output for it is cached
    address: str
    caption: str | None
    lonlat: tuple[float, float]  # degrees; NaN if unknown


@dataclass(frozen=True)
class ClipBatch:
    """A worker's photos of a step; `pixels` are those of the samples that have an image, in order."""

    samples: list[ClipSample]
    pixels: Tensors | None

    @property
    def positions(self) -> torch.Tensor:
        """Longitudes and latitudes in degrees (N, 2), float64."""
        return torch.tensor([sample.lonlat for sample in self.samples], dtype=torch.float64)


class ClipData(Schedule):
    """The photos of every step; `without_image` are samples whose image is not needed again, by row."""

    def __init__(self, rows: RowSource, per_step: int, seed: int, captions: Captions, encoder: DualEncoder) -> None:
        super().__init__(rows, per_step, seed)
        self.captions, self.encoder = captions, encoder
        self.without_image: dict[int, ClipSample] = {}

    def read(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[int, Row]]:
        """The worker's rows at a step; empty where the image is not needed."""
        indices = self.indices(step, rank, world)
        return [(index, {} if index in self.without_image else self.rows[index]) for index in indices]

    def sample(self, index: int, row: Row) -> Any:
        """The sample of a row."""
        if index in self.without_image:
            return self.without_image[index]
        image, address = image_from_row(row), Address(row["street"], row["district"]).text()
        lon, lat = (math.nan if row[axis] is None else float(row[axis]) for axis in ("lon", "lat"))
        return ClipSample(index, image, address, self.captions.caption(row, address, image), (lon, lat))

    def encode(self, sample: ClipSample) -> ClipSample:
        """The sample itself, as `Schedule.encoded` needs an encoder."""
        return sample

    def drop_image(self, sample: ClipSample) -> None:
        """Decode this sample's photo no more."""
        self.without_image[sample.index] = replace(sample, image=None)

    def batch(self, step: int, rank: int = 0, world: int = 1, most: int | None = None) -> ClipBatch:
        """The worker's share of a step, at most the first `most` photos."""
        samples: list[ClipSample] = self.encoded(self, step, rank, world)[:most]
        images = [sample.image for sample in samples if sample.image is not None]
        return ClipBatch(samples, self.encoder.pixels(images) if images else None)

    def batches(self, start: int, steps: int, rank: int, world: int) -> Iterator[tuple[int, ClipBatch]]:
        """Every step's number and batch; the next batch is prepared meanwhile."""
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
