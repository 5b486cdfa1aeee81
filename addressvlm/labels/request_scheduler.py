"""Asking an endpoint about many rows: as many requests in flight as are allowed, tries again, limits, budget, ledger.

An answer is in the ledger before it is judged. What fails for now is tried again while other rows go on; a row that still
fails is tried once more after all others, and falls back to the template only if the endpoint answers for others.
"""

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import uvloop

from addressvlm.config.labels import LabelsConfig
from addressvlm.errors import InputError
from addressvlm.labels.api_client import Budget, EndpointClient, RateLimiter, TransientError, endpoint_key
from addressvlm.labels.cached_labels import no_answer, replay_answers, request_key
from addressvlm.labels.costs import LabelStats, text_tokens, tokens_sent
from addressvlm.labels.labelers import Label, Request
from addressvlm.labels.response_cache import CachedAnswer, RequestKey, WritableResponseCache
from addressvlm.labels.retry import RetryState

GIVE_UP_AFTER = 16  # rows in a row that were tried in vain
MOST_LATER = 1000  # rows that wait to be tried once more; their images are in memory
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # between tries where the endpoint does not say how long
LONGEST_TOLD_S = 600.0  # a longer wait ends the job
BUSY_TRIES = 4  # a busy endpoint (429) is tried so often for each of `labels.retries`
ENCODERS = 4  # threads that make images ready
PULLED = 16  # rows that are read at a time
SHOWN_EVERY_S = 5

Numbered = tuple[int, Request]


def no_answers(*_: object) -> None: ...


class _StoppedError(Exception):
    """The job ends: nothing more is asked."""


class _HopelessError(Exception):
    """A row was tried as often as the settings allow."""


@dataclass(frozen=True)
class _PreparedRequest:
    """A row whose first request is ready, unless the ledger knows its answer."""

    number: int
    row: RetryState
    asked: RequestKey  # the first one
    body: bytes | None
    readable: bool = True


