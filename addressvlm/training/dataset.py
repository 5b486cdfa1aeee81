"""The rows of a training and their order, a function of seed and step alone, so that a resumed run sees the same rows."""

import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

from addressvlm.config.train import AugmentConfig
from addressvlm.errors import InputError
from addressvlm.storage import tables
from addressvlm.storage.files import open_parquet
from addressvlm.storage.remote_path import AnyPath
from addressvlm.storage.run_dir import DONE_FILE, Run, is_unfinished
from addressvlm.storage.table_index import row_groups
from addressvlm.training.collator import Sample, SkipSampleError, sample_from_row
from addressvlm.training.pixels import ASPECT

CACHED_GROUPS = 64  # row groups in memory, at least
OPEN_FILES = 64
SHUFFLED_GROUPS = 32  # row groups whose rows are shuffled together, over all lanes
GROUPS_A_LANE = 16  # at least; where a lane ends, a row group may be read twice
READ_ATTEMPTS = 6
FIRST_WAIT_S = 0.5  # after a read that failed; doubled after each
READERS = 4  # threads that read row groups ahead
REPLACEMENTS = 16  # rows tried in place of one that can't be used
LOCATABILITY_COMMAND = "python ray_jobs/locatability.py --config … --segmentation … --clip …"
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


class RowSource(Protocol):
    """Training rows, numbered from 0 to `starts[-1]`, and the order in which each epoch reads them.

    Attributes:
        group_count: number of row groups of the tables.
    """

    starts: np.ndarray
    group_count: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def epoch(self, seed: int, epoch: int, window: int) -> np.ndarray:
        """All rows of an epoch, `window` row groups at a time."""

    def prefetch(self, indices: Iterable[int], keep: int) -> None:
        """Begin to read the row groups of these rows; `keep` is how many are in use at a time."""


class TableRows:
    """Random access to a table's split. Row groups are read when they are needed, or ahead by `prefetch`.

    Raises:
        InputError: the split has no files, or a row group can't be read.
    """

    def __init__(self, folder: AnyPath, split: str, columns: tuple[str, ...] = ("id", "image", "tile", "rounds")) -> None:
        if is_unfinished(folder) or not (files := row_groups(folder, split)):
            raise InputError(f"no table {folder}/{split}-*.parquet: run the step that writes it, or give another folder.")
        self.folder, self.columns = folder, list(columns)
        self.files = [file.name for file in files]
        self.file_groups = np.cumsum([0, *(len(file.groups) for file in files)])  # number of the first row group of each
        self.starts = np.cumsum([0, *(rows for file in files for rows in file.groups)])
        self.group_count = len(self.starts) - 1
        self.reads = 0  # of row groups, so far
        self._forget()

    def _forget(self) -> None:
        self._idle: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[int, Future[pa.Table]] = OrderedDict()
        self._keep, self._lock, self._pool = CACHED_GROUPS, threading.Lock(), ThreadPoolExecutor(READERS)

    def __getstate__(self) -> dict[str, Any]:
        """Without files and row groups, for another process."""
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_idle", "_groups", "_lock", "_pool", "_keep")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = self._group_of(index)
        table = self._request(group).result()
        return table.slice(index - int(self.starts[group]), 1).to_pylist()[0]

    def prefetch(self, indices: Iterable[int], keep: int) -> None:
        """Begin to read the row groups of these rows; `keep` is how many are in use at a time."""
        self._keep = max(CACHED_GROUPS, 2 * keep)
        for group in dict.fromkeys(map(self._group_of, indices)):
            self._request(group)

    def epoch(self, seed: int, epoch: int, window: int = SHUFFLED_GROUPS) -> np.ndarray:
        """A permutation of all rows: row groups shuffled, then rows within `window` groups at a time."""
        rng = np.random.default_rng([seed, epoch])
        groups = rng.permutation(self.group_count)
        order = []
        for at in range(0, len(groups), window):
            members = [np.arange(self.starts[g], self.starts[g + 1]) for g in groups[at : at + window]]
            order.append(rng.permutation(np.concatenate(members)))
        return np.concatenate(order)

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right") - 1)

    def _request(self, group: int) -> "Future[pa.Table]":
        """A row group that is read, being read, or about to be."""
        with self._lock:
            if group not in self._groups:
                self._groups[group] = self._pool.submit(self._read, group)
                if len(self._groups) > self._keep:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group]

    def _read(self, group: int) -> pa.Table:
        """Read a row group, more than once if the store fails.

        Raises:
            InputError: it fails every time, or the file is damaged.
        """
        file = int(np.searchsorted(self.file_groups, group, side="right") - 1)
        number, path = group - int(self.file_groups[file]), self.folder / self.files[file]
        for attempt in range(READ_ATTEMPTS):
            try:
                self.reads += 1
                with self._borrowed(file) as opened:
                    return opened.read_row_group(number, columns=self.columns)
            except pa.ArrowInvalid as error:
                raise InputError(f"{path} is damaged ({error}): repeat the step that wrote it with --redo.") from error
            except (OSError, InputError) as error:
                if attempt + 1 == READ_ATTEMPTS:
                    reason = " ".join(str(error).split())[:160]
                    raise InputError(
                        f"row group {number} of {path} can't be read after {READ_ATTEMPTS} attempts ({reason}): check the "
                        "store, then rerun to resume."
                    ) from error
            time.sleep(FIRST_WAIT_S * 2**attempt)
        raise AssertionError

    @contextmanager
    def _borrowed(self, file: int) -> Iterator[pq.ParquetFile]:
        """An open file of this thread alone: two threads that read row groups of one ParquetFile wait for ever."""
        with self._lock:
            opened = self._idle.pop(file, None)
        if opened is None:
            opened = open_parquet(self.folder / self.files[file])
        yield opened
        with self._lock:  # after an error it is opened anew
            self._idle[file] = opened
            self._idle.move_to_end(file)
            if len(self._idle) > OPEN_FILES:
                self._idle.popitem(last=False)


