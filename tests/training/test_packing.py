"""Rows without padding, block by block attention and LoRA in one step: the same loss and gradients as the plain ways.

python -m pytest -q tests/training/test_packing.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners import lora
from PIL import Image

from addressvlm import InputError
from addressvlm.config.train import ModelConfig, PartConfig
from addressvlm.models import load_model
from addressvlm.models import lora as lora_module
from addressvlm.models.block_attention import Block, block_attention, blocks_of
from addressvlm.models.loading import autocast, enable_packing
from addressvlm.models.lora import attach_lora, set_trainable_parts, trainable_params
from addressvlm.training.collator import Collator, Sample, SkipSampleError
from addressvlm.training.loss import answer_loss
from tests.support.tiny import tiny_llava

ROUNDS = [("Which street is this?", "Mill Street"), ("Is it?", "Yes"), ("Where is it?", "Oak Avenue, Harbour")]


def noise(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


SAMPLES = [Sample(noise(0), ROUNDS), Sample(noise(1), ROUNDS[1:2]), Sample(noise(2), ROUNDS[::-1])]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def loaded(base: Path) -> tuple[Any, Any]:
    return load_model(str(base))


def packing(model: Any) -> None:
    assert enable_packing(model, "on", torch.device("cpu"), "tiny")


def test_blocks_follow_from_positions() -> None:
    conversations = torch.tensor([0, 1, 2, 0, 1, 0])
    assert blocks_of(conversations) == [Block(0, 3, 0, 0), Block(3, 5, 3, 0), Block(5, 6, 5, 0)]
    apart = torch.tensor([0, 1, 2, 3, 2, 3, 4, 0, 1, 2, 1])  # two tokens seen by both rounds, then one
    assert blocks_of(apart) == [Block(0, 4, 0, 0), Block(4, 7, 0, 2), Block(7, 10, 7, 0), Block(10, 11, 7, 1)]


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen_TT: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """Plain attention of one row with a mask of the whole row, (H, T, D) -> (T, H, D)."""
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = (0.3 * query @ key.transpose(1, 2)).masked_fill(~seen_TT, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1)


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
        found, _ = block_attention(None, *inputs, None, 0.3, position_ids=torch.stack(rows)[chosen])
        torch.testing.assert_close(found, expected[chosen])
        ours = torch.autograd.grad((found * weights[chosen]).sum(), (query, key, value))
        for one, other in zip(ours, gradients, strict=True):
            torch.testing.assert_close(one[chosen], other[chosen])


@pytest.mark.parametrize("apart", [False, True])
def test_a_packed_row_has_the_loss_of_its_parts(loaded: tuple, apart: bool) -> None:
    model, processor = loaded
    alone = [answer_loss(model, Collator(processor, apart)([sample])) for sample in SAMPLES]
    packing(model)
    collate = Collator(processor, apart, packed=True)
    batch = collate(SAMPLES)
    assert batch["input_ids"].shape[0] == 1
    assert "attention_mask" not in batch
    whole, count = answer_loss(model, batch)
    assert count == sum(n for _, n in alone)
    torch.testing.assert_close(whole, sum(loss for loss, _ in alone), rtol=1e-6, atol=1e-6)
    turned, _ = answer_loss(model, collate(SAMPLES[::-1]))
    torch.testing.assert_close(whole, turned, rtol=1e-6, atol=1e-6)


def test_no_token_sees_another_conversation(loaded: tuple) -> None:
    model, processor = loaded
    packing(model)
    collate = Collator(processor, packed=True)
    one, other = (collate([SAMPLES[0], last]) for last in (SAMPLES[1], SAMPLES[2]))
    first = len(collate.encode(SAMPLES[0]).ids)
    with torch.inference_mode():
        heard = [model(**{k: v for k, v in b.items() if k not in ("labels", "kinds")}).logits[:, :first] for b in (one, other)]
    torch.testing.assert_close(*heard, rtol=0, atol=0)


def tuned(base: Path, dropout: float, packed: bool) -> tuple[Any, Any]:
    """A model with an adapter that says something, and its processor."""
    model, processor = load_model(str(base))
    if packed:
        packing(model)
    torch.manual_seed(5)
    settings = ModelConfig(vision=PartConfig(rank=2), llm=PartConfig(rank=3), lora_dropout=dropout)
    adapted, parts = attach_lora(model, settings)
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.1)
    set_trainable_parts(adapted, parts, ["vision", "adapter", "llm"])
    return adapted.train(), processor


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("apart", [False, True])
def test_gradients_are_those_of_the_plain_ways(
    base: Path, apart: bool, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(packed: bool) -> dict[str, torch.Tensor]:
        model, processor = tuned(base, dropout, packed)
        batch = Collator(processor, apart, packed)(SAMPLES)
        doubled = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        loss, _ = answer_loss(model.double(), doubled)
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in trainable_params(model).items() if p.grad is not None}}

    ours = gradients(packed=not dropout)  # masks differ with the shape of a batch, so with dropout both are padded
    monkeypatch.setattr(lora_module.FusedLoraLinear, "forward", lora.Linear.forward)
    plain = gradients(packed=False)
    assert ours.keys() == plain.keys()
    for name in plain:  # norms and softmax are float32 even so
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=2e-5 * float(plain[name].abs().max()))


def test_bfloat16_products_keep_the_loss(base: Path) -> None:
    model, processor = tuned(base, 0.0, packed=True)
    batch = Collator(processor, isolate_questions=True, packed=True)(SAMPLES)
    exact, _ = answer_loss(model, batch)
    with autocast(torch.device("cpu"), torch.float32, "bfloat16"):
        rough, _ = answer_loss(model, batch)
    rough.backward()
    assert float(rough) == pytest.approx(float(exact), rel=0.05)
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in trainable_params(model).values()
        if p.grad is not None
    )


def test_a_model_with_another_attention_is_not_packed(loaded: tuple) -> None:
    model, _ = loaded
    assert not enable_packing(model, "off", torch.device("cpu"), "tiny")
    assert not enable_packing(model, "auto", torch.device("cuda"), "tiny")
    model.config.get_text_config().sliding_window = 16
    assert not enable_packing(model, "auto", torch.device("cpu"), "tiny")
    with pytest.raises(InputError, match=r"train.packing is on, which the attention of tiny \(llama\) does not allow"):
        enable_packing(model, "on", torch.device("cpu"), "tiny")


def test_a_row_longer_than_the_context_is_set_aside_whole(loaded: tuple) -> None:
    processor = loaded[1]
    length = len(Collator(processor).encode(SAMPLES[0]).ids)
    Collator(processor, context=length).encode(SAMPLES[0])
    with pytest.raises(SkipSampleError, match=f"{length} tokens are more than the model's context of {length - 1}"):
        Collator(processor, context=length - 1).encode(SAMPLES[0])
    Collator(processor, isolate_questions=True, context=length - 1).encode(SAMPLES[0])  # positions of rounds apart are fewer
