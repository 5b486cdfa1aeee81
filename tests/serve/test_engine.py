"""Requests of one batch are answered as each alone, in order: two cities on one tiny base, without Ray."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import serve as service
from addressvlm import InputError
from addressvlm.answers.address_distribution import Circle, Localization, Prior
from addressvlm.answers.calibration import Calibration
from addressvlm.answers.types import Sampling
from addressvlm.inference import Localizer
from serve.cities import find_cities
from serve.engine import Engine, image_tokens, input_size
from serve.requests import ChatQuery, LocalizeQuery
from tests.support.running_service import two_cities
from tests.support.tiny_families import FAMILIES

pytestmark = pytest.mark.xdist_group("serve")


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two trained cities; the first is calibrated, and knows above 0.9 only."""
    systems = two_cities(tmp_path_factory.mktemp("cities"))
    Calibration(2.0, 0.8, {"0.8": 0.9, "0.5": 0.1}).save(systems[0] / "merged")
    return systems


@pytest.fixture(scope="module")
def engine(systems: list[Path]) -> Engine:
    """One that remembers no photo, so that nothing but the question decides."""
    config = service.ServiceSettings(cities=[str(system) for system in systems], dtype="float32", photo_memory_mb=0)
    return Engine(config, find_cities(config))


def pixels(seed: int) -> np.ndarray:
    """A photo in a colour of its own, with some noise; no two seeds alike."""
    random = np.random.default_rng(seed)
    return (random.integers(0, 200, 3) + random.integers(0, 55, (40, 60, 3))).astype(np.uint8)


def chat_query(
    text: str, *photos: int, city: str = "toytown", before: Sequence[dict[str, Any]] = (), **sampling: Any
) -> ChatQuery:
    parts = [*[{"type": "image"}] * len(photos), {"type": "text", "text": text}]
    turns = [*before, {"role": "user", "content": parts}]
    return ChatQuery(city, turns, [pixels(seed) for seed in photos], Sampling(**{"max_tokens": 6, **sampling}))


def same(result: Localization | Exception, single: Localization | Exception) -> None:
    assert isinstance(result, Localization)
    assert isinstance(single, Localization)
    assert (result.known, result.threshold) == (single.known, single.threshold)
    assert [c.street for c in result.candidates] == [c.street for c in single.candidates]
    assert [c.probability for c in result.candidates] == pytest.approx([c.probability for c in single.candidates], rel=1e-3)


# ---- addresses


def test_photos_of_one_batch_are_localized_as_each_alone(engine: Engine) -> None:
    queries = [
        LocalizeQuery("toytown", pixels(1), 4, Prior(), None),
        LocalizeQuery("st-alder", pixels(2), 1, Prior(), 0.0),
        LocalizeQuery("toytown", pixels(3), 2, Prior(streets=("Mill Street", "Quay Lane")), 0.0),
        LocalizeQuery("toytown", pixels(4), 3, Prior(weights={"Oak Avenue": 50}), 1.0),
        LocalizeQuery("st-alder", pixels(5), 9, Prior(weights={"Elm Row": 0.2}), 0.3),
        LocalizeQuery("toytown", pixels(6), 9, Prior(circle=Circle(52.01, 0.0, 300, soft=True)), 0.2),
    ]
    single = [engine.localize([query])[0] for query in queries]
    assert len({str(result) for result in single}) == len(queries)
    assert [result.threshold for result in single if isinstance(result, Localization)] == [0.9, 0.0, 0.0, 1.0, 0.3, 0.2]
    assert [len(result.candidates) for result in single if isinstance(result, Localization)] == [4, 1, 2, 3, 2, 4]
    for one, other in zip(engine.localize(queries), single, strict=True):
        same(one, other)
    for one, other in zip(engine.localize(queries[::-1]), single[::-1], strict=True):
        same(one, other)


def test_photos_of_one_city_go_through_the_model_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, distributions = [], Localizer.address_distributions
    monkeypatch.setattr(
        Localizer,
        "address_distributions",
        lambda self, images, priors: sizes.append(len(images)) or distributions(self, images, priors),
    )
    engine.localize(
        [LocalizeQuery(city, pixels(3), 1, Prior(), None) for city in ("toytown", "st-alder", "toytown", "toytown")]
    )
    assert sizes == [3, 1]


