"""python -m pytest tests/test_labels.py"""

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from addressvlm import InputError
from addressvlm.config import TilesConfig
from addressvlm.config_labels import LabelsConfig
from addressvlm.labels import Request, make_labeler
from addressvlm.labels.checks import Checker, Names
from addressvlm.labels.colours import colour_word, photo_colours
from addressvlm.labels.facts import COMPASS, DIRECTIONS, Facts, compass, facts_of
from addressvlm.labels.prompt import load_prompt
from addressvlm.labels.rows import label_rows
from addressvlm.labels.template import QUESTIONS, explain
from addressvlm.maps.tiles import TileRenderer
from addressvlm.names import normal
from tests import town
from tests.endpoint import Endpoint, refuses, says

FACTS = Facts("Mill Street", "Harbour", ("Mill Street", "King Street"), "east-west", "along", "east", "King Street", 40, "east")
GOOD = (
    "A row of red brick houses stands on the left and the camera looks along the road. On the map King Street meets the "
    "street a little to the east. This is Mill Street in Harbour."
)


# Facts


def test_facts_of_a_known_place(tmp_path: Path) -> None:
    renderer = TileRenderer(town.write_streets(tmp_path / "s.geojson"), None, TilesConfig())
    here = town.degrees(0, -5)
    photo = Image.new("RGB", (60, 40), (200, 30, 30))
    tile = renderer.tile(*here, street="Mill Street")
    facts = facts_of("Mill Street", "Harbour", *here, 85.0, photo, tile, renderer.roads, imagery=False)
    assert facts == Facts(
        street="Mill Street",
        district="Harbour",
        names=("Mill Street", "King Street"),
        direction="east-west",
        view="along",
        facing="east",
        cross_street="King Street",
        cross_distance_m=40,
        cross_direction="east",
        photo_colours=("red",),
        tile_colours=(),
    )
    assert Facts.from_json(facts.to_json()) == facts
    blind = facts_of("mill st", "Harbour", *here, None, photo, tile, renderer.roads, imagery=False)
    assert (blind.view, blind.facing) == (None, None)
    assert blind.direction == "east-west"  # the street is found under another spelling
    stranger = facts_of("Elm Road", "Harbour", *here, 85.0, photo, tile, renderer.roads, imagery=False)
    assert (stranger.direction, stranger.view, stranger.cross_street) == (None, None, None)


@pytest.mark.parametrize(
    ("heading", "view"), [(90, "along"), (270, "along"), (0, "across"), (180, "across"), (45, "oblique"), (359.9, "across")]
)
def test_view_relative_to_the_street(tmp_path: Path, heading: float, view: str) -> None:
    renderer = TileRenderer(town.write_streets(tmp_path / "s.geojson"), None, TilesConfig())
    tile = renderer.tile(*town.degrees(0, 0))
    photo = Image.new("RGB", (8, 8))
    facts = facts_of("Mill Street", "Harbour", *town.degrees(0, 0), heading, photo, tile, renderer.roads)
    assert facts.view == view


def test_compass_words() -> None:
    assert [compass(d) for d in (0, 44, 90, 135, 181, 270, 337.5, 359, -90)] == [
        "north", "northeast", "east", "southeast", "south", "west", "north", "north", "west",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rgb", "word"),
    [
        ((200, 20, 20), "red"), ((240, 130, 20), "orange"), ((120, 75, 40), "brown"), ((235, 215, 170), "cream"),
        ((230, 210, 40), "yellow"), ((60, 140, 60), "green"), ((60, 90, 170), "blue"), ((130, 130, 128), "grey"),
        ((250, 250, 250), "white"), ((20, 20, 25), "dark"), ((120, 50, 160), "purple"),
    ],
)  # fmt: skip
def test_colour_words(rgb: tuple[int, int, int], word: str) -> None:
    assert colour_word(*rgb) == word


def test_photo_colours_are_those_of_the_buildings() -> None:
    photo = Image.new("RGB", (90, 90), (90, 150, 250))  # sky
    photo.paste((70, 70, 70), (0, 60, 90, 90))  # road
    photo.paste((200, 30, 30), (0, 20, 60, 60))
    photo.paste((230, 210, 40), (60, 20, 90, 60))
    assert photo_colours(photo) == ["red", "yellow"]
    photo.paste((90, 150, 250), (0, 0, 50, 60))  # more sky than anything: it is no building
    assert photo_colours(photo) == ["yellow", "red"]
    assert photo_colours(Image.new("RGB", (9, 9), (250, 250, 255))) == []


# Template

