"""LoRA: ranks, alphas and dropout by part, the fused layer

python -m pytest -q tests/models/test_lora.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners import lora
from PIL import Image

from addressvlm.config.train import ModelConfig, PartConfig
from addressvlm.models import load_model
from addressvlm.models import lora as lora_module
from addressvlm.models.families import part_of
from addressvlm.models.loading import autocast, enable_packing
from addressvlm.models.lora import adapter_state, adapter_weights, attach_lora, set_trainable_parts, trainable_params
from addressvlm.training.collator import Collator, Sample
from addressvlm.training.loss import answer_loss

WORDS = {"vision": "vision_tower", "adapter": "multi_modal_projector", "llm": "language_model"}


ROUNDS = [("Which street is this?", "Mill Street"), ("Is it?", "Yes"), ("Where is it?", "Oak Avenue, Harbour")]


def noise(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


SAMPLES = [Sample(noise(0), ROUNDS), Sample(noise(1), ROUNDS[1:2]), Sample(noise(2), ROUNDS[::-1])]


def packing(model: Any) -> None:
    assert enable_packing(model, "on", torch.device("cpu"), "tiny")


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


@pytest.mark.parametrize("chosen", [["vision"], ["adapter"], ["llm"], ["vision", "adapter", "llm"]])
def test_only_the_chosen_parts_learn(base: Path, chosen: list) -> None:
    model, parts = attach_lora(load_model(str(base))[0], ModelConfig(vision=PartConfig(rank=2), llm=PartConfig(rank=3)))
    set_trainable_parts(model, parts, chosen)
    names = trainable_params(model)
    assert names
    assert {part_of(n.replace(".modules_to_save.default", ""), parts) for n in names} == set(chosen)
    ranks = {p.shape[0] for n, p in adapter_state(model).items() if "lora_A" in n and "vision_tower" in n}
    assert ranks == {2}


def test_parts_have_their_own_dropout(base: Path) -> None:
    settings = ModelConfig(vision=PartConfig(rank=2, dropout=0.0), llm=PartConfig(rank=2, dropout=0.4), lora_dropout=0.1)
    model, _ = attach_lora(load_model(str(base))[0], settings)
    result = {
        part: {
            getattr(m.lora_dropout["default"], "p", 0.0) for n, m in model.named_modules() if hasattr(m, "lora_A") and part in n
        }
        for part in ("vision_tower", "language_model")
    }
    assert result == {"vision_tower": {0.0}, "language_model": {0.4}}


def test_an_adapter_scales_by_alpha_over_rank_of_its_own_part(base: Path) -> None:
    settings = ModelConfig(
        vision=PartConfig(rank=2, alpha=6), adapter=PartConfig(rank=5, alpha=5), llm=PartConfig(rank=8, alpha=4)
    )
    model, parts = attach_lora(load_model(str(base), "bfloat16")[0], settings)
    assert {weights.dtype for _, weights in adapter_weights(model)} == {torch.float32}  # small updates vanish in bfloat16
    result: dict[str, set[tuple[int, float]]] = {part: set() for part in parts}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            part = next(part for part, word in WORDS.items() if word in name)
            result[part].add((module.lora_A["default"].weight.shape[0], module.scaling["default"]))
    assert result == {"vision": {(2, 3.0)}, "adapter": {(5, 1.0)}, "llm": {(8, 0.5)}}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("apart", [False, True])
def test_gradients_of_packed_rows_and_fused_lora_are_those_of_padding_and_peft(
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
