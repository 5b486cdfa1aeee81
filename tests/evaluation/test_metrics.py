"""What counts as right, the metrics and their intervals, and their table for the terminal."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm.evaluation import metrics, result_tables
from addressvlm.evaluation.parsing import Judge, yes_no
from addressvlm.gazetteer.name_matcher import NameFinder

STREETS = ["Mill Street", "Mill Street North", "Harbour Street", "Oak Avenue", "St. Andrew's Street", "Market", "A Street"]
DISTRICTS = ["Harbour", "Old Town", "Market", "North Oak"]
judge = Judge(STREETS, DISTRICTS)


@pytest.mark.parametrize(
    ("level", "expected", "answer", "right"),
    [
        ("street", "Mill Street", "Mill Street", True),
        ("street", "Mill Street", "mill st.", True),
        ("street", "Mill Street", "This was taken on Mill Street, in Harbour.", True),
        ("street", "Mill Street", "Mill Street. Mill Street.", True),
        ("street", "Mill Street", "Mill Street or Oak Avenue", False),
        ("street", "Mill Street", "Mill Street North", False),
        ("street", "Mill Street North", "Mill Street", False),
        ("street", "Mill Street", "Mill Street, North Oak", True),
        ("street", "Mill Street", "Windmill Street", False),
        ("street", "Mill Street", "", False),
        ("street", "St. Andrew's Street", "saint andrews street", True),
        ("street", "Mill Street", "It is not Oak Avenue", False),
        ("street", "Elm Row", "elm row", True),  # unknown to the gazetteer: equality
        ("street", "Elm Row", "on Elm Row", False),
        ("district", "Harbour", "Harbour", True),
        ("district", "Harbour", "The harbour district", True),
        ("district", "Harbour", "Harbour Street", False),
        ("district", "Harbour", "Harbour Street, Old Town", False),
        ("district", "Old Town", "Harbour Street, Old Town", True),
        ("district", "Harbour", "Harbour and Old Town", False),
        ("district", "Market", "Market", True),  # street and district of one name
        ("district", "Market", "in Market, I think", True),
        ("address", "Mill Street, Harbour", "Mill Street, Harbour", True),
        ("address", "Mill Street, Harbour", "Mill Street in Harbour.", True),
        ("address", "Mill Street, Harbour", "Harbour: Mill St", True),
        ("address", "Mill Street, Harbour", "Mill Street", False),
        ("address", "Mill Street, Harbour", "Harbour", False),
        ("address", "Mill Street, Harbour", "Mill Street, Old Town", False),
        ("address", "Mill Street, Harbour", "Oak Avenue, Harbour", False),
        ("address", "Mill Street, Harbour", "Mill Street, Oak Avenue, Harbour", False),
        ("address", "Harbour Street, Old Town", "It is Harbour Street, Old Town", True),
        ("address", "Market, Market", "Market, Market", True),
    ],
)
def test_generation_is_right_if_it_names_exactly_the_expected(level, expected, answer, right):
    assert judge.correct(level, "generation", expected, answer) is right


def test_a_variant_counts_as_the_name_and_a_name_of_its_own_does_not():
    local = Judge(["Via Roma", "Corso"], ["Mitte"], {"Via Roma": ["Romstraße", "Corso"], "Mitte": ["Centre"]})
    assert local.correct("street", "generation", "Via Roma", "Romstrasse")
    assert local.correct("address", "generation", "Via Roma, Mitte", "Romstraße, Centre")
    assert local.correct("street", "choice", "Via Roma", "It is Romstraße", ["Corso", "Via Roma"])
    assert not local.correct("street", "generation", "Via Roma", "Corso")


def test_address_whose_street_has_a_comma():
    local = Judge(["Rue A, Nord", "Quai"], ["Centre"])
    assert local.correct("address", "generation", "Rue A, Nord, Centre", "rue a nord centre", street="Rue A, Nord")
    assert not local.correct("address", "generation", "Rue A, Nord, Centre", "Quai, Centre", street="Rue A, Nord")


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        ("Yes", "Yes", True),
        ("Yes", "yes, it is Oak Avenue", True),
        ("Yes", "No", False),
        ("No", "No, yes would be wrong", True),
        ("No", "Nothing to say", False),
        ("Yes", "Mill Street", False),
        ("Yes", "", False),
        ("No", "I'd say: NO.", True),
    ],
)
def test_judgment_goes_by_the_first_yes_or_no(expected, answer, right):
    assert judge.correct("street", "judgment", expected, answer) is right


def test_no_verdict_without_yes_or_no():
    assert yes_no("Northern yesterday") is None


OPTIONS = ["Oak Avenue", "Mill Street", "Harbour Street", "A Street"]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Mill Street", True),
        ("The photo shows Mill St.", True),
        ("B", True),
        ("b)", True),
        ("(B)", True),
        ("Option B.", True),
        ("The answer is B", True),
        ("B. Mill Street", True),
        ("A. Mill Street", True),  # the name decides
        ("B. Oak Avenue", False),
        ("A", False),
        ("E", False),
        ("Mill Street or Oak Avenue", False),
        ("Mill Street North", False),
        ("Oak Avenue", False),
        ("Because", False),
        ("", False),
    ],
)
def test_choice_needs_exactly_one_option_or_its_letter(answer, right):
    assert judge.correct("street", "choice", "Mill Street", answer, OPTIONS) is right


def test_choice_between_names_the_gazetteer_lacks():
    assert judge.correct("street", "choice", "Elm Row", "It is Elm Row.", ["Elm Row", "Fir Row"])
    assert not judge.correct("street", "choice", "Elm Row", "Elm Row, Fir Row", ["Elm Row", "Fir Row"])


@given(st.sampled_from(STREETS), st.text(alphabet=" .!?", max_size=4), st.booleans())
def test_padding_and_case_never_matter(street, padding, upper):
    written = street.upper() if upper else street
    assert judge.correct("street", "generation", street, padding + written + padding)


@given(st.text())
def test_any_text_can_be_judged(text):
    for level, kind in metrics.CELLS.values():
        expected = "Yes" if kind == "judgment" else "Mill Street, Harbour" if level == "address" else "Harbour"
        assert judge.correct(level, kind, expected, text, ["Harbour", "Market"]) in (True, False)


def test_names_of_nothing():
    assert NameFinder([]).find("Mill Street") == set()


def row(place, level, kind, correct, photo=None, expected="x"):
    question = {"level": level, "kind": kind, "question": "q", "expected": expected}
    return {"id": photo or place, "place": place, "correct": correct, **question}


def hand_made():
    """Two places; district: G 1/2, J 3/4, M 1/1; street: G 0/2, J 1/2, M 1/2; address 1/2."""
    rows = []
    for level, kind, results in [
        ("district", "generation", [("p", 1), ("q", 0)]),
        ("district", "judgment", [("p", 1), ("p", 1), ("q", 1), ("q", 0)]),
        ("district", "choice", [("p", 1)]),
        ("street", "generation", [("p", 0), ("q", 0)]),
        ("street", "judgment", [("p", 1), ("q", 0)]),
        ("street", "choice", [("p", 1), ("q", 0)]),
        ("address", "generation", [("p", 1), ("q", 0)]),
    ]:
        rows += [row(place, level, kind, bool(ok), expected=str(i)) for i, (place, ok) in enumerate(results)]
    return rows


def test_metrics_by_hand():
    scored = metrics.compute_metrics(hand_made())
    values = {name: scored[name]["value"] for name in metrics.METRICS}
    assert values == pytest.approx(
        {
            "A_d_G": 1 / 2, "A_d_J": 3 / 4, "A_d_M": 1.0, "A_d": 5 / 7,
            "A_s_G": 0.0, "A_s_J": 1 / 2, "A_s_M": 1 / 2, "A_s": 2 / 6, "A": 7 / 13, "A_ds": 1 / 2,
        }
    )  # fmt: skip
    assert {name: scored[name]["n"] for name in ("A_d_J", "A_d", "A_s", "A", "A_ds")} == {
        "A_d_J": 4, "A_d": 7, "A_s": 6, "A": 13, "A_ds": 2
    }  # fmt: skip


TABLE_1 = {  # paper 001: A_d of G, J, M, then their average, the same for A_s, then A
    "baseline, Pitts": ((84.51, 92.72, 93.23), 90.70, (64.31, 90.25, 91.27), 84.00, 87.27),
    "GeoReasoner, Pitts": ((83.29, 91.65, 91.50), 89.41, (61.89, 89.87, 89.68), 82.80, 86.03),
    "AddressVLM, Pitts": ((88.73, 93.54, 95.16), 92.70, (72.51, 91.70, 93.98), 87.46, 90.02),
    "baseline, SF": ((82.19, 93.46, 93.14), 90.49, (65.48, 88.25, 88.57), 82.61, 86.51),
    "GeoReasoner, SF": ((81.40, 91.07, 90.81), 88.53, (62.89, 86.46, 84.64), 80.08, 84.26),
    "AddressVLM, SF": ((86.48, 93.72, 94.50), 92.06, (76.09, 88.92, 92.75), 86.66, 89.33),
}


PER_PHOTO = {"Pitts": 168409 / 19152, "SF": 181943 / 20484}  # test questions, Table 6: one of the address, four of the street


@pytest.mark.parametrize("system", TABLE_1)
def test_averages_are_those_of_the_papers_table(system):
    district, a_d, street, a_s, a = TABLE_1[system]
    of_district = (PER_PHOTO[system.split(", ")[1]] - 1 - 4) / 4
    shares = dict(zip(("A_d_G", "A_d_J", "A_d_M", "A_s_G", "A_s_J", "A_s_M"), (*district, *street), strict=True))
    weight = {cell: 2 if cell.endswith("J") else 1 for cell in shares}
    found = metrics.averages(shares, {cell: w * (of_district if "_d_" in cell else 1) for cell, w in weight.items()})
    assert found == pytest.approx({"A_d": a_d, "A_s": a_s, "A": a}, abs=0.12)


def test_two_places_resample_to_all_or_nothing():
    """Of two places one right, one wrong, a quarter of the resamples has only the one, a quarter only the other."""
    interval = metrics.compute_metrics(hand_made())["A_ds"]
    assert (interval["low"], interval["high"]) == (0.0, 1.0)


def test_all_wrong_leaves_room_for_doubt():
    rows = [row(f"p{i}", "address", "generation", False) for i in range(10)]
    interval = metrics.compute_metrics(rows)["A_ds"]
    assert interval["value"] == interval["low"] == 0
    assert interval["high"] == pytest.approx(0.308, abs=1e-3)  # Clopper-Pearson, 0 of 10


def test_photos_of_one_place_count_as_one():
    """Four photos a place, all alike, give the interval of the places, wider than that of independent photos."""
    alike = [row(f"p{i}", "address", "generation", i % 2 == 0, photo=f"{i}/{j}") for i in range(40) for j in range(4)]
    apart = [row(f"p{i}-{j}", "address", "generation", i % 2 == 0) for i in range(40) for j in range(4)]
    width = [s["high"] - s["low"] for s in (metrics.compute_metrics(alike)["A_ds"], metrics.compute_metrics(apart)["A_ds"])]
    assert width[0] == pytest.approx(2 * width[1], rel=0.15)
    assert width[0] == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 40), rel=0.15)


VIEWS = st.tuples(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(2, 4), st.integers(0, 5))


@settings(max_examples=20, deadline=None)
@given(VIEWS)
def test_more_views_of_a_place_that_are_alike_change_no_interval(drawn):
    results, views, seed = drawn
    one = [row(f"p{i}", "address", "generation", ok) for i, ok in enumerate(results)]
    more = [row(f"p{i}", "address", "generation", ok, f"{i}/{j}") for i, ok in enumerate(results) for j in range(views)]
    other = [r | {"correct": i % 3 == 0} for i, r in enumerate(one)]
    others = [r | {"correct": other[i // views]["correct"]} for i, r in enumerate(more)]
    places = [r["place"] for r in more]
    result = [
        (metrics.compute_metrics(one, 50, seed)["A_ds"], metrics.compute_metrics(more, 50, seed)["A_ds"]),
        (metrics.share_ci(results, places[::views], 50, seed), metrics.share_ci(np.repeat(results, views), places, 50, seed)),
        (
            metrics.paired_difference_ci(one, other, resamples=50, seed=seed)["A_ds"],
            metrics.paired_difference_ci(more, others, resamples=50, seed=seed)["A_ds"],
        ),
    ]
    for once, often in result:
        assert often == {**{end: pytest.approx(once[end]) for end in ("value", "low", "high")}, "n": once["n"] * views}


def test_every_question_counts_once_whatever_its_place():
    """One place with one question, one with three: the share is of questions, not the mean of places."""
    rows = [row("p", "address", "generation", True), *(row("q", "address", "generation", False, f"q{i}") for i in range(3))]
    assert metrics.compute_metrics(rows)["A_ds"]["value"] == 0.25
    assert metrics.share_ci([r["correct"] for r in rows], [r["place"] for r in rows])["value"] == 0.25
    both = metrics.paired_difference_ci(rows, [r | {"correct": False} for r in rows])
    assert (both["A_ds"]["value"], both["A_ds"]["n"]) == (0.25, 4)


def test_an_interval_holds_95_of_100_resamples():
    """Of forty places half are right: a resample has Binomial(40, 1/2) right ones, whose 2.5 and 97.5 percent are 14 and 26."""
    right = [i % 2 == 0 for i in range(40)]
    for seed in range(3):
        result = metrics.share_ci(right, [str(i) for i in range(40)], 4000, seed)
        assert (result["low"], result["high"]) == (14 / 40, 26 / 40)


def test_all_right_leaves_room_for_doubt():
    for cell in (
        metrics.compute_metrics([row(f"p{i % 10}", "address", "generation", True, str(i)) for i in range(40)])["A_ds"],
        metrics.share_ci([1] * 40, [str(i % 10) for i in range(40)]),
    ):
        assert cell["value"] == cell["high"] == 1
        assert cell["low"] == pytest.approx(1 - 0.308, abs=1e-3)  # Clopper-Pearson, 10 places of 10


def test_no_question_no_value():
    scored = metrics.compute_metrics([row("p", "street", "generation", True)])
    assert scored["A_ds"] == {"value": None, "low": None, "high": None, "n": 0}
    assert (scored["A_s"]["value"], scored["A_s_G"]["value"]) == (1, 1)
    assert scored["A_d"]["value"] is scored["A"]["value"] is None
    assert metrics.compute_metrics([])["A"]["n"] == 0


answered = st.lists(
    st.tuples(st.sampled_from("pqrs"), st.sampled_from(list(metrics.CELLS.values())), st.booleans()), max_size=40
)


@settings(max_examples=50, deadline=None)
@given(answered, st.integers(0, 5))
def test_value_lies_in_its_interval(results, seed):
    rows = [row(place, level, kind, ok, expected=str(i)) for i, (place, (level, kind), ok) in enumerate(results)]
    for interval in metrics.compute_metrics(rows, resamples=100, seed=seed).values():
        if interval["value"] is not None:
            assert 0 <= interval["low"] <= interval["value"] <= interval["high"] <= 1


def test_same_seed_same_intervals():
    assert metrics.compute_metrics(hand_made(), seed=3) == metrics.compute_metrics(hand_made(), seed=3)
    rows = [row(f"p{i}", "address", "generation", i % 3 == 0) for i in range(97)]
    other = [r | {"correct": i % 2 == 0} for i, r in enumerate(rows)]
    right, places = [r["correct"] for r in rows], [r["place"] for r in rows]
    ends = set()
    for seed in range(6):
        whole = metrics.compute_metrics(rows, 100, seed)["A_ds"]
        assert metrics.share_ci(right, places, 100, seed) == {key: pytest.approx(end) for key, end in whole.items()}
        ends.add((whole["low"], metrics.paired_difference_ci(rows, other, resamples=100, seed=seed)["A_ds"]["low"]))
    assert len({low for low, _ in ends}) > 1
    assert len({low for _, low in ends}) > 1


def test_paired_difference():
    a = [row(f"p{i}", "address", "generation", i < 30) for i in range(40)]
    b = [row(f"p{i}", "address", "generation", i < 20) for i in range(50)]
    gain = metrics.paired_difference_ci(a, b)["A_ds"]
    assert gain["value"] == pytest.approx(0.25)
    assert gain["n"] == 40
    assert 0.05 < gain["low"] < 0.25 < gain["high"] < 0.45
    alone = [metrics.compute_metrics(rows)["A_ds"] for rows in (a, b[:40])]
    assert gain["high"] - gain["low"] < sum(s["high"] - s["low"] for s in alone)  # pairing takes out what both share


def test_paired_with_itself_is_nothing():
    gain = metrics.paired_difference_ci(hand_made(), hand_made())
    assert gain["A_ds"] == {"value": 0, "low": 0, "high": 0, "n": 2}
    assert gain["A"] == {"value": 0, "low": 0, "high": 0, "n": 13}


def test_pairs_are_of_one_question_whatever_the_order():
    """Questions of a photo that differ in one thing alone."""
    a = [
        row("p", "street", "judgment", True, expected="Yes"),
        row("p", "street", "judgment", False, expected="No"),
        row("p", "street", "judgment", True, expected="Yes") | {"question": "again"},
        row("p", "district", "judgment", True, expected="Yes"),
        row("q", "street", "judgment", False, expected="Yes"),
        row("q", "street", "judgment", True, photo="another", expected="Yes"),
    ]
    b = [r | {"correct": not r["correct"]} for r in a]
    cells = ("A_s_J", "A_d_J")
    gain = metrics.paired_difference_ci(a, b, cells)
    assert [gain[cell]["n"] for cell in cells] == [5, 1]
    assert [gain[cell]["value"] for cell in cells] == [pytest.approx(3 / 5 - 2 / 5), 1]
    assert metrics.paired_difference_ci(a, b[::-1], cells) == gain
    for one in a:
        assert metrics.paired_difference_ci([one], b, ["A_s_J", "A_d_J"]) == metrics.paired_difference_ci(
            [one], [{**one, "correct": not one["correct"]}], cells
        )
    back = metrics.paired_difference_ci(b, a, cells)["A_s_J"]
    assert (back["low"], back["high"]) == (-gain["A_s_J"]["high"], -gain["A_s_J"]["low"])


SYSTEMS = [
    {"name": "zero-shot", "metrics": metrics.compute_metrics(hand_made())},
    {"name": "ours", "metrics": metrics.compute_metrics([])},
]


def test_plain_table():
    lines = result_tables.metrics_table(SYSTEMS).splitlines()
    assert lines[0].split() == metrics.METRICS
    assert lines[2].split()[:5] == ["zero-shot", "50.0", "75.0", "100.0", "71.4"]
    assert lines[3].split()[-1] == "0–100"
    assert lines[4].split() == ["ours", *["–"] * 10]
    assert max(map(len, lines)) <= 120


def test_shares_of_places():
    result = metrics.share_ci([1, 1, 0, 0], ["a", "a", "b", "b"], resamples=200)
    assert result["value"] == 0.5
    assert (result["low"], result["high"], result["n"]) == (0, 1, 4)
    assert metrics.share_ci([], [])["value"] is None
