"""How gradients and optimizer state are spread over workers: one process, DDP, or DeepSpeed ZeRO-2."""

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel

from addressvlm.config_training import StageConfig
from addressvlm.models.lora import adapter_state, load_adapter_state, trainable
from addressvlm.training.step import parameter_groups, set_rate

BETAS = (0.9, 0.999)


class Strategy(Protocol):
    """What the loop needs; `module` is called for the forward pass."""

    module: Any

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate gradients; `last` is the step's last batch, after which workers' gradients are summed up."""

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear the gradients; returns the norm of the gradient."""

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state; every worker calls it."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""


class Ddp:
    """Every worker holds everything; gradients are averaged. Also the strategy of a single process."""

    def __init__(self, model: PeftModel, stage: StageConfig) -> None:
        self.model, self.clip = model, stage.clip
        self.parameters = list(trainable(model).values())
        self.optimizer = torch.optim.AdamW(parameter_groups(model, stage), lr=0.0, betas=BETAS, weight_decay=stage.weight_decay)
        self.shared = dist.is_initialized() and dist.get_world_size() > 1
        self.module: Any = DistributedDataParallel(model) if self.shared else model

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        if self.shared and not last:
            with self.module.no_sync():
                loss.backward()
        else:
            loss.backward()

    def step(self, learning_rate: float) -> float:
        set_rate(self.optimizer, learning_rate)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def save(self, folder: Path) -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save({"adapter": adapter_state(self.model), "optimizer": self.optimizer.state_dict()}, folder / "state.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", weights_only=True)
        load_adapter_state(self.model, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])


class Zero2:
    """DeepSpeed: optimizer state and gradients are cut into one piece a worker."""

    def __init__(self, model: PeftModel, stage: StageConfig) -> None:
        import deepspeed

        optimizer = torch.optim.AdamW(parameter_groups(model, stage), lr=0.0, betas=BETAS, weight_decay=stage.weight_decay)
        self.module, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": stage.batch_size,
                "gradient_accumulation_steps": stage.accumulate,
                "gradient_clipping": stage.clip,
                "zero_optimization": {"stage": 2},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )
        self.accumulate = stage.accumulate

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss * self.accumulate)  # DeepSpeed divides by it, the loop has done so already

    def step(self, learning_rate: float) -> float:
        set_rate(self.optimizer, learning_rate)
        self.module.step()
        return float(self.module.get_global_grad_norm() or 0.0)

    def save(self, folder: Path) -> None:
        self.module.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        self.module.load_checkpoint(str(folder), tag="state", load_module_strict=False)


def make(name: str, model: PeftModel, stage: StageConfig) -> Strategy:
    """The strategy of a `train.strategy` setting."""
    return Zero2(model, stage) if name == "zero2" else Ddp(model, stage)
