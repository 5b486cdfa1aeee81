import random

from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm.labels.facts import GREENERY, SKY, Facts
from addressvlm.labels.lexicon import COLOURS, COMPASS, DIRECTIONS
from addressvlm.labels.templates import explain, reason
from addressvlm.labels.validator import LabelValidator
from addressvlm.tools.label_diversity import distinct_n
from tests.support.label_texts import DISTRICTS, STREETS, random_facts

COLOUR = st.lists(st.sampled_from(sorted(COLOURS)), unique=True, max_size=3).map(tuple)


MAYBE_FACTS = st.builds(
    Facts,
    street=st.sampled_from(STREETS),
    district=st.sampled_from(DISTRICTS),
    names=st.lists(st.sampled_from(STREETS), unique=True, max_size=5).map(tuple),
    direction=st.none() | st.sampled_from(DIRECTIONS),
    view=st.none() | st.sampled_from(["along", "across", "oblique"]),
    facing=st.none() | st.sampled_from(COMPASS),
    cross_street=st.none() | st.just("Cross Lane"),
    cross_distance_m=st.sampled_from([0, 10, 90]),
    cross_direction=st.sampled_from(COMPASS),
    photo_colours=COLOUR,
    tile_colours=COLOUR,
)


PHOTO_FACTS = st.builds(
    Facts,
    street=st.sampled_from(STREETS),
    district=st.sampled_from(DISTRICTS),
    photo_colours=COLOUR,
    sky=st.sampled_from(list(SKY)),
    greenery=st.sampled_from(list(GREENERY)),
)


@settings(deadline=None, max_examples=50)
@given(facts=MAYBE_FACTS, seed=st.integers(0, 1000))
def test_labels_of_grafts_pass_their_own_checks(facts: Facts, seed: int) -> None:
    text = explain(facts, random.Random(seed))
    problems = LabelValidator(["Elm Road"], DISTRICTS, verified=True).problems(text, facts)
    known = sum(map(bool, (facts.photo_colours, facts.tile_colours, facts.facing, facts.direction, facts.names)))
    assert [p for p in problems if known > 1 or p.kind not in ("visible", "length")] == []
    assert text == explain(facts, random.Random(seed))
    assert "None" not in text
    if facts.street not in facts.names and facts.direction:
        assert text.count(facts.street) == 1  # only the conclusion knows a name that can't be read


@settings(deadline=None, max_examples=50)
@given(facts=PHOTO_FACTS, seed=st.integers(0, 1000))
def test_labels_of_street_views_pass_their_own_checks(facts: Facts, seed: int) -> None:
    text = reason(facts, random.Random(seed))
    assert LabelValidator(STREETS, DISTRICTS, verified=True, mapless=True).problems(text, facts) == []


def test_a_label_names_the_own_street_first_few_names_and_a_crossing_that_is_near_as_a_corner() -> None:
    names = ("Elm Road", "Castle Hill", "Mill Street", "Green Lane")
    for seed in range(20):
        known = Facts("Mill Street", "Harbour", names, tile_colours=("green", "brown", "red"))
        text = explain(known, random.Random(seed))
        assert "Mill Street, Elm Road and Castle Hill" in text
        assert "Green Lane" not in text
        assert ("green and brown" in text, "red" in text.split()) == (True, False)
        corner, away = (
            explain(
                Facts("Mill Street", "Harbour", cross_street="Elm Road", cross_distance_m=m, cross_direction="east"),
                random.Random(seed),
            )
            for m in (0, 10)
        )
        assert ("metres" in corner, "10 metres" in away, "east" in away) == (False, True, True)


def test_wording_varies_within_its_length() -> None:
    known = random_facts(random.Random(1))
    texts = [explain(known, random.Random(seed)) for seed in range(200)]
    assert len(set(texts)) > 190
    assert all(30 <= len(text.split()) <= 75 for text in texts)
    assert distinct_n(texts, 4) > 0.015  # of one place: names and facts are the same in all of them
