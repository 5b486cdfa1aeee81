"""Every worker holds everything; gradients are averaged. Also the strategy of a single process."""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel

from addressvlm.config.train import StageConfig
from addressvlm.models.lora import adapter_state, trainable_params
from addressvlm.training.loss import clipped_step, make_adamw
from addressvlm.training.strategy import OptimizerState, is_distributed


class Ddp:
    """See `Strategy`."""

    def __init__(self, model: PeftModel, stage: StageConfig, look: Callable[[], int], device: torch.device) -> None:
        self.model, self.clip = model.to(device), stage.max_grad_norm
        self.flops = look()
        self.optimizer = make_adamw(model, stage)
        self.learning = trainable_params(model)
        self.alone = not is_distributed()
        self.module: Any = model if self.alone else DistributedDataParallel(model)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        if last or self.alone:
            loss.backward()
        else:
            with self.module.no_sync():
                loss.backward()

    def step(self, learning_rate: float) -> float:
        return float(clipped_step(self.optimizer, self.learning.values(), self.clip, learning_rate))

    def weights(self) -> dict[str, torch.Tensor]:
        return adapter_state(self.model)

    def moments(self) -> OptimizerState:
        found = {name: self.optimizer.state[parameter] for name, parameter in self.learning.items()}
        return {name: {key: value.cpu() for key, value in state.items()} for name, state in found.items()}

    def restore(self, moments: OptimizerState) -> None:
        for name, parameter in self.learning.items():
            state = {key: value.to(parameter.device) for key, value in moments[name].items() if key != "step"}
            self.optimizer.state[parameter] = {**state, "step": moments[name]["step"].clone()}
