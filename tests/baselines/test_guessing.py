"""What can be answered without a look at the photo."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from addressvlm import questions
from addressvlm.baselines.guessing import Guesser
from addressvlm.gazetteer.gazetteer import Address, Gazetteer

ADDRESSES = [Address(f"Street {i}", f"District {i % 2}") for i in range(6)]
CITY = Gazetteer(ADDRESSES)


def training(weights: list[int]) -> list[questions.Round]:
    """Questions about so many photos of each address."""
    rng = random.Random(0)
    return [
        turn for address, n in zip(ADDRESSES, weights, strict=True) for _ in range(n)
        for turn in questions.training_rounds(address, CITY, rng)
    ]  # fmt: skip


def question(kind: str, level: str = "street", options: tuple[str, ...] = (), photo: str = "a") -> dict[str, object]:
    return {"id": photo, "level": level, "kind": kind, "question": "?", "options": list(options)}


def test_the_commonest_is_named_confirmed_and_chosen() -> None:
    guess = Guesser(training([2, 2, 40, 2, 2, 2]), "commonest")
    assert guess.answer(question("generation")) == "Street 2"
    assert guess.answer(question("generation", "district")) == "District 0"
    assert guess.answer(question("generation", "address")) == "Street 2, District 0"
    assert guess.answer(question("judgment", options=("Street 2",))) == "Yes"
    assert guess.answer(question("judgment", options=("Street 1",))) == "No"
    assert guess.answer(question("choice", options=("Street 1", "Street 2", "Street 3"))) == "Street 2"


def test_random_answers_are_spread_and_the_same_for_a_photo() -> None:
    guess = Guesser(training([5] * 6), "random")
    asked = [question("generation", photo=f"{i}") for i in range(600)]
    counts = Counter(guess.answer(q) for q in asked)
    assert set(counts) == {a.street for a in ADDRESSES}
    assert min(counts.values()) > 60
    assert [guess.answer(q) for q in asked[:9]] == [guess.answer(q) for q in asked[:9]]
    assert Counter(guess.answer(question("judgment", options=("Street 2",), photo=f"{i}")) for i in range(200))["Yes"] > 70


@pytest.mark.parametrize("by", ["commonest", "random"])
@given(st.sampled_from(["generation", "judgment", "choice"]), st.sampled_from(["street", "district", "address"]))
def test_names_never_seen_are_guessed_too(by: str, kind: str, level: str) -> None:
    guess = Guesser([], by)
    answer = guess.answer(question(kind, level, ("Nowhere", "Elsewhere")))
    assert answer in {"generation": [""], "judgment": ["Yes", "No"], "choice": ["Nowhere", "Elsewhere"]}[kind]
