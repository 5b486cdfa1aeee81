"""Addresses of places: the map's rules, votes, the geocoder, what doesn't fit"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm import InputError
from addressvlm.config.city import CityConfig, GeocoderConfig, PartitionConfig
from addressvlm.dataset import external_geocoder
from addressvlm.dataset.geocoding import Place, annotate_coordinates, assign_addresses, neighbour_vote, with_sub_streets
from addressvlm.dataset.photos import Photo
from addressvlm.dataset.streets import StreetMap
from tests.dataset.test_external_geocoder import road, serving
from tests.support.http_server import Server

DEGREE_M = 111_195.0  # of latitude at the equator, about
EAST, NORTH = 30.0, 0.0  # degrees; the town is far enough from 0, 0 for a swap to show


def degrees(points: Any) -> Any:
    """Metres from the middle of the town -> lon, lat."""
    return np.asarray(points, dtype=float) / DEGREE_M + [EAST, NORTH]


def square(west: float, east: float) -> shapely.Polygon:
    return shapely.Polygon(degrees([(west, -400), (east, -400), (east, 400), (west, 400)]))


@pytest.fixture(scope="module")
def town() -> StreetMap:
    """Mill Street runs east at y = 0, High Street north at x = 100, Low Street north at x = -100; two districts."""
    lines = {
        "Mill Street": [(-300, 0), (300, 0)],
        "High Street": [(100, -300), (100, 300)],
        "Low Street": [(-100, -300), (-100, 300)],
    }
    shapes = [shapely.LineString(degrees(line)) for line in lines.values()]
    districts = [("West", square(-400, 0)), ("East", square(0, 400))]
    return StreetMap(list(lines), shapes, districts, variants={"High Street": ["Hohe Straße"]})


CITY = CityConfig(manifest="m.csv", streets="s.geojson", districts="d.geojson")


def photo(row: int, x: float, y: float, **fields: Any) -> Photo:
    lon, lat = degrees((x, y))
    return Photo(row=row, id=f"{row}", file=f"{row}.jpg", **{"place": f"p{row}", "lat": lat, "lon": lon, **fields})


def placed(photos: list[Photo], town: StreetMap, **city: Any) -> tuple[list[Place], list[str]]:
    """The places in order and the reasons of the rejects."""
    places, _, rejects = assign_addresses(photos, town, CITY.model_copy(update=city))
    return list(places.values()), [r["reason"] for r in rejects]


# the map


def test_second_street_and_margin(town: StreetMap) -> None:
    (clear, corner), _ = placed([photo(1, 50, 4), photo(2, 105, 9)], town)
    assert (clear.address.text(), clear.source) == ("Mill Street, East", "map")
    assert (clear.distance_m, clear.margin_m) == (pytest.approx(4, abs=0.1), pytest.approx(46, abs=0.5))
    assert (clear.second_street, clear.ambiguous) == ("High Street", False)
    assert (corner.address.street, corner.second_street, corner.ambiguous) == ("High Street", "Mill Street", True)
    assert corner.margin_m == pytest.approx(4, abs=0.1)


def test_the_other_street_may_be_nearer_than_the_given_one(town: StreetMap) -> None:
    given_near, given_far = placed([photo(1, 105, 9, street="Mill Street"), photo(2, 0, 3, street="Low Street")], town)[0]
    assert (given_near.source, given_near.second_street) == ("manifest", "High Street")
    assert given_near.margin_m == pytest.approx(-4, abs=0.1)
    assert (given_far.second_street, given_far.margin_m) == ("Mill Street", pytest.approx(-97, abs=0.5))


def test_a_street_that_is_not_near_on_the_map(town: StreetMap) -> None:
    far = placed([photo(1, 105, 9, street="Far Road")], town)[0][0]
    assert (far.address.street, far.distance_m, far.margin_m, far.second_street) == ("Far Road", None, None, "High Street")


def at_metres(town: StreetMap, row: int, x: float, y: float, **fields: Any) -> Photo:
    """A photo at metres of the map's own plane."""
    lat, lon = town.to_degrees([x], [y])
    return replace(photo(row, 0, 0, **fields), lat=float(lat[0]), lon=float(lon[0]))


