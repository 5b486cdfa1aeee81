"""Tokens, money and time of labelling: an estimate before, statistics and a report after.

Text counts as one token per four letters of Latin script and one per letter of any other script; an image by the rule in the
settings. Endpoints count differently, so the usage that they report replaces the estimate as soon as there are answers.
"""

import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.labelers import Request, RetryState, label_source
from addressvlm.labels.prompt import configured_prompt
from addressvlm.labels.response_cache import CachedAnswer, ResponseCache

LETTERS_PER_TOKEN = 4
CHAT_TOKENS = 16  # of the chat template around the messages
TILE, MAX_SIDE, SHORT_SIDE = 512, 2048, 768  # pixels: a tile, and the sizes to which an image is reduced before
PATCH, MAX_PATCHES = 32, 1536
ANSWER_S = 5.0  # assumed where no answer was timed yet


def text_tokens(text: str) -> int:
    """About how many tokens a text is."""
    latin = sum(letter < "\u0250" for letter in text)
    return math.ceil(latin / LETTERS_PER_TOKEN) + len(text) - latin


def image_tokens(config: LabelsConfig, width: int, height: int) -> int:
    """Tokens of an image of this size in pixels, by `labels.image_rule`."""
    if not config.send_image:
        return 0
    scale = min(1.0, (config.image_pixels or math.inf) / max(width, height))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    if config.image_rule == "patches":
        patches = math.ceil(width / PATCH) * math.ceil(height / PATCH)
        return math.ceil(config.image_each * min(patches, MAX_PATCHES))
    if config.image_rule == "fixed" or config.image_detail == "low":
        return config.image_base
    scale = min(1.0, MAX_SIDE / max(width, height))
    scale *= min(1.0, SHORT_SIDE / (min(width, height) * scale))
    tiles = math.ceil(width * scale / TILE) * math.ceil(height * scale / TILE)
    return math.ceil(config.image_base + config.image_each * tiles)


def input_tokens(state: RetryState) -> int:
    """Estimate of the tokens of a row's first request."""
    with Image.open(io.BytesIO(state.request.image)) as image:
        size = image.size
    messages = [message["content"] for message in state.prompt.opening_messages()]
    text = "".join([*messages, state.prompt.user_message(state.request.facts, state.question)])
    return text_tokens(text) + image_tokens(state.config, *size) + CHAT_TOKENS


@dataclass
class CostEstimate:
    """What is left to do for a run.

    Attributes:
        rows, answered: rows with an image, and how many of them have their label in the cache.
        partly_answered: rows with cached answers that need another attempt.
        tokens_in: estimate for one request per row that is left.
        other_answers: cached answers to another prompt or from another model.
        answer_s: mean time of an answer so far, in seconds.
    """

    config: LabelsConfig
    rows: int = 0
    answered: int = 0
    partly_answered: int = 0
    tokens_in: int = 0
    other_answers: int = 0
    answer_s: float = ANSWER_S
    spent_tokens: int = 0
    spent_usd: float = 0.0

    @property
    def rows_left(self) -> int:
        """Rows that need a request."""
        return self.rows - self.answered

    @property
    def tokens_out(self) -> int:
        """Upper bound for one answer per row that is left."""
        return self.rows_left * self.config.max_tokens

    def minutes(self) -> float:
        """How long one request per row takes within the limits."""
        config = self.config
        tokens = self.tokens_in + self.tokens_out
        limits = [self.rows_left / config.concurrency * self.answer_s / 60]
        limits += [self.rows_left / config.requests_per_minute] if config.requests_per_minute else []
        limits += [tokens / config.tokens_per_minute] if config.tokens_per_minute else []
        return max(limits)

    def text(self) -> str:
        """The estimate in a few lines."""
        config, rows = self.config, self.rows_left
        again = f" ({self.partly_answered:,} of them again)" if self.partly_answered else ""
        lines = [f"label: {self.rows:,} rows: {self.answered:,} have cached answers, {rows:,} will be sent{again}"]
        if self.other_answers:
            lines.append(f"  {self.other_answers:,} cached answers are to other prompts or from other models and are not used")
        if rows:
            lines.append(
                f"  tokens: about {self.tokens_in:,} in ({self.tokens_in / rows:,.0f} a row), at most {self.tokens_out:,} out, "
                f"for one request a row; up to {config.max_attempts} where answers are not valid"
            )
        cost = "unknown without labels.usd_per_million_in and labels.usd_per_million_out"
        if config.usd_per_million_in is not None and config.usd_per_million_out is not None:
            usd_in, usd_out = (
                config.usd_per_million_in * self.tokens_in / 1e6,
                config.usd_per_million_out * self.tokens_out / 1e6,
            )
            cost = f"at most {usd_in + usd_out:.4g} US dollars ({usd_in:.4g} for tokens in, {usd_out:.4g} for tokens out)"
        lines.append(f"  cost: {cost}; spent so far {self.spent_tokens:,} tokens, {self.spent_usd:.4g} US dollars")
        if rows:
            requests = f"{config.requests_per_minute:,g} requests" if config.requests_per_minute else "no limit of requests"
            tokens = f"{config.tokens_per_minute:,g} tokens" if config.tokens_per_minute else "no limit of tokens"
            lines.append(
                f"  time: about {self.minutes():,.1f} min with {config.concurrency} requests in flight, {self.answer_s:.3g} s "
                f"per answer, {requests} a minute, {tokens} a minute"
            )
        return "\n".join(lines)


def estimate_cost(
    config: LabelsConfig,
    new_state: Callable[[Request], RetryState],
    requests: Iterable[Request],
    cache: ResponseCache,
    retry_failed: bool = False,
) -> CostEstimate:
    """What is left to do for these rows; sends nothing."""
    estimate = CostEstimate(config, spent_tokens=cache.tokens, spent_usd=cache.usd)
    used: set[tuple[str, str]] = set()
    for request in requests:
        state = new_state(request)
        estimate.rows += 1
        used.add((state.prompt.version, label_source(state.config)))
        if state.replay(cache, retry_failed) is not None:
            estimate.answered += 1
            continue
        estimate.tokens_in += input_tokens(state)
        estimate.partly_answered += state.attempts > 0
    answers = cache.answers.total()
    estimate.other_answers = sum(n for key, n in cache.answers.items() if key not in used)
    if answers > estimate.other_answers:
        estimate.answer_s = cache.seconds / answers
    return estimate


@dataclass
class LabelStats:
    """Statistics of one job.

    Attributes:
        rows: that were sent and have their label, of `total`.
        asked: requests sent, retries included.
        refused, empty: answers without a text.
        failed: rows for which the endpoint kept failing.
        unreadable: rows whose image can't be decoded.
        again: retries by reason: an HTTP status, time-out, connection, no JSON.
        seconds: since the job began.
    """

    total: int = 0
    rows: int = 0
    asked: int = 0
    answered: int = 0
    refused: int = 0
    empty: int = 0
    failed: int = 0
    unreadable: int = 0
    again: Counter[str] = field(default_factory=Counter)
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    seconds: float = 0.0

    def count(self, answer: CachedAnswer) -> None:
        """Add one answer."""
        self.answered += 1
        self.refused += answer.refusal is not None
        self.empty += answer.refusal is None and not answer.text
        self.tokens_in += answer.tokens_in
        self.tokens_out += answer.tokens_out
        self.usd += answer.usd

    def line(self) -> str:
        """Progress on one line: rows, tokens, cost, time left."""
        parts = [f"{self.rows:,}/{self.total:,} rows labelled", f"{self.tokens_in + self.tokens_out:,} tokens"]
        if self.usd:
            parts.append(f"{self.usd:,.4g} US dollars")
        if self.again:
            parts.append(f"{self.again.total():,} retries")
        if 0 < self.rows < self.total:
            parts.append(f"{self.seconds / self.rows * (self.total - self.rows):,.0f} s left")
        return f"label: {', '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """The counts by name, for labels.json."""
        return {**asdict(self), "again": dict(sorted(self.again.items()))}


def label_report(
    config: LabelsConfig, counts: Counter[str], stats: Mapping[str, Any], cache: ResponseCache | None
) -> dict[str, Any]:
    """The content of labels.json: labels by source, problems of rejected texts, requests and cost.

    Args:
        counts: `source <source>` and `problem <kind>`, as from `label_batch`.
        stats: of the job that sent the last requests, empty if there is none.
    """
    prompt = configured_prompt(config)
    sources, problems = (
        {key.removeprefix(prefix): n for key, n in counts.most_common() if key.startswith(prefix)}
        for prefix in ("source ", "problem ")
    )
    return {
        "prompt": prompt.name,
        "version": prompt.version,
        "writer": "template" if config.labeler == "template" else label_source(config),
        "rows": sum(sources.values()),
        "sources": sources,
        "problems": problems,  # over all attempts; a text may have several
        "last_job": dict(stats),
        "run": {"tokens": cache.tokens, "usd": round(cache.usd, 6)} if cache else {},
    }


def report_summary(report: Mapping[str, Any]) -> str:
    """A report of `label_report` on one line."""
    parts = [f"{report['rows']:,} labels: {_join(report['sources'])}"]
    if report["problems"]:
        parts.append(f"texts rejected for: {_join(report['problems'])}")
    if job := report["last_job"]:
        retries = f" (retries: {_join(job['again'])})" if job["again"] else ""
        parts.append(f"{job['asked']:,} requests{retries}, {job['refused']:,} refused, {job['empty']:,} empty answers")
    if run := report["run"]:
        parts.append(f"the run has cost {run['tokens']:,} tokens, {run['usd']:.4g} US dollars")
    return "; ".join(parts)


def _join(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counts.items())
