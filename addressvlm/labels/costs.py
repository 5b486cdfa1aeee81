"""Tokens, money and time of labelling: an estimate before, statistics and a report after.

Text counts as one token per four letters of Latin script and one per letter of any other script; an image by the rule in the
settings. Endpoints count differently, so the usage that they report replaces the estimate as soon as there are answers.
"""

import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from PIL import Image

from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.labelers import RetryState, label_source, settings_digest
from addressvlm.labels.prompt import configured_prompt
from addressvlm.labels.response_cache import CachedAnswer, read_answers
from addressvlm.storage.remote_path import AnyPath

LETTERS_PER_TOKEN = 4
CHAT_TOKENS = 16  # of the chat template around the messages
TILE, MAX_SIDE, SHORT_SIDE = 512, 2048, 768  # pixels: a tile, and the sizes to which an image is reduced before
PATCH, MAX_PATCHES = 32, 1536
ANSWER_S = 5.0  # assumed where no answer was timed yet


def price(config: LabelsConfig, tokens_in: float, tokens_out: float) -> float:
    """US dollars for so many tokens; 0 where no prices are set."""
    return (tokens_in * (config.usd_per_million_in or 0) + tokens_out * (config.usd_per_million_out or 0)) / 1e6


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
        rows, answered: rows, and how many of them have an answer in the cache; a changed image or text counts as answered here.
        tokens_in: estimate for one request per row that is left.
        other_answers: cached answers to another prompt or from another model.
        answer_s: mean time of the answers that count here, in seconds.
    """

    config: LabelsConfig
    rows: int = 0
    answered: int = 0
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
        lines = [f"label: {self.rows:,} rows: {self.answered:,} have cached answers, {rows:,} will be sent"]
        if self.other_answers:
            lines.append(f"  {self.other_answers:,} cached answers are to other prompts or from other models and are not used")
        if rows:
            lines.append(
                f"  tokens: about {self.tokens_in:,} in ({self.tokens_in / rows:,.0f} a row), at most {self.tokens_out:,} out, "
                f"for one request a row; up to {config.max_attempts} where answers are not valid"
            )
        cost = "unknown without labels.usd_per_million_in and labels.usd_per_million_out"
        if config.usd_per_million_in is not None and config.usd_per_million_out is not None:
            usd_in, usd_out = price(config, self.tokens_in, 0), price(config, 0, self.tokens_out)
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
    config: LabelsConfig, ids: Iterable[str], sample: Iterable[RetryState], cache: AnyPath, retry_failed: bool = False
) -> CostEstimate:
    """What is left to do; sends nothing, and reads no images but those of the sample.

    Args:
        ids: of all rows.
        sample: some of the rows, for the tokens of one.
        cache: folder of the response cache.
    """
    estimate, settings = CostEstimate(config), settings_digest(config, configured_prompt(config).version)
    answered: set[str] = set()
    answers, seconds = 0, 0.0
    for entry in read_answers(cache):
        if entry is None or (retry_failed and entry[1].failure):
            continue
        key, answer, _ = entry
        estimate.spent_tokens += answer.tokens_in + answer.tokens_out
        estimate.spent_usd += answer.usd
        if answer.lost is None and key.settings == settings:
            answered.add(key.id)
        if answer.lost is None and answer.failure is None:
            if key.settings == settings:
                answers, seconds = answers + 1, seconds + answer.seconds
            else:
                estimate.other_answers += 1
    for row_id in ids:
        estimate.rows += 1
        estimate.answered += row_id in answered
    if tokens := [input_tokens(state) for state in sample]:
        estimate.tokens_in = round(fmean(tokens) * estimate.rows_left)
    if answers:
        estimate.answer_s = seconds / answers
    return estimate


@dataclass
class LabelStats:
    """Statistics of one job.

    Attributes:
        rows: that were sent and have their label, of `total`.
        asked: requests sent, retries included.
        refused, empty, unusable: answers without a text.
        lost, lost_tokens: requests that may have been charged, without an answer, and what they may have cost.
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
    unusable: int = 0
    lost: int = 0
    lost_tokens: int = 0
    failed: int = 0
    unreadable: int = 0
    again: Counter[str] = field(default_factory=Counter)
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "LabelStats") -> "LabelStats":
        """Of two jobs at the same time, or of two parts of one."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__}
        return LabelStats(**{**sums, "seconds": max(self.seconds, other.seconds)})

    def count(self, answer: CachedAnswer) -> None:
        """Add one answer."""
        self.answered += 1
        self.refused += answer.refusal is not None
        self.unusable += answer.unusable is not None
        self.empty += answer.refusal is None and answer.unusable is None and not answer.text
        self.tokens_in += answer.tokens_in
        self.tokens_out += answer.tokens_out
        self.usd += answer.usd

    def count_lost(self, answer: CachedAnswer) -> None:
        """Add what a request may have cost whose answer was lost."""
        self.lost += 1
        self.lost_tokens += answer.tokens_in + answer.tokens_out
        self.usd += answer.usd

    def line(self) -> str:
        """Progress on one line: rows, tokens, cost, time left."""
        parts = [f"{self.rows:,}/{self.total:,} rows labelled", self.note()]
        if 0 < self.rows < self.total:
            parts.append(f"{self.seconds / self.rows * (self.total - self.rows):,.0f} s left")
        return f"label: {', '.join(parts)}"

    def note(self) -> str:
        """Tokens, cost and retries so far."""
        parts = [f"{self.tokens_in + self.tokens_out + self.lost_tokens:,} tokens"]
        if self.usd:
            parts.append(f"{self.usd:,.4g} US dollars")
        if self.again:
            parts.append(f"{self.again.total():,} retries")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The counts by name, for labels.json."""
        return {**asdict(self), "again": dict(sorted(self.again.items()))}


def label_report(config: LabelsConfig, counts: Counter[str], stats: Mapping[str, Any], cache: AnyPath | None) -> dict[str, Any]:
    """The content of labels.json: labels by source, problems of rejected texts, requests and cost.

    Args:
        counts: `source <source>` and `problem <kind>`, as from `label_batch`.
        stats: of the job that sent the last requests, empty if there is none.
        cache: folder of the response cache, None if there is none.
    """
    prompt = configured_prompt(config)
    run = {"tokens": 0, "usd": 0.0} if cache else {}
    for entry in read_answers(cache) if cache else ():
        if entry:
            run["tokens"] += entry[1].tokens_in + entry[1].tokens_out
            run["usd"] = round(run["usd"] + entry[1].usd, 9)
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
        "run": run,
    }


def report_summary(report: Mapping[str, Any]) -> str:
    """A report of `label_report` on one line."""
    parts = [f"{report['rows']:,} labels: {_join(report['sources'])}"]
    if report["problems"]:
        hint = " (raise labels.max_tokens)" if "limit" in report["problems"] else ""
        parts.append(f"texts rejected for: {_join(report['problems'])}{hint}")
    if job := report["last_job"]:
        retries = f" (retries: {_join(job['again'])})" if job["again"] else ""
        without = ", ".join(f"{job[kind]:,} {kind}" for kind in ("refused", "empty", "unusable", "lost"))
        parts.append(f"{job['asked']:,} requests{retries}, answers without a text: {without}")
    if run := report["run"]:
        parts.append(f"the run has cost {run['tokens']:,} tokens, {run['usd']:.4g} US dollars")
    return "; ".join(parts)


def _join(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counts.items())