def test_limits_are_inclusive(town: StreetMap) -> None:
    """A street at exactly the limit counts, a cm further it does not; so does an ambiguous one."""
    high = float(shapely.bounds(town.lines[list(town.names).index("High Street")])[0])  # its x
    spots = [(50, 40.0), (50, 40.01), (high - 15, 2), (high - 15.01, 2)]
    photos = [at_metres(town, row, x, y) for row, (x, y) in enumerate(spots, 1)]
    places, reasons = placed(photos, town)
    assert [p.id for p in places] == ["p1", "p3", "p4"]
    assert [r.partition(":")[0] for r in reasons] == ["no street near"]
    assert [(p.distance_m, p.ambiguous) for p in places] == [(40.0, False), (2.0, True), (2.0, False)]
    nearer, _ = placed(photos, town, max_distance_m=39.0, ambiguous_m=16.0)
    assert [(p.id, p.ambiguous) for p in nearer] == [("p3", True), ("p4", True)]
    corner = [at_metres(town, row, high + away, 250, street="Mill Street") for row, away in ((1, 199.999), (2, 200.01))]
    assert [p.second_street for p in placed(corner, town)[0]] == ["High Street", None]


def test_most_photos_of_a_place_decide_on_its_address(town: StreetMap) -> None:
    names = ["Mill Street", "High Street", "Mill Street", ""]
    group = [photo(row, 50, 4, place="here", street=name, district="East") for row, name in enumerate(names, 1)]
    (place,), reasons = placed(group, town)
    assert place.address.street == "Mill Street"
    assert reasons == ["place with two addresses: most photos of 'here' have the street Mill Street"]
    (tied,), _ = placed(group[1:3], town)
    assert tied.address.street == "High Street"  # the first on a tie
    labelled = [replace(group[0], district="West"), *group[2:]]
    (place,), reasons = placed(labelled, town)
    assert place.address.district == "East"
    assert reasons == ["place with two addresses: most photos of 'here' have the district East"]


def test_a_place_is_in_the_middle_of_its_photos(town: StreetMap) -> None:
    group = [photo(1, 50, 4, place="here"), photo(2, 56, 10, place="here"), photo(3, 50, 4, place="here")]
    (place,), _ = placed(group, town)
    assert (place.lon, place.lat) == pytest.approx(tuple(degrees((52, 6))))
    assert (place.x, place.y) == pytest.approx([float(v[0]) for v in town.to_metres([place.lat], [place.lon])])


# neighbours


def drive(*points: tuple[float, float]) -> list[Photo]:
    return [photo(row, x, y) for row, (x, y) in enumerate(points, 1)]


PASSING = [(70, 3), (80, 3), (90, 3), (101, 4), (110, 3), (120, 3), (130, 3)]  # along Mill Street, over High Street


def test_a_drive_that_goes_straight_on_keeps_its_street(town: StreetMap) -> None:
    alone, _ = placed(drive(*PASSING), town)
    assert [p.address.street for p in alone] == ["Mill Street"] * 3 + ["High Street"] + ["Mill Street"] * 3
    voted, _ = placed(drive(*PASSING), town, neighbour_vote_radius_m=35)
    assert {p.address.street for p in voted} == {"Mill Street"}
    assert (voted[3].second_street, voted[3].ambiguous) == ("High Street", True)
    assert voted[3].margin_m == pytest.approx(-3, abs=0.1)


def test_a_drive_that_turns_keeps_its_corner(town: StreetMap) -> None:
    turning = [(70, 3), (80, 3), (90, 3), (101, 4), (101, 20), (101, 30), (101, 40)]
    assert placed(drive(*turning), town, neighbour_vote_radius_m=35)[0][3].address.street == "High Street"


def test_neighbours_elsewhere_in_the_table_have_no_vote(town: StreetMap) -> None:
    far = [(-250.0, 3.0)]
    mixed = [*PASSING[:3], *far, PASSING[3], *far, *PASSING[4:]]
    assert placed(drive(*mixed), town, neighbour_vote_radius_m=35)[0][4].address.street == "High Street"


def test_a_place_that_is_clearly_on_a_street_is_not_voted_on(town: StreetMap) -> None:
    aside = [*PASSING[:3], (100, 20), *PASSING[4:]]
    assert placed(drive(*aside), town, neighbour_vote_radius_m=35)[0][3].address.street == "High Street"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(-1, 3), st.integers(-1, 3)), max_size=30), st.integers(0, 40))
