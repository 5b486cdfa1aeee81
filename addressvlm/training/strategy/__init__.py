"""How weights, gradients and optimizer state are distributed over workers, one module each.

State for a checkpoint is always complete and by parameter name, so that a run can be resumed with another strategy and another
number of workers.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from peft import PeftModel

from addressvlm.config.train import StageConfig

OptimizerState = dict[str, dict[str, torch.Tensor]]  # parameter name -> AdamW's `exp_avg`, `exp_avg_sq` and `step`
SHARDS_WEIGHTS = ("fsdp2", "zero3")  # shard the weights too: the model is loaded on the CPU and moved shard by shard


class Strategy(Protocol):
    """A model and its optimizer during a stage; every worker calls every method.

    Attributes:
        module: run for the forward pass.
        flops: floating-point operations of a row, as the stage's probe measured them.
    """

    module: Any
    flops: int

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate gradients; after the step's `last` batch they are averaged over workers."""

    def step(self, learning_rate: float) -> float:
        """Clip the gradients, update, clear them; returns their norm before clipping."""

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights of the adapter by name, complete, on the CPU."""

    def optimizer_state(self) -> OptimizerState:
        """AdamW's state by parameter name, complete, on the CPU."""

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Restore the `optimizer_state` of any strategy and number of workers."""


def is_distributed() -> bool:
    """Whether there are other workers."""
    return dist.is_initialized() and dist.get_world_size() > 1


def make_strategy(
    name: str, model: PeftModel, stage: StageConfig, probe: Callable[[], int], device: torch.device, bfloat16: bool = False
) -> Strategy:
    """The strategy that `train.strategy` names; a single worker shards nothing and uses DDP's.

    Args:
        model: on the CPU if the strategy is one of `SHARDS_WEIGHTS`, else on the device.
        probe: freezes parameters without a gradient and returns a row's operations; called once the model can run.
        bfloat16: whether the forward pass runs under bfloat16 autocast.
    """
    if name == "fsdp2" and is_distributed():
        from addressvlm.training.strategy.fsdp import Fsdp

        return Fsdp(model, stage, probe, device)
    if name in ("zero2", "zero3") and is_distributed():
        from addressvlm.training.strategy.zero import Zero

        return Zero(model, stage, probe, 2 if name == "zero2" else 3, device, bfloat16)
    from addressvlm.training.strategy.ddp import Ddp

    return Ddp(model, stage, probe, device)
