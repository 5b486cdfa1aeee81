"""Ratings of labels by a model behind an endpoint, with the cache, limits and budget of labelling."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from addressvlm.config import Config
from addressvlm.labels.audit.sheet import CRITERIA, LEVELS, Item, Rating
from addressvlm.labels.fact_checker import Problem
from addressvlm.labels.facts import Facts
from addressvlm.labels.labelers import Request, RetryState, label_source
from addressvlm.labels.prompt import configured_prompt
from addressvlm.labels.request_scheduler import OpenAILabeler
from addressvlm.labels.response_cache import open_for_writing
from addressvlm.labels.validator import LabelValidator

JUDGE_PROMPT = Path(__file__).with_name("judge.md")
_LINE = re.compile(rf"\b({'|'.join(CRITERIA)})\b\W{{0,6}}({'|'.join(LEVELS)})\b", re.IGNORECASE)


def judge(items: Sequence[Item], config: Config, prompt: str, cache: Path) -> list[Rating]:
    """Ratings of the items whose answer rates every criterion.

    Args:
        items: rows of `sheet.ITEMS`.
        config: its section `labels` names the judge.
        prompt: name or path of a prompt file; {question} in it is the text to judge.
        cache: folder of the judge's answers.

    Raises:
        InputError: the prompt or the endpoint can't be used.
    """
    labels = config.labels.model_copy(update={"labeler": "openai", "prompt": prompt})
    template = configured_prompt(labels)
    texts = {item["item"]: item["label"] for item in items}

    def new_state(request: Request) -> RetryState:
        return RetryState(request, replace(template, questions=(texts[request.id],)), RatingValidator(), labels, config.seed)

    requests = [
        Request(
            item["item"],
            item["image"]["bytes"],
            Facts.from_json(item["facts"]) if item["facts"] else Facts(item["street"], item["district"]),
        )
        for item in items
    ]
    with open_for_writing(cache) as responses:
        answers = OpenAILabeler(labels, new_state, responses, lambda line: print(line, flush=True)).label(requests)
    source = label_source(labels)
    return [
        Rating(request.id, f"judge {source}", parse_levels(answer.text))
        for request, answer in zip(requests, answers, strict=True)
        if answer.source == source
    ]


class RatingValidator(LabelValidator):
    """Accepts an answer that rates every criterion."""

    def problems(self, text: str, facts: Facts) -> list[Problem]:
        """The criteria that the answer does not rate."""
        levels = parse_levels(text)
        return [
            Problem("rating", f"it lacks the line “{criterion}:” with one of the words {', '.join(LEVELS)}")
            for criterion in CRITERIA
            if criterion not in levels
        ]


def parse_levels(text: str) -> dict[str, int]:
    """Criterion -> level of the lines `truth: right`; the first of each counts."""
    levels: dict[str, int] = {}
    for criterion, level in _LINE.findall(text):
        levels.setdefault(criterion.lower(), LEVELS.index(level.lower()))
    return levels
