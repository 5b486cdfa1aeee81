"""What is known of a photo beforehand, drawn from its truth, and what it leaves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from addressvlm import InputError
from addressvlm.config import validate
from addressvlm.config.compare import KnownConfig
from addressvlm.evaluation import decoding_comparison
from addressvlm.evaluation.decoding_comparison import prior_words, restrict_scores, ruled_out
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from tests.evaluation.test_decoding_comparison import ADDRESSES, CITY, accuracy, compare, rows
from tests.support import north

knowns = st.builds(
    KnownConfig,
    district=st.booleans(),
    streets=st.none() | st.integers(1, len(ADDRESSES)),
    gps_m=st.none() | st.floats(1, 5000),
)


def array(of):
    return np.array([row["scores"] for row in of])


def test_a_known_district_leaves_its_addresses_as_they_are():
    given_rows = rows(photos=24)
    left = restrict_scores(given_rows, KnownConfig(district=True), CITY, seed=0)
    for before, after in zip(given_rows, left, strict=True):
        inside = np.array([address.district == before["district"] for address in CITY.addresses])
        assert np.array_equal(np.array(after["scores"])[inside], np.array(before["scores"])[inside])
        assert np.isneginf(np.array(after["scores"])[~inside]).all()
        assert {**after, "scores": None} == {**before, "scores": None}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_true_street_is_among_those_known(count):
    for row in restrict_scores(rows(photos=48), KnownConfig(streets=count), CITY, seed=3):
        left = {CITY.addresses[i].street for i in np.flatnonzero(np.isfinite(row["scores"]))}
        assert len(left) == count
        assert row["street"] in left


def test_rows_and_the_table_of_modes_know_the_same():
    table = compare()
    for known in (KnownConfig(), KnownConfig(district=True), KnownConfig(streets=5), KnownConfig(gps_m=100)):
        best = array(restrict_scores(rows(), known, CITY, seed=0)).argmax(axis=1)
        right = [CITY.addresses[i] == Address(row["street"], row["district"]) for i, row in zip(best, rows(), strict=True)]
        assert np.mean(right) == pytest.approx(
            accuracy(table, f"+ {prior_words(known)}" if prior_words(known) else "likelihood")
        )


@given(knowns, st.integers(0, 5))
def test_nothing_gets_likelier_and_something_is_left(known, seed):
    before = rows(photos=12)
    after = restrict_scores(before, known, CITY, seed)
    kept = np.isfinite(array(after))
    assert kept.any(axis=1).all()
    assert np.array_equal(array(after)[kept], array(before)[kept])
    assert restrict_scores(after, known, CITY, seed) == after


def test_restrictions_hold_together_and_never_leave_nothing():
    both = restrict_scores(rows(photos=24), KnownConfig(district=True, streets=4), CITY, seed=0)
    one_by_one = restrict_scores(
        restrict_scores(rows(photos=24), KnownConfig(district=True), CITY, 0), KnownConfig(streets=4), CITY, 0
    )
    assert both == one_by_one
    elsewhere = [row | {"scores": [-np.inf if a.district == row["district"] else 0.0 for a in ADDRESSES]} for row in rows(4)]
    assert restrict_scores(elsewhere, KnownConfig(district=True), CITY, 0) == elsewhere


def test_a_photo_of_which_nothing_is_known_keeps_its_scores():
    nowhere = [row | {"lat": None, "lon": None} for row in rows(photos=4)]
    assert restrict_scores(nowhere, KnownConfig(gps_m=50), CITY, 0) == nowhere
    foreign = [row | {"street": "Nowhere", "district": "Far"} for row in rows(photos=4)]
    assert restrict_scores(foreign, KnownConfig(district=True, streets=2), CITY, 0) == foreign


def test_what_was_ruled_out_is_counted():
    left = restrict_scores(rows(photos=40), KnownConfig(gps_m=100), CITY, seed=0)
    found = ruled_out(left, CITY)
    truth = [CITY.addresses.index(Address(row["street"], row["district"])) for row in left]
    assert found["true address ruled out"] == sum(np.isneginf(array(left)[np.arange(40), truth]))
    assert found["addresses left"] == pytest.approx(np.isfinite(array(left)).sum(axis=1).mean())
    assert ruled_out(rows(4), CITY) == {"addresses left": 12.0, "nothing ruled out": 4, "true address ruled out": 0}


def test_what_can_not_be_known():
    with pytest.raises(InputError, match=r"a prior of 13 streets, but Toytown has 12: lower streets"):
        restrict_scores(rows(4), KnownConfig(streets=13), CITY, 0)
    with pytest.raises(InputError, match=r"no street of the city has a shape, so no circle can choose: leave gps_m out"):
        restrict_scores(rows(4), KnownConfig(gps_m=100), Gazetteer(ADDRESSES), 0)


def test_a_row_of_the_comparison_needs_one():
    row = {"name": "x", "kind": "prior", "of": "AddressCLIP"}
    with pytest.raises(InputError, match=r"'x' knows nothing beforehand: set district, streets or gps_m"):
        validate({"compare": {"systems": [row]}}, "test")
    (made,) = validate({"compare": {"systems": [{**row, "district": True, "gps_m": 100}]}}, "test").compare.systems
    assert prior_words(made) == "the district and GPS within 100 m"
    assert [prior_words(known) for known in (KnownConfig(), KnownConfig(streets=1), KnownConfig(district=True, streets=2, gps_m=2500))] == [
        "", "1 street", "the district and 2 streets and GPS within 2500 m"
    ]  # fmt: skip


def test_fixes_are_off_alike_in_all_directions_and_within_the_radius_in_95_of_100():
    """At 60 degrees north, in metres on the ellipsoid."""
    fixes = [decoding_comparison._fix({"id": str(i), "lat": north.LAT, "lon": north.LON}, 100, seed=0) for i in range(3000)]
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
    for known in (KnownConfig(streets=3), KnownConfig(gps_m=300), KnownConfig(district=True, streets=6, gps_m=2000)):
        together = restrict_scores(given_rows, known, CITY, seed=1)
        assert restrict_scores(given_rows[::-1], known, CITY, seed=1)[::-1] == together
        assert [restrict_scores([row], known, CITY, seed=1)[0] for row in given_rows] == together
        assert restrict_scores(given_rows, known, CITY, seed=2) != together
    same_place = [row | {"id": str(i)} for i, row in enumerate(given_rows[:1] * 12)]
    for known in (KnownConfig(streets=3), KnownConfig(gps_m=400)):
        assert len({str(row["scores"]) for row in restrict_scores(same_place, known, CITY, seed=1)}) > 1
