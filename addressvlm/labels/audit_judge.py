"""A model's ratings of labels, in the same form as a person's.

The judge is asked as labelers are: through the same engine, with limits, retries, a budget, and a ledger beside the sheet, so
that each label is paid for once. A model that judges its own labels is kinder to them than to others.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from addressvlm.config import Config
from addressvlm.labels.attempts import Attempts
from addressvlm.labels.audit_table import CRITERIA, LEVELS, Rating, Row
from addressvlm.labels.checks import Checker, Problem
from addressvlm.labels.facts import Facts
from addressvlm.labels.ledger import writing
from addressvlm.labels.openai_labeler import OpenAILabeler
from addressvlm.labels.prompt import prompt_of
from addressvlm.labels.writer import Request, writer

PROMPT = Path(__file__).with_name("judge.md")
_LINE = re.compile(rf"\b({'|'.join(CRITERIA)})\b\W{{0,6}}({'|'.join(LEVELS)})\b", re.IGNORECASE)


class Readable(Checker):
    """Accepts an answer that rates every criterion."""

    def problems(self, text: str, facts: Facts) -> list[Problem]:
        """The criteria that the answer does not rate."""
        missing = [criterion for criterion in CRITERIA if criterion not in levels_in(text)]
        return [
            Problem("rating", f"it lacks the line “{criterion}:” with one of the words {', '.join(LEVELS)}")
            for criterion in missing
        ]


def levels_in(text: str) -> dict[str, int]:
    """Criterion -> level of the lines `truth: right`; the first of each counts."""
    found: dict[str, int] = {}
    for criterion, level in _LINE.findall(text):
        found.setdefault(criterion.lower(), LEVELS.index(level.lower()))
    return found


def judge(items: Sequence[Row], config: Config, prompt: str, ledger: Path) -> list[Rating]:
    """Ratings of the items that the model answered readably about.

    Args:
        items: rows of `audit_table.DRAWN`.
        config: its section `labels` names the judge.
        prompt: name or path of a prompt file; {question} in it is the text to be judged.
        ledger: folder of what was answered.

    Raises:
        InputError: the prompt or the endpoint can't be used.
    """
    labels = config.labels.model_copy(update={"labeler": "openai", "prompt": prompt})
    asked = prompt_of(labels)
    texts = {item["item"]: item["label"] for item in items}

    def begin(request: Request) -> Attempts:
        return Attempts(request, replace(asked, questions=(texts[request.id],)), Readable(), labels, config.seed)

    requests = [Request(item["item"], item["image"]["bytes"], facts_of_item(item)) for item in items]
    with writing(ledger) as kept:
        answers = OpenAILabeler(labels, begin, kept, lambda line: print(line, flush=True)).label(requests)
    rater = f"judge {writer(labels)}"
    return [
        Rating(request.id, rater, levels_in(answer.text))
        for request, answer in zip(requests, answers, strict=True)
        if answer.source == writer(labels)
    ]


def facts_of_item(item: Row) -> Facts:
    """The item's facts; the address alone where the run kept none."""
    return Facts.from_json(item["facts"]) if item["facts"] else Facts(item["street"], item["district"])
