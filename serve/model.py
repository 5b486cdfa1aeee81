"""The model as a Ray Serve deployment: requests become jobs of the engine's thread, and cities load on demand."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

from ray import serve

from addressvlm import InputError
from addressvlm.answers.address_distribution import Localization
from addressvlm.answers.types import Completion, TextChunk
from serve.cities import City
from serve.errors import LOGGING_CONFIG, ApiError, return_user_errors
from serve.metrics import MetricsReplica, ServiceMetrics
from serve.requests import ChatQuery, LocalizeQuery
from serve.settings import ServiceSettings

PREPARING_THREADS = 2  # make tensors of requests, and answers of scores


class Model:
    """Answers requests; whoever stops waiting for one frees its place at once."""

    def __init__(self, settings: ServiceSettings, cities: Sequence[City]) -> None:
        from serve.engine import Engine

        self.metrics = ServiceMetrics()
        self.engine = Engine(settings, cities, self.metrics)
        self.engine.warm_up()
        self.engine.start()
        self.workers, self.loader = ThreadPoolExecutor(PREPARING_THREADS), ThreadPoolExecutor(1)

    async def image_size(self) -> int:
        """Side of the model's input in pixels."""
        return self.engine.image_size

    @return_user_errors
    async def localize(self, query: LocalizeQuery) -> Localization:
        """The likeliest addresses of a photo. InputError: the city has no gazetteer, or the prior excludes all of it."""
        async with self._job(self.engine.prepare_localize, query) as (job, receive):
            return await self._run(self.workers, job.result, await receive())

    @return_user_errors
    async def chat(self, query: ChatQuery) -> list[Completion]:
        """The answers to a conversation. InputError: the prompt is longer than the model's context. ApiError: 503 no memory."""
        from addressvlm.answers.generate import completions

        async with aclosing(self._chunks(query)) as chunks:
            return completions([(chunk.index, chunk) async for chunk in chunks], query.sampling.n)

    async def stream_chat(self, query: ChatQuery) -> AsyncGenerator[TextChunk | Exception, None]:
        """The answers chunk by chunk."""
        try:
            async with aclosing(self._chunks(query)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except (InputError, ApiError) as error:
            yield error

    async def check_health(self) -> None:
        """Raises if the device failed or the model's thread is stuck; Ray Serve then replaces the replica."""
        self.engine.check_health()

    async def _chunks(self, query: ChatQuery) -> AsyncGenerator[TextChunk, None]:
        from addressvlm.answers.generate import AnswerText

        async with self._job(self.engine.prepare_chat, query) as (job, receive):
            if not job.answers:
                for chunk in await self._run(self.workers, job.result, await receive()):
                    yield chunk
            texts = {answer: AnswerText(answer) for answer in job.answers}
            while any(text.finish is None for text in texts.values()):
                for answer, token in await receive():
                    if chunk := texts[answer].add(token):
                        yield chunk

    @asynccontextmanager
    async def _job(
        self, prepare: Callable[..., Any], query: LocalizeQuery | ChatQuery
    ) -> AsyncIterator[tuple[Any, Callable[[], Awaitable[Any]]]]:
        """The job of a request in the engine, and a function that waits for what comes next of it."""
        loop, received, job = asyncio.get_running_loop(), asyncio.Queue[Any](), None

        def put(result: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended, so nobody waits
                loop.call_soon_threadsafe(received.put_nowait, result)

        async def receive() -> Any:
            result = await received.get()
            if isinstance(result, Exception):
                raise result
            return result

        localizer = await self._acquire(query.city)
        try:
            job = await self._run(self.workers, prepare, localizer, query, put)
            self.engine.submit(job)
            yield job, receive
        finally:
            if job:
                job.cancel()
            self.engine.cities.release(query.city)

    async def _acquire(self, city: str) -> Any:
        localizer = self.engine.cities.acquire_loaded(city)
        if localizer:
            return localizer
        loading = asyncio.ensure_future(self._run(self.loader, self.engine.cities.acquire, city))
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            loading.add_done_callback(lambda done: done.exception() or self.engine.cities.release(city))
            raise
        except InputError as error:  # the operator's, not the caller's
            raise RuntimeError(str(error)) from error

    async def _run(self, threads: ThreadPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(threads, function, *args)


@serve.deployment(name="Localizer", logging_config=LOGGING_CONFIG)
class LocalizerDeployment(Model, MetricsReplica):
    """`Model` as a deployment; requests go to a replica that has answered about their city lately, if there is one."""

    def __init__(self, settings: ServiceSettings, cities: Sequence[City]) -> None:
        super().__init__(settings, cities)
        self.has_adapters = bool(cities[0].adapter)

        @serve.multiplexed(max_num_models_per_replica=settings.cities_per_replica)
        async def used(city: str) -> str:
            return city

        self.used = used

    async def _acquire(self, city: str) -> Any:
        if self.has_adapters:
            await self.used(city)
        return await super()._acquire(city)
