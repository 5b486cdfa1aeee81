"""python -m pytest tests/test_facts.py"""

from pathlib import Path

import pytest
from PIL import Image

from addressvlm.config import TilesConfig
from addressvlm.labels.colours import colour_word, photo_colours
from addressvlm.labels.facts import Facts, compass, facts_of, photo_facts
from addressvlm.maps.tiles import TileRenderer
from tests import town


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


def test_a_photo_alone_tells_colours_sky_and_greenery() -> None:
    photo = Image.new("RGB", (90, 90), (90, 150, 250))
    photo.paste((200, 30, 30), (0, 30, 90, 60))
    photo.paste((60, 140, 60), (0, 60, 90, 90))
    facts = photo_facts("Mill Street", "Harbour", photo, "Alderbrook")
    assert facts == Facts(
        "Mill Street", "Harbour", photo_colours=("red",), city="Alderbrook", sky="wide", greenery="much"
    )  # fmt: skip
    wall = photo_facts("Mill Street", "Harbour", Image.new("RGB", (90, 90), (200, 30, 30)))
    assert (wall.sky, wall.greenery) == ("hidden", "little")
