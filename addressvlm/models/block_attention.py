"""Attention for packed rows: several conversations in one row, block by block, without padding and without a T x T mask.

On GPUs it is PyTorch's flex attention with the same blocks, which skips tiles of the scores in which no token sees another.

Positions define the blocks. Where they restart at 0 a conversation begins; where they jump back to p > 0 a round begins that
attends to the conversation's first p tokens and itself (`isolate_questions: true`). Tokens of different blocks are never
multiplied.
"""

import itertools
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

NAME = "addressvlm_blocks"


class Block(NamedTuple):
    """Tokens [start, stop), which attend to tokens [first, first + shared) and causally to themselves."""

    start: int
    stop: int
    first: int
    shared: int


def blocks_of(positions: torch.Tensor) -> list[Block]:
    """The blocks of a row with positions (T,)."""
    starts = [0, *((positions.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(positions)]
    first, blocks = 0, []
    for start, stop in itertools.pairwise(starts):
        shared = int(positions[start])
        first = start if shared == 0 else first
        blocks.append(Block(start, stop, first, shared))
    return blocks


def block_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: query (B, H, T, D), key and value (B, K, T, D) -> (B, T, H, D).

    With a mask or cached tokens it is eager attention.
    """
    if attention_mask is not None or position_ids is None or query.shape[2] != key.shape[2]:
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings have made them float32
    if query.is_cuda:
        return flex_attention_of(query, key, value, position_ids, scaling), None
    blocks = [_blocks(row) for row in position_ids.expand(query.shape[0], -1)]
    return _Attention.apply(query, key, value, blocks, scaling), None


def sees(positions: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Which token sees which, as a `mask_mod` of flex attention, from positions (B, T); without leaving their device."""
    index = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions.diff(dim=1) != 1
    block = starts.cumsum(1)
    conversation = (positions == 0).cumsum(1)
    within = index - torch.where(positions == 0, index, 0).cummax(1).values  # index in the conversation
    shared = positions - (index - torch.where(starts, index, 0).cummax(1).values)  # tokens that the block sees before its own

    def mask(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        own = block[batch, query] == block[batch, key]
        before = within[batch, key] < shared[batch, query]
        return (query >= key) & (conversation[batch, query] == conversation[batch, key]) & (own | before)

    return mask


@cache
def _compiled() -> tuple[Any, Any]:
    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)


_last_mask: list[Any] = [None, None]  # positions and their mask, the same for all layers of a forward pass


def flex_attention_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    """As `block_attention` on a GPU: query (B, H, T, D), key and value (B, K, T, D), positions (B or 1, T) -> (B, T, H, D)."""
    attend, make_mask = _compiled() if query.is_cuda else (flex_attention, create_block_mask)
    if _last_mask[0] is not positions:  # all layers of a forward pass are given the same tensor
        rows, length = positions.expand(len(query), -1), positions.shape[1]
        _last_mask[:] = [positions, make_mask(sees(rows), len(rows), None, length, length, device=rows.device)]
    groups = query.shape[1] // key.shape[1]
    if groups & (groups - 1):  # flex attention shares keys among 2, 4, 8 … heads
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    out = attend(query, key, value, block_mask=_last_mask[1], scale=scale, enable_gqa=groups > 1)
    return out.transpose(1, 2)


_last: list[Any] = [None, []]  # positions and their blocks, the same for all layers of a forward pass


def _blocks(positions: torch.Tensor) -> list[Block]:
    if _last[0] is None or _last[0].shape != positions.shape or not torch.equal(_last[0], positions):
        _last[:] = [positions, blocks_of(positions.cpu())]
    return _last[1]


class _Attention(torch.autograd.Function):
    """Causal attention within blocks; query heads that share keys and values are multiplied together."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: list[list[Block]], scale: float
    ) -> torch.Tensor:
        batch, heads, length, width = query.shape
        out, saved = query.new_empty(batch, length, heads, width), []
        with torch.autocast(query.device.type, enabled=False):
            for row, blocks in enumerate(rows):
                for block in blocks:
                    q, k, v = _grouped(query[row], block, key.shape[1]), _visible(key[row], block), _visible(value[row], block)
                    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
                    size = block.stop - block.start
                    within = scores[:, :, -size:].unflatten(1, (-1, size))
                    within += _causal_mask(size, q.dtype, q.device)
                    weights = torch.softmax(scores, -1)
                    saved.append(weights)
                    out[row, block.start : block.stop] = torch.bmm(weights, v).view(heads, size, width).transpose(0, 1)
        ctx.save_for_backward(query, key, value, *saved)
        ctx.rows, ctx.scale = rows, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        saved_weights = iter(saved)
        for row, blocks in enumerate(ctx.rows):
            grad_out = gradient[row].transpose(0, 1)
            for block in blocks:
                q, k, v = _grouped(query[row], block, key.shape[1]), _visible(key[row], block), _visible(value[row], block)
                weights, grad_block = next(saved_weights), _grouped(grad_out, block, key.shape[1])
                grad_weights = torch.bmm(grad_block, v.transpose(1, 2))
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(ctx.scale)
                grad_query[row, :, block.start : block.stop] = torch.bmm(grad_scores, k).view(
                    query.shape[1], -1, query.shape[3]
                )
                _add_visible_grad(grad_key[row], block, torch.bmm(grad_scores.transpose(1, 2), q))
                _add_visible_grad(grad_value[row], block, torch.bmm(weights.transpose(1, 2), grad_block))
        return grad_query, grad_key, grad_value, None, None


def _grouped(rows: torch.Tensor, block: Block, groups: int) -> torch.Tensor:
    """A block's tokens of (H, T, D), with the heads that share keys stacked, (K, H / K x size, D)."""
    return rows[:, block.start : block.stop].reshape(groups, -1, rows.shape[2])


def _visible(rows: torch.Tensor, block: Block) -> torch.Tensor:
    """The keys or values (K, T, D) that a block attends to."""
    within = rows[:, block.start : block.stop]
    return torch.cat([rows[:, block.first : block.first + block.shared], within], 1) if block.shared else within


def _add_visible_grad(rows: torch.Tensor, block: Block, gradient: torch.Tensor) -> None:
    """Add the gradient of `_visible` to that of all keys or values."""
    rows[:, block.start : block.stop] += gradient[:, block.shared :]
    if block.shared:
        rows[:, block.first : block.first + block.shared] += gradient[:, : block.shared]


@lru_cache(maxsize=2)
def _triangle(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu(1)


def _causal_mask(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """-inf above the diagonal (length, length), a corner of one cached matrix."""
    return _triangle(-(-length // 512) * 512, dtype, device)[:length, :length]


def _mask(**kwargs: Any) -> torch.Tensor | None:
    """The mask for `block_attention`: none for rows whose positions define the blocks."""
    positions_suffice = kwargs.get("attention_mask") is None and kwargs["q_length"] == kwargs["kv_length"]
    return None if positions_suffice else eager_mask(**kwargs)


def register() -> str:
    """Register it with transformers; returns its name."""
    AttentionInterface.register(NAME, block_attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME
