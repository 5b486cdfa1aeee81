"""The states of a row, its cache key, and labels by templates."""

import base64
import io
import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from addressvlm import InputError
from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.facts import Facts
from addressvlm.labels.labelers import Label, Request, RetryState, label_batch, make_labeler, state_factory, template_label
from addressvlm.labels.prompt import load_prompt
from tests.support.label_requests import requests
from tests.support.label_texts import FACTS, GOOD, random_facts


def image(side: int = 64, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((side, side // 2)).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def new_state(facts: Facts = FACTS, data: bytes = b"", **settings: object) -> RetryState:
    config = LabelsConfig(labeler="openai", model="m", **settings)
    return state_factory(config, 0)(Request("row", data or image(), facts))


def sent(data: bytes, **settings: object) -> tuple[str, Image.Image]:
    """The image of a request: its media type, and as the other side decodes it."""
    content = new_state(data=data, **settings).messages()[1]["content"]
    head, _, body = content[0]["image_url"]["url"].partition(",")
    return head, Image.open(io.BytesIO(base64.b64decode(body)))


def test_a_good_text_is_taken() -> None:
    row = new_state()
    system, user = row.messages()
    picture, text = user["content"]
    assert (system["role"], user["role"], picture["type"]) == ("system", "user", "image_url")
    assert picture["image_url"] == {"url": "data:image/jpeg;base64," + base64.b64encode(image()).decode()}
    assert "Mill Street in Harbour" in text["text"]
    assert row.add_answer(f" {GOOD}\n") == Label(row.question, GOOD, "openai:m", 1)


def test_a_bad_text_is_retried_with_the_reason_then_the_template_is_used() -> None:
    row = new_state(max_attempts=3)
    first = row.messages()
    bad = GOOD.replace("Mill Street", "some street")
    assert row.add_answer(bad) is None
    second = row.messages()
    assert second[:2] == first
    assert second[2] == {"role": "assistant", "content": bad}
    assert "does not name the street Mill Street" in second[3]["content"]
    assert row.add_answer("Too short.") is None
    assert [m["content"] for m in row.messages()[2:3]] == ["Too short."]
    label = row.add_answer(GOOD.replace("Harbour", "town"))
    assert label is not None
    assert (label.source, label.attempts, label.question) == ("fallback:template", 3, row.question)
    assert label.problems[0] == "street"
    assert label.problems[-1] == "district"
    assert row.validator.problems(label.text, FACTS) == []


def test_a_small_model_sees_an_example_and_not_what_it_wrote() -> None:
    row = new_state(send_image=False, prompt="grounded_small")
    roles = [message["role"] for message in row.messages()]
    assert roles == ["system", "user", "assistant", "user"]
    first = row.messages()[-1]["content"]
    assert row.add_answer("The the the.") is None
    second = row.messages()
    assert [message["role"] for message in second] == roles
    assert second[-1]["content"].endswith(first)
    assert "does not name the street Mill Street" in second[-1]["content"]
    assert "The the the." not in str(second)


def test_refusals_and_empty_answers_are_counted_and_retried() -> None:
    row = new_state(max_attempts=4)
    first = row.messages()
    assert row.add_answer(None, refusal="not allowed") is None
    assert row.add_answer("  ") is None
    assert row.add_answer(None) is None
    assert row.messages() == first
    label = row.add_answer(GOOD)
    assert label == Label(row.question, GOOD, "openai:m", 4, ("refused", "empty", "empty"))


def test_after_a_refusal_a_bad_text_of_before_is_not_shown_again() -> None:
    row = new_state(max_attempts=4)
    first = row.messages()
    assert row.add_answer(GOOD.replace("Harbour", "town")) is None
    assert row.messages() != first
    assert row.add_answer(None) is None
    assert row.messages() == first
    assert row.add_answer(GOOD) == Label(row.question, GOOD, "openai:m", 3, ("district", "empty"))


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_a_row_has_as_many_attempts_as_the_settings_say(attempts: int) -> None:
    row = new_state(max_attempts=attempts)
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
        fallback = row.add_answer(None)
        assert fallback is not None
        assert (fallback.question, fallback.text) == (spare.question, spare.text)
        assert (spare.question, spare.text) != (
            template_label(request, prompt, 5).question,
            template_label(request, prompt, 5).text,
        )
        questions.add(row.question)
    assert len(questions) > 2


def test_the_answers_alone_decide() -> None:
    answers = ["no", None, GOOD]
    labels = []
    for _ in range(2):
        row = new_state()
        labels.append([row.add_answer(answer) for answer in answers][-1])
    assert labels[0] == labels[1]


def test_without_the_image_only_text_is_sent() -> None:
    row = new_state(data=b"never looked at", send_image=False, prompt="grounded")
    assert [type(m["content"]) for m in row.messages()] == [str, str]


def test_a_source_does_not_show_the_path_of_a_model(tmp_path: Path) -> None:
    label = new_state(max_attempts=1).add_answer(GOOD)
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
    picture = new_state(image_detail="low").messages()[1]["content"][0]["image_url"]
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


SMALL_FACTS = Facts(
    "Mill Street",
    "Harbour",
    ("Mill Street", "Silver Street"),
    "east-west",
    "along",
    "east",
    "King Street",
    40,
    "east",
    ("red",),
)


SMALL_GOOD = (
    "In the photo the main colour is red. The camera faces east, along the street. On the map Mill Street and Silver Street "
    "can be read. Mill Street runs east-west at the centre. King Street meets it about 40 metres to the east. So this is Mill "
    "Street in Harbour."
)


CONFIG = LabelsConfig(labeler="openai", prompt="grounded_small", send_image=False, base_url="http://localhost/v1")


def test_the_example_comes_before_the_question_and_a_refused_text_never_again() -> None:
    row = state_factory(CONFIG)(Request("a", b"", SMALL_FACTS))
    first = row.messages()
    assert [message["role"] for message in first] == ["system", "user", "assistant", "user"]
    assert "King Street meets Mill Street 40 metres to the east" in first[-1]["content"]
    bad = SMALL_GOOD.replace("King Street", "Mill Street")
    assert row.add_answer(bad) is None
    second = row.messages()
    assert second[:-1] == first[:-1]
    assert second[-1]["content"].endswith(first[-1]["content"])
    assert "Mill Street is met by no other street than itself" in second[-1]["content"]
    assert bad not in str(second)
    label = row.add_answer(SMALL_GOOD)
    assert label is not None
    assert (label.source, label.attempts) == ("openai:gpt-4o-mini", 2)


@pytest.mark.parametrize(
    "sentence",
    ["Mill Street meets it about 40 metres to the east.", "Mill Street meets 40 metres to the east.", "Mill Street meets it."],
)
def test_no_street_meets_itself(sentence: str) -> None:
    row = state_factory(CONFIG.model_copy(update={"max_attempts": 1}))(Request("a", b"", SMALL_FACTS))
    label = row.add_answer(SMALL_GOOD.replace("King Street meets it about 40 metres to the east.", sentence))
    assert label is not None
    assert (label.source, "crossing" in label.problems) == ("fallback:template", True)


@pytest.mark.parametrize("talk", ["That text can be rephrased in other words.", "The name of the district is not mentioned."])
def test_talk_about_the_text_is_refused(talk: str) -> None:
    row = state_factory(CONFIG.model_copy(update={"max_attempts": 1}))(Request("a", b"", SMALL_FACTS))
    label = row.add_answer(f"{talk} {SMALL_GOOD}")
    assert label is not None
    assert "told" in label.problems


# Settings of a labeler that change what an answer may be, each with another value.
SHAPING = {
    "labeler": "vllm",
    "prompt": "grounded",
    "model": "n",
    "base_url": "http://h/v1",
    "send_image": False,
    "image_pixels": 64,
    "image_quality": 60,
    "image_detail": "high",
    "language": "de",
    "temperature": 0.5,
    "max_tokens": 99,
    "extra_body": {"top_p": 0.5},
}


def test_every_setting_that_shapes_an_answer_is_part_of_the_cache_key_and_no_other(tmp_path: Path) -> None:
    """A new setting must be put into SHAPING here, or into the test's list of those that change no answer."""
    row, config = requests(1)[0], LabelsConfig(labeler="openai", model="m")
    plain = state_factory(config)(row).request_key()
    others = {
        "words": (9, 99), "distance_tolerance": 0.5, "ask_address": True, "concurrency": 9, "max_attempts": 9, "timeout_s": 9.0,
        "retries": 9, "requests_per_minute": 9.0, "tokens_per_minute": 9.0, "budget_tokens": 9, "budget_usd": 9.0,
        "usd_per_million_in": 9.0, "usd_per_million_out": 9.0, "image_rule": "fixed", "image_base": 9, "image_each": 9.0,
        "workers": 9, "cpus_per_worker": 9.0, "gpus_per_worker": 9.0, "batch_size": 9, "dtype": "float32",
        "tensor_parallel": 9, "vllm_python": "python9", "vllm_arguments": ["--seed=9"], "vllm_start_s": 9.0,
    }  # fmt: skip
    assert SHAPING.keys() | others.keys() == LabelsConfig.model_fields.keys()
    start = state_factory(config)
    for changes in (SHAPING, others):
        for key, value in changes.items():
            changed = config.model_copy(update={key: value})
            new_state = start if key in ("send_image", "language") else state_factory(changed)  # the prompt would refuse them
            row_of = new_state(row)
            row_of.config = changed
            assert (row_of.request_key().cache_key() == plain.cache_key()) == (changes is others), key
    nested = [config.model_copy(update={"extra_body": {"response_format": {"type": kind}}}) for kind in ("text", "json_object")]
    assert len({state_factory(c)(row).request_key().cache_key() for c in nested}) == 2


def test_another_row_image_fact_or_question_is_another_request() -> None:
    row, config = requests(1)[0], LabelsConfig(labeler="openai", model="m", prompt="grounded")
    new_state = state_factory(config)
    changed = [
        replace(row, id="other"),
        replace(row, image=row.image + b"x"),
        replace(row, facts=replace(row.facts, facing="west")),
    ]
    assert len({new_state(r).request_key().cache_key() for r in [row, *changed]}) == 4
    named = LabelsConfig(labeler="openai", model="m")  # its prompt holds the question
    of_question = {s.question: s.request_key().cache_key() for s in (state_factory(named, seed)(row) for seed in range(9))}
    assert len(set(of_question.values())) == len(of_question) > 1


def test_models_of_one_name_in_two_folders_are_two_and_a_server_of_ours_may_move(tmp_path: Path) -> None:
    row = requests(1)[0]

    def digest(**settings: str) -> tuple[str, str]:
        key = state_factory(LabelsConfig(labeler="vllm", **settings))(row).request_key()  # type: ignore[arg-type]
        return key.model, key.settings

    first, second = digest(model="/a/small"), digest(model="/b/small")
    assert first[0] == second[0] == "vllm:small"
    assert first[1] != second[1]
    assert digest(model="/a/small", base_url="http://127.0.0.1:9/v1") == first
    assert digest(model="owner/small")[0] == "vllm:owner/small"


def test_labels_depend_on_the_row_alone() -> None:
    rng = random.Random(0)
    requests = [Request(str(i), b"", random_facts(rng)) for i in range(30)]
    labeler = make_labeler(LabelsConfig(), seed=3)
    labels = labeler.label(requests)
    assert labels == labeler.label(requests[::-1])[::-1]
    assert {label.question for label in labels} <= set(load_prompt().questions)
    assert len({label.question for label in labels}) > 2
    assert {label.source for label in labels} == {"template"}
    assert labels != make_labeler(LabelsConfig(), seed=4).label(requests)


def rounds(row: dict[str, object], **settings: object) -> list[dict[str, object]]:
    result = label_batch(LabelsConfig(**settings).model_dump_json(), 0, "no gazetteer", "", [row])
    return result.tables["train"][0]["rounds"]


def test_a_conversation_may_begin_with_a_stage_2_question_and_holds_no_hint() -> None:
    graft = {"id": "1", "place": "p", "street": FACTS.street, "district": FACTS.district, "facts": FACTS.to_json()}
    graft["image"] = {"bytes": image(), "path": None}
    plain, with_address = rounds(graft), rounds(graft, ask_address=True)
    assert [(r["level"], r["kind"]) for r in plain] == [("alignment", "explanation")]
    assert plain[0]["question"] in load_prompt("alignment").questions
    first = with_address[0]
    assert (first["level"], first["kind"], first["answer"]) == ("address", "generation", "Mill Street, Harbour")
    assert with_address[1:] == plain


def test_each_row_gets_its_own_label_and_what_cannot_be_decoded_is_rejected() -> None:
    streets = ["Mill Street", "Elm Road", "Castle Hill"]
    rows = [
        {
            "id": street, "place": f"place of {street}", "street": street, "district": "Harbour",
            "facts": Facts(street, "Harbour").to_json(), "image": {"bytes": image(), "path": f"{street}.jpg"},
        }
        for street in streets
    ]  # fmt: skip
    broken = {**rows[0], "id": "broken", "image": {"bytes": b"<html>", "path": "broken.jpg"}}
    result = label_batch(LabelsConfig().model_dump_json(), 0, "no gazetteer", "", [rows[0], broken, *rows[1:]])
    labels = result.tables["train"]
    assert [(row["id"], row["place"]) for row in labels] == [(street, f"place of {street}") for street in streets]
    assert all(row["street"] in row["rounds"][-1]["answer"] for row in labels)
    assert [(row["source"], row["attempts"]) for row in labels] == [("template", 1)] * 3
    assert not any({"facts", "names"} & row.keys() for row in labels)
    assert [(reject["file"], reject["id"]) for reject in result.rejects] == [("broken.jpg", "broken")]
    assert result.counts == {"source template": 3}


def test_reasoning_labels_are_of_the_photo_alone() -> None:
    photo = {"id": "1", "place": "p", "street": FACTS.street, "district": FACTS.district}
    photo["image"] = {"bytes": image(), "path": None}
    (label,) = rounds(photo, prompt="reasoning")
    assert (label["level"], label["kind"]) == ("reasoning", "explanation")
    assert label["question"] in load_prompt("reasoning").questions
    assert "Mill Street" not in label["answer"]  # reasons of GeoReasoner are of the district (paper 001, App. D)
    assert "Harbour" in label["answer"]
    assert "map" not in label["answer"]
