"""DDP: every worker holds the whole model, gradients are averaged. Also used by a single process."""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel

from addressvlm.config.train import StageConfig
from addressvlm.models.lora import adapter_state, trainable_params
from addressvlm.training.optim import clip_and_step, make_adamw
from addressvlm.training.strategy import OptimizerState, is_distributed


class Ddp:
    """See `Strategy`."""

    def __init__(self, model: PeftModel, stage: StageConfig, probe: Callable[[], int], device: torch.device) -> None:
        self.model, self.max_grad_norm = model.to(device), stage.max_grad_norm
        self.flops = probe()
        self.optimizer = make_adamw(model, stage)
        self.trainable = trainable_params(model)
        self.single = not is_distributed()
        self.module: Any = model if self.single else DistributedDataParallel(model)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        if last or self.single:
            loss.backward()
        else:
            with self.module.no_sync():
                loss.backward()

    def step(self, learning_rate: float) -> float:
        return float(clip_and_step(self.optimizer, self.trainable.values(), self.max_grad_norm, learning_rate))

    def weights(self) -> dict[str, torch.Tensor]:
        return adapter_state(self.model)

    def optimizer_state(self) -> OptimizerState:
        states = {name: self.optimizer.state[parameter] for name, parameter in self.trainable.items()}
        return {name: {key: value.cpu() for key, value in state.items()} for name, state in states.items()}

    def load_optimizer_state(self, state: OptimizerState) -> None:
        for name, parameter in self.trainable.items():
            moments = {key: value.to(parameter.device) for key, value in state[name].items() if key != "step"}
            self.optimizer.state[parameter] = {**moments, "step": state[name]["step"].clone()}
