"""Requests of one batch are answered as each alone, in order: two cities on one tiny base, without Ray."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from addressvlm import InputError
from addressvlm.answers.address_distribution import Circle, Localization, Prior
from addressvlm.answers.calibration import Calibration
from addressvlm.answers.chat_model import input_size
from addressvlm.answers.types import Sampling
from addressvlm.config.train import ModelConfig, PartConfig
from addressvlm.inference import Localizer
from addressvlm.models.loading import load_model
from addressvlm.models.lora import attach_lora
from serve import city_models
from serve.cities import find_cities
from serve.engine import Engine
from serve.requests import ChatQuery, LocalizeQuery
from tests.support.engine_requests import PIXELS, chat, chat_query, jobs_of, localize, pixels, same, same_answers, settings
from tests.support.tiny import tiny_llava

pytestmark = pytest.mark.xdist_group("serve")


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
    single = [localize(engine, [query])[0] for query in queries]
    assert len({str(result) for result in single}) == len(queries)
    assert [result.threshold for result in single if isinstance(result, Localization)] == [0.9, 0.0, 0.0, 1.0, 0.3, 0.2]
    assert [len(result.candidates) for result in single if isinstance(result, Localization)] == [4, 1, 2, 3, 2, 4]
    for one, other in zip(localize(engine, queries), single, strict=True):
        same(one, other)
    for one, other in zip(localize(engine, queries[::-1]), single[::-1], strict=True):
        same(one, other)


def test_photos_of_all_cities_go_through_the_model_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, score = [], Localizer.score_prompts
    monkeypatch.setattr(Localizer, "score_prompts", lambda self, *batch: sizes.append(len(batch[0])) or score(self, *batch))
    localize(
        engine, [LocalizeQuery(city, pixels(3), 1, Prior(), None) for city in ("toytown", "st-alder", "toytown", "toytown")]
    )
    assert sizes == [4]


def test_a_bad_prior_fails_alone_and_leaves_the_others_one_batch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = [LocalizeQuery("toytown", pixels(seed), 2, Prior(), None) for seed in (1, 2, 3)]
    single = [localize(engine, [query])[0] for query in fine]
    sizes, score = [], Localizer.score_prompts
    monkeypatch.setattr(Localizer, "score_prompts", lambda self, *batch: sizes.append(len(batch[0])) or score(self, *batch))
    first, refused, second, third = localize(
        engine, [fine[0], LocalizeQuery("toytown", pixels(4), 2, Prior(streets=("Elm Row",)), None), *fine[1:]]
    )
    assert isinstance(refused, InputError)
    assert sizes == [3]
    for result, expected in zip((first, second, third), single, strict=True):
        same(result, expected)


def test_a_threshold_of_0_counts_every_answer_of_a_calibrated_model(engine: Engine) -> None:
    result = [localize(engine, [LocalizeQuery("toytown", pixels(1), 1, Prior(), threshold)])[0] for threshold in (None, 0.0)]
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
    single = [chat(engine, [question])[0] for question in MIXED]
    assert not [result for result in single if isinstance(result, Exception)]
    assert len({result[0].text for result in single if not isinstance(result, Exception)}) > len(MIXED) / 2
    together = chat(engine, MIXED)
    for question, result, expected in zip(MIXED, together, single, strict=True):
        same_answers(result, expected, question.messages)
    for result, expected in zip(chat(engine, MIXED[::-1]), together[::-1], strict=True):
        same_answers(result, expected)


def test_alike_chats_go_through_the_model_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, prefill = [], Localizer.prefill
    monkeypatch.setattr(
        Localizer,
        "prefill",
        lambda self, inputs, models: prompts.append(len(inputs["input_ids"])) or prefill(self, inputs, models),
    )
    chat(engine, [question for question in MIXED if question.sampling == Sampling(6) and len(question.images) == 1])
    assert sorted(prompts) == [1, 4, 4]  # photos: two of the same plain questions about one, the others, those about addresses


def test_a_temperature_is_of_its_own_question(engine: Engine) -> None:
    cold, hot = (
        chat_query("Tell me a story.", 1, max_tokens=8),
        chat_query("Tell me a story.", 1, max_tokens=8, temperature=9.0),
    )
    (greedy,) = chat(engine, [cold])[0]
    for seed in range(2):
        torch.manual_seed(seed)
        (first,), (one,), (two,), (other,) = chat(engine, [hot, cold, cold, hot])
        assert one.text == two.text == greedy.text
        assert len({first.text, other.text, greedy.text}) == 3


@pytest.mark.parametrize("special", [{"seed": 3}, {"top_p": 1e-6}])
def test_a_seed_and_top_p_hold_in_a_batch_too(engine: Engine, special: dict[str, Any]) -> None:
    one, other = (chat_query("Tell me a story.", 1, temperature=9.0, **more) for more in (special, {}))
    alone = chat(engine, [one])[0]
    assert chat(engine, [other, one, other])[1] == alone


def test_only_plain_questions_are_answered_by_probabilities(engine: Engine) -> None:
    plain = chat(engine, [chat_query("Which street is this?", 1, max_tokens=60)])[0][0]
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
        assert chat(engine, [free])[0][0].tokens == 1


def test_a_prompts_length_is_known_before_it_is_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for question in (
        chat_query("Hello."),
        chat_query("Hello.", 1),
        chat_query("Hello.", 1, 2),
        chat_query("Which street is this?", 1, stop=["x"]),
    ):
        (read,) = chat(engine, [question])[0]
        monkeypatch.setattr(engine, "context_length", read.prompt_tokens + 2)
        assert chat(engine, [question])[0][0].tokens <= 2
        monkeypatch.setattr(engine, "context_length", read.prompt_tokens)
        (refused,) = chat(engine, [question])
        assert isinstance(refused, InputError)
        assert f"has {read.prompt_tokens} tokens" in str(refused)
        monkeypatch.undo()


# ---- adapters of several cities


def test_each_city_answers_as_its_merged_model(systems: list[Path]) -> None:
    config = settings(systems)
    engine = Engine(config, find_cities(config))
    query = ChatQuery(
        "", [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Tell."}]}], [PIXELS], Sampling(6)
    )
    for city in ("toytown", "st-alder", "toytown"):
        merged = Localizer(systems[0 if city == "toytown" else 1] / "merged")
        expected = merged.localize(Image.fromarray(PIXELS), top_k=None)
        (result,) = localize(engine, [LocalizeQuery(city, PIXELS, 9, Prior(), None)])
        assert [c.street for c in result.candidates] == [c.street for c in expected.candidates]
        assert result.confidence == pytest.approx(expected.confidence, rel=1e-3)
        (expected_answer,) = merged.chat(query.messages, [Image.fromarray(PIXELS)], query.sampling)
        (answer,) = chat(engine, [ChatQuery(city, query.messages, query.images, query.sampling)])
        assert answer[0].text == expected_answer.text


def test_cities_in_one_batch_do_not_mix(systems: list[Path]) -> None:
    config = settings(systems)
    engine = Engine(config, find_cities(config))
    cities = ["toytown", "st-alder", "toytown", "st-alder"]
    photos = np.random.default_rng(2).integers(0, 255, (4, 40, 60, 3), dtype=np.uint8)
    queries = [LocalizeQuery(city, pixels, 9, Prior(), None) for city, pixels in zip(cities, photos, strict=True)]
    separate = [localize(engine, [query])[0] for query in queries]
    engine = Engine(config, find_cities(config))  # that remembers no photo
    together = localize(engine, queries)
    assert [t.confidence for t in together] == pytest.approx([a.confidence for a in separate], rel=1e-4)
    assert len({round(a.confidence, 4) for a in separate}) == 4
    bad = LocalizeQuery("toytown", PIXELS, 9, Prior(streets=("Elm Row",)), None)
    refused, fine = localize(engine, [bad, queries[0]])
    assert isinstance(refused, InputError)
    assert fine.confidence == pytest.approx(separate[0].confidence, rel=1e-4)


def test_the_city_used_least_recently_is_evicted_unless_a_request_needs_it(systems: list[Path]) -> None:
    config = settings(systems, cities_per_replica=1)
    engine = Engine(config, find_cities(config))
    query = LocalizeQuery("toytown", PIXELS, 9, Prior(), None)
    before = localize(engine, [query])[0]
    other = LocalizeQuery("st-alder", PIXELS, 1, Prior(), None)
    localize(engine, [other])
    assert list(engine.cities.localizers) == ["st-alder"]
    assert localize(engine, [query])[0].confidence == pytest.approx(before.confidence, rel=1e-5)
    assert list(engine.cities.localizers) == ["toytown"]
    engine.cities.acquire("toytown")
    localize(engine, [other])
    assert list(engine.cities.localizers) == ["toytown", "st-alder"]
    engine.cities.release("toytown")
    localize(engine, [other])
    engine.cities.acquire("st-alder")
    assert localize(engine, [query])[0].confidence == pytest.approx(before.confidence, rel=1e-5)


def test_requests_are_answered_while_an_adapter_is_read(systems: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(systems)
    engine = Engine(config, find_cities(config))
    localize(engine, [LocalizeQuery("toytown", PIXELS, 1, Prior(), None)])
    reading, go_on = threading.Event(), threading.Event()
    read = city_models.load_peft_weights

    def slow(*args: Any, **more: Any) -> Any:
        reading.set()
        assert go_on.wait(60)
        return read(*args, **more)

    monkeypatch.setattr(city_models, "load_peft_weights", slow)
    engine.start()
    with ThreadPoolExecutor(1) as loader:
        loading = loader.submit(engine.cities.acquire, "st-alder")
        assert reading.wait(60)
        results: Queue[Any] = Queue()
        query = LocalizeQuery("toytown", pixels(1), 1, Prior(), None)
        jobs_of(engine, engine.prepare_localize, [query], lambda *result: results.put(result[1]))
        assert results.get(timeout=60).shape == (4,)
        assert not loading.done()
        go_on.set()
        assert loading.result() is engine.cities.localizers["st-alder"]


def test_an_adapter_of_another_base_is_refused_and_the_others_stay(systems: list[Path], tmp_path: Path) -> None:
    wider = tiny_llava(tmp_path / "base", side=48)
    model, _ = attach_lora(load_model(str(wider))[0], ModelConfig(base=str(wider), vision=PartConfig(full=True)))
    model.save_pretrained(tmp_path / "adapter")
    config = settings(systems)
    engine = Engine(config, find_cities(config))
    query = LocalizeQuery("toytown", PIXELS, 9, Prior(), None)
    for loaded_before in (False, True):
        if loaded_before:
            before = localize(engine, [query])[0]
        engine.cities.cities["st-alder"] = replace(engine.cities.cities["st-alder"], adapter=tmp_path / "adapter")
        with pytest.raises(InputError, match=f"was trained on {wider} .*serve it on that one"):
            engine.cities.acquire("st-alder")
    assert localize(engine, [query])[0].confidence == before.confidence


def test_a_question_that_is_too_long_fails_alone(systems: list[Path]) -> None:
    config = settings(systems)
    engine = Engine(config, find_cities(config))

    def question(text: str, max_tokens: int) -> ChatQuery:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return ChatQuery("toytown", [turn], [PIXELS], Sampling(max_tokens))

    short = question("Tell.", 6)
    single = chat(engine, [short])[0]
    engine.context_length = single[0].prompt_tokens + 6
    (expected_answer,), refused, (cut,) = chat(engine, [short, question("Tell. " * 50, 6), question("Tell me.", 6)])
    assert expected_answer.text == single[0].text
    assert isinstance(refused, InputError)
    assert cut.tokens < 6


def test_photos_and_short_answers_of_another_city_do_not_wait_for_a_long_answer(systems: list[Path]) -> None:
    config = settings(systems)
    engine = Engine(config, find_cities(config))
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Tell."}]}]
    (alone,) = chat(engine, [ChatQuery("toytown", turn, [PIXELS], Sampling(40, 2.0, seed=1))])
    order: list[str] = []
    long = ChatQuery("toytown", turn, [PIXELS], Sampling(40, 2.0, seed=1))
    short = ChatQuery("st-alder", turn, [PIXELS], Sampling(1))
    ids: list[int] = []

    def put_long(_: int, tokens: Any) -> None:
        order.append("long")
        ids.extend(token.id for _, token in tokens)

    jobs_of(engine, engine.prepare_chat, [long], put_long)
    engine.turn()
    jobs_of(engine, engine.prepare_chat, [short], lambda *_: order.append("short"))
    jobs_of(
        engine, engine.prepare_localize, [LocalizeQuery("st-alder", PIXELS, 1, Prior(), None)], lambda *_: order.append("photo")
    )
    while engine.turn():
        pass
    assert order[:4] == ["long", "long", "photo", "short"]
    assert len(ids) == alone[0].tokens > 5
    localizer = engine.cities.localizers["toytown"]
    assert localizer.decode([token for token in ids if token not in localizer.end_tokens]).strip() == alone[0].text


def test_answers_of_two_cities_are_one_batch(systems: list[Path]) -> None:
    config = settings(systems)
    engine = Engine(config, find_cities(config))
    queries = [chat_query("Tell me a story.", n, city=("toytown", "st-alder")[n % 2], max_tokens=9) for n in range(6)]
    alone = [chat(engine, [query])[0] for query in queries]
    jobs_of(engine, engine.prepare_chat, queries, lambda *_: None)
    engine.turn()
    assert len(engine.decoder._batches) == 1
    while engine.turn():
        pass
    assert chat(engine, queries) == alone
    assert len({answers[0].text for answers in alone}) > 3


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


def test_answers_from_probabilities_keep_to_max_tokens(engine: Engine) -> None:
    whole, cut, one = (chat(engine, [chat_query("Which street is this?", 1, max_tokens=n)])[0][0] for n in (30, 2, 1))
    assert (whole.finish, cut.finish, one.finish, cut.tokens, one.tokens) == ("stop", "length", "length", 2, 1)
    assert whole.text.startswith(cut.text)
    assert len(one.text) <= len(cut.text) < len(whole.text)


# ---- settings


def test_questions_about_the_address_are_generated_if_that_is_set(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    query = chat_query("Which street is this?", 1, max_tokens=40)
    exact = chat(engine, [query])[0][0]
    monkeypatch.setattr(engine.settings, "exact_answers", False)
    generated = chat(engine, [query])[0][0]
    assert generated.text != exact.text
    assert generated.prompt_tokens == exact.prompt_tokens


def test_the_last_turn_is_the_question(engine: Engine) -> None:
    (best,) = localize(engine, [LocalizeQuery("toytown", pixels(1), 1, Prior(), None)])

    def turn(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    before = [turn("user", "Hello."), turn("assistant", "Hello.")]
    asked = chat(engine, [chat_query("Which street is this?", 1, before=before, max_tokens=30)])[0][0]
    assert (asked.text, asked.finish) == (best.candidates[0].street, "stop")
    before = [turn("user", "Which street is this?"), turn("assistant", "Mill Street")]
    other = chat(engine, [chat_query("Tell me a story.", 1, before=before, max_tokens=30)])[0][0]
    assert other.text not in {"Mill Street", "Oak Avenue", "Quay Lane", "Station Road"}


def test_the_models_own_prior_is_divided_out_of_addresses_and_answers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    localizer = engine.cities.acquire("toytown")
    engine.cities.release("toytown")
    streets = [address.street for address in localizer.require_gazetteer().addresses]
    for number, street in enumerate(streets):
        own = tuple(-1000.0 if n == number else 0.0 for n in range(len(streets)))
        monkeypatch.setattr(localizer, "calibration", Calibration(2.0, own_prior=own))
        (found,) = localize(engine, [LocalizeQuery("toytown", pixels(1), 1, Prior(), None)])
        assert (found.candidates[0].street, found.confidence) == (street, pytest.approx(1))
        assert chat(engine, [chat_query("Which street is this?", 1, max_tokens=30)])[0][0].text == street