def test_votes_choose_between_the_nearest_street_and_the_alternative(rows: list[tuple[int, int, int]], radius_m: int) -> None:
    x, nearest, alternative = (np.array([r[i] for r in rows], dtype=d) for i, d in enumerate((float, np.int32, np.int32)))
    voted = neighbour_vote(x, 0 * x, nearest, alternative, radius_m)
    assert ((voted == nearest) | ((voted == alternative) & (alternative >= 0))).all()
    for i, (first, other) in enumerate(zip(nearest, alternative, strict=True)):
        sides = []
        for side in (range(i - 1, -1, -1), range(i + 1, len(x))):
            near = []
            for j in side:
                if abs(x[j] - x[i]) > radius_m:
                    break
                near.append(nearest[j])
            sides.append(near.count(other) - near.count(first))
        assert voted[i] == (other if other >= 0 and min(sides) >= 0 and sum(sides) > 0 else first)


def test_no_more_than_64_neighbours_of_a_side_vote() -> None:
    """The place in the middle; the 65th voter of a side would turn the vote."""
    nearest = np.array([1, *[1] * 32, *[2] * 32, 1, *[2] * 64, 1], dtype=np.int32)
    alternative = np.full(len(nearest), -1, dtype=np.int32)
    alternative[65] = 2
    voted = neighbour_vote(np.zeros(len(nearest)), np.zeros(len(nearest)), nearest, alternative, 1.0)
    assert voted[65] == 2  # 32 against 32 before, 64 after
    nearest[32] = 2
    nearest[33] = 1
    assert neighbour_vote(np.zeros(len(nearest)), np.zeros(len(nearest)), nearest, alternative, 1.0)[65] == 2
    nearest[34] = 1
    assert neighbour_vote(np.zeros(len(nearest)), np.zeros(len(nearest)), nearest, alternative, 1.0)[65] == 1


# what doesn't fit


def test_swapped_columns_are_an_error(town: StreetMap) -> None:
    swapped = [replace(p, lat=p.lon, lon=p.lat) for p in drive(*PASSING)]
    with pytest.raises(
        InputError, match=r"latitude and longitude look swapped in m\.csv: .* s\.geojson .*swap the two columns"
    ):
        assign_addresses(swapped, town, CITY)


def test_photos_outside_the_map_are_rejects(town: StreetMap) -> None:
    photos = [*drive(*PASSING), photo(8, 5000, 0), replace(photo(9, 0, 0), lat=0.0, lon=0.0)]
    places, reasons = placed(photos, town)
    assert len(places) == 7
    assert [r.partition(":")[0] for r in reasons] == ["outside the map"] * 2
    assert reasons[1] == "outside the map: 0.00000, 0.00000 is not in -0.0036 to 0.0036, 29.9964 to 30.0036"


def test_outside_all_districts_and_far_from_streets(town: StreetMap) -> None:
    bare = StreetMap(town.street_names, [town.street_shapes([n])[n] for n in town.street_names], [("East", square(200, 400))])
    assert placed([photo(1, 50, 4), photo(2, 0, 60)], bare)[1] == [
        "outside all districts: 0.00004, 30.00045",
        "no street near: Mill Street is 60 m away, the limit is 40 m",
    ]


def test_other_cities_with_swapped_rows_are_not_a_swap(town: StreetMap) -> None:
    elsewhere = [photo(row, 90_000 + row, 0) for row in range(1, 6)]
    assert [r.partition(":")[0] for r in placed(elsewhere, town)[1]] == ["outside the map"] * 5


# an external geocoder


def geocoded(photos: list[Photo], town: StreetMap, server: Server, folder: Path, **config: Any) -> Any:
    geocoder = GeocoderConfig(**{"url": server.url, "share": 1.0, "per_second": 1000.0, "retries": 0, **config})
    return assign_addresses(photos, town, CITY.model_copy(update={"geocoder": geocoder}), cache_file=folder / "answers.sqlite")


