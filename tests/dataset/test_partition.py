"""Sub-streets of a street map"""

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm.config.city import PartitionConfig
from addressvlm.dataset.partition import Crossings, StreetAxis, StreetPartition
from addressvlm.dataset.streets import StreetMap

DEGREE_M = 111_195.0  # of latitude at the equator, about
Line = list[tuple[float, float]]


def town(lines: list[tuple[str, Line]]) -> StreetMap:
    """Lines in metres east and north of 0, 0."""
    return StreetMap([name for name, _ in lines], [shapely.LineString(np.array(line) / DEGREE_M) for _, line in lines])


def along(streets: StreetMap, points: Line) -> tuple[np.ndarray, np.ndarray]:
    """Points in metres east and north of 0, 0 on the plane of the map."""
    x, y = np.array(points).T
    return streets.to_metres(y / DEGREE_M, x / DEGREE_M)


def divided(
    lines: list[tuple[str, Line]], points: Line, street: str = "Mill Street", counts: list[bool] | None = None, **config: Any
) -> StreetPartition:
    streets = town(lines)
    return StreetPartition(streets, PartitionConfig(**config), [street] * len(points), *along(streets, points), counts)


def across(name: str, x: float, y: float = 0.0) -> tuple[str, Line]:
    return name, [(x, y - 100), (x, y), (x, y + 100)]


MILL = ("Mill Street", [(0.0, 0.0), (600.0, 0.0)])
CROSSED = [MILL, across("A Road", 0), across("B Road", 200), across("C Road", 220), across("D Road", 400)]


def places(*xs: float, each: int = 5, y: float = 3.0) -> Line:
    return [(x + i, y) for x in xs for i in range(each)]


def test_streets_are_cut_at_crossings_and_called_after_them() -> None:
    partition = divided(CROSSED, places(50, 300, 500))
    assert [p.name for p in partition.sub_streets] == [
        "Mill Street between A Road and B Road",
        "Mill Street between B Road and D Road",  # C Road is 20 m after B Road
        "Mill Street from D Road on",
    ]
    assert partition.names == [p.name for p in partition.sub_streets for _ in range(5)]
    assert [p.places for p in partition.sub_streets] == [5, 5, 5]
    assert [p.start_m for p in partition.sub_streets] == pytest.approx([0, 200, 400], abs=2)
    assert [p.end_m for p in partition.sub_streets] == pytest.approx([200, 400, 600], abs=2)


def test_sub_streets_with_few_places_join_the_emptier_neighbour() -> None:
    partition = divided(CROSSED, places(50, 300, 500)[:-1] + places(60))
    assert Counter(partition.names) == {"Mill Street between A Road and B Road": 10, "Mill Street from B Road on": 9}
    alone = divided(CROSSED, places(300, each=2))
    assert [(p.name, p.places) for p in alone.sub_streets] == [("Mill Street between B Road and D Road", 2)]


def test_only_places_that_count_are_counted() -> None:
    points = places(50, 300, 500)
    counts = [True] * 10 + [False] * 5
    partition = divided(CROSSED, points, counts=counts)
    assert [(p.name, p.places) for p in partition.sub_streets] == [
        ("Mill Street between A Road and B Road", 5),
        ("Mill Street from B Road on", 5),
    ]
    assert partition.names[-1] == "Mill Street from B Road on"


def test_ends_beyond_the_one_crossing_are_told_apart_by_side() -> None:
    partition = divided([MILL, across("B Road", 300)], places(100, 500))
    assert [p.name for p in partition.sub_streets] == ["Mill Street west of B Road", "Mill Street east of B Road"]
    assert {p.bounds for p in partition.sub_streets} == {("B Road",)}


def test_ends_of_a_street_to_the_north_are_told_apart_by_side() -> None:
    north = ("Mill Street", [(0.0, 0.0), (0.0, 600.0)])
    crossing = ("B Road", [(-100.0, 300.0), (0.0, 300.0), (100.0, 300.0)])
    partition = divided([north, crossing], [(y, x) for x, y in places(100, 500)])
    assert [p.name for p in partition.sub_streets] == ["Mill Street south of B Road", "Mill Street north of B Road"]


def test_of_several_streets_at_a_corner_the_longest_names_it() -> None:
    lane, road = ("A Lane", [(300.0, 0.0), (300.0, 20.0)]), ("B Road", [(300.0, 0.0), (300.0, -200.0)])
    partition = divided([MILL, lane, road], places(100, 500))
    assert [p.name for p in partition.sub_streets] == ["Mill Street west of B Road", "Mill Street east of B Road"]


