from collections import Counter
from dataclasses import replace

import pytest

from addressvlm.config.labels import LabelsConfig
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.gazetteer.name_matcher import normalize_name
from addressvlm.labels.facts import Facts
from addressvlm.labels.lexicon import DIRECTIONS
from addressvlm.labels.prompt import load_prompt
from addressvlm.labels.validator import LabelValidator, make_validator
from tests.support.label_texts import CORRUPTIONS, DISTRICTS, FACTS, GOOD, STREETS, corrupted, good


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GOOD, None),
        (GOOD.replace("Mill Street", "mill st."), None),
        (GOOD.replace("Mill Street", "Molengasse"), None),
        (GOOD.replace("Mill Street", "Mill Street’s west end"), None),
        (GOOD.replace("This is", "Well-known sights, noted by visitors, say it: this is"), None),
        (GOOD.replace(". This is", ", which is to the east of the churches and close to King Street, so this must be"), None),
        ("This is Mill Street in Harbour.", "words"),
        (GOOD * 6, "words"),
        (f"{GOOD} {GOOD}", "more than once"),
        (GOOD.replace("Mill Street", "a street"), "does not name the street"),
        (GOOD.replace("Harbour", "town"), "does not name the district"),
        (GOOD.replace("Mill Street", "Old Mill Street"), "does not name the street"),
        (GOOD + " So it must be King Street.", "does not conclude on Mill Street"),
        (GOOD + " So it must be Elm Road.", "does not conclude on Mill Street"),
        (GOOD + " Near Mill Street, this therefore is Elm Road.", "does not conclude on Mill Street"),
        (GOOD + " It is in Castle.", "does not conclude on Harbour"),
        (GOOD + " A castle can be seen too.", None),
        (GOOD.replace("This is", "This is not"), "denies"),
        (GOOD.replace("This is", "As the hint says, this is"), "told"),
        (GOOD.replace("This is", "According to the provided address this is"), "told"),
        (GOOD.replace("This is", "The address was given: this is"), "told"),
        ("I'm sorry, but I cannot help. " + GOOD, "told"),
        (GOOD.removesuffix(" in Harbour.") + " in Harbour, where", "breaks off"),
        (GOOD.replace(". ", ".\n- "), "lists"),
        ("Links steht eine Reihe von Häusern, und man schaut die Straße entlang. Das ist Mill Street in Harbour.", "'de'"),
        ("Everybody who has ever been to this old town will know at once that it is Mill Street in Harbour.", "cites nothing"),
    ],
)  # fmt: skip
def test_checks(text: str, problem: str | None) -> None:
    validator = LabelValidator(
        ["Elm Road", "Old Mill Street", "Mill Street"], ["Harbour", "Castle"], variants={"Mill Street": ["Molengasse"]}
    )
    problems = validator.problems(text, FACTS)
    assert (problems == []) if problem is None else any(problem in p.text for p in problems), problems


def test_length_and_repetition_end_where_the_settings_say() -> None:
    words = len(normalize_name(GOOD).split())
    for least, most, fits in ((words, 150, True), (words + 1, 150, False), (1, words, True), (1, words - 1, False)):
        validator = LabelValidator(config=LabelsConfig(words=(least, most)))
        assert [p.kind for p in validator.problems(GOOD, FACTS)] == ([] if fits else ["length"])
    six = GOOD.replace("A row", "The camera looks along the road, and a row")
    assert [p.kind for p in LabelValidator().problems(six, FACTS)] == ["repetition"]
    assert LabelValidator().problems(six.replace("The camera looks along", "One camera looks along"), FACTS) == []


def test_a_street_view_speaks_of_no_map() -> None:
    facts = Facts("Mill Street", "Harbour", photo_colours=("red",), sky="wide", greenery="little", city="Hint City")
    text = (
        "Red brick houses stand under a wide sky in Hint City, and hardly a tree is to be seen. This is Mill Street in Harbour."
    )
    validator = LabelValidator(verified=True, mapless=True)
    assert validator.problems(text, facts) == []
    assert [p.kind for p in validator.problems(f"{text} The map shows it too: it is Mill Street.", facts)] == ["map"]
    assert [p.kind for p in validator.problems(text.replace("wide sky", "narrow sky"), facts)] == ["sky"]


def test_languages_are_detected() -> None:
    text = (
        "Links steht eine Reihe roter Häuser, und die Kamera schaut die Straße entlang nach Osten, wo bald die King Street "
        "kreuzt. Das ist also die Mill Street in Harbour."
    )
    german = LabelValidator(config=LabelsConfig(language="de"))
    assert german.problems(text, FACTS) == []
    assert [p.kind for p in german.problems(GOOD, FACTS)] == ["language"]


def test_almost_all_corruptions_are_caught_and_almost_all_good_labels_pass() -> None:
    validator = LabelValidator(STREETS, DISTRICTS, verified=True)
    total, caught = Counter[str](), Counter[str]()
    for kind, text, facts in corrupted(seed=1, count=450):
        total[kind] += 1
        caught[kind] += bool(validator.problems(text, facts))
    passed = [not validator.problems(text, facts) for text, facts in good(seed=2, count=200)]
    print({kind: f"{caught[kind]}/{total[kind]}" for kind in total}, f"good: {sum(passed)}/{len(passed)}")
    assert total.keys() == CORRUPTIONS.keys()
    assert all(caught[kind] >= 0.9 * total[kind] for kind in total)
    assert caught.total() >= 0.95 * total.total()
    assert sum(passed) >= 0.98 * len(passed)


def test_checks_of_a_city() -> None:
    gazetteer = Gazetteer(
        [Address("Mill Street", "Harbour"), Address("Elm Road", "Castle")], variants={"Elm Road": ["Olmenweg"]}
    )
    free = make_validator(LabelsConfig(), load_prompt("alignment"), gazetteer)
    assert [p.kind for p in free.problems(f"{GOOD} So it is Olmenweg.", FACTS)] == ["conclusion"]
    red_is_blue = replace(FACTS, photo_colours=("blue",))
    assert free.problems(GOOD, red_is_blue) == []
    for config, name in ((LabelsConfig(), "grounded"), (LabelsConfig(send_image=False), "reasoning")):
        assert "colour" in {p.kind for p in make_validator(config, load_prompt(name), gazetteer).problems(GOOD, red_is_blue)}


def test_reasons_conclude_on_the_district_and_name_no_street() -> None:
    city = Gazetteer([Address("Mill Street", "Harbour"), Address("Elm Road", "Castle")])
    checks = make_validator(LabelsConfig(), load_prompt("reasoning"), city)
    seen = "Tall brick fronts with narrow windows stand close beside the road, and hardly any greenery is in the view."
    assert checks.problems(f"{seen} All of this points to Harbour.", FACTS) == []
    kinds = {
        f"{seen} All of this points to Castle.": {"district", "conclusion"},
        f"{seen} So this is Mill Street in Harbour.": {"street"},
        f"{seen} It is not Elm Road. So this is Harbour.": {"street"},
        f"{seen} Nothing more can be said about it.": {"district"},
    }
    for text, expected in kinds.items():
        assert {p.kind for p in checks.problems(text, FACTS)} == expected, text


def test_abbreviations_do_not_end_a_sentence() -> None:
    facts = Facts("St. Mary's Passage", "Market")
    text = (
        "The tower of a church stands at the end of a narrow lane between pale walls. So this is St. Mary's Passage in Market."
    )
    assert LabelValidator().problems(text, facts) == []


# Claims that are not among the facts, checked inside GOOD.
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
