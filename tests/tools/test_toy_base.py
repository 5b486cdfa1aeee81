"""The toy base's tokenizer, lessons and losses; its training is a matter of hours."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from addressvlm.demo.world import DISTRICTS, KINDS, WORDS
from addressvlm.models.families import parts_of
from addressvlm.tools import toy_base, toy_base_data
from addressvlm.tools.toy_base_data import City, Lesson
from addressvlm.training.collator import IGNORE_INDEX


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> City:
    """A city of two places."""
    folder = tmp_path_factory.mktemp("city")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_base_data, "PLACES", 2)
        toy_base_data.draw_city(3001, folder)
    return City.load(folder)


@pytest.fixture(scope="module")
def tokenizer(city: City) -> PreTrainedTokenizerFast:
    """Of few lessons; names come in their own right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_base, "TOKENIZER_LESSONS", 200)
        return toy_base.base_tokenizer([city])


def test_lessons_are_about_what_the_image_shows(city: City) -> None:
    rng, kinds = random.Random(0), set()
    for _ in range(200):
        lesson = toy_base_data.draw_lesson([city], rng)
        assert lesson.image.size == (128, 128)
        assert 1 <= len(lesson.rounds) <= toy_base_data.MAX_ROUNDS
        assert lesson.words <= {*WORDS, *KINDS}
        for trait, possible in zip(lesson.traits, toy_base_data.TRAITS, strict=True):
            assert trait is None or trait in possible
        for question, answer in lesson.rounds:
            if question.startswith(toy_base_data.WRITTEN[0]):
                name = question.removeprefix(toy_base_data.WRITTEN[0]).split("?")[0].split()
                assert (answer == "Yes") is (set(name) <= lesson.words and name[0] in lesson.words)
                kinds.add("read")
            if question in toy_base_data.ABOVE:
                assert answer == toy_base_data.described(lesson.traits)
                kinds.add("above")
    assert kinds == {"read", "above"}


def test_a_name_of_the_map_is_counted_and_one_that_is_not_there_is_not(city: City) -> None:
    for number, about in enumerate(city.about):
        lesson = toy_base_data._map_names(city, number, random.Random(number))
        assert lesson.words == {word for name in about["names"] for word in name.split()}
        assert (np.asarray(lesson.image) != city.bare[number]).any()


