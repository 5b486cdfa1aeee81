"""What a run needs to go on: a checkpoint in memory, whole and on the CPU, whatever the strategy and number of workers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from addressvlm.errors import InputError
from addressvlm.training.strategy import OptimizerState

STATE, BEST, POSITION = "state.pt", "best.pt", "position.json"
SCORES = ("A_ds", "A", "A_s", "A_s_G")  # of validation, the first that was measured: by it adapters are compared


@dataclass(frozen=True)
class BestAdapter:
    """The adapter that validated best so far, in the system's last stage."""

    step: int
    metric: str
    value: float
    adapter: dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainingCheckpoint:
    """Everything after `step` steps of stage number `stage`."""

    stage: int
    step: int
    adapter: dict[str, torch.Tensor]
    moments: OptimizerState
    best: BestAdapter | None = None

    def write(self, folder: Path) -> None:
        """Write a checkpoint; its position comes last, without which it counts as none."""
        torch.save({"adapter": self.adapter, "optimizer": self.moments}, folder / STATE)
        if self.best:
            torch.save(vars(self.best), folder / BEST)
        (folder / POSITION).write_text(json.dumps({"stage": self.stage, "step": self.step}))

    @classmethod
    def read(cls, folder: Path) -> "TrainingCheckpoint":
        """What `write` wrote.

        Raises:
            InputError: the folder holds no whole checkpoint.
        """
        try:
            position: dict[str, int] = json.loads((folder / POSITION).read_text())
            state: dict[str, Any] = torch.load(folder / STATE, weights_only=True)
            best = BestAdapter(**torch.load(folder / BEST, weights_only=True)) if (folder / BEST).is_file() else None
        except (OSError, ValueError, RuntimeError, EOFError) as error:
            raise InputError(
                f"the checkpoint in {folder} is not whole ({' '.join(str(error).split())[:120]}): remove it to go on from the "
                "one before, or begin anew with --redo."
            ) from error
        return cls(**position, adapter=state["adapter"], moments=state["optimizer"], best=best)


def better_adapter(
    best: BestAdapter | None, step: int, found: dict[str, float], adapter: dict[str, torch.Tensor]
) -> BestAdapter | None:
    """The best after a validation; of equal ones the later."""
    metric = next((name for name in SCORES if name in found), None)
    if metric is None or (best and best.value > found[metric]):
        return best
    return BestAdapter(step, metric, found[metric], {name: weights.clone() for name, weights in adapter.items()})
