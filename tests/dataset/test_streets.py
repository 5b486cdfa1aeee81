"""Streets and districts near many points at once, names of streets, which areas become districts"""

import math

import numpy as np
import pyproj
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm.dataset.districts import choose_districts, district_cells
from addressvlm.dataset.geo_files import GeoExtract, GeoFeature
from addressvlm.dataset.streets import StreetMap, select_streets
from tests.support.osm_writer import STEP


def test_points_without_a_position_have_no_street() -> None:
    streets = StreetMap(["Mill Street"], [shapely.LineString([(0, 0), (0.01, 0)])])
    code, metres, _, _ = streets.nearest_two([0.0, 95.0, math.nan], [0.005, 10.0, 0.0], 40)
    assert code.tolist() == [0, -1, -1]
    assert metres[1:].tolist() == [math.inf] * 2
    assert streets.around([math.nan, 0.0], [0.0, 0.005], 40) == [[], [("Mill Street", 0.0)]]
    assert code.dtype == np.int32


def test_an_empty_map_answers() -> None:
    streets = StreetMap([], [], centre=(50, 8))
    assert [column.tolist() for column in streets.nearest_two([50, 51], [8, 8], 40)] == [
        [-1, -1],
        [math.inf] * 2,
        [-1, -1],
        [math.inf] * 2,
    ]
    assert streets.nearest([50.0], [8.0], 40)[0].tolist() == [None]
    assert streets.district([50.0], [8.0]) == [None]
    assert (streets.bounds, streets.around([50.0], [8.0], 40)) == (None, [[]])


