"""Names, their normal form, the gazetteer: python -m pytest tests/test_addresses.py"""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapely.geometry import LineString, box

from addressvlm import InputError
from addressvlm.addresses import Address, Gazetteer, normal


def gazetteer() -> Gazetteer:
    """Five parallel streets 100 m apart from west to east, two districts."""
    names = ["Mill Street", "Mill Lane", "St. Mary's Road", "Old Mill Street", "Zoo Avenue"]
    lines = {n: LineString([(0.001 * i, 0), (0.001 * i, 0.01)]) for i, n in enumerate(names)}
    addresses = [Address(n, "Harbour" if i < 3 else "North Gate") for i, n in enumerate(names)]
    polygons = {"Harbour": box(-1, 0, 0.0025, 1), "North Gate": box(0.0025, 0, 1, 1)}
    return Gazetteer(addresses, lines, polygons, {"Mill Street": 8}, {"Mill Street": 2}, "Town", ["made up"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("St. Mary's Rd", "saint marys road"),
        ("Mill St", "MILL STREET"),
        ("N. Craig Ave.", "North Craig Avenue"),
        ("King’s  Parade", "Kings Parade"),
        ("Hauptstraße", "Hauptstr."),
        ("Fifth & Main", "fifth and main"),
        ("Ｍｉｌｌ Street", "Mill street"),
        ("Saint-Pierre", "St Pierre"),
    ],
)
def test_spellings_of_one_name_have_one_form(one: str, other: str) -> None:
    assert normal(one) == normal(other)


def test_different_names_stay_different() -> None:
    assert len({normal(n) for n in ["Mill Street", "Mill Lane", "Mill Road", "Mall Street", "Rue de l'Église", "ถนนสีลม"]}) == 6


@given(st.text())
def test_normal_form_is_stable(name: str) -> None:
    assert normal(normal(name)) == normal(name)


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


def test_two_spellings_in_one_city_are_told_apart_as_written() -> None:
    city = Gazetteer([Address("E Street", "A"), Address("East Street", "A")])
    assert city.find_street("on East Street") == "East Street"
    assert city.find_street("on E Street") == "E Street"
    assert city.find_street("on E. St") is None


def test_near_orders_by_distance_and_mixes_with_rng() -> None:
    city = gazetteer()
    assert city.near("Mill Street", 2) == ["Mill Lane", "St. Mary's Road"]
    assert city.near("Zoo Avenue", 9) == ["Old Mill Street", "St. Mary's Road", "Mill Lane", "Mill Street"]
    assert city.near("Harbour", 3, level="district") == ["North Gate"]
    drawn = [city.near("Mill Street", 3, random.Random(seed)) for seed in range(50)]
    assert all(len(set(names)) == 3 and "Mill Street" not in names for names in drawn)
    assert {n for names in drawn for n in names} == set(city.streets) - {"Mill Street"}


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    city = gazetteer()
    city.save(tmp_path / "gazetteer.geojson")
    again = Gazetteer.load(tmp_path / "gazetteer.geojson")
    assert again.addresses == city.addresses
    assert again.streets == sorted(city.streets)
    assert again.geometry == city.geometry
    assert again.district_geometry == city.district_geometry
    assert (again.places_of("Mill Street"), again.photos_of("Mill Street"), again.places_of("Zoo Avenue")) == (2, 8, 0)
    assert (again.city, again.attribution) == ("Town", ["made up"])


@pytest.mark.parametrize("content", ["{", "[]", '{"features": [{"properties": {}}]}', None])
def test_what_is_no_gazetteer_is_said(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "gazetteer.geojson"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"gazetteer\.geojson"):
        Gazetteer.load(path)
