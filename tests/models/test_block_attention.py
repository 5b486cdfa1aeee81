"""Attention block by block equals masked attention of the whole row

python -m pytest -q tests/models/test_block_attention.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from addressvlm.models import load_model
from addressvlm.models.block_attention import Block, block_attention, blocks_of, flex_attention_of, sees
from addressvlm.models.loading import enable_packing
from addressvlm.training.collator import Collator, Sample

ROUNDS = [("Which street is this?", "Mill Street"), ("Is it?", "Yes"), ("Where is it?", "Oak Avenue, Harbour")]


def noise(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


SAMPLES = [Sample(noise(0), ROUNDS), Sample(noise(1), ROUNDS[1:2]), Sample(noise(2), ROUNDS[::-1])]


@pytest.fixture
def loaded(base: Path) -> tuple[Any, Any]:
    return load_model(str(base))


def packing(model: Any) -> None:
    assert enable_packing(model, "on", torch.device("cpu"), "tiny")


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen_TT: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """Plain attention of one row with a mask of the whole row, (H, T, D) -> (T, H, D)."""
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = (0.3 * query @ key.transpose(1, 2)).masked_fill(~seen_TT, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1)


def test_blocks_follow_from_positions() -> None:
    conversations = torch.tensor([0, 1, 2, 0, 1, 0])
    assert blocks_of(conversations) == [Block(0, 3, 0, 0), Block(3, 5, 3, 0), Block(5, 6, 5, 0)]
    apart = torch.tensor([0, 1, 2, 3, 2, 3, 4, 0, 1, 2, 1])  # two tokens seen by both rounds, then one
    assert blocks_of(apart) == [Block(0, 4, 0, 0), Block(4, 7, 0, 2), Block(7, 10, 7, 0), Block(10, 11, 7, 1)]


def test_attention_by_blocks_is_that_of_a_mask_with_heads_that_share_keys() -> None:
    """Rows of the same length whose positions differ, in one batch and one call after the other."""
    rows = [torch.tensor([0, 1, 2, 3, 2, 3, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5])]
    own = [[0, 0, 1, 1, 2, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1, 1, 1, 1]]  # number of what a token belongs to
    shared = [{1: 0, 2: 0, 4: 3, 5: 3}, {}]  # and of what that sees beside itself
    masks = []
    for numbers, others in zip(own, shared, strict=True):
        sees = [[b in (a, others.get(a)) for b in numbers] for a in numbers]
        masks.append(torch.tensor(sees).tril())
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int) -> torch.Tensor:
        return torch.randn(2, heads, 9, 5, generator=generator, dtype=torch.float64).requires_grad_()

    query, key, value = drawn(4), drawn(2), drawn(2)
    expected = torch.stack([dense(q, k, v, seen) for q, k, v, seen in zip(query, key, value, masks, strict=True)])
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for chosen in (slice(0, 2), slice(0, 1), slice(1, 2)):
        inputs = query[chosen], key[chosen], value[chosen]
        result, _ = block_attention(None, *inputs, None, 0.3, position_ids=torch.stack(rows)[chosen])
        torch.testing.assert_close(result, expected[chosen])
        ours = torch.autograd.grad((result * weights[chosen]).sum(), (query, key, value))
        for one, other in zip(ours, gradients, strict=True):
            torch.testing.assert_close(one[chosen], other[chosen])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(1, 3), max_size=3)), min_size=1, max_size=4))
def test_flex_attention_sees_what_blocks_say(conversations: list[tuple[int, list[int]]]) -> None:
    """Conversations of a shared part and rounds that follow it, each by its length."""
    positions = [
        p for shared, rounds in conversations for p in [*range(shared), *(q for n in rounds for q in range(shared, shared + n))]
    ]
    row = torch.tensor(positions)
    expected = torch.zeros(len(row), len(row), dtype=torch.bool)
    for block in blocks_of(row):
        expected[block.start : block.stop, block.start : block.stop] = True
        expected[block.start : block.stop, block.first : block.first + block.shared] = True
    index = torch.arange(len(row))
    mask = sees(row[None])(torch.tensor(0), None, index[:, None], index[None])
    assert torch.equal(mask, expected.tril())


@pytest.mark.parametrize("heads", [4, 6])
def test_flex_attention_is_block_attention(heads: int) -> None:
    rows = torch.tensor([[0, 1, 2, 3, 2, 3, 0, 1, 1], [0, 1, 2, 0, 1, 2, 3, 4, 5]])
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 9, 8, generator=generator) for n in (heads, 2, 2))
    expected, _ = block_attention(None, query, key, value, None, 0.3, position_ids=rows)
    torch.testing.assert_close(flex_attention_of(query, key, value, rows, 0.3), expected, rtol=1e-5, atol=1e-5)


def test_no_token_sees_another_conversation(loaded: tuple) -> None:
    model, processor = loaded
    packing(model)
    collate = Collator(processor, packed=True)
    one, other = (collate([SAMPLES[0], last]) for last in (SAMPLES[1], SAMPLES[2]))
    first = len(collate.encode(SAMPLES[0]).ids)
    with torch.inference_mode():
        heard = [model(**{k: v for k, v in b.items() if k not in ("labels", "kinds")}).logits[:, :first] for b in (one, other)]
    torch.testing.assert_close(*heard, rtol=0, atol=0)