def test_the_geocoder_names_the_street_in_the_spelling_of_the_map(town: StreetMap, tmp_path: Path) -> None:
    names = {photo(1, 50, 4).lat: "hohe strasse", photo(2, 50, 30).lat: "Mill St.", photo(3, 50, 60).lat: "New Road"}
    by_lat = {f"{lat:.6f}": name for lat, name in names.items()}
    photos = [photo(1, 50, 4), photo(2, 50, 30), photo(3, 50, 60), photo(4, 50, 5, street="Low Street")]
    with serving(lambda n, q: (200, {}, road(by_lat[q["lat"]]))) as server:
        places, _, rejects = geocoded(photos, town, server, tmp_path)
    assert rejects == []
    assert [p.address.text() for p in places.values()] == [
        "High Street, East",
        "Mill Street, East",
        "New Road, East",
        "Low Street, East",
    ]
    assert [p.source for p in places.values()] == ["nominatim", "nominatim", "nominatim", "manifest"]
    assert [p.second_street for p in places.values()] == ["Mill Street", "High Street", "High Street", "Mill Street"]


def test_neighbours_of_the_sample_say_so(town: StreetMap, tmp_path: Path) -> None:
    photos = drive(*((10.0 * i, 3.0) for i in range(8)))
    with serving(lambda n, q: (200, {}, road("Mill Street"))) as server:
        places, _, _ = geocoded(photos, town, server, tmp_path, share=0.25)
    assert sorted(p.source for p in places.values()) == ["neighbour"] * 6 + ["nominatim"] * 2
    assert {p.address.street for p in places.values()} == {"Mill Street"}


def test_a_city_without_maps_takes_the_geocoders_district(tmp_path: Path) -> None:
    photos = [photo(1, 0, 0), photo(2, 0, 3000)]
    nothing = {"error": "Unable to geocode"}
    here = f"{photos[0].lat:.6f}"
    with serving(lambda n, q: (200, {}, road("Mill Street") if q["lat"] == here else nothing)) as server:
        geocoder = GeocoderConfig(url=server.url, share=1.0, per_second=1000.0, cache=str(tmp_path / "a.sqlite"))
        city = CityConfig(manifest="m.csv", geocoder=geocoder)
        places, _, rejects = assign_addresses(photos, StreetMap.load(None, centre=(NORTH, EAST)), city)
    assert [p.address.text() for p in places.values()] == ["Mill Street, Oakland"]
    limit = f"{external_geocoder.MAX_FILL_M:g} m"
    assert [r["reason"] for r in rejects] == [f"no geocoded street: none for 0.02698, 30.00000, nor within {limit} of it"]


