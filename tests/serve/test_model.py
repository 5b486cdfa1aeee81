"""Batching of requests."""

import asyncio

import pytest

from serve.model import Batcher

pytestmark = pytest.mark.xdist_group("serve")


def run(work: object) -> object:
    return asyncio.run(work)  # type: ignore[arg-type]


def test_items_that_wait_while_the_model_runs_form_one_batch() -> None:
    async def submit_all() -> tuple[list[int], list[list[int]]]:
        free, batches = asyncio.Event(), []

        async def work(items: list[int]) -> list[int | Exception]:
            batches.append(items)
            await free.wait()
            return [ValueError("three") if item == 3 else -item for item in items]

        batcher = Batcher(work, size=4, wait_s=0)
        tasks = [asyncio.create_task(batcher.submit(0))]
        while not batches:
            await asyncio.sleep(0)
        tasks += [asyncio.create_task(batcher.submit(item)) for item in range(1, 8)]
        await asyncio.sleep(0)
        tasks[5].cancel()
        free.set()
        return await asyncio.gather(*tasks, return_exceptions=True), batches

    answers, batches = run(submit_all())  # type: ignore[misc]
    assert batches == [[0], [1, 2, 3, 4], [6, 7]]
    assert [a for a in answers if isinstance(a, int)] == [0, -1, -2, -4, -6, -7]
    assert str(answers[3]) == "three"


def test_a_failed_batch_fails_each_of_its_items_and_not_the_next_batch() -> None:
    async def submit_all() -> list[object]:
        async def work(items: list[int]) -> list[int]:
            return [1 // item for item in items]

        batcher = Batcher(work, size=2, wait_s=1)
        first = await asyncio.gather(batcher.submit(0), batcher.submit(1), return_exceptions=True)
        return [*first, *await asyncio.gather(batcher.submit(1), batcher.submit(1))]

    answers = run(submit_all())
    assert [type(answer) for answer in answers] == [ZeroDivisionError, ZeroDivisionError, int, int]  # type: ignore[attr-defined]
