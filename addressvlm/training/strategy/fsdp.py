"""FSDP2: every worker holds a piece of each weight, gradient and moment; a layer is put together while it is computed."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from addressvlm.config.train import StageConfig
from addressvlm.models.lora import adapter_weights, trainable_params
from addressvlm.training.loss import clipped_step, make_adamw
from addressvlm.training.strategy import OptimizerState


class Fsdp:
    """See `Strategy`. Gradients are cut after every batch, so that no worker ever holds all of them."""

    def __init__(self, model: PeftModel, stage: StageConfig, look: Callable[[], int], device: torch.device) -> None:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        base: Any = model.get_base_model()
        for module in [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]:
            fully_shard(module, mesh=mesh)
        fully_shard(base, mesh=mesh)
        self.model = self.module = model
        self.clip = stage.max_grad_norm
        self.flops = look()
        self.optimizer = make_adamw(model, stage)
        self.learning = trainable_params(model)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        norm = clipped_step(self.optimizer, self.learning.values(), self.clip, learning_rate)
        return float(_whole(norm))

    def weights(self) -> dict[str, torch.Tensor]:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass without a backward one leaves some whole
        return _all_whole(dict(adapter_weights(self.model)))

    def moments(self) -> OptimizerState:
        return {name: _all_whole(self.optimizer.state[parameter]) for name, parameter in self.learning.items()}

    def restore(self, moments: OptimizerState) -> None:
        for name, parameter in self.learning.items():
            assert isinstance(parameter, DTensor)
            state = {
                key: distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
                for key, value in moments[name].items()
                if key != "step"
            }
            self.optimizer.state[parameter] = {**state, "step": moments[name]["step"].clone()}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with a memory of its own: that of FSDP is taken back."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


def _all_whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: _whole(tensor).contiguous() for name, tensor in tensors.items()}