class RequestScheduler:
    """One job of a labeler, in its event loop."""

    def __init__(
        self,
        config: LabelsConfig,
        begin: Callable[[Request], RetryState],
        ledger: WritableResponseCache | None,
        show: Callable[[str], object],
        again: bool,
        done: Callable[[int, Label], object],
    ) -> None:
        """See OpenAILabeler; needs a running event loop."""
        self.config, self.begin, self.ledger, self.show, self.again, self.done = config, begin, ledger, show, again, done
        self.client = EndpointClient(config)
        self.pace = RateLimiter(config.requests_per_minute, config.tokens_per_minute)
        self.budget = Budget(config, ledger.tokens if ledger else 0, ledger.usd if ledger else 0.0)
        self.slots = asyncio.Semaphore(config.concurrency)
        self.threads = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")
        self.tally = LabelStats()
        self.start = time.monotonic()
        self.error: InputError | None = None  # that ends the job
        self.ending = asyncio.Event()
        self.under_way: dict[str, asyncio.Event] = {}  # ids of rows
        self.later: list[Numbered] = []
        self.last_round = False
        self.in_vain = 0  # rows since the last answer
        self.ready: asyncio.Queue[_PreparedRequest | None] = asyncio.Queue(PULLED)

    async def run(self, requests: Iterable[Request], total: int) -> LabelStats:
        """Ask about all rows; see `OpenAILabeler.settle`."""
        self.tally.total = total
        clock = asyncio.create_task(self.tick())
        try:
            await self.round(enumerate(requests))
            if self.later and not self.error:
                put_off, self.later, self.last_round = self.later, [], True
                await self.round(iter(put_off))
        finally:
            self.tally.seconds = time.monotonic() - self.start
            clock.cancel()
            await self.client.close()
            self.threads.shutdown(cancel_futures=True)
        self.show(self.tally.line())
        if self.error:
            raise self.error
        return self.tally

    async def round(self, rows: Iterator[Numbered]) -> None:
        """All rows; some more are under way than may be in flight, since some wait to be tried again."""
        workers, turn = self.config.concurrency + max(8, self.config.concurrency // 4), asyncio.Lock()
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(self.work())
            async with asyncio.TaskGroup() as readers:
                for _ in range(ENCODERS):
                    readers.create_task(self.read_all(rows, turn))
            for _ in range(workers):
                await self.ready.put(None)

    async def read_all(self, rows: Iterator[Numbered], turn: asyncio.Lock) -> None:
        try:
            await self.read(rows, turn)
        except InputError as error:
            self.end(error)

    async def read(self, rows: Iterator[Numbered], turn: asyncio.Lock) -> None:
        """Make requests ready before a slot is free for them; many in one go, since handing over to a thread costs time."""
        while not self.error:
            async with turn:
                pulled = await self.in_thread(lambda: list(islice(rows, PULLED)))
            if not pulled:
                return
            for made in await self.in_thread(lambda pulled=pulled: [self.prepare(*numbered) for numbered in pulled]):
                await self.ready.put(made)

    def prepare(self, number: int, request: Request) -> "_PreparedRequest":
        row = self.begin(request)
        asked = request_key(row)
        known = self.ledger and self.ledger.get(asked)
        try:
            return _PreparedRequest(number, row, asked, None if known else self.client.body(row.messages()))
        except InputError:
            return _PreparedRequest(number, row, asked, None, readable=False)

    async def work(self) -> None:
        try:
            while made := await self.ready.get():
                if not self.error:
                    async with self.alone(made.asked.id):
                        await self.settle(made)
        except _StoppedError:
            return await self.drain()
        except InputError as error:
            self.end(error)
            await self.drain()

    async def drain(self) -> None:
        """Take what is ready and leave it, so that its readers come to their end."""
        while await self.ready.get():
            pass

    @asynccontextmanager
    async def alone(self, row_id: str) -> AsyncIterator[None]:
        """No other row of this id is under way."""
        while other := self.under_way.get(row_id):
            await other.wait()
        self.under_way[row_id] = over = asyncio.Event()
        try:
            yield
        finally:
            del self.under_way[row_id]
            over.set()

    async def settle(self, made: "_PreparedRequest") -> None:
        """Ask about a row until it has its label, or put it off."""
        row, body = made.row, made.body
        label = replay_answers(row, made.asked, self.ledger, self.again) if self.ledger else None
        known = label is not None
        try:
            while label is None:
                if not made.readable:
                    self.tally.unreadable += 1
                    return
                if body is None or row.number:
                    body = await self.in_thread(lambda: self.client.body(row.messages()))
                answer = await self.answer(row, made.asked, body)
                await asyncio.sleep(0)  # the next request goes out before this answer is judged
                label = row.take(answer.text, answer.refusal)
        except _HopelessError as failure:
            if not self.last_round:
                self.later.append((made.number, row.request))
                return
            self.keep(row, made.asked, CachedAnswer(failure=str(failure)))
            self.tally.failed += 1
            label = no_answer(row)
        self.tally.rows += not known
        self.done(made.number, label)

    async def answer(self, row: RetryState, asked: RequestKey, body: bytes) -> CachedAnswer:
        """One ask, tried until it is answered."""
        for tries in count():
            try:
                answer = await self.ask(row, asked, body)
            except TransientError as failure:
                self.tally.again[failure.kind] += 1
                await self.wait(failure, tries)
            else:
                self.in_vain = 0
                return answer
        raise AssertionError

    async def ask(self, row: RetryState, asked: RequestKey, body: bytes) -> CachedAnswer:
        """One try, when there is a slot, a turn, money, and room on the disk for what comes back."""
        async with self.slots:
            sent = math.ceil(self.tally.tokens_in / self.tally.answered) if self.tally.answered else tokens_sent(row)
            most = self.config.max_tokens
            if self.ledger and not self.ledger.has_room(2 * self.config.concurrency):
                await self.in_thread(self.ledger.make_room, 4 * self.config.concurrency)
            self.check()
            await self.budget.hold(sent, most)
            try:
                await self.pace.wait(sent + most)
                self.check()
                self.tally.asked += 1
                answer = await self.client.ask(body)
                if not answer.tokens_in:  # an endpoint that does not count
                    answer = replace(answer, tokens_in=sent, tokens_out=text_tokens(answer.text or ""))
                answer = replace(answer, usd=self.budget.spend(answer.tokens_in, answer.tokens_out))
                self.keep(row, asked, answer)
                self.tally.count(answer)
                return answer
            finally:
                self.budget.release(sent, most)

    async def wait(self, failure: TransientError, tries: int) -> None:
        """Wait before the next try: as long as the endpoint says and a little more, else ever longer; both with jitter."""
        if tries >= self.config.retries * (BUSY_TRIES if failure.kind == "429" else 1):
            self.in_vain += 1
            known = self.tally.answered or (self.ledger and self.ledger.answers)
            if self.in_vain >= GIVE_UP_AFTER or len(self.later) >= MOST_LATER or (self.last_round and not known):
                raise InputError(
                    f"{self.client.where} keeps failing ({failure.said}): run the same command again later; every answer so "
                    "far is kept."
                )
            raise _HopelessError(failure.said)
        if (failure.wait_s or 0) > LONGEST_TOLD_S:
            raise InputError(
                f"{self.client.where} asks to wait {failure.wait_s:,.0f} s ({failure.said}): run the same command again then; "
                "every answer so far is kept."
            )
        step = min(FIRST_WAIT_S * 2**tries, LONGEST_WAIT_S)
        seconds = step * random.uniform(0.5, 1) if failure.wait_s is None else failure.wait_s + step * random.uniform(0, 0.5)
        try:
            await asyncio.wait_for(self.ending.wait(), seconds)
        except TimeoutError:
            return
        raise _StoppedError

    def end(self, error: InputError) -> None:
        """Ask nothing more, and wait for what is in flight."""
        self.error = self.error or error
        self.ending.set()

    def check(self) -> None:
        if self.error:
            raise _StoppedError

    def keep(self, row: RetryState, asked: RequestKey, answer: CachedAnswer) -> None:
        if self.ledger:
            self.ledger.add(replace(asked, number=row.number + 1), answer)

    async def in_thread(self, function: Callable[..., Any], *args: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)

    async def tick(self) -> None:
        """Every second: what was answered is made to survive the machine; now and then: a line of progress."""
        for second in count(1):
            await asyncio.sleep(1)
            self.tally.seconds = time.monotonic() - self.start
            try:
                await self.in_thread(self.ledger.sync if self.ledger else no_answers)
            except InputError as error:
                self.end(error)
            if second % SHOWN_EVERY_S == 0:
                self.show(self.tally.line())


@dataclass(frozen=True)
class OpenAILabeler:
    """Asks the endpoint about rows, judges what comes back, asks again with the reason, falls back to the template.

    Attributes:
        begin: makes the Attempts of a row.
        ledger: where answers are kept, and found that were paid for already.
        show: gets a line of progress every few seconds.
        again: ask once more about rows that the endpoint failed for.
    """

    config: LabelsConfig
    begin: Callable[[Request], RetryState]
    ledger: WritableResponseCache | None = None
    show: Callable[[str], object] = no_answers
    again: bool = False

    def __post_init__(self) -> None:
        endpoint_key(self.config)  # a missing one is told before anything is read

    def label(self, requests: Sequence[Request]) -> list[Label]:
        """See Labeler.

        Raises:
            InputError: see `settle`; or an image can't be decoded.
        """
        found: dict[int, Label] = {}
        self.settle(requests, len(requests), found.__setitem__)
        for number, request in enumerate(requests):
            if number not in found:
                raise InputError(f"the image of row {request.id} can't be decoded: make the table again.")
        return [found[number] for number in range(len(requests))]

    def settle(self, requests: Iterable[Request], total: int, done: Callable[[int, Label], object] = no_answers) -> LabelStats:
        """Ask until every row has its label; memory holds the rows in flight.

        Args:
            requests: read in another thread.
            total: how many of them the ledger has no label for, to tell the time that is left.
            done: gets the number of each row and its label, in any order.

        Raises:
            InputError: the endpoint refuses the key, the model or a request, or keeps failing; the budget is used up; the
                disk is full. All answers until then are in the ledger.
        """

        async def run() -> LabelStats:
            return await RequestScheduler(self.config, self.begin, self.ledger, self.show, self.again, done).run(
                requests, total
            )

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run())
