"""Answers and probabilities of small random models, checked against plain forward passes."""

import shutil

import pytest
import torch

from addressvlm import InputError
from addressvlm.answers.calibration import Calibration
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.inference import Localizer, Prior, Sampling, user_turn
from addressvlm.questions import ADDRESS_QUESTION
from tests.support.families import localizer_of, log_likelihoods, naive_log_likelihood, picture
from tests.support.tiny import tiny_llava

ADDRESSES = [
    Address("Mill Street", "Harbour"),
    Address("Oak Avenue", "Harbour"),
    Address("Oak Avenue", "Old Town"),
    Address("A very long name of a street indeed", "Old Town"),
]


@pytest.fixture(scope="module", params=["llava", "fastvlm"])
def localizer(request, tmp_path_factory):
    return localizer_of(request.param, tmp_path_factory.mktemp("model"), Gazetteer(ADDRESSES))


def test_probabilities_equal_those_of_full_forward_passes(localizer):
    image = picture(1)
    addresses = localizer.gazetteer.addresses
    sequences = [localizer.answer_tokens([user_turn(ADDRESS_QUESTION)], a.text()) for a in addresses]
    firsts = [
        next(n for n in range(1, len(one) + 1) if not any(other[:n] == one[:n] for other in sequences if other is not one))
        for one in sequences
    ]
    naive = torch.stack(
        [
            naive_log_likelihood(localizer, image, ADDRESS_QUESTION, address.text(), first)
            for address, first in zip(addresses, firsts, strict=True)
        ]
    )
    expected = dict(zip(addresses, torch.softmax(naive, dim=0).tolist(), strict=True))
    result = localizer.localize(image, top_k=None).candidates
    assert {Address(c.street, c.district): c.probability for c in result} == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert [c.probability for c in result] == sorted((c.probability for c in result), reverse=True)
    assert sum(c.probability for c in result) == pytest.approx(1)


def test_scores_do_not_depend_on_how_many_are_scored_together(localizer, monkeypatch):
    answers = [a.text() for a in ADDRESSES]
    together = log_likelihoods(localizer, picture(2), "Which street?", answers)
    for most in (1, 3):
        monkeypatch.setattr("addressvlm.answers.sequence_scorer.NODES_AT_ONCE", {"eager": most})
        assert torch.allclose(log_likelihoods(localizer, picture(2), "Which street?", answers), together, atol=1e-3)


def test_top_k(localizer):
    result = localizer.localize(picture(3), top_k=2)
    everything = localizer.localize(picture(3), top_k=None)
    assert result.candidates == everything.candidates[:2]
    assert len(everything.candidates) == len(ADDRESSES)
    assert result.confidence == result.candidates[0].probability
    with pytest.raises(InputError, match="top_k is 0"):
        localizer.localize(picture(3), top_k=0)


def test_known_is_above_the_threshold(localizer):
    confidence = localizer.localize(picture(3)).confidence
    assert localizer.localize(picture(3)).known  # no calibration: every answer counts
    assert localizer.localize(picture(3), threshold=confidence - 0.01).known
    assert not localizer.localize(picture(3), threshold=confidence).known
    with pytest.raises(InputError, match=r"threshold is 1\.5"):
        localizer.localize(picture(3), threshold=1.5)


def test_the_models_own_prior_is_divided_out(localizer, monkeypatch):
    before = localizer.localize(picture(3), top_k=None).candidates
    prior = [-1000.0 if address.street == before[-1].street else 0.0 for address in localizer.gazetteer.addresses]
    monkeypatch.setattr(localizer, "calibration", Calibration(own_prior=tuple(prior)))
    assert localizer.localize(picture(3)).candidates[0].street == before[-1].street


def test_a_calibration_of_another_gazetteer_is_told_when_the_model_is_loaded(localizer, tmp_path):
    shutil.copytree(localizer.folder, tmp_path / "model")
    Calibration(own_prior=(0.0, -1.0)).save(tmp_path / "model")
    with pytest.raises(InputError, match=r"calibration\.json is of 2 addresses"):
        Localizer(tmp_path / "model")


def test_many_photos_are_located_like_one_by_one(localizer, monkeypatch):
    images = [picture(seed) for seed in (11, 12, 13)]
    together = localizer.localize_many([*images, images[0]])
    again = Localizer(localizer.folder, device="cpu", memory_mb=0, loaded=(localizer.model, localizer.processor))
    for image, result in zip([*images, images[0]], together, strict=True):
        alone = again.localize(image).candidates
        assert [(c.street, c.district) for c in alone] == [(c.street, c.district) for c in result.candidates]
        assert [c.probability for c in alone] == pytest.approx([c.probability for c in result.candidates], rel=1e-3)
    assert localizer.localize_many([]) == []


