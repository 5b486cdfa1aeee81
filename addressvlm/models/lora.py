"""Attach LoRA (or full tuning) to the parts, choose which of them a stage trains, save and merge the result."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from addressvlm.config_training import ModelConfig, Part, PartConfig
from addressvlm.errors import InputError
from addressvlm.models import lora_linear
from addressvlm.models.base import load
from addressvlm.models.parts import linear_leaves, part_of, parts_of


def attach(model: nn.Module, config: ModelConfig) -> tuple[PeftModel, dict[Part, str]]:
    """One PEFT adapter over all three parts, and where the parts are.

    Raises:
        InputError: the model's parts can't be named.
    """
    parts = parts_of(model)
    lora = lora_config(model, parts, config)
    lora._register_custom_module({nn.Linear: lora_linear.Linear})
    tuned = get_peft_model(model, lora)
    _set_dropout(tuned, parts, {part: setting.dropout for part, setting in _settings(config).items()})
    for _, weights in adapter_weights(tuned):
        if weights.dtype != torch.float32:
            weights.data = weights.data.float()  # small updates vanish in bfloat16
    return tuned, parts


def _settings(config: ModelConfig) -> dict[Part, PartConfig]:
    return {"vision": config.vision, "adapter": config.adapter, "llm": config.llm}


def lora_config(model: nn.Module, parts: dict[Part, str], config: ModelConfig) -> LoraConfig:
    """PEFT's configuration of ranks and alphas by part.

    Targets are anchored to each part's path, for the same leaf names (`q_proj`, …) occur in the vision encoder too.
    """
    patterns, ranks, alphas, whole = [], {}, {}, []
    for part, setting in _settings(config).items():
        if setting.full:
            whole.append(parts[part].removeprefix("model."))
            continue
        inner = [path for path in parts.values() if path.startswith(parts[part] + ".")]
        pattern = _pattern(parts[part], linear_leaves(model, part, parts), inner)
        patterns.append(pattern)
        ranks[pattern], alphas[pattern] = setting.rank, setting.alpha
    return LoraConfig(
        r=max(ranks.values(), default=1),
        target_modules="|".join(f"(?:{p})" for p in patterns) or "(?!)",
        rank_pattern=ranks,
        alpha_pattern=alphas,
        lora_dropout=config.lora_dropout,
        modules_to_save=whole or None,
    )


def _pattern(prefix: str, leaves: list[str], inner: list[str]) -> str:
    """A regular expression for exactly these modules below `prefix`, by their last names; `inner` are parts within it."""
    names = sorted({leaf.rsplit(".", 1)[-1] for leaf in leaves})
    others = "".join(rf"(?!{re.escape(path)}\.)" for path in inner)
    return rf"{others}{re.escape(prefix)}\.(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"


def _set_dropout(model: PeftModel, parts: dict[Part, str], dropouts: dict[Part, float | None]) -> None:
    """Give parts a dropout of their own; PEFT knows one for all."""
    for path, module in model.named_modules():
        part = part_of(path, parts) if isinstance(module, LoraLayer) else None
        if part and (dropout := dropouts[part]) is not None:
            module.lora_dropout["default"] = nn.Dropout(dropout) if dropout else nn.Identity()


def train_only(model: PeftModel, parts: dict[Part, str], chosen: list[Part]) -> None:
    """Let the adapter's weights of the chosen parts learn and freeze all others."""
    model.requires_grad_(False)
    for name, weights in adapter_weights(model):
        weights.requires_grad = part_of(name, parts) in chosen


def keep_statistics(model: nn.Module) -> None:
    """Put normalization layers with running statistics in eval mode; call after `model.train()`."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapter_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What the adapter consists of: LoRA matrices and parts that are tuned whole."""
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            yield name, parameter


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """All weights of the adapter, whichever stage trains them, by name, on the CPU."""
    return {name: weights.detach().cpu().contiguous() for name, weights in adapter_weights(model)}


def load_adapter_state(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    """Put back what `adapter_state` gave.

    Raises:
        InputError: the state is of another base model or another rank.
    """
    own = adapter_state(model)
    if own.keys() != state.keys() or any(own[k].shape != state[k].shape for k in own):
        raise InputError(
            "the checkpoint belongs to another base model or other LoRA settings: give the run another name, or restore "
            "the settings it was made with."
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in state:
                parameter.copy_(state[name])


def export(adapter: Path, config: ModelConfig, merged: Path) -> None:
    """Merge a saved adapter into its base model and write an ordinary Hugging Face folder."""
    base, processor = load(config.base, config.dtype, config.trust_remote_code)
    whole: Any = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    whole.save_pretrained(merged)
    processor.save_pretrained(merged)
