"""Conversations"""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import shapely
from shapely.geometry import LineString

from addressvlm import questions
from addressvlm.config.city import CityConfig
from addressvlm.dataset.build import SPLITS, add_conversations
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from tests.gazetteer.test_gazetteer import gazetteer

HERE = Address("Mill Street", "Harbour")


@pytest.mark.parametrize("level", ["district", "street"])
@pytest.mark.parametrize("kind", ["generation", "judgment", "choice"])
def test_all_ten_templates_of_a_level_and_kind_are_used(level: str, kind: str) -> None:
    used = set()
    for seed in range(150):
        for r in questions.training_rounds(HERE, gazetteer(), random.Random(seed)):
            if (r["level"], r["kind"]) == (level, kind):
                used.add(r["question"].replace("; ".join(r["options"]) or "-", "{options}" if kind == "choice" else "{name}"))
    assert len(used) == 10
    assert used == set(questions.templates(level, kind))


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


def test_training_rounds_have_the_true_answers() -> None:
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


def test_the_right_option_is_at_any_position() -> None:
    """Else a model could learn to take the first; the same for what is true of the first judgment."""
    stood: dict[str, Counter[int]] = {"training": Counter(), "test": Counter()}
    rng = random.Random(0)
    for _ in range(400):
        for name, conversation in (
            ("training", questions.training_rounds(HERE, gazetteer(), rng)),
            ("test", questions.evaluation_rounds(HERE, gazetteer(), rng)),
        ):
            chosen = [r for r in conversation if r["kind"] == "choice" and r["level"] == "street"]
            stood[name].update(r["options"].index(r["answer"]) for r in chosen)
    for places in stood.values():
        assert sorted(places) == [0, 1, 2, 3]
        assert all(abs(n / places.total() - 1 / 4) < 0.07 for n in places.values())


def test_rounds_are_in_random_order() -> None:
    rng = random.Random(0)
    conversations = [questions.training_rounds(HERE, gazetteer(), rng) for _ in range(600)]
    whole = Counter(next(i for i, r in enumerate(c) if r["level"] == "address") for c in conversations)
    assert all(abs(whole[place] / 600 - 1 / 7) < 0.06 for place in range(7))
    for later in range(1, 7):  # two questions are of one kind in 10 of 42 pairs
        alike = sum(c[0]["kind"] == c[later]["kind"] for c in conversations)
        assert abs(alike / 600 - 10 / 42) < 0.08


def test_evaluation_rounds_are_the_nine_of_the_metrics() -> None:
    rounds = questions.evaluation_rounds(HERE, gazetteer(), random.Random(1))
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


def far_and_wide() -> Gazetteer:
    """Fifty parallel streets, number 0 at the western end."""
    lines = {f"Street {i}": LineString([(0.001 * i, 0), (0.001 * i, 0.01)]) for i in range(50)}
    return Gazetteer([Address(name, "Town") for name in lines], lines)


@pytest.mark.parametrize(("hard_negative_share", "low", "high"), [(0.0, 0.03, 0.2), (0.5, 0.45, 0.65), (1.0, 1.0, 1.0)])
def test_hard_negative_share_sets_the_mix_of_negatives(hard_negative_share: float, low: float, high: float) -> None:
    here, city, wrong = Address("Street 0", "Town"), far_and_wide(), []
    for seed in range(300):
        rng = random.Random(seed)
        conversation = questions.training_rounds(here, city, rng, 7, hard_negative_share) + questions.evaluation_rounds(
            here, city, rng, hard_negative_share
        )
        wrong += [name for r in conversation if r["kind"] == "choice" for name in r["options"] if name != here.street]
    near = sum(int(name.removeprefix("Street ")) <= 6 for name in wrong)  # near are the nearest six for three wrong names
    assert low <= near / len(wrong) <= high


