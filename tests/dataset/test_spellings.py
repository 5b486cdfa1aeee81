"""Names of a table beside those of a map, from the files to the questions"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Geod
from shapely import LineString
from shapely.affinity import translate

from addressvlm.config.city import CityConfig
from addressvlm.dataset import readers
from addressvlm.dataset.build import answer_places, build_gazetteer
from addressvlm.dataset.geocoding import Place, assign_addresses
from addressvlm.dataset.photos import Photo
from addressvlm.dataset.spellings import KnownNames, most_frequent_spellings, translate_spellings, unify_spellings
from addressvlm.dataset.streets import StreetMap
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.gazetteer.name_matcher import normalize_name
from addressvlm.questions import evaluation_rounds, training_rounds


def write_map(path: Path, *lines: dict[str, Any]) -> str:
    """Streets 1 km apart, each 700 m long, from the south to the north."""
    features = [
        {"type": "Feature", "properties": tags,
         "geometry": {"type": "LineString", "coordinates": [[0.1, 52.1 + i / 100], [0.11, 52.1 + i / 100]]}}
        for i, tags in enumerate(lines)
    ]  # fmt: skip
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return str(path)


def address(folder: Path, rows: str, *streets: dict[str, Any]) -> tuple[dict[str, Place], list[Photo], Gazetteer]:
    """Places and photos of a table (file, lat, lon, street, district) beside a map, and their gazetteer."""
    (folder / "photos.csv").write_text("file,lat,lon,street,district\n" + rows)
    streets_file = write_map(folder / "streets.geojson", *streets) if streets else None
    city = CityConfig(manifest=str(folder / "photos.csv"), streets=streets_file)
    photos, rejects = readers.read(city)
    assert rejects == []
    known = StreetMap.load(streets_file)
    places, addressed, rejects = assign_addresses(photos, known, city)
    assert rejects == []
    return places, addressed, build_gazetteer(city, known, answer_places(places, city), addressed)


MILL, QUAY = {"name": "Mill Street"}, {"name": "Quay Road"}
ROWS = """1.jpg,52.1,0.101,Mill St.,Old Town
2.jpg,52.1,0.103,,Old Town
3.jpg,52.1,0.105,MILL STREET,Old town
4.jpg,52.11,0.105,,Old Town
5.jpg,52.11,0.106,Quay\u00a0Rd,Old  Town
6.jpg,52.11,0.107,quay\u200b road,OLD TOWN
"""


def test_a_street_from_the_table_and_from_the_map_is_one(tmp_path: Path) -> None:
    places, _, gazetteer = address(tmp_path, ROWS, MILL, QUAY)
    assert (gazetteer.streets, gazetteer.districts) == (["Mill Street", "Quay Road"], ["Old Town"])
    assert [place.address.street for place in places.values()] == ["Mill Street"] * 3 + ["Quay Road"] * 3
    assert [place.source for place in places.values()] == ["manifest", "map", "manifest", "map", "manifest", "manifest"]
    assert {place.ambiguous for place in places.values()} == {False}


@pytest.mark.parametrize("streets", [(), (MILL, QUAY), (MILL, QUAY, {"name": "Mill St"}, {"name": "QUAY ROAD"})])
def test_no_question_contradicts_another_by_its_spelling(tmp_path: Path, streets: tuple[dict[str, str], ...]) -> None:
    """Whatever the map spells: what is wrong of a photo is never a spelling of what is right."""
    rows = ROWS.replace(",,", ",MILL street,") if not streets else ROWS
    places, photos, gazetteer = address(tmp_path, rows, *streets)
    for photo in photos:
        right = places[photo.place].address
        forms = {"street": normalize_name(right.street), "district": normalize_name(right.district)}
        for make in (evaluation_rounds, lambda a, g, r, s, u: training_rounds(a, g, r, 7, s, u)):
            for one in make(right, gazetteer, random.Random(photo.id), 0.5, set()):
                options = one["options"] or []
                level = "district" if one["level"] == "district" else "street"
                alike = [option for option in options if normalize_name(option) == forms[level]]
                if one["kind"] == "judgment" and alike:
                    assert one["answer"].startswith("Yes")
                assert len(alike) <= 1


@pytest.mark.parametrize(
    ("properties", "streets"),
    [
        ([{"name": ["Mill Street", "Quay Road"]}, MILL, QUAY], ["Mill Street", "Quay Road"]),
        (
            [{"name": "['Mill Street', 'Quay Road']", "highway": "['residential', 'tertiary']"}, MILL],
            ["Mill Street", "Quay Road"],
        ),
        ([{"name": "Mill Street;Quay Road"}, MILL, QUAY], ["Mill Street", "Quay Road"]),
        ([{"name": "Mill Street / Quay Road", "highway": ["residential"]}], ["Mill Street", "Quay Road"]),
        ([{"highway": "residential", "name:left": "Mill Street", "name:right": "Quay Road"}], ["Mill Street", "Quay Road"]),
        ([MILL, {"name": "nan"}, {"name": "None"}, {"name": r"\N"}, {"name": "#N/A"}], ["Mill Street"]),
        ([{"name": "Cafe\u0301 Road"}, {"name": "Caf\u00e9\u200b Road"}, {"name": "CAF\u00c9\u00a0ROAD"}], ["Caf\u00e9 Road"]),
        ([{"id": 5, "tags": {"name": "Mill Street", "highway": "service"}}], ["Mill Street"]),
        ([{"NAME": "Mill Street"}, {"Name": " mill street "}], ["Mill Street"]),
    ],
)
def test_the_streets_of_a_map(tmp_path: Path, properties: list[dict[str, Any]], streets: list[str]) -> None:
    result = StreetMap.load(write_map(tmp_path / "streets.geojson", *properties))
    if len(streets) > 1:
        assert [street for street, _ in result.around([52.1], [0.105], 40)[0]] == streets
    assert result.street_names == streets


@pytest.mark.parametrize(
    ("spelling", "street"),
    [
        ("Mill St", "Mill Street"),
        ("Rue de l'Eglise", "Rue de l'Église"),
        ("Millers Way", "Mill Street"),  # its old name
        ("İSTİKLAL CADDESİ", "İstiklal Caddesi"),
        ("ΟΔΟΣ ΕΡΜΟΥ", "Οδός Ερμού"),
        ("Ala Moana Blvd", "Ala Moana Boulevard"),
        ("本町３丁目", "本町三丁目"),
        ("E ST.", "E Street"),
        ("East St.", "East Street"),
        ("Oak Road", None),
    ],
)
def test_the_name_of_the_map_for_a_spelling(spelling: str, street: str | None) -> None:
    known = KnownNames(
        ["Mill Street", "Rue de l'Église", "İstiklal Caddesi", "Οδός Ερμού", "Ala Moana Boulevard", "本町三丁目", "E Street",
         "East Street"],
        {"Mill Street": ["Miller's Way"]},
    )  # fmt: skip
    assert known.candidates(spelling) == ([street] if street else [])


def test_of_what_a_spelling_may_stand_for_a_name_s_own_comes_first() -> None:
    known = KnownNames(
        ["Mill Street", "Quay Road", "QUAY RD", "Oak Row"], {"Mill Street": ["Quay Road.", "Oak Lane"], "Oak Row": ["Oak Ln"]}
    )
    assert known.candidates("Quay Road") == ["Quay Road"]
    assert known.candidates("quay rd.") == ["QUAY RD", "Quay Road"]  # not the other name of Mill Street
    assert known.candidates("OAK LN.") == ["Mill Street", "Oak Row"]
    assert known.candidates("Elm Row") == []


@pytest.mark.parametrize(
    ("counts", "one"),
    [
        ({"Mill St": 3, "Mill Street": 2}, "Mill St"),
        ({"Mill St": 2, "Mill Street": 2}, "Mill Street"),  # of equally frequent ones the longest
        ({"mill street": 2, "Mill Street": 2}, "Mill Street"),
    ],
)
def test_the_most_frequent_spelling_is_shown(counts: dict[str, int], one: str) -> None:
    assert most_frequent_spellings(Counter({**counts, "Oak Row": 9})) == {**dict.fromkeys(counts, one), "Oak Row": "Oak Row"}
    names = [name for name, count in counts.items() for _ in range(count)]
    assert unify_spellings(names, [LineString([(10, 50), (10, 50.001)])] * len(names)) == dict.fromkeys(counts, one)


def test_spellings_of_a_street_are_followed_from_line_to_line() -> None:
    """Each 40 m east of the one before: the first and the last are far from each other."""
    line = LineString([(10, 0), (10, 0.001)])
    shapes = [translate(line, xoff=east / 111_320) for east in (0, 80, 40, 300)]
    names = ["Mill Street", "Mill St", "Mill Str.", "Mill Strasse"]
    assert unify_spellings(names, shapes) == {**dict.fromkeys(names[:3], "Mill Street"), "Mill Strasse": "Mill Strasse"}
    assert unify_spellings([*names, "Mill St", "Mill St"], [*shapes, *shapes[1:2] * 2])["Mill Street"] == "Mill St"
    crossing = unify_spellings(["E Street", "East Street", "E ST."], [line] * 3)
    assert crossing == {"E Street": "E Street", "East Street": "East Street", "E ST.": "E Street"}
    far = unify_spellings(["Mill Street", "MILL  STREET", "mill-street"], [shapes[0], shapes[3], shapes[3]])
    assert set(far.values()) == {"MILL  STREET"}  # the same letters are the same street, wherever it goes on


def test_ways_without_a_translation_take_the_most_frequent_one_of_their_street() -> None:
    street = {"Rue A": "Rue A", "rue a": "Rue A", "Rue B": "Rue B"}
    local = ["Rue A", "Rue A", "rue a", "Rue A", "Rue A", "Rue B"]
    spellings = ["A Street", "Rue A", "rue a", "Street A", "Street A", "Rue B"]
    assert translate_spellings(spellings, local, street) == [
        "A Street", "Street A", "Street A", "Street A", "Street A", "Rue B"
    ]  # fmt: skip


@pytest.mark.parametrize(("metres", "streets"), [(45, 1), (55, 2)])
@pytest.mark.parametrize("lat", [0.0, 60.0, -70.0])
def test_how_near_two_spellings_are_is_measured_in_metres_at_any_latitude(lat: float, metres: float, streets: int) -> None:
    one = LineString([(10, lat), (10, lat + 0.001)])
    other = translate(one, xoff=Geod(ellps="WGS84").fwd(10, lat, 90, metres)[0] - 10)
    assert len(set(unify_spellings(["Mill Road", "Mill Rd"], [one, other]).values())) == streets


def test_of_streets_spelled_alike_the_near_one_is_meant(tmp_path: Path) -> None:
    places, _, _ = address(tmp_path, "1.jpg,52.1,0.105,MILL RD.,Harbour\n2.jpg,52.11,0.105,MILL RD.,Harbour\n",
                           {"name": "Mill Road"}, {"name": "Mill Rd"})  # fmt: skip
    assert [place.address.street for place in places.values()] == ["Mill Road", "Mill Rd"]


def test_the_second_of_two_names_in_a_cell_is_no_wrong_answer(tmp_path: Path) -> None:
    places, _, _ = address(tmp_path, "1.jpg,52.1,0.105,Mill St;QUAY RD,Harbour\n", MILL, QUAY)
    (place,) = places.values()
    assert (place.address.street, place.second_street, place.ambiguous) == ("Mill Street", "Quay Road", True)


@given(st.dictionaries(st.text("aAbE éÉ. \u200b\u00a0", min_size=1), st.integers(1, 3)))
@settings(max_examples=100)
def test_spellings_become_one_and_stay_it(counts: dict[str, int]) -> None:
    spelling = most_frequent_spellings(Counter(counts))
    assert spelling.keys() == counts.keys()
    assert all(spelling[one] == one for one in spelling.values())
    forms = {normalize_name(one) for one in spelling.values()}
    assert len(forms) <= len(set(spelling.values()))
