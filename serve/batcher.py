"""Requests that wait together are answered together.

Unlike `serve.batch`, which fills its next batches while the model is still at work on one, a batch is made when the model is
free: the longer it took, the more have come, and the larger is the next batch.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any


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