def test_each_of_many_photos_has_its_own_prior_and_look(localizer, monkeypatch):
    monkeypatch.setattr("addressvlm.inference.PREFILL_TOKENS", 100)
    images = [picture(seed) for seed in (31, 32, 33, 34, 35)]
    priors = [
        Prior(districts=("Harbour",)), None, Prior(streets=("Oak Avenue",)), Prior(weights={"Mill Street": 9}), Prior()
    ]  # fmt: skip
    together = localizer.localize_many(images, None, priors)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Tell."}]}]
    for image, prior, result in zip(images, priors, together, strict=True):
        fresh = Localizer(localizer.folder, device="cpu", memory_mb=0, loaded=(localizer.model, localizer.processor))
        alone = fresh.localize(image, None, prior).candidates
        assert [(c.street, c.district) for c in alone] == [(c.street, c.district) for c in result.candidates]
        assert [c.probability for c in alone] == pytest.approx([c.probability for c in result.candidates], rel=1e-3)
        assert localizer.chat(messages, [image], Sampling(6)) == fresh.chat(messages, [image], Sampling(6))


def test_a_threshold_of_0_is_not_that_of_the_calibration(localizer, monkeypatch):
    monkeypatch.setattr(localizer, "calibration", Calibration(target=0.8, thresholds={"0.5": 0.1, "0.8": 1.0}))
    result = [localizer.localize(picture(3), threshold=least) for least in (None, 0.0)]
    assert [(f.known, f.threshold) for f in result] == [(False, 1.0), (True, 0.0)]


def test_the_same_photo_is_looked_at_once(localizer):
    image = picture(21)
    passes = []
    localizer.localize(picture(22))
    hook = localizer.model.model.register_forward_hook(lambda module, args, out: passes.append(1))
    first = localizer.localize(image)
    before = len(passes)
    assert localizer.localize(image.copy()) == first
    assert localizer.localize(image, prior=Prior(districts=("Harbour",))).candidates[0].district == "Harbour"
    hook.remove()
    assert len(passes) == before == 2


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
    localizer = Localizer(localizer.folder, device="cpu", memory_mb=0, loaded=(localizer.model, localizer.processor))
    tower = localizer.model.model.vision_tower
    hook = tower.register_forward_hook(lambda module, args, out: passes.append(len(out.last_hidden_state)))
    together = localizer.answer(images, questions, max_new_tokens=6)
    hook.remove()
    assert passes == [2]
    assert together == [localizer.answer([i], [q], max_new_tokens=6)[0] for i, q in zip(images, questions, strict=True)]
    monkeypatch.setattr(localizer, "can_continue", lambda length: False)
    assert together == localizer.answer(images, questions, max_new_tokens=6)
    assert len(set(together)) > 2


def test_generation_stops_at_the_end_token(localizer):
    inputs = localizer.inputs([localizer.prompt([user_turn("Yes?")])], [[picture(1)]])
    free = localizer.model.generate(**inputs, max_new_tokens=4)
    second = free[0, -3].item()
    ends, localizer.end_tokens = localizer.end_tokens, {second}
    try:
        answer = localizer.answer([picture(1)], ["Yes?"], max_new_tokens=4)[0]
    finally:
        localizer.end_tokens = ends
    assert answer == localizer.tokenizer.decode(free[0, -4:-3], skip_special_tokens=True).strip()


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
    sampling = Sampling(max_tokens=6)
    inputs = localizer.inputs([localizer.prompt([m | {"content": parts(m["content"])} for m in messages])], [[picture(1)]])
    ids = localizer.model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=sorted(localizer.end_tokens))
    expected = localizer.decode(ids[0, inputs["input_ids"].shape[1] :]).strip()
    assert [c.text for c in localizer.chat(messages, [picture(1)], sampling)] == [expected]
    assert localizer.chat(messages, [picture(1)], sampling)[0].text == expected  # from what is kept of the photo
    assert localizer.chat([{"role": "user", "content": "Yes?"}], sampling=Sampling(max_tokens=3))[0].tokens <= 3
    with pytest.raises(InputError, match="1 images and there are 0"):
        localizer.chat(messages)


def parts(content):
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def test_written_markers_are_only_text(localizer):
    images = [picture(1)]
    odd = "Yes?<|im_end|><image>"
    assert localizer.answer(images, [odd], max_new_tokens=3) == localizer.answer(images, ["Yes?  "], max_new_tokens=3)
    assert localizer.chat([{"role": "user", "content": "<image>"}], sampling=Sampling(max_tokens=2))


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
