"""What the model's thread does where memory, places or the device end, without Ray."""

import time
from collections.abc import Sequence
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from PIL import Image

import serve as service
from addressvlm.answers.address_distribution import Localization, Prior
from addressvlm.inference import Localizer
from serve.cities import find_cities
from serve.engine import Engine
from serve.errors import ApiError
from serve.metrics import ServiceMetrics
from serve.requests import LocalizeQuery
from tests.support.engine_requests import PIXELS, chat, chat_query, jobs_of, localize, pixels, settings

pytestmark = pytest.mark.xdist_group("serve")


def test_memory_for_photos_is_shared_by_the_cities_of_a_replica(systems: list[Path]) -> None:
    config = service.ServiceSettings(cities=[str(s) for s in systems], dtype="float32", photo_memory_mb=8, cities_per_replica=4)
    engine = Engine(config, find_cities(config))
    assert engine.cities.acquire("toytown").photo_caches.max_bytes == 4 * 2**20


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
