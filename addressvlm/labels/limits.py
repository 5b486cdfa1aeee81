"""The limits of a run for all that send its requests: in flight, rates, budget; and when to stop.

`RequestLimits` knows what all labelling tasks do and lives in one place, with several tasks in an actor. Each task has a
`LimitsClient`, which reports what it spent and gets leave to send: a share of the requests in flight, which it keeps from
request to request, and, where there are rates or a budget, a turn for each request.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.costs import LabelStats, price

PROBE = 12  # answers; the job stops if none of the first ones is usable, whatever the reason
BEAT_S = 0.25  # between two reports of a task that needs nothing
SILENT_S = 60.0  # a task that has not reported for so long is dead; one that Ray starts anew says so


class MinuteRateLimiter:
    """Requests and tokens per minute, evenly spread: no window of any length holds more than its share and one request.

    A token bucket would let a minute's worth pass in its first second, which endpoints refuse.
    """

    def __init__(self, requests: float | None, tokens: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Limits per minute; None is no limit."""
        self._request_s = 60 / requests if requests else 0.0
        self._token_s = 60 / tokens if tokens else 0.0
        self._clock = clock
        self._next_request = self._next_token = clock()

    def reserve_slot(self, tokens: float) -> float:
        """Reserve the next slot for a request of so many tokens; seconds until then."""
        now = self._clock()
        slot = max(now, self._next_request, self._next_token)
        self._next_request = slot + self._request_s
        self._next_token = slot + tokens * self._token_s
        return slot - now


class Budget:
    """Tokens and dollars of a run: the limits, what is spent, and what is reserved for requests in flight.

    A request starts only if its highest possible price is left, so the limit holds although many are in flight. It is exceeded
    only where an endpoint counts more tokens than estimated, by no more requests than are in flight.
    """

    def __init__(self, config: LabelsConfig, tokens: int = 0, usd: float = 0.0) -> None:
        """`tokens` and `usd` are already spent."""
        self.config, self.tokens, self.usd, self.reserved = config, tokens, usd, (0, 0)

    def reserve(self, tokens_in: int, tokens_out: int) -> bool:
        """Reserve the most tokens that a request may take, if the budget has them left; whether it has."""
        reserved = (self.reserved[0] + tokens_in, self.reserved[1] + tokens_out)
        max_tokens, max_usd = self.config.budget_tokens, self.config.budget_usd
        if max_tokens is not None and self.tokens + sum(reserved) > max_tokens:
            return False
        if max_usd is not None and self.usd + price(self.config, *reserved) > max_usd + 1e-9:
            return False
        self.reserved = reserved
        return True

    def release(self, tokens_in: int, tokens_out: int) -> None:
        """Undo a reservation."""
        self.reserved = (self.reserved[0] - tokens_in, self.reserved[1] - tokens_out)

    def spend(self, tokens_in: int, tokens_out: int) -> None:
        """Count an answer's tokens and their price."""
        self.tokens += tokens_in + tokens_out
        self.usd += price(self.config, tokens_in, tokens_out)

    def exhausted(self) -> str:
        """The sentence for a budget that leaves no room."""
        max_tokens, max_usd = self.config.budget_tokens, self.config.budget_usd
        limits = [f"{self.tokens:,} of labels.budget_tokens={max_tokens:,} tokens"] if max_tokens is not None else []
        limits += [f"{self.usd:.4g} of labels.budget_usd={max_usd:g} dollars"] if max_usd is not None else []
        return (
            f"label budget exhausted ({' and '.join(limits)} spent on this run): raise it and rerun to resume; all answers "
            "so far are saved."
        )


@dataclass
class Report:
    """What a task did since its last report, and what it needs.

    Attributes:
        first, last: of the reports of a task.
        in_flight: its requests now.
        waiting: further requests that could be in flight.
        turns: estimated tokens in and out of each request that waits for its turn.
        released, spent: tokens in and out of reservations that ended, and of answers.
        usable: answers that a text came of or could have; `useless`: others, by reason.
        error: ends the job, for all tasks.
        stats: of the task since it began.
    """

    task: str = ""
    first: bool = False
    last: bool = False
    in_flight: int = 0
    waiting: int = 0
    turns: tuple[tuple[int, int], ...] = ()
    released: tuple[int, int] = (0, 0)
    spent: tuple[int, int] = (0, 0)
    usable: int = 0
    useless: Counter[str] = field(default_factory=Counter)
    error: str | None = None
    stats: LabelStats = field(default_factory=LabelStats)


