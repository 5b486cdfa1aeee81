"""The loss and the learning rate of a step."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from addressvlm.config.train import StageConfig
from addressvlm.models.loading import multiplies_bfloat16
from addressvlm.models.lora import trainable_params
from addressvlm.models.parts import part_of, parts_of
from addressvlm.training.collator import IGNORE_INDEX

BETAS = (0.9, 0.999)


def answer_loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy over the answer tokens of a batch and their number."""
    losses = token_losses(model, batch)
    return losses.sum(), torch.tensor(len(losses))


def token_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of every answer token of a batch, (tokens,), in the order of `batch["labels"]`.

    Logits are computed only of the tokens before an answer's: with a 50k vocabulary they are the largest tensor.
    """
    labels = batch["labels"][:, 1:]
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "asked")}
    with logits_only_at(model, labels != IGNORE_INDEX):
        logits = model(**inputs, use_cache=False).logits.float()
    return F.cross_entropy(logits, labels[labels != IGNORE_INDEX], reduction="none")


@contextmanager
def logits_only_at(model: Any, chosen_BT: torch.Tensor) -> Iterator[None]:  # noqa: N803
    """Within it the model's logits are those of the chosen ones of the first T tokens only, (chosen, vocabulary)."""
    while hasattr(model, "module"):  # of DistributedDataParallel or DeepSpeed
        model = model.module
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: (args[0][:, : chosen_BT.shape[1]][chosen_BT],))
    try:
        yield
    finally:
        hook.remove()


def autocast(device: torch.device, weights: torch.dtype, precision: str) -> torch.autocast:
    """The context of a forward pass: matrix products and convolutions in bfloat16, sums and norms in float32; or nothing.

    Args:
        weights: dtype of the base model; with bfloat16 weights beside float32 adapters the products are in bfloat16.
        precision: float32, bfloat16, or auto, which is bfloat16 where the device multiplies it faster than float32.
    """
    wanted = multiplies_bfloat16(device) if precision == "auto" else precision == "bfloat16"
    wanted = wanted or weights == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up over the share `warmup_ratio` of the steps, then a cosine to zero."""
    warm = max(1, round(steps * warmup_ratio))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def parameter_groups(model: Any, stage: StageConfig) -> list[dict[str, Any]]:
    """What learns, for an optimizer: one group a learning rate, `share` being that rate by the stage's own."""
    if not stage.learning_rates:
        return [{"params": list(trainable_params(model).values()), "share": 1.0}]
    parts = parts_of(model.get_base_model())
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in trainable_params(model).items():
        part = part_of(name, parts)
        rate = stage.learning_rates.get(part, stage.learning_rate) if part else stage.learning_rate
        groups.setdefault(rate / stage.learning_rate, []).append(parameter)
    return [{"params": parameters, "share": share} for share, parameters in groups.items()]


def make_adamw(model: Any, stage: StageConfig) -> torch.optim.AdamW:
    """The optimizer of what learns; its rates are set at every step."""
    return torch.optim.AdamW(parameter_groups(model, stage), lr=0.0, betas=BETAS, weight_decay=stage.weight_decay)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Give every group of `parameter_groups` its rate at a step whose own is `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def clipped_step(optimizer: torch.optim.Optimizer, learning: Iterable[torch.nn.Parameter], clip: float, rate: float) -> Any:
    """Update once and clear the gradients; returns their norm before it was clipped, a tensor."""
    set_learning_rate(optimizer, rate)
    norm = torch.nn.utils.clip_grad_norm_(learning, clip)
    optimizer.step()
    optimizer.zero_grad()
    return norm
