"""Attention of several conversations in one row, block by block, without padding and without a mask of the whole row.

Positions define the blocks. Where they restart at 0 a conversation begins; where they jump back to p > 0 a round begins that
attends to the conversation's first p tokens and itself (`isolate_questions: true`). Tokens of different blocks are never
multiplied.
"""

import itertools
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

NAME = "addressvlm_blocks"


class Block(NamedTuple):
    """Tokens [start, stop), which see the tokens [first, first + shared) and themselves, each up to its own."""

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

    With a mask, or tokens that are cached, it is the plain one.
    """
    if attention_mask is not None or position_ids is None or query.shape[2] != key.shape[2]:
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, positions have made float32 of them
    blocks = [_blocks(row) for row in position_ids.expand(query.shape[0], -1)]
    return _Attention.apply(query, key, value, blocks, scaling), None


_last: list[Any] = [None, []]  # positions and their blocks: all layers of a forward pass ask for the same


def _blocks(positions: torch.Tensor) -> list[Block]:
    if _last[0] is None or _last[0].shape != positions.shape or not torch.equal(_last[0], positions):
        _last[:] = [positions, blocks_of(positions.cpu())]
    return _last[1]


class _Attention(torch.autograd.Function):
    """Causal attention within blocks; heads that share keys and values are multiplied by them together."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: list[list[Block]], scale: float
    ) -> torch.Tensor:
        batch, heads, length, width = query.shape
        out, kept = query.new_empty(batch, length, heads, width), []
        with torch.autocast(query.device.type, enabled=False):
            for row, blocks in enumerate(rows):
                for block in blocks:
                    q, k, v = _grouped(query[row], block, key.shape[1]), _seen(key[row], block), _seen(value[row], block)
                    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
                    size = block.stop - block.start
                    own = scores[:, :, -size:].unflatten(1, (-1, size))
                    own += _future(size, q.dtype, q.device)
                    weights = torch.softmax(scores, -1)
                    kept.append(weights)
                    out[row, block.start : block.stop] = torch.bmm(weights, v).view(heads, size, width).transpose(0, 1)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.rows, ctx.scale = rows, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        turns = iter(kept)
        for row, blocks in enumerate(ctx.rows):
            of_out = gradient[row].transpose(0, 1)
            for block in blocks:
                q, k, v = _grouped(query[row], block, key.shape[1]), _seen(key[row], block), _seen(value[row], block)
                weights, of_sum = next(turns), _grouped(of_out, block, key.shape[1])
                of_weights = torch.bmm(of_sum, v.transpose(1, 2))
                of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scale)
                of_query[row, :, block.start : block.stop] = torch.bmm(of_scores, k).view(query.shape[1], -1, query.shape[3])
                _add_seen(of_key[row], block, torch.bmm(of_scores.transpose(1, 2), q))
                _add_seen(of_value[row], block, torch.bmm(weights.transpose(1, 2), of_sum))
        return of_query, of_key, of_value, None, None


def _grouped(rows: torch.Tensor, block: Block, groups: int) -> torch.Tensor:
    """A block's tokens of (H, T, D), the heads that share keys one below the other, (K, H / K x size, D)."""
    return rows[:, block.start : block.stop].reshape(groups, -1, rows.shape[2])


def _seen(rows: torch.Tensor, block: Block) -> torch.Tensor:
    """What a block sees of keys or values (K, T, D)."""
    own = rows[:, block.start : block.stop]
    return torch.cat([rows[:, block.first : block.first + block.shared], own], 1) if block.shared else own


def _add_seen(rows: torch.Tensor, block: Block, gradient: torch.Tensor) -> None:
    """Add a gradient of `_seen` to that of all keys or values."""
    rows[:, block.start : block.stop] += gradient[:, block.shared :]
    if block.shared:
        rows[:, block.first : block.first + block.shared] += gradient[:, : block.shared]


@lru_cache(maxsize=2)
def _triangle(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu(1)


def _future(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What hides later tokens (length, length), a corner of one matrix that is kept."""
    return _triangle(-(-length // 512) * 512, dtype, device)[:length, :length]


def _mask(**kwargs: Any) -> torch.Tensor | None:
    """The mask for a call of `block_attention`: none for rows that their positions describe."""
    whole = kwargs.get("attention_mask") is None and kwargs["q_length"] == kwargs["kv_length"]
    return None if whole else eager_mask(**kwargs)


def register() -> str:
    """Make it known to transformers; returns its name."""
    AttentionInterface.register(NAME, block_attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME
