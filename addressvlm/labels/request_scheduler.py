"""Labels by a model behind an endpoint: many requests in flight, with retries, rate limits, a budget and a cache of answers.

An answer is recorded before it is validated. A request that fails is retried while other rows go on; a row whose retries are
used up is postponed to a second pass, and falls back to the template only if the endpoint answers for other rows.
"""

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import uvloop

from addressvlm.config.labels import LabelsConfig
from addressvlm.errors import InputError
from addressvlm.labels.api_client import EndpointClient, TransientError, endpoint_key
from addressvlm.labels.costs import LabelStats, input_tokens, price, text_tokens
from addressvlm.labels.labelers import FALLBACK, NO_ANSWER, Label, Request, RetryState
from addressvlm.labels.limits import Exchange, LimitsClient, RequestLimits, StoppedError, in_process
from addressvlm.labels.response_cache import CachedAnswer, RequestKey, WritableResponseCache

MAX_FAILED_IN_A_ROW = 16  # rows; then the endpoint counts as down
MAX_POSTPONED = 1000  # rows, whose images are in memory
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 30.0  # between retries where the endpoint does not say how long
MAX_RETRY_AFTER_S = 600.0  # if the endpoint asks to wait longer, the job ends
BUSY_RETRIES = 4  # a busy endpoint (429) is retried so often for each of `labels.retries`
THREADS = 4  # that encode images
READ_BATCH = 16  # rows
PROGRESS_EVERY_S = 5
VALIDATION_DELAY, MAX_VALIDATION_DELAY_S = 0.25, 0.5  # of the time that the answer took
MAX_REASON = 300  # characters of a failure in the cache


@dataclass(frozen=True)
class OpenAILabeler:
    """Sends rows to the endpoint, validates the answers, retries with the reason, falls back to the template.

    Attributes:
        new_state: makes the state of a row.
        cache: records answers, and holds those that are already paid for.
        log: gets a line of progress every few seconds.
        exchange, task: to the limits of all labelling tasks, and this one's name; default: this is the only one.
        retry_failed: send rows again for which the endpoint kept failing in an earlier job.
    """

    config: LabelsConfig
    new_state: Callable[[Request], RetryState]
    cache: WritableResponseCache | None = None
    log: Callable[[str], object] = lambda line: None
    retry_failed: bool = False
    exchange: Exchange | None = None
    task: str = ""

    def __post_init__(self) -> None:
        endpoint_key(self.config)  # a missing one is an error before anything is read

    def label(self, requests: Sequence[Request]) -> list[Label]:
        """See Labeler."""
        labels: dict[int, Label] = {}
        self.run(requests, len(requests), labels.__setitem__)
        for number, request in enumerate(requests):
            if number not in labels:
                raise InputError(f"the image of row {request.id} can't be decoded: make the table again.")
        return [labels[number] for number in range(len(requests))]

    def run(
        self, requests: Iterable[Request], total: int, on_label: Callable[[int, Label], object] = lambda number, label: None
    ) -> LabelStats:
        """Send requests until every row has its label; only the rows in flight are in memory.

        Args:
            requests: read in another thread.
            total: how many of them have no label in the cache, to estimate the time left.
            on_label: gets the position of each row and its label, in any order.

        Raises:
            InputError: the endpoint refuses the key, the model or a request, or keeps failing; the budget is exhausted; the
                disk is full. All answers until then are in the cache.
        """

        async def job() -> LabelStats:
            return await RequestScheduler(self, on_label).run(requests, total)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(job())


class _RetriesUsedUpError(Exception):
    """A request failed as often as the settings allow."""


@dataclass(frozen=True)
class _PreparedRow:
    """A row whose first request is ready to send."""

    position: int
    state: RetryState
    key: RequestKey  # of the first attempt
    body: bytes | None  # None if its answer is in the cache
    readable: bool = True


