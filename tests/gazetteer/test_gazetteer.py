"""The gazetteer, and the nearest streets of many points at once"""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from shapely.geometry import LineString, box

from addressvlm import InputError
from addressvlm.gazetteer import spatial_index
from addressvlm.gazetteer.gazetteer import Address, Gazetteer, merge_gazetteers
from addressvlm.gazetteer.spatial_index import NearestStreets


def gazetteer() -> Gazetteer:
    """Five parallel streets 100 m apart from west to east, two districts."""
    names = ["Mill Street", "Mill Lane", "St. Mary's Road", "Old Mill Street", "Zoo Avenue"]
    lines = {n: LineString([(0.001 * i, 0), (0.001 * i, 0.01)]) for i, n in enumerate(names)}
    addresses = [Address(n, "Harbour" if i < 3 else "North Gate") for i, n in enumerate(names)]
    polygons = {"Harbour": box(-1, 0, 0.0025, 1), "North Gate": box(0.0025, 0, 1, 1)}
    return Gazetteer(
        addresses, lines, polygons, {"Mill Street": 8}, {"Mill Street": 2}, "Town", ["made up"], {"Zoo Avenue": ["Bear Road"]}
    )


@pytest.mark.parametrize(
    ("text", "street"),
    [
        ("Mill Street, Harbour", "Mill Street"),
        ("It is on mill st. I think", "Mill Street"),
        ("Old Mill Street", "Old Mill Street"),
        ("St Marys Rd", "St. Mary's Road"),
        ("Mill Street or Mill Lane", None),
        ("Mill Street, yes, Mill Street", "Mill Street"),
        ("Milling Street", None),
        ("", None),
    ],
)
def test_find_street(text: str, street: str | None) -> None:
    assert gazetteer().find_street(text) == street


def test_find_district_and_script_without_spaces() -> None:
    assert gazetteer().find_district("Zoo Avenue, N. Gate") == "North Gate"
    assert Gazetteer([Address("南京路", "黄浦区")]).find_street("这是黄浦区南京路。") == "南京路"


def test_names_with_the_same_form_are_told_apart_by_spelling() -> None:
    city = Gazetteer([Address("E Street", "A"), Address("East Street", "A")])
    assert city.find_street("on East Street") == "East Street"
    assert city.find_street("on E Street") == "E Street"
    assert city.find_street("on E. St") is None


def test_variants_resolve_to_the_display_name() -> None:
    streets = [
        Address("明治通り", "渋谷区"),
        Address("Mill Road", "A"),
        Address("Lenin Street", "A"),
        Address("Main Street", "A"),
    ]
    variants = {
        "明治通り": ["Meiji-dori Avenue"],
        "渋谷区": ["Shibuya"],
        "Mill Road": ["Lenin Street", "The Mills", "M", "42"],
        "Main Street": ["The Mills"],
        "Elsewhere": ["Nowhere"],
    }
    city = Gazetteer(streets, variants=variants)
    assert city.find_street("on meiji dori ave, I think") == "明治通り"
    assert city.find_district("Meiji-dori Avenue, Shibuya") == "渋谷区"
    assert city.find_street("Lenin St") == "Lenin Street"  # a name goes before another street's old one
    assert city.find_street("The Mills") is None  # two streets are called so
    assert city.find_street("M 42") is None
    assert city.find_street("Meiji-dori Avenue, that is 明治通り") == "明治通り"
    assert "Elsewhere" not in city.variants


def test_nearest_orders_by_distance_and_negatives_are_mixed() -> None:
    city = gazetteer()
    assert city.nearest("Mill Street", 2) == ["Mill Lane", "St. Mary's Road"]
    assert city.nearest("Zoo Avenue", 9) == ["Old Mill Street", "St. Mary's Road", "Mill Lane", "Mill Street"]
    assert city.nearest("Harbour", 3, level="district") == ["North Gate"]
    drawn = [city.sample_negatives("Mill Street", 3, random.Random(seed)) for seed in range(50)]
    assert all(len(set(names)) == 3 and "Mill Street" not in names for names in drawn)
    assert {n for names in drawn for n in names} == set(city.streets) - {"Mill Street"}


spots = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=25)


