"""What asking costs, before it is asked.

Text is counted as a token for four letters of Latin script and one for any other letter; an image by the rule in the
settings. Endpoints count differently and change their ways, so what they report takes the place of the estimate as soon as
answers are in.
"""

import io
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.labelers import writer
from addressvlm.labels.prompt import prompt_of
from addressvlm.labels.response_cache import CachedAnswer, ResponseCache
from addressvlm.labels.retry import RetryState

LETTERS_PER_TOKEN = 4
FRAMING = 16  # tokens around the messages of a chat
TILE, TILES_WITHIN, SHORT_SIDE = 512, 2048, 768  # pixels: a tile, and what an image is made smaller to before it is cut
PATCH, MOST_PATCHES = 32, 1536
USUAL_S = 5.0  # taken for the time of an answer where none is known


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
        return math.ceil(config.image_each * min(patches, MOST_PATCHES))
    if config.image_rule == "fixed" or config.image_detail == "low":
        return config.image_base
    scale = min(1.0, TILES_WITHIN / max(width, height))
    scale *= min(1.0, SHORT_SIDE / (min(width, height) * scale))
    tiles = math.ceil(width * scale / TILE) * math.ceil(height * scale / TILE)
    return math.ceil(config.image_base + config.image_each * tiles)


def tokens_sent(row: RetryState) -> int:
    """Estimate of the tokens of a row's first ask."""
    with Image.open(io.BytesIO(row.request.image)) as image:
        size = image.size
    text = "".join(m["content"] for m in row.prompt.opening()) + row.prompt.ask(row.request.facts, row.question)
    return text_tokens(text) + image_tokens(row.config, *size) + FRAMING


@dataclass
class CostEstimate:
    """What is left to ask about a run.

    Attributes:
        rows, settled: rows with an image, and how many of them have their label in the ledger.
        begun: rows that were asked about and need another ask.
        tokens_in: estimate of one ask for each row that is left.
        others: answers in the ledger to another prompt or from another model.
        answer_s: mean time of an answer so far, in seconds.
    """

    config: LabelsConfig
    rows: int = 0
    settled: int = 0
    begun: int = 0
    tokens_in: int = 0
    others: int = 0
    answer_s: float = USUAL_S
    spent_tokens: int = 0
    spent_usd: float = 0.0

    @property
    def left(self) -> int:
        """Rows that must be asked about."""
        return self.rows - self.settled

    @property
    def tokens_out(self) -> int:
        """Most that one answer to each row that is left may be."""
        return self.left * self.config.max_tokens

    def minutes(self) -> float:
        """How long one ask for each row takes at the limits."""
        config = self.config
        tokens = self.tokens_in + self.tokens_out
        limits = [self.left / config.concurrency * self.answer_s / 60]
        limits += [self.left / config.requests_per_minute] if config.requests_per_minute else []
        limits += [tokens / config.tokens_per_minute] if config.tokens_per_minute else []
        return max(limits)

    def text(self) -> str:
        """The plan in a few lines."""
        config = self.config
        reuse = f"{self.settled:,} are answered in the ledger, {self.left:,} will be asked"
        lines = [f"label: {self.rows:,} rows: {reuse}" + (f" ({self.begun:,} of them again)" if self.begun else "")]
        if self.others:
            lines.append(f"  {self.others:,} answers in the ledger are to other prompts or from other models and are not used")
        if self.left:
            lines.append(
                f"  tokens: about {self.tokens_in:,} in ({self.tokens_in / self.left:,.0f} a row), at most "
                f"{self.tokens_out:,} out, for one ask a row; up to {config.max_attempts} asks where answers fail their checks"
            )
        lines.append(f"  money: {self.money()}; spent so far {self.spent_tokens:,} tokens, {self.spent_usd:.4g} US dollars")
        if self.left:
            lines.append(
                f"  time: about {self.minutes():,.1f} min with {config.concurrency} requests in flight, {self.answer_s:.3g} s "
                f"an answer, {_limit(config.requests_per_minute, 'requests')}, {_limit(config.tokens_per_minute, 'tokens')}"
            )
        return "\n".join(lines)

    def money(self) -> str:
        """What one ask for each row costs at most."""
        config = self.config
        if config.usd_per_million_in is None or config.usd_per_million_out is None:
            return "unknown without labels.usd_per_million_in and labels.usd_per_million_out"
        sent, written = config.usd_per_million_in * self.tokens_in / 1e6, config.usd_per_million_out * self.tokens_out / 1e6
        return f"at most {sent + written:.4g} US dollars ({sent:.4g} for tokens in, {written:.4g} for tokens out)"


def _limit(per_minute: float | None, what: str) -> str:
    return f"{per_minute:,g} {what} a minute" if per_minute else f"no limit of {what}"


KINDS = ("source ", "problem ")


@dataclass
class LabelStats:
    """Counts of one job.

    Attributes:
        rows: that were asked about and have their label, of `total`.
        asked: requests sent, tries again among them.
        refused, empty: answers without a text.
        failed: rows that the endpoint never answered for.
        unreadable: rows whose image can't be decoded.
        again: tries again by reason: an HTTP status, time-out, connection, no JSON.
        seconds: since the first row was read.
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
        """Progress in a line: rows, tokens, money, time left."""
        parts = [f"{self.rows:,}/{self.total:,} rows asked about", f"{self.tokens_in + self.tokens_out:,} tokens"]
        if self.usd:
            parts.append(f"{self.usd:,.4g} US dollars")
        if self.again:
            parts.append(f"{self.again.total():,} tries again")
        if 0 < self.rows < self.total:
            parts.append(f"{self.seconds / self.rows * (self.total - self.rows):,.0f} s left")
        return f"label: {', '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """The counts by name, for labels.json."""
        return {**asdict(self), "again": dict(sorted(self.again.items()))}


def label_report(
    config: LabelsConfig, counts: Counter[str], tally: Mapping[str, Any], ledger: ResponseCache | None
) -> dict[str, Any]:
    """What labels.json holds: who wrote how many labels, why texts were not taken, what was asked and what it cost.

    Args:
        counts: `source <who>` and `problem <kind>`, as from `label_batch`.
        tally: of the job that asked last, empty if none did.
    """
    prompt = prompt_of(config)
    by = {kind: {key.removeprefix(kind): n for key, n in counts.most_common() if key.startswith(kind)} for kind in KINDS}
    return {
        "prompt": prompt.name,
        "version": prompt.version,
        "writer": "template" if config.labeler == "template" else writer(config),
        "rows": sum(by["source "].values()),
        "sources": by["source "],
        "problems": by["problem "],  # over all asks; a text may have several
        "last_job": dict(tally),
        "run": {"tokens": ledger.tokens, "usd": round(ledger.usd, 6)} if ledger else {},
    }


def report_summary(report: Mapping[str, Any]) -> str:
    """What a report of `label_report` holds, in a few words."""
    said = [f"{report['rows']:,} labels: {_list(report['sources'])}"]
    if report["problems"]:
        said.append(f"texts not taken for: {_list(report['problems'])}")
    if job := report["last_job"]:
        again = f" (tried again: {_list(job['again'])})" if job["again"] else ""
        said.append(f"{job['asked']:,} requests{again}, {job['refused']:,} refused, {job['empty']:,} empty answers")
    if run := report["run"]:
        said.append(f"the run has cost {run['tokens']:,} tokens, {run['usd']:.4g} US dollars")
    return "; ".join(said)


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in counts.items())
