"""Which rows a worker sees at which step: a function of seed and step alone, so that a resumed run goes on exactly."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from addressvlm import tables

CACHED_GROUPS = 64  # row groups kept in memory
MIXED_GROUPS = 32  # row groups whose rows are shuffled among each other; fewer than are cached


class Rows:
    """Random access to a table's split; memory holds `CACHED_GROUPS` row groups.

    Raises:
        InputError: the split has no files.
    """

    def __init__(self, folder: Path, split: str, columns: tuple[str, ...] = ("image", "rounds")) -> None:
        self.files = [pq.ParquetFile(path) for path in tables.files(folder, split)]
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
        """A permutation of all rows: row groups shuffled, then rows within `MIXED_GROUPS` groups at a time."""
        rng = np.random.default_rng([seed, epoch])
        groups = rng.permutation(len(self.groups))
        order = []
        for at in range(0, len(groups), MIXED_GROUPS):
            members = [np.arange(self.starts[g], self.starts[g + 1]) for g in groups[at : at + MIXED_GROUPS]]
            order.append(rng.permutation(np.concatenate(members)))
        return np.concatenate(order)


class Schedule:
    """Cuts the endless stream of shuffled epochs into steps and hands each worker its share."""

    def __init__(self, rows: Rows, per_step: int, seed: int) -> None:
        self.rows, self.per_step, self.seed = rows, per_step, seed
        self._epochs: dict[int, np.ndarray] = {}

    def indices(self, step: int, rank: int = 0, world: int = 1) -> list[int]:
        """Row numbers of worker `rank` of `world` at `step`; all workers' together are the step's `per_step` rows."""
        at = range(step * self.per_step, (step + 1) * self.per_step)
        return [self._row(position) for position in at[rank::world]]

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.rows))
        if epoch not in self._epochs:
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = self.rows.epoch(self.seed, epoch)
        return int(self._epochs[epoch][offset])


def steps_of(rows: int, per_step: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a stage: at least one, at most `max_steps`."""
    steps = max(1, round(rows * epochs / per_step))
    return min(steps, max_steps) if max_steps else steps
