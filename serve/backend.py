"""The front's way to the other deployments: what a dead replica lost is asked again once, what waits too long is given up."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from prometheus_client.core import Metric
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from addressvlm.answers.beliefs import Localization
from addressvlm.answers.texts import Completion, Piece
from serve.asks import Question, Where
from serve.errors import ApiError, in_words
from serve.records import Records

METRICS_S = 5  # how long replicas may take to tell their counts


class Backend:
    """Calls to the model and to the decoder of images.

    Args:
        several: whether replicas hold several cities, so that a request goes where its city is loaded.
        request_s: how long a call may take in all; of a stream, each piece.
    """

    def __init__(
        self, model: DeploymentHandle, images: DeploymentHandle, records: Records, several: bool, request_s: float
    ) -> None:
        self.model, self.images, self.records = model, images, records
        self.several, self.request_s = several, request_s
        self._side: int | None = None

    async def read(self, source: bytes | str) -> np.ndarray:
        """Pixels of a photo, of the size the model looks at, uint8 (height, width, 3)."""
        if self._side is None:
            self._side = (await self._call(self.model, "card"))["side"]
        return await self._call(self.images, "read", source, self._side)

    async def localize(self, where: Where) -> Localization:
        """The ranked addresses of a photo."""
        return await self._call(self._for(where.city), "localize", where)

    async def answer(self, question: Question) -> list[Completion]:
        """The answers to a conversation, as many as it asks for."""
        return await self._call(self._for(question.city), "answer", question)

    async def stream(self, question: Question) -> AsyncIterator[Piece]:
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
                in_words(error)
                continue
            found |= dict(one for one in told if isinstance(one, tuple))
        return found

    def _for(self, city: str) -> Any:
        return self.model.options(multiplexed_model_id=city) if self.several else self.model

    async def _begin(self, question: Question) -> tuple[Piece, AsyncIterator[Piece]]:
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
            raise in_words(error) from None


async def _awaited(response: Any) -> Any:
    return _told(await response)


def _told(value: Any) -> Any:
    """An answer; a refusal comes as a value, see `serve.errors.refusals_told`."""
    if isinstance(value, Exception):
        raise value
    return value


async def _with_first(first: Piece, rest: AsyncIterator[Piece], piece_s: float) -> AsyncIterator[Piece]:
    yield first
    while True:
        try:
            async with asyncio.timeout(piece_s):
                piece = await anext(rest)
        except StopAsyncIteration:
            return
        yield _told(piece)
