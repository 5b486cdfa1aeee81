"""LoRA: which layers of which parts it targets, which parts a stage trains, the adapter's state, merging."""

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
from addressvlm.models.families import part_of, parts_of
from addressvlm.models.loading import load_model


class FusedLoraLinear(lora.Linear):
    """PEFT's LoRA of a linear layer as one fused operation; falls back to PEFT's own forward where that does not apply."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (…, in) -> (…, out)."""
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        kind = x.device.type
        cast = kind != "meta" and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if cast else x.dtype
        fusable = name in self.lora_A and name not in self.lora_variant and not (args or kwargs or self.merged)
        # DeepSpeed gathers sharded weights (ds_id) when their own modules are called.
        if not fusable or self.disable_adapters or hasattr(self.weight, "ds_id") or (not cast and x.dtype != self.weight.dtype):
            return super().forward(x, *args, **kwargs)
        dropped = self.lora_dropout[name](x) if self.training else x
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        return _FusedLora.apply(
            x, None if dropped is x else dropped, self.weight, self.base_layer.bias, down, up, self.scaling[name], dtype
        )


class _FusedLora(torch.autograd.Function):
    """W x + b + s B A z, where z is x after dropout; W and b are frozen."""

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
        lora_in = flat if dropped is None else dropped.reshape(-1, x.shape[-1]).to(dtype)
        weight, down, scaled = weight.to(dtype), down.to(dtype), (up * scale).to(dtype)
        inner = lora_in @ down.T
        out = F.linear(flat, weight, None if bias is None else bias.to(dtype)).addmm_(inner, scaled.T)
        ctx.save_for_backward(lora_in, inner, weight, down, scaled)
        ctx.scale, ctx.forms = scale, (x.shape, x.dtype, up.dtype)
        return out.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        lora_in, inner, weight, down, scaled = ctx.saved_tensors
        shape, input_dtype, weight_dtype = ctx.forms
        grad_out = gradient.reshape(-1, gradient.shape[-1]).to(lora_in.dtype)
        grad_inner = grad_out @ scaled
        grad_x = grad_dropped = grad_down = grad_up = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_out @ weight
            if not ctx.needs_input_grad[1]:
                grad_x.addmm_(grad_inner, down)
            grad_x = grad_x.reshape(shape).to(input_dtype)
        if ctx.needs_input_grad[1]:
            grad_dropped = (grad_inner @ down).reshape(shape).to(input_dtype)
        if ctx.needs_input_grad[4]:
            grad_down = (grad_inner.T @ lora_in).to(weight_dtype)
        if ctx.needs_input_grad[5]:
            grad_up = (grad_out.T @ inner).to(weight_dtype) * ctx.scale
        return grad_x, grad_dropped, None, None, grad_down, grad_up, None, None


def attach_lora(model: nn.Module, config: ModelConfig) -> tuple[PeftModel, dict[Part, str]]:
    """One PEFT adapter over all three parts, and the parts' module paths; InputError if the model's family is unknown."""
    parts = parts_of(model)
    peft_config = lora_config(model, parts, config)
    peft_config._register_custom_module({nn.Linear: FusedLoraLinear})
    peft_model = get_peft_model(model, peft_config)
    for path, module in peft_model.named_modules():  # PEFT knows one dropout for all parts
        part = part_of(path, parts) if isinstance(module, LoraLayer) else None
        if part and (dropout := part_configs(config)[part].dropout) is not None:
            module.lora_dropout["default"] = nn.Dropout(dropout) if dropout else nn.Identity()
    for _, weights in adapter_weights(peft_model):
        if weights.dtype != torch.float32:
            weights.data = weights.data.float()  # small updates vanish in bfloat16
    return peft_model, parts


def part_configs(config: ModelConfig) -> dict[Part, PartConfig]:
    return {"vision": config.vision, "adapter": config.adapter, "llm": config.llm}


def lora_config(model: nn.Module, parts: dict[Part, str], config: ModelConfig) -> LoraConfig:
    """PEFT's configuration: target modules, rank and alpha of each part.

    Targets are all linear layers and convolutions of a part, but no grouped ones. They are anchored to the part's path, since
    names like `q_proj` occur in the vision encoder too.
    """
    patterns, ranks, alphas, full = [], {}, {}, []
    for part, setting in part_configs(config).items():
        if setting.full:
            full.append(parts[part].removeprefix("model."))
            continue
        names = {
            re.escape(path.rsplit(".", 1)[-1])
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and getattr(module, "groups", 1) == 1 and part_of(path, parts) == part
        }
        nested = [path for path in parts.values() if path.startswith(parts[part] + ".")]
        outside = "".join(rf"(?!{re.escape(path)}\.)" for path in nested)
        pattern = rf"{outside}{re.escape(parts[part])}\.(?:.*\.)?(?:{'|'.join(sorted(names))})"
        patterns.append(pattern)
        ranks[pattern], alphas[pattern] = setting.rank, setting.alpha
    return LoraConfig(
        r=max(ranks.values(), default=1),
        target_modules="|".join(f"(?:{p})" for p in patterns) or "(?!)",
        rank_pattern=ranks,
        alpha_pattern=alphas,
        lora_dropout=config.lora_dropout,
        modules_to_save=full or None,
    )


def set_trainable_parts(model: PeftModel, parts: dict[Part, str], chosen: list[Part]) -> None:
    """Train the adapter's weights of the chosen parts and freeze all others."""
    model.requires_grad_(False)
    for name, weights in adapter_weights(model):
        weights.requires_grad = part_of(name, parts) in chosen


def freeze_batchnorm(model: nn.Module) -> None:
    """Put BatchNorm layers in eval mode, so that running statistics stay; call after `model.train()`."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def trainable_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapter_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapter's parameters: LoRA matrices and fully tuned parts."""
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            yield name, parameter


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """All weights of the adapter by name, on the CPU, whichever stage trains them."""
    return {name: weights.detach().cpu().contiguous() for name, weights in adapter_weights(model)}


def load_adapter_state(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    """Load an `adapter_state`.

    Raises:
        InputError: the state is of another base model or another rank.
    """
    current = adapter_state(model)
    if current.keys() != state.keys() or any(current[k].shape != state[k].shape for k in current):
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
    model: Any = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    model.save_pretrained(merged)
    processor.save_pretrained(merged)
