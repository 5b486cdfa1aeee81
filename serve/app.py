"""The HTTP front as a Ray Serve deployment: the routes of `serve.routes` over the other deployments."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI
from prometheus_client.core import Metric
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from addressvlm.answers.address_distribution import Localization
from addressvlm.answers.types import Completion, TextChunk
from serve.cities import City
from serve.errors import QUIET, ApiError, user_message
from serve.metrics import ServiceMetrics
from serve.routes import Routes
from serve.schemas import ChatQuery, LocalizeQuery
from serve.settings import ServiceSettings

METRICS_S = 5  # how long replicas may take to tell their counts


class Backend:
    """Calls to the model and to the decoder of images.

    Args:
        several: whether replicas hold several cities, so that a request goes where its city is loaded.
        request_s: how long a call may take in all; of a stream, each piece.
    """

    def __init__(
        self, model: DeploymentHandle, images: DeploymentHandle, records: ServiceMetrics, several: bool, request_s: float
    ) -> None:
        self.model, self.images, self.records = model, images, records
        self.several, self.request_s = several, request_s
        self._side: int | None = None

    async def read(self, source: bytes | str) -> np.ndarray:
        """Pixels of a photo, of the size the model looks at, uint8 (height, width, 3)."""
        if self._side is None:
            self._side = (await self._call(self.model, "card"))["side"]
        return await self._call(self.images, "read", source, self._side)

    async def localize(self, where: LocalizeQuery) -> Localization:
        """The ranked addresses of a photo."""
        return await self._call(self._for(where.city), "localize", where)

    async def answer(self, question: ChatQuery) -> list[Completion]:
        """The answers to a conversation, as many as it asks for."""
        return await self._call(self._for(question.city), "answer", question)

    async def stream(self, question: ChatQuery) -> AsyncIterator[TextChunk]:
        """The same piece by piece; when this returns, the first piece is there."""
        first, rest = await self._again(lambda: self._begin(question))
        return _with_first(first, rest, self.request_s)

    async def counts(self) -> dict[str, list[Metric]]:
        """What every replica of the model and of the decoder counted, by replica; a replica that is away is left out."""
        found: dict[str, list[Metric]] = {}
        for handle in (self.model, self.images):
            try:
                told = await handle.broadcast("collect").results_async(timeout_s=METRICS_S, return_exceptions=True)
            except Exception as error:
                user_message(error)
                continue
            found |= dict(one for one in told if isinstance(one, tuple))
        return found

    def _for(self, city: str) -> Any:
        return self.model.options(multiplexed_model_id=city) if self.several else self.model

    async def _begin(self, question: ChatQuery) -> tuple[TextChunk, AsyncIterator[TextChunk]]:
        pieces = self._for(question.city).options(stream=True).stream.remote(question)
        return _told(await anext(aiter(pieces))), pieces

    async def _call(self, handle: Any, method: str, *args: Any) -> Any:
        return await self._again(lambda: _awaited(getattr(handle, method).remote(*args)))

    async def _again(self, ask: Any) -> Any:
        """Ask; once more if the replica died under it. Serve would answer a full queue itself, so it is told here."""
        try:
            async with asyncio.timeout(self.request_s):
                try:
                    return await ask()
                except RayActorError:
                    self.records.count("addressvlm_retries")
                    return await ask()
        except ApiError:
            raise
        except Exception as error:
            raise user_message(error) from None


async def _awaited(response: Any) -> Any:
    return _told(await response)


def _told(value: Any) -> Any:
    """An answer; a refusal comes as a value, see `serve.errors.refusals_told`."""
    if isinstance(value, Exception):
        raise value
    return value


async def _with_first(first: TextChunk, rest: AsyncIterator[TextChunk], piece_s: float) -> AsyncIterator[TextChunk]:
    yield first
    while True:
        try:
            async with asyncio.timeout(piece_s):
                piece = await anext(rest)
        except StopAsyncIteration:
            return
        yield _told(piece)


@serve.deployment(
    name="HttpApi",
    max_ongoing_requests=1024,  # more than `ServiceSettings.at_once`, so that what is too much is refused in our words
    max_queued_requests=512,  # in the proxy, whose memory would grow without end; beyond it Serve answers 503 itself
    ray_actor_options={"num_cpus": 0},
    logging_config=QUIET,
)
@serve.ingress()
class HttpApi:
    """The front. Reserves no CPU: it mostly waits for the model, and a one-CPU machine must do.

    Args:
        digests: SHA-256 of the keys that may ask; none: everyone may.
        limit: the one `RateLimit` of the service, if there is one.
    """

    def __init__(
        self,
        model: DeploymentHandle,
        images: DeploymentHandle,
        limit: DeploymentHandle | None,
        settings: ServiceSettings,
        cities: Sequence[City],
        digests: Sequence[str],
    ) -> None:
        self.settings, self.digests, self.limit = settings, list(digests), limit
        self.records, self.context = ServiceMetrics(), serve.get_replica_context()
        self.backend = Backend(model, images, self.records, len(cities) > 1, settings.request_s)
        self.api = Routes(settings, cities, self.backend, self.records, self._up, self._counts)
        _log_to_stdout()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.api.app(digests=self.digests, wait=self.limit.wait.remote if self.limit else None, set_id=False)

    async def collect(self) -> tuple[str, list[Metric]]:
        """What was counted here, for `/metrics`."""
        return str(self.context.replica_tag), self.records.collect()

    async def _counts(self) -> Mapping[str, Sequence[Metric]]:
        """The counts of all replicas, those of the other fronts too."""
        fronts = serve.get_deployment_handle(self.context.deployment, self.context.app_name)
        told = await fronts.broadcast("collect").results_async(timeout_s=METRICS_S, return_exceptions=True)
        return dict(one for one in told if isinstance(one, tuple)) | await self.backend.counts()

    async def _up(self) -> int:
        """How many model replicas run."""
        status = await asyncio.to_thread(serve.status)
        replicas = status.applications[self.context.app_name].deployments["Localizer"].replica_states
        return sum(count for state, count in replicas.items() if str(getattr(state, "value", state)) == "RUNNING")


def _log_to_stdout() -> None:
    """The access log, one line of JSON a request, on the replica's standard output."""
    logger = logging.getLogger("addressvlm.access")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [logging.StreamHandler(sys.stdout)]
