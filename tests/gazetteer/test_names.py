"""Names as sources write them"""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from addressvlm.gazetteer.name_matcher import normalize_name
from addressvlm.gazetteer.names import clean_name, is_nothing, osm_names, printable, single_names, split_names


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("Mill Street", ["Mill Street"]),
        ("Mill Street;Quay Road", ["Mill Street", "Quay Road"]),
        (" Mill Street ; Mill  Street;", ["Mill Street"]),
        ("Mill Street / Quay Road", ["Mill Street", "Quay Road"]),
        ("Mill Street\nQuay Road", ["Mill Street", "Quay Road"]),
        ("Straße 12/13", ["Straße 12/13"]),
        (["Mill Street", "nan", None, float("nan"), "Quay Road;Old Way"], ["Mill Street", "Quay Road", "Old Way"]),
        ("['Mill Street', \"King's Parade\"]", ["Mill Street", "King's Parade"]),
        ("['Mill Street' 'Quay Road']", ["Mill Street", "Quay Road"]),  # of NumPy
        ('["Mill Street", "Quay Road"]', ["Mill Street", "Quay Road"]),
        ('{"Mill Street",Quay}', ["Mill Street"]),
        ("{Mill Street,Quay Road}", ["Mill Street", "Quay Road"]),
        ("('Mill Street', 'Quay Road')", ["Mill Street", "Quay Road"]),
        ("[nan, 'Mill Street']", ["Mill Street"]),
        ("(Old) Mill (Street)", ["(Old) Mill (Street)"]),
        ("[]", []),
        (None, []),
        (5, ["5"]),
    ],
)
def test_the_names_in_one_cell(value: object, names: list[str]) -> None:
    assert split_names(value) == names


@pytest.mark.parametrize(
    "word", ["", "nan", "NaN", "None", "NULL", "n/a", "N/A", r"\N", "#N/A", "<NA>", "-", "?", "…", "Unnamed Road"]
)
def test_words_for_nothing(word: str) -> None:
    assert is_nothing(word)


@pytest.mark.parametrize("name", ["Nan", "Null", "Na", "Via None", "None Street", "0", "X", "銀座", "ʻĀina", "No Name Lane"])
def test_names_that_look_like_nothing_are_names(name: str) -> None:
    assert not is_nothing(name)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" Mill\u00a0\u3000Street\t", "Mill Street"),
        ("\ufeffMi\u200bll \u202aStreet\u202c", "Mill Street"),
        ("Mill\u3164Street\x07", "Mill Street"),
        ("Cafe\u0301", "Café"),
        ("خیابان\u200cها", "خیابان\u200cها"),
    ],
)
def test_what_nobody_sees_is_not_in_a_name(text: str, name: str) -> None:
    assert clean_name(text) == name


@pytest.mark.parametrize("text", ["Stra\ufffde", "half \ud83d"])
def test_damaged_names_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"damaged text: .* has lost 1 of its characters"):
        clean_name(text)
    assert printable("caf\udce9.jpg") == "caf\\udce9.jpg"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_a_clean_name_is_stable_and_has_the_same_normal_form(text: str) -> None:
    name = clean_name(text)
    assert clean_name(name) == name == unicodedata.normalize("NFC", name)
    assert normalize_name(name) == normalize_name(text)
    assert all(clean_name(part) == part for part in split_names(text))


@pytest.mark.parametrize(
    ("tags", "names"),
    [
        ({"name": "Mill Street", "alt_name": "Mill Row"}, ["Mill Street"]),
        ({"name": "Mill Street;Quay Road"}, ["Mill Street", "Quay Road"]),
        ({"name:left": "Mill Street", "name:right": "Quay Road"}, ["Mill Street", "Quay Road"]),
        (
            {"name": "Mill Street / Quay Road", "name:left": "Mill Street", "name:right": "Quay Road"},
            ["Mill Street", "Quay Road"],
        ),
        ({"name": "Mill Street", "name:left": "Mill Street", "name:right": "Mill Street"}, ["Mill Street"]),
        ({"name": "Via Roma / Romstraße", "name:it": "Via Roma", "name:de": "Romstraße"}, ["Via Roma / Romstraße"]),
        ({"highway": "residential"}, [None]),
    ],
)
def test_a_street_with_several_names_is_several_streets(tags: dict[str, str], names: list[str | None]) -> None:
    assert [single.get("name") for single in single_names(tags)] == names


def test_translations_are_told_apart_with_the_names() -> None:
    tags = {"highway": "service", "name": "Rue A;Rue B", "name:nl": "Straat A;Straat B", "alt_name": "Rue C"}
    assert single_names(tags) == [
        {"highway": "service", "name": "Rue A", "name:nl": "Straat A"},
        {"highway": "service", "name": "Rue B", "name:nl": "Straat B"},
    ]


def test_variants_of_openstreetmap() -> None:
    tags = {
        "name": "明治通り",
        "name:en": "Meiji-dori Avenue",
        "name:zh-Hant": "明治通",
        "name:etymology": "Meiji",
        "alt_name": "環状5号; 環状五号線",
        "old_name": "市街路",
        "name:left": "何か",
    }
    assert osm_names(tags) == ("明治通り", ["環状5号", "環状五号線", "Meiji-dori Avenue", "明治通", "市街路"])
    assert osm_names(tags, "en")[0] == "Meiji-dori Avenue"
    assert "明治通り" in osm_names(tags, "en")[1]
    assert osm_names(tags, "fr")[0] == "明治通り"
    assert osm_names({"name:en": "No Local Name"}) == ("", [])
    assert osm_names({"name:en": "No Local Name"}, "en") == ("No Local Name", [])
