"""Question rounds about where a photo was taken, to train on and to evaluate (paper 001, Sec. 3.3 and supplement).

Each level (district, street, address) has ten openings; a suffix makes an opening a question of its kind, so that every level
and kind has ten templates. Negatives, the wrong names of judgments and choices, are partly hard ones from nearby.
"""

import random
from collections.abc import Collection
from typing import Any

from addressvlm.gazetteer.gazetteer import Address, Gazetteer, Level

OPTIONS = 4  # names in a choice question

TEMPLATES = {
    "district": [
        "Which district is this?",
        "Which district was this photo taken in?",
        "What part of the city does this show?",
        "In what district did the photographer stand?",
        "Tell me the district in this picture.",
        "What is the district of this view?",
        "Which neighbourhood do we see here?",
        "Where in the city is this, by district?",
        "This scene lies in which district?",
        "To which district does this place belong?",
    ],
    "street": [
        "Which street is this?",
        "Which street was this photo taken on?",
        "What street does this picture show?",
        "On what street did the photographer stand?",
        "Tell me the street in this picture.",
        "What is the street of this view?",
        "Which road do we see here?",
        "Where is this, by street?",
        "This scene lies on which street?",
        "To which street does this place belong?",
    ],
    "address": [
        "What is the address here?",
        "Which street and district is this?",
        "What street and district does this picture show?",
        "At what address did the photographer stand?",
        "Tell me the street and the district in this picture.",
        "What is the address of this view?",
        "Which address do we see here?",
        "Where exactly was this photo taken?",
        "This scene has which address?",
        "Give street and district of this place.",
    ],
}
CLAIMS = {"district": "Is it in {name}?", "street": "Is it on {name}?"}
SUFFIXES = {"generation": "Name it.", "judgment": "Answer Yes or No.", "choice": "Options: {options}."}
ADDRESS_QUESTION = f"{TEMPLATES['address'][0]} {SUFFIXES['generation']}"  # the question of the service
Round = dict[str, Any]  # a row of `tables.ROUNDS`


def templates(level: str, kind: str) -> list[str]:
    """The ten templates of a level and kind, with `{name}` in judgments and `{options}` in choices."""
    claim = f" {CLAIMS[level]}" if kind == "judgment" else ""
    return [f"{opening}{claim} {SUFFIXES[kind]}" for opening in TEMPLATES[level]]


def training_rounds(
    address: Address, gazetteer: Gazetteer, rng: random.Random, rounds: int = 7, hard_negative_share: float = 0.5,
    ambiguous: Collection[str] = (),
) -> list[Round]:  # fmt: skip
    """A conversation of `rounds` questions in random order.

    The three kinds are equally frequent (1:1:1 over many photos); one generation question is for the full address. Where a
    level has no negatives (the gazetteer has one name), judgments and choices move to the other level, or become generation
    questions. About `hard_negative_share` of the negatives are among the nearest names, the rest from anywhere; none is one of
    the `ambiguous` streets and districts, which may be right as well.
    """
    writer = _RoundWriter(address, gazetteer, rng, hard_negative_share, ambiguous)
    kinds = ["generation", "judgment", "choice"]
    rng.shuffle(kinds)
    levels: dict[str, list[Any]] = {kind: rng.sample(["street", "district"], 2) for kind in kinds}
    levels["generation"].insert(0, "address")
    conversation = []
    for i in range(rounds):
        kind = kinds[i % 3]
        turn = i // 3 % len(levels[kind])
        rotation = levels[kind][turn:] + levels[kind][:turn]
        level = next((level for level in rotation if kind == "generation" or writer.has_negatives(level)), None)
        if kind == "generation" or level is None:
            conversation.append(writer.generation(rotation[0]))
        elif kind == "judgment":
            conversation.append(writer.judgment(level, is_true=rng.random() < 0.5))
        else:
            conversation.append(writer.choice(level))
    rng.shuffle(conversation)
    return conversation


def evaluation_rounds(
    address: Address, gazetteer: Gazetteer, rng: random.Random, hard_negative_share: float = 0.5,
    ambiguous: Collection[str] = (),
) -> list[Round]:  # fmt: skip
    """The nine questions that the metrics are computed from, each in a conversation of its own.

    For district and street: generation, judgment with Yes, judgment with No, choice; then the full address. A level without
    negatives has only the first two.
    """
    writer = _RoundWriter(address, gazetteer, rng, hard_negative_share, ambiguous)
    rounds = []
    levels: tuple[Level, Level] = ("district", "street")
    for level in levels:
        rounds += [writer.generation(level), writer.judgment(level, is_true=True)]
        if writer.has_negatives(level):
            rounds += [writer.judgment(level, is_true=False), writer.choice(level)]
    return [*rounds, writer.generation("address")]


class _RoundWriter:
    """Writes questions about one address; `ambiguous` names are no negatives."""

    def __init__(
        self, address: Address, gazetteer: Gazetteer, rng: random.Random, hard_negative_share: float, ambiguous: Collection[str]
    ) -> None:
        self.gazetteer, self.rng, self.hard_negative_share = gazetteer, rng, hard_negative_share
        self.truth = {"district": address.district, "street": address.street, "address": address.text()}
        self.excluded: dict[str, frozenset[str]] = dict.fromkeys(("street", "district"), frozenset(ambiguous))

    def has_negatives(self, level: Level) -> bool:
        names = self.gazetteer.districts if level == "district" else self.gazetteer.streets
        return any(name != self.truth[level] and name not in self.excluded[level] for name in names)

    def generation(self, level: str) -> Round:
        return self._round(level, "generation", self.rng.choice(templates(level, "generation")), self.truth[level], [])

    def judgment(self, level: Level, is_true: bool) -> Round:
        name = self.truth[level] if is_true else self._negatives(level, 1)[0]
        question = self.rng.choice(templates(level, "judgment")).format(name=name)
        return self._round(level, "judgment", question, "Yes" if is_true else "No", [name])

    def choice(self, level: Level) -> Round:
        options = [self.truth[level], *self._negatives(level, OPTIONS - 1)]
        self.rng.shuffle(options)
        question = self.rng.choice(templates(level, "choice")).format(options="; ".join(options))
        return self._round(level, "choice", question, self.truth[level], options)

    def _negatives(self, level: Level, n: int) -> list[str]:
        return self.gazetteer.sample_negatives(
            self.truth[level], n, self.rng, level, self.hard_negative_share, self.excluded[level]
        )

    @staticmethod
    def _round(level: str, kind: str, question: str, answer: str, options: list[str]) -> Round:
        return {"level": level, "kind": kind, "question": question, "answer": answer, "options": options}
