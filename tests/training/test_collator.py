"""Conversations as token batches: labels on the answers only, no turn ever cut

python -m pytest -q tests/training/test_collator.py
"""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from addressvlm.config.train import AugmentConfig
from addressvlm.models import load_model
from addressvlm.models.loading import enable_packing
from addressvlm.training import collator as collator_module
from addressvlm.training.collator import IGNORE_INDEX, KINDS, Collator, Sample, SkipSampleError
from addressvlm.training.loss import answer_loss, answer_weights
from addressvlm.training.pixels import PixelEncoder, as_bytes, decode, decoded_size


def sample(*rounds: tuple[str, str]) -> Sample:
    return Sample(Image.new("RGB", (40, 30), "red"), list(rounds))


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


def test_loss_is_on_the_answers_and_their_end_only(loaded: tuple) -> None:
    batch = Collator(loaded[1])([sample(("Which street is this?", "Mill Street"), ("Is it?", "Yes"))])
    learned = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX]
    assert loaded[1].tokenizer.decode(learned) == "Mill Street<|end|>Yes<|end|>"


@pytest.mark.parametrize("apart", [False, True])
def test_tokens_count_for_the_kind_of_their_own_question(loaded: tuple, apart: bool) -> None:
    kinds = ("choice", "judgment", "of another kind")
    row = Collator(loaded[1], isolate_questions=apart).encode(Sample(noise(0), ROUNDS, kinds))
    of_answers = {(number, kind) for number, kind, label in zip(row.rounds, row.kinds, row.labels, strict=True) if label >= 0}
    assert of_answers == {(1, KINDS.index("choice")), (2, KINDS.index("judgment")), (3, len(KINDS))}


