"""Training checkpoints. Resuming restores the adapter, AdamW's state, the position (stage, step) and the best adapter so far.

Tensors are complete and on the CPU, so a checkpoint fits every strategy and every number of workers. Row order, augmentation
and dropout masks follow from seed and step and need no state.
"""

import errno
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from addressvlm.errors import InputError
from addressvlm.training.strategy import OptimizerState

FORMAT = 2  # 1 had no number, and its rows came in another order
STATE, BEST, POSITION = "state.pt", "best.pt", "position.json"
METRICS = ("A_ds", "A", "A_s", "A_s_G")  # adapters are compared by the first that validation measured


@dataclass(frozen=True)
class BestAdapter:
    """The adapter that validated best so far, in the system's last stage."""

    step: int
    metric: str
    value: float
    adapter: dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainingCheckpoint:
    """The state after `step` steps of stage number `stage` (from 0)."""

    stage: int
    step: int
    adapter: dict[str, torch.Tensor]
    optimizer_state: OptimizerState
    best: BestAdapter | None = None

    def write(self, folder: Path) -> None:
        """Write a checkpoint; the position comes last and makes it valid.

        Raises:
            OSError: the disk is full.
        """
        try:
            torch.save({"adapter": self.adapter, "optimizer": self.optimizer_state}, folder / STATE)
            if self.best:
                torch.save(vars(self.best), folder / BEST)
        except RuntimeError as error:  # all that PyTorch's writer raises
            tensors = [*self.adapter.values(), *(value for state in self.optimizer_state.values() for value in state.values())]
            if shutil.disk_usage(folder).free < sum(tensor.nbytes for tensor in tensors):
                raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from error
            raise
        (folder / POSITION).write_text(json.dumps({"format": FORMAT, "stage": self.stage, "step": self.step}))

    @classmethod
    def read(cls, folder: Path) -> "TrainingCheckpoint":
        """Read what `write` wrote.

        Raises:
            InputError: the checkpoint is incomplete or of an earlier format.
        """
        try:
            position: dict[str, int] = json.loads((folder / POSITION).read_text())
            if position.pop("format", 1) != FORMAT:
                raise InputError(
                    f"the checkpoint in {folder} is of another version of this program, whose rows came in another order: "
                    "finish the training with that version, or start over with --redo."
                )
            state: dict[str, Any] = torch.load(folder / STATE, weights_only=True)
            best = BestAdapter(**torch.load(folder / BEST, weights_only=True)) if (folder / BEST).is_file() else None
        except (OSError, ValueError, RuntimeError, EOFError) as error:
            raise InputError(
                f"the checkpoint in {folder} is incomplete ({' '.join(str(error).split())[:120]}): remove it to resume from "
                "the one before, or start over with --redo."
            ) from error
        return cls(**position, adapter=state["adapter"], optimizer_state=state["optimizer"], best=best)


def better_adapter(
    best: BestAdapter | None, step: int, metrics: dict[str, float], adapter: dict[str, torch.Tensor]
) -> BestAdapter | None:
    """The best adapter after a validation; of equal ones the later."""
    metric = next((name for name in METRICS if name in metrics), None)
    if metric is None or (best and best.value > metrics[metric]):
        return best
    return BestAdapter(step, metric, metrics[metric], {name: weights.clone() for name, weights in adapter.items()})
