"""What small language models need of prompts and checks"""

from pathlib import Path

import pytest

from addressvlm import InputError
from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.facts import Facts
from addressvlm.labels.labelers import Request, state_factory
from addressvlm.labels.prompt import FOLDER, load_prompt

FACTS = Facts(
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
GOOD = (
    "In the photo the main colour is red. The camera faces east, along the street. On the map Mill Street and Silver Street "
    "can be read. Mill Street runs east-west at the centre. King Street meets it about 40 metres to the east. So this is Mill "
    "Street in Harbour."
)
CONFIG = LabelsConfig(labeler="openai", prompt="grounded_small", send_image=False, base_url="http://localhost/v1")


def test_the_example_comes_before_the_question_and_a_refused_text_never_again() -> None:
    row = state_factory(CONFIG)(Request("a", b"", FACTS))
    first = row.messages()
    assert [message["role"] for message in first] == ["system", "user", "assistant", "user"]
    assert "King Street meets Mill Street 40 metres to the east" in first[-1]["content"]
    bad = GOOD.replace("King Street", "Mill Street")
    assert row.add_answer(bad) is None
    second = row.messages()
    assert second[:-1] == first[:-1]
    assert second[-1]["content"].endswith(first[-1]["content"])
    assert "Mill Street is met by no other street than itself" in second[-1]["content"]
    assert bad not in str(second)
    label = row.add_answer(GOOD)
    assert label is not None
    assert (label.source, label.attempts) == ("openai:gpt-4o-mini", 2)


@pytest.mark.parametrize(
    "sentence",
    ["Mill Street meets it about 40 metres to the east.", "Mill Street meets 40 metres to the east.", "Mill Street meets it."],
)
def test_no_street_meets_itself(sentence: str) -> None:
    row = state_factory(CONFIG.model_copy(update={"max_attempts": 1}))(Request("a", b"", FACTS))
    label = row.add_answer(GOOD.replace("King Street meets it about 40 metres to the east.", sentence))
    assert label is not None
    assert (label.source, "crossing" in label.problems) == ("fallback:template", True)


@pytest.mark.parametrize("talk", ["That text can be rephrased in other words.", "The name of the district is not mentioned."])
def test_talk_about_the_text_is_refused(talk: str) -> None:
    row = state_factory(CONFIG.model_copy(update={"max_attempts": 1}))(Request("a", b"", FACTS))
    label = row.add_answer(f"{talk} {GOOD}")
    assert label is not None
    assert "told" in label.problems


def test_an_example_without_its_answer(tmp_path: Path) -> None:
    text = Path(FOLDER, "grounded_small.md").read_text(encoding="utf-8")
    (tmp_path / "mine.md").write_text(text.replace("# answer\n", ""), encoding="utf-8")
    with pytest.raises(InputError, match="example and # answer go together"):
        load_prompt(str(tmp_path / "mine.md"))
