"""DeepSpeed: ZeRO-2 cuts optimizer state and gradients into one piece a worker, ZeRO-3 the weights as well."""

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
from addressvlm.training.loss import make_adamw, set_learning_rate
from addressvlm.training.strategy import OptimizerState

MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero:
    """See `Strategy`."""

    def __init__(
        self, model: PeftModel, stage: StageConfig, look: Callable[[], int], level: int, device: torch.device, fast: bool
    ) -> None:
        self.model, self.level, self.device = model, level, device
        self.flops = look()
        self.frozen = {name: weights for name, weights in adapter_state(model).items() if name not in trainable_params(model)}
        config = {
            "train_micro_batch_size_per_gpu": stage.batch_size,
            "gradient_accumulation_steps": stage.gradient_accumulation_steps,
            "gradient_clipping": stage.max_grad_norm,
            "zero_optimization": {"stage": level, "memory_efficient_linear": False},  # its own products know no autocast
            "zero_allow_untested_optimizer": True,
            # On GPUs DeepSpeed switches autocast off unless it is named here; gradients stay in float32.
            "torch_autocast": {"enabled": fast, "dtype": "bfloat16", "lower_precision_safe_modules": []},
            "steps_per_print": 10**9,
        }
        if level == 3:  # cuts the weights one by one; `initialize` would move all of them to the GPU first
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
            for buffer in model.buffers():
                buffer.data = buffer.data.to(device)
        self.module, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=make_adamw(model, stage), config=config)
        self._set_steps(torch.tensor(0.0))  # ZeRO-3 has made one to create the moments
        self.accumulate = stage.gradient_accumulation_steps

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss * self.accumulate)  # DeepSpeed divides by it, the loop has done so already

    def step(self, learning_rate: float) -> float:
        set_learning_rate(self.optimizer, learning_rate)
        self.module.step()
        return float(self.module.get_global_grad_norm() or 0.0)

    def weights(self) -> dict[str, torch.Tensor]:
        learnt = {name: safe_get_full_fp32_param(weights) for name, weights in trainable_params(self.model).items()}
        return {
            name: self.frozen[name] if name in self.frozen else learnt[name].detach().cpu().contiguous()
            for name, _ in adapter_weights(self.model)
        }

    def moments(self) -> OptimizerState:
        step = next(iter(self._inner().state.values()))["step"].cpu()
        return {
            name: {**{key: safe_get_full_optimizer_state(weights, key).cpu() for key in MOMENTS}, "step": step}
            for name, weights in trainable_params(self.model).items()
        }

    def restore(self, moments: OptimizerState) -> None:
        self._create_moments()
        for name, weights in trainable_params(self.model).items():
            for key in MOMENTS:
                whole = moments[name][key].to(self.device)
                if self.level == 2:
                    safe_set_full_optimizer_state(weights, whole, key)
                else:
                    size = safe_get_local_optimizer_state(weights, key).numel()
                    padded = F.pad(whole.flatten(), (0, size * dist.get_world_size() - whole.numel()))
                    safe_set_local_optimizer_state(weights, padded[size * dist.get_rank() :][:size], key)
        self._set_steps(next(iter(moments.values()))["step"])

    def _create_moments(self) -> None:
        """As the first step would."""
        inner, groups = self._inner(), self._inner().param_groups
        flat = (
            self.optimizer.fp32_partitioned_groups_flat if self.level == 3 else [p for group in groups for p in group["params"]]
        )
        for piece in flat:
            inner.state[piece] = {"step": torch.tensor(0.0), **{key: torch.zeros_like(piece) for key in MOMENTS}}
        if self.level == 2:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _inner(self) -> Any:
        """The optimizer that DeepSpeed has wrapped."""
        return self.optimizer.optimizer

    def _set_steps(self, step: torch.Tensor) -> None:
        for state in self._inner().state.values():
            state["step"] = step.clone()
