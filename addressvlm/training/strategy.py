"""How weights, gradients and optimizer state are distributed over workers: DDP, FSDP2; DeepSpeed ZeRO is in zero.py.

State for a checkpoint is always complete and by parameter name, so that a run can be resumed with another strategy and another
number of workers.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from addressvlm.config.train import StageConfig
from addressvlm.models.lora import adapter_weights, trainable_params
from addressvlm.training.optim import clip_and_step, make_adamw

OptimizerState = dict[str, dict[str, torch.Tensor]]  # parameter name -> AdamW's `exp_avg`, `exp_avg_sq` and `step`
SHARDS_WEIGHTS = ("fsdp2", "zero3")  # shard the weights too: the model is loaded on the CPU and moved shard by shard


class Strategy(Protocol):
    """A model and its optimizer during a stage; every worker calls every method.

    Attributes:
        module: run for the forward pass.
        flops: floating-point operations of a row, as the stage's probe measured them.
        sharded: whether all workers must take part in `weights` and `optimizer_state`.
    """

    module: Any
    flops: int
    sharded: bool

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate gradients; after the step's `last` batch they are averaged over workers."""

    def step(self, learning_rate: float) -> torch.Tensor | float:
        """Clip the gradients, update, clear them; returns their norm before clipping, a scalar."""

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights of the adapter by name, complete, on the CPU."""

    def optimizer_state(self) -> OptimizerState:
        """AdamW's state by parameter name, complete, on the CPU; of other workers than the first it may be empty."""

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
        return Fsdp(model, stage, probe, device)
    if name in ("zero2", "zero3") and is_distributed():
        from addressvlm.training.zero import Zero

        return Zero(model, stage, probe, 2 if name == "zero2" else 3, device, bfloat16)
    return Ddp(model, stage, probe, device)


class Ddp:
    """Every worker holds the whole model, gradients are averaged; also used by a single process."""

    sharded = False

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

    def step(self, learning_rate: float) -> torch.Tensor:
        return clip_and_step(self.optimizer, self.trainable.values(), self.max_grad_norm, learning_rate)

    def weights(self) -> dict[str, torch.Tensor]:
        return copies_on_cpu(dict(adapter_weights(self.model)))

    def optimizer_state(self) -> OptimizerState:
        states = {name: self.optimizer.state[parameter] for name, parameter in self.trainable.items()}
        flat = copies_on_cpu({(name, key): value for name, state in states.items() for key, value in state.items()})
        return {name: {key: flat[name, key] for key in state} for name, state in states.items()}

    def load_optimizer_state(self, state: OptimizerState) -> None:
        for name, parameter in self.trainable.items():
            moments = {key: value.to(parameter.device) for key, value in state[name].items() if key != "step"}
            self.optimizer.state[parameter] = {**moments, "step": state[name]["step"].clone()}


class Fsdp:
    """Weights, gradients and AdamW's state are sharded; a layer is gathered while it is computed.

    Gradients are sharded after every batch, so that no worker ever holds all of them.
    """

    sharded = True

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

    def step(self, learning_rate: float) -> torch.Tensor:
        norm = clip_and_step(self.optimizer, self.trainable.values(), self.max_grad_norm, learning_rate)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def weights(self) -> dict[str, torch.Tensor]:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass without a backward one leaves some gathered
        return gather_all(dict(adapter_weights(self.model)))

    def optimizer_state(self) -> OptimizerState:
        keep = dist.get_rank() == 0
        states = {name: gather_all(self.optimizer.state[parameter], keep) for name, parameter in self.trainable.items()}
        return states if keep else {}

    def load_optimizer_state(self, state: OptimizerState) -> None:
        for name, parameter in self.trainable.items():
            assert isinstance(parameter, DTensor)
            moments = {
                key: distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
                for key, value in state[name].items()
                if key != "step"
            }
            self.optimizer.state[parameter] = {**moments, "step": state[name]["step"].clone()}


def copies_on_cpu(tensors: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
    """Copies that later steps do not change; from a GPU they are all under way at once."""
    copies = {
        key: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor.detach(), non_blocking=True)
        for key, tensor in tensors.items()
    }
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copies


def gather_all(tensors: Mapping[str, torch.Tensor], keep: bool = True) -> dict[str, torch.Tensor]:
    """Complete copies on the CPU, in memory that FSDP can't reclaim; workers that do not `keep` them take part too."""
    whole = (
        (name, tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach())
        for name, tensor in tensors.items()
    )
    return {name: tensor.cpu().clone().contiguous() for name, tensor in whole if keep}
