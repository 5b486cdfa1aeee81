"""What asking costs, before it is asked.

Text is counted as a token for four letters of Latin script and one for any other letter; an image by the rule in the
settings. Endpoints count differently and change their ways, so what they report takes the place of the estimate as soon as
answers are in.
"""

import io
import math
from dataclasses import dataclass

from PIL import Image

from addressvlm.config_labels import LabelsConfig
from addressvlm.labels.attempts import Attempts

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


def tokens_sent(row: Attempts) -> int:
    """Estimate of the tokens of a row's first ask."""
    with Image.open(io.BytesIO(row.request.image)) as image:
        size = image.size
    text = "".join(m["content"] for m in row.prompt.opening()) + row.prompt.ask(row.request.facts, row.question)
    return text_tokens(text) + image_tokens(row.config, *size) + FRAMING


@dataclass
class Plan:
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
                f"{self.tokens_out:,} out, for one ask a row; up to {config.attempts} asks where answers fail their checks"
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
