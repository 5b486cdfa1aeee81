"""DeepSpeed ZeRO: stage 2 shards optimizer state and gradients, stage 3 the weights as well."""

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from peft import PeftModel

from addressvlm.config.train import StageConfig
from addressvlm.models.lora import adapter_state, adapter_weights, trainable_params
from addressvlm.training.optim import make_adamw, set_learning_rate
from addressvlm.training.strategy import OptimizerState

MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero:
    """See `Strategy`."""

    sharded = True

    def __init__(
        self, model: PeftModel, stage: StageConfig, probe: Callable[[], int], level: int, device: torch.device, bfloat16: bool
    ) -> None:
        self.model, self.level, self.device = model, level, device
        self.flops = probe()
        self.frozen = {name: weights for name, weights in adapter_state(model).items() if name not in trainable_params(model)}
        config = {
            "train_micro_batch_size_per_gpu": stage.batch_size,
            "gradient_accumulation_steps": stage.gradient_accumulation_steps,
            "gradient_clipping": stage.max_grad_norm,
            "zero_optimization": {"stage": level, "memory_efficient_linear": False},  # that linear ignores autocast
            "zero_allow_untested_optimizer": True,
            # On GPUs DeepSpeed switches autocast off unless it is named here; gradients stay in float32.
            "torch_autocast": {"enabled": bfloat16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
            "steps_per_print": 10**9,
        }
        if level == 3:  # shards weight by weight; `initialize` would move all of them to the GPU first
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
            for buffer in model.buffers():
                buffer.data = buffer.data.to(device)
        self.module, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=make_adamw(model, stage), config=config)
        self._set_steps(torch.tensor(0.0))  # ZeRO-3 has taken one to create the moments
        self.accumulation_steps = stage.gradient_accumulation_steps

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss * self.accumulation_steps)  # DeepSpeed divides by it, the trainer has already

    def step(self, learning_rate: float) -> torch.Tensor | float:
        set_learning_rate(self.optimizer, learning_rate)
        self.module.step()
        norm = self.module.get_global_grad_norm()
        return 0.0 if norm is None else norm

    def weights(self) -> dict[str, torch.Tensor]:
        trained = {name: safe_get_full_fp32_param(weights) for name, weights in trainable_params(self.model).items()}
        return {
            name: self.frozen[name] if name in self.frozen else trained[name].detach().cpu().contiguous()
            for name, _ in adapter_weights(self.model)
        }

    def optimizer_state(self) -> OptimizerState:
        step, states = next(iter(self._adamw().state.values()))["step"].cpu(), {}
        for name, weights in trainable_params(self.model).items():
            moments = {key: safe_get_full_optimizer_state(weights, key) for key in MOMENTS}  # all workers take part
            if dist.get_rank() == 0:
                states[name] = {**{key: moment.cpu() for key, moment in moments.items()}, "step": step}
        return states

    def load_optimizer_state(self, state: OptimizerState) -> None:
        self._create_moments()
        for name, weights in trainable_params(self.model).items():
            for key in MOMENTS:
                moment = state[name][key].to(self.device)
                if self.level == 2:
                    safe_set_full_optimizer_state(weights, moment, key)
                else:
                    size = safe_get_local_optimizer_state(weights, key).numel()
                    padded = F.pad(moment.flatten(), (0, size * dist.get_world_size() - moment.numel()))
                    safe_set_local_optimizer_state(weights, padded[size * dist.get_rank() :][:size], key)
        self._set_steps(next(iter(state.values()))["step"])

    def _create_moments(self) -> None:
        """Create AdamW's moments as the first step would."""
        adamw, groups = self._adamw(), self._adamw().param_groups
        flat = (
            self.optimizer.fp32_partitioned_groups_flat if self.level == 3 else [p for group in groups for p in group["params"]]
        )
        for shard in flat:
            adamw.state[shard] = {"step": torch.tensor(0.0), **{key: torch.zeros_like(shard) for key in MOMENTS}}
        if self.level == 2:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _adamw(self) -> Any:
        """The optimizer that DeepSpeed wraps."""
        return self.optimizer.optimizer

    def _set_steps(self, step: torch.Tensor) -> None:
        for state in self._adamw().state.values():
            state["step"] = step.clone()
