"""The rows of a training and their order, a function of seed and step alone, so that a resumed run sees the same rows."""

import json
import math
from collections import OrderedDict
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageEnhance

from addressvlm.config.train import AugmentConfig
from addressvlm.errors import InputError
from addressvlm.storage import tables
from addressvlm.storage.files import open_parquet
from addressvlm.storage.remote_path import AnyPath
from addressvlm.storage.run_dir import DONE_FILE, Run
from addressvlm.training.collator import Sample, SkipSampleError, sample_from_row

CACHED_GROUPS = 64  # row groups in memory
SHUFFLED_GROUPS = 32  # row groups whose rows are shuffled together; fewer than are cached
REPLACEMENTS = 16  # rows tried in place of one that can't be used
LOCATABILITY_COMMAND = "python ray_jobs/locatability.py --config … --segmentation … --clip …"
ASPECT = 4 / 3  # largest change of a crop's aspect ratio
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


class RowSource(Protocol):
    """Training rows, numbered from 0 to `starts[-1]`, and their order in each epoch."""

    starts: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def epoch(self, seed: int, epoch: int) -> np.ndarray: ...


class TableRows:
    """Random access to a table's split; `CACHED_GROUPS` row groups are in memory.

    Raises:
        InputError: the split has no files.
    """

    def __init__(self, folder: AnyPath, split: str, columns: tuple[str, ...] = ("id", "image", "tile", "rounds")) -> None:
        self.files = [open_parquet(path) for path in tables.table_files(folder, split)]
        self.columns = list(columns)
        self.groups = [
            (file, group, parquet.metadata.row_group(group).num_rows)
            for file, parquet in enumerate(self.files)
            for group in range(parquet.metadata.num_row_groups)
        ]
        self.starts = np.cumsum([0, *(n for _, _, n in self.groups)])
        self._cache: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self.starts, index, side="right") - 1)
        if group not in self._cache:
            file, number, _ = self.groups[group]
            self._cache[group] = self.files[file].read_row_group(number, columns=self.columns)
            if len(self._cache) > CACHED_GROUPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group].slice(index - int(self.starts[group]), 1).to_pylist()[0]

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of all rows: row groups shuffled, then rows within `SHUFFLED_GROUPS` groups at a time."""
        rng = np.random.default_rng([seed, epoch])
        groups = rng.permutation(len(self.groups))
        order = []
        for at in range(0, len(groups), SHUFFLED_GROUPS):
            members = [np.arange(self.starts[g], self.starts[g + 1]) for g in groups[at : at + SHUFFLED_GROUPS]]
            order.append(rng.permutation(np.concatenate(members)))
        return np.concatenate(order)


class MixedRows:
    """Several tables mixed row by row; an epoch goes `weight` times through each (paper 001, Table 4)."""

    def __init__(self, weighted: list[tuple[RowSource, float]]) -> None:
        self.tables = [table for table, _ in weighted]
        self.counts = [max(1, round(weight * len(table))) if len(table) else 0 for table, weight in weighted]
        self.starts = np.cumsum([0, *(len(table) for table in self.tables)])

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        table = int(np.searchsorted(self.starts, index, side="right") - 1)
        return self.tables[table][index - int(self.starts[table])]

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Each table's endless sequence of epochs, cut into its share; which table comes next is random."""
        sources = np.random.default_rng([seed, epoch, len(self.tables)]).permutation(
            np.repeat(np.arange(len(self.tables)), self.counts)
        )
        order = np.empty_like(sources)
        for number, (table, count) in enumerate(zip(self.tables, self.counts, strict=True)):
            if count:
                order[sources == number] = self.starts[number] + endless_epochs(table, seed, epoch * count, count)
        return order


def endless_epochs(table: RowSource, seed: int, start: int, count: int) -> np.ndarray:
    """Rows `start` to `start + count` of a table's endless sequence of epochs."""
    first, last = start // len(table), (start + count - 1) // len(table)
    rows = np.concatenate([table.epoch(seed, epoch) for epoch in range(first, last + 1)])
    return rows[start - first * len(table) :][:count]


class LocatableRows:
    """The rows of a table whose photo's locatability is at least `threshold`, renumbered from 0 in the table's order.

    Attributes:
        skipped: id of each other row -> why.

    Raises:
        InputError: the photos have not been scored, one of them has not, or none reaches the threshold.
    """

    def __init__(self, run: Run, folder: AnyPath, threshold: float) -> None:
        self.rows = TableRows(folder, "train")
        scores = locatability_scores(run)
        ids = tables.read_table(folder, "train", ["id"])["id"].to_pylist()
        if (unknown := next((name for name in ids if name not in scores), None)) is not None:
            raise InputError(
                f"{folder} has the photo {unknown}, which has no score in {run.locatability}: score the photos again, "
                f"`{LOCATABILITY_COMMAND} --redo`."
            )
        keep = np.array([scores[name] >= threshold for name in ids], dtype=bool)
        if ids and not keep.any():
            raise InputError(f"none of the {len(ids):,} rows of {folder} reaches the locatability {threshold:g}: lower it.")
        reason = f"its locatability is {{:.2f}}, below {threshold:g}"
        self.skipped = {name: reason.format(scores[name]) for name, above in zip(ids, keep, strict=True) if not above}
        self._indices = np.flatnonzero(keep)
        self._number = np.where(keep, np.cumsum(keep) - 1, -1)
        self.starts = np.array([0, len(self._indices)])

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[int(self._indices[index])]

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """The table's permutation without the skipped rows."""
        order = self._number[self.rows.epoch(seed, epoch)]
        return order[order >= 0]


