"""What comes together is answered as if each came alone, in order: two cities on one tiny base, without Ray."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import serve as service
from addressvlm import InputError
from addressvlm.answers.address_distribution import Localization
from addressvlm.answers.calibration import Calibration
from addressvlm.answers.priors import Circle, Prior
from addressvlm.answers.types import Sampling
from addressvlm.inference import Localizer
from serve.cities import find_cities
from serve.engine import Engine, input_size
from serve.requests import ChatQuery, LocalizeQuery
from tests.support.running_service import two_cities

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
    given = service.ServiceSettings(cities=[str(system) for system in systems], dtype="float32", photo_memory_mb=0)
    return Engine(given, find_cities(given))


def pixels(seed: int) -> np.ndarray:
    """A photo in a colour of its own, with some noise; no two seeds alike."""
    random = np.random.default_rng(seed)
    return (random.integers(0, 200, 3) + random.integers(0, 55, (40, 60, 3))).astype(np.uint8)


def ask(text: str, *photos: int, city: str = "toytown", before: Sequence[dict[str, Any]] = (), **sampling: Any) -> ChatQuery:
    parts = [*[{"type": "image"}] * len(photos), {"type": "text", "text": text}]
    turns = [*before, {"role": "user", "content": parts}]
    return ChatQuery(city, turns, [pixels(seed) for seed in photos], Sampling(**{"max_tokens": 6, **sampling}))


def same(found: Localization | Exception, alone: Localization | Exception) -> None:
    assert isinstance(found, Localization)
    assert isinstance(alone, Localization)
    assert (found.known, found.threshold) == (alone.known, alone.threshold)
    assert [c.street for c in found.candidates] == [c.street for c in alone.candidates]
    assert [c.probability for c in found.candidates] == pytest.approx([c.probability for c in alone.candidates], rel=1e-3)


# ---- addresses


def test_photos_of_one_batch_are_located_as_each_alone(engine: Engine) -> None:
    asked = [
        LocalizeQuery("toytown", pixels(1), 4, Prior(), None),
        LocalizeQuery("st-alder", pixels(2), 1, Prior(), 0.0),
        LocalizeQuery("toytown", pixels(3), 2, Prior(streets=("Mill Street", "Quay Lane")), 0.0),
        LocalizeQuery("toytown", pixels(4), 3, Prior(weights={"Oak Avenue": 50}), 1.0),
        LocalizeQuery("st-alder", pixels(5), 9, Prior(weights={"Elm Row": 0.2}), 0.3),
        LocalizeQuery("toytown", pixels(6), 9, Prior(circle=Circle(52.01, 0.0, 300, soft=True)), 0.2),
    ]
    alone = [engine.localize([where])[0] for where in asked]
    assert len({str(found) for found in alone}) == len(asked)
    assert [found.threshold for found in alone if isinstance(found, Localization)] == [0.9, 0.0, 0.0, 1.0, 0.3, 0.2]
    assert [len(found.candidates) for found in alone if isinstance(found, Localization)] == [4, 1, 2, 3, 2, 4]
    for one, other in zip(engine.localize(asked), alone, strict=True):
        same(one, other)
    for one, other in zip(engine.localize(asked[::-1]), alone[::-1], strict=True):
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
    alone = [engine.localize([where])[0] for where in fine]
    first, refused, second, third = engine.localize(
        [fine[0], LocalizeQuery("toytown", pixels(4), 2, Prior(streets=("Elm Row",)), None), *fine[1:]]
    )
    assert isinstance(refused, InputError)
    for found, expected in zip((first, second, third), alone, strict=True):
        same(found, expected)


def test_a_threshold_of_0_counts_every_answer_of_a_calibrated_model(engine: Engine) -> None:
    found = [engine.localize([LocalizeQuery("toytown", pixels(1), 1, Prior(), least)])[0] for least in (None, 0.0)]
    assert [(f.known, f.threshold) for f in found if isinstance(f, Localization)] == [(False, 0.9), (True, 0.0)]


# ---- chats


MIXED = [
    ask("Tell me a story.", 1),
    ask("Which street is this?", 2),
    ask("Tell me a story.", 2),
    ask("Tell me a story.", 2, max_tokens=3),
    ask("What do you see in the picture?", 3),
    ask("Tell me a story.", 1, city="st-alder"),
    ask("Is this Mill Street?", 3),
    ask("What do you see in the picture?", 1, city="st-alder"),
    ask("Tell me a story.", 1, stop=["e"]),
    ask("Hello.", 4),
    ask("Which street is this?", 4),
    ask("Which street is this?", 2, city="st-alder"),
    ask("Tell me a story.", 4, n=2, seed=3, temperature=2.0),
    ask("Tell me a story."),
    ask("And what else?", before=[{"role": "user", "content": [{"type": "text", "text": "Hello."}]}]),
    ask("Do they differ?", 1, 2),
    ask("Tell me a story.", 3, logprobs=1),
]


def test_chats_of_one_batch_are_answered_as_each_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [engine.chat([question])[0] for question in MIXED]
    assert not [found for found in alone if isinstance(found, Exception)]
    assert len({found[0].text for found in alone if not isinstance(found, Exception)}) > len(MIXED) / 2
    together = engine.chat(MIXED)
    for question, found, expected in zip(MIXED, together, alone, strict=True):
        assert found == expected, question.messages
    assert engine.chat(MIXED[::-1]) == together[::-1]


def test_alike_chats_go_through_the_model_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, inputs = [], Localizer.inputs
    monkeypatch.setattr(
        Localizer, "inputs", lambda self, texts, images: prompts.append(len(texts)) or inputs(self, texts, images)
    )
    engine.chat([question for question in MIXED if question.sampling == Sampling(6) and len(question.images) == 1])
    assert sorted(prompts) == [1, 2, 3, 4]  # of each city those about the address, and the plain ones


def test_a_temperature_is_of_its_own_question(engine: Engine) -> None:
    cold, hot = ask("Tell me a story.", 1, max_tokens=8), ask("Tell me a story.", 1, max_tokens=8, temperature=9.0)
    (greedy,) = engine.chat([cold])[0]
    for seed in range(2):
        torch.manual_seed(seed)
        (first,), (one,), (two,), (other,) = engine.chat([hot, cold, cold, hot])
        assert one.text == two.text == greedy.text
        assert len({first.text, other.text, greedy.text}) == 3


def test_only_plain_questions_are_answered_by_probabilities(engine: Engine) -> None:
    plain = engine.chat([ask("Which street is this?", 1, max_tokens=1)])[0][0]
    assert plain.finish == "stop"
    assert plain.text in {"Mill Street", "Oak Avenue", "Quay Lane", "Station Road"}
    for free in (
        ask("Which street is this?", 1, max_tokens=1, temperature=0.1),
        ask("Which street is this?", 1, max_tokens=1, stop=["?"]),
        ask("Which street is this?", 1, max_tokens=1, logprobs=0),
        ask("Which street is this?", 1, max_tokens=1, n=2),
        ask("Which street is this?", 1, 2, max_tokens=1),
        ask("Which street is this?", max_tokens=1),
    ):
        assert engine.chat([free])[0][0].tokens == 1


def test_a_prompts_length_is_known_before_it_is_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for question in (ask("Hello."), ask("Hello.", 1), ask("Hello.", 1, 2), ask("Which street is this?", 1, stop=["x"])):
        (read,) = engine.chat([question])[0]
        monkeypatch.setattr(engine, "context_length", read.prompt_tokens + 2)
        assert engine.chat([question])[0][0].tokens <= 2
        monkeypatch.setattr(engine, "context_length", read.prompt_tokens)
        assert isinstance(engine.chat([question])[0], InputError)
        with pytest.raises(InputError, match=f"has {read.prompt_tokens} tokens"):
            next(engine.stream_chat(question))
        monkeypatch.undo()


def test_memory_for_photos_is_shared_by_the_cities_of_a_replica(systems: list[Path]) -> None:
    given = service.ServiceSettings(cities=[str(s) for s in systems], dtype="float32", photo_memory_mb=8, cities_per_replica=4)
    engine = Engine(given, find_cities(given))
    engine.add_city("toytown")
    assert engine.localizers["toytown"].photo_caches.max_bytes == 2 * 2**20


# ---- adapters of several cities


PIXELS = np.random.default_rng(1).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def settings(systems: list[Path], **more: object) -> service.ServiceSettings:
    return service.ServiceSettings(cities=[str(system) for system in systems], dtype="float32", **more)


def test_each_city_answers_as_its_merged_model(systems: list[Path]) -> None:
    given = settings(systems)
    engine = Engine(given, find_cities(given))
    words = ChatQuery(
        "", [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Tell."}]}], [PIXELS], Sampling(6)
    )
    for city in ("toytown", "st-alder", "toytown"):
        merged = Localizer(systems[0 if city == "toytown" else 1] / "merged")
        expected = merged.localize(Image.fromarray(PIXELS), top_k=None)
        (found,) = engine.localize([LocalizeQuery(city, PIXELS, 9, Prior(), None)])
        assert [c.street for c in found.candidates] == [c.street for c in expected.candidates]
        assert found.confidence == pytest.approx(expected.confidence, rel=1e-3)
        (told,) = merged.chat(words.messages, [Image.fromarray(PIXELS)], words.sampling)
        (answer,) = engine.chat([ChatQuery(city, words.messages, words.images, words.sampling)])
        assert answer[0].text == told.text


def test_cities_in_one_batch_do_not_mix(systems: list[Path]) -> None:
    given = settings(systems)
    engine = Engine(given, find_cities(given))
    cities = ["toytown", "st-alder", "toytown", "st-alder"]
    photos = np.random.default_rng(2).integers(0, 255, (4, 40, 60, 3), dtype=np.uint8)
    asked = [LocalizeQuery(city, pixels, 9, Prior(), None) for city, pixels in zip(cities, photos, strict=True)]
    apart = [engine.localize([where])[0] for where in asked]
    engine = Engine(given, find_cities(given))  # that remembers no photo
    together = engine.localize(asked)
    assert [t.confidence for t in together] == pytest.approx([a.confidence for a in apart], rel=1e-4)
    assert len({round(a.confidence, 4) for a in apart}) == 4
    bad = LocalizeQuery("toytown", PIXELS, 9, Prior(streets=("Elm Row",)), None)
    refused, fine = engine.localize([bad, asked[0]])
    assert isinstance(refused, InputError)
    assert fine.confidence == pytest.approx(apart[0].confidence, rel=1e-4)


def test_a_city_makes_room_and_comes_back(systems: list[Path]) -> None:
    given = settings(systems)
    engine = Engine(given, find_cities(given))
    where = LocalizeQuery("toytown", PIXELS, 9, Prior(), None)
    before = engine.localize([where])[0]
    engine.remove_city("toytown")
    engine.remove_city("toytown")
    engine.add_city("st-alder")
    assert list(engine.localizers) == ["st-alder"]
    assert engine.localize([where])[0].confidence == pytest.approx(before.confidence, rel=1e-5)
    assert set(engine.localizers) == {"toytown", "st-alder"}
    engine.settings = settings(systems, cities_per_replica=1)
    assert engine.localize([where])[0].confidence == pytest.approx(before.confidence, rel=1e-5)
    assert list(engine.localizers) == ["toytown"]
    engine.localize([LocalizeQuery("st-alder", PIXELS, 1, Prior(), None)])
    assert list(engine.localizers) == ["st-alder"]


def test_a_question_that_is_too_long_fails_alone(systems: list[Path]) -> None:
    given = settings(systems)
    engine = Engine(given, find_cities(given))

    def question(text: str, most: int) -> ChatQuery:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return ChatQuery("toytown", [turn], [PIXELS], Sampling(most))

    short = question("Tell.", 6)
    alone = engine.chat([short])[0]
    engine.context_length = engine._prompt_length(short) + 6
    (told,), refused, (cut,) = engine.chat([short, question("Tell. " * 50, 6), question("Tell me.", 6)])
    assert told.text == alone[0].text
    assert isinstance(refused, InputError)
    assert cut.tokens < 6


def test_a_stream_goes_on_while_another_city_answers(systems: list[Path]) -> None:
    given = settings(systems)
    engine = Engine(given, find_cities(given))
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Tell."}]}]
    question = ChatQuery("toytown", turn, [PIXELS], Sampling(8))
    alone = "".join(piece.text for piece in engine.stream_chat(question))
    pieces, between = engine.stream_chat(question), []
    while (piece := next(pieces, None)) is not None:
        between.append(piece.text)
        engine.localize([LocalizeQuery("st-alder", PIXELS, 1, Prior(), None)])
    assert "".join(between) == alone


@pytest.mark.parametrize(
    ("size", "side"),
    [({"height": 32, "width": 48}, 48), ({"shortest_edge": 3136, "longest_edge": 12_845_056}, 2048), ({}, 2048)],
)
def test_the_side_of_a_models_input(size: dict[str, int], side: int) -> None:
    assert input_size(type("Processor", (), {"size": size, "crop_size": None})) == side