@dataclass(frozen=True)
class Grant:
    """Leave to send.

    Attributes:
        in_flight: how many requests the task may have in flight.
        probing: each answer must be reported before another request takes its place.
        waits: seconds until the turn of each of the first waiting requests.
        stop: why nothing more may be sent.
    """

    in_flight: int
    probing: bool = False
    waits: tuple[float, ...] = ()
    stop: str | None = None


Exchange = Callable[[Report], Awaitable[Grant]]


@dataclass
class _Task:
    seen: float = 0.0  # when it last reported, in seconds of the clock
    demand: int = 0  # requests that it could have in flight
    granted: int = 0  # requests that it may have in flight
    reserved: tuple[int, int] = (0, 0)  # tokens in and out
    stats: LabelStats = field(default_factory=LabelStats)


class RequestLimits:
    """The limits of one job; `exchange` is called by all tasks."""

    def __init__(
        self, config: LabelsConfig, tokens: int = 0, usd: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`tokens` and `usd` are already spent."""
        self.config, self._clock = config, clock
        self.budget = Budget(config, tokens, usd)
        self.rates = MinuteRateLimiter(config.requests_per_minute, config.tokens_per_minute, clock)
        self.error: str | None = None  # ends the job
        self.usable, self.useless = 0, Counter[str]()
        self._tasks: dict[str, _Task] = {}
        self._ended = LabelStats()  # of tasks that are gone

    def exchange(self, report: Report) -> Grant:
        """Take a report and answer it."""
        now = self._clock()
        for name, other in list(self._tasks.items()):
            if now - other.seen > SILENT_S or (report.first and name == report.task):
                self._forget(name, spend=True)  # its requests in flight may have been charged
        task = self._tasks.setdefault(report.task, _Task())
        task.seen, task.stats, task.demand = now, report.stats, report.in_flight + report.waiting
        for_in, for_out = map(min, task.reserved, report.released)  # less only if it counted as dead in between
        task.reserved = (task.reserved[0] - for_in, task.reserved[1] - for_out)
        self.budget.release(for_in, for_out)
        self.budget.spend(*report.spent)
        self.usable += report.usable
        if not self.usable:  # afterwards they would only fill the memory: refusals are all different
            self.useless.update(report.useless)
        self.stop(report.error)
        if not self.usable and self.useless.total() >= PROBE:
            reasons = "; ".join(f"{n} times: {reason}" for reason, n in self.useless.most_common(3))
            self.stop(
                f"the first {self.useless.total()} answers of {self.config.model} are all useless ({reasons}): change the "
                "settings named there, or the model or the prompt; answers so far are saved."
            )
        if report.last:
            self._forget(report.task, spend=False)
            return Grant(0, stop=self.error)
        waits: list[float] = []
        for turn in report.turns if not self.error else ():
            if not self.budget.reserve(*turn):
                break
            task.reserved = (task.reserved[0] + turn[0], task.reserved[1] + turn[1])
            waits.append(self.rates.reserve_slot(sum(turn)))
        if report.turns and not waits and not any(self.budget.reserved):
            self.stop(self.budget.exhausted())
        limit = min(self.config.concurrency, self.config.concurrency if self.usable else PROBE - self.useless.total())
        share = fair_shares(limit, {name: other.demand for name, other in self._tasks.items()})[report.task]
        free = limit - sum(other.granted for other in self._tasks.values() if other is not task)
        granted = 0 if self.error else max(0, min(share, free))
        task.granted = max(granted, report.in_flight)
        return Grant(granted, not self.usable, tuple(waits), self.error)

    def stop(self, reason: str | None) -> None:
        """End the job for all tasks; the first reason counts."""
        self.error = self.error or reason

    def stats(self) -> LabelStats:
        """Of all tasks together."""
        return sum((task.stats for task in self._tasks.values()), self._ended)

    def _forget(self, name: str, spend: bool) -> None:
        task = self._tasks.pop(name)
        self._ended += task.stats
        self.budget.release(*task.reserved)
        if spend:
            self.budget.spend(*task.reserved)


def fair_shares(limit: int, demands: dict[str, int]) -> dict[str, int]:
    """The limit shared out evenly, to none more than its demand; what nobody demands evenly as well."""
    shares, left = {}, len(demands)
    for name, demand in sorted(demands.items(), key=lambda item: item[1]):
        shares[name] = max(0, min(demand, limit // left))
        limit, left = limit - shares[name], left - 1
    return {name: share + limit // len(demands) for name, share in shares.items()}


class StoppedError(Exception):
    """The job ends: send nothing more."""


class LimitsClient:
    """One task's side of the limits; needs a running event loop, in which `run` goes on."""

    def __init__(self, exchange: Exchange, config: LabelsConfig, stats: LabelStats, task: str = "") -> None:
        self._exchange, self._stats, self._task = exchange, stats, task
        limits = (config.budget_tokens, config.budget_usd, config.requests_per_minute, config.tokens_per_minute)
        self._needs_turns = any(limit is not None for limit in limits)
        self._allowed = self._in_flight = self._unjudged = 0
        self._probing = True
        self._waiting: deque[asyncio.Future[None]] = deque()  # for a place in flight
        self._turns: deque[tuple[int, int, asyncio.Future[float]]] = deque()
        self._report = Report(task, first=True)
        self._changed = asyncio.Event()
        self._closing = False
        self.stopped: str | None = None  # why nothing more may be sent

    async def run(self) -> None:
        """Report whenever something is needed, at least every BEAT_S seconds; returns when the job is stopped or over."""
        while not self.stopped and not self._closing:
            self._changed.clear()
            turns = list(self._turns)
            report, self._report = self._report, Report(self._task)
            report.in_flight, report.waiting, report.stats = self._in_flight, len(self._waiting), self._stats
            report.turns = tuple((tokens_in, tokens_out) for tokens_in, tokens_out, _ in turns)
            self._allowed = min(self._allowed, report.in_flight)  # what is left others may get before the grant comes
            grant = await self._exchange(report)
            self._allowed, self._probing = grant.in_flight, grant.probing
            for (_, _, turn), wait_s in zip(turns, grant.waits, strict=False):
                if not turn.done():  # as after `stop`
                    self._turns.popleft()
                    turn.set_result(wait_s)
            if grant.stop:
                self.stop(grant.stop)
            self._start_waiting()
            try:
                async with asyncio.timeout(BEAT_S):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def close(self, run: "asyncio.Task[None]") -> None:
        """Let `run` end, and send the last report."""
        self._closing = True
        self._changed.set()
        await asyncio.wait([run])
        self._report.last, self._report.error, self._report.stats = True, self.stopped, self._stats
        await self._exchange(self._report)

    async def acquire(self, estimate: Callable[[], tuple[int, int]]) -> tuple[int, int]:
        """Return when a request may be sent what it reserves; StoppedError if nothing may be sent any more.

        Args:
            estimate: returns the most tokens in and out that it may take, called when it has a place in flight.
        """
        if self.stopped:
            raise StoppedError
        loop = asyncio.get_running_loop()
        if self._waiting or self._in_flight >= self._allowed:
            self._waiting.append(place := loop.create_future())
            if not self._allowed:
                self._changed.set()
            await place
        else:
            self._in_flight += 1
        try:
            reserved = estimate()
            if self._needs_turns and not self.stopped:
                turn: asyncio.Future[float] = loop.create_future()
                self._turns.append((*reserved, turn))
                self._changed.set()
                await asyncio.sleep(await turn)
            if self.stopped:
                raise StoppedError
            return reserved
        except BaseException:
            self._leave()
            raise

    def settle(self, reserved: tuple[int, int], spent: tuple[int, int] = (0, 0), answered: bool = False) -> None:
        """End what `acquire` began: tokens in and out that were reserved and that were spent; an answer is judged next."""
        report = self._report
        if self._needs_turns:
            report.released = (report.released[0] + reserved[0], report.released[1] + reserved[1])
        report.spent = (report.spent[0] + spent[0], report.spent[1] + spent[1])
        if answered and self._probing:
            self._unjudged += 1
        else:
            self._leave()

    def judge(self, useless: str | None) -> None:
        """Count an answer: None, or why no answer like it can become a text."""
        if useless is None:
            self._report.usable += 1
        else:
            self._report.useless[useless] += 1
        if self._unjudged:
            self._unjudged -= 1
            self._leave()

    def stop(self, reason: str) -> None:
        """Send nothing more, in any task."""
        self.stopped = self.stopped or reason
        futures: list[asyncio.Future[Any]] = [*self._waiting, *(turn for _, _, turn in self._turns)]
        for future in futures:
            if not future.done():
                future.set_exception(StoppedError())
        self._waiting.clear()
        self._turns.clear()
        self._changed.set()

    def _leave(self) -> None:
        """A request is no longer in flight."""
        self._in_flight -= 1
        self._allowed -= self._probing
        self._start_waiting()
        if self._probing or self._turns:
            self._changed.set()

    def _start_waiting(self) -> None:
        while self._waiting and self._in_flight < self._allowed:
            place = self._waiting.popleft()
            if not place.done():
                self._in_flight += 1
                place.set_result(None)


def in_process(limits: RequestLimits) -> Exchange:
    """The exchange of a job with one task."""

    async def exchange(report: Report) -> Grant:
        return limits.exchange(report)

    return exchange