@settings(max_examples=60)
@given(spots, st.integers(0, 12), st.integers(0, 60))
def test_nearest_equals_brute_force(places: list[tuple[int, int, int]], n: int, north: int) -> None:
    """Lines a hundred metres apart and more, some names without a shape."""
    names = [f"Street {i:02}" for i in range(len(places))]
    shapes = {
        name: shapely.LineString([(x / 1000, north + y / 1000), ((x + length) / 1000, north + y / 1000)])
        for name, (x, y, length) in zip(names, places, strict=True)
        if length
    }
    city = Gazetteer([Address(name, "Town") for name in names], shapes)
    scale = 111_320.0 * np.array([math.cos(math.radians(north)), 1])
    metres = {name: shapely.transform(shape, lambda c: c * scale) for name, shape in shapes.items()}

    def away(one: str, other: str) -> float:
        return metres[one].distance(metres[other]) if one in metres and other in metres else math.inf

    for one in names[:5]:
        distances = [away(one, other) for other in city.nearest(one, n)]
        assert distances == pytest.approx(sorted(away(one, other) for other in names if other != one)[:n], rel=0.01, abs=0.01)
        left = city.nearest(one, n, exclude=set(names[::2]))
        assert left == [other for other in city.nearest(one, len(names)) if other not in names[::2]][:n]
        for share in (0.0, 0.5, 1.0):
            drawn = city.sample_negatives(one, n, random.Random(n), hard_negative_share=share, exclude=set(names[::2]))
            assert len(set(drawn)) == len(drawn) == min(n, len({*names} - {one, *names[::2]}))
            assert not {*drawn} & {one, *names[::2]}


def test_streets_within_a_distance_of_a_point() -> None:
    city = Gazetteer([Address(n, "Town") for n in ("A", "B", "C")], {
        "A": shapely.LineString([(0, 60), (0.001, 60)]), "B": shapely.LineString([(0.0012, 59), (0.0012, 61)]),
    })  # fmt: skip
    assert [city.within(60, 0.0005, reach) for reach in (20, 50)] == [{"A"}, {"A", "B"}]


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    city = gazetteer()
    city.save(tmp_path / "gazetteer.geojson")
    again = Gazetteer.load(tmp_path / "gazetteer.geojson")
    assert again.addresses == city.addresses
    assert again.streets == sorted(city.streets)
    assert again.geometry == city.geometry
    assert again.district_geometry == city.district_geometry
    counted = {
        f["properties"]["name"]: f["properties"] for f in json.loads((tmp_path / "gazetteer.geojson").read_text())["features"]
    }
    assert [counted["Mill Street"][key] for key in ("places", "photos")] == [2, 8]
    again.save(tmp_path / "again.geojson")
    assert (tmp_path / "again.geojson").read_text() == (tmp_path / "gazetteer.geojson").read_text()
    assert again.variants == {"Zoo Avenue": ["Bear Road"]}
    assert again.find_street("Bear Rd") == "Zoo Avenue"
    assert (again.city, again.attribution) == ("Town", ["made up"])


@pytest.mark.parametrize("content", ["{", "[]", '{"features": [{"properties": {}}]}', None])
def test_an_invalid_gazetteer_is_an_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "gazetteer.geojson"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"gazetteer\.geojson"):
        Gazetteer.load(path)


def test_merged_gazetteers_keep_the_first_geometry_and_add_counts(tmp_path: Path) -> None:
    first = LineString([(0, 0), (0, 1)])
    other = Gazetteer(
        [Address("Mill Street", "Hill"), Address("Elm Row", "Harbour")],
        {"Mill Street": LineString([(5, 5), (6, 6)]), "Elm Row": first},
        {"Harbour": box(0, 0, 9, 9), "Hill": box(0, 0, 2, 2)},
        {"Mill Street": 3, "Elm Row": 4}, {"Mill Street": 2, "Elm Row": 1}, "B", [],
        {"Mill Street": ["Molengasse"], "Hill": ["Berg"]},
    )  # fmt: skip
    one = Gazetteer(
        [Address("Mill Street", "Harbour")], {"Mill Street": first}, {"Harbour": box(0, 0, 1, 1)}, {"Mill Street": 8},
        {"Mill Street": 5}, "A", [], {"Mill Street": ["The Mill"]},
    )  # fmt: skip
    both = merge_gazetteers([one, other])
    assert both.geometry == {"Mill Street": first, "Elm Row": first}
    assert both.district_geometry == {"Harbour": box(0, 0, 1, 1), "Hill": box(0, 0, 2, 2)}
    assert both.variants == {"Mill Street": ["The Mill"], "Hill": ["Berg"]}
    both.save(tmp_path / "gazetteer.geojson")
    properties = [f["properties"] for f in json.loads((tmp_path / "gazetteer.geojson").read_text())["features"]]
    counts = {p["name"]: (p["photos"], p["places"], p["districts"]) for p in properties if p["kind"] == "street"}
    assert counts == {"Mill Street": (11, 7, ["Harbour", "Hill"]), "Elm Row": (4, 1, ["Harbour"])}
    assert merge_gazetteers([other]) is other


