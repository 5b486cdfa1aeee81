from dataclasses import replace

import pytest

from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.lexicon import DIRECTIONS
from addressvlm.labels.validator import LabelValidator
from tests.support.label_texts import FACTS, GOOD

# What is said and is not among the facts, with what GOOD says around it.
CLAIMS = [
    ("The camera looks to the north.", "direction"),
    ("The camera looks across the road.", "direction"),
    ("The street runs north to south.", "direction"),
    ("King Street meets it to the west.", "direction"),
    ("King Street meets it a hundred and twenty metres further.", "distance"),
    ("King Street meets it 90 m to the east.", "distance"),
    ("King Street meets it fifteen yards to the east.", "distance"),
    ("King Street meets it right here.", "distance"),
    ("Elm Road meets it 40 m to the east.", "crossing"),
    ("Next comes the corner of Elm Road.", "crossing"),
    ("The street meets Mill Street there.", "crossing"),
    ("King Street meets the camera there.", "crossing"),
    ("On the map Elm Road is written.", "name"),
    ("The map also bears the name Wobble Lane.", "name"),
    ("In the distance one sees London.", "name"),
    ("The map bears the names Mill Street, King Street and Mill Street.", "name"),
    ("The photo shows green fronts.", "colour"),
    ("From above, the ground is red.", "colour"),
    ("There is much open sky, and the sky is wide.", "sky"),
    ("The camera looks at an angle to the street.", "direction"),
    ("The street runs to the north.", "direction"),
    ("The street runs northeast to southwest.", "direction"),
    ("To the west, forty metres away, comes the corner of King Street.", "direction"),
    ("King Street meets it 51 m to the east.", "distance"),
    ("King Street meets it 29 m to the east.", "distance"),
]


TRUE = [
    "The street runs to the west.",
    "King Street meets it 50 m to the east.",
    "King Street meets it 30 m to the east.",
    "The camera looks to the east, along Mill Street.",
    "The street runs from west to east.",
    "King Street meets it about 45 m to the east.",
    "To the east, forty metres away, comes the corner of King Street.",
    "King Street meets it a hundred and thirty feet to the east.",
    "The map bears the names Mill Street and King Street.",
    "Reddish walls fill the photo.",
]


@pytest.mark.parametrize(("claim", "kind"), [*CLAIMS, *((claim, None) for claim in TRUE)])
def test_each_claim_is_checked_against_the_facts(claim: str, kind: str | None) -> None:
    text = f"{claim} {GOOD}".replace("On the map King Street meets the street a little to the east. ", "")
    loose, strict = (LabelValidator(["Elm Road"], ["Harbour"], verified=verified) for verified in (False, True))
    assert loose.problems(text, FACTS) == []
    kinds_by_view = {p.kind for p in strict.problems(text, FACTS)} - ({"name"} if kind == "crossing" else set())
    assert kinds_by_view == ({kind} if kind else set())


def test_the_tolerance_of_distances_is_a_setting() -> None:
    text = GOOD.replace("a little to the east", "about 80 m to the east")
    assert [p.kind for p in LabelValidator(verified=True).problems(text, FACTS)] == ["distance"]
    assert LabelValidator(verified=True, config=LabelsConfig(distance_tolerance=1.0)).problems(text, FACTS) == []


def test_a_far_crossing_may_be_missed_by_a_share_and_a_near_one_is_here() -> None:
    strict = LabelValidator(verified=True)

    def kinds(claim: str, metres: int) -> list[str]:
        text = GOOD.replace("On the map King Street meets the street a little to the east.", claim)
        return [p.kind for p in strict.problems(text, replace(FACTS, cross_distance_m=metres))]

    far = [kinds(f"King Street meets it {claim} m to the east.", 100) for claim in (75, 125, 74, 126)]
    assert far == [[], [], ["distance"], ["distance"]]
    assert [kinds("King Street meets it right here.", metres) for metres in (0, 20, 30)] == [[], [], ["distance"]]


@pytest.mark.parametrize("view", ["along", "across", "oblique"])
def test_the_measured_view_is_accepted_and_no_other(view: str) -> None:
    claim = {"along": "along the road", "across": "across the road", "oblique": "at an angle to the road"}
    kinds_by_view = {
        other: [
            p.kind
            for p in LabelValidator(verified=True).problems(GOOD.replace("along the road", words), replace(FACTS, view=view))
        ]
        for other, words in claim.items()
    }
    assert kinds_by_view == {other: [] if other == view else ["direction"] for other in claim}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_measured_axis_is_accepted_from_either_end_and_no_other(direction: str) -> None:
    def claim(axis: str, measured: str) -> list[str]:
        text = f"The street runs {axis}. {GOOD}".replace("On the map King Street meets the street a little to the east. ", "")
        return [p.kind for p in LabelValidator(verified=True).problems(text, replace(FACTS, direction=measured))]

    for other in DIRECTIONS:
        first, second = other.split("-")
        for axis in (other, f"{second}-{first}", f"from {first} to {second}", f"from {second} to {first}"):
            assert claim(axis, direction) == ([] if other == direction else ["direction"]), axis


def test_colours_of_the_photo_and_of_the_ground_are_checked_apart() -> None:
    facts = replace(FACTS, tile_colours=("green",))
    strict = LabelValidator(verified=True)
    assert strict.problems(f"From above, the ground is green. {GOOD}", facts) == []
    for claim in ("From above, the ground is red.", "The photo shows green fronts."):
        assert [p.kind for p in strict.problems(f"{claim} {GOOD}", facts)] == ["colour"]
