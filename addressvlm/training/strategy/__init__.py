"""How weights, gradients and optimizer state are spread over workers, one file a kind.

Whatever the kind, what is asked of it for a checkpoint is whole and by name, so that a run goes on from it with another number
of workers.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from peft import PeftModel

from addressvlm.config.train import StageConfig

OptimizerState = dict[str, dict[str, torch.Tensor]]  # parameter -> `exp_avg`, `exp_avg_sq` and `step` of AdamW
SHARDS_WEIGHTS = (
    "fsdp2",
    "zero3",
)  # those that cut the weights too: their models are loaded on the CPU and moved piece by piece


class Strategy(Protocol):
    """What the loop needs; every worker calls each of the methods.

    Attributes:
        module: called for the forward pass.
        flops: what the stage's first look returned.
    """

    module: Any
    flops: int

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate gradients; `last` is the step's last batch, after which workers' gradients are summed up."""

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear the gradients; returns the norm of the gradient."""

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights of the adapter by name, whole, on the CPU."""

    def moments(self) -> OptimizerState:
        """The optimizer's state by parameter, whole, on the CPU."""

    def restore(self, moments: OptimizerState) -> None:
        """Put back what `moments` gave, of any strategy and number of workers."""


def is_distributed() -> bool:
    """Whether there are other workers."""
    return dist.is_initialized() and dist.get_world_size() > 1


def make_strategy(
    name: str, model: PeftModel, stage: StageConfig, look: Callable[[], int], device: torch.device, fast: bool = False
) -> Strategy:
    """The strategy of a `train.strategy` setting; a single worker has nothing to spread, whatever the setting.

    Args:
        model: on the CPU if the strategy is one of `SHARDS_WEIGHTS`, else on the device.
        look: the stage's first look, which freezes weights; called when the model can be run.
        fast: whether products are made in bfloat16.
    """
    if name == "fsdp2" and is_distributed():
        from addressvlm.training.strategy.fsdp import Fsdp

        return Fsdp(model, stage, look, device)
    if name in ("zero2", "zero3") and is_distributed():
        from addressvlm.training.strategy.zero import Zero

        return Zero(model, stage, look, 2 if name == "zero2" else 3, device, fast)
    from addressvlm.training.strategy.ddp import Ddp

    return Ddp(model, stage, look, device)
