"""Labels written by a model behind an OpenAI-compatible endpoint, each paid for once."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import uvloop

from addressvlm.config_labels import LabelsConfig
from addressvlm.errors import InputError
from addressvlm.labels.attempts import Attempts
from addressvlm.labels.client import endpoint_key
from addressvlm.labels.engine import Asking, nothing
from addressvlm.labels.ledger import WritableLedger
from addressvlm.labels.tally import Tally
from addressvlm.labels.writer import Label, Request


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
    begin: Callable[[Request], Attempts]
    ledger: WritableLedger | None = None
    show: Callable[[str], object] = nothing
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

    def settle(self, requests: Iterable[Request], total: int, done: Callable[[int, Label], object] = nothing) -> Tally:
        """Ask until every row has its label; memory holds the rows in flight.

        Args:
            requests: read in another thread.
            total: how many of them the ledger has no label for, to tell the time that is left.
            done: gets the number of each row and its label, in any order.

        Raises:
            InputError: the endpoint refuses the key, the model or a request, or keeps failing; the budget is used up; the
                disk is full. All answers until then are in the ledger.
        """

        async def run() -> Tally:
            return await Asking(self.config, self.begin, self.ledger, self.show, self.again, done).run(requests, total)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run())
