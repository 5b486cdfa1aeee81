"""What a row costs a model without weights: its passes are run on PyTorch's `meta` device, where tensors have only shapes.

Counted are the floating-point operations of forward and backward pass, and the bytes that the forward pass keeps for the
backward pass. Attention is taken as one that keeps query, key, value and result (as flash attention does); what a
plain one keeps beside, a number for each pair of tokens, is returned apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from addressvlm.config_training import Part
from addressvlm.training.recompute import recomputing

NAME = "addressvlm_outline"
PASSES = 3  # operations of both passes through an attention, in those of its forward pass


@dataclass
class Cost:
    """Of one row: floating-point operations, bytes kept, and pairs of tokens over all heads and layers.

    `guessed` if not all of it could be counted.
    """

    flops: float = 0.0
    kept: float = 0.0
    pairs: float = 0.0
    guessed: bool = False

    def __add__(self, other: "Cost") -> "Cost":
        guessed = self.guessed or other.guessed
        return Cost(self.flops + other.flops, self.kept + other.kept, self.pairs + other.pairs, guessed)


def cost_of(
    model: Any, parts: dict[Part, str], image: dict[str, torch.Tensor], tokens: int, answers: int, recompute: bool = False
) -> Cost:
    """Cost of a row of `tokens` tokens, of which `answers` are learnt; what of the model learns is what requires gradients.

    Args:
        recompute: each layer keeps its input only, beside which all of one layer is there while it is computed again.
    """
    AttentionInterface.register(NAME, _attend)
    base = model.get_base_model()
    text, llm = base.config.get_text_config(), base.get_submodule(parts["llm"])
    whole = _kept(
        model, base.get_submodule(parts["vision"]), lambda: _vision(base, parts, image, recompute), recompute
    ) + _kept(model, llm, lambda: _language(llm, text.hidden_size, tokens, base.dtype), recompute)
    width, vocabulary = text.hidden_size, text.vocab_size
    return whole + Cost(4.0 * answers * width * vocabulary, answers * vocabulary * 4.0 * 3)  # logits, their softmax, gradient


def _kept(model: Any, part: torch.nn.Module, count: Callable[[], Cost], recompute: bool) -> Cost:
    cost = count()
    if not recompute or cost.guessed:
        return cost
    training = model.training
    recomputing(model.train(), True)
    try:
        least = count().kept
    finally:
        recomputing(model.train(training), False)
    layers = max(1, sum(isinstance(module, GradientCheckpointingLayer) for module in part.modules()))
    return Cost(cost.flops, least + (cost.kept - least) / layers, cost.pairs / layers)


def _language(llm: Any, width: int, tokens: int, dtype: torch.dtype) -> Cost:
    llm.set_attn_implementation(NAME)
    row = torch.empty(1, tokens, width, device="meta", dtype=dtype, requires_grad=True)
    return _counted(lambda: llm(inputs_embeds=row, use_cache=False).last_hidden_state, llm)


def _vision(base: Any, parts: dict[Part, str], image: dict[str, torch.Tensor], recompute: bool) -> Cost:
    """Of encoder and adapter; guessed where a family's code looks into its tensors (Qwen-VL), which then raise RuntimeError."""
    encoder, adapter = base.get_submodule(parts["vision"]), base.get_submodule(parts["adapter"])
    shown = {key: value.to("meta", base.dtype if value.is_floating_point() else None) for key, value in image.items()}
    try:
        if getattr(encoder.config, "num_attention_heads", None):
            encoder.set_attn_implementation(NAME)
        return _counted(lambda: _features(base.get_image_features(**shown)), encoder, adapter)
    except RuntimeError:
        return _guessed(base, encoder, adapter, image, recompute)


def _features(found: Any) -> torch.Tensor:
    found = getattr(found, "pooler_output", found)
    return found if isinstance(found, torch.Tensor) else torch.cat(list(found))


def _guessed(base: Any, encoder: Any, adapter: Any, image: dict[str, torch.Tensor], recompute: bool) -> Cost:
    """Two operations a weight and patch and pass, and sixteen kept numbers a channel, layer and patch, or one."""
    config = encoder.config
    patch, width = getattr(config, "patch_size", 16), config.hidden_size
    depth = getattr(config, "num_hidden_layers", 0) or getattr(config, "depth", 12)
    patches = image["pixel_values"].numel() / (3 * patch**2)
    weights = sum(p.numel() for p in [*encoder.parameters(), *adapter.parameters()])
    passes = 3 if any(p.requires_grad for p in [*encoder.parameters(), *adapter.parameters()]) else 1
    kept = (depth + 16.0 if recompute else 16.0 * depth) * patches * width * base.dtype.itemsize * (passes > 1)
    return Cost(2.0 * passes * weights * patches, kept, guessed=True)


def _counted(forward: Callable[[], torch.Tensor], *modules: torch.nn.Module) -> Cost:
    """Cost of both passes; the second one only if something can learn by it."""
    kept: dict[int, torch.Tensor] = {}
    cost = Cost()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    _totals.append(cost)
    try:
        with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
            out = forward()
            if out.requires_grad:
                out.sum().backward()
    finally:
        _totals.pop()
    cost.flops += counter.get_total_flops()
    owned = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
    cost.kept += sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in owned)
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = None
    return cost


_totals: list[Cost] = []  # the cost being counted, to which attention adds its part


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps and has a result of the right shape."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, None]:
    batch, heads, tokens, width = query.shape
    pairs = batch * heads * tokens * key.shape[2] * (0.5 if getattr(module, "is_causal", False) else 1.0)
    _totals[-1].flops += 4 * pairs * width * (PASSES if query.requires_grad else 1)
    _totals[-1].pairs += batch * heads * tokens * key.shape[2] * query.requires_grad
    return _Attention.apply(query, key, value).transpose(1, 2), None