@pytest.mark.parametrize(("gap", "cuts"), [(49.0, 2), (51.0, 1)])
def test_crossings_nearer_than_the_gap_make_one_cut(gap: float, cuts: int) -> None:
    partition = divided([MILL, across("B Road", 300), across("C Road", 350)], places(100, 310, 500), gap_m=gap)
    assert len(partition.sub_streets) == cuts + 1


@pytest.mark.parametrize(("least", "parts"), [(5, 3), (6, 1)])
def test_a_part_with_just_enough_places_stays(least: int, parts: int) -> None:
    assert len(divided(CROSSED, places(50, 300, 500), min_places=least).sub_streets) == parts


def test_lengths_far_north_are_metres_of_the_globe() -> None:
    globe = pyproj.Geod(ellps="WGS84")
    at = {x: globe.fwd(25, 60, 90, x)[:2] for x in (0, 200, 400, 600)}
    lines = [shapely.LineString([at[x] for x in (0, 200, 400, 600)])]
    lines += [shapely.LineString([globe.fwd(*at[x], 180, 100)[:2], at[x], globe.fwd(*at[x], 0, 100)[:2]]) for x in (200, 400)]
    streets = StreetMap(["Mill Street", "B Road", "D Road"], lines)
    lon, lat = np.array([globe.fwd(25, 60, 90, x + i)[:2] for x in (50, 300, 500) for i in range(5)]).T
    partition = StreetPartition(streets, PartitionConfig(), ["Mill Street"] * 15, *streets.to_metres(lat, lon))
    assert [(round(p.start_m), round(p.end_m)) for p in partition.sub_streets] == [(0, 200), (200, 400), (400, 600)]
    shape = partition.shapes()["Mill Street between B Road and D Road"]
    assert globe.geometry_length(shape) == pytest.approx(200, abs=0.5)


def test_both_carriageways_are_one_street() -> None:
    lines = [("Mill Street", [(0, 0), (600, 0), (620, 10), (600, 20), (0, 20)]), across("B Road", 300), across("C Road", 450)]
    partition = divided(lines, places(100, 350, 500) + places(100, 350, 500, y=17))
    assert [(p.name, p.places) for p in partition.sub_streets] == [
        ("Mill Street from B Road on", 10),
        ("Mill Street between B Road and C Road", 10),
        ("Mill Street from C Road on", 10),
    ]


def test_pieces_far_apart_are_not_one_sub_street() -> None:
    far = ("Mill Street", [(2000.0, 0.0), (2300.0, 0.0)])
    partition = divided([MILL, across("A Road", 600), far, across("Z Road", 2000)], places(100, 2200))
    assert [p.name for p in partition.sub_streets] == ["Mill Street from A Road on", "Mill Street from Z Road on"]


def test_bridges_are_no_crossings_where_the_map_has_nodes() -> None:
    nodes = ("Mill Street", [(0.0, 0.0), (200.0, 0.0), (400.0, 0.0), (600.0, 0.0)])
    bridge = ("Sky Way", [(300.0, -100.0), (300.0, 100.0)])
    lines = [nodes, across("B Road", 200), bridge, across("D Road", 400)]
    streets = town(lines)
    axis = StreetAxis([line for name, line in zip(streets.names, streets.lines, strict=True) if name == "Mill Street"])
    assert [c.name for c in Crossings(streets).on_street("Mill Street", axis)] == ["B Road", "D Road"]
    drawn = town([MILL, ("Sky Way", bridge[1])])
    axis = StreetAxis([drawn.lines[0]])
    assert [c.name for c in Crossings(drawn).on_street("Mill Street", axis)] == ["Sky Way"]


def test_streets_without_lines_or_crossings_stay_whole() -> None:
    partition = divided([MILL], places(50, 300))
    assert set(partition.names) == {"Mill Street"}
    elsewhere = divided([MILL], places(50), street="Far Road")
    assert (set(elsewhere.names), elsewhere.shapes()) == ({"Far Road"}, {})


def test_shapes_are_in_degrees() -> None:
    shape = divided(CROSSED, places(50, 300, 500)).shapes()["Mill Street between B Road and D Road"]
    assert np.array(shape.bounds) * DEGREE_M == pytest.approx([200, 0, 400, 0], abs=2)


