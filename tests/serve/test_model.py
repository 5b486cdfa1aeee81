"""Requests as jobs of the engine's thread: what callers get, and what they leave behind when they go."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

import serve as service
from addressvlm import InputError
from addressvlm.answers.address_distribution import Localization, Prior
from addressvlm.answers.types import Sampling
from serve.cities import find_cities
from serve.model import Model
from serve.requests import ChatQuery, LocalizeQuery
from tests.support.running_service import two_cities

pytestmark = pytest.mark.xdist_group("serve")
PIXELS = np.random.default_rng(1).integers(0, 255, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    systems = two_cities(tmp_path_factory.mktemp("cities"))
    config = service.ServiceSettings(cities=[str(s) for s in systems], dtype="float32", cities_per_replica=1, batch_size=2)
    return Model(config, find_cities(config))


def photo(city: str = "toytown", **prior: Any) -> LocalizeQuery:
    return LocalizeQuery(city, PIXELS, 2, Prior(**prior), None)


def chat(text: str, city: str = "toytown", **sampling: Any) -> ChatQuery:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    return ChatQuery(city, [turn], [PIXELS], Sampling(**{"max_tokens": 6, **sampling}))


def test_requests_of_several_cities_at_once_are_answered_as_each_alone(model: Model) -> None:
    async def ask() -> tuple[list[Any], list[Any]]:
        def all_of() -> list[Any]:
            cities = ("toytown", "st-alder", "toytown")
            chats = [model.chat(chat("Tell me.", city, n=2, temperature=1.0, seed=3)) for city in cities]
            return [*chats, *(model.localize(photo(city)) for city in cities), model.chat(chat("Which street is this?"))]

        return [await one for one in all_of()], await asyncio.gather(*all_of())

    alone, together = asyncio.run(ask())
    assert alone[:3] == together[:3]
    assert [len(answers) for answers in alone[:3]] == [2, 2, 2]
    for one, other in zip(alone[3:6], together[3:6], strict=True):
        assert isinstance(one, Localization)
        assert one.confidence == pytest.approx(other.confidence, rel=1e-4)
    assert alone[6] == together[6]
    assert alone[0] == alone[2] != alone[1]


def test_a_stream_is_the_whole_answer_and_errors_are_values(model: Model) -> None:
    async def ask() -> tuple[Any, ...]:
        query = chat("Tell me.", temperature=2.0, seed=5, stop=["e"], max_tokens=30)
        chunks = [chunk async for chunk in model.stream_chat(query)]
        refused = [chunk async for chunk in model.stream_chat(chat("Tell. " * 2000))]
        return (
            "".join(c.text for c in chunks),
            (await model.chat(query))[0],
            refused,
            await model.localize(photo(streets=("X",))),
        )

    streamed, whole, (refused,), no_street = asyncio.run(ask())
    assert streamed.strip() == whole.text
    assert isinstance(refused, InputError)
    assert isinstance(no_street, InputError)


def test_a_caller_who_leaves_frees_the_place_and_the_city(model: Model) -> None:
    async def leave() -> None:
        stream = model.stream_chat(chat("Tell me.", temperature=3.0, max_tokens=400))
        await anext(stream)
        await stream.aclose()
        assert not model.engine.cities._uses["toytown"]
        task = asyncio.create_task(model.chat(chat("Tell me.", temperature=3.0, max_tokens=400)))
        await model.localize(photo())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await model.localize(photo("st-alder"))

    asyncio.run(leave())
    model.engine.call(lambda: None)
    assert not any(answer.live for batch in model.engine.decoder._batches for answer in batch.answers)
    assert not any(model.engine.cities._uses.values())
    asyncio.run(model.check_health())


def test_a_caller_who_leaves_while_a_city_is_loaded_does_not_keep_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go_on, cities = threading.Event(), threading.Event(), model.engine.cities
    load = cities._load

    def slow(city: str) -> Any:
        reading.set()
        assert go_on.wait(60)
        return load(city)

    async def leave() -> Any:
        await model.localize(photo())
        await asyncio.to_thread(cities._evict)  # both are loaded if an earlier test used them at the same time
        monkeypatch.setattr(cities, "_load", slow)
        task = asyncio.create_task(model.localize(photo("st-alder")))
        assert await asyncio.to_thread(reading.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        return await model.localize(photo("st-alder"))

    assert isinstance(asyncio.run(leave()), Localization)
    assert not any(cities._uses.values())


def test_a_city_that_can_not_be_loaded_is_not_the_callers_fault(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(city: str) -> Any:
        raise InputError("no adapter that can be read")

    cities = model.engine.cities
    monkeypatch.setattr(cities, "acquire_loaded", lambda city: None)
    monkeypatch.setattr(cities, "acquire", broken)
    for ask in (lambda: model.localize(photo()), lambda: model.chat(chat("Tell me."))):
        with pytest.raises(RuntimeError, match="no adapter that can be read"):
            asyncio.run(ask())
