"""Learning only from photos that tell where they are (paper 003, Sec. 3.1): rows whose photo's score reaches a threshold."""

import json
from typing import Any

import numpy as np

from addressvlm import tables
from addressvlm.errors import InputError
from addressvlm.run import DONE, Run
from addressvlm.stores import AnyPath
from addressvlm.training.rows import Mix, Rows, Table

COMMAND = "python ray_jobs/locatability.py --config … --segmentation … --clip …"


class Locatable:
    """The rows of `folder` whose photo's locatability is at least `least`, numbered anew, in the order of all of them.

    Attributes:
        left_out: id of any other row -> why.

    Raises:
        InputError: the photos have not been scored, one of them has not, or none reaches the threshold.
    """

    def __init__(self, run: Run, folder: AnyPath, least: float) -> None:
        self.rows = Rows(folder, "train")
        score = _scores(run)
        ids = tables.read(folder, "train", ["id"])["id"].to_pylist()
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


def left_out(table: Table) -> dict[str, str]:
    """Id of a row below the threshold -> why, of a table or of those mixed in it."""
    if isinstance(table, Mix):
        return {name: why for part in table.tables for name, why in left_out(part).items()}
    return table.left_out if isinstance(table, Locatable) else {}


def scored_by(run: Run) -> dict[str, Any]:
    """The models and texts that scored a run's photos.

    Raises:
        InputError: none have been scored.
    """
    try:
        found: dict[str, Any] = json.loads((run.locatability / DONE).read_text())["locatability"]
    except FileNotFoundError as error:
        raise _unscored(run) from error
    return found


def _scores(run: Run) -> dict[str, float]:
    if not tables.count(run.locatability, "train"):
        raise _unscored(run)
    found = tables.read(run.locatability, "train", ["id", "locatability"])
    return dict(zip(found["id"].to_pylist(), found["locatability"].to_pylist(), strict=True))


def _unscored(run: Run) -> InputError:
    return InputError(
        f"a stage has a threshold of locatability, but {run.locatability} has no scores: run `python ray_jobs/prepare.py "
        f"--config …` and `{COMMAND}` first, or take locatability out of train.stages."
    )
