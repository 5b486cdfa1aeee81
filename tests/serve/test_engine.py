"""Requests of one batch are answered as each alone, in order: two cities on one tiny base, without Ray."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import serve as service
from addressvlm import InputError
from addressvlm.answers.address_distribution import Circle, Localization, Prior
from addressvlm.answers.calibration import Calibration
from addressvlm.answers.chat_model import input_size
from addressvlm.answers.generate import AnswerText, completion
from addressvlm.answers.types import Completion, Sampling
from addressvlm.config.train import ModelConfig, PartConfig
from addressvlm.inference import Localizer
from addressvlm.models.loading import load_model
from addressvlm.models.lora import attach_lora
from serve import city_models
from serve.cities import find_cities
from serve.engine import Engine, Job
from serve.errors import ApiError
from serve.metrics import ServiceMetrics
from serve.requests import ChatQuery, LocalizeQuery
from tests.support.running_service import two_cities
from tests.support.tiny import tiny_llava

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


def jobs_of(
    engine: Engine, prepare: Callable[..., Job], queries: Sequence[Any], put: Callable[[int, Any], None]
) -> dict[int, Job]:
    """The submitted jobs of queries that can be answered, by number; errors of others are put."""
    jobs = {}
    for number, query in enumerate(queries):
        try:
            jobs[number] = prepare(engine.cities.acquire(query.city), query, partial(put, number))
        except (InputError, ApiError) as error:
            put(number, error)
        else:
            engine.submit(jobs[number])
        engine.cities.release(query.city)
    return jobs


def localize(engine: Engine, queries: Sequence[LocalizeQuery]) -> list[Any]:
    """Results or errors, of jobs that wait together."""
    results: dict[int, Any] = {}
    jobs = jobs_of(engine, engine.prepare_localize, queries, results.__setitem__)
    while engine.turn():
        pass
    return [jobs[n].result(r) if isinstance(r := results[n], np.ndarray) else r for n in range(len(queries))]


def chat(engine: Engine, queries: Sequence[ChatQuery]) -> list[Any]:
    """Answers or errors, of jobs that wait together."""
    answers: list[Any] = [[[] for _ in range(query.sampling.n)] for query in queries]
    texts: dict[Any, AnswerText] = {}

    def put(number: int, result: Any) -> None:
        if isinstance(result, Exception):
            answers[number] = result
        elif isinstance(result, np.ndarray):
            answers[number] = [jobs[number].result(result)]
        else:
            for answer, token in result:
                if chunk := texts.setdefault(answer, AnswerText(answer)).add(token):
                    answers[number][chunk.index].append(chunk)

    jobs = jobs_of(engine, engine.prepare_chat, queries, put)
    while engine.turn():
        pass
    return [a if isinstance(a, Exception) else [completion(chunks) for chunks in a] for a in answers]


def same(result: Localization | Exception, single: Localization | Exception) -> None:
    assert isinstance(result, Localization)
    assert isinstance(single, Localization)
    assert (result.known, result.threshold) == (single.known, single.threshold)
    assert [c.street for c in result.candidates] == [c.street for c in single.candidates]
    assert [c.probability for c in result.candidates] == pytest.approx([c.probability for c in single.candidates], rel=1e-3)


def same_answers(result: Sequence[Completion], single: Sequence[Completion], about: Any = None) -> None:
    for one, other in zip(result, single, strict=True):
        assert replace(one, scores=()) == replace(other, scores=()), about
        assert [score.text for score in one.scores] == [score.text for score in other.scores]
        assert [s.log_p for s in one.scores] == pytest.approx([s.log_p for s in other.scores], abs=1e-4)


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


def test_memory_for_photos_is_shared_by_the_cities_of_a_replica(systems: list[Path]) -> None:
    config = service.ServiceSettings(cities=[str(s) for s in systems], dtype="float32", photo_memory_mb=8, cities_per_replica=4)
    engine = Engine(config, find_cities(config))
    assert engine.cities.acquire("toytown").photo_caches.max_bytes == 4 * 2**20


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


def test_chats_wait_until_there_is_room_for_them_and_none_that_never_fits_is_taken(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = [chat_query("Tell me a story.", n, max_tokens=6, n=2, temperature=1.0, seed=n) for n in range(4)]
    alone = [chat(engine, [query])[0] for query in queries]
    length = alone[0][0].prompt_tokens
    monkeypatch.setattr(engine, "cache_tokens", 4 * (length + 6))
    most = []
    step = engine.decoder.step
    monkeypatch.setattr(engine.decoder, "step", lambda: most.append(engine.decoder.cached_tokens()) or step())
    assert chat(engine, queries) == alone
    assert length < max(most) <= engine.cache_tokens
    (refused,) = chat(engine, [chat_query("Tell me a story.", 1, max_tokens=6, n=5)])
    assert isinstance(refused, ApiError)
    assert refused.status == 503


def test_one_for_which_nobody_waits_any_more_frees_its_place(engine: Engine) -> None:
    got: list[Any] = []
    long, photo = (
        chat_query("Tell me a story.", 1, max_tokens=50, temperature=1.0),
        LocalizeQuery("toytown", PIXELS, 1, Prior(), None),
    )
    jobs = jobs_of(engine, engine.prepare_chat, [long], lambda *r: got.append(r))
    engine.turn()
    jobs[0].cancel()
    engine.turn()
    assert len(engine.decoder) == 0
    assert engine._jobs == {}
    before = len(got)
    jobs_of(engine, engine.prepare_localize, [photo], lambda *r: got.append(r))[0].cancel()
    assert not engine.turn()
    assert len(got) == before


def test_an_error_of_the_device_fails_the_health_check_and_all_that_wait(
    systems: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(systems)
    engine = Engine(config, find_cities(config))
    query = LocalizeQuery("toytown", PIXELS, 9, Prior(), None)
    engine.check_health()

    def broken(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    monkeypatch.setattr(Localizer, "score_prompts", broken)
    (failed,) = localize(engine, [query])
    assert isinstance(failed, ApiError)
    assert failed.status == 503
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.check_health()
    engine.start()
    results: Queue[Any] = Queue()
    jobs_of(engine, engine.prepare_localize, [query], lambda *result: results.put(result[1]))
    assert results.get(timeout=60).status == 503


def test_a_fault_of_the_thread_itself_fails_the_health_check_and_running_chats(
    systems: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(systems)
    engine = Engine(config, find_cities(config))
    results: Queue[Any] = Queue()
    jobs_of(engine, engine.prepare_chat, [chat_query("Tell me.", 1)], lambda *result: results.put(result[1]))
    engine.turn()
    while not results.empty():
        results.get()
    monkeypatch.setattr(engine, "_write", lambda: 1 // 0)
    engine.start()
    assert results.get(timeout=60).status == 503
    with pytest.raises(RuntimeError, match="by zero"):
        engine.check_health()


def test_a_stuck_thread_fails_the_health_check(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_turn_began", time.monotonic() - engine.settings.request_s + 60)
    engine.check_health()
    monkeypatch.setattr(engine, "_turn_began", time.monotonic() - engine.settings.request_s - 1)
    with pytest.raises(RuntimeError, match="in one turn for more than 300 s"):
        engine.check_health()


def test_too_little_memory_for_a_batch_is_enough_for_its_halves(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, score = [], Localizer.score_prompts

    def two_at_most(self: Localizer, prompts: Sequence[Any], *more: Any) -> Any:
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(prompts))
        return score(self, prompts, *more)

    monkeypatch.setattr(Localizer, "score_prompts", two_at_most)
    results = localize(engine, [LocalizeQuery("toytown", pixels(seed), 2, Prior(), None) for seed in range(5)])
    assert [isinstance(result, Localization) for result in results] == [True] * 5
    assert sizes == [2, 1, 2]


def test_chats_that_run_out_of_memory_fail_and_the_next_ones_are_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    query = chat_query("Tell me a story.", 1, max_tokens=4)
    expected = chat(engine, [query])
    for broken in ("extend", "prefill"):
        with monkeypatch.context() as patch:
            patch.setattr(Localizer, broken, no_memory)
            errors = chat(engine, [query, chat_query("Tell me.", 2, max_tokens=4)])
        assert [error.status for error in errors] == [503, 503]
        assert (len(engine.decoder), engine._jobs) == (0, {})
        assert chat(engine, [query]) == expected


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


# ---- limits and settings of the engine


def test_no_more_photos_go_through_the_model_together_than_is_set(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, score = [], Localizer.score_prompts
    monkeypatch.setattr(Localizer, "score_prompts", lambda self, *batch: sizes.append(len(batch[0])) or score(self, *batch))
    monkeypatch.setattr(engine.settings, "batch_size", 2)
    assert len(localize(engine, [LocalizeQuery("toytown", pixels(seed), 2, Prior(), None) for seed in range(5)])) == 5
    assert sizes == [2, 2, 1]


def test_no_more_tokens_of_chats_are_read_together_than_is_set_unless_one_has_more(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = [chat_query("Tell me a story.", n, max_tokens=3) for n in range(3)]
    alone = [chat(engine, [query])[0] for query in queries]
    sizes, prefill = [], Localizer.prefill_prompts
    monkeypatch.setattr(Localizer, "prefill_prompts", lambda self, *batch: sizes.append(len(batch[0])) or prefill(self, *batch))
    length = alone[0][0].prompt_tokens
    for most, expected in ((2 * length, [2, 1]), (3 * length - 1, [2, 1]), (3 * length, [3]), (1, [1, 1, 1])):
        sizes.clear()
        monkeypatch.setattr("serve.engine.PREFILL_TOKENS", most)
        assert chat(engine, queries) == alone
        assert sizes == expected


def test_a_chat_that_waits_for_room_and_is_given_up_keeps_no_other_waiting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, large, small = (chat_query("Tell me a story.", 1, max_tokens=n, n=k) for n, k in ((20, 1), (20, 2), (6, 1)))
    length = chat(engine, [small])[0][0].prompt_tokens
    monkeypatch.setattr(engine, "cache_tokens", 2 * (length + 20))
    got: list[int] = []
    jobs_of(engine, engine.prepare_chat, [running], lambda *_: None)
    engine.turn()
    jobs = jobs_of(engine, engine.prepare_chat, [large, small], lambda number, _: got.append(number))
    engine.turn()
    assert got == []
    jobs[0].cancel()
    engine.turn()
    assert 1 in got
    while engine.turn():
        pass
    assert set(got) == {1}


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


def test_a_merged_model_has_all_memory_for_photos_and_its_warm_up_leaves_none(systems: list[Path]) -> None:
    metrics = ServiceMetrics()
    config = service.ServiceSettings(
        model=str(systems[0] / "merged"), dtype="float32", photo_memory_mb=8, chat_memory_mb=1, cities_per_replica=4
    )
    engine = Engine(config, find_cities(config), metrics)
    engine.warm_up()
    (localizer,) = engine.cities.localizers.values()
    assert localizer.photo_caches.max_bytes == 8 * 2**20
    assert not localizer.photo_caches._caches
    assert not any(engine.cities._uses.values())
    ((_, state),) = localizer.prefill_questions([Image.fromarray(PIXELS)], ["Where?"])
    a_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in state.cache.layers) / state.mask.shape[1]
    assert engine.cache_tokens == 2**20 // a_token
    localize(engine, [LocalizeQuery("toytown", pixels(seed), 1, Prior(), None) for seed in range(3)])
    chat(engine, [chat_query("Tell me a story.", seed, max_tokens=1) for seed in range(2)])
    sizes = {s.labels["kind"]: s.value for m in metrics.collect() for s in m.samples if s.name == "addressvlm_batch_size_sum"}
    assert (sizes["localize"], sizes["prefill"]) == (3, 2)
