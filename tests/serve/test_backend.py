"""The front's calls to other deployments: dead replicas, long waits, streams. Handles of this process in Ray's place."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError

from addressvlm import InputError
from addressvlm.answers.priors import Prior
from addressvlm.answers.types import Sampling, TextChunk
from serve.backend import Backend
from serve.errors import ApiError
from serve.metrics import ServiceMetrics
from serve.requests import ChatQuery, LocalizeQuery

pytestmark = pytest.mark.xdist_group("serve")
WHERE = LocalizeQuery("toytown", np.zeros((16, 16, 3), np.uint8), 5, Prior(), None)
QUESTION = ChatQuery("toytown", [], [], Sampling())


class Handle:
    """Calls methods of a double, and notes which were called with which options."""

    def __init__(self, calls: list[Any], options: dict[str, Any] | None = None, **methods: Callable[..., Any]) -> None:
        self._calls, self._options, self._methods = calls, options or {}, methods

    def options(self, **options: Any) -> "Handle":
        return Handle(self._calls, self._options | options, **self._methods)

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any) -> Any:
            self._calls.append((name, *args[1:], self._options))
            return self._methods[name](*args)

        return type("Method", (), {"remote": staticmethod(remote)})


def backend(
    metrics: ServiceMetrics, several: bool = False, request_s: float = 60, **methods: Callable[..., Any]
) -> tuple[Backend, list[Any]]:
    calls: list[Any] = []
    return Backend(Handle(calls, **methods), Handle(calls, **methods), metrics, several, request_s), calls


def dies(times: int, answer: Any) -> Callable[..., Any]:
    """A method whose replica dies under it so many times."""
    left = [times]

    async def method(*_: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise RayActorError
        return answer

    return method


def retries(metrics: ServiceMetrics) -> float:
    return sum(s.value for m in metrics.collect() for s in m.samples if s.name == "addressvlm_retries_total")


def test_what_a_dead_replica_lost_is_asked_again_once() -> None:
    metrics = ServiceMetrics()
    asked, calls = backend(metrics, localize=dies(1, "found"))
    assert asyncio.run(asked.localize(WHERE)) == "found"
    assert (len(calls), retries(metrics)) == (2, 1)
    asked, calls = backend(ServiceMetrics(), localize=dies(2, "found"))
    with pytest.raises(ApiError) as caught:
        asyncio.run(asked.localize(WHERE))
    assert (caught.value.status, len(calls)) == (503, 2)


def test_what_waits_too_long_is_given_up() -> None:
    async def never(*_: Any) -> Any:
        return await asyncio.get_running_loop().create_future()

    asked, _ = backend(ServiceMetrics(), request_s=0.01, chat=never)
    with pytest.raises(ApiError) as caught:
        asyncio.run(asked.chat(QUESTION))
    assert (caught.value.status, caught.value.code) == (503, "overloaded")


def test_refusals_come_as_values_and_are_raised() -> None:
    async def refuses(*_: Any) -> Any:
        return InputError("no such street")

    asked, calls = backend(ServiceMetrics(), localize=refuses)
    with pytest.raises(ApiError, match="no such street") as caught:
        asyncio.run(asked.localize(WHERE))
    assert (caught.value.status, len(calls)) == (400, 1)


def test_requests_go_where_their_city_is_loaded() -> None:
    for several, options in ((True, {"multiplexed_model_id": "toytown"}), (False, {})):
        asked, calls = backend(ServiceMetrics(), several, localize=dies(0, 1), chat=dies(0, 1))
        asyncio.run(asked.localize(WHERE))
        asyncio.run(asked.chat(QUESTION))
        assert calls == [("localize", options), ("chat", options)]


def test_photos_are_read_at_the_side_of_the_model_which_is_asked_for_once() -> None:
    asked, calls = backend(ServiceMetrics(), image_size=dies(0, 336), read=dies(0, "pixels"))

    async def both() -> list[Any]:
        return [await asked.read_image(b"one"), await asked.read_image("two")]

    assert asyncio.run(both()) == ["pixels", "pixels"]
    assert calls == [("image_size", {}), ("read", 336, {}), ("read", 336, {})]


def told(asked: Backend) -> list[Any]:
    async def listen() -> list[Any]:
        found: list[Any] = []
        try:
            async for piece in await asked.stream_chat(QUESTION):
                found.append(piece.text)
        except Exception as error:
            found.append(error)
        return found

    return asyncio.run(listen())


def test_a_stream_begins_anew_only_before_its_first_piece() -> None:
    tries = []

    async def stream(_: ChatQuery) -> AsyncIterator[Any]:
        tries.append(1)
        if len(tries) == 1:
            raise RayActorError
        yield TextChunk(0, "a")
        yield TextChunk(0, "b")
        if len(tries) == 3:
            raise RayActorError
        yield TextChunk(0, "c")

    metrics = ServiceMetrics()
    asked, calls = backend(metrics, True, stream_chat=stream)
    assert told(asked) == ["a", "b", "c"]
    assert calls == [("stream_chat", {"multiplexed_model_id": "toytown", "stream": True})] * 2
    assert retries(metrics) == 1
    *pieces, error = told(asked)
    assert pieces == ["a", "b"]
    assert isinstance(error, RayActorError)
    assert len(tries) == 3


def test_a_stream_that_is_refused_or_stands_still() -> None:
    async def refused(_: ChatQuery) -> AsyncIterator[Any]:
        yield InputError("too long")

    (error,) = told(backend(ServiceMetrics(), stream_chat=refused)[0])
    assert isinstance(error, ApiError)
    assert error.status == 400

    async def stands(_: ChatQuery) -> AsyncIterator[Any]:
        yield TextChunk(0, "a")
        await asyncio.get_running_loop().create_future()

    piece, error = told(backend(ServiceMetrics(), request_s=0.2, stream_chat=stands)[0])
    assert piece == "a"
    assert isinstance(error, TimeoutError)
