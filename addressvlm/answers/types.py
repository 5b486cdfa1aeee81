"""What is asked of free generation and what comes out of it; without torch, for programs that only pass it on."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_tokens: of an answer, its end included.
        temperature: 0 takes the likeliest token each time.
        top_p: draw among the likeliest tokens that have this much probability together.
        n: continuations of the same prompt.
        stop: texts before which an answer ends.
        logprobs: how many alternatives to report for each token; None reports nothing.
        seed: the same draws again; None draws from torch's own state.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1
    stop: Sequence[str] = ()
    logprobs: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class TokenScore:
    """A token of an answer and ln of its probability; `top` are the likeliest at its place as (text, ln p)."""

    text: str
    log_p: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class TextChunk:
    """What was added to one of the continuations.

    Attributes:
        index: which of the n.
        text: whole characters; may be empty.
        finish: `stop` or `length` with the last piece of an answer, before that None.
        scores: of the tokens that this piece is made of, if asked for.
        prompt_tokens: length of the prompt, images included.
        tokens: of the answer so far, its end included.
    """

    index: int
    text: str
    finish: str | None = None
    scores: tuple[TokenScore, ...] = ()
    prompt_tokens: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Completion:
    """A whole answer; the fields are those of its pieces together."""

    text: str
    finish: str
    scores: tuple[TokenScore, ...]
    prompt_tokens: int
    tokens: int
