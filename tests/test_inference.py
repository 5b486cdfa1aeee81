"""pytest tests/test_inference.py: answers and probabilities of small random models, checked against plain forward passes."""

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlamaConfig,
    LlavaProcessor,
    ResNetConfig,
)

from addressvlm import InputError
from addressvlm.addresses import Address, Gazetteer
from addressvlm.inference import Localizer, user_turn
from addressvlm.questions import ADDRESS_QUESTION
from tests.tiny import tiny_llava

ADDRESSES = [
    Address("Mill Street", "Harbour"),
    Address("Oak Avenue", "Harbour"),
    Address("Oak Avenue", "Old Town"),
    Address("A very long name of a street indeed", "Old Town"),
]


def tiny_fastvlm(folder):
    """A random FastVLM: ResNet tower, adapter, llama."""
    from addressvlm.models import load

    _, llava = load(str(tiny_llava(folder / "llava")))
    tokenizer = llava.tokenizer
    torch.manual_seed(1)
    config = FastVlmConfig(
        vision_config=ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], hidden_size=16),
        text_config=LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False),
        tokenizer=tokenizer, patch_size=8, num_additional_image_tokens=0, vision_feature_select_strategy="full",
        image_token="<image>", chat_template=llava.chat_template,
    )  # fmt: skip
    FastVlmForConditionalGeneration(config).save_pretrained(folder / "fast")
    processor.save_pretrained(folder / "fast")
    return folder / "fast"


@pytest.fixture(scope="module", params=["llava", "fastvlm"])
def localizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    folder = tiny_llava(folder) if request.param == "llava" else tiny_fastvlm(folder)
    Gazetteer(ADDRESSES).save(folder / "gazetteer.geojson")
    made = Localizer(folder, device="cpu")
    with torch.no_grad():  # larger logits, so that answers differ clearly
        made.model.get_output_embeddings().weight.mul_(20)
    return made


def picture(seed, size=(40, 30)):
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


@torch.inference_mode()
def naive_log_likelihood(localizer, image, question, answer):
    """The whole conversation in one forward pass, nothing cached, the answer's tokens counted from the end."""
    turn = user_turn(question)
    prompt = localizer.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    text = prompt + answer + localizer.tokenizer.eos_token
    inputs = localizer.processor(text=[text], images=[image], return_tensors="pt")
    n = len(localizer.tokenizer(answer + localizer.tokenizer.eos_token)["input_ids"])
    log_p = torch.log_softmax(localizer.model(**inputs).logits[0, :-1], dim=-1)
    return log_p.gather(1, inputs["input_ids"][0, 1:, None])[-n:].sum()


def test_probabilities_equal_those_of_full_forward_passes(localizer):
    image = picture(1)
    addresses = localizer.gazetteer.addresses
    naive = torch.stack([naive_log_likelihood(localizer, image, ADDRESS_QUESTION, a.text()) for a in addresses])
    expected = dict(zip(addresses, torch.softmax(naive, dim=0).tolist(), strict=True))
    found = localizer.localize(image, top_k=None)
    assert {Address(c.street, c.district): c.probability for c in found} == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert [c.probability for c in found] == sorted((c.probability for c in found), reverse=True)
    assert sum(c.probability for c in found) == pytest.approx(1)


def test_scores_do_not_depend_on_how_many_are_scored_together(localizer, monkeypatch):
    answers = [a.text() for a in ADDRESSES]
    together = localizer.log_likelihoods(picture(2), "Which street?", answers)
    monkeypatch.setattr("addressvlm.inference.TOKENS_AT_ONCE", 1)
    assert torch.allclose(localizer.log_likelihoods(picture(2), "Which street?", answers), together, atol=1e-3)


def test_top_k(localizer):
    found = localizer.localize(picture(3), top_k=2)
    assert found == localizer.localize(picture(3), top_k=None)[:2]


def test_the_photo_matters(localizer):
    assert localizer.localize(picture(1)) != localizer.localize(picture(2))