def test_overlapping_districts_the_smallest_and_gaps_the_nearest() -> None:
    degree = 111_195.0
    boxes = {"City": (-1000, -1000, 1000, 1000), "Old Town": (-100, -100, 100, 100), "Island": (1100, 0, 1200, 100)}
    polygons = [(n, shapely.box(*(v / degree for v in b))) for n, b in boxes.items()]
    streets = StreetMap([], [], polygons)
    x = np.array([0.0, 100.01, 130.0, 1030.0, 1075.0, 1050.1, 1260.0])
    expected = ["Old Town", "City", "City", "City", "Island", "Island", None]
    assert streets.district(np.full(len(x), 10) / degree, x / degree) == expected
    assert streets.bounds == pytest.approx((-1000 / degree, -1000 / degree, 1200 / degree, 1000 / degree))
    assert streets.district_names == ["City", "Island", "Old Town"]
    assert streets.district_codes([0.0], [0.0]).tolist() == [2]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900), st.integers(1, 500), st.integers(1, 500)), max_size=8),
    st.lists(st.tuples(st.floats(-100, 1500), st.floats(-100, 1500)), min_size=1, max_size=40),
    st.sampled_from([1, 30, 1 << 22]),
    st.sampled_from([0, 60, -70]),
)
def test_districts_of_every_point_are_what_shapely_says(
    boxes: list[tuple[int, ...]], points: list[tuple[float, float]], cells: int, lat: int
) -> None:
    """Whether the grid is fine or, as over a whole country, coarse; and far from the equator."""
    plane = f"+proj=tmerc +lat_0={lat} +lon_0=25 +x_0=-700 +y_0=-700 +datum=WGS84"
    to_degrees = pyproj.Transformer.from_crs(plane, 4326, always_xy=True).transform
    shapes = [shapely.box(x, y, x + width, y + height) for x, y, width, height in boxes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("addressvlm.dataset.districts.MAX_CELLS", cells)
        names = [f"{i:02}" for i in range(len(boxes))]
        streets = StreetMap(
            [],
            [],
            [
                (n, shapely.transform(s, lambda c: np.column_stack(to_degrees(c[:, 0], c[:, 1]))))
                for n, s in zip(names, shapes, strict=True)
            ],
        )
    lon, at_lat = to_degrees(*np.array(points).T)
    codes = streets.district_codes(at_lat, lon)
    for (x, y), code in zip(points, codes.tolist(), strict=True):
        metres = [shapely.distance(shapely.Point(x, y), shape) for shape in shapes]
        edges = [shapely.distance(shapely.Point(x, y), shape.boundary) for shape in shapes]
        if any(edge < 0.5 or abs(edge - 50) < 0.5 for edge in edges):
            continue  # there the plane and the globe may differ
        order = sorted(range(len(shapes)), key=lambda i: (round(metres[i], 1), shapes[i].area, i))
        best = order[0] if order and metres[order[0]] <= 50 else -1
        assert code == best or (metres[code] == pytest.approx(metres[best], abs=0.5) and metres[best] > 0)


NORTH, EAST = 60.0, 25.0
GLOBE = pyproj.Geod(ellps="WGS84")


def away(azimuth: float, metres: float, lat: float = NORTH, lon: float = EAST) -> tuple[float, float]:
    """Longitude and latitude of the point so far from (60 N, 25 E), on the ellipsoid."""
    return GLOBE.fwd(lon, lat, azimuth, metres)[:2]


def test_distances_far_north_are_those_on_the_globe() -> None:
    """A degree of longitude is half as long there as one of latitude."""
    shapes = {
        "East Way": shapely.LineString([away(90, 60), away(90.0, 60, *away(0, 200)[::-1])]),
        "Point": shapely.Point(away(180, 45)),
        "Far Square": shapely.Polygon([away(a, 150) for a in (250, 260, 270, 280)]),
    }
    streets = StreetMap(list(shapes), list(shapes.values()))
    result = streets.around([NORTH], [EAST], 300)[0]
    assert [name for name, _ in result] == ["Point", "East Way", "Far Square"]
    assert [metres for _, metres in result] == pytest.approx([45, 60, 150 * math.cos(math.radians(15))], abs=0.1)
    x, y = streets.to_metres([away(40, 500)[1]], [away(40, 500)[0]])
    x0, y0 = streets.to_metres([NORTH], [EAST])
    assert math.hypot(x[0] - x0[0], y[0] - y0[0]) == pytest.approx(500, abs=0.1)
    assert math.degrees(math.atan2(x[0] - x0[0], y[0] - y0[0])) == pytest.approx(40, abs=0.1)
    lat, lon = streets.to_degrees(x, y)
    assert (lon[0], lat[0]) == pytest.approx(away(40, 500), abs=1e-7)


@pytest.mark.parametrize("azimuth", [0, 90, 180, 270])
def test_a_point_beside_a_district_far_north_belongs_to_it_within_50_m(azimuth: int) -> None:
    """Another district on each side puts the point into the grid of what is known."""
    tower = shapely.Polygon([away(a, 100) for a in range(0, 360, 5)])
    around = [
        (f"{a}", shapely.Polygon([away(a + b, 700 + c) for b, c in ((-1, 0), (1, 0), (0, 30))])) for a in range(0, 360, 45)
    ]
    streets = StreetMap([], [], [("Tower", tower), *around])
    lon, lat = np.array([away(azimuth, 100 + metres) for metres in (*range(30, 50, 1), 51, 60, 90)]).T
    assert streets.district(lat, lon) == ["Tower"] * 20 + [None] * 3


def test_points_without_a_position_have_no_district() -> None:
    streets = StreetMap([], [], [("Old Town", shapely.box(0, 0, 0.01, 0.01))])
    assert streets.district([math.nan, 95.0, 0.005], [0.005, 10.0, 0.005]) == [None, None, "Old Town"]


def test_a_square_is_a_street_with_an_area() -> None:
    square = shapely.box(-0.001, -0.001, 0.0, 0.0)
    streets = StreetMap(["Plaza", "Mill Street"], [square, shapely.LineString([(0, 0), (0.01, 0)])])
    assert streets.around([-0.0005], [-0.0005], 80)[0] == [("Plaza", 0.0), ("Mill Street", pytest.approx(78.4, abs=0.5))]
    assert streets.street_shapes(["Plaza", "None"])["Plaza"].equals(square)


# names


def named_line(name: str, *points: tuple[float, float]) -> GeoFeature:
    return GeoFeature({"name": name}, shapely.LineString(np.array(points) * STEP))


def test_spellings_of_one_street_are_one_and_of_two_streets_two() -> None:
    result = select_streets(
        GeoExtract.from_features(
            [
                named_line("Forbes Ave", (0, 0), (1, 0)),
                named_line("Forbes Avenue", (1, 0), (2, 0)),
                named_line("Forbes Avenue", (2, 0), (3, 0)),
                named_line("FORBES AVE", (3, 0), (4, 0)),
                named_line("Forbes Ave", (50, 0), (51, 0)),  # elsewhere, and part of it all the same: it has the spelling
                named_line("Mill Road", (0, 3), (1, 3)),
                named_line("Mill Rd", (90, 3), (91, 3)),
                named_line("E Street", (0, 5), (5, 5)),
                named_line("East Street", (2, 4), (2, 6)),
            ]
        ),
        "streets.geojson",
    )
    assert sorted(set(result.names)) == ["E Street", "East Street", "Forbes Avenue", "Mill Rd", "Mill Road"]
    assert result.variants == {"Forbes Avenue": ["Forbes Ave", "FORBES AVE"]}


def test_areas_and_points_of_a_table_count_unless_openstreetmap_says_otherwise() -> None:
    square, stop = (
        GeoFeature({"name": "Plaza"}, shapely.box(0, 0, STEP, STEP)),
        GeoFeature({"name": "Stop"}, shapely.Point(0, 0)),
    )
    street = named_line("Mill Road", (0, 3), (1, 3))
    assert select_streets(GeoExtract.from_features([square, stop, street]), "t").names == ["Plaza", "Stop", "Mill Road"]
    tagged = GeoFeature({"name": "Plaza", "highway": "pedestrian"}, square.shape)
    assert select_streets(GeoExtract.from_features([tagged, stop, street]), "t").names == ["Plaza", "Mill Road"]


@pytest.mark.parametrize(("azimuth", "metres", "streets"), [(90, 45, 1), (90, 55, 2), (0, 45, 1), (0, 55, 2)])
@pytest.mark.parametrize("lat", [0.0, 60.0, -60.0])
def test_spellings_belong_together_up_to_50_m_of_the_globe(lat: float, azimuth: float, metres: float, streets: int) -> None:
    """The gap between two ways of one name, to the east or the north."""
    globe = pyproj.Geod(ellps="WGS84")
    at = [globe.fwd(25.0, lat, azimuth, d)[:2] for d in (0, 100, 100 + metres, 200 + metres)]
    ways = [GeoFeature({"name": name}, shapely.LineString(at[i : i + 2])) for i, name in ((0, "Mill Rd"), (2, "Mill Road"))]
    assert len(set(select_streets(GeoExtract.from_features(ways), "t").names)) == streets


# districts


def layer(level: str, columns: int, rows: int = 1, right: float = 10, **tags: str) -> list[GeoFeature]:
    """Areas side by side over the ground from (0, 0) to (right, 10)."""
    tags = tags or {"boundary": "administrative", "admin_level": level}
    width, height = right / columns, 10 / rows
    boxes = [shapely.box(width * i, height * j, width * (i + 1), height * (j + 1)) for i in range(columns) for j in range(rows)]
    return [GeoFeature({**tags, "name": f"{level}-{i}"}, box) for i, box in enumerate(boxes)]


PLACES = [GeoFeature({"place": "suburb", "name": f"place-{i}"}, shapely.Point(2.5 + 5 * i, 5)) for i in range(2)]
QUARTERS = layer("quarter", 2, place="quarter")


@pytest.mark.parametrize(
    ("features", "settings", "chosen"),
    [
        (layer("8", 2) + layer("9", 2, 2) + layer("10", 3, 2), {}, "10"),  # of those that cover all, the finest
        (layer("8", 2) + layer("10", 5, 4), {}, "8"),  # 20 for 40 streets are no districts, but blocks
        (layer("8", 2) + layer("10", 5, 4)[:19], {}, "10"),
        (layer("8", 1) + layer("10", 2, right=9), {}, "10"),  # nine tenths are enough, and one is no district
        (layer("8", 2) + layer("10", 2, right=8.8), {}, "8"),
        (layer("8", 2) + QUARTERS, {}, "8"),
        (layer("8", 1) + QUARTERS + PLACES, {}, "quarter"),
        (layer("8", 1) + layer("suburb", 2, place="suburb") + QUARTERS, {}, "quarter"),
        (layer("8", 1) + PLACES, {}, "place"),
        (layer("8", 2) + QUARTERS + PLACES, {"source": "polygons"}, "quarter"),
        (layer("8", 2) + QUARTERS + PLACES, {"source": "place"}, "place"),
        (layer("8", 2) + layer("9", 2, 2) + QUARTERS, {"admin_level": 8}, "8"),
        (layer("8", 1, right=3) + layer("9", 1, right=5), {}, "9"),  # where none will do, that which covers most
        (layer("8", 1, right=5) + layer("9", 1, right=3), {}, "8"),
    ],
)
def test_the_layer_of_districts_that_is_chosen(features: list[GeoFeature], settings: dict, chosen: str) -> None:
    streets = np.array([shapely.Point(0.125 + 0.25 * i, 5.1) for i in range(40)], dtype=object)
    result = choose_districts(GeoExtract.from_features(features, (0, 0, 10, 10), osm=True), streets, "town.osm", **settings)
    assert {f.tags["name"].partition("-")[0] for f in result} == {chosen}


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12), st.integers(-70, 70))
def test_cells_are_where_the_middle_is_nearest(middles: list[tuple[int, int]], lat: int) -> None:
    points = [GeoFeature({"name": str(i)}, shapely.Point(x / 1000, lat + y / 1000)) for i, (x, y) in enumerate(middles)]
    within = shapely.box(-0.001, lat - 0.001, 0.021, lat + 0.021)
    result = district_cells(points, within)
    assert sum(cell.shape.area for cell in result) == pytest.approx(within.area)
    assert len(result) == len(set(middles))
    squeeze = np.cos(np.radians(lat))
    for cell in result:
        inside = cell.shape.representative_point()
        away = [np.hypot((p.shape.x - inside.x) * squeeze, p.shape.y - inside.y) for p in points]
        assert away[int(cell.tags["name"])] == pytest.approx(min(away), abs=1e-6)
