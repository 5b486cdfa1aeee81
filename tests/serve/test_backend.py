"""Calls to other deployments: dead replicas, time limits, cancellation, streams. Doubles in place of Ray's handles."""

import asyncio
from collections.abc import AsyncIterator, Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError

from addressvlm import InputError
from addressvlm.answers.address_distribution import Prior
from addressvlm.answers.types import Sampling, TextChunk
from serve.backend import Backend
from serve.errors import ApiError
from serve.requests import ChatQuery, LocalizeQuery
from tests.support import in_process_service

pytestmark = pytest.mark.xdist_group("serve")
LOCALIZE = LocalizeQuery("toytown", np.zeros((16, 16, 3), np.uint8), 5, Prior(), None)
CHAT = ChatQuery("toytown", [], [], Sampling())


class Response(in_process_service.Response):
    """One that begins when it is awaited, and remembers that it was cancelled."""

    def __init__(self, result: Any) -> None:
        self.result, self.cancelled = result, False

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Calls methods of a double and records the calls with their options, and their responses."""

    def __init__(self, calls: list[Any], options: dict[str, Any] | None = None, **methods: Callable[..., Any]) -> None:
        self._calls, self._options, self._methods = calls, options or {}, methods
        self._responses: list[Response] = []

    def options(self, **options: Any) -> "Handle":
        handle = Handle(self._calls, self._options | options, **self._methods)
        handle._responses = self._responses
        return handle

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any) -> Any:
            self._calls.append((name, *args[1:], self._options))
            self._responses.append(Response(self._methods[name](*args)))
            return self._responses[-1]

        return type("Method", (), {"remote": staticmethod(remote)})


def backend(multiplexed: bool = False, timeout_s: float = 60, **methods: Callable[..., Any]) -> tuple[Backend, list[Any]]:
    calls: list[Any] = []
    return Backend(Handle(calls, **methods), Handle(calls, **methods), multiplexed, timeout_s), calls


def gives(result: Any) -> Callable[..., Any]:
    """A method that returns a result, or raises it."""

    async def method(*_: Any) -> Any:
        if isinstance(result, BaseException):
            raise result
        return result

    return method


def test_what_killed_a_replica_is_not_asked_again() -> None:
    front, calls = backend(localize=gives(RayActorError()))
    with pytest.raises(ApiError) as caught:
        asyncio.run(front.localize(LOCALIZE))
    assert (caught.value.status, len(calls)) == (503, 1)


def test_a_call_that_takes_too_long_is_overloaded() -> None:
    async def never(*_: Any) -> Any:
        return await asyncio.get_running_loop().create_future()

    front, _ = backend(timeout_s=0.01, chat=never)
    with pytest.raises(ApiError) as caught:
        asyncio.run(front.chat(CHAT))
    assert (caught.value.status, caught.value.code) == (503, "overloaded")
    assert [response.cancelled for response in front.model._responses] == [True]


def test_a_call_whose_caller_left_is_cancelled() -> None:
    async def leave() -> Backend:
        asked = asyncio.Event()

        async def never(*_: Any) -> Any:
            asked.set()
            return await asyncio.get_running_loop().create_future()

        front, _ = backend(localize=never)
        task = asyncio.create_task(front.localize(LOCALIZE))
        await asked.wait()
        task.cancel()
        await asyncio.wait([task])
        return front

    assert asyncio.run(leave()).model._responses[0].cancelled


def test_errors_that_come_as_values_are_raised() -> None:
    async def refuses(*_: Any) -> Any:
        return InputError("no such street")

    front, calls = backend(localize=refuses)
    with pytest.raises(ApiError, match="no such street") as caught:
        asyncio.run(front.localize(LOCALIZE))
    assert (caught.value.status, len(calls)) == (400, 1)


def test_requests_go_where_their_city_is_loaded() -> None:
    for multiplexed, options in ((True, {"multiplexed_model_id": "toytown"}), (False, {})):
        front, calls = backend(multiplexed, localize=gives(1), chat=gives(1))
        asyncio.run(front.localize(LOCALIZE))
        asyncio.run(front.chat(CHAT))
        assert calls == [("localize", options), ("chat", options)]


def test_photos_are_read_at_the_models_image_size_which_is_requested_once() -> None:
    front, calls = backend(image_size=gives(336), read=gives("pixels"))

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


def test_a_stream_that_breaks_off_is_not_asked_again() -> None:
    async def stream(_: ChatQuery) -> AsyncIterator[Any]:
        yield TextChunk(0, "a")
        yield TextChunk(0, "b")
        raise RayActorError

    front, calls = backend(True, stream_chat=stream)
    *chunks, error = received(front)
    assert chunks == ["a", "b"]
    assert isinstance(error, RayActorError)
    assert calls == [("stream_chat", {"multiplexed_model_id": "toytown", "stream": True})]


def test_a_stream_whose_caller_left_is_cancelled() -> None:
    async def stream(_: ChatQuery) -> AsyncIterator[Any]:
        while True:
            yield TextChunk(0, "a")

    async def leave() -> Backend:
        front, _ = backend(stream_chat=stream)
        chunks: Any = await front.stream_chat(CHAT)
        await anext(chunks)
        await chunks.aclose()
        return front

    assert asyncio.run(leave()).model._responses[0].cancelled


def test_a_stream_that_is_refused_or_stalls() -> None:
    async def refused(_: ChatQuery) -> AsyncIterator[Any]:
        yield InputError("too long")

    (error,) = received(backend(stream_chat=refused)[0])
    assert isinstance(error, ApiError)
    assert error.status == 400

    async def stalls(_: ChatQuery) -> AsyncIterator[Any]:
        yield TextChunk(0, "a")
        await asyncio.get_running_loop().create_future()

    chunk, error = received(backend(timeout_s=0.2, stream_chat=stalls)[0])
    assert chunk == "a"
    assert isinstance(error, TimeoutError)


def test_replicas_that_run_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model, of this application; not those that start or stop."""
    state = Enum("State", {"UP": "RUNNING", "COMING": "STARTING"})
    states = {state["UP"]: 2, "RUNNING": 1, state["COMING"]: 4, "STOPPING": 8}
    deployments = {
        "Localizer": SimpleNamespace(replica_states=states),
        "Images": SimpleNamespace(replica_states={"RUNNING": 16}),
    }
    idle = {"Localizer": SimpleNamespace(replica_states={"RUNNING": 32})}
    applications = {"ours": SimpleNamespace(deployments=deployments), "other": SimpleNamespace(deployments=idle)}
    monkeypatch.setattr("serve.backend.serve.get_replica_context", lambda: SimpleNamespace(app_name="ours"))
    monkeypatch.setattr("serve.backend.serve.status", lambda: SimpleNamespace(applications=applications))
    front, _ = backend()
    assert asyncio.run(front.running_replicas()) == 3


