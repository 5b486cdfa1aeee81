"""What every labeler takes and gives, and the labeler that needs no model."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.facts import Facts
from addressvlm.labels.prompt import Prompt
from addressvlm.labels.templates import explain, reason


@dataclass(frozen=True)
class Request:
    """One image to label, grafted or a street view: the row's id, its encoded bytes, its facts."""

    id: str
    image: bytes
    facts: Facts


@dataclass(frozen=True)
class Label:
    """A question about the image and the text that answers it, who wrote it, after how many asks."""

    question: str
    text: str
    source: str  # template, <labeler>:<model> or fallback:template
    attempts: int
    problems: tuple[str, ...] = ()  # kinds of what was wrong with texts that were not taken, over all asks


class Labeler(Protocol):
    """Writes labels."""

    def label(self, requests: Sequence[Request]) -> list[Label]:
        """One label a request, in their order."""
        ...


class TemplateLabeler:
    """Facts put into sentences; the same row gets the same label in any order and on any machine."""

    def __init__(self, prompt: Prompt, seed: int) -> None:
        self.prompt, self.seed = prompt, seed

    def label(self, requests: Sequence[Request]) -> list[Label]:
        """See Labeler."""
        return [template_label(request, self.prompt, self.seed) for request in requests]


def template_label(request: Request, prompt: Prompt, seed: int) -> Label:
    """The template's label of one row."""
    rng = _rng(request, seed)
    question = rng.choice(prompt.questions)
    text = explain(request.facts, rng) if prompt.shows == "graft" else reason(request.facts, rng)
    return Label(question, text, "template", 1)


def question_of(request: Request, prompt: Prompt, seed: int) -> str:
    """The question of one row, the same whoever answers it."""
    return _rng(request, seed).choice(prompt.questions)


def writer(config: LabelsConfig) -> str:
    """Who writes, for the column `source`: of a model in a folder its last name, no path of this machine."""
    path = config.model.startswith(("/", ".", "~"))
    return f"{config.labeler}:{Path(config.model).name if path else config.model}"


def _rng(request: Request, seed: int) -> random.Random:
    return random.Random(f"{seed}:{request.id}")