class RequestScheduler:
    """One job: rows are read and prepared in threads; workers send, retry and record until each row has its label."""

    def __init__(self, labeler: OpenAILabeler, on_label: Callable[[int, Label], object]) -> None:
        """Needs a running event loop."""
        config = labeler.config
        self.config, self.new_state, self.cache = config, labeler.new_state, labeler.cache
        self.log, self.retry_failed, self.on_label = labeler.log, labeler.retry_failed, on_label
        self.client = EndpointClient(config)
        self.stats = LabelStats()
        cache = self.cache
        own_limits = in_process(RequestLimits(config, cache.tokens if cache else 0, cache.usd if cache else 0.0))
        self.limits = LimitsClient(labeler.exchange or own_limits, config, self.stats, labeler.task)
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="encode")
        self.ready: asyncio.Queue[_PreparedRow | None] = asyncio.Queue(READ_BATCH)
        self.start = time.monotonic()
        self.error: Exception | None = None  # that ends the job
        self.stopping = asyncio.Event()
        self.in_progress: dict[str, asyncio.Event] = {}  # ids of rows
        self.postponed: list[tuple[int, Request]] = []
        self.final_pass = False
        self.failed_in_a_row = 0  # rows since the last answer

    async def run(self, requests: Iterable[Request], total: int) -> LabelStats:
        """Label all rows; see `OpenAILabeler.run`."""
        self.stats.total = total
        clock, exchange = (asyncio.create_task(self._clock(work())) for work in (self._tick, self.limits.run))
        try:
            if self.cache:
                await self._in_thread(self.cache.reserve_space, self.config.concurrency)
            await self._label_rows(enumerate(requests))
            if self.postponed and not self.error:
                postponed, self.postponed, self.final_pass = self.postponed, [], True
                await self._label_rows(iter(postponed))
        finally:
            self.stats.seconds = time.monotonic() - self.start
            clock.cancel()
            await asyncio.gather(self.limits.close(exchange), self.client.close(), return_exceptions=True)
            self.threads.shutdown(cancel_futures=True)
        self.log(self.stats.line())
        if self.error:
            raise self.error
        return self.stats

    async def _label_rows(self, rows: Iterator[tuple[int, Request]]) -> None:
        """One pass over rows. There are more workers than requests in flight, since some wait between retries."""
        workers, turn = self.config.concurrency + max(8, self.config.concurrency // 4), asyncio.Lock()
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(self._work())
            async with asyncio.TaskGroup() as readers:
                for _ in range(THREADS):
                    readers.create_task(self._read(rows, turn))
            for _ in range(workers):
                await self.ready.put(None)

    async def _read(self, rows: Iterator[tuple[int, Request]], turn: asyncio.Lock) -> None:
        """Read and prepare rows ahead of the workers; in batches, since handing over to a thread takes time."""
        try:
            while not self.error:
                async with turn:
                    batch = await self._in_thread(lambda: list(islice(rows, READ_BATCH)))
                if not batch:
                    return
                for prepared in await self._in_thread(lambda batch=batch: [self._prepare(*row) for row in batch]):
                    await self.ready.put(prepared)
        except Exception as error:
            self._stop(error)

    def _prepare(self, position: int, request: Request) -> _PreparedRow:
        state = self.new_state(request)
        key = state.request_key()
        cached = self.cache and self.cache.get(key)
        try:
            return _PreparedRow(position, state, key, None if cached else self.client.body(state.messages()))
        except InputError:
            return _PreparedRow(position, state, key, None, readable=False)

    async def _work(self) -> None:
        """Label prepared rows; once the job stops, take and drop them so that the readers come to their end."""
        while prepared := await self.ready.get():
            if self.error:
                continue
            try:
                async with self._one_at_a_time(prepared.key.id):
                    await self._label(prepared)
            except StoppedError:
                continue
            except InputError as error:
                self._stop(error)
            except Exception as error:  # whatever an answer does is the failure of its row alone
                self.failed_in_a_row += 1
                if self.failed_in_a_row >= MAX_FAILED_IN_A_ROW:
                    self._stop(error)
                try:
                    self._fail(prepared, f"{type(error).__name__}: {error}")
                except InputError as unwritable:
                    self._stop(unwritable)

    @asynccontextmanager
    async def _one_at_a_time(self, row_id: str) -> AsyncIterator[None]:
        """Rows of one id wait for each other, so that the second finds the first one's answers in the cache."""
        while other := self.in_progress.get(row_id):
            await other.wait()
        self.in_progress[row_id] = finished = asyncio.Event()
        try:
            yield
        finally:
            del self.in_progress[row_id]
            finished.set()

    async def _label(self, prepared: _PreparedRow) -> None:
        """Replay cached answers, then send requests until the row has its label, or postpone it."""
        state, body = prepared.state, prepared.body
        label = state.replay(self.cache, self.retry_failed, prepared.key) if self.cache else None
        cached = label is not None
        try:
            while label is None:
                if not prepared.readable:
                    self.stats.unreadable += 1
                    return
                if body is None or state.attempts:
                    body = await self._in_thread(lambda: self.client.body(state.messages()))
                answer = await self._send_with_retries(state, prepared.key, body)
                try:
                    # Answers come together: each is followed by a request before any is validated, which takes time.
                    await asyncio.sleep(min(answer.seconds * VALIDATION_DELAY, MAX_VALIDATION_DELAY_S))
                    label = state.add_answer(answer.text, answer.refusal, answer.unusable)
                finally:
                    self.limits.judge(state.useless)
        except _RetriesUsedUpError as failure:
            if not self.final_pass:
                self.postponed.append((prepared.position, state.request))
            else:
                self._fail(prepared, str(failure))
            return
        if cached and label.source != FALLBACK:
            self.limits.judge(None)
        self.stats.rows += not cached
        self.on_label(prepared.position, label)

    def _fail(self, prepared: _PreparedRow, reason: str) -> None:
        """Give up a row: record it as failed, and take the template's label."""
        self._record(prepared.state, prepared.key, CachedAnswer(failure=reason[:MAX_REASON]))
        self.stats.failed += 1
        self.stats.rows += 1
        self.on_label(prepared.position, prepared.state.fall_back(NO_ANSWER))

    async def _send_with_retries(self, state: RetryState, key: RequestKey, body: bytes) -> CachedAnswer:
        for retries in count():
            try:
                answer = await self._send(state, key, body)
            except TransientError as failure:
                self.stats.again[failure.kind] += 1
                await self._wait_to_retry(failure, retries)
            else:
                self.failed_in_a_row = 0
                return answer
        raise AssertionError

    async def _send(self, state: RetryState, key: RequestKey, body: bytes) -> CachedAnswer:
        """Send a request when concurrency, rate limits, budget and disk allow it, and record its answer."""
        stats = self.stats
        spent, is_answered = (0, 0), False

        def estimate() -> tuple[int, int]:
            tokens_in = math.ceil(stats.tokens_in / stats.answered) if stats.answered else input_tokens(state)
            return tokens_in, self.config.max_tokens

        reserved = await self.limits.acquire(estimate)
        try:
            self._check_running()
            stats.asked += 1
            try:
                answer = await self.client.send(body)
            except (TransientError, asyncio.CancelledError) as failure:
                if isinstance(failure, TransientError) and not failure.paid:
                    raise
                lost = CachedAnswer(lost=getattr(failure, "kind", "stopped"), tokens_in=reserved[0], tokens_out=reserved[1])
                spent, lost = reserved, replace(lost, usd=price(self.config, *reserved))
                stats.count_lost(lost)
                self._record(state, key, lost)
                raise
            if not answer.tokens_in:  # the endpoint does not report usage
                answer = replace(answer, tokens_in=reserved[0], tokens_out=text_tokens(answer.text or ""))
            spent = (answer.tokens_in, answer.tokens_out)
            answer = replace(answer, usd=price(self.config, *spent))
            self._record(state, key, answer)
            stats.count(answer)
            is_answered = True
            return answer
        finally:
            self.limits.settle(reserved, spent, is_answered)

    async def _wait_to_retry(self, failure: TransientError, retries: int) -> None:
        """Wait as long as the endpoint says and a little more, else longer after each retry; both with jitter."""
        if retries >= self.config.retries * (BUSY_RETRIES if failure.kind == "429" else 1):
            self.failed_in_a_row += 1
            down = self.failed_in_a_row >= MAX_FAILED_IN_A_ROW or len(self.postponed) >= MAX_POSTPONED
            never_answered = not self.stats.answered and not (self.cache and self.cache.answers)
            if down or (self.final_pass and never_answered):
                raise InputError(
                    f"{self.client.address} keeps failing ({failure.message}): rerun later to resume; all answers "
                    "so far are saved."
                )
            raise _RetriesUsedUpError(failure.message)
        if (failure.retry_after_s or 0) > MAX_RETRY_AFTER_S:
            raise InputError(
                f"{self.client.address} asks to wait {failure.retry_after_s:,.0f} s ({failure.message}): rerun then to "
                "resume; all answers so far are saved."
            )
        step = min(FIRST_WAIT_S * 2**retries, MAX_WAIT_S)
        if failure.retry_after_s is None:
            seconds = step * random.uniform(0.5, 1)
        else:
            seconds = failure.retry_after_s + step * random.uniform(0, 0.5)
        try:
            await asyncio.wait_for(self.stopping.wait(), seconds)
        except TimeoutError:
            return
        raise StoppedError

    def _record(self, state: RetryState, key: RequestKey, answer: CachedAnswer) -> None:
        if self.cache:
            self.cache.add(replace(key, number=state.attempts + 1), answer)

    def _check_running(self) -> None:
        """Raise before a request that should not be sent any more."""
        if self.error:
            raise StoppedError
        if self.cache:
            self.cache.check_space()

    def _stop(self, error: Exception) -> None:
        """Send nothing more; requests in flight are answered and recorded."""
        self.error = self.error or error
        self.limits.stop(str(error))
        self.stopping.set()

    async def _clock(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what must go on beside the rows; its end is the job's."""
        try:
            await work
            if self.limits.stopped:
                self._stop(InputError(self.limits.stopped))
        except Exception as error:
            self._stop(error)

    async def _in_thread(self, function: Callable[..., Any], *args: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)

    async def _tick(self) -> None:
        """Every second write the answers through to the disk or the store; every few seconds log the progress."""
        for second in count(1):
            await asyncio.sleep(1)
            self.stats.seconds = time.monotonic() - self.start
            if self.cache:
                await self._in_thread(self.cache.sync)
            if second % PROGRESS_EVERY_S == 0:
                self.log(self.stats.line())
