import io

from PIL import Image

from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.facts import Facts
from addressvlm.labels.label_rows import label_batch
from addressvlm.labels.prompt import load_prompt
from tests.support.label_texts import FACTS


def image(side: int = 64, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((side, side // 2)).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


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
    assert "Mill Street" in label["answer"]
    assert "map" not in label["answer"]