def test_a_bad_prior_fails_alone_and_moves_no_other_answer(engine: Engine) -> None:
    fine = [LocalizeQuery("toytown", pixels(seed), 2, Prior(), None) for seed in (1, 2, 3)]
    single = [engine.localize([query])[0] for query in fine]
    first, refused, second, third = engine.localize(
        [fine[0], LocalizeQuery("toytown", pixels(4), 2, Prior(streets=("Elm Row",)), None), *fine[1:]]
    )
    assert isinstance(refused, InputError)
    for result, expected in zip((first, second, third), single, strict=True):
        same(result, expected)


def test_a_threshold_of_0_counts_every_answer_of_a_calibrated_model(engine: Engine) -> None:
    result = [engine.localize([LocalizeQuery("toytown", pixels(1), 1, Prior(), threshold)])[0] for threshold in (None, 0.0)]
    assert [(f.known, f.threshold) for f in result if isinstance(f, Localization)] == [(False, 0.9), (True, 0.0)]


# ---- chats


MIXED = [
    chat_query("Tell me a story.", 1),
    chat_query("Which street is this?", 2),
    chat_query("Tell me a story.", 2),
    chat_query("Tell me a story.", 2, max_tokens=3),
    chat_query("What do you see in the picture?", 3),
    chat_query("Tell me a story.", 1, city="st-alder"),
    chat_query("Is this Mill Street?", 3),
    chat_query("What do you see in the picture?", 1, city="st-alder"),
    chat_query("Tell me a story.", 1, stop=["e"]),
    chat_query("Hello.", 4),
    chat_query("Which street is this?", 4),
    chat_query("Which street is this?", 2, city="st-alder"),
    chat_query("Tell me a story.", 4, n=2, seed=3, temperature=2.0),
    chat_query("Tell me a story."),
    chat_query("And what else?", before=[{"role": "user", "content": [{"type": "text", "text": "Hello."}]}]),
    chat_query("Do they differ?", 1, 2),
    chat_query("Tell me a story.", 3, logprobs=1),
]


def test_chats_of_one_batch_are_answered_as_each_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    single = [engine.chat([question])[0] for question in MIXED]
    assert not [result for result in single if isinstance(result, Exception)]
    assert len({result[0].text for result in single if not isinstance(result, Exception)}) > len(MIXED) / 2
    together = engine.chat(MIXED)
    for question, result, expected in zip(MIXED, together, single, strict=True):
        assert result == expected, question.messages
    assert engine.chat(MIXED[::-1]) == together[::-1]


def test_alike_chats_go_through_the_model_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, prefill = [], Localizer.prefill
    monkeypatch.setattr(
        Localizer, "prefill", lambda self, inputs: prompts.append(len(inputs["input_ids"])) or prefill(self, inputs)
    )
    engine.chat([question for question in MIXED if question.sampling == Sampling(6) and len(question.images) == 1])
    assert sorted(prompts) == [1, 2, 3, 4]  # of each city those about the address, and the plain ones


def test_a_temperature_is_of_its_own_question(engine: Engine) -> None:
    cold, hot = (
        chat_query("Tell me a story.", 1, max_tokens=8),
        chat_query("Tell me a story.", 1, max_tokens=8, temperature=9.0),
    )
    (greedy,) = engine.chat([cold])[0]
    for seed in range(2):
        torch.manual_seed(seed)
        (first,), (one,), (two,), (other,) = engine.chat([hot, cold, cold, hot])
        assert one.text == two.text == greedy.text
        assert len({first.text, other.text, greedy.text}) == 3


@pytest.mark.parametrize("special", [{"seed": 3}, {"top_p": 1e-6}])
def test_a_seed_and_top_p_hold_in_a_batch_too(engine: Engine, special: dict[str, Any]) -> None:
    one, other = (chat_query("Tell me a story.", 1, temperature=9.0, **more) for more in (special, {}))
    alone = engine.chat([one])[0]
    assert engine.chat([other, one, other])[1] == alone


