"""Answers without a photo: what can be scored by knowing how the questions of a city are made.

The commonest answer of a level is generated, a claim is confirmed if claims of that name were mostly right in training, and of
some options the one that was right most often is chosen.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Literal


class Guesser:
    """Answers from training questions, rows of `tables.ROUNDS`."""

    def __init__(self, training: Iterable[Mapping[str, Any]], by: Literal["commonest", "random"], seed: int = 0) -> None:
        self.by, self.seed = by, seed
        self._answers: dict[str, Counter[str]] = defaultdict(Counter)  # level -> generated answers
        self._claims: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # level and name -> Yes and No
        self._chosen: dict[str, Counter[str]] = defaultdict(Counter)  # level -> right options
        for turn in training:
            if turn["kind"] == "generation":
                self._answers[turn["level"]][turn["answer"]] += 1
            elif turn["kind"] == "judgment":
                self._claims[turn["level"], turn["options"][0]][turn["answer"]] += 1
            elif turn["kind"] == "choice":
                self._chosen[turn["level"]][turn["answer"]] += 1

    def answer(self, question: Mapping[str, Any]) -> str:
        """The guess for a question, a row with `id`, `level`, `kind`, `question` and `options`."""
        level, kind, options = question["level"], question["kind"], list(question["options"] or [])
        rng = random.Random(f"{self.seed}:{question['id']}:{question['question']}")
        if kind == "judgment":
            claims = self._claims[level, options[0]]
            if self.by == "random" or claims["Yes"] == claims["No"]:
                return rng.choice(["Yes", "No"])
            return max(claims, key=lambda word: claims[word])
        known = self._chosen[level] if kind == "choice" else self._answers[level]
        names = options if kind == "choice" else sorted(known)
        if not names:
            return ""
        return rng.choice(names) if self.by == "random" else max(names, key=lambda name: known[name])
