"""Arguments and results of free generation, without torch, for programs that only pass them on."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled.

    Attributes:
        max_tokens: of an answer, its end included.
        temperature: 0 takes the likeliest token each time.
        top_p: sample among the likeliest tokens that have this much probability together.
        n: number of continuations of the prompt.
        stop: texts before which an answer ends.
        logprobs: number of alternatives to report for each token; None reports no log-probabilities.
        seed: of the sampling; None samples from torch's global generator.
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
    """A token of an answer and ln of its probability; `top` are the likeliest tokens at its position as (text, ln p)."""

    text: str
    log_p: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class TextChunk:
    """New text of one of the continuations.

    Attributes:
        index: of the continuation, from 0 to n - 1.
        text: complete characters; may be empty.
        finish: `stop` or `length` in the last chunk of an answer, before that None.
        scores: of this chunk's tokens, with `Sampling.logprobs`.
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
    """A finished answer; the fields are those of all its chunks."""

    text: str
    finish: str
    scores: tuple[TokenScore, ...]
    prompt_tokens: int
    tokens: int
