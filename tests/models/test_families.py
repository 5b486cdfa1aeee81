"""Training on families other than LLaVA: a step runs, the loss falls, and what is saved, merged and loaded answers alike.

python -m pytest -q tests/models/test_families.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from addressvlm import InputError
from addressvlm.config.train import ModelConfig, PartConfig, StageConfig
from addressvlm.models.families import (
    check_image_token,
    has_1d_positions,
    part_of,
    part_of_any_family,
    rope_positions,
)
from addressvlm.models.loading import enable_packing
from addressvlm.models.lora import attach_lora, set_trainable_parts, trainable_params
from addressvlm.training.collator import Collator, Sample, messages, sample_from_row
from addressvlm.training.dataset import Schedule
from addressvlm.training.loss import answer_loss
from addressvlm.training.stages import Stage
from addressvlm.training.trainer import AdaptedModel
from tests.support.families import picture
from tests.support.tiny_families import FAMILIES
from tests.support.training_tables import ListTable, table_rows, train_stage

SETTINGS = ModelConfig(vision=PartConfig(rank=2, alpha=4), llm=PartConfig(rank=4, alpha=8), lora_dropout=0.0)


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**{k: v for k, v in batch.items() if k not in ("labels", "kinds")}).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_and_is_saved_merged_and_loaded_exactly(family: str, tmp_path: Path) -> None:
    base, processor = FAMILIES[family]()
    base.get_output_embeddings().weight.data.mul_(20)  # LoRA leaves the head as it is, so it must be able to say something
    base.save_pretrained(tmp_path / "base")
    packed = enable_packing(base, "auto", torch.device("cpu"), family)
    assert packed
    model, parts = attach_lora(base, SETTINGS)
    settings = StageConfig(data="photos", batch_size=3, learning_rate=0.02)
    table = ListTable(table_rows(6))
    stage = Stage("s", settings, Schedule(table, 3, 0), 6, 0)
    losses = [metrics.loss for metrics in train_stage(AdaptedModel(model, parts, processor, packed), stage)]
    assert losses[-1] < 0.97 * losses[0]
    model.eval()
    batch = Collator(processor)([sample_from_row(table[0])])
    tuned = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", attn_implementation="eager")
    loaded = PeftModel.from_pretrained(again, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(loaded, batch), tuned, rtol=1e-5, atol=1e-5)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    torch.testing.assert_close(logits(merged, batch), tuned, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(merged, batch).argmax(-1), tuned.argmax(-1))
    prompt = processor.apply_chat_template(
        messages([("Which street is this?", "")]), add_generation_prompt=True, tokenize=False
    )
    question = processor(text=[prompt], images=[sample_from_row(table[0]).image], return_tensors="pt")
    answers = [m.generate(**question, max_new_tokens=4, do_sample=False).tolist() for m in (model, merged)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_part_of_a_family_can_learn_alone(family: str) -> None:
    base, processor = FAMILIES[family]()
    model, parts = attach_lora(base, SETTINGS)
    batch = Collator(processor)([sample_from_row(row) for row in table_rows(2)])
    for part in parts:
        set_trainable_parts(model, parts, [part])
        answer_loss(model, batch)[0].backward()
        learnt = [name for name, weights in trainable_params(model).items() if weights.grad is not None]
        assert {part_of(name.replace(".modules_to_save.default", ""), parts) for name in learnt} == {part}
        assert {part_of_any_family(name) for name in learnt} == {part}
        model.zero_grad()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_family_have_the_loss_of_each_alone(family: str, apart: bool, packed: bool) -> None:
    """Alone: as transformers lays them out, positions and all."""
    model, processor = FAMILIES[family]()
    rounds = [("Which street is this?", "Mill Street"), ("Is it?", "Yes"), ("Where is it?", "Oak Avenue, Harbour")]
    samples = [Sample(picture(0, (40, 30)), rounds), Sample(picture(1, (32, 64)), rounds[:2])]
    single = [Sample(s.image, [one]) for s in samples for one in s.rounds] if apart else samples
    alone = [answer_loss(model, Collator(processor)([sample])) for sample in single]
    if packed:
        assert enable_packing(model, "on", torch.device("cpu"), family)
    collator = Collator(processor, apart, packed, use_bytes=True)
    together, count = answer_loss(model, collator.finish(collator(samples)))
    assert count == sum(n for _, n in alone)
    torch.testing.assert_close(together, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_moved_as_bytes_are_those_of_the_processor(family: str) -> None:
    processor = FAMILIES[family]()[1]
    samples = [Sample(picture(seed, size), [("Is it?", "Yes")]) for seed, size in enumerate([(40, 30), (64, 32), (23, 70)])]
    plain, small = Collator(processor), Collator(processor, use_bytes=True)
    for sample in samples:
        moved = small([sample])
        assert moved["pixel_values"].dtype == torch.uint8
        assert torch.equal(small.finish(moved)["pixel_values"], plain([sample])["pixel_values"])


def test_positions_by_rows_and_columns_are_those_of_transformers() -> None:
    types = [0] * 3 + [1] * 6 + [0] * 2 + [1] * 4 + [0] * 5
    grids = [[1, 4, 6], [1, 4, 4]]
    for family in ("qwen2.5-vl", "qwen3-vl"):
        model = FAMILIES[family]()[0]
        ids, kinds = torch.zeros(1, len(types), dtype=torch.long), torch.tensor([types], dtype=torch.int)
        expected, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=torch.tensor(grids))
        assert rope_positions(types, grids, 2) == expected[:, 0].tolist()


def test_a_processor_that_writes_another_image_token_is_an_error() -> None:
    model, processor = FAMILIES["smolvlm"]()
    check_image_token(model, processor, "smol")
    model.config.image_token_id = 7
    with pytest.raises(InputError, match=r"processor of smol writes images as token \d+ \(<image>\), the model reads"):
        check_image_token(model, processor, "smol")


@pytest.mark.parametrize("packed", [False, True])
def test_photos_of_other_proportions_share_a_batch(packed: bool) -> None:
    model, processor = FAMILIES["smolvlm"]()
    processor.image_processor.do_image_splitting, processor.image_processor.size = True, {"longest_edge": 64}
    rounds = [("Which street is this?", "Mill Street")]
    rows = [Sample(picture(seed, size), rounds) for seed, size in enumerate([(64, 64), (64, 32), (24, 64)])]
    alone = [answer_loss(model, Collator(processor)([row])) for row in rows]
    if packed:
        assert enable_packing(model, "on", torch.device("cpu"), "smolvlm")
    together, count = answer_loss(model, Collator(processor, packed=packed)(rows))
    assert count == sum(n for _, n in alone)
    torch.testing.assert_close(together, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-5)


def test_positions_by_row_and_column_are_told_apart() -> None:
    assert {name: has_1d_positions(make()[0]) for name, make in FAMILIES.items()} == {
        "qwen2.5-vl": False, "qwen3-vl": False, "smolvlm": True, "smolvlm2": True, "internvl": True, "llava-onevision": True,
    }  # fmt: skip
