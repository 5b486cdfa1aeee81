"""Scores of all addresses: each photo's own, the answers that follow from them, and what simulated priors leave of them."""

import io
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from addressvlm import InputError
from addressvlm.config import validate
from addressvlm.config.compare import SimulatedPriorConfig
from addressvlm.evaluation import likelihood
from addressvlm.evaluation.likelihood import prior_words, restrict_scores, restriction_stats, simulated_prior
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.questions import evaluation_rounds
from tests.evaluation.test_decoding import ADDRESSES, CITY, accuracy, compare, rows
from tests.support import north

priors = st.builds(
    SimulatedPriorConfig,
    district=st.booleans(),
    streets=st.none() | st.integers(1, len(ADDRESSES)),
    gps_m=st.none() | st.floats(1, 5000),
)


def array(of):
    return np.array([row["scores"] for row in of])


def test_a_district_leaves_its_addresses_as_they_are():
    given_rows = rows(photos=24)
    left = restrict_scores(given_rows, SimulatedPriorConfig(district=True), CITY, seed=0)
    for before, after in zip(given_rows, left, strict=True):
        inside = np.array([address.district == before["district"] for address in CITY.addresses])
        assert np.array_equal(np.array(after["scores"])[inside], np.array(before["scores"])[inside])
        assert np.isneginf(np.array(after["scores"])[~inside]).all()
        assert {**after, "scores": None} == {**before, "scores": None}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_true_street_is_among_those_of_the_prior(count):
    for row in restrict_scores(rows(photos=48), SimulatedPriorConfig(streets=count), CITY, seed=3):
        left = {CITY.addresses[i].street for i in np.flatnonzero(np.isfinite(row["scores"]))}
        assert len(left) == count
        assert row["street"] in left


def test_the_table_of_decoding_modes_has_the_same_priors():
    table = compare()
    for prior in (
        SimulatedPriorConfig(),
        SimulatedPriorConfig(district=True),
        SimulatedPriorConfig(streets=5),
        SimulatedPriorConfig(gps_m=100),
    ):
        best = array(restrict_scores(rows(), prior, CITY, seed=0)).argmax(axis=1)
        right = [CITY.addresses[i] == Address(row["street"], row["district"]) for i, row in zip(best, rows(), strict=True)]
        assert np.mean(right) == pytest.approx(
            accuracy(table, f"+ {prior_words(prior)}" if prior_words(prior) else "likelihood")
        )


@given(priors, st.integers(0, 5))
def test_nothing_gets_likelier_and_something_is_left(prior, seed):
    before = rows(photos=12)
    after = restrict_scores(before, prior, CITY, seed)
    kept = np.isfinite(array(after))
    assert kept.any(axis=1).all()
    assert np.array_equal(array(after)[kept], array(before)[kept])
    assert restrict_scores(after, prior, CITY, seed) == after


def test_restrictions_hold_together_and_never_leave_nothing():
    both = restrict_scores(rows(photos=24), SimulatedPriorConfig(district=True, streets=4), CITY, seed=0)
    one_by_one = restrict_scores(
        restrict_scores(rows(photos=24), SimulatedPriorConfig(district=True), CITY, 0), SimulatedPriorConfig(streets=4), CITY, 0
    )
    assert both == one_by_one
    elsewhere = [row | {"scores": [-np.inf if a.district == row["district"] else 0.0 for a in ADDRESSES]} for row in rows(4)]
    assert restrict_scores(elsewhere, SimulatedPriorConfig(district=True), CITY, 0) == elsewhere


def test_a_photo_without_a_prior_keeps_its_scores():
    nowhere = [row | {"lat": None, "lon": None} for row in rows(photos=4)]
    assert restrict_scores(nowhere, SimulatedPriorConfig(gps_m=50), CITY, 0) == nowhere
    foreign = [row | {"street": "Nowhere", "district": "Far"} for row in rows(photos=4)]
    assert restrict_scores(foreign, SimulatedPriorConfig(district=True, streets=2), CITY, 0) == foreign


def test_addresses_that_are_ruled_out_are_counted():
    left = restrict_scores(rows(photos=40), SimulatedPriorConfig(gps_m=100), CITY, seed=0)
    result = restriction_stats(left, CITY)
    truth = [CITY.addresses.index(Address(row["street"], row["district"])) for row in left]
    assert result["true address ruled out"] == sum(np.isneginf(array(left)[np.arange(40), truth]))
    assert result["addresses left"] == pytest.approx(np.isfinite(array(left)).sum(axis=1).mean())
    assert restriction_stats(rows(4), CITY) == {"addresses left": 12.0, "nothing ruled out": 4, "true address ruled out": 0}


