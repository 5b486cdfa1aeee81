"""Attach LoRA (or full tuning) to the parts, choose which of them a stage trains, save and merge the result."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn

from addressvlm.config.train import ModelConfig, Part, PartConfig
from addressvlm.errors import InputError
from addressvlm.models.loading import load_model
from addressvlm.models.parts import linear_leaves, part_of, parts_of


class FusedLoraLinear(lora.Linear):
    """PEFT's LoRA of a matrix; what it can't do in one step is done by PEFT's own layer."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (…, in) -> (…, out)."""
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        kind = x.device.type
        cast = kind != "meta" and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if cast else x.dtype
        plain = name in self.lora_A and name not in self.lora_variant and not (args or kwargs or self.merged)
        if not plain or self.disable_adapters or self._sharded() or (not cast and x.dtype != self.weight.dtype):
            return super().forward(x, *args, **kwargs)
        dropped = self.lora_dropout[name](x) if self.training else x
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        return _Product.apply(
            x, None if dropped is x else dropped, self.weight, self.base_layer.bias, down, up, self.scaling[name], dtype
        )

    def _sharded(self) -> bool:
        """Whether DeepSpeed gathers weights where their own modules are called, so that these must be called."""
        return hasattr(self.weight, "ds_id")


class _Product(torch.autograd.Function):
    """W x + b + s B A z, where z is x or what dropout left of it; W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        thin = flat if dropped is None else dropped.reshape(-1, x.shape[-1]).to(dtype)
        weight, down, scaled = weight.to(dtype), down.to(dtype), (up * scale).to(dtype)
        inner = thin @ down.T
        out = F.linear(flat, weight, None if bias is None else bias.to(dtype)).addmm_(inner, scaled.T)
        ctx.save_for_backward(thin, inner, weight, down, scaled)
        ctx.scale, ctx.kinds = scale, (x.shape, x.dtype, up.dtype)
        return out.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        thin, inner, weight, down, scaled = ctx.saved_tensors
        shape, kind, kept = ctx.kinds
        of_out = gradient.reshape(-1, gradient.shape[-1]).to(thin.dtype)
        of_inner = of_out @ scaled
        of_x = of_dropped = of_down = of_up = None
        if ctx.needs_input_grad[0]:
            of_x = of_out @ weight
            if not ctx.needs_input_grad[1]:
                of_x.addmm_(of_inner, down)
            of_x = of_x.reshape(shape).to(kind)
        if ctx.needs_input_grad[1]:
            of_dropped = (of_inner @ down).reshape(shape).to(kind)
        if ctx.needs_input_grad[4]:
            of_down = (of_inner.T @ thin).to(kept)
        if ctx.needs_input_grad[5]:
            of_up = (of_out.T @ inner).to(kept) * ctx.scale
        return of_x, of_dropped, None, None, of_down, of_up, None, None


def attach_lora(model: nn.Module, config: ModelConfig) -> tuple[PeftModel, dict[Part, str]]:
    """One PEFT adapter over all three parts, and where the parts are.

    Raises:
        InputError: the model's parts can't be named.
    """
    parts = parts_of(model)
    lora = lora_config(model, parts, config)
    lora._register_custom_module({nn.Linear: FusedLoraLinear})
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


def set_trainable_parts(model: PeftModel, parts: dict[Part, str], chosen: list[Part]) -> None:
    """Let the adapter's weights of the chosen parts learn and freeze all others."""
    model.requires_grad_(False)
    for name, weights in adapter_weights(model):
        weights.requires_grad = part_of(name, parts) in chosen


def freeze_batchnorm(model: nn.Module) -> None:
    """Put normalization layers with running statistics in eval mode; call after `model.train()`."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def trainable_params(model: nn.Module) -> dict[str, nn.Parameter]:
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


def export_merged(adapter: Path, config: ModelConfig, merged: Path) -> None:
    """Merge a saved adapter into its base model and write an ordinary Hugging Face folder."""
    base, processor = load_model(config.base, config.dtype, config.trust_remote_code)
    whole: Any = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    whole.save_pretrained(merged)
    processor.save_pretrained(merged)