def test_tokens_are_those_of_the_whole_text(loaded: tuple) -> None:
    processor = loaded[1]
    rounds = [("Which street is this?", "Mill Street"), ("Is it?", "Yes")]
    batch = Collator(processor)([sample(*rounds), sample(rounds[0])])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    message = "<|user|>Which street is this?<|end|><|assistant|>Mill Street<|end|><|user|>Is it?<|end|><|assistant|>Yes<|end|>"
    assert text.replace("<image>", "") == message
    assert text.count("<image>") == 16  # (32 / 8)^2: none is ever cut
    assert batch["attention_mask"][1].sum() < batch["attention_mask"][0].sum()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_isolated_questions_have_the_loss_of_rows_of_their_own(base: Path, attention: str) -> None:
    model, processor = load_model(str(base))
    model.set_attn_implementation(attention)
    rounds = [("Which street is this?", "Mill Street"), ("Is it?", "Yes"), ("Where is it?", "Oak Avenue, Harbour")]
    shared, count = answer_loss(model, Collator(processor, isolate_questions=True)([sample(*rounds), sample(rounds[1])]))
    alone = [answer_loss(model, Collator(processor)([sample(r)])) for r in [*rounds, rounds[1]]]
    assert count == sum(n for _, n in alone)
    torch.testing.assert_close(shared, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("own", ["<image>", "<|end|>", "<|user|>"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_text_that_holds_one_of_the_model_s_own_tokens_is_rejected(loaded: tuple, own: str, place: int) -> None:
    texts = ["Which street is this?", "Mill Street"]
    texts[place] += f" {own} Lane"
    with pytest.raises(SkipSampleError, match=rf"holds {re.escape(own)}, which is one of the model's own tokens"):
        Collator(loaded[1]).encode(sample(("Is it?", "Yes"), (texts[0], texts[1])))


@pytest.mark.parametrize("apart", [False, True])
@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_turns_are_those_of_the_chat_template(base: Path, apart: bool, rounds: list[tuple[str, str]]) -> None:
    collator = COLLATORS.setdefault(apart, Collator(load_model(str(base))[1], apart))
    assert collator._turns(rounds, 1) == collator._rendered_turns(rounds, 1)


COLLATORS: dict[bool, Collator] = {}


@pytest.mark.parametrize("apart", [False, True])
def test_a_template_that_trims_texts_is_not_outdone(loaded: tuple, apart: bool) -> None:
    processor = loaded[1]
    processor.chat_template = processor.chat_template.replace("c['text']", "c['text'] | trim")
    collator = Collator(processor, apart)
    rounds = [(" Which street is this? ", "Mill Street"), ("Is it?", "Yes ")]
    assert collator._turns(rounds, 1) == collator._rendered_turns(rounds, 1)


def test_the_template_is_rendered_once_and_a_text_tokenized_once(loaded: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    collator = Collator(loaded[1], isolate_questions=True)
    expected = collator.encode(SAMPLES[0])
    monkeypatch.setattr(type(loaded[1]), "apply_chat_template", None)
    monkeypatch.setattr(type(loaded[1].tokenizer), "__call__", None)
    again = collator.encode(SAMPLES[0])
    assert (again.ids, again.labels, again.positions) == (expected.ids, expected.labels, expected.positions)


def test_a_jpeg_is_decoded_at_the_scale_that_is_needed() -> None:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((1000, 640)).convert("RGB").save(file, "JPEG")
    sizes = [decode(file.getvalue(), size).size for size in (None, (600, 300), (336, 336), (320, 320), (100, 100))]
    assert sizes == [(1000, 640), (1000, 640), (1000, 640), (500, 320), (250, 160)]
    small = Image.open(io.BytesIO(file.getvalue())).resize((100, 64))
    assert abs(np.asarray(decode(file.getvalue(), (100, 64)).resize((100, 64))).astype(int) - np.asarray(small)).max() < 8


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
def test_photos_are_resized_as_the_processor_does(loaded: tuple, resample: int) -> None:
    loaded[1].image_processor.resample = resample
    photo = Image.effect_noise((300, 200), 60).convert("RGB").filter(ImageFilter.GaussianBlur(2))
    ours = np.asarray(PixelEncoder(loaded[1].image_processor).prepare(photo)).astype(int)
    assert np.abs(ours - np.asarray(photo.resize((32, 32), resample))).max() <= 2


def test_a_photo_of_which_a_crop_is_shown_is_decoded_larger(loaded: tuple) -> None:
    images = loaded[1].image_processor
    assert decoded_size(images, AugmentConfig()) == (32, 32)
    assert decoded_size(images, AugmentConfig(crop=0.5)) == (86, 86)
    for size, expected in (
        ({"longest_edge": 64}, None),
        ({"shortest_edge": 24}, (24, 24)),
        ({"height": 20, "width": 30}, (30, 20)),
        ({"shortest_edge": 24, "longest_edge": 64}, None),
        ({"max_pixels": 4096}, None),
    ):
        images.size = size
        assert decoded_size(images, AugmentConfig()) == expected
    images.size, images.do_resize = {"height": 20, "width": 30}, False
    assert decoded_size(images, AugmentConfig()) is None


def test_photos_are_resized_to_the_height_and_width_of_the_processor(loaded: tuple) -> None:
    images = loaded[1].image_processor
    images.size = {"height": 20, "width": 30}
    photo = Image.new("RGB", (300, 200), "red")
    photo.paste("blue", (0, 0, 300, 100))
    made = PixelEncoder(images).prepare(photo)
    assert (made.size, made.getpixel((15, 3)), made.getpixel((15, 17))) == ((30, 20), (0, 0, 255), (255, 0, 0))
    images.do_center_crop = True
    assert PixelEncoder(images).prepare(photo).size == (300, 200)  # left to the processor


def test_pixels_that_are_no_bytes_stay_what_they_are() -> None:
    whole = torch.tensor([0.0, 7.0, 255.0])
    assert as_bytes(whole).tolist() == [0, 7, 255]
    assert as_bytes(whole).dtype == torch.uint8
    for other in (torch.tensor([0.5]), torch.tensor([256.0]), torch.tensor([-1.0])):
        assert as_bytes(other) is other


def test_a_full_memory_of_texts_changes_no_tokens(loaded: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collator_module, "CACHED_TEXTS", 3)
    small = Collator(loaded[1], isolate_questions=True)
    samples = [*SAMPLES, *(sample((f"Is it {n}?", "Yes"), ("Where is it?", f"Oak Avenue {n}")) for n in range(4)), *SAMPLES]
    for one in samples:
        made, fresh = small.encode(one), Collator(loaded[1], isolate_questions=True).encode(one)
        assert (made.ids, made.labels, made.positions, made.rounds) == (fresh.ids, fresh.labels, fresh.positions, fresh.rounds)


def test_a_row_longer_than_the_context_is_skipped(loaded: tuple) -> None:
    processor = loaded[1]
    length = len(Collator(processor).encode(SAMPLES[0]).ids)
    Collator(processor, context=length).encode(SAMPLES[0])
    with pytest.raises(SkipSampleError, match=f"{length} tokens are more than the model's context of {length - 1}"):
        Collator(processor, context=length - 1).encode(SAMPLES[0])
    Collator(processor, isolate_questions=True, context=length - 1).encode(SAMPLES[0])  # positions of rounds apart are fewer


def test_loss_equals_that_of_the_rows_alone(loaded: tuple) -> None:
    model, processor = loaded
    collate = Collator(processor)
    samples = [sample(("Which street is this?", "Mill Street")), sample(("Is it?", "Yes"), ("Which?", "Oak Avenue"))]
    together, count = answer_loss(model, collate(samples))
    alone = [answer_loss(model, collate([s])) for s in samples]
    assert count == sum(n for _, n in alone)
    torch.testing.assert_close(together, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-5)


def test_loss_equals_that_of_transformers(loaded: tuple) -> None:
    model, processor = loaded
    batch = Collator(processor)([sample(("Which street is this?", "Mill Street"))])
    total, count = answer_loss(model, batch)
    torch.testing.assert_close(total / count, model(**batch).loss, rtol=1e-5, atol=1e-5)


def test_a_round_weighs_the_same_however_long_its_answer_is() -> None:
    """Two rows: answers of one and three tokens, then of two; the first label is of no prediction."""
    _ = IGNORE_INDEX
    labels = torch.tensor([[_, 7, _, _, 5, 6, 7], [_, _, 4, 4, _, _, _]])
    assert answer_weights(labels, "token").tolist() == [1.0] * 6
    assert answer_weights(labels, "round").tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2])
    ends = torch.tensor([[_, 3, 3], [_, 9, _]])  # an answer at the end of a row is not one with that at the start of the next
    assert answer_weights(ends, "round").tolist() == pytest.approx([1 / 2, 1 / 2, 1])
