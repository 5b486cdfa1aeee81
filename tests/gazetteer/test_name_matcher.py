import pytest
from hypothesis import given
from hypothesis import strategies as st

from addressvlm.gazetteer.name_matcher import (
    MentionFinder,
    NameIndex,
    is_distinctive,
    normalize_name,
    unaccented_name,
)


def test_longest_name_wins() -> None:
    names = MentionFinder(["Mill Street", "Old Mill Street"])
    assert names.mentions("From Old Mill Street to Mill St.") == [
        normalize_name("Old Mill Street"),
        normalize_name("Mill Street"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at Mill Street's end", ["Mill Street"]),
        ("Rue de l'Eveche", ["Rue de l'Évêché"]),
        ("the market on Broadway", ["Broadway"]),
        ("a broadway of cars", []),
        ("これは銀座通りです。", ["銀座通り"]),
        ("ここは本町１３丁目", ["本町十三丁目"]),
        ("Mill-Street/Broadway", ["Mill Street", "Broadway"]),
    ],
)
def test_names_in_free_text(text: str, expected: list[str]) -> None:
    names = MentionFinder(["Mill Street", "Rue de l'Évêché", "Broadway", "Market", "銀座通り", "本町十三丁目"])
    assert [mention.name for mention in names.find(text)] == expected


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
        ("Karl-Marx-Straße", "Karl-Marx-Str."),
        ("Nieuwstraat", "Nieuwstr."),
        ("R. Lafayette", "rue Lafayette"),
        ("C/ Mayor", "Calle Mayor"),
        ("Av. Paulista", "Avenida Paulista"),
        ("Bd. Voltaire", "Boulevard Voltaire"),
        ("ул. Ленина", "улица Ленина"),
        ("İSTİKLAL CADDESİ", "İstiklal Cad."),
        ("ISPARTA SOKAĞI", "Isparta sk."),
        ("Işıklar Sokak", "IŞIKLAR SOKAK"),
        ("Οδός Ερμού", "ΟΔΟΣ ΕΡΜΟΥ"),
        ("Πλαΐσιο", "ΠΛΑΙΣΙΟ"),
        ("Βασιλέως Αλεξάνδρου", "βασιλεωσ αλεξανδρου"),
        ("شَارِعُ المَلِك", "شارع الملك"),
        ("شـــارع", "شارع"),
        ("רְחוֹב", "רחוב"),
        ("ʻIolani Avenue", "Iolani Ave"),
        ("Kalākaʻua", "Kalāka'ua"),
        ("銀座三丁目", "銀座3丁目"),
        ("銀座３丁目", "銀座十三丁目".replace("十", "")),
        ("二十三条", "23条"),
        ("霞ヶ関", "霞ケ関"),
        ("ﾎﾝﾏﾁ", "ホンマチ"),
        ("Mill\u00a0Street", "Mill \u2009Street"),
        ("Mi\u200bll Street", "Mill Street\ufeff"),
        ("Rue de l'E\u0301glise", "Rue de l'\u00c9glise"),
        ("Haupt\u00adstraße", "Hauptstraße"),
    ],
)
def test_spellings_of_a_name_have_one_normal_form(one: str, other: str) -> None:
    assert normalize_name(one) == normalize_name(other)


def test_different_names_stay_different() -> None:
    assert (
        len({normalize_name(n) for n in ["Mill Street", "Mill Lane", "Mill Road", "Mall Street", "Rue de l'Église", "ถนนสีลม"]})
        == 6
    )


@given(st.text())
def test_normal_form_is_stable(name: str) -> None:
    assert normalize_name(normalize_name(name)) == normalize_name(name)
    assert len(unaccented_name(name).split()) == len(normalize_name(name).split())


def test_names_match_without_accents_unless_ambiguous() -> None:
    assert unaccented_name("Rue de l'Église Sainte-Œuvre") == "r de leglise ste oeuvre"
    assert unaccented_name("が") == normalize_name("が")  # another letter, not an accent
    index = NameIndex(["Rue de l'Église", "Løkken", "Rua Côco", "Rua Cocó"])
    assert index.find("rue de l eglise") is None  # another word
    assert index.find("it is RUE DE L'EGLISE") == "Rue de l'Église"
    assert index.find("lokken") == "Løkken"
    assert index.find("Rua Cocó") == "Rua Cocó"
    assert index.find("R. Côco") == "Rua Côco"
    assert index.find("Rua Coco") is None


@given(st.lists(st.text("aàáeéè oøn", min_size=1), unique_by=normalize_name, max_size=6))
def test_each_name_is_found_by_itself(names: list[str]) -> None:
    index = NameIndex(names)
    for name in names:
        if normalize_name(name):
            assert index.find(name) == name


@pytest.mark.parametrize(("name", "has"), [("E Street", False), ("St. Av", False), ("E Carson St", True), ("銀座", True)])
def test_names_of_generic_words_are_not_distinctive(name: str, has: bool) -> None:
    assert is_distinctive(name) == has
