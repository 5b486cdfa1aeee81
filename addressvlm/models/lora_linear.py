"""LoRA's thin products in one autograd step: same result as PEFT's layer, fewer copies of the activations.

PEFT computes `W x`, then `B (A x)`, scales it and adds it, each into a new tensor; under autocast each of the inputs is cast
again. Here both products end in one tensor, and so do their gradients.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft.tuners import lora


class Linear(lora.Linear):
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
