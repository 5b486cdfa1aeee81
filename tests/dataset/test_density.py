"""Density of the training data (the split itself is in test_places.py)"""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm.config.city import CityConfig, DensityConfig
from addressvlm.dataset.photos import Photo
from addressvlm.dataset.split import split_places, thin_views
from tests.dataset.test_split import scattered

SHARES = st.sampled_from([0.01, 0.125, 0.25, 0.5, 0.75, 1.0])


def thinned(share: float) -> CityConfig:
    return CityConfig(density=DensityConfig(places=share))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 150), st.integers(1, 15), SHARES, SHARES, st.integers(0, 3))
def test_fewer_training_places_are_some_of_the_more(
    scatter: int, number: int, addresses: int, share: float, other: float, seed: int
) -> None:
    places = scattered(scatter, number, addresses)
    address = {p.id: p.address for p in places}
    full = split_places(places, CityConfig(), seed)
    results = [split_places(places, thinned(s), seed) for s in sorted([share, other])]
    fewer, more, everything = ({p for p, part in r.part.items() if part == "train"} for r in (*results, full))
    assert fewer <= more <= everything
    assert {address[p] for p in fewer} == {address[p] for p in everything}
    wanted = round(min(share, other) * len(everything))
    assert wanted <= len(fewer) <= wanted + len({address[p] for p in everything})
    for result in results:
        held_out = {p: part for p, part in result.part.items() if part in ("val", "test")}
        assert held_out == {p: part for p, part in full.part.items() if part in ("val", "test")}
        assert set(result.reason) == {p for p, part in result.part.items() if part == "aside"}


def test_leak_distance_is_of_the_places_that_are_left() -> None:
    places = scattered(3, 150, 6)
    sparse = split_places(places, thinned(0.05), 0)
    at = {p.id: complex(p.x, p.y) for p in places}
    gaps = [
        abs(at[a] - at[b]) for a in at if sparse.part[a] == "train" for b in at if sparse.part[b] in ("val", "test")
    ]  # fmt: skip
    assert sparse.min_distance_m == pytest.approx(min(gaps))
    assert "thinned to 0.05 of the training places" in sparse.reason.values()


def views(number: int, of: dict[str, str]) -> list[Photo]:
    """`number` views of each place, the views of a panorama in one row."""
    photos = [Photo(row, f"{place}/{i}", f"{i}.jpg", place, 0, 0) for row, place in enumerate(of) for i in range(number)]
    random.Random(0).shuffle(photos)
    return photos


@given(st.integers(1, 24), SHARES, SHARES, st.integers(0, 3))
def test_fewer_views_are_some_of_the_more(number: int, share: float, other: float, seed: int) -> None:
    part = {"a": "train", "b": "train", "c": "val", "d": "test", "e": "aside"}
    photos = views(number, part)
    few, many = (thin_views(photos, part, s, seed) for s in sorted([share, other]))
    assert {p.id for p in few} <= {p.id for p in many}
    assert few == [p for p in photos if p in few]
    left = Counter(p.place for p in few)
    assert left["a"] == left["b"] == max(1, round(min(share, other) * number))
    assert left["c"] == left["d"] == left["e"] == number


def test_places_keep_different_views() -> None:
    part = {f"{i}": "train" for i in range(20)}
    kept = thin_views(views(8, part), part, 0.25, 0)
    assert len({p.file for p in kept}) > 4
    assert thin_views(views(8, part), part, 0.25, 1) != kept
