from collections import Counter
from dataclasses import replace

import pytest

from addressvlm.config.labels import LabelsConfig
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.gazetteer.name_matcher import normalize_name
from addressvlm.labels.facts import Facts
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


def test_abbreviations_do_not_end_a_sentence() -> None:
    facts = Facts("St. Mary's Passage", "Market")
    text = (
        "The tower of a church stands at the end of a narrow lane between pale walls. So this is St. Mary's Passage in Market."
    )
    assert LabelValidator().problems(text, facts) == []