# any network

NAMES = ["Mill Street", "A Road", "B Road", "C Road", "D Road"]


def network(seed: int, lines: int) -> list[tuple[str, Line]]:
    """Crooked lines of a few names, on a coarse grid so that they meet, overlap, fork and close."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(lines):
        x, y = rng.randrange(0, 12) * 40.0, rng.randrange(0, 12) * 40.0
        line = [(x, y)]
        for _ in range(rng.randrange(1, 6)):
            dx, dy = rng.choice([(1, 0), (0, 1), (-1, 0), (0, -1), (1, 1)])
            length = rng.choice([20.0, 40.0, 120.0])
            x, y = x + dx * length, y + dy * length
            line.append((x, y))
        drawn.append((rng.choice(NAMES), line))
    return drawn


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 60), st.sampled_from([0.0, 30.0, 50.0]), st.integers(1, 6))
def test_partition_keeps_its_promises(seed: int, lines: int, number: int, gap: float, least: int) -> None:
    drawn = network(seed, lines)
    rng = random.Random(seed + 1)
    streets = town(drawn)
    which = [rng.randrange(len(drawn)) for _ in range(number)]
    points = shapely.line_interpolate_point(streets.lines[which], [rng.random() for _ in which], normalized=True)
    x, y = (shapely.get_coordinates(points) + [[rng.gauss(0, 4), rng.gauss(0, 4)] for _ in which]).T
    names = streets.names[which].tolist()
    config = PartitionConfig(gap_m=gap, min_places=least)
    partition = StreetPartition(streets, config, names, x, y)

    by_name = {p.name: p for p in partition.sub_streets}
    assert len(by_name) == len(partition.sub_streets)
    assert [by_name[n].street for n in partition.names] == names
    assert Counter(partition.names) == {p.name: p.places for p in partition.sub_streets}
    meets = {
        (a, b)
        for a, one in zip(streets.names, streets.lines, strict=True)
        for b, other in zip(streets.names, streets.lines, strict=True)
        if one.intersects(other)
    }
    for street in set(names):
        parts = [p for p in partition.sub_streets if p.street == street]
        axis = StreetAxis(streets.lines[streets.names == street])
        assert all(a.end_m <= b.start_m for a, b in itertools.pairwise(parts))
        assert all((street, other) in meets and other != street for p in parts for other in p.bounds)
        if len(parts) > 1:
            assert all(p.places >= least for p in parts)
            assert all(p.end_m - p.start_m >= gap - 1e-6 for p in parts)
        length = sum(axis.substring(p.start_m, p.end_m).length for p in parts)
        assert length <= sum(part.length for part in axis.parts) + 1e-6
        for p in parts:
            at = axis.locate(x[np.array(partition.names) == p.name], y[np.array(partition.names) == p.name])
            assert ((p.start_m - 1e-6 <= at) & (at <= p.end_m + 1e-6)).all()

    order = list(range(number))
    rng.shuffle(order)
    turned = [(name, line[::-1]) for name, line in rng.sample(drawn, len(drawn))]
    again = StreetPartition(town(turned), config, [names[i] for i in order], x[order], y[order])
    assert again.sub_streets == partition.sub_streets
    assert again.names == [partition.names[i] for i in order]


def test_real_names_of_a_file(tmp_path: Path) -> None:
    """From the file on, with the lines of a street in several features as OpenStreetMap has them."""
    pieces = [[(0, 0), (200, 0)], [(400, 0), (600, 0)], [(200, 0), (400, 0)]]
    lines = [("Mill Street", p) for p in pieces] + [("B Road", [(200, -50), (200, 0)]), ("D Road", [(400, 0), (400, 50)])]
    features = [
        {
            "type": "Feature",
            "properties": {"name": name},
            "geometry": {"type": "LineString", "coordinates": [[x / DEGREE_M, y / DEGREE_M] for x, y in line]},
        }
        for name, line in lines
    ]
    file = tmp_path / "streets.geojson"
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    streets = StreetMap.load(file)
    partition = StreetPartition(streets, PartitionConfig(), ["Mill Street"] * 15, *along(streets, places(50, 300, 500)))
    assert [p.name for p in partition.sub_streets] == [
        "Mill Street from B Road on",
        "Mill Street between B Road and D Road",
        "Mill Street from D Road on",
    ]
    assert math.isclose(partition.sub_streets[-1].end_m, 600, abs_tol=5)
