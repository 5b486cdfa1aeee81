"""Labels from a ledger: what was answered goes through the same checks as on the day it came."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b

from addressvlm.config.labels import LabelsConfig
from addressvlm.errors import InputError
from addressvlm.labels.costs import CostEstimate, tokens_sent
from addressvlm.labels.labelers import Label, Request, writer
from addressvlm.labels.response_cache import RequestKey, ResponseCache
from addressvlm.labels.retry import RetryState

SHAPES_THE_ANSWER = {
    "send_image", "image_pixels", "image_quality", "image_detail", "max_tokens", "temperature", "request", "language",
}  # fmt: skip
NO_ANSWER = "no answer"  # kind of problem of a row that the endpoint failed for


def request_key(row: RetryState) -> RequestKey:
    """What the next ask of a row will be."""
    asks = row.config
    sent = [
        # The server of vllm is one of our own, on another port each time.
        [asks.labeler, asks.model, asks.base_url if asks.labeler == "openai" else None],
        row.prompt.version,
        row.prompt.ask(row.request.facts, row.question),
        asks.model_dump(include=SHAPES_THE_ANSWER),
    ]
    return RequestKey(
        id=row.request.id,
        prompt=row.prompt.version,
        model=writer(asks),
        image=blake2b(row.request.image, digest_size=16).hexdigest(),
        digest=blake2b(json.dumps(sent, sort_keys=True).encode(), digest_size=16).hexdigest(),
        number=row.number + 1,
    )


def replay_answers(row: RetryState, asked: RequestKey, ledger: ResponseCache, again: bool = False) -> Label | None:
    """Go through the answers of a row as far as they reach; None if it must be asked about.

    Args:
        row: not asked about yet.
        asked: its first ask.
        again: whether a row that the endpoint failed for is to be asked about once more.
    """
    while (answer := ledger.get(asked)) is not None and not (again and answer.failure):
        if answer.failure is not None:
            return no_answer(row)
        label = row.take(answer.text, answer.refusal)
        if label is not None:
            return label
        asked = replace(asked, number=row.number + 1)
    return None


def no_answer(row: RetryState) -> Label:
    """The label of a row that the endpoint failed for."""
    label = row.fall_back()
    return replace(label, problems=(*label.problems, NO_ANSWER))


def survey_cache(
    config: LabelsConfig,
    begin: Callable[[Request], RetryState],
    requests: Iterable[Request],
    ledger: ResponseCache,
    again: bool = False,
) -> CostEstimate:
    """What is left to ask about these rows; asks nothing."""
    plan = CostEstimate(config, spent_tokens=ledger.tokens, spent_usd=ledger.usd)
    used: set[tuple[str, str]] = set()
    for request in requests:
        row = begin(request)
        plan.rows += 1
        used.add((row.prompt.version, writer(row.config)))
        if replay_answers(row, request_key(row), ledger, again) is not None:
            plan.settled += 1
            continue
        plan.tokens_in += tokens_sent(row)
        plan.begun += row.number > 0
    plan.others = sum(n for key, n in ledger.answers.items() if key not in used)
    if mine := sum(ledger.answers.values()) - plan.others:
        plan.answer_s = ledger.seconds / (mine + plan.others)
    return plan


class CachedLabeler:
    """Labels of rows that were all asked about before."""

    def __init__(self, begin: Callable[[Request], RetryState], ledger: ResponseCache) -> None:
        self._begin, self._ledger = begin, ledger

    def label(self, requests: Sequence[Request]) -> list[Label]:
        """See Labeler.

        Raises:
            InputError: a row was never asked about to its end.
        """
        labels = []
        for request in requests:
            row = self._begin(request)
            label = replay_answers(row, request_key(row), self._ledger)
            if label is None:
                raise InputError(f"{self._ledger.folder} lacks the answer for row {request.id}: run the same command again.")
            labels.append(label)
        return labels
