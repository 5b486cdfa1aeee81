"""How fast and for how much an endpoint may be asked.

One process asks for a whole job, so what it keeps holds for the cluster: waiting for answers needs no second processor,
and a second asking process would only have to share its limits, its budget and its ledger with the first.
"""

import asyncio
import time
from collections.abc import Callable

from addressvlm.config_labels import LabelsConfig
from addressvlm.errors import InputError


class Pace:
    """Requests and tokens a minute, evenly spread: no window of any length holds more than its share and one request.

    A bucket that may be emptied at once would let a minute's worth pass in its first second, which endpoints refuse.
    """

    def __init__(self, requests: float | None, tokens: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Limits a minute; None is no limit."""
        self._request_s = 60 / requests if requests else 0.0
        self._token_s = 60 / tokens if tokens else 0.0
        self._clock = clock
        self._next_request = self._next_token = clock()

    def slot(self, tokens: float) -> float:
        """Take the next turn for a request of so many tokens, and say in how many seconds it comes."""
        now = self._clock()
        turn = max(now, self._next_request, self._next_token)
        self._next_request = turn + self._request_s
        self._next_token = turn + tokens * self._token_s
        return turn - now

    async def wait(self, tokens: float) -> None:
        """Return when it is this request's turn."""
        if self._request_s or self._token_s:
            await asyncio.sleep(self.slot(tokens))


class Budget:
    """What may be spent on a run, in tokens and in money, what is spent, and what is set aside for asks in flight.

    An ask starts only if there is enough left for what it may cost at most, so that the cap holds although many are in
    flight. It is overshot only where an endpoint counts more tokens than were estimated, by as many asks as are in flight.
    """

    def __init__(self, config: LabelsConfig, tokens: int = 0, usd: float = 0.0) -> None:
        """`tokens` and `usd` are spent already."""
        self.config, self.tokens, self.usd = config, tokens, usd
        self._held_tokens, self._held_usd, self._holders = 0.0, 0.0, 0
        self._changed = asyncio.Event()

    def price(self, tokens_in: float, tokens_out: float) -> float:
        """US dollars for so many tokens; 0 where no prices are set."""
        return (tokens_in * (self.config.usd_per_million_in or 0) + tokens_out * (self.config.usd_per_million_out or 0)) / 1e6

    async def hold(self, tokens_in: float, tokens_out: float) -> None:
        """Set aside what an ask may cost; waits while asks in flight may leave enough.

        Raises:
            InputError: there is not enough left.
        """
        tokens, usd = tokens_in + tokens_out, self.price(tokens_in, tokens_out)
        while not self._fits(tokens, usd):
            if not self._holders:
                raise self._used_up()
            self._changed.clear()
            await self._changed.wait()
        self._held_tokens += tokens
        self._held_usd += usd
        self._holders += 1

    def release(self, tokens_in: float, tokens_out: float) -> None:
        """Give back what `hold` set aside."""
        self._held_tokens -= tokens_in + tokens_out
        self._held_usd -= self.price(tokens_in, tokens_out)
        self._holders -= 1
        self._changed.set()

    def spend(self, tokens_in: int, tokens_out: int) -> float:
        """Count what an answer cost, and return that in US dollars."""
        usd = self.price(tokens_in, tokens_out)
        self.tokens += tokens_in + tokens_out
        self.usd += usd
        return usd

    def _fits(self, tokens: float, usd: float) -> bool:
        most_tokens, most_usd = self.config.budget_tokens, self.config.budget_usd
        return (most_tokens is None or self.tokens + self._held_tokens + tokens <= most_tokens) and (
            most_usd is None or self.usd + self._held_usd + usd <= most_usd + 1e-9
        )

    def _used_up(self) -> InputError:
        limits = []
        if self.config.budget_tokens is not None:
            limits.append(f"{self.tokens:,} of labels.budget_tokens={self.config.budget_tokens:,} tokens")
        if self.config.budget_usd is not None:
            limits.append(f"{self.usd:.4g} of labels.budget_usd={self.config.budget_usd:g} dollars")
        return InputError(
            f"the budget leaves no room for another ask ({' and '.join(limits)} spent on this run): raise it and run the same "
            "command again; every answer so far is kept."
        )
