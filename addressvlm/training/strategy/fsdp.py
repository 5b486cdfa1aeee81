"""FSDP2: weights, gradients and optimizer state are sharded; a layer is gathered while it is computed."""

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
from addressvlm.training.optim import clip_and_step, make_adamw
from addressvlm.training.strategy import OptimizerState


class Fsdp:
    """See `Strategy`. Gradients are sharded after every batch, so that no worker ever holds all of them."""

    def __init__(self, model: PeftModel, stage: StageConfig, probe: Callable[[], int], device: torch.device) -> None:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        base: Any = model.get_base_model()
        for module in [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]:
            fully_shard(module, mesh=mesh)
        fully_shard(base, mesh=mesh)
        self.model = self.module = model
        self.max_grad_norm = stage.max_grad_norm
        self.flops = probe()
        self.optimizer = make_adamw(model, stage)
        self.trainable = trainable_params(model)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        norm = clip_and_step(self.optimizer, self.trainable.values(), self.max_grad_norm, learning_rate)
        return float(gather(norm))

    def weights(self) -> dict[str, torch.Tensor]:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass without a backward one leaves some gathered
        return gather_all(dict(adapter_weights(self.model)))

    def optimizer_state(self) -> OptimizerState:
        return {name: gather_all(self.optimizer.state[parameter]) for name, parameter in self.trainable.items()}

    def load_optimizer_state(self, state: OptimizerState) -> None:
        for name, parameter in self.trainable.items():
            assert isinstance(parameter, DTensor)
            moments = {
                key: distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
                for key, value in state[name].items()
                if key != "step"
            }
            self.optimizer.state[parameter] = {**moments, "step": state[name]["step"].clone()}


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """A complete copy on the CPU, in memory that FSDP can't reclaim."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


def gather_all(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: gather(tensor).contiguous() for name, tensor in tensors.items()}
