"""Names, their normal form, the gazetteer"""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import LineString, box

from addressvlm import InputError
from addressvlm.gazetteer.gazetteer import Address, Gazetteer, merge_gazetteers


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
    assert [city.streets_within(60, 0.0005, reach) for reach in (20, 50)] == [{"A"}, {"A", "B"}]


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
