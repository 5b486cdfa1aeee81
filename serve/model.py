"""The model as a Ray Serve deployment: requests that wait together are answered together, cities are loaded as needed."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from prometheus_client.core import Metric
from ray import serve

from addressvlm import InputError
from addressvlm.answers.beliefs import Localization
from addressvlm.answers.texts import Completion, Piece
from serve.asks import Question, Where
from serve.batcher import Batcher
from serve.cities import City
from serve.errors import QUIET, refusals_told
from serve.records import Records
from serve.settings import ServiceSettings


class Model:
    """Everything that computes runs in one thread, so that health checks are answered meanwhile."""

    def __init__(self, settings: ServiceSettings, cities: Sequence[City]) -> None:
        from serve.engine import Engine

        self.engine = Engine(settings, cities)
        self.thread = ThreadPoolExecutor(1)
        self.records = Records()
        size, wait_s = settings.batch_size, settings.batch_wait_s
        self.photos = Batcher(partial(self._together, "localize", self.engine.localize), size, wait_s)
        self.chats = Batcher(partial(self._together, "chat", self.engine.answer), size, wait_s)

    async def card(self) -> dict[str, Any]:
        """What the front needs to know of the model: the side of its input in pixels."""
        return {"side": self.engine.side}

    @refusals_told
    async def localize(self, where: Where) -> Localization:
        """The likeliest addresses of a photo; refused where the city has no gazetteer, or the prior rules out all of it."""
        await self.ready(where.city)
        return await self.photos.answer(where)

    @refusals_told
    async def answer(self, question: Question) -> list[Completion]:
        """The answers to a conversation; refused where the prompt is longer than the model's context."""
        await self.ready(question.city)
        return await self.chats.answer(question)

    async def stream(self, question: Question) -> AsyncIterator[Piece | InputError]:
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
