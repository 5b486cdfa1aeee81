"""AdamW of the trained parameters: parameter groups, learning-rate schedule, gradient clipping."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from addressvlm.config.train import StageConfig
from addressvlm.models.families import part_of, parts_of
from addressvlm.models.lora import trainable_params

BETAS = (0.9, 0.999)


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up over the share `warmup_ratio` of the steps, then a cosine to zero; `step` counts from 0."""
    warmup = max(1, round(steps * warmup_ratio))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_adamw(model: Any, stage: StageConfig) -> torch.optim.AdamW:
    """The stage's optimizer; `set_learning_rate` gives it its rates before every step."""
    return torch.optim.AdamW(parameter_groups(model, stage), lr=0.0, betas=BETAS, weight_decay=stage.weight_decay)


def parameter_groups(model: Any, stage: StageConfig) -> list[dict[str, Any]]:
    """The trained parameters, one group for each learning rate; `share` is that rate divided by the stage's."""
    if not stage.learning_rates:
        return [{"params": list(trainable_params(model).values()), "share": 1.0}]
    parts = parts_of(model.get_base_model())
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in trainable_params(model).items():
        part = part_of(name, parts)
        rate = stage.learning_rates.get(part, stage.learning_rate) if part else stage.learning_rate
        groups.setdefault(rate / stage.learning_rate, []).append(parameter)
    return [{"params": parameters, "share": share} for share, parameters in groups.items()]


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Set the rate of every group of `parameter_groups`; `rate` is the stage's at this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def clip_and_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter], max_norm: float, rate: float
) -> torch.Tensor:
    """Clip the gradients, update and clear them; returns their norm before clipping, a scalar."""
    set_learning_rate(optimizer, rate)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm
