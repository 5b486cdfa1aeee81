"""Prompts as tensors, the head in float32, adapters mixed in a batch: tiny models of several families."""

import pytest
import torch

from addressvlm.answers.chat_model import ChatModel, user_turn
from addressvlm.config.train import ModelConfig, PartConfig
from addressvlm.models.loading import load_model
from addressvlm.models.lora import attach_lora
from tests.support.families import picture
from tests.support.tiny import tiny_llava
from tests.support.tiny_families import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prepared_prompt_has_the_tokens_that_the_processor_makes(family, tmp_path):
    chat = ChatModel(tmp_path, device="cpu", loaded=FAMILIES[family]())
    for size in ((40, 30), (120, 40), (40, 200)):
        for question in ("Which street is this?", "", "<image> Yes?\n"):
            prompt = chat.prompt([user_turn(question)])
            expected = chat.inputs([prompt], [[picture(1, size)]])
            prepared = chat.prepare(prompt, [picture(1, size)])
            assert prepared.rest
            assert len(prepared) == expected["input_ids"].shape[1]
            whole = prepared.whole()
            assert whole.keys() == expected.keys()
            assert all(torch.equal(whole[key], expected[key]) for key in whole)


def test_the_logits_of_a_bfloat16_model_are_not_rounded(tmp_path):
    folder = tiny_llava(tmp_path)
    chat = ChatModel(folder, device="cpu", dtype="bfloat16")
    inputs = chat.inputs([chat.prompt([user_turn("Which street?")])], [[picture(1)]])
    with torch.inference_mode():
        logits, (hidden, _) = chat.prefill(inputs).logits, chat.body(**inputs)
        weight = chat.model.get_output_embeddings().weight
        assert (chat.model.dtype, hidden.dtype, weight.dtype) == (torch.bfloat16,) * 3
        exact = hidden[:, -1].double() @ weight.double().T
        assert logits.dtype == torch.float32
        assert (logits.double() - exact).abs().max() < 1e-4
        assert (logits - logits.bfloat16()).abs().max() > 1e-3
        assert torch.equal(chat.head(hidden[:, -1]), logits)


@pytest.mark.parametrize(("family", "mixes"), [("llava", True), ("qwen2.5-vl", False)])
def test_adapters_are_mixed_where_every_layer_sees_a_row_a_prompt(family, mixes, tmp_path):
    base, processor = load_model(str(tiny_llava(tmp_path))) if family == "llava" else FAMILIES[family]()
    model, _ = attach_lora(base, ModelConfig(vision=PartConfig(rank=2), adapter=PartConfig(full=True), llm=PartConfig(rank=2)))
    chat = ChatModel(tmp_path, device="cpu", loaded=(base, processor), adapters=model.eval(), adapter="default")
    one, two = (chat.prepare(chat.prompt([turn]), photos).whole() for turn, photos in (
        (user_turn("?"), [picture(1)]), ({"role": "user", "content": [{"type": "image"}] * 2}, [picture(1), picture(2)])
    ))  # fmt: skip
    assert chat.can_mix(one) is mixes
    assert not chat.can_mix(two)


def test_ends_of_answers_are_those_of_the_tokenizer_and_of_generation(tmp_path):
    loaded = load_model(str(tiny_llava(tmp_path)))
    model, tokenizer = loaded[0], loaded[1].tokenizer
    own = tokenizer.eos_token_id
    for setting, ends in ((7, {own, 7}), ([7, 8], {own, 7, 8}), (None, {own}), (own, {own})):
        model.generation_config.eos_token_id = setting
        assert ChatModel(tmp_path, device="cpu", loaded=loaded).end_tokens == ends
    tokenizer.pad_token = None
    chat = ChatModel(tmp_path, device="cpu", loaded=loaded)
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (own, "left")
    assert chat.decode([*tokenizer("Mill Street")["input_ids"], own]) == "Mill Street"


def test_a_prompt_takes_the_photo_of_another_one_only_if_both_begin_alike(tmp_path):
    chat = ChatModel(tiny_llava(tmp_path), device="cpu")
    photo, before = picture(1), [{"role": "user", "content": [{"type": "text", "text": "Hello."}]}]
    first = chat.prepare(chat.prompt([user_turn("Which street?")]), [photo])
    for turns, same in (([user_turn("And this?")], True), ([*before, user_turn("And this?")], False)):
        alone, other = (chat.prepare(chat.prompt(turns), [photo], known) for known in (None, first))
        assert (other.inputs is first.inputs) is same
        assert all(torch.equal(alone.whole()[key], other.whole()[key]) for key in alone.whole())
        assert other.photo == first.photo
    both = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]}
    assert chat.prepare(chat.prompt([both]), [photo, picture(2)]).photo == b""
