"""The model as a Ray Serve deployment: batches requests, and loads cities on demand."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from ray import serve

from addressvlm import InputError
from addressvlm.answers.address_distribution import Localization
from addressvlm.answers.types import Completion, TextChunk
from serve.cities import City
from serve.errors import LOGGING_CONFIG, return_user_errors
from serve.metrics import MetricsReplica, ServiceMetrics
from serve.requests import ChatQuery, LocalizeQuery
from serve.settings import ServiceSettings


class Batcher:
    """Collects items that wait, and processes them one batch at a time.

    Args:
        process: results of a batch, in order; an exception among them is raised for its item alone.
        size: the largest batch.
        wait_s: how long a batch that is not full waits for more items.
    """

    def __init__(self, process: Callable[[list[Any]], Awaitable[Sequence[Any]]], size: int, wait_s: float) -> None:
        self.process, self.size, self.wait_s = process, size, wait_s
        self.queue: deque[tuple[Any, asyncio.Future[Any]]] = deque()
        self.full = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    async def submit(self, item: Any) -> Any:
        """The result for one item."""
        future = asyncio.get_running_loop().create_future()
        self.queue.append((item, future))
        if len(self.queue) >= self.size:
            self.full.set()
        if self.task is None:
            self.task = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self.queue:
                if len(self.queue) < self.size and self.wait_s:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self.full.wait(), self.wait_s)
                await self._process([self.queue.popleft() for _ in range(min(self.size, len(self.queue)))])
                if len(self.queue) < self.size:
                    self.full.clear()
        finally:
            self.task = None

    async def _process(self, batch: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        batch = [(item, future) for item, future in batch if not future.done()]  # callers may have left
        if not batch:
            return
        try:
            results = await self.process([item for item, _ in batch])
        except Exception as error:
            results = [error] * len(batch)
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


class Model:
    """Batches requests for the engine, which runs in one thread so that health checks are answered meanwhile."""

    def __init__(self, settings: ServiceSettings, cities: Sequence[City]) -> None:
        from serve.engine import Engine

        self.engine = Engine(settings, cities)
        self.thread = ThreadPoolExecutor(1)
        self.metrics = ServiceMetrics()
        size, wait_s = settings.batch_size, settings.batch_wait_s
        self.localize_batcher = Batcher(partial(self._run_batch, "localize", self.engine.localize), size, wait_s)
        self.chat_batcher = Batcher(partial(self._run_batch, "chat", self.engine.chat), size, wait_s)

    async def image_size(self) -> int:
        """Side of the model's input in pixels."""
        return self.engine.image_size

    @return_user_errors
    async def localize(self, query: LocalizeQuery) -> Localization:
        """The likeliest addresses of a photo. InputError: the city has no gazetteer, or the prior excludes all of it."""
        await self.load_city(query.city)
        return await self.localize_batcher.submit(query)

    @return_user_errors
    async def chat(self, query: ChatQuery) -> list[Completion]:
        """The answers to a conversation. InputError: the prompt is longer than the model's context."""
        await self.load_city(query.city)
        return await self.chat_batcher.submit(query)

    async def stream_chat(self, query: ChatQuery) -> AsyncIterator[TextChunk | InputError]:
        """The answers chunk by chunk; between two chunks the thread is free for other requests."""
        await self.load_city(query.city)
        chunks = self.engine.stream_chat(query)
        try:
            while (chunk := await self.run_in_thread(next, chunks, None)) is not None:
                yield chunk
        except InputError as error:
            yield error

    async def load_city(self, city: str) -> None:
        """Have a city loaded."""

    async def run_in_thread(self, function: Any, *args: Any) -> Any:
        """Call a function in the engine's thread."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *args)

    async def _run_batch(self, kind: str, function: Any, queries: list[Any]) -> list[Any]:
        self.metrics.observe("addressvlm_batch_size", len(queries), kind)
        start = time.perf_counter()
        results = await self.run_in_thread(function, queries)
        self.metrics.observe("addressvlm_model_seconds", time.perf_counter() - start, kind)
        return results


@serve.deployment(name="Localizer", logging_config=LOGGING_CONFIG)
class LocalizerDeployment(Model, MetricsReplica):
    """`Model` as a deployment whose replicas hold the most recently used cities."""

    def __init__(self, settings: ServiceSettings, cities: Sequence[City]) -> None:
        super().__init__(settings, cities)
        self.adapter_cities = {city.id for city in cities if city.adapter}

        @serve.multiplexed(max_num_models_per_replica=settings.cities_per_replica)
        async def load(city: str) -> _LoadedCity:
            try:
                await self.run_in_thread(self.engine.add_city, city)
            except InputError as error:  # the operator's error, not the caller's
                raise RuntimeError(str(error)) from error
            return _LoadedCity(self, city)

        self.load = load

    async def load_city(self, city: str) -> None:
        """Load a city's adapter, or mark it as used."""
        if city in self.adapter_cities:
            await self.load(city)


class _LoadedCity:
    """A loaded city. Ray Serve calls `__del__` to evict it, and Python does so again later."""

    def __init__(self, model: Model, city: str) -> None:
        self.model, self.city, self.evicted = model, city, False

    def __del__(self) -> None:
        if not self.evicted:
            self.evicted = True
            self.model.thread.submit(self.model.engine.remove_city, self.city)