def test_words_of_names_are_one_token_wherever_they_stand(tokenizer: PreTrainedTokenizerFast) -> None:
    for word in (*WORDS, *KINDS, *DISTRICTS):
        (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert tokenizer(f"So it is {word}, there.", add_special_tokens=False)["input_ids"].count(token) == 1
    text = "Horse Road, Oldtown"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_model_is_a_hugging_face_model_of_three_parts_below_15_mb(tokenizer: PreTrainedTokenizerFast) -> None:
    model, processor = toy_base.build(tokenizer)
    assert set(parts_of(model)) == {"vision", "adapter", "llm"}
    assert 2 * model.num_parameters() < 15e6
    inputs = processor(
        text=["<|user|><image>Which street?<|end|><|assistant|>"], images=[toy_base.Image.new("RGB", (300, 200))]
    )
    assert inputs["input_ids"][0].count(model.config.image_token_id) == (toy_base_data.SIDE // toy_base.PATCH) ** 2
    assert toy_base_data.TILES.delta * toy_base_data.SIDE % toy_base.PATCH == 0  # the photo ends on a patch's edge


def test_answers_weigh_by_the_root_of_their_length() -> None:
    _ = IGNORE_INDEX
    labels = torch.tensor([[_, _, 5, 6, 7, 8, _, _, 9, _, 4]])
    assert toy_base.answer_weights(labels).tolist() == pytest.approx([0.5] * 4 + [1.0, 1.0])


def test_an_image_token_like_a_word_s_token_tells_that_word(tokenizer: PreTrainedTokenizerFast) -> None:
    """One image token is enough, wherever it is; whether it is the right one counts where the lesson wrote the word."""
    model, _ = toy_base.build(tokenizer)
    probe = toy_base.TowerProbe(tokenizer)
    oak = toy_base.token_of(tokenizer, "Oak")
    model.model.multi_modal_projector = torch.nn.Identity()
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    model.get_input_embeddings().weight.data[oak, 0] = 4.0
    features = torch.zeros(1, 192, 8, 8)
    features[0, 0, 2, 7] = 1.0
    image = toy_base.Image.new("RGB", (128, 128))

    def judged(words: set[str], *places: tuple[str, float, float]) -> tuple[float, float]:
        loss, recall = probe(model, features, [Lesson(image, [], words, [None] * len(toy_base_data.TRAITS), False, [*places])])
        return loss.item(), recall

    (right, recall), (wrong, missed) = judged({"Oak"}), judged({"Elm"})
    assert (recall, missed) == (1.0, 0.0)
    assert right < wrong
    assert judged({"Oak"}, ("Oak", 7.5 * 16, 2.5 * 16))[0] < judged({"Oak"}, ("Oak", 2.5 * 16, 7.5 * 16))[0]


@pytest.mark.parametrize(("centre", "told"), [(True, "asphalt road"), (False, "brick road")])
def test_traits_of_a_tile_are_those_at_its_centre_and_those_of_a_photo_are_told_anywhere(centre: bool, told: str) -> None:
    assert toy_base.TRAIT_WORDS[:3] == ["asphalt", "concrete", "brick"]
    logits = torch.zeros(1, 8, 8, len(toy_base.TRAIT_WORDS))
    logits[0, 3, 4, 0] = 5.0
    logits[0, 0, 7, 2] = 9.0
    losses = {}
    for trait in toy_base_data.TRAITS[0]:
        traits = [trait, *[None] * (len(toy_base_data.TRAITS) - 1)]
        lesson = Lesson(toy_base.Image.new("RGB", (128, 128)), [], set(), traits, centre)
        losses[trait] = toy_base.trait_loss(logits, [lesson]).item()
    assert min(losses, key=losses.__getitem__) == told


def test_the_rate_warms_up_at_each_stage_and_falls_to_zero() -> None:
    rates = [toy_base.learning_rate(step, 10_000, 1.0) for step in range(10_000)]
    language, both = toy_base.stage_starts(10_000)
    for start in (0, language, both):
        assert rates[start] == pytest.approx(0.01)
        assert rates[start + 50] == pytest.approx(0.51)
        assert rates[start + 200] == 1.0
    assert rates[-1] < 0.001


def test_gates_count_names_and_each_kind_of_trait_that_can_be_seen(city: City, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "brick road, red fronts, 3 floors."
    monkeypatch.setattr(toy_base, "answers", lambda model, processor, images, question: [answer] * len(images))
    shares = toy_base.gates(None, None, [city], 2)
    shown = [about["traits"][0] for about in city.about]
    assert shares["own names"] == shares["own names on grafts"] == 0
    assert shares["traits, paving"] == sum(traits[0] == "brick road" for traits in shown) / 2
    right = [trait in answer[:-1].split(", ") for traits in shown for trait in traits if trait]
    assert shares["traits"] == sum(right) / len(right)
    assert not any("from above, floors" in name for name in shares)


def test_a_card_has_the_gates(tmp_path: Path) -> None:
    toy_base.write_card(tmp_path, 3_250_976, {"own names": 0.97, "traits": 0.5, "traits, floors": 0.4}, 3)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "3.3 million parameters" in text
    assert "| own names | 97.0% (at least 95% wanted) |" in text
    assert "| traits, floors | 40.0% |" in text


def test_the_middle_of_a_written_word_lies_on_its_letters(city: City) -> None:
    """Dark letters with a white rim are at each place, and its word is one of the image's."""
    for seed in range(12):
        lesson = toy_base_data._any_names(city, 0, random.Random(seed))
        assert {word for word, *_ in lesson.places} == lesson.words
        pixels = np.asarray(lesson.image.convert("L"))
        for _, x, y in lesson.places:
            around = pixels[max(0, int(y) - 6) : int(y) + 7, max(0, int(x) - 6) : int(x) + 7]
            assert around.min() < 60
            assert around.max() > 240
