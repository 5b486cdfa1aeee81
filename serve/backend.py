"""Calls from the HTTP front to all deployments: time limits, cancellation, streams.

Nothing is asked twice: Ray Serve itself gives a request to another replica only if none has begun it, and a request that killed
one replica must not kill the next.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from prometheus_client.core import Metric
from ray import serve
from ray.serve.handle import DeploymentHandle

from addressvlm.answers.address_distribution import Localization
from addressvlm.answers.types import Completion, TextChunk
from serve.errors import to_api_error
from serve.requests import ChatQuery, LocalizeQuery

METRICS_TIMEOUT_S = 5
STATUS_TIMEOUT_S = 5


class Backend:
    """Calls to the model and image deployments. Whatever goes wrong is an ApiError, which the caller may see.

    Args:
        multiplexed: whether replicas hold several cities, so that a request goes to one that has its city loaded.
        timeout_s: time limit of a call; of a stream, for each chunk. What is given up is cancelled.
    """

    def __init__(self, model: DeploymentHandle, images: DeploymentHandle, multiplexed: bool, timeout_s: float) -> None:
        self.model, self.images, self.multiplexed, self.timeout_s = model, images, multiplexed, timeout_s
        self._image_size: int | None = None
        self._status_thread = ThreadPoolExecutor(1)  # the controller may be slow, and must not hold what requests need

    async def read_image(self, source: bytes | str) -> np.ndarray:
        """Pixels of a photo at the size that the model needs, uint8 (height, width, 3)."""
        if self._image_size is None:
            self._image_size = await self._call(self.model, "image_size")
        return await self._call(self.images, "read", source, self._image_size)

    async def localize(self, query: LocalizeQuery) -> Localization:
        """The ranked addresses of a photo."""
        return await self._call(self._model_of(query.city), "localize", query)

    async def chat(self, query: ChatQuery) -> list[Completion]:
        """The answers to a conversation, `query.sampling.n` of them."""
        return await self._call(self._model_of(query.city), "chat", query)

    async def stream_chat(self, query: ChatQuery) -> AsyncIterator[TextChunk]:
        """The answers to a conversation, chunk by chunk; returns when the first chunk is there."""
        chunks = self._model_of(query.city).options(stream=True).stream_chat.remote(query)
        first = await self._within_time(chunks, anext(chunks))

        async def stream() -> AsyncIterator[TextChunk]:
            chunk, done = first, object()
            try:
                while chunk is not done:
                    yield _raise_if_error(chunk)
                    async with asyncio.timeout(self.timeout_s):
                        chunk = await anext(chunks, done)
            finally:
                if chunk is not done:  # it took too long, or the caller left
                    chunks.cancel()

        return stream()

    async def running_replicas(self) -> int:
        """Number of model replicas that run."""
        app, loop = serve.get_replica_context().app_name, asyncio.get_running_loop()
        async with asyncio.timeout(STATUS_TIMEOUT_S):
            status = await loop.run_in_executor(self._status_thread, serve.status)
        replicas = status.applications[app].deployments["Localizer"].replica_states
        return sum(count for state, count in replicas.items() if str(getattr(state, "value", state)) == "RUNNING")

    async def collect_metrics(self) -> dict[str, list[Metric]]:
        """Metrics of all replicas of the three deployments, by replica; those that do not answer are left out."""
        metrics: dict[str, list[Metric]] = {}
        context = serve.get_replica_context()
        front = serve.get_deployment_handle(context.deployment, context.app_name)
        for handle in (front, self.model, self.images):
            try:
                results = handle.broadcast("collect").results_async(timeout_s=METRICS_TIMEOUT_S, return_exceptions=True)
                metrics |= dict(result for result in await results if isinstance(result, tuple))
            except Exception as error:
                to_api_error(error)  # logs it
        return metrics

    def _model_of(self, city: str) -> Any:
        return self.model.options(multiplexed_model_id=city) if self.multiplexed else self.model

    async def _call(self, handle: Any, method: str, *args: Any) -> Any:
        response = getattr(handle, method).remote(*args)
        return await self._within_time(response, response)

    async def _within_time(self, response: Any, result: Any) -> Any:
        """The result of a response, which is cancelled if it takes too long or the caller leaves."""
        try:
            async with asyncio.timeout(self.timeout_s):
                return _raise_if_error(await result)
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            if isinstance(error, TimeoutError):
                response.cancel()
            raise to_api_error(error) from None  # Ray Serve would answer a full queue itself


def _raise_if_error(value: Any) -> Any:
    """A result, or an error that came as a value (see `serve.errors.return_user_errors`) as an exception."""
    if isinstance(value, Exception):
        raise value
    return value
