"""Streets, addresses of places, split"""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm import InputError
from addressvlm.config.city import CityConfig, DensityConfig, SplitShares
from addressvlm.dataset.geocoding import Place, assign_addresses
from addressvlm.dataset.photos import Photo
from addressvlm.dataset.split import split_places, thin_views
from addressvlm.dataset.streets import StreetMap
from addressvlm.gazetteer.gazetteer import Address

DEGREE_M = 111_195.0  # of latitude at the equator, about


def geojson(path: Path, kind: str, shapes: dict[str | None, Any]) -> Path:
    """Write shapes with coordinates in metres east and north of 0, 0."""

    def degrees(c: Any) -> Any:
        return [degrees(x) for x in c] if isinstance(c[0], (list, tuple)) else [v / DEGREE_M for v in c]

    features = [
        {"type": "Feature", "properties": {"name": n} if n else {}, "geometry": {"type": kind, "coordinates": degrees(c)}}
        for n, c in shapes.items()
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


@pytest.fixture
def town(tmp_path: Path) -> CityConfig:
    """Mill Street runs east at y = 0, High Street north at x = 100, a nameless lane at y = 20; two districts."""
    streets = {"Mill Street": [[-300, 0], [300, 0]], "High Street": [[100, -300], [100, 300]], None: [[-300, 20], [300, 20]]}
    west, east = ([[[a, -400], [b, -400], [b, 400], [a, 400], [a, -400]]] for a, b in ((-400, 0), (0, 400)))
    return CityConfig(
        manifest=str(tmp_path / "manifest.csv"),
        streets=str(geojson(tmp_path / "streets.geojson", "LineString", streets)),
        districts=str(geojson(tmp_path / "districts.geojson", "Polygon", {"West": west, "East": east})),
    )


def photo(row: int, x: float, y: float, **fields: Any) -> Photo:
    fields = {"place": f"p{row}"} | fields
    return Photo(row=row, id=f"{row}", file=f"{row}.jpg", lat=y / DEGREE_M, lon=x / DEGREE_M, **fields)


# streets


def test_nearest_streets_in_metres(town: CityConfig) -> None:
    streets = StreetMap.load(town.streets, town.districts)
    x, y = np.array([0.0, 95.0, 250.0, 0.0]), np.array([8.0, -30.0, 3.0, 250.0])
    street, metres, second, second_metres = streets.nearest(y / DEGREE_M, x / DEGREE_M, 120)
    assert street.tolist() == ["Mill Street", "High Street", "Mill Street", "High Street"]
    assert metres == pytest.approx([8, 5, 3, 100], rel=0.01)
    assert second.tolist() == ["High Street", "Mill Street", None, None]
    assert second_metres == pytest.approx([100, 30, math.inf, math.inf], rel=0.01)


def test_districts_edges_and_gaps(town: CityConfig) -> None:
    streets = StreetMap.load(town.streets, town.districts)
    x = np.array([-5.0, 5.0, 430.0, 600.0])
    assert streets.district(np.zeros(4), x / DEGREE_M) == ["West", "East", "East", None]


def test_metres_and_degrees_and_back(town: CityConfig) -> None:
    streets = StreetMap.load(town.streets, town.districts)
    x, y = streets.to_metres([0.001], [0.002])
    lat, lon = streets.to_degrees(x, y)
    assert (lat[0], lon[0]) == pytest.approx((0.001, 0.002))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"streets\.geojson can't be read .*set city\.streets"),
        ("{", "is not GeoJSON"),
        ('{"type": "Topology"}', "is not GeoJSON"),
        ('{"features": []}', "has no named street"),
        (
            '{"features": [{"properties": {"name": "A"}, "geometry": {"type": "LineString", "coordinates": [[0, 0]]}}]}',
            "not GeoJSON",
        ),
        (
            '{"features": [{"properties": {"name": "A"}, "geometry":'
            ' {"type": "LineString", "coordinates": [[0, 0], [500000, 9]]}}]}',
            "in degrees",
        ),
    ],
)
def test_files_without_streets_are_errors(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "streets.geojson"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        StreetMap.load(path)


# addresses of places


def test_addresses_from_the_map(town: CityConfig) -> None:
    photos = [photo(1, 0.5, 8), photo(2, 95, -30), photo(3, 108, 9), photo(4, -200, 90), photo(5, 460, 0)]
    places, addressed, rejects = assign_addresses(photos, StreetMap.load(town.streets, town.districts), town)
    assert [p.row for p in addressed] == [1, 2, 3]
    assert [places[p].address.text() for p in places] == ["Mill Street, East", "High Street, East", "High Street, East"]
    assert [places[p].cross_street for p in places] == ["High Street", "Mill Street", "Mill Street"]
    assert [places[p].ambiguous for p in places] == [False, False, True]
    assert [(r["row"], r["reason"]) for r in rejects] == [
        (4, "no street near: Mill Street is 90 m away, the limit is 40 m"),
        (5, "no street near: Mill Street is 160 m away, the limit is 40 m"),
    ]


def test_photos_of_a_place_share_its_address_and_strays_are_rejected(town: CityConfig) -> None:
    group = [photo(1, -10, 5), photo(2, -10, 7), photo(3, -10, 9), photo(4, 200, 9)]
    group = [replace(p, place="here") for p in group]
    places, addressed, rejects = assign_addresses(group, StreetMap.load(town.streets, town.districts), town)
    assert [p.row for p in addressed] == [1, 2, 3]
    assert places["here"].distance_m == pytest.approx(7, abs=0.1)
    assert [r["reason"] for r in rejects] == ["place torn apart: 210 m from the other photos of place 'here'"]


def test_columns_of_the_manifest_are_taken_as_they_are(town: CityConfig) -> None:
    photos = [photo(1, 0.5, 8, street="Far Road", district="Elsewhere"), photo(2, 0.5, 8, district="Elsewhere")]
    places, _, _ = assign_addresses(photos, StreetMap.load(town.streets, town.districts), town)
    assert [p.address.text() for p in places.values()] == ["Far Road, Elsewhere", "Mill Street, Elsewhere"]
    assert places["p1"].distance_m is None
    without_files = CityConfig(manifest="m.csv")
    places, _, rejects = assign_addresses(photos[:1], StreetMap.load(None), without_files)
    assert (places["p1"].address, rejects) == (Address("Far Road", "Elsewhere"), [])
    with pytest.raises(InputError, match=r"row 2 of m\.csv gives no street and city\.streets is not set"):
        assign_addresses(photos, StreetMap.load(None), without_files)


# split


def scattered(seed: int, number: int, addresses: int) -> list[Place]:
    rng = random.Random(seed)
    names = [Address(f"Street {i // 2}", f"District {i % 2}") for i in range(addresses)]
    return [
        Place(f"{i}", 0, 0, rng.uniform(0, 800), rng.uniform(0, 800), rng.choice(names), 1.0, None, False)
        for i in range(number)
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 150), st.integers(1, 20), st.sampled_from([0.0, 10.0, 25.0, 60.0]), st.integers(0, 5)
)
def test_split_keeps_its_promises(scatter: int, number: int, addresses: int, split_buffer_m: float, seed: int) -> None:
    places = scattered(scatter, number, addresses)
    city = CityConfig(split_buffer_m=split_buffer_m)
    result = split_places(places, city, seed)
    shuffled = list(places)
    random.Random(1).shuffle(shuffled)
    assert split_places(shuffled, city, seed) == result
    assert set(result.part) == {p.id for p in places}
    assert {p for p, part in result.part.items() if part == "aside"} == set(result.reason)
    train = [p for p in places if result.part[p.id] == "train"]
    held_out = [p for p in places if result.part[p.id] in ("val", "test")]
    assert {p.address for p in held_out} <= {p.address for p in train}
    gaps = [math.dist((a.x, a.y), (b.x, b.y)) for a in train for b in held_out]
    assert min(gaps, default=math.inf) >= split_buffer_m
    assert result.min_distance_m == (pytest.approx(min(gaps)) if gaps else None)
    val, test = ([p for p in held_out if result.part[p.id] == part] for part in ("val", "test"))
    assert all(math.dist((a.x, a.y), (b.x, b.y)) >= split_buffer_m for a in val for b in test)


