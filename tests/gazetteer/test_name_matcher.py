import pytest

from addressvlm.gazetteer.name_matcher import MentionFinder, normalize_name


def test_longest_name_wins() -> None:
    names = MentionFinder(["Mill Street", "Old Mill Street"])
    assert names.mentions("From Old Mill Street to Mill St.") == [
        normalize_name("Old Mill Street"),
        normalize_name("Mill Street"),
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("at Mill Street's end", ["Mill Street"]),
        ("Rue de l'Eveche", ["Rue de l'Évêché"]),
        ("the market on Broadway", ["Broadway"]),
        ("a broadway of cars", []),
        ("これは銀座通りです。", ["銀座通り"]),
        ("Mill-Street/Broadway", ["Mill Street", "Broadway"]),
    ],
)
def test_names_in_free_text(text: str, found: list[str]) -> None:
    names = MentionFinder(["Mill Street", "Rue de l'Évêché", "Broadway", "Market", "銀座通り"])
    assert [mention.name for mention in names.find(text)] == found
