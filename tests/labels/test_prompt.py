from pathlib import Path

import pytest

from addressvlm import InputError
from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.facts import Facts
from addressvlm.labels.prompt import FOLDER, configured_prompt, load_prompt
from tests.support.label_texts import FACTS

OURS = sorted(path.stem for path in FOLDER.glob("*.md"))


@pytest.mark.parametrize("name", OURS)
def test_ours_give_the_hint_and_fill_their_slots(name: str) -> None:
    prompt = load_prompt(name)
    text = prompt.user_message(FACTS, prompt.questions[0])
    assert (prompt.name, len(prompt.version), len(prompt.questions)) == (name, 12, 6)
    for part in ("Mill Street", "Harbour"):
        assert part in text
    assert "{" not in text + prompt.retry_message(["too short"])
    assert "too short" in prompt.retry_message(["too short"])
    if name not in ("alignment", "side_by_side"):
        assert "The main colours of the photo are red." in text


def test_grounded_says_all_facts_in_sentences() -> None:
    full = Facts(
        "Mill Street", "Harbour", ("Mill Street", "King Street"), "east-west", "oblique", "east", "King Street", 0, "east",
        ("red", "grey"), ("green",),
    )  # fmt: skip
    text = load_prompt("grounded").user_message(full, "")
    for part in (
        "The main colours of the photo are red and grey.\nThe camera faces east, at an angle to the street.\n"
        "The map bears the names Mill Street and King Street.\nMill Street runs east-west at the centre of the map.\n"
        "From above, the place is mainly green.\nKing Street meets Mill Street right at the camera.\n"
    ).splitlines():
        assert part in text
    assert "40 metres to the east" in load_prompt("grounded").user_message(FACTS, "")
    assert "Nothing was measured." in load_prompt("grounded").user_message(Facts("Mill Street", "Harbour"), "")


def test_the_version_is_of_the_content(tmp_path: Path) -> None:
    mine = tmp_path / "mine.md"
    mine.write_text((FOLDER / "alignment.md").read_text(encoding="utf-8"), encoding="utf-8")
    assert load_prompt(str(mine)).version == load_prompt("alignment").version
    other = tmp_path / "other.md"
    other.write_text(mine.read_text(encoding="utf-8").replace("35 to 80", "30 to 70"), encoding="utf-8")
    assert load_prompt(str(other)).version != load_prompt("alignment").version


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("{street}", "it", "lacks the hint: write {street}"),
        ("{district}", "there", "lacks the hint: write {district}"),
        ("{question}", "{questoin}", "unknown slot {questoin}"),
        ("slots: [street, district, question]", "slots: [street, district, question, sky]", "unknown slot {sky}"),
        ("slots: [street, district, question]", "slots: [street, district, question, facts]", "differ in facts"),
        ("{problems}", "this", "one slot {problems}"),
        ("{question}", "{question", "a brace that is no slot is written twice"),
        ("# again", "# once more", "must have the sections"),
        ("# again", "# later", "must have the sections"),
        ("---\n", "", "front matter"),
        ("image: needed", "image: sometimes", "front matter.*image"),
        ("image: needed", "image: [", "front matter is not YAML"),
        ("claims: free", "colour: red", "front matter"),
    ],
)
def test_a_prompt_file_that_cannot_be_used(tmp_path: Path, old: str, new: str, says: str) -> None:
    mine = tmp_path / "mine.md"
    mine.write_text((FOLDER / "alignment.md").read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(InputError, match=f"(?s)mine.md.*{says}"):
        load_prompt(str(mine))


@pytest.mark.parametrize("source", ["alignmnet", "nowhere/mine.md"])
def test_no_such_prompt(source: str) -> None:
    with pytest.raises(InputError, match=f"no prompt '{source}'.*alignment, grounded, .*reasoning"):
        load_prompt(source)


def test_a_prompt_that_needs_what_is_not_sent_or_is_in_another_language() -> None:
    with pytest.raises(InputError, match=r"needs the image.*labels\.send_image"):
        configured_prompt(LabelsConfig(labeler="openai", send_image=False))
    with pytest.raises(InputError, match=r"labels\.language"):
        configured_prompt(LabelsConfig(labeler="openai", prompt="grounded", language="de"))
    assert configured_prompt(LabelsConfig(labeler="openai", language="de")).name == "alignment"


def test_each_slot_holds_its_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.md"
    text = (FOLDER / "alignment.md").read_text(encoding="utf-8")
    head, _, body = text.partition("# user\n")
    user = "S={street} D={district} C={city} Q={question} F={facts}\n\n# again\n{problems}\n"
    slots = "slots: [street, district, question, city, facts]"
    mine.write_text(f"{head}# user\n{user}".replace("slots: [street, district, question]", slots), encoding="utf-8")
    prompt = load_prompt(str(mine))
    facts = Facts("Mill Street", "Harbour", sky="wide", city="Alderbrook")
    assert prompt.user_message(facts, "Where?") == "S=Mill Street D=Harbour C=Alderbrook Q=Where? F=The sky is wide."
    assert prompt.user_message(Facts("A", "B"), "?").startswith("S=A D=B C=not named Q=? F=Nothing")
    assert prompt.retry_message(["one", "two"]) == "one; two"
    assert body


def test_an_example_without_its_answer(tmp_path: Path) -> None:
    text = Path(FOLDER, "grounded_small.md").read_text(encoding="utf-8")
    (tmp_path / "mine.md").write_text(text.replace("# answer\n", ""), encoding="utf-8")
    with pytest.raises(InputError, match="example and # answer go together"):
        load_prompt(str(tmp_path / "mine.md"))