def low_locatability(table: RowSource) -> dict[str, str]:
    """Id of each row below its table's threshold -> why."""
    if isinstance(table, MixedRows):
        return {name: why for part in table.tables for name, why in low_locatability(part).items()}
    return table.skipped if isinstance(table, LocatableRows) else {}


def locatability_scored_by(run: Run) -> dict[str, Any]:
    """The models and texts that scored a run's photos; InputError if none are scored."""
    try:
        scorer: dict[str, Any] = json.loads((run.locatability / DONE_FILE).read_text())["locatability"]
    except FileNotFoundError as error:
        raise unscored_error(run) from error
    return scorer


def locatability_scores(run: Run) -> dict[str, float]:
    """Id of a training photo -> its locatability, 0 to 1."""
    if not tables.count_rows(run.locatability, "train"):
        raise unscored_error(run)
    table = tables.read_table(run.locatability, "train", ["id", "locatability"])
    return dict(zip(table["id"].to_pylist(), table["locatability"].to_pylist(), strict=True))


def unscored_error(run: Run) -> InputError:
    return InputError(
        f"a stage has a threshold of locatability, but {run.locatability} has no scores: run `python ray_jobs/prepare.py "
        f"--config …` and `{LOCATABILITY_COMMAND}` first, or remove locatability from train.stages."
    )


class Schedule:
    """Cuts the endless sequence of shuffled epochs into steps and divides each step among the workers.

    Attributes:
        rejected: id (or number) of a row that can't be used -> why; another takes its place.
    """

    def __init__(self, rows: RowSource, per_step: int, seed: int, augment: AugmentConfig | None = None) -> None:
        self.rows, self.per_step, self.seed, self.augment = rows, per_step, seed, augment or AugmentConfig()
        self.rejected: dict[str, str] = {}
        self._epochs: dict[int, np.ndarray] = {}

    def indices(self, step: int, rank: int = 0, world: int = 1) -> list[int]:
        """Row numbers of worker `rank` of `world` at `step`; all workers' together are the step's `per_step` rows."""
        positions = range(step * self.per_step, (step + 1) * self.per_step)
        return [self._row(position) for position in positions[rank::world]]

    def encoded(self, collator: Any, step: int, rank: int = 0, world: int = 1) -> list[Any]:
        """The worker's samples at a step, augmented and encoded by `collator.encode`.

        A row that can't be used is replaced by one that is drawn from seed and position alone.

        Raises:
            InputError: none of `REPLACEMENTS` rows can be used.
        """
        rows = self.indices(step, rank, world)
        return [self._encode(collator, index, step, rank + number * world) for number, index in enumerate(rows)]

    def _encode(self, collator: Any, index: int, step: int, number: int) -> Any:
        row = index
        for attempt in range(REPLACEMENTS + 1):
            try:
                return collator.encode(self._augment(self.sample(row), step, number))
            except SkipSampleError as error:
                self.rejected.setdefault(str(self.rows[row].get("id", row)), str(error))
            row = int(np.random.default_rng([self.seed, index, number, attempt]).integers(self.rows.starts[-1]))
        name, reason = next(iter(self.rejected.items()))
        raise InputError(
            f"none of {REPLACEMENTS + 1} training rows tried one after the other can be used (row {name}: {reason}): look at "
            "the photos and prepare the data again."
        )

    def sample(self, index: int) -> Sample:
        """The sample of a row.

        Raises:
            SkipSampleError: its image can't be decoded, or it has no rounds.
        """
        return sample_from_row(self.rows[index])

    def _augment(self, sample: Sample, step: int, number: int) -> Sample:
        if self.augment == AugmentConfig():
            return sample
        rng = np.random.default_rng([self.seed, step, number])
        return replace(sample, image=augment_photo(sample.image, self.augment, rng))

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.rows))
        if epoch not in self._epochs:
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = self.rows.epoch(self.seed, epoch)
        return int(self._epochs[epoch][offset])


def count_steps(rows: int, per_step: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a stage: at least one, at most `max_steps`."""
    steps = max(1, round(rows * epochs / per_step))
    return min(steps, max_steps) if max_steps else steps


def augment_photo(photo: Image.Image, config: AugmentConfig, rng: np.random.Generator) -> Image.Image:
    """A random crop of a photo with other brightness, contrast and saturation; never mirrored, which shows another corner.

    Args:
        photo: RGB, any size.
        rng: the same numbers are drawn whatever `config` says.
    """
    area = rng.uniform(config.crop, 1.0)
    aspect = math.exp(rng.uniform(-math.log(ASPECT), math.log(ASPECT)))
    left, top = rng.uniform(), rng.uniform()
    factors = 1 + config.colour * rng.uniform(-1, 1, len(ENHANCERS))
    if config.crop < 1:
        photo = photo.crop(crop_box(photo.size, area, aspect, left, top))
    if config.colour:
        for enhancer, factor in zip(ENHANCERS, factors, strict=True):
            photo = enhancer(photo).enhance(float(factor))
    return photo


def crop_box(size: tuple[int, int], area: float, aspect: float, left: float, top: float) -> tuple[int, int, int, int]:
    """Left, upper, right, lower of a crop in pixels.

    Args:
        area: share of the photo; the crop is smaller where the aspect leaves no room for it.
        aspect: the crop's aspect ratio divided by the photo's.
        left, top: 0 to 1, position within the remaining room.
    """
    shares = min(1.0, math.sqrt(area * aspect)), min(1.0, math.sqrt(area / aspect))
    width, height = (max(1, round(side * share)) for side, share in zip(size, shares, strict=True))
    x, y = round((size[0] - width) * left), round((size[1] - height) * top)
    return x, y, x + width, y + height