def test_priors_that_a_city_cannot_have():
    with pytest.raises(InputError, match=r"a prior of 13 streets, but Toytown has 12: lower streets"):
        restrict_scores(rows(4), SimulatedPriorConfig(streets=13), CITY, 0)
    with pytest.raises(InputError, match=r"no street of the city has a shape, so no circle can choose: leave gps_m out"):
        restrict_scores(rows(4), SimulatedPriorConfig(gps_m=100), Gazetteer(ADDRESSES), 0)


def test_a_system_of_the_kind_prior_needs_one():
    row = {"name": "x", "kind": "prior", "of": "AddressCLIP"}
    with pytest.raises(InputError, match=r"'x' has no prior: set district, streets or gps_m"):
        validate({"compare": {"systems": [row]}}, "test")
    (system,) = validate({"compare": {"systems": [{**row, "district": True, "gps_m": 100}]}}, "test").compare.systems
    assert prior_words(system) == "the district and GPS within 100 m"
    priors = [{}, {"streets": 1}, {"district": True, "streets": 2, "gps_m": 2500}]
    assert [prior_words(SimulatedPriorConfig(**settings)) for settings in priors] == [
        "", "1 street", "the district and 2 streets and GPS within 2500 m"
    ]  # fmt: skip


def test_fixes_are_off_alike_in_all_directions_and_within_the_radius_in_95_of_100():
    """At 60 degrees north, in metres on the ellipsoid."""
    prior, places = SimulatedPriorConfig(gps_m=100), [{"id": str(i), "lat": north.LAT, "lon": north.LON} for i in range(3000)]
    fixes = [simulated_prior(place, prior, CITY, seed=0).circle for place in places]
    assert {fix.radius_m for fix in fixes} == {100}
    middle = (north.LAT, north.LON)
    away = np.array([north.metres(middle, (fix.lat, fix.lon)) for fix in fixes])
    assert np.mean(away <= 100) == pytest.approx(0.95, abs=0.01)
    assert len(set(away)) == 3000
    for along in ([(fix.lat, north.LON) for fix in fixes], [(north.LAT, fix.lon) for fix in fixes]):
        assert np.sqrt(np.mean([north.metres(middle, place) ** 2 for place in along])) == pytest.approx(40.9, rel=0.05)
    assert np.mean([(fix.lat, fix.lon) for fix in fixes], axis=0) == pytest.approx(middle, abs=1e-4)


def test_a_draw_depends_on_the_photo_and_the_seed_alone():
    given_rows = rows(photos=24)
    for prior in (
        SimulatedPriorConfig(streets=3),
        SimulatedPriorConfig(gps_m=300),
        SimulatedPriorConfig(district=True, streets=6, gps_m=2000),
    ):
        together = restrict_scores(given_rows, prior, CITY, seed=1)
        assert restrict_scores(given_rows[::-1], prior, CITY, seed=1)[::-1] == together
        assert [restrict_scores([row], prior, CITY, seed=1)[0] for row in given_rows] == together
        assert restrict_scores(given_rows, prior, CITY, seed=2) != together
    same_place = [row | {"id": str(i)} for i, row in enumerate(given_rows[:1] * 12)]
    for prior in (SimulatedPriorConfig(streets=3), SimulatedPriorConfig(gps_m=400)):
        assert len({str(row["scores"]) for row in restrict_scores(same_place, prior, CITY, seed=1)}) > 1


def test_all_questions_are_answered_from_the_scores():
    inputs = rows(photos=8)
    rng = random.Random(0)
    photos = [row | {"rounds": evaluation_rounds(Address(row["street"], row["district"]), CITY, rng)} for row in inputs]
    between = [photo for one in photos for photo in ({**one, "id": "another", "rounds": []}, one)]
    answers = list(likelihood.answers_from_scores(inputs, between, CITY))
    assert len(answers) == 8 * 9
    for row in inputs:
        best = CITY.addresses[int(np.argmax(row["scores"]))]
        of = [answer for answer in answers if answer["id"] == row["id"]]
        names = {"street": best.street, "district": best.district, "address": best.text()}
        assert all(a["answer"] == names[a["level"]] for a in of if a["kind"] == "generation")
        for a in of:
            if a["kind"] == "judgment":
                assert a["answer"] == ("Yes" if a["options"][0] == names[a["level"]] else "No")
            if a["kind"] == "choice":
                assert a["answer"] == names[a["level"]] or names[a["level"]] not in a["options"]


def test_each_photo_has_its_own_scores():
    """Photos of a colour each, a few at a time; a model that sees the colour."""

    def encoded(red):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (red, 0, 0)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    def scores_of(images):
        sizes.append(len(images))
        return np.array([[image.getpixel((0, 0))[0], -1.0] for image in images])

    sizes = []
    photos = [{**row, "image": encoded(40 * i), "rounds": []} for i, row in enumerate(rows(photos=5))]
    result = [row for batch in likelihood.score_photos(scores_of, photos, 2) for row in batch]
    assert sizes == [2, 2, 1]
    assert result == [{**row, "scores": [40.0 * i, -1.0]} for i, row in enumerate(rows(photos=5))]
