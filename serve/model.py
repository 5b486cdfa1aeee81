"""The model as a Ray Serve deployment: requests that wait together are answered together, cities are loaded as needed."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from prometheus_client.core import Metric
from ray import serve

from addressvlm import InputError
from addressvlm.answers.address_distribution import Localization
from addressvlm.answers.types import Completion, TextChunk
from serve.cities import City
from serve.errors import QUIET, refusals_told
from serve.metrics import ServiceMetrics
from serve.schemas import ChatQuery, LocalizeQuery
from serve.settings import ServiceSettings


class Batcher:
    """Gives what waits to `work`, one batch at a time.

    Args:
        work: answers to all items of a batch, in order; an exception among them is raised for its item alone.
        size: the most items of a batch.
        wait_s: how long a batch that is not full waits for more.
    """

    def __init__(self, work: Callable[[list[Any]], Awaitable[Sequence[Any]]], size: int, wait_s: float) -> None:
        self.work, self.size, self.wait_s = work, size, wait_s
        self.waiting: deque[tuple[Any, asyncio.Future[Any]]] = deque()
        self.full = asyncio.Event()
        self.running: asyncio.Task[None] | None = None

    async def answer(self, item: Any) -> Any:
        """The answer to one item."""
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((item, future))
        if len(self.waiting) >= self.size:
            self.full.set()
        if self.running is None:
            self.running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self.waiting:
                if len(self.waiting) < self.size and self.wait_s:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self.full.wait(), self.wait_s)
                await self._answer([self.waiting.popleft() for _ in range(min(self.size, len(self.waiting)))])
                if len(self.waiting) < self.size:
                    self.full.clear()
        finally:
            self.running = None

    async def _answer(self, batch: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        asked = [(item, future) for item, future in batch if not future.done()]  # callers may have left
        if not asked:
            return
        try:
            answers = await self.work([item for item, _ in asked])
        except Exception as error:
            answers = [error] * len(asked)
        for (_, future), answer in zip(asked, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)


class Model:
    """Everything that computes runs in one thread, so that health checks are answered meanwhile."""

    def __init__(self, settings: ServiceSettings, cities: Sequence[City]) -> None:
        from serve.engine import Engine

        self.engine = Engine(settings, cities)
        self.thread = ThreadPoolExecutor(1)
        self.records = ServiceMetrics()
        size, wait_s = settings.batch_size, settings.batch_wait_s
        self.photos = Batcher(partial(self._together, "localize", self.engine.localize), size, wait_s)
        self.chats = Batcher(partial(self._together, "chat", self.engine.answer), size, wait_s)

    async def card(self) -> dict[str, Any]:
        """What the front needs to know of the model: the side of its input in pixels."""
        return {"side": self.engine.side}

    @refusals_told
    async def localize(self, where: LocalizeQuery) -> Localization:
        """The likeliest addresses of a photo; refused where the city has no gazetteer, or the prior rules out all of it."""
        await self.ready(where.city)
        return await self.photos.answer(where)

    @refusals_told
    async def answer(self, question: ChatQuery) -> list[Completion]:
        """The answers to a conversation; refused where the prompt is longer than the model's context."""
        await self.ready(question.city)
        return await self.chats.answer(question)

    async def stream(self, question: ChatQuery) -> AsyncIterator[TextChunk | InputError]:
        """The same piece by piece; between two pieces the thread is free for others."""
        await self.ready(question.city)
        pieces = self.engine.stream(question)
        try:
            while (piece := await self.in_thread(next, pieces, None)) is not None:
                yield piece
        except InputError as error:
            yield error

    async def ready(self, city: str) -> None:
        """See that a city is loaded."""

    async def in_thread(self, work: Any, *args: Any) -> Any:
        """Work in the thread of the model."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work, *args)

    async def _together(self, kind: str, work: Any, asked: list[Any]) -> list[Any]:
        self.records.observe("addressvlm_batch_size", len(asked), kind)
        begun = time.perf_counter()
        found = await self.in_thread(work, asked)
        self.records.observe("addressvlm_model_seconds", time.perf_counter() - begun, kind)
        return found


@serve.deployment(name="Localizer", logging_config=QUIET)
class LocalizerDeployment(Model):
    """The same as a deployment, whose replicas hold the cities that were asked for last."""

    def __init__(self, settings: ServiceSettings, cities: Sequence[City]) -> None:
        super().__init__(settings, cities)
        self.name = str(serve.get_replica_context().replica_tag)
        self.adapters = {city.id for city in cities if city.adapter}

        @serve.multiplexed(max_num_models_per_replica=settings.cities_per_replica)
        async def load(city: str) -> _Loaded:
            try:
                await self.in_thread(self.engine.add, city)
            except InputError as error:  # the operator's, not the caller's
                raise RuntimeError(str(error)) from error
            return _Loaded(self, city)

        self.load = load

    async def ready(self, city: str) -> None:
        """See that a city is loaded."""
        if city in self.adapters:
            await self.load(city)

    async def collect(self) -> tuple[str, list[Metric]]:
        """What was counted here, for `/metrics`."""
        return self.name, self.records.collect()


class _Loaded:
    """A city that is loaded; Serve calls `__del__` when it makes room for another one, and Python does so again later."""

    def __init__(self, model: Model, city: str) -> None:
        self.model, self.city, self.gone = model, city, False

    def __del__(self) -> None:
        if not self.gone:
            self.gone = True
            self.model.thread.submit(self.model.engine.remove, self.city)