def test_only_plain_questions_are_answered_by_probabilities(engine: Engine) -> None:
    plain = engine.chat([chat_query("Which street is this?", 1, max_tokens=1)])[0][0]
    assert plain.finish == "stop"
    assert plain.text in {"Mill Street", "Oak Avenue", "Quay Lane", "Station Road"}
    for free in (
        chat_query("Which street is this?", 1, max_tokens=1, temperature=0.1),
        chat_query("Which street is this?", 1, max_tokens=1, stop=["?"]),
        chat_query("Which street is this?", 1, max_tokens=1, logprobs=0),
        chat_query("Which street is this?", 1, max_tokens=1, n=2),
        chat_query("Which street is this?", 1, 2, max_tokens=1),
        chat_query("Which street is this?", max_tokens=1),
    ):
        assert engine.chat([free])[0][0].tokens == 1


def test_a_prompts_length_is_known_before_it_is_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for question in (
        chat_query("Hello."),
        chat_query("Hello.", 1),
        chat_query("Hello.", 1, 2),
        chat_query("Which street is this?", 1, stop=["x"]),
    ):
        (read,) = engine.chat([question])[0]
        monkeypatch.setattr(engine, "context_length", read.prompt_tokens + 2)
        assert engine.chat([question])[0][0].tokens <= 2
        monkeypatch.setattr(engine, "context_length", read.prompt_tokens)
        assert isinstance(engine.chat([question])[0], InputError)
        with pytest.raises(InputError, match=f"has {read.prompt_tokens} tokens"):
            next(engine.stream_chat(question))
        monkeypatch.undo()


def test_memory_for_photos_is_shared_by_the_cities_of_a_replica(systems: list[Path]) -> None:
    config = service.ServiceSettings(cities=[str(s) for s in systems], dtype="float32", photo_memory_mb=8, cities_per_replica=4)
    engine = Engine(config, find_cities(config))
    engine.add_city("toytown")
    assert engine.localizers["toytown"].photo_caches.max_bytes == 2 * 2**20


# ---- adapters of several cities


PIXELS = np.random.default_rng(1).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def settings(systems: list[Path], **more: object) -> service.ServiceSettings:
    return service.ServiceSettings(cities=[str(system) for system in systems], dtype="float32", **more)