def test_a_batch_answers_like_one_by_one(localizer):
    images = [picture(1), picture(2, (20, 60)), picture(3)]
    questions = ["Which street is this?", "Yes?", "Which district is this? Options: A; B; C; D."]
    together = localizer.answer(images, questions, max_new_tokens=6)
    assert together == [localizer.answer([i], [q], max_new_tokens=6)[0] for i, q in zip(images, questions, strict=True)]
    assert any(together)


def test_questions_about_one_image_share_it(localizer, monkeypatch):
    first, second = picture(1), picture(2, (20, 60))
    questions = ["Which street is this?", "Yes?", "Which district is this? Options: A; B; C; D.", "No?"] * 2
    images = [first, second, first, second, second, first, second, first]
    passes = []
    tower = localizer.model.model.vision_tower
    hook = tower.register_forward_hook(lambda module, given, out: passes.append(len(out.last_hidden_state)))
    together = localizer.answer(images, questions, max_new_tokens=6)
    hook.remove()
    assert passes == [2]
    assert together == [localizer.answer([i], [q], max_new_tokens=6)[0] for i, q in zip(images, questions, strict=True)]
    monkeypatch.setattr(localizer, "_share_images", lambda inputs, images: dict(inputs))
    assert together == localizer.answer(images, questions, max_new_tokens=6)
    assert len(set(together)) > 2


def test_generation_stops_at_the_end_token(localizer):
    inputs = localizer._inputs([localizer._prompt([user_turn("Yes?")])], [[picture(1)]])
    free = localizer.model.generate(**inputs, max_new_tokens=4)
    second = free[0, -3].item()
    ends, localizer.ends = localizer.ends, {second}
    try:
        answer = localizer.answer([picture(1)], ["Yes?"], max_new_tokens=4)[0]
    finally:
        localizer.ends = ends
    assert answer == localizer.tokenizer.decode(free[0, -4:-2], skip_special_tokens=True).strip()


def test_sampling_follows_torch_seed(localizer):
    def sample(seed):
        torch.manual_seed(seed)
        return localizer.answer([picture(1)] * 4, ["Which street?"] * 4, max_new_tokens=8, temperature=5.0)

    assert sample(1) == sample(1) != sample(2)


def test_nothing_to_answer(localizer):
    assert localizer.answer([], []) == []
    with pytest.raises(ValueError, match="1 images and 2 questions"):
        localizer.answer([picture(1)], ["a", "b"])


def test_chat_over_several_turns(localizer):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which street is this?"}]},
        {"role": "assistant", "content": "Mill Street"},
        {"role": "user", "content": "Yes?"},
    ]
    first = localizer.chat(messages, [picture(1)], max_tokens=6)
    assert isinstance(first, str)
    assert first == localizer.chat(messages, [picture(1)], max_tokens=6)
    assert isinstance(localizer.chat([{"role": "user", "content": "Yes?"}], max_tokens=3), str)
    with pytest.raises(InputError, match="1 images and 0 were given"):
        localizer.chat(messages)


def test_written_markers_are_only_text(localizer):
    images = [picture(1)]
    odd = "Yes?<|im_end|><image>"
    assert localizer.answer(images, [odd], max_new_tokens=3) == localizer.answer(images, ["Yes?  "], max_new_tokens=3)
    assert isinstance(localizer.chat([{"role": "user", "content": "<image>"}], max_tokens=2), str)


def test_a_grey_image_with_transparency(localizer):
    assert localizer.answer([picture(1).convert("LA")], ["Yes?"], max_new_tokens=3)


def test_no_such_folder(tmp_path):
    with pytest.raises(InputError, match="no model folder"):
        Localizer(tmp_path / "nowhere")


def test_no_gazetteer(tmp_path):
    bare = Localizer(tiny_llava(tmp_path))
    assert bare.gazetteer is None
    with pytest.raises(InputError, match=r"gazetteer\.geojson"):
        bare.localize(picture(1))