def test_the_geocoder_gets_the_settings(town: StreetMap, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Seed, language and the settings' own file of answers reach it; places with a street in the table are not requested."""
    calls: list[Any] = []

    def locate(ids: list[str], lat: Any, lon: Any, x: Any, y: Any, *rest: Any) -> Any:
        calls.append((ids, [*zip(lat, lon, strict=True)], [*zip(x, y, strict=True)], rest))
        return [external_geocoder.GeocoderAnswer("Mill Street") for _ in ids], ["nominatim"] * len(ids)

    monkeypatch.setattr(external_geocoder, "locate_by_geocoder", locate)
    photos = [photo(1, 50, 4), photo(2, 70, 4, street="Low Street"), photo(3, 90, 4)]
    geocoder = GeocoderConfig(share=0.5, cache=str(tmp_path / "own.sqlite"))
    city = CITY.model_copy(update={"geocoder": geocoder, "language": "de"})
    assign_addresses(photos, town, city, seed=5, cache_file=tmp_path / "other.sqlite")
    assign_addresses(
        photos, town, city.model_copy(update={"geocoder": GeocoderConfig()}), seed=6, cache_file=tmp_path / "other.sqlite"
    )
    (ids, at, metres, rest), (*_, other) = calls
    assert ids == ["p1", "p3"]
    assert at == [(photos[i].lat, photos[i].lon) for i in (0, 2)]
    assert metres == [tuple(float(v[0]) for v in town.to_metres([photos[i].lat], [photos[i].lon])) for i in (0, 2)]
    assert rest == (geocoder, tmp_path / "own.sqlite", 5, "de")
    assert other[1:] == (tmp_path / "other.sqlite", 6, "de")


def test_ties_of_the_geocoder_are_ambiguous(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(external_geocoder.API_KEY_VARIABLE, "k")
    route = {"types": ["route"]}
    results = [
        {"address_components": [{"long_name": name, **route}, {"long_name": "Oakland", "types": ["neighborhood"]}]}
        for name in ("Mill Street", "High Street")
    ]
    with serving(lambda n, q: (200, {}, {"status": "OK", "results": results})) as server:
        geocoder = GeocoderConfig(service="google", url=server.url, share=1.0, cache=str(tmp_path / "a.sqlite"))
        city = CityConfig(manifest="m.csv", geocoder=geocoder)
        places, _, _ = assign_addresses([photo(1, 0, 0)], StreetMap.load(None, centre=(NORTH, EAST)), city)
    (place,) = places.values()
    assert (place.address.street, place.second_street, place.ambiguous, place.margin_m) == (
        "Mill Street",
        "High Street",
        True,
        None,
    )


def test_a_geocoder_needs_a_file_for_its_answers(town: StreetMap) -> None:
    with pytest.raises(InputError, match=r"set city\.geocoder\.cache"):
        assign_addresses([photo(1, 0, 0)], town, CITY.model_copy(update={"geocoder": GeocoderConfig()}))


# sub-streets


def test_places_get_sub_streets_and_keep_given_ones(town: StreetMap) -> None:
    row = [(-200 + 10.0 * i, 3.0) for i in range(6)] + [(20 * i + 0.0, 3.0) for i in range(-2, 3)]
    photos = drive(*row)
    photos[0] = replace(photos[0], sub_street="Mill Street by the mill")
    assert {p.sub_street for p in placed(photos[1:], town)[0]} == {None}
    places, addressed, _ = assign_addresses(photos, town, CITY.model_copy(update={"partition": PartitionConfig()}))
    assert [p.sub_street for p in places.values()] == [
        "Mill Street by the mill",
        *["Mill Street from Low Street on"] * 5,
        *["Mill Street between Low Street and High Street"] * 5,
    ]
    again, partition = with_sub_streets(places, addressed, town, PartitionConfig(), counted={p.place for p in photos[:6]})
    assert again["p1"].sub_street == "Mill Street by the mill"
    assert [(p.name, p.places) for p in partition.sub_streets] == [("Mill Street from High Street on", 5)]


# many rows


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-450, 450), st.integers(-450, 450)), min_size=1, max_size=60), st.sampled_from([15.0, 40.0])
)
def test_columns_equal_single_lookups(town: StreetMap, points: list[tuple[int, int]], limit: float) -> None:
    lon, lat = degrees(points).T
    columns = annotate_coordinates(lat, lon, town, limit)
    streets, districts = [*town.street_names, None], [*town.district_names, None]
    far = shapely.distance(shapely.points(*town.to_metres(lat, lon))[:, None], town.lines[None, :])
    beside = shapely.distance(shapely.points(*town.to_metres(lat, lon))[:, None], town.district_polygons[None, :]).round(3)
    for i, metres_to in enumerate(far):
        near = sorted((d, name) for d, name in zip(np.round(metres_to, 2), town.names, strict=True) if d <= limit)
        (metres, first), (second_metres, second) = (near + [(math.inf, None)] * 2)[:2]
        assert (streets[columns.street[i]], streets[columns.second[i]]) == (first, second)
        assert [columns.distance_m[i], columns.second_distance_m[i]] == pytest.approx([metres, second_metres], abs=0.02)
        nearest = {name for name, m in zip(districts, beside[i], strict=False) if m == beside[i].min() <= 50} or {None}
        assert districts[columns.district[i]] in nearest


def test_columns_are_computed_in_chunks(town: StreetMap, monkeypatch: pytest.MonkeyPatch) -> None:
    lon, lat = degrees([(x, 3.0) for x in range(-300, 300, 7)] * 2).T
    whole = annotate_coordinates(lat, lon, town, 40)
    monkeypatch.setattr("addressvlm.dataset.geocoding.CHUNK_ROWS", 10)
    parts = annotate_coordinates(lat, lon, town, 40)
    for name, column in vars(whole).items():
        np.testing.assert_array_equal(column, getattr(parts, name))
