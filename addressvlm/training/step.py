"""The loss and the learning rate of a step."""

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from addressvlm.training.collate import IGNORE


def answer_loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy over the answer tokens of a batch and their number.

    Logits are computed only at columns where some row has an answer: with a 50k vocabulary they are the largest tensor.
    """
    labels = batch["labels"]
    wanted = (labels[:, 1:] != IGNORE).any(0).nonzero().squeeze(1)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False, logits_to_keep=wanted).logits.float()
    targets = labels[:, 1:][:, wanted]
    total = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORE, reduction="sum")
    return total, (targets != IGNORE).sum()


def autocast(device: torch.device, weights: torch.dtype, precision: str) -> torch.autocast:
    """The context of a forward pass: matrix products and convolutions in bfloat16, sums and norms in float32; or nothing.

    Args:
        weights: dtype of the base model; with bfloat16 weights beside float32 adapters the products are in bfloat16.
        precision: float32, bfloat16, or auto, which is bfloat16 where the device multiplies it faster than float32.
    """
    wanted = _multiplies_bfloat16(device) if precision == "auto" else precision == "bfloat16"
    wanted = wanted or weights == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of the steps, then a cosine to zero."""
    warm = max(1, round(steps * warmup))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