NAMES = st.sampled_from(["Mill Street", "King Street", "Rue de l'Évêché", "St. Mary's Passage", "Hint Street", "5th Avenue"])
MAYBE_FACTS = st.builds(
    Facts,
    street=NAMES,
    district=st.sampled_from(["Harbour", "Old Town", "Saint Germain"]),
    names=st.lists(NAMES, unique=True, max_size=5).map(tuple),
    direction=st.none() | st.sampled_from(DIRECTIONS),
    view=st.none() | st.sampled_from(["along", "across", "oblique"]),
    facing=st.none() | st.sampled_from(COMPASS),
    cross_street=st.none() | st.just("Cross Lane"),
    cross_distance_m=st.sampled_from([0, 10, 90]),
    cross_direction=st.sampled_from(COMPASS),
    photo_colours=st.sampled_from([(), ("red",), ("red", "grey")]),
    tile_colours=st.sampled_from([(), ("green",), ("green", "red", "cream")]),
)


@settings(deadline=None)
@given(facts=MAYBE_FACTS, seed=st.integers(0, 1000))
def test_template_labels_pass_the_checks(facts: Facts, seed: int) -> None:
    text = explain(facts, random.Random(seed))
    problems = [p for p in Checker(["Elm Road"]).problems(text, facts) if "words" not in p]
    assert problems == []
    assert text == explain(facts, random.Random(seed))
    assert "None" not in text
    if facts.street not in facts.names and facts.direction:
        assert text.count(facts.street) == 1  # only the conclusion knows a name that can't be read


def test_template_varies_within_its_length() -> None:
    facts = Facts(**{**FACTS.__dict__, "photo_colours": ("red", "grey"), "tile_colours": ("green",)})
    texts = {explain(facts, random.Random(seed)) for seed in range(200)}
    assert len(texts) > 100
    assert all(35 <= len(text.split()) <= 70 for text in texts)


def test_template_labels_depend_on_the_row_alone() -> None:
    requests = [Request(str(i), b"", FACTS) for i in range(30)]
    labeler = make_labeler(LabelsConfig(), seed=3)
    labels = labeler.label(requests)
    assert labels == labeler.label(requests[::-1])[::-1]
    assert {label.question for label in labels} <= set(QUESTIONS)
    assert len({label.question for label in labels}) > 2
    assert {label.source for label in labels} == {"template"}
    assert labels != make_labeler(LabelsConfig(), seed=4).label(requests)


# Checks


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GOOD, None),
        (GOOD.replace("Mill Street", "mill st."), None),
        (GOOD.replace("This is", "Well-known sights, noted by visitors, say it: this is"), None),
        ("This is Mill Street in Harbour.", "words"),
        (GOOD * 6, "words"),
        (GOOD.replace("Mill Street", "a street"), "does not name the street"),
        (GOOD.replace("Harbour", "town"), "does not name the district"),
        (GOOD.replace("Mill Street", "Old Mill Street"), "does not name the street"),
        (GOOD + " So it must be King Street.", "does not conclude"),
        (GOOD + " So it must be Elm Road.", "does not conclude"),
        (GOOD.replace("This is", "This is not"), "denies"),
        (GOOD.replace("This is", "As the hint says, this is"), "told"),
        (GOOD.replace("This is", "According to the provided address this is"), "told"),
        (GOOD.replace("This is", "The address was given: this is"), "told"),
        ("I'm sorry, but I cannot help. " + GOOD, "told"),
    ],
)
def test_checks(text: str, problem: str | None) -> None:
    found = Checker(["Elm Road", "Old Mill Street"]).problems(text, FACTS)
    assert (found == []) if problem is None else any(problem in p for p in found), found


def test_abbreviations_do_not_end_a_sentence() -> None:
    facts = Facts("St. Mary's Passage", "Market")
    text = (
        "The tower of a church stands at the end of a narrow lane between pale walls. So this is St. Mary's Passage in Market."
    )
    assert Checker().problems(text, facts) == []


def test_longest_name_wins() -> None:
    names = Names(["Mill Street", "Old Mill Street"])
    assert names.mentions("From Old Mill Street to Mill St.") == [normal("Old Mill Street"), normal("Mill Street")]


# OpenAI-compatible endpoint


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with Endpoint(lambda n, body: says(GOOD)).running() as endpoint:
        yield endpoint


def requests(count: int = 1) -> list[Request]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return [Request(f"row{i}", buffer.getvalue(), FACTS) for i in range(count)]


def config(endpoint: Endpoint, **settings: Any) -> LabelsConfig:
    return LabelsConfig(labeler="openai", model="m", base_url=endpoint.url, **settings)


