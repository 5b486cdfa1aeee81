"""Conversations about where a photo was taken (paper 001, Sec. 3.3 and its supplement).

Each level (district, street, address) has ten ways to ask; the kind of question is told by a short suffix. Negatives
are a mix of near names, which are hard, and names from anywhere in the city.
"""

import random
from typing import Any

from addressvlm.addresses import Address, Gazetteer

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


def training_rounds(address: Address, gazetteer: Gazetteer, rng: random.Random, rounds: int = 7) -> list[dict[str, Any]]:
    """A conversation of `rounds` questions in random order, rows of `tables.ROUNDS`.

    The three kinds are equally frequent (1:1:1 over many photos); one generation question asks for the whole address.
    Kinds that the gazetteer can't serve (a wrong name where there is only one) turn into generation.
    """
    kinds = ["generation", "judgment", "choice"]
    rng.shuffle(kinds)
    levels = {kind: rng.sample(["street", "district"], 2) for kind in kinds}
    levels["generation"].insert(0, "address")
    conversation = []
    for i in range(rounds):
        kind, turn = kinds[i % 3], i // 3
        level = levels[kind][turn % len(levels[kind])]
        if kind == "generation" or len(_names(gazetteer, level)) < 2:
            conversation.append(_generation(level, address, rng))
        elif kind == "judgment":
            conversation.append(_judgment(level, address, gazetteer, rng, true=rng.random() < 0.5))
        else:
            conversation.append(_choice(level, address, gazetteer, rng))
    rng.shuffle(conversation)
    return conversation


def test_rounds(address: Address, gazetteer: Gazetteer, rng: random.Random) -> list[dict[str, Any]]:
    """The questions that the metrics are made of, each to be asked on its own, rows of `tables.ROUNDS`.

    For district and for street: generation, judgment with Yes, judgment with No, choice; then the whole address: nine.
    A level of which the gazetteer knows only one name has no wrong name to offer, so its last two are left out.
    """
    conversation = []
    for level in ("district", "street"):
        conversation.append(_generation(level, address, rng))
        conversation.append(_judgment(level, address, gazetteer, rng, true=True))
        if set(_names(gazetteer, level)) - {_true(level, address)}:
            conversation.append(_judgment(level, address, gazetteer, rng, true=False))
            conversation.append(_choice(level, address, gazetteer, rng))
    conversation.append(_generation("address", address, rng))
    return conversation


test_rounds.__test__ = False  # type: ignore[attr-defined]  # the name is the domain's, not pytest's


def _names(gazetteer: Gazetteer, level: str) -> list[str]:
    return gazetteer.districts if level == "district" else gazetteer.streets


def _true(level: str, address: Address) -> str:
    return {"district": address.district, "street": address.street, "address": address.text()}[level]


def _round(level: str, kind: str, question: str, answer: str, options: list[str]) -> dict[str, Any]:
    return {"level": level, "kind": kind, "question": question, "answer": answer, "options": options}


def _generation(level: str, address: Address, rng: random.Random) -> dict[str, Any]:
    question = f"{rng.choice(TEMPLATES[level])} {SUFFIXES['generation']}"
    return _round(level, "generation", question, _true(level, address), [])


def _judgment(level: str, address: Address, gazetteer: Gazetteer, rng: random.Random, true: bool) -> dict[str, Any]:
    name = _true(level, address) if true else _wrong(level, address, gazetteer, 1, rng)[0]
    question = f"{rng.choice(TEMPLATES[level])} {CLAIMS[level].format(name=name)} {SUFFIXES['judgment']}"
    return _round(level, "judgment", question, "Yes" if true else "No", [name])


def _choice(level: str, address: Address, gazetteer: Gazetteer, rng: random.Random) -> dict[str, Any]:
    options = [_true(level, address), *_wrong(level, address, gazetteer, OPTIONS - 1, rng)]
    rng.shuffle(options)
    question = f"{rng.choice(TEMPLATES[level])} {SUFFIXES['choice'].format(options='; '.join(options))}"
    return _round(level, "choice", question, _true(level, address), options)


def _wrong(level: str, address: Address, gazetteer: Gazetteer, n: int, rng: random.Random) -> list[str]:
    """Up to n names of the level that are not the true one."""
    return gazetteer.near(_true(level, address), n, rng, "district" if level == "district" else "street")
