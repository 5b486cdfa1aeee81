"""Conversations about where a photo was taken (paper 001, Sec. 3.3 and its supplement).

Each level (district, street, address) has ten openings; what follows one makes it a question of its kind, so that there
are ten templates for every level and kind. Wrong names are a mix of near ones, which are hard, and of any in the city.
"""

import random
from collections.abc import Collection
from typing import Any, Literal

from addressvlm.gazetteer.gazetteer import Address, Gazetteer

OPTIONS = 4  # names offered in a choice question

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
ADDRESS_QUESTION = f"{TEMPLATES['address'][0]} {SUFFIXES['generation']}"  # what the service asks


def templates(level: str, kind: str) -> list[str]:
    """Ten ways to ask; `{name}` stands in a judgment and `{options}` in a choice. The whole address is only generated."""
    claim = f" {CLAIMS[level]}" if kind == "judgment" else ""
    return [f"{opening}{claim} {SUFFIXES[kind]}" for opening in TEMPLATES[level]]


def training_rounds(
    address: Address,
    gazetteer: Gazetteer,
    rng: random.Random,
    rounds: int = 7,
    hard_negative_share: float = 0.5,
    doubtful: Collection[str] = (),
) -> list[dict[str, Any]]:
    """A conversation of `rounds` questions in random order, rows of `tables.ROUNDS`.

    The three kinds are equally frequent (1:1:1 over many photos); one generation question asks for the whole address.
    A level of which the gazetteer knows only one name has no wrong one, so judgments and choices go to the other level, and
    turn into generation where that has none either. About `hard_negative_share` of the wrong names are among the nearest, the rest
    from anywhere; none is one of the `doubtful` streets, which may be right as well.
    """
    wrong = _Wrong(gazetteer, hard_negative_share, rng, doubtful)
    kinds = ["generation", "judgment", "choice"]
    rng.shuffle(kinds)
    levels = {kind: rng.sample(["street", "district"], 2) for kind in kinds}
    levels["generation"].insert(0, "address")
    conversation = []
    for i in range(rounds):
        kind = kinds[i % 3]
        turn = i // 3 % len(levels[kind])
        in_turn = levels[kind][turn:] + levels[kind][:turn]
        level = next((level for level in in_turn if kind == "generation" or wrong.exists(level, address)), None)
        if kind == "generation" or level is None:
            conversation.append(_generation(in_turn[0], address, rng))
        elif kind == "judgment":
            conversation.append(_judgment(level, address, wrong, rng, true=rng.random() < 0.5))
        else:
            conversation.append(_choice(level, address, wrong, rng))
    rng.shuffle(conversation)
    return conversation


def test_rounds(
    address: Address,
    gazetteer: Gazetteer,
    rng: random.Random,
    hard_negative_share: float = 0.5,  # noqa: PT028
    doubtful: Collection[str] = (),  # noqa: PT028
) -> list[dict[str, Any]]:
    """The questions that the metrics are made of, each to be asked on its own, rows of `tables.ROUNDS`.

    For district and for street: generation, judgment with Yes, judgment with No, choice; then the whole address: nine.
    A level of which the gazetteer knows only one name has no wrong name to offer, so its last two are left out; so are
    wrong names that are `doubtful`.
    """
    wrong = _Wrong(gazetteer, hard_negative_share, rng, doubtful)
    conversation = []
    for level in ("district", "street"):
        conversation.append(_generation(level, address, rng))
        conversation.append(_judgment(level, address, wrong, rng, true=True))
        if wrong.exists(level, address):
            conversation.append(_judgment(level, address, wrong, rng, true=False))
            conversation.append(_choice(level, address, wrong, rng))
    conversation.append(_generation("address", address, rng))
    return conversation


test_rounds.__test__ = False  # type: ignore[attr-defined]  # the name is the domain's, not pytest's


class _Wrong:
    """Names of the city that are not the true one."""

    def __init__(self, gazetteer: Gazetteer, hard_negative_share: float, rng: random.Random, doubtful: Collection[str]) -> None:
        self.gazetteer, self.hard_negative_share, self.rng = gazetteer, hard_negative_share, rng
        self.doubtful = frozenset(doubtful)

    def exists(self, level: str, address: Address) -> bool:
        names = self.gazetteer.districts if level == "district" else self.gazetteer.streets
        return any(name != _true(level, address) and name not in self._spared(level) for name in names)

    def draw(self, level: str, address: Address, n: int) -> list[str]:
        """Up to n of them."""
        kind: Literal["street", "district"] = "district" if level == "district" else "street"
        return self.gazetteer.near(_true(level, address), n, self.rng, kind, self.hard_negative_share, self._spared(level))

    def _spared(self, level: str) -> frozenset[str]:
        return self.doubtful if level == "street" else frozenset()


def _true(level: str, address: Address) -> str:
    return {"district": address.district, "street": address.street, "address": address.text()}[level]


def _round(level: str, kind: str, question: str, answer: str, options: list[str]) -> dict[str, Any]:
    return {"level": level, "kind": kind, "question": question, "answer": answer, "options": options}


def _generation(level: str, address: Address, rng: random.Random) -> dict[str, Any]:
    return _round(level, "generation", rng.choice(templates(level, "generation")), _true(level, address), [])


def _judgment(level: str, address: Address, wrong: _Wrong, rng: random.Random, true: bool) -> dict[str, Any]:
    name = _true(level, address) if true else wrong.draw(level, address, 1)[0]
    question = rng.choice(templates(level, "judgment")).format(name=name)
    return _round(level, "judgment", question, "Yes" if true else "No", [name])


def _choice(level: str, address: Address, wrong: _Wrong, rng: random.Random) -> dict[str, Any]:
    options = [_true(level, address), *wrong.draw(level, address, OPTIONS - 1)]
    rng.shuffle(options)
    question = rng.choice(templates(level, "choice")).format(options="; ".join(options))
    return _round(level, "choice", question, _true(level, address), options)
