"""Calls to other deployments: dead replicas, time limits, streams. Doubles in place of Ray's handles."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError

from addressvlm import InputError
from addressvlm.answers.address_distribution import Prior
from addressvlm.answers.types import Sampling, TextChunk
from serve.backend import Backend
from serve.errors import ApiError
from serve.metrics import ServiceMetrics
from serve.requests import ChatQuery, LocalizeQuery

pytestmark = pytest.mark.xdist_group("serve")
LOCALIZE = LocalizeQuery("toytown", np.zeros((16, 16, 3), np.uint8), 5, Prior(), None)
CHAT = ChatQuery("toytown", [], [], Sampling())


class Handle:
    """Calls methods of a double and records the calls with their options."""

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
    metrics: ServiceMetrics, multiplexed: bool = False, timeout_s: float = 60, **methods: Callable[..., Any]
) -> tuple[Backend, list[Any]]:
    calls: list[Any] = []
    return Backend(Handle(calls, **methods), Handle(calls, **methods), metrics, multiplexed, timeout_s), calls


def dies(times: int, answer: Any) -> Callable[..., Any]:
    """A method whose replica dies the first `times` calls."""
    deaths = [times]

    async def method(*_: Any) -> Any:
        deaths[0] -= 1
        if deaths[0] >= 0:
            raise RayActorError
        return answer

    return method


def retries(metrics: ServiceMetrics) -> float:
    return sum(s.value for m in metrics.collect() for s in m.samples if s.name == "addressvlm_retries_total")


def test_a_call_to_a_dead_replica_is_retried_once() -> None:
    metrics = ServiceMetrics()
    front, calls = backend(metrics, localize=dies(1, "result"))
    assert asyncio.run(front.localize(LOCALIZE)) == "result"
    assert (len(calls), retries(metrics)) == (2, 1)
    front, calls = backend(ServiceMetrics(), localize=dies(2, "result"))
    with pytest.raises(ApiError) as caught:
        asyncio.run(front.localize(LOCALIZE))
    assert (caught.value.status, len(calls)) == (503, 2)


def test_a_call_that_takes_too_long_is_overloaded() -> None:
    async def never(*_: Any) -> Any:
        return await asyncio.get_running_loop().create_future()

    front, _ = backend(ServiceMetrics(), timeout_s=0.01, chat=never)
    with pytest.raises(ApiError) as caught:
        asyncio.run(front.chat(CHAT))
    assert (caught.value.status, caught.value.code) == (503, "overloaded")


def test_errors_that_come_as_values_are_raised() -> None:
    async def refuses(*_: Any) -> Any:
        return InputError("no such street")

    front, calls = backend(ServiceMetrics(), localize=refuses)
    with pytest.raises(ApiError, match="no such street") as caught:
        asyncio.run(front.localize(LOCALIZE))
    assert (caught.value.status, len(calls)) == (400, 1)


def test_requests_go_where_their_city_is_loaded() -> None:
    for multiplexed, options in ((True, {"multiplexed_model_id": "toytown"}), (False, {})):
        front, calls = backend(ServiceMetrics(), multiplexed, localize=dies(0, 1), chat=dies(0, 1))
        asyncio.run(front.localize(LOCALIZE))
        asyncio.run(front.chat(CHAT))
        assert calls == [("localize", options), ("chat", options)]


def test_photos_are_read_at_the_models_image_size_which_is_requested_once() -> None:
    front, calls = backend(ServiceMetrics(), image_size=dies(0, 336), read=dies(0, "pixels"))

    async def read_two() -> list[Any]:
        return [await front.read_image(b"one"), await front.read_image("two")]

    assert asyncio.run(read_two()) == ["pixels", "pixels"]
    assert calls == [("image_size", {}), ("read", 336, {}), ("read", 336, {})]


def received(front: Backend) -> list[Any]:
    async def listen() -> list[Any]:
        chunks: list[Any] = []
        try:
            async for chunk in await front.stream_chat(CHAT):
                chunks.append(chunk.text)
        except Exception as error:
            chunks.append(error)
        return chunks

    return asyncio.run(listen())


def test_a_stream_is_retried_only_before_its_first_chunk() -> None:
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
    front, calls = backend(metrics, True, stream_chat=stream)
    assert received(front) == ["a", "b", "c"]
    assert calls == [("stream_chat", {"multiplexed_model_id": "toytown", "stream": True})] * 2
    assert retries(metrics) == 1
    *chunks, error = received(front)
    assert chunks == ["a", "b"]
    assert isinstance(error, RayActorError)
    assert len(tries) == 3


def test_a_stream_that_is_refused_or_stalls() -> None:
    async def refused(_: ChatQuery) -> AsyncIterator[Any]:
        yield InputError("too long")

    (error,) = received(backend(ServiceMetrics(), stream_chat=refused)[0])
    assert isinstance(error, ApiError)
    assert error.status == 400

    async def stalls(_: ChatQuery) -> AsyncIterator[Any]:
        yield TextChunk(0, "a")
        await asyncio.get_running_loop().create_future()

    chunk, error = received(backend(ServiceMetrics(), timeout_s=0.2, stream_chat=stalls)[0])
    assert chunk == "a"
    assert isinstance(error, TimeoutError)