def test_openai_label(endpoint: Endpoint) -> None:
    labels = make_labeler(config(endpoint, concurrency=3)).label(requests(7))
    assert [(label.text, label.source, label.attempts) for label in labels] == [(GOOD, "openai:m", 1)] * 7
    assert len(endpoint.asked) == 7
    assert set(endpoint.keys) == {"Bearer sk-test"}
    picture, text = endpoint.asked[0]["messages"][1]["content"]
    assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    assert "Mill Street in Harbour" in text["text"]
    assert labels[0].question in [q for q in QUESTIONS if any(q in str(body) for body in endpoint.asked)]


def test_openai_waits_and_tries_again(endpoint: Endpoint) -> None:
    endpoint.reply = lambda n, body: [refuses(429, "slow down", Retry_After="0"), refuses(500, "oops"), says(GOOD)][n - 1]
    (label,) = make_labeler(config(endpoint)).label(requests())
    assert (label.source, label.attempts, len(endpoint.asked)) == ("openai:m", 1, 3)


@pytest.mark.parametrize(("status", "message"), [(401, "bad key"), (400, "no such parameter"), (404, "no such model")])
def test_openai_refusal_stops_at_once(endpoint: Endpoint, status: int, message: str) -> None:
    endpoint.reply = lambda n, body: refuses(status, message)
    with pytest.raises(InputError, match=f"{status}: {message}"):
        make_labeler(config(endpoint, concurrency=1)).label(requests(20))
    assert len(endpoint.asked) == 1


def test_openai_bad_label_is_asked_again_with_the_reason(endpoint: Endpoint) -> None:
    bad = GOOD.replace("Mill Street", "some street")
    endpoint.reply = lambda n, body: says(bad if n == 1 else GOOD)
    (label,) = make_labeler(config(endpoint)).label(requests())
    assert (label.text, label.source, label.attempts) == (GOOD, "openai:m", 2)
    first, second = endpoint.asked
    assert second["messages"][:2] == first["messages"]
    assert second["messages"][2] == {"role": "assistant", "content": bad}
    assert "does not name the street Mill Street" in second["messages"][3]["content"]


def test_openai_bad_labels_fall_back_to_the_template(endpoint: Endpoint) -> None:
    endpoint.reply = lambda n, body: says("I cannot tell.")
    (label,) = make_labeler(config(endpoint, attempts=2)).label(requests())
    assert (label.source, label.attempts, len(endpoint.asked)) == ("fallback:template", 2, 2)
    assert Checker().problems(label.text, FACTS) == []


def test_openai_endpoint_that_keeps_failing(endpoint: Endpoint) -> None:
    endpoint.reply = lambda n, body: refuses(503, "overloaded")
    labels = make_labeler(config(endpoint, retries=0)).label(requests(3))
    assert {label.source for label in labels} == {"fallback:template"}
    with pytest.raises(InputError, match=r"keeps failing.*503: overloaded"):
        make_labeler(config(endpoint, retries=0, concurrency=2)).label(requests(40))
    assert len(endpoint.asked) < 25


def test_openai_server_that_is_not_there(endpoint: Endpoint) -> None:
    gone = config(endpoint, retries=0).model_copy(update={"base_url": "http://127.0.0.1:9/v1"})
    with pytest.raises(InputError, match="keeps failing"):
        make_labeler(gone).label(requests(40))


def test_openai_key_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        make_labeler(LabelsConfig(labeler="openai"))


def test_prompt_has_its_slots() -> None:
    prompt = load_prompt()
    text = prompt.ask(FACTS, QUESTIONS[0])
    assert prompt.version
    for part in ("Mill Street", "Harbour", "King Street meets it 40 m to the east", QUESTIONS[0]):
        assert part in text
    assert "{" not in text
    assert "too short" in prompt.ask_again(["too short"])


def test_a_conversation_may_begin_with_a_stage_2_question(tmp_path: Path) -> None:
    graft = {"id": "1", "place": "p", "street": FACTS.street, "district": FACTS.district, "facts": FACTS.to_json()}
    graft["image"] = {"bytes": b"", "path": None}
    nowhere = str(tmp_path / "gazetteer.geojson")
    plain, asked = (
        label_rows(LabelsConfig(ask_address=ask).model_dump_json(), 0, nowhere, [graft])[0]["rounds"] for ask in (False, True)
    )
    assert [r["kind"] for r in plain] == ["explanation"]
    assert [(r["level"], r["kind"], r["answer"]) for r in asked[:1]] == [("address", "generation", "Mill Street, Harbour")]
    assert asked[1:] == plain