def test_split_reaches_its_shares() -> None:
    result = split_places(scattered(0, 1000, 5), CityConfig(split_buffer_m=10), 0)
    assert abs(result.count("test") - 100) <= 10
    assert abs(result.count("val") - 200) <= 20
    assert result.count("train") > 550


def grid(*at: tuple[float, float]) -> list[Place]:
    return [Place(f"{i}", 0, 0, x, y, Address("Mill Street", "Town"), 1.0, None, False) for i, (x, y) in enumerate(at)]


@pytest.mark.parametrize(("apart", "aside"), [(24.99, True), (25.0, False)])
def test_the_buffer_puts_aside_what_is_nearer_and_no_more(apart: float, aside: bool) -> None:
    """Pairs of places far from each other: where one is a validation or test place, the other is aside or for training."""
    pairs = grid(*((1000.0 * (i // 2), apart * (i % 2)) for i in range(40)))
    city = CityConfig(split_buffer_m=25, split_block_m=20, split=SplitShares(train=0.8, val=0.0, test=0.2))
    result = split_places(pairs, city, 0)
    assert result.count("test") == 8
    partners = [{result.part[f"{2 * i}"], result.part[f"{2 * i + 1}"]} for i in range(20)]
    assert ({"train", "test"} in partners) is not aside
    assert (result.count("aside") > 0) is aside
    assert set(result.reason.values()) == ({"nearer than 25 m to a test place"} if aside else set())
    assert result.min_distance_m == pytest.approx(1000.0 if aside else 25.0, rel=1e-3)


def test_held_out_places_come_in_blocks() -> None:
    """Of the neighbours in a row of 10 m most share the part: the buffer costs a block's edge, not each place."""
    row = grid(*((10.0 * (i % 40), 10.0 * (i // 40)) for i in range(1600)))
    shares = []
    for side in (100.0, 10.0):
        part = split_places(row, CityConfig(split_buffer_m=0, split_block_m=side), 0).part
        held_out = [i for i in range(1600) if i % 40 < 39 and part[f"{i}"] == "test"]
        shares.append(sum(part[f"{i + 1}"] == "test" for i in held_out) / len(held_out))
    assert shares[0] > 0.75 > 0.4 > shares[1]


def test_other_seeds_give_other_splits() -> None:
    places = scattered(0, 200, 5)
    assert split_places(places, CityConfig(), 0).part != split_places(places, CityConfig(), 1).part


def test_short_streets_are_split_in_smaller_blocks() -> None:
    places = [Place(f"{s}-{i}", 0, 0, s * 1000, i * 12.0, Address(f"Street {s}", "Town"), 1.0, None, False)
              for s in range(6) for i in range(8)]  # fmt: skip
    result = split_places(places, CityConfig(split_buffer_m=10), 0)
    assert result.count("test") >= 3


def street_grid(seed: int, spacing: float = 20.0) -> list[Place]:
    """Eight streets each way with a place every so many metres, districts of a quarter each, as a city has them."""
    rng, places = random.Random(seed), []
    for street in range(16):
        start, end = rng.choice([0, 0, 110, 220]), rng.choice([770, 770, 660, 440])
        for along in np.arange(start, end, spacing):
            x, y = (along, 110.0 * street) if street < 8 else (110.0 * (street - 8), along)
            home = f"District {int(x > 385)}{int(y > 385)}"
            places.append(Place(f"{len(places):04d}", 0, 0, x, y, Address(f"Street {street}", home), 1.0, None, False))
    return places


def test_every_address_gives_its_share() -> None:
    """Without quotas whole addresses went to the test, and the rest of them had none: their counts correlated with -0.45."""
    correlations = []
    for seed in range(6):
        places = street_grid(seed)
        city = CityConfig(split_buffer_m=25, split=SplitShares(train=0.65, val=0.1, test=0.25))
        part = split_places(places, city, seed).part
        counts = {name: Counter(p.address for p in places if part[p.id] == name) for name in ("train", "test")}
        addresses = sorted({p.address for p in places}, key=str)
        large = [a for a, n in Counter(p.address for p in places).items() if n >= 8]
        assert sum(counts["test"][a] > 0 for a in large) > 0.8 * len(large)
        correlations.append(np.corrcoef([[counts[name][a] for a in addresses] for name in ("train", "test")])[0, 1])
        assert sum(counts["test"].values()) > 0.2 * len(places)
    assert np.mean(correlations) > 0.2


def test_blocks_of_the_table_stay_together() -> None:
    places = street_grid(0)
    photos = [Photo(i, p.id, f"{p.id}.jpg", p.id, 0, 0, block=f"{p.address.street}/{i // 4}") for i, p in enumerate(places)]
    part = split_places(places, CityConfig(split_buffer_m=0), 0, photos).part
    blocks: dict[str, set[str]] = {}
    for photo in photos:
        blocks.setdefault(photo.block, set()).add(part[photo.place])
    assert all(len(parts) == 1 for parts in blocks.values())
    assert 0.05 * len(places) < sum(p == "test" for p in part.values()) < 0.15 * len(places)


@pytest.mark.parametrize("side", [1.0, 4.0, 6.0])
def test_small_blocks_hold_places_out_too(side: float) -> None:
    result = split_places(scattered(0, 200, 5), CityConfig(split_block_m=side, split_buffer_m=0), 0)
    assert result.count("test") == pytest.approx(20, abs=4)


def test_the_papers_split_is_of_single_places_without_a_buffer() -> None:
    places = street_grid(1)
    result = split_places(places, CityConfig(split_method="random", split_buffer_m=25), 0)
    assert result.count("aside") == 0
    assert [result.count(part) / len(places) for part in ("train", "val", "test")] == pytest.approx([0.7, 0.2, 0.1], abs=0.01)
    trained = {p.address for p in places if result.part[p.id] == "train"}
    assert trained == {p.address for p in places}


def test_the_split_of_the_table_is_taken_as_it_is() -> None:
    places = scattered(0, 6, 2)
    words = ["Train", "training", "val", "TEST", "", "later"]
    photos = [Photo(i, f"{i}", f"{i}.jpg", f"{i}", 0, 0, split=word) for i, word in enumerate(words)]
    photos.append(Photo(6, "6", "6.jpg", "0", 0, 0, split="test"))
    result = split_places(places, CityConfig(split_method="table"), 0, photos)
    assert result.part == {"0": "aside", "1": "train", "2": "val", "3": "test", "4": "aside", "5": "aside"}
    assert result.reason["0"] == "the table's split is 'Train' and 'test'"
    assert result.reason["5"] == "the table's split is 'later'"
    with pytest.raises(InputError, match="no column split"):
        split_places(places, CityConfig(split_method="table"), 0)


def test_every_word_for_a_split_of_the_table_is_known() -> None:
    words = ["train", "Training", "val", "valid", "VALIDATION", "dev", "test", "Testing"]
    photos = [Photo(i, f"{i}", f"{i}.jpg", f"{i}", 0, 0, split=word) for i, word in enumerate(words)]
    result = split_places(scattered(0, 8, 2), CityConfig(split_method="table"), 0, photos)
    assert [result.part[f"{i}"] for i in range(8)] == ["train"] * 2 + ["val"] * 4 + ["test"] * 2


@pytest.mark.parametrize("seed", range(4))
def test_an_address_gives_no_more_than_twice_its_share_at_once(seed: int) -> None:
    """Forty places on two spots: a block of either is half of all."""
    places = grid(*((1000.0 * (i // 20) + i % 20, 0.0) for i in range(40)))
    city = CityConfig(split_buffer_m=0, split_block_m=60, split=SplitShares(train=0.9, val=0.0, test=0.1))
    assert 1 <= split_places(places, city, seed).count("test") < 8


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_remainder_decides_who_gives_a_place(seed: int) -> None:
    """Of nine places 0.9 and of a single one 0.1, which could not be spared."""
    places = grid(*((1000.0 * i, 0.0) for i in range(10)))
    places[4] = replace(places[4], address=Address("Oak Row", "Town"))
    city = CityConfig(split_buffer_m=0, split=SplitShares(train=0.9, val=0.0, test=0.1))
    result = split_places(places, city, seed)
    assert (result.count("test"), result.part["4"]) == (1, "train")


def test_held_out_blocks_are_all_over_the_city() -> None:
    places = scattered(1, 600, 1)
    part = split_places(places, CityConfig(split_buffer_m=0, split_block_m=40), 0).part
    for name in ("val", "test"):
        quarters = Counter((p.x > 400, p.y > 400) for p in places if part[p.id] == name)
        assert len(quarters) == 4
        assert min(quarters.values()) > 0.1 * quarters.total()


@pytest.mark.parametrize(("share", "left"), [(0.3, 45), (0.5, 75), (0.01, 15), (1.0, 150)])
def test_as_many_blocks_are_left_as_the_share_says(share: float, left: int) -> None:
    """Of ten blocks of the table with fifteen places each; at least one."""
    places = scattered(3, 150, 1)
    photos = [Photo(0, p.id, "a.jpg", p.id, 0, 0, split="train", block=f"{i % 10}") for i, p in enumerate(places)]
    city = CityConfig(split_method="table", density=DensityConfig(blocks=share))
    result = split_places(places, city, 0, photos)
    kept = {photo.block for photo in photos if result.part[photo.place] == "train"}
    assert (result.count("train"), len(kept)) == (left, left // 15)
    assert set(result.reason.values()) == ({f"thinned to {share:g} of the training blocks"} if share < 1 else set())


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5])
def test_thinned_blocks_have_no_photo_and_their_addresses_stay_known(share: float) -> None:
    places = street_grid(2)
    full = split_places(places, CityConfig(), 0)
    results = [split_places(places, CityConfig(density=DensityConfig(blocks=part)), 0) for part in (share, 2 * share)]
    fewer, more, everything = ({p for p, part in r.part.items() if part == "train"} for r in (*results, full))
    assert fewer < more <= everything
    address = {p.id: p.address for p in places}
    for result, left in zip(results, (fewer, more), strict=True):
        assert set(result.map_only) == {address[p] for p in everything} - {address[p] for p in left}
    assert full.map_only == ()


# density of the training data


SHARES = st.sampled_from([0.01, 0.125, 0.25, 0.5, 0.75, 1.0])


def thinned(share: float) -> CityConfig:
    return CityConfig(density=DensityConfig(places=share))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 150), st.integers(1, 15), SHARES, SHARES, st.integers(0, 3))
def test_fewer_training_places_are_a_subset_of_more(
    scatter: int, number: int, addresses: int, share: float, other: float, seed: int
) -> None:
    places = scattered(scatter, number, addresses)
    address = {p.id: p.address for p in places}
    full = split_places(places, CityConfig(), seed)
    results = [split_places(places, thinned(s), seed) for s in sorted([share, other])]
    fewer, more, everything = ({p for p, part in r.part.items() if part == "train"} for r in (*results, full))
    assert fewer <= more <= everything
    assert {address[p] for p in fewer} == {address[p] for p in everything}
    target = round(min(share, other) * len(everything))
    assert target <= len(fewer) <= target + len({address[p] for p in everything})
    for result in results:
        held_out = {p: part for p, part in result.part.items() if part in ("val", "test")}
        assert held_out == {p: part for p, part in full.part.items() if part in ("val", "test")}
        assert set(result.reason) == {p for p, part in result.part.items() if part == "aside"}


@pytest.mark.parametrize("density", [DensityConfig(places=0.3), DensityConfig(blocks=0.3)])
def test_what_is_thinned_is_drawn_by_the_seed(density: DensityConfig) -> None:
    places = scattered(3, 150, 1)
    photos = [Photo(0, p.id, "a.jpg", p.id, 0, 0, split="train") for p in places]
    city = CityConfig(split_method="table", density=density)  # nothing else is drawn
    kept = [
        frozenset(p for p, part in split_places(places, city, seed, photos).part.items() if part == "train")
        for seed in (0, 1, 2, 0)
    ]
    assert kept[0] == kept[3]
    assert len(set(kept)) == 3
    assert density.places == 1 or {len(one) for one in kept} == {45}


def test_leak_distance_is_of_the_places_that_remain() -> None:
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
def test_fewer_views_are_a_subset_of_more(number: int, share: float, other: float, seed: int) -> None:
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
    assert {p.id for p in thin_views(views(8, part)[::-1], part, 0.25, 0)} == {p.id for p in kept}  # in whatever order
    assert thin_views(views(8, part), part, 0.25, 1) != kept