class MixedRows:
    """Several tables mixed row by row; an epoch goes `weight` times through each (paper 001, Table 4)."""

    def __init__(self, weighted: list[tuple[RowSource, float]]) -> None:
        self.tables = [table for table, _ in weighted]
        self.counts = [max(1, round(weight * len(table))) if len(table) else 0 for table, weight in weighted]
        self.starts = np.cumsum([0, *(len(table) for table in self.tables)])
        self.group_count = sum(table.group_count for table in self.tables)

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        table = int(np.searchsorted(self.starts, index, side="right") - 1)
        return self.tables[table][index - int(self.starts[table])]

    def prefetch(self, indices: Iterable[int], keep: int) -> None:
        """See `RowSource`."""
        numbers = np.fromiter(indices, dtype=np.int64)
        tables = np.searchsorted(self.starts, numbers, side="right") - 1
        for number, table in enumerate(self.tables):
            table.prefetch((numbers[tables == number] - self.starts[number]).tolist(), keep)

    def epoch(self, seed: int, epoch: int, window: int = SHUFFLED_GROUPS) -> np.ndarray:
        """Each table's endless sequence of epochs, cut into its share; which table comes next is random."""
        sources = np.random.default_rng([seed, epoch, len(self.tables)]).permutation(
            np.repeat(np.arange(len(self.tables)), self.counts)
        )
        order = np.empty_like(sources)
        for number, (table, count) in enumerate(zip(self.tables, self.counts, strict=True)):
            if count:
                order[sources == number] = self.starts[number] + endless_epochs(table, seed, epoch * count, count, window)
        return order