def test_ambiguous_streets_are_no_negatives() -> None:
    """The ambiguous second street is among the nearest, and must not be what a No or a choice turns on."""
    here, city = Address("Street 7", "Town"), far_and_wide()
    doubtful = {"Street 6", "Street 8", "Elsewhere"}
    for seed in range(100):
        rng = random.Random(seed)
        conversation = questions.training_rounds(here, city, rng, 7, 1.0, doubtful) + questions.evaluation_rounds(
            here, city, rng, 1.0, doubtful
        )
        assert not doubtful & {name for r in conversation for name in r["options"]}
    two = Gazetteer([here, Address("Street 8", "Town")])
    kinds = [
        r["kind"] for r in questions.evaluation_rounds(here, two, random.Random(0), 1.0, doubtful) if r["level"] == "street"
    ]
    assert kinds == ["generation", "judgment"]


def test_datasets_have_no_ambiguous_negatives(tmp_path: Path) -> None:
    """Nor another that is as near to the camera; both are possible answers."""
    far_and_wide().save(tmp_path / "gazetteer.geojson")
    near = {"lat": 0.005, "lon": 0.00706, "street": "Street 7", "district": "Town"}  # 104 m from Street 8
    rows = [
        {**near, "id": f"{kind}{n}", "index": 0, "ambiguous": kind == "a", "second_street": "Street 6"}
        for kind in "ab"
        for n in range(60)
    ]
    expected = {15.0: {"a": {"Street 6"}, "b": set()}, 110.0: {"a": {"Street 6", "Street 8"}, "b": {"Street 8"}}}
    for ambiguous_m, spared in expected.items():
        city = CityConfig(hard_negative_share=1.0, ambiguous_m=ambiguous_m).model_dump_json()
        gazetteer = (str(tmp_path / "gazetteer.geojson"), "1")
        for part in (0, 2):
            result = add_conversations(np.array([part], dtype=np.int8), gazetteer, city, 0, rows)
            wrong: dict[str, set[str]] = {"a": set(), "b": set()}
            for row in result.tables[SPLITS[part]]:
                wrong[row["id"][0]] |= {name for r in row["rounds"] for name in r["options"]} - {"Street 7", "Town"}
            near_names = {f"Street {i}" for i in (5, 6, 8, 9)}
            assert {kind: near_names - names for kind, names in wrong.items()} == spared


def test_kinds_are_balanced_with_one_district() -> None:
    rng, here = random.Random(0), Address("Street 3", "Town")
    rounds = [r for _ in range(300) for r in questions.training_rounds(here, far_and_wide(), rng)]
    kinds = Counter(r["kind"] for r in rounds)
    assert all(abs(n / len(rounds) - 1 / 3) < 0.03 for n in kinds.values())
    assert {r["level"] for r in rounds if r["kind"] != "generation"} == {"street"}


def test_same_seed_same_rounds() -> None:
    draw = [questions.training_rounds(HERE, gazetteer(), random.Random(5)) for _ in range(2)]
    assert draw[0] == draw[1]


def test_a_city_of_one_street_has_no_negatives() -> None:
    city = Gazetteer([HERE])
    training = questions.training_rounds(HERE, city, random.Random(0))
    assert len(training) == 7
    assert {r["kind"] for r in training} == {"generation"}
    conversation = questions.evaluation_rounds(HERE, city, random.Random(0))
    assert [(r["kind"], r["answer"]) for r in conversation if r["level"] == "street"] == [
        ("generation", "Mill Street"),
        ("judgment", "Yes"),
    ]


def test_districts_across_a_near_border_are_no_negatives() -> None:
    """At a border the photo may as well show the other side; the third district stays a wrong answer."""
    areas = {name: shapely.box(i * 0.01, -1, (i + 1) * 0.01, 1) for i, name in enumerate(("West", "Middle", "East"))}
    city = Gazetteer([Address(f"{name} Street", name) for name in areas], {}, areas)
    assert city.within(0, 0.0099, 15, "district") == {"West", "Middle"}
    for seed in range(20):
        rounds = questions.evaluation_rounds(
            Address("West Street", "West"), city, random.Random(seed), 1.0, city.within(0, 0.0099, 15, "district")
        )
        wrong = {name for r in rounds if r["level"] == "district" for name in r["options"]} - {"West"}
        assert wrong == {"East"}