# the nearest streets

coordinate = st.integers(-150, 150)
point = st.tuples(coordinate, coordinate)
line = st.lists(point, min_size=2, max_size=4, unique=True).map(shapely.LineString)
area = st.tuples(point, st.integers(1, 80), st.integers(1, 80)).map(
    lambda a: shapely.box(a[0][0], a[0][1], a[0][0] + a[1], a[0][1] + a[2]).difference(shapely.Point(a[0]).buffer(9))
)
shapes = st.lists(st.tuples(st.integers(0, 4), st.one_of(line, line, area, point.map(shapely.Point))), max_size=10)


def by_hand(known: list[tuple[int, shapely.Geometry]], x: float, y: float, limit_m: float) -> list[tuple[int, float]]:
    """Code and distance to the cm of all that is within the limit, the nearest first."""
    result: dict[int, float] = {}
    for code, shape in known:
        result[code] = min(result.get(code, math.inf), shape.distance(shapely.Point(x, y)))
    return sorted(((code, round(d, 2)) for code, d in result.items() if d <= limit_m), key=lambda f: (f[1], f[0]))


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate])  # no shrinking: shapes shrink for minutes
@given(
    shapes,
    st.lists(st.tuples(st.floats(-250, 250), st.floats(-250, 250)), max_size=12),
    st.sampled_from([0.5, 40.0, 90.0, 400.0]),
)
def test_the_nearest_of_every_point_is_what_shapely_measures(
    known: list[tuple[int, shapely.Geometry]], points: list[tuple[float, float]], limit_m: float
) -> None:
    known = [(code, shape) for code, shape in known if not shape.is_empty]
    index = NearestStreets(np.array([s for _, s in known], dtype=object), np.array([c for c, _ in known], dtype=np.int64))
    x, y = (np.array([p[i] for p in points], dtype=float) for i in (0, 1))
    first, metres, second, second_metres = index.nearest_two(x, y, limit_m)
    expected = [by_hand(known, *p, limit_m) for p in points]
    pairs = [(all_of + [(-1, math.inf)] * 2)[:2] for all_of in expected]
    assert metres == pytest.approx([pair[0][1] for pair in pairs], abs=0.0101)
    assert second_metres == pytest.approx([pair[1][1] for pair in pairs], abs=0.0101)
    for i, pair in enumerate(pairs):
        if pair[1][1] - pair[0][1] > 0.02 and (len(expected[i]) < 3 or expected[i][2][1] - pair[1][1] > 0.02):
            assert (first[i], second[i]) == (pair[0][0], pair[1][0])
    of_point, code, away = index.within(x, y, limit_m)
    for i, all_of in enumerate(expected):
        assert sorted(code[of_point == i]) == sorted(c for c, _ in all_of)
        assert away[of_point == i] == pytest.approx([d for _, d in all_of], abs=0.0101)
    for i in range(len(points)):
        mine = [*zip(code[of_point == i], away[of_point == i], strict=True), (-1, math.inf), (-1, math.inf)]
        assert mine[:2] == [(first[i], metres[i]), (second[i], second_metres[i])]


def test_batches_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    starts = rng.uniform(-2000, 2000, (300, 1, 2))
    lines = shapely.linestrings(np.concatenate([starts, starts + rng.normal(0, 80, (300, 1, 2))], axis=1))
    index = NearestStreets(lines, rng.integers(0, 90, 300))
    x, y = rng.uniform(-2500, 2500, (2, 3000))
    whole = index.nearest_two(x, y, 150)
    monkeypatch.setattr(spatial_index, "CELLS_PER_BATCH", 7)
    monkeypatch.setattr(spatial_index, "PAIRS_PER_BATCH", 13)
    assert all((a == b).all() for a, b in zip(whole, index.nearest_two(x, y, 150), strict=True))
    alone = [
        np.concatenate(c) for c in zip(*(index.nearest_two(x[i : i + 1], y[i : i + 1], 150) for i in range(60)), strict=True)
    ]
    assert all((a[:60] == b).all() for a, b in zip(whole, alone, strict=True))
