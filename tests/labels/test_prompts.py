import base64
import io
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from addressvlm import InputError
from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.facts import Facts
from addressvlm.labels.label_rows import label_batch
from addressvlm.labels.labelers import Label, Request, RetryState, state_factory, template_label
from addressvlm.labels.prompt import FOLDER, configured_prompt, load_prompt
from tests.labels.test_validator import FACTS, GOOD

OURS = sorted(path.stem for path in FOLDER.glob("*.md"))


def image(side: int = 64, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((side, side // 2)).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def begin(facts: Facts = FACTS, data: bytes = b"", **settings: object) -> RetryState:
    config = LabelsConfig(labeler="openai", model="m", **settings)
    return state_factory(config, 0)(Request("row", data or image(), facts))


def sent(data: bytes, **settings: object) -> tuple[str, Image.Image]:
    """The image of a request: its media type, and as the other side decodes it."""
    content = begin(data=data, **settings).messages()[1]["content"]
    head, _, body = content[0]["image_url"]["url"].partition(",")
    return head, Image.open(io.BytesIO(base64.b64decode(body)))


# Prompt files


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


# Attempts


def test_a_good_text_is_taken() -> None:
    row = begin()
    system, user = row.messages()
    picture, text = user["content"]
    assert (system["role"], user["role"], picture["type"]) == ("system", "user", "image_url")
    assert picture["image_url"] == {"url": "data:image/jpeg;base64," + base64.b64encode(image()).decode()}
    assert "Mill Street in Harbour" in text["text"]
    assert row.add_answer(f" {GOOD}\n") == Label(row.question, GOOD, "openai:m", 1)


def test_a_bad_text_is_asked_again_with_the_reason_then_the_template_steps_in() -> None:
    row = begin(max_attempts=3)
    first = row.messages()
    bad = GOOD.replace("Mill Street", "some street")
    assert row.add_answer(bad) is None
    again = row.messages()
    assert again[:2] == first
    assert again[2] == {"role": "assistant", "content": bad}
    assert "does not name the street Mill Street" in again[3]["content"]
    assert row.add_answer("Too short.") is None
    assert [m["content"] for m in row.messages()[2:3]] == ["Too short."]
    label = row.add_answer(GOOD.replace("Harbour", "town"))
    assert label is not None
    assert (label.source, label.attempts, label.question) == ("fallback:template", 3, row.question)
    assert label.problems[0] == "street"
    assert label.problems[-1] == "district"
    assert row.validator.problems(label.text, FACTS) == []


def test_a_small_model_sees_an_example_and_not_what_it_wrote() -> None:
    row = begin(send_image=False, prompt="grounded_small")
    roles = [message["role"] for message in row.messages()]
    assert roles == ["system", "user", "assistant", "user"]
    first = row.messages()[-1]["content"]
    assert row.add_answer("The the the.") is None
    again = row.messages()
    assert [message["role"] for message in again] == roles
    assert again[-1]["content"].endswith(first)
    assert "does not name the street Mill Street" in again[-1]["content"]
    assert "The the the." not in str(again)


def test_refusals_and_empty_answers_are_counted_and_asked_again_afresh() -> None:
    row = begin(max_attempts=4)
    first = row.messages()
    assert row.add_answer(None, refusal="not allowed") is None
    assert row.add_answer("  ") is None
    assert row.add_answer(None) is None
    assert row.messages() == first
    label = row.add_answer(GOOD)
    assert label == Label(row.question, GOOD, "openai:m", 4, ("refused", "empty", "empty"))


def test_after_a_refusal_a_bad_text_of_before_is_not_shown_again() -> None:
    row = begin(max_attempts=4)
    first = row.messages()
    assert row.add_answer(GOOD.replace("Harbour", "town")) is None
    assert row.messages() != first
    assert row.add_answer(None) is None
    assert row.messages() == first
    assert row.add_answer(GOOD) == Label(row.question, GOOD, "openai:m", 3, ("district", "empty"))


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_a_row_is_asked_as_often_as_the_settings_say(attempts: int) -> None:
    row = begin(max_attempts=attempts)
    labels = [row.add_answer("no") for _ in range(attempts)]
    assert labels[:-1] == [None] * (attempts - 1)
    last = labels[-1]
    assert last is not None
    assert (last.source, last.attempts, row.attempts) == ("fallback:template", attempts, attempts)


def test_a_row_has_one_question_and_one_template_whoever_writes() -> None:
    prompt = load_prompt("alignment")
    questions = set()
    for number in range(12):
        request = Request(f"row{number}", image(), FACTS)
        row = state_factory(LabelsConfig(labeler="openai", model="m", max_attempts=1), seed=4)(request)
        spare = template_label(request, prompt, 4)
        assert row.question == spare.question
        fallen = row.add_answer(None)
        assert fallen is not None
        assert (fallen.question, fallen.text) == (spare.question, spare.text)
        assert (spare.question, spare.text) != (
            template_label(request, prompt, 5).question,
            template_label(request, prompt, 5).text,
        )
        questions.add(row.question)
    assert len(questions) > 2


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


def test_the_answers_alone_decide() -> None:
    answers = ["no", None, GOOD]
    labels = []
    for _ in range(2):
        row = begin()
        labels.append([row.add_answer(answer) for answer in answers][-1])
    assert labels[0] == labels[1]


def test_without_the_image_only_text_is_sent() -> None:
    row = begin(data=b"never looked at", send_image=False, prompt="grounded")
    assert [type(m["content"]) for m in row.messages()] == [str, str]


def test_a_folder_of_this_machine_is_not_told(tmp_path: Path) -> None:
    label = begin(max_attempts=1).add_answer(GOOD)
    assert label is not None
    config = LabelsConfig(labeler="local", model=str(tmp_path))
    label = state_factory(config)(Request("row", image(), FACTS)).add_answer(GOOD)
    assert label is not None
    assert label.source == f"local:{tmp_path.name}"


def test_the_image_is_changed_only_if_the_settings_ask() -> None:
    assert sent(image(64), image_pixels=64)[1].tobytes() == Image.open(io.BytesIO(image(64))).tobytes()
    assert sent(image(64), image_pixels=32)[1].size == (32, 16)
    assert len(sent(image(64), image_quality=30)[1].fp.read()) < len(image(64))
    assert sent(image(64, "PNG"))[0] == "data:image/png;base64"
    assert sent(image(64, "BMP"))[0] == "data:image/jpeg;base64"
    picture = begin(image_detail="low").messages()[1]["content"][0]["image_url"]
    assert picture["detail"] == "low"


def test_a_turned_photo_is_sent_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    kind, picture = sent(image(64, exif=exif))
    assert (kind, picture.size) == ("data:image/jpeg;base64", (32, 64))
    assert ImageOps.exif_transpose(picture).size == (32, 64)


@pytest.mark.parametrize("data", [b"<html>", b"", image()[:60]])
def test_an_image_that_is_none(data: bytes) -> None:
    row = state_factory(LabelsConfig(labeler="openai", image_pixels=32))(Request("row 7", data, FACTS))
    with pytest.raises(InputError, match="image of row row 7 can't be decoded"):
        row.messages()


# Rows


def rounds(row: dict[str, object], **settings: object) -> list[dict[str, object]]:
    made = label_batch(LabelsConfig(**settings).model_dump_json(), 0, "no gazetteer", "", [row])
    return made.tables["train"][0]["rounds"]


def test_a_conversation_may_begin_with_a_stage_2_question_and_holds_no_hint() -> None:
    graft = {"id": "1", "place": "p", "street": FACTS.street, "district": FACTS.district, "facts": FACTS.to_json()}
    graft["image"] = {"bytes": image(), "path": None}
    plain, asked = rounds(graft), rounds(graft, ask_address=True)
    assert [(r["level"], r["kind"]) for r in plain] == [("alignment", "explanation")]
    assert plain[0]["question"] in load_prompt("alignment").questions
    assert [(r["level"], r["kind"], r["answer"]) for r in asked[:1]] == [("address", "generation", "Mill Street, Harbour")]
    assert asked[1:] == plain


def test_each_row_gets_its_own_label_and_what_cannot_be_decoded_is_told() -> None:
    streets = ["Mill Street", "Elm Road", "Castle Hill"]
    rows = [
        {
            "id": street, "place": f"place of {street}", "street": street, "district": "Harbour",
            "facts": Facts(street, "Harbour").to_json(), "image": {"bytes": image(), "path": f"{street}.jpg"},
        }
        for street in streets
    ]  # fmt: skip
    broken = {**rows[0], "id": "broken", "image": {"bytes": b"<html>", "path": "broken.jpg"}}
    made = label_batch(LabelsConfig().model_dump_json(), 0, "no gazetteer", "", [rows[0], broken, *rows[1:]])
    found = made.tables["train"]
    assert [(row["id"], row["place"]) for row in found] == [(street, f"place of {street}") for street in streets]
    assert all(row["street"] in row["rounds"][-1]["answer"] for row in found)
    assert [(row["source"], row["attempts"]) for row in found] == [("template", 1)] * 3
    assert not any({"facts", "names"} & row.keys() for row in found)
    assert [(reject["file"], reject["id"]) for reject in made.rejects] == [("broken.jpg", "broken")]
    assert made.counts == {"source template": 3}


def test_reasoning_labels_are_of_the_photo_alone() -> None:
    photo = {"id": "1", "place": "p", "street": FACTS.street, "district": FACTS.district}
    photo["image"] = {"bytes": image(), "path": None}
    (told,) = rounds(photo, prompt="reasoning")
    assert (told["level"], told["kind"]) == ("reasoning", "explanation")
    assert told["question"] in load_prompt("reasoning").questions
    assert "Mill Street" in told["answer"]
    assert "map" not in told["answer"]