def test_metrics_are_those_of_all_replicas_that_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def deployment(*results: Any) -> Any:
        async def results_async(timeout_s: float, return_exceptions: bool) -> list[Any]:
            assert return_exceptions
            if isinstance(results[0], TimeoutError):
                raise results[0]
            return list(results)

        def broadcast(method: str) -> Any:
            assert method == "collect"
            return SimpleNamespace(results_async=results_async)

        return SimpleNamespace(broadcast=broadcast)

    context = SimpleNamespace(app_name="ours", deployment="HttpApi")
    fronts = {("HttpApi", "ours"): deployment(("front1", ["a"]), ("front2", ["b"]))}
    monkeypatch.setattr("serve.backend.serve.get_replica_context", lambda: context)
    monkeypatch.setattr("serve.backend.serve.get_deployment_handle", lambda *name: fronts[name])
    front, _ = backend()
    front.model, front.images = deployment(RayActorError(), ("model2", ["c"])), deployment(TimeoutError())
    assert asyncio.run(front.collect_metrics()) == {"front1": ["a"], "front2": ["b"], "model2": ["c"]}
    front.model, front.images = deployment(TimeoutError()), deployment(("images1", ["d"]))
    assert asyncio.run(front.collect_metrics()) == {"front1": ["a"], "front2": ["b"], "images1": ["d"]}
