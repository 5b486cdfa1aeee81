"""Generation, judgment and choice follow from one set of probabilities and agree."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm.answers import question_parser
from addressvlm.answers.address_distribution import AddressDistribution
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.questions import templates

NAMES = {"street": ["Elm Row", "Mill Street", "Oak Avenue", "Station Road"], "district": ["Harbour", "Old Town"]}
ADDRESSES = [Address(street, district) for street in NAMES["street"] for district in NAMES["district"]]
CITY = Gazetteer(ADDRESSES, variants={"Mill Street": ["Molengasse"]})
SCORES = st.lists(st.floats(-30, 0) | st.just(-math.inf), min_size=8, max_size=8).filter(lambda s: max(s) > -math.inf)


def ask(distribution, question):
    return question_parser.parse_question(question, CITY).answer(distribution)[0]


@given(SCORES, st.sampled_from(["street", "district"]), st.data())
@settings(deadline=None)
def test_the_three_kinds_never_contradict_each_other(scores, level, data):
    distribution = AddressDistribution(CITY.addresses, np.array(scores))
    masses = {name: distribution.probability(name, level) for name in NAMES[level]}
    name = distribution.name(level)
    assert masses[name] == pytest.approx(max(masses.values()))
    wording = {kind: data.draw(st.sampled_from(templates(level, kind))) for kind in ("generation", "judgment", "choice")}
    assert ask(distribution, wording["generation"]) == name
    for other in NAMES[level]:
        assert ask(distribution, wording["judgment"].format(name=other)) == ("Yes" if other == name else "No")
    options = data.draw(st.lists(st.sampled_from(NAMES[level]), min_size=2, unique=True))
    chosen = ask(distribution, wording["choice"].format(options="; ".join(options)))
    shares = [distribution.probability(option, level) for option in options]
    assert chosen == (name if name in options else options[int(np.argmax(shares))])


@given(SCORES)
def test_probabilities(scores):
    distribution = AddressDistribution(CITY.addresses, np.array(scores))
    ranked = distribution.ranked()
    assert sum(c.probability for c in ranked) == pytest.approx(1)
    assert len(ranked) == sum(score > -math.inf for score in scores)
    assert [c.probability for c in ranked] == sorted((c.probability for c in ranked), reverse=True)
    assert sum(distribution.probability(street, "street") for street in NAMES["street"]) == pytest.approx(1)
    result = distribution.localization(3, threshold=0.5)
    assert result.candidates == ranked[:3]
    assert result.known == (result.confidence > 0.5)


def test_answers_come_with_the_probability_that_they_are_right():
    """Mill Street 0.1 + 0.2, Oak Avenue 0.4 in Old Town, which is likeliest; Harbour 0.3 + 0.1 of all, Old Town 0.6."""
    street_p = {"Elm Row": (0.2, 0.0), "Mill Street": (0.1, 0.2), "Oak Avenue": (0.0, 0.4), "Station Road": (0.1, 0.0)}
    with np.errstate(divide="ignore"):
        distribution = AddressDistribution(
            CITY.addresses, np.log([street_p[a.street][a.district == "Old Town"] for a in CITY.addresses]) - 7
        )
    for parsed, answer, probability in [
        (question_parser.ParsedQuestion("generation", "street"), "Oak Avenue", 0.4),
        (question_parser.ParsedQuestion("generation", "district"), "Old Town", 0.6),
        (question_parser.ParsedQuestion("generation", "address"), "Oak Avenue, Old Town", 0.4),
        (question_parser.ParsedQuestion("judgment", "street", ("oak ave",)), "Yes", 0.4),
        (question_parser.ParsedQuestion("judgment", "street", ("Mill Street",)), "No", 0.7),
        (question_parser.ParsedQuestion("judgment", "district", ("Harbour",)), "No", 0.6),
        (question_parser.ParsedQuestion("judgment", "address", ("Mill Street, Old Town",)), "No", 0.8),
        (question_parser.ParsedQuestion("choice", "street", ("Elm Row", "Mill Street", "Station Road")), "Mill Street", 0.3),
        (question_parser.ParsedQuestion("choice", "street", ("Elm Row", "Oak Avenue")), "Oak Avenue", 0.4),
        (question_parser.ParsedQuestion("choice", "district", ("Atlantis", "Harbour")), "Harbour", 0.4),
        (
            question_parser.parse_question("Options: mill st, Old Town; Elm Row, Harbour; Oak Avenue, Harbour.", CITY),
            "mill st, Old Town",
            0.2,
        ),
    ]:
        assert parsed.answer(distribution) == (answer, pytest.approx(probability))


def test_the_district_is_the_likeliest_one_not_that_of_the_likeliest_address():
    """0.4 in Harbour against 0.3 + 0.3 in Old Town."""
    p = {("Elm Row", "Harbour"): 0.4, ("Mill Street", "Old Town"): 0.3, ("Oak Avenue", "Old Town"): 0.3}
    with np.errstate(divide="ignore"):
        distribution = AddressDistribution(CITY.addresses, np.log([p.get((a.street, a.district), 0) for a in CITY.addresses]))
    assert [distribution.name(level) for level in ("address", "street", "district")] == [
        "Elm Row, Harbour", "Elm Row", "Old Town"
    ]  # fmt: skip


def test_of_equally_likely_names_that_of_the_likeliest_address_is_the_answer():
    """Half of it at three addresses in Harbour, half at one in Old Town: as likely, whatever rounding makes of the sums."""
    for share in (0.1, 0.2, 0.3, 0.7, 1 / 3):
        p = {("Elm Row", "Harbour"): share, ("Mill Street", "Harbour"): share, ("Station Road", "Harbour"): share,
             ("Oak Avenue", "Old Town"): 3 * share}  # fmt: skip
        with np.errstate(divide="ignore"):
            distribution = AddressDistribution(
                CITY.addresses, np.log([p.get((a.street, a.district), 0) for a in CITY.addresses])
            )
        assert distribution.name("district") == "Old Town"
        assert distribution.choose(["Harbour", "Old Town"], "district") == "Old Town"
        assert not distribution.judge("Harbour", "district")
        assert distribution.choose(["Station Road", "Elm Row", "Mill Street"], "street") == "Station Road"


def test_of_equal_addresses_the_first_is_named_and_ranked_first():
    distribution = AddressDistribution(CITY.addresses, np.array([0.0, 1.0, 1.0, -math.inf, 1.0, 0.0, 0.0, 1.0]))
    first = [CITY.addresses[i] for i in (1, 2, 4, 7, 0, 5, 6)]
    assert distribution.name("address") == first[0].text()
    assert [(c.street, c.district) for c in distribution.ranked()] == [(a.street, a.district) for a in first]
    result = distribution.localization(2, threshold=distribution.ranked()[0].probability)
    assert not result.known  # the confidence has to be above the threshold
    assert len(result.candidates) == 2


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Was this taken on Mill Street?", question_parser.ParsedQuestion("judgment", "street", ("Mill Street",))),
        ("is this mill st", question_parser.ParsedQuestion("judgment", "street", ("Mill Street",))),
        ("Is it in the old town?", question_parser.ParsedQuestion("judgment", "district", ("Old Town",))),
        ("Is this Mill Street, Harbour?", question_parser.ParsedQuestion("judgment", "address", ("Mill Street, Harbour",))),
        (
            "Select an answer from [Mill Street, Elm Row]",
            question_parser.ParsedQuestion("choice", "street", ("Mill Street", "Elm Row")),
        ),
        (
            "Which district? Options: Harbour; Atlantis.",
            question_parser.ParsedQuestion("choice", "district", ("Harbour", "Atlantis")),
        ),
        ("where exactly was this photo taken", question_parser.ParsedQuestion("generation", "address")),
        (
            "Was the photo shot in the district Harbour? Yes or no?",
            question_parser.ParsedQuestion("judgment", "district", ("Harbour",)),
        ),
        (
            "Is this a picture of Mill Street? Answer with Yes or No.",
            question_parser.ParsedQuestion("judgment", "street", ("Mill Street",)),
        ),
        ("Is it on Molengasse?", question_parser.ParsedQuestion("judgment", "street", ("Mill Street",))),
        ("Is there a café on Mill Street?", None),
        ("Was Mill Street named after a mill?", None),
        ("Is Mill Street in Harbour?", None),
        ("Is the Harbour far from this place?", None),
        ("Was it raining in Harbour?", None),
        ("What do you see?", None),
        ("Is it raining?", None),
        ("Tell me about Mill Street.", None),
        ("Is it Mill Street or Elm Row?", None),
        ("Options: a; b.", None),
        ("Options: Mill Street.", None),  # nothing to choose from
        (
            "Options: ; Mill Street ;; Elm Row;",
            question_parser.ParsedQuestion("choice", "street", ("Mill Street", "Elm Row")),
        ),
        (
            "Options: Mill Street, Harbour; Mill Street, Old Town",
            question_parser.ParsedQuestion("choice", "address", ("Mill Street, Harbour", "Mill Street, Old Town")),
        ),
        pytest.param(
            f"{'I walked a long way. ' * 20}Where am I? Choose from [Mill Street, Elm Row].",
            question_parser.ParsedQuestion("choice", "street", ("Mill Street", "Elm Row")),
            id="a long introduction",
        ),
        (
            "Options: Elm Row; Oak Avenue. Select one of them from [Mill Street, Elm Row]",  # the last list counts
            question_parser.ParsedQuestion("choice", "street", ("Mill Street", "Elm Row")),
        ),
        pytest.param(f"Options: Mill Street; {'x; ' * (question_parser.MAX_OPTIONS - 1)}Elm Row", None, id="one too many"),
        pytest.param(f"Options: Mill Street; {chr(0xFDFA) * 300}", None, id="each of them stands for 18 characters"),
        ("", None),
    ],
)
def test_what_is_asked(question, expected):
    assert question_parser.parse_question(question, CITY) == expected


def test_a_district_in_the_name_of_a_street():
    city = Gazetteer([Address("Harbour Street", "Old Town"), Address("Elm Row", "Harbour")])
    assert question_parser.parse_question("Is it on Harbour Street?", city) == question_parser.ParsedQuestion(
        "judgment", "street", ("Harbour Street",)
    )


def test_the_longest_spelling_of_a_name_is_the_one_that_was_said():
    city = Gazetteer(
        [Address("Mill Street", "Harbour"), Address("Elm Row", "Old Town")],
        variants={"Mill Street": ["Mill", "Mill Street West", "West Mill Street"]},
    )
    for said in ("Mill", "Mill Street West", "West Mill Street", "mill st"):
        assert question_parser.parse_question(f"Is this {said}?", city) == question_parser.ParsedQuestion(
            "judgment", "street", ("Mill Street",)
        )
