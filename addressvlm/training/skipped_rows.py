"""Rows that training could or should not use and why, in one file a system; it outlives an interruption."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from addressvlm.errors import InputError
from addressvlm.storage import tables
from addressvlm.storage.files import write_parquet
from addressvlm.storage.remote_path import AnyPath
from addressvlm.storage.run_dir import DONE_FILE, Run
from addressvlm.training.dataset import MixedRows, RowSource, TableRows
from addressvlm.training.trainer import Stage

COMMAND = "python ray_jobs/locatability.py --config … --segmentation … --clip …"


class LocatableRows:
    """The rows of `folder` whose photo's locatability is at least `least`, numbered anew, in the order of all of them.

    Attributes:
        left_out: id of any other row -> why.

    Raises:
        InputError: the photos have not been scored, one of them has not, or none reaches the threshold.
    """

    def __init__(self, run: Run, folder: AnyPath, least: float) -> None:
        self.rows = TableRows(folder, "train")
        score = _scores(run)
        ids = tables.read_table(folder, "train", ["id"])["id"].to_pylist()
        if (unknown := next((name for name in ids if name not in score), None)) is not None:
            raise InputError(
                f"{folder} has the photo {unknown}, which has no score in {run.locatability}: score the photos again, "
                f"`{COMMAND} --redo`."
            )
        kept = np.array([score[name] >= least for name in ids], dtype=bool)
        if ids and not kept.any():
            raise InputError(f"none of the {len(ids):,} rows of {folder} reaches the locatability {least:g}: lower it.")
        reason = f"its locatability is {{:.2f}}, below {least:g}"
        self.left_out = {name: reason.format(score[name]) for name, stays in zip(ids, kept, strict=True) if not stays}
        self._kept = np.flatnonzero(kept)
        self._number = np.where(kept, np.cumsum(kept) - 1, -1)
        self.starts = np.array([0, len(self._kept)])

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[int(self._kept[index])]

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """The table's own permutation without the rows that are left out."""
        order = self._number[self.rows.epoch(seed, epoch)]
        return order[order >= 0]


def filtered_rows(table: RowSource) -> dict[str, str]:
    """Id of a row below the threshold -> why, of a table or of those mixed in it."""
    if isinstance(table, MixedRows):
        return {name: why for part in table.tables for name, why in filtered_rows(part).items()}
    return table.left_out if isinstance(table, LocatableRows) else {}


def locatability_scored_by(run: Run) -> dict[str, Any]:
    """The models and texts that scored a run's photos.

    Raises:
        InputError: none have been scored.
    """
    try:
        found: dict[str, Any] = json.loads((run.locatability / DONE_FILE).read_text())["locatability"]
    except FileNotFoundError as error:
        raise _unscored(run) from error
    return found


def _scores(run: Run) -> dict[str, float]:
    if not tables.count_rows(run.locatability, "train"):
        raise _unscored(run)
    found = tables.read_table(run.locatability, "train", ["id", "locatability"])
    return dict(zip(found["id"].to_pylist(), found["locatability"].to_pylist(), strict=True))


def _unscored(run: Run) -> InputError:
    return InputError(
        f"a stage has a threshold of locatability, but {run.locatability} has no scores: run `python ray_jobs/prepare.py "
        f"--config …` and `{COMMAND}` first, or take locatability out of train.stages."
    )


SCHEMA = tables.REJECTS.append(pa.field("stage", pa.string()))


class SkippedRows:
    """The rows left out in all stages so far."""

    def __init__(self, file: AnyPath, resumed: bool) -> None:
        """Begin anew, or with what an interrupted run wrote."""
        self.file = file
        before = tables.read_table_file(file).to_pylist() if resumed and file.is_file() else []
        self.reasons = {(row["stage"], row["id"]): row["reason"] for row in before}

    def write(self, stages: list[Stage]) -> int:
        """Write those of all workers; every worker calls it, the first one writes. Their number."""
        mine = {(s.name, row): why for s in stages for row, why in s.schedule.rejected.copy().items()}
        of_all: list[Any] = [mine]
        if dist.is_initialized():
            of_all = [None] * dist.get_world_size()
            dist.all_gather_object(of_all, mine)
        for stage in stages:
            self.reasons |= {(stage.name, row): why for row, why in filtered_rows(stage.schedule.rows).items()}
        for of_one in of_all:
            self.reasons |= of_one
        if not dist.is_initialized() or dist.get_rank() == 0:
            self._write()
        return len(self.reasons)

    def _write(self) -> None:
        self.file.unlink(missing_ok=True)
        if not self.reasons:
            return
        rows = [
            {"file": None, "row": None, "id": row, "reason": why, "stage": stage}
            for (stage, row), why in sorted(self.reasons.items())
        ]
        write_parquet(pa.Table.from_pylist(rows, schema=SCHEMA), self.file)
