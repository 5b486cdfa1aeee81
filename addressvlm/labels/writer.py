"""What every labeler takes and gives, and the labeler that needs no model."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from addressvlm.labels.facts import Facts
from addressvlm.labels.template import QUESTIONS, explain


@dataclass(frozen=True)
class Request:
    """One grafted image to label: the row's id, its JPEG bytes, its facts."""

    id: str
    image: bytes
    facts: Facts


@dataclass(frozen=True)
class Label:
    """A question about the grafted image and the text that answers it, who wrote it, after how many asks."""

    question: str
    text: str
    source: str  # template, openai:<model> or fallback:template
    attempts: int


class Labeler(Protocol):
    """Writes alignment labels."""

    def label(self, requests: Sequence[Request]) -> list[Label]:
        """One label a request, in their order."""
        ...


class TemplateLabeler:
    """Facts put into sentences; the same row gets the same label in any order and on any machine."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def label(self, requests: Sequence[Request]) -> list[Label]:
        """See Labeler."""
        return [template_label(request, self.seed) for request in requests]


def template_label(request: Request, seed: int, source: str = "template") -> Label:
    """The template's label of one row."""
    rng = random.Random(f"{seed}:{request.id}")
    return Label(rng.choice(QUESTIONS), explain(request.facts, rng), source, 1)