def endless_epochs(table: RowSource, seed: int, start: int, count: int, window: int) -> np.ndarray:
    """Rows `start` to `start + count` of a table's endless sequence of epochs."""
    first, last = start // len(table), (start + count - 1) // len(table)
    rows = np.concatenate([table.epoch(seed, epoch, window) for epoch in range(first, last + 1)])
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
        self.group_count = self.rows.group_count

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[int(self._indices[index])]

    def prefetch(self, indices: Iterable[int], keep: int) -> None:
        """See `RowSource`."""
        self.rows.prefetch((int(self._indices[index]) for index in indices), keep)

    def epoch(self, seed: int, epoch: int, window: int = SHUFFLED_GROUPS) -> np.ndarray:
        """The table's permutation without the skipped rows."""
        order = self._number[self.rows.epoch(seed, epoch, window)]
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

    A step takes as many rows from each of `lanes`; a lane goes through its share of an epoch's row groups one after the other.
    A worker has the same lanes in every step, so that each row group is read by one worker. Lanes follow from the table and
    the rows of a step, never from the number of workers, and so does the order.

    Attributes:
        rejected: id (or number) of a row that can't be used -> why; another takes its place.
    """

    def __init__(self, rows: RowSource, per_step: int, seed: int, augment: AugmentConfig | None = None) -> None:
        self.rows, self.per_step, self.seed, self.augment = rows, per_step, seed, augment or AugmentConfig()
        self.rejected: dict[str, str] = {}
        most = rows.group_count // GROUPS_A_LANE if rows.group_count > CACHED_GROUPS else 1
        self.lanes = max(lanes for lanes in range(1, per_step + 1) if per_step % lanes == 0 and lanes <= max(1, most))
        self.window = max(1, SHUFFLED_GROUPS // self.lanes)
        self._epochs: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the order, for another process."""
        return {**self.__dict__, "_epochs": {}}

    def numbers(self, rank: int = 0, world: int = 1) -> range:
        """Which of the rows of a step are those of worker `rank` of `world`."""
        return range(self.per_step * rank // world, self.per_step * (rank + 1) // world)

    def indices(self, step: int, rank: int = 0, world: int = 1) -> list[int]:
        """Row numbers of worker `rank` of `world` at `step`; all workers' together are the step's `per_step` rows."""
        return [self._row(step * self.per_step + number) for number in self.numbers(rank, world)]

    def read(self, step: int, rank: int = 0, world: int = 1) -> "list[tuple[int, dict[str, Any]]]":
        """Number and content of the worker's rows at a step, not decoded."""
        return [(index, self.rows[index]) for index in self.indices(step, rank, world)]

    def prefetch(self, step: int, rank: int = 0, world: int = 1) -> None:
        """Begin to read what a step needs."""
        self.rows.prefetch(self.indices(step, rank, world), self.window * (self.lanes // world + 2))

    def encoded(self, collator: Any, step: int, rank: int = 0, world: int = 1) -> list[Any]:
        """The worker's samples at a step, augmented and encoded by `collator.encode`."""
        return self.encode_rows(collator, step, self.numbers(rank, world).start, self.read(step, rank, world))

    def encode_rows(self, collator: Any, step: int, first: int, rows: "list[tuple[int, dict[str, Any]]]") -> list[Any]:
        """As `encoded`, of rows that have been read; `first` is which row of the step they begin with.

        A row that can't be used is replaced by one that is drawn from seed and position alone.

        Raises:
            InputError: none of `REPLACEMENTS` rows can be used.
        """
        return [self._encode(collator, index, row, step, first + number) for number, (index, row) in enumerate(rows)]

    def _encode(self, collator: Any, index: int, row: dict[str, Any], step: int, number: int) -> Any:
        tried = index
        for attempt in range(REPLACEMENTS + 1):
            try:
                return collator.encode(self._augment(self.sample(tried, row), step, number))
            except SkipSampleError as error:
                self.rejected.setdefault(str(row.get("id", tried)), str(error))
            tried = int(np.random.default_rng([self.seed, index, number, attempt]).integers(self.rows.starts[-1]))
            row = self.rows[tried]
        name, reason = next(iter(self.rejected.items()))
        raise InputError(
            f"none of {REPLACEMENTS + 1} training rows tried one after the other can be used (row {name}: {reason}): look at "
            "the photos and prepare the data again."
        )

    def sample(self, index: int, row: dict[str, Any]) -> Sample:
        """The sample of a row.

        Raises:
            SkipSampleError: its image can't be decoded, or it has no rounds.
        """
        return sample_from_row(row, self.decoded_size)

    decoded_size: tuple[int, int] | None = None  # see `pixels.decode`

    def _augment(self, sample: Sample, step: int, number: int) -> Sample:
        if self.augment == AugmentConfig():
            return sample
        rng = np.random.default_rng([self.seed, step, number])
        return replace(sample, image=augment_photo(sample.image, self.augment, rng))

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.rows))
        if epoch not in self._epochs:
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            order, lanes = self.rows.epoch(self.seed, epoch, self.window), self.lanes
            if lanes > 1:  # cut the epoch into lanes; which one a position belongs to is the same in every step
                positions = epoch * len(self.rows) + np.arange(len(self.rows))
                by_lane = np.argsort(positions % self.per_step // (self.per_step // lanes), kind="stable")
                order[by_lane] = order.copy()
            self._epochs[epoch] = order
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