def test_each_city_answers_as_its_merged_model(systems: list[Path]) -> None:
    config = settings(systems)
    engine = Engine(config, find_cities(config))
    query = ChatQuery(
        "", [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Tell."}]}], [PIXELS], Sampling(6)
    )
    for city in ("toytown", "st-alder", "toytown"):
        merged = Localizer(systems[0 if city == "toytown" else 1] / "merged")
        expected = merged.localize(Image.fromarray(PIXELS), top_k=None)
        (result,) = engine.localize([LocalizeQuery(city, PIXELS, 9, Prior(), None)])
        assert [c.street for c in result.candidates] == [c.street for c in expected.candidates]
        assert result.confidence == pytest.approx(expected.confidence, rel=1e-3)
        (expected_answer,) = merged.chat(query.messages, [Image.fromarray(PIXELS)], query.sampling)
        (answer,) = engine.chat([ChatQuery(city, query.messages, query.images, query.sampling)])
        assert answer[0].text == expected_answer.text


def test_cities_in_one_batch_do_not_mix(systems: list[Path]) -> None:
    config = settings(systems)
    engine = Engine(config, find_cities(config))
    cities = ["toytown", "st-alder", "toytown", "st-alder"]
    photos = np.random.default_rng(2).integers(0, 255, (4, 40, 60, 3), dtype=np.uint8)
    queries = [LocalizeQuery(city, pixels, 9, Prior(), None) for city, pixels in zip(cities, photos, strict=True)]
    separate = [engine.localize([query])[0] for query in queries]
    engine = Engine(config, find_cities(config))  # that remembers no photo
    together = engine.localize(queries)
    assert [t.confidence for t in together] == pytest.approx([a.confidence for a in separate], rel=1e-4)
    assert len({round(a.confidence, 4) for a in separate}) == 4
    bad = LocalizeQuery("toytown", PIXELS, 9, Prior(streets=("Elm Row",)), None)
    refused, fine = engine.localize([bad, queries[0]])
    assert isinstance(refused, InputError)
    assert fine.confidence == pytest.approx(separate[0].confidence, rel=1e-4)


def test_a_city_is_evicted_and_loaded_again(systems: list[Path]) -> None:
    config = settings(systems)
    engine = Engine(config, find_cities(config))
    query = LocalizeQuery("toytown", PIXELS, 9, Prior(), None)
    before = engine.localize([query])[0]
    engine.remove_city("toytown")
    engine.remove_city("toytown")
    engine.add_city("st-alder")
    assert list(engine.localizers) == ["st-alder"]
    assert engine.localize([query])[0].confidence == pytest.approx(before.confidence, rel=1e-5)
    assert set(engine.localizers) == {"toytown", "st-alder"}
    engine.settings = settings(systems, cities_per_replica=1)
    assert engine.localize([query])[0].confidence == pytest.approx(before.confidence, rel=1e-5)
    assert list(engine.localizers) == ["toytown"]
    engine.localize([LocalizeQuery("st-alder", PIXELS, 1, Prior(), None)])
    assert list(engine.localizers) == ["st-alder"]


def test_a_question_that_is_too_long_fails_alone(systems: list[Path]) -> None:
    config = settings(systems)
    engine = Engine(config, find_cities(config))

    def question(text: str, max_tokens: int) -> ChatQuery:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return ChatQuery("toytown", [turn], [PIXELS], Sampling(max_tokens))

    short = question("Tell.", 6)
    single = engine.chat([short])[0]
    engine.context_length = engine._prompt_length(short) + 6
    (expected_answer,), refused, (cut,) = engine.chat([short, question("Tell. " * 50, 6), question("Tell me.", 6)])
    assert expected_answer.text == single[0].text
    assert isinstance(refused, InputError)
    assert cut.tokens < 6


def test_a_stream_goes_on_while_another_city_answers(systems: list[Path]) -> None:
    config = settings(systems)
    engine = Engine(config, find_cities(config))
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Tell."}]}]
    question = ChatQuery("toytown", turn, [PIXELS], Sampling(8))
    single = "".join(chunk.text for chunk in engine.stream_chat(question))
    chunks, between = engine.stream_chat(question), []
    while (chunk := next(chunks, None)) is not None:
        between.append(chunk.text)
        engine.localize([LocalizeQuery("st-alder", PIXELS, 1, Prior(), None)])
    assert "".join(between) == single


@pytest.mark.parametrize(
    ("size", "by_area", "side"),
    [
        ({"height": 32, "width": 48}, False, 48),
        ({"shortest_edge": 378, "longest_edge": 980}, False, 980),
        ({"shortest_edge": 3136, "longest_edge": 12_845_056}, False, 2048),
        ({"shortest_edge": 3136, "longest_edge": 1_003_520}, True, 1001),
        ({"shortest_edge": 256, "longest_edge": 4096}, True, 64),
        ({}, False, 2048),
    ],
)
def test_the_side_of_a_models_input(size: dict[str, int], by_area: bool, side: int) -> None:
    fields = {"size": size, "crop_size": None} | ({"merge_size": 2} if by_area else {})
    assert input_size(type("Processor", (), fields)) == side


@pytest.mark.parametrize("family", FAMILIES)
def test_an_images_tokens_are_counted_as_the_processor_makes_them(family: str) -> None:
    processor = FAMILIES[family]()[1]
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    prompt = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    side, text_tokens = input_size(processor.image_processor), len(processor.tokenizer(prompt)["input_ids"])

    def tokens(size: tuple[int, int]) -> int:
        inputs = processor(text=[prompt], images=[[Image.new("RGB", size[::-1])]], return_tensors="pt")
        return inputs["input_ids"].shape[1] - text_tokens + 1

    sizes = [(side, side), (30, 40), (120, 40), (40, 200)]
    assert image_tokens(processor, sizes, side, tokens(sizes[0])) == [tokens(size) for size in sizes]


def test_answers_from_probabilities_keep_to_max_tokens(engine: Engine) -> None:
    whole, cut, one = (engine.chat([chat_query("Which street is this?", 1, max_tokens=n)])[0][0] for n in (30, 2, 1))
    assert (whole.finish, cut.finish, one.finish, cut.tokens, one.tokens) == ("stop", "length", "length", 2, 1)
    assert whole.text.startswith(cut.text)
    assert len(one.text) <= len(cut.text) < len(whole.text)
