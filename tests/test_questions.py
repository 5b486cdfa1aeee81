"""Conversations: python -m pytest tests/test_questions.py"""

import random
from collections import Counter

from addressvlm import questions
from addressvlm.addresses import Address, Gazetteer
from tests.test_addresses import gazetteer

HERE = Address("Mill Street", "Harbour")


def test_ten_templates_a_level_all_different() -> None:
    assert {level: len(set(templates)) for level, templates in questions.TEMPLATES.items()} == {
        "district": 10,
        "street": 10,
        "address": 10,
    }


def test_training_rounds_are_balanced() -> None:
    rng = random.Random(0)
    conversations = [questions.training_rounds(HERE, gazetteer(), rng) for _ in range(600)]
    assert {len(c) for c in conversations} == {7}
    assert all(any(r["level"] == "address" for r in c) for c in conversations)
    kinds = Counter(r["kind"] for c in conversations for r in c)
    assert all(abs(n / 4200 - 1 / 3) < 0.02 for n in kinds.values())
    judgments = Counter(r["answer"] for c in conversations for r in c if r["kind"] == "judgment")
    assert abs(judgments["Yes"] / judgments.total() - 0.5) < 0.05
    levels = Counter(r["level"] for c in conversations for r in c if r["kind"] != "generation")
    assert abs(levels["street"] / levels.total() - 0.5) < 0.05


def test_training_rounds_say_the_truth() -> None:
    for seed in range(100):
        for r in questions.training_rounds(HERE, gazetteer(), random.Random(seed)):
            truth = {"street": "Mill Street", "district": "Harbour", "address": "Mill Street, Harbour"}[r["level"]]
            if r["kind"] == "generation":
                assert r["answer"] == truth
                assert r["question"].endswith("Name it.")
            elif r["kind"] == "choice":
                assert r["answer"] == truth
                assert truth in r["options"]
                assert len(set(r["options"])) == len(r["options"])
                assert r["question"].endswith(f"Options: {'; '.join(r['options'])}.")
            else:
                assert r["answer"] == ("Yes" if r["options"] == [truth] else "No")
                assert r["options"][0] in r["question"]
                assert r["question"].endswith("Answer Yes or No.")


def test_test_rounds_are_the_nine_of_the_metrics() -> None:
    rounds = questions.test_rounds(HERE, gazetteer(), random.Random(1))
    assert [(r["level"], r["kind"], r["answer"]) for r in rounds] == [
        ("district", "generation", "Harbour"),
        ("district", "judgment", "Yes"),
        ("district", "judgment", "No"),
        ("district", "choice", "Harbour"),
        ("street", "generation", "Mill Street"),
        ("street", "judgment", "Yes"),
        ("street", "judgment", "No"),
        ("street", "choice", "Mill Street"),
        ("address", "generation", "Mill Street, Harbour"),
    ]
    assert [len(r["options"]) for r in rounds if r["kind"] == "choice"] == [2, 4]


def test_same_seed_same_rounds() -> None:
    draw = [questions.training_rounds(HERE, gazetteer(), random.Random(5)) for _ in range(2)]
    assert draw[0] == draw[1]


def test_a_city_of_one_street_asks_what_can_be_asked() -> None:
    city = Gazetteer([HERE])
    training = questions.training_rounds(HERE, city, random.Random(0))
    assert len(training) == 7
    assert {r["kind"] for r in training} == {"generation"}
    asked = questions.test_rounds(HERE, city, random.Random(0))
    assert [(r["kind"], r["answer"]) for r in asked if r["level"] == "street"] == [
        ("generation", "Mill Street"),
        ("judgment", "Yes"),
    ]
