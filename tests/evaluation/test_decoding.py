"""Decoding modes compared from scores alone, and how well confidence is calibrated."""

import weakref

import numpy as np
import pytest
import shapely

from addressvlm.answers.calibration import Calibration, ece
from addressvlm.evaluation import comparison, likelihood, result_tables
from addressvlm.evaluation.plots import reliability_diagram
from addressvlm.gazetteer.gazetteer import Address, Gazetteer

ADDRESSES = [Address(f"Street {letter}", f"District {i % 3}") for i, letter in enumerate("ABCDEFGHIJKL")]
LINES = {a.street: shapely.LineString([(i / 500, 0), (i / 500, 0.001)]) for i, a in enumerate(ADDRESSES)}
CITY = Gazetteer(ADDRESSES, LINES, city="Toytown")
SETTINGS = (100, 0)  # resamples and seed


def rows(photos=120, skill=1.5, seed=0):
    """Scores of a model that is right now and then; four photos a place."""
    rng = np.random.default_rng(seed)
    scored = []
    for i in range(photos):
        truth = i // 4 % len(ADDRESSES)
        scores = rng.normal(0, 1, len(ADDRESSES))
        scores[truth] += skill
        address = CITY.addresses[truth]
        scored.append(
            {"id": str(i), "place": str(i // 4), "lat": 0.0005, "lon": truth / 500, "street": address.street,
             "district": address.district, "scores": scores.tolist()}
        )  # fmt: skip
    return scored


ROWS = rows()


def compare(answers=None, **kwargs):
    return comparison.compare_decoding(rows(**kwargs), CITY, Calibration(1.0, 0.8, {"0.8": 0.5}), answers or {}, SETTINGS)


def accuracy(compared, name):
    return next(row["metrics"]["A_ds"]["value"] for row in compared["table"] if row["name"] == name)


def test_a_model_that_is_divided_by_its_prior_is_shown_with_it_too():
    skewed = Calibration(1.0, 0.8, {"0.8": 0.5}, own_prior=(50.0, *[0.0] * (len(CITY.addresses) - 1)))
    compared = comparison.compare_decoding(rows(), CITY, skewed, {}, SETTINGS)
    assert [row["name"] for row in compared["table"]][:2] == ["likelihood, own prior left in", "likelihood"]
    assert accuracy(compared, "likelihood, own prior left in") == accuracy(compare(), "likelihood")
    assert accuracy(compared, "likelihood") < accuracy(compare(), "likelihood")
    assert compared["trust"]["own_prior"]


def test_prior_information_helps():
    compared = compare()
    names = [row["name"] for row in compared["table"]]
    assert names == [
        "likelihood", "+ the district", "+ 10 streets", "+ 5 streets", "+ 2 streets",
        "+ GPS within 200 m", "+ GPS within 100 m", "+ GPS within 50 m",
    ]  # fmt: skip
    streets = [accuracy(compared, name) for name in ("likelihood", "+ 10 streets", "+ 5 streets", "+ 2 streets")]
    assert streets == sorted(streets)
    assert accuracy(compared, "+ the district") > accuracy(compared, "likelihood")
    assert accuracy(compared, "+ GPS within 50 m") > 0.9  # streets are 222 m apart; one fix in twenty is further off
    assert compared == compare()


def test_nothing_but_the_scores_decides():
    inputs = rows(photos=12)
    compared = comparison.compare_decoding(inputs, CITY, Calibration(), {}, SETTINGS)
    right = [int(np.argmax(row["scores"])) == CITY.addresses.index(Address(row["street"], row["district"])) for row in inputs]
    assert accuracy(compared, "likelihood") == pytest.approx(np.mean(right))


def test_trust():
    trust = compare()["trust"]
    confidence, right = likelihood.scored_photos(rows(), CITY).confidences(1.0)
    half = np.argsort(-confidence, kind="stable")[:60]
    assert trust["half"]["value"] == pytest.approx(right[half].mean())
    assert trust["coverage"]["value"] == pytest.approx((confidence > 0.5).mean())
    assert trust["precision"]["value"] == pytest.approx(right[confidence > 0.5].mean())
    assert trust["ece"]["low"] <= trust["ece"]["value"] <= trust["ece"]["high"]
    assert sum(b["photos"] for b in trust["bins"]) == 120
    drawing = reliability_diagram(trust["bins"])
    assert drawing.count("<circle") == len(trust["bins"])
    assert "likelihood" in result_tables.decoding_table({"system": "AddressVLM", **compare()})


def test_trust_is_of_calibrated_scores_and_counts_places():
    calibrated = Calibration(2.5, 0.8, {"0.8": 0.3})
    inputs = rows()
    trust = comparison.compare_decoding(inputs, CITY, calibrated, {}, SETTINGS)["trust"]
    photos = likelihood.scored_photos(inputs, CITY)
    confidence, right = photos.confidences(2.5)
    assert trust["ece"]["value"] == pytest.approx(ece(confidence, right))
    assert trust["ece_uncalibrated"] == pytest.approx(ece(*photos.confidences(1.0)))
    assert trust["ece_uncalibrated"] != pytest.approx(trust["ece"]["value"], rel=0.1)
    assert trust["coverage"]["value"] == pytest.approx((confidence > 0.3).mean())
    assert (trust["temperature"], trust["threshold"], trust["target"]) == (2.5, 0.3, 0.8)
    at_one = sorted(confidence)[60]
    exactly = comparison.compare_decoding(inputs, CITY, Calibration(2.5, 0.8, {"0.8": at_one}), {}, SETTINGS)["trust"]
    assert exactly["coverage"]["value"] == pytest.approx(59 / 120)  # above it, not at it
    one_a_place = [row for i, row in enumerate(inputs) if i % 4 == 0]
    views = [row | {"id": f"{row['id']}/{view}"} for row in one_a_place for view in range(4)]
    once, often = (
        comparison.compare_decoding(of, CITY, calibrated, {}, SETTINGS)["trust"]["ece"] for of in (one_a_place, views)
    )
    assert [often[end] for end in ("value", "low", "high")] == pytest.approx([once[end] for end in ("value", "low", "high")])


def test_streets_and_districts_that_are_right_by_themselves():
    city = Gazetteer([Address(street, district) for street in ("Elm Row", "Mill Street") for district in ("A", "B")])
    best = [("Elm Row", "A"), ("Elm Row", "B"), ("Mill Street", "A"), ("Elm Row", "B"), ("Mill Street", "B")]
    inputs = [
        {"id": str(i), "place": str(i), "lat": 0.0, "lon": 0.0, "street": "Elm Row", "district": "A",
         "scores": [float((a.street, a.district) == at) for a in city.addresses]}
        for i, at in enumerate(best)
    ]  # fmt: skip
    answers = [
        {"id": str(i), "level": level, "kind": kind, "correct": kind == "generation" and i < right, "place": str(i)}
        for level, right in (("address", 1), ("street", 2), ("district", 3))
        for kind in ("generation", "choice") for i in range(4)
    ]  # fmt: skip
    compared = comparison.compare_decoding(inputs, city, Calibration(), {"free": answers}, SETTINGS)["table"]
    values = {line["name"]: {name: cell["value"] for name, cell in line["metrics"].items()} for line in compared}
    assert values["free"] == {"A_ds": 0.25, "A_s": 0.5, "A_d": 0.75}
    assert values["likelihood"] == {"A_ds": 0.2, "A_s": 0.6, "A_d": 0.4}


def test_nobody_is_sure():
    trust = comparison.compare_decoding(rows(), CITY, Calibration(1.0, 0.8, {"0.8": 1.0}), {}, SETTINGS)["trust"]
    assert trust["coverage"]["value"] == 0
    assert trust["precision"]["value"] is None
    assert "–" in result_tables.decoding_table({"system": "a", **compare(), "trust": trust})


def test_generated_answers_beside():
    answers = [
        {"id": str(i), "level": level, "kind": "generation", "correct": i % 2 == 0, "place": str(i)}
        for level in ("address", "street", "district") for i in range(10)
    ]  # fmt: skip
    answers += [{**answer, "id": "a photo without scores", "correct": True} for answer in answers]
    compared = compare({"free": answers})
    assert compared["table"][0]["name"] == "free"
    assert accuracy(compared, "free") == 0.5


def test_a_photo_of_a_street_that_the_model_does_not_know():
    inputs = [row | {"street": "Nowhere"} for row in rows(photos=8)]
    compared = comparison.compare_decoding(inputs, CITY, Calibration(), {}, SETTINGS)
    assert {row["metrics"]["A_ds"]["value"] for row in compared["table"]} == {0.0}


def test_a_photo_without_coordinates_has_no_fix():
    inputs = [row | {"lat": None, "lon": None} for row in rows(photos=8)]
    compared = comparison.compare_decoding(inputs, CITY, Calibration(), {}, SETTINGS)
    assert accuracy(compared, "+ GPS within 50 m") == accuracy(compared, "likelihood")


class Scored(dict):
    """A row of scores that can be watched."""

    __hash__ = object.__hash__


@pytest.mark.parametrize(
    "use",
    [
        lambda rows: comparison.compare_decoding(rows, CITY, Calibration(), {}, SETTINGS),
        lambda rows: comparison.top_k_accuracy(rows, CITY, *SETTINGS),
        lambda rows: comparison.confidence_accuracy(ROWS[:20], rows, CITY),
        lambda rows: likelihood.restriction_stats(rows, CITY),
        lambda rows: sum(1 for _ in likelihood.calibrated_rows(rows, Calibration(2.0))),
        lambda rows: sum(1 for _ in likelihood.answers_from_scores(rows, [{**row, "rounds": []} for row in ROWS], CITY)),
    ],
)
def test_scores_of_all_photos_are_never_in_memory_together(use, monkeypatch):
    """Photos times addresses may be more than fits."""
    monkeypatch.setattr(likelihood, "CHUNK", 8)
    alive, most = weakref.WeakSet(), []

    def watched():
        for row in ROWS:
            alive.add(scored := Scored(row))
            most.append(len(alive))
            yield scored

    use(watched())
    assert len(most) == len(ROWS)
    assert max(most) <= 2 * 8 + 1
