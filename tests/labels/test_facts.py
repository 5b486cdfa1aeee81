import json
import math
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyproj
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from addressvlm.config import TilesConfig
from addressvlm.labels.facts import (
    GREENERY,
    SKY,
    Facts,
    _step,
    colour_word,
    compass,
    graft_facts,
    green_share,
    photo_colours,
    photo_facts,
    sky_share,
    tile_colours,
)
from addressvlm.labels.lexicon import COLOURS, COMPASS, DIRECTIONS
from addressvlm.labels.templates import explain, reason
from addressvlm.labels.validator import LabelValidator
from addressvlm.tiles.renderer import TileRenderer
from addressvlm.tools.label_diversity import distinct_n
from tests.support import town
from tests.support.label_texts import DISTRICTS, STREETS, random_facts


def test_facts_of_a_known_place(tmp_path: Path) -> None:
    renderer = TileRenderer(town.write_streets(tmp_path / "s.geojson"), None, TilesConfig())
    here = town.degrees(0, -5)
    photo = Image.new("RGB", (60, 40), (200, 30, 30))
    tile = renderer.tile(*here, street="Mill Street")
    facts = graft_facts("Mill Street", "Harbour", *here, 85.0, photo, tile, renderer.roads, imagery=False)
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
    blind = graft_facts("mill st", "Harbour", *here, None, photo, tile, renderer.roads, imagery=False)
    assert (blind.view, blind.facing) == (None, None)
    assert blind.direction == "east-west"  # the map spells the street differently
    stranger = graft_facts("Elm Road", "Harbour", *here, 85.0, photo, tile, renderer.roads, imagery=False)
    assert (stranger.direction, stranger.view, stranger.cross_street) == (None, None, None)


@pytest.mark.parametrize(
    ("heading", "view"), [(90, "along"), (270, "along"), (0, "across"), (180, "across"), (45, "oblique"), (359.9, "across")]
)
def test_view_relative_to_the_street(tmp_path: Path, heading: float, view: str) -> None:
    renderer = TileRenderer(town.write_streets(tmp_path / "s.geojson"), None, TilesConfig())
    tile = renderer.tile(*town.degrees(0, 0))
    photo = Image.new("RGB", (8, 8))
    facts = graft_facts("Mill Street", "Harbour", *town.degrees(0, 0), heading, photo, tile, renderer.roads)
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


# Sixty degrees north, where a degree of longitude is half as long as one of latitude

NORTH = pyproj.Proj(proj="aeqd", lat_0=60.17, lon_0=24.94, ellps="WGS84")
Line = list[tuple[float, float]]  # metres east and north of the middle


def north(folder: Path, streets: dict[str, Line], side_m: float = 200) -> Callable[..., Facts]:
    """A town with these streets: from a place and a heading to the facts of a photo on Mill Street."""
    features = [
        {
            "type": "Feature",
            "properties": {"name": name},
            "geometry": {"type": "LineString", "coordinates": [NORTH(*point, inverse=True) for point in line]},
        }
        for name, line in streets.items()
    ]
    (folder / "s.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
    renderer = TileRenderer(folder / "s.geojson", None, TilesConfig(side_m=side_m, pixels=32))
    photo, tile = Image.new("RGB", (8, 8)), cache(renderer.tile)

    def facts(at: tuple[float, float] = (0, 0), heading: float | None = None) -> Facts:
        lon, lat = NORTH(*at, inverse=True)
        return graft_facts("Mill Street", "Harbour", lat, lon, heading, photo, tile(lat, lon), renderer.roads, imagery=False)

    return facts


def towards(degrees: float, metres: float) -> tuple[float, float]:
    return metres * math.sin(math.radians(degrees)), metres * math.cos(math.radians(degrees))


@pytest.mark.parametrize("bearing", [20, 25, 65, 115, 155])
def test_the_direction_of_a_street_is_that_on_the_ground(tmp_path: Path, bearing: float) -> None:
    line = [towards(bearing, -150), towards(bearing, 150)]
    towns = [north(tmp_path, {"Mill Street": ends}) for ends in (line, line[::-1])]
    assert [town().direction for town in towns] == [DIRECTIONS[round(bearing / 45) % 4]] * 2
    views = [towns[0](heading=bearing + turned).view for turned in (28, -28, 32, 58, -58, 62, 90, 180)]
    assert views == ["along", "along", "oblique", "oblique", "oblique", "across", "across", "along"]


@pytest.mark.parametrize("way", range(8))
def test_the_crossing_street_is_where_it_is_on_the_ground(tmp_path: Path, way: int) -> None:
    meeting = towards(45 * way + 15, 64)  # nearer than a right angle's half to the compass word
    across = [tuple(np.add(meeting, towards(45 * way + 105, step))) for step in (-200, 200)]
    facts = north(tmp_path, {"Mill Street": [(0, 0), towards(45 * way + 15, 150)], "King Street": across})()
    assert (facts.cross_street, facts.cross_distance_m, facts.cross_direction) == ("King Street", 60, COMPASS[way])


def test_a_street_that_bends_runs_as_it_does_at_the_place(tmp_path: Path) -> None:
    bent = north(tmp_path, {"Mill Street": [(-60, 0), (60, 0), (60, 300)]})
    assert bent().direction == "east-west"
    assert bent(at=(60, 80)).direction == "north-south"
    crooked = north(tmp_path, {"Mill Street": [(-60, 0), (-1, 0), (0, 0), (1, 1), (60, 1)]})
    assert crooked().direction == "east-west"


def test_of_several_crossings_the_nearest_counts_as_seen_from_the_camera(tmp_path: Path) -> None:
    streets: dict[str, Line] = {
        "Mill Street": [(-300, 0), (300, 0)],
        "King Street": [(40, -300), (40, 300)],
        "Elm Road": [(-55, -300), (-55, 300)],
        "Far Lane": [(-300, 150), (300, 150)],
    }
    town = north(tmp_path, streets)
    facts = [town(at=at) for at in ((0, 0), (-10, 0), (0, -40), (34, 0))]
    assert [(f.cross_street, f.cross_distance_m, f.cross_direction) for f in facts] == [
        ("King Street", 40, "east"), ("Elm Road", 40, "west"), ("King Street", 60, "northeast"), ("King Street", 10, "east"),
    ]  # fmt: skip


@pytest.mark.parametrize(("gap", "side_m", "meets"), [(10, 200, True), (14, 200, False), (10, 60, False)])
def test_streets_meet_across_a_small_gap_and_on_the_tile(tmp_path: Path, gap: float, side_m: float, meets: bool) -> None:
    streets: dict[str, Line] = {"Mill Street": [(-300, 0), (300, 0)], "King Street": [(40, gap), (40, 300)]}
    facts = north(tmp_path, streets, side_m)()
    assert (facts.cross_street, facts.cross_distance_m) == (("King Street", 40) if meets else (None, None))


@pytest.mark.parametrize(
    ("degrees", "word"),
    [(22, 0), (23, 1), (67, 1), (68, 2), (202, 4), (203, 5), (292, 6), (293, 7), (337, 7), (338, 0), (720, 0)],
)
def test_compass_words_change_between_their_middles(degrees: float, word: int) -> None:
    assert compass(degrees) == COMPASS[word]


def test_steps_of_sky_and_greenery() -> None:
    assert [_step(share, SKY) for share in (1, 0.25, 0.2499, 0.03, 0.0299, 0)] == [
        "wide", "wide", "narrow", "narrow", "hidden", "hidden",
    ]  # fmt: skip
    assert [_step(share, GREENERY) for share in (1, 0.25, 0.2499, 0.05, 0.0499, 0)] == [
        "much", "much", "some", "some", "little", "little",
    ]  # fmt: skip


def test_sky_is_a_share_of_the_upper_half_and_greenery_of_what_is_no_sky() -> None:
    photo = Image.new("RGB", (96, 96), (90, 150, 250))
    photo.paste((200, 30, 30), (0, 24, 96, 96))
    photo.paste((60, 140, 60), (0, 78, 96, 96))
    assert (sky_share(photo), green_share(photo)) == (0.5, 0.25)
    photo.paste((90, 150, 250), (0, 60, 96, 70))  # blue below a wall is no sky
    assert sky_share(photo) == 0.5


def test_the_colours_of_a_tile_are_those_of_the_place_and_not_of_the_photo_on_it() -> None:
    tile = Image.new("RGB", (96, 96), (60, 140, 60))
    tile.paste((200, 30, 30), (48, 0, 96, 48))  # where the photo is
    assert tile_colours(tile, 0.5) == ["green"]
    assert tile_colours(tile, 0.1) == ["green", "red"]
    for corner in ((0, 0, 48, 48), (0, 48, 48, 96), (48, 48, 96, 96)):
        other = Image.new("RGB", (96, 96), (60, 140, 60))
        other.paste((60, 90, 170), corner)
        assert tile_colours(other, 0.5) == ["green", "blue"]
    other.paste((130, 130, 128), (0, 0, 96, 96))  # a grey roof or road says nothing
    assert tile_colours(other, 0.5) == []


COLOUR = st.lists(st.sampled_from(sorted(COLOURS)), unique=True, max_size=3).map(tuple)


MAYBE_FACTS = st.builds(
    Facts,
    street=st.sampled_from(STREETS),
    district=st.sampled_from(DISTRICTS),
    names=st.lists(st.sampled_from(STREETS), unique=True, max_size=5).map(tuple),
    direction=st.none() | st.sampled_from(DIRECTIONS),
    view=st.none() | st.sampled_from(["along", "across", "oblique"]),
    facing=st.none() | st.sampled_from(COMPASS),
    cross_street=st.none() | st.just("Cross Lane"),
    cross_distance_m=st.sampled_from([0, 10, 90]),
    cross_direction=st.sampled_from(COMPASS),
    photo_colours=COLOUR,
    tile_colours=COLOUR,
)


PHOTO_FACTS = st.builds(
    Facts,
    street=st.sampled_from(STREETS),
    district=st.sampled_from(DISTRICTS),
    photo_colours=COLOUR,
    sky=st.sampled_from(list(SKY)),
    greenery=st.sampled_from(list(GREENERY)),
)


@settings(deadline=None, max_examples=50)
@given(facts=MAYBE_FACTS, seed=st.integers(0, 1000))
def test_labels_of_grafts_pass_their_own_checks(facts: Facts, seed: int) -> None:
    text = explain(facts, random.Random(seed))
    problems = LabelValidator(["Elm Road"], DISTRICTS, verified=True).problems(text, facts)
    known = sum(map(bool, (facts.photo_colours, facts.tile_colours, facts.facing, facts.direction, facts.names)))
    assert [p for p in problems if known > 1 or p.kind not in ("visible", "length")] == []
    assert text == explain(facts, random.Random(seed))
    assert "None" not in text
    if facts.street not in facts.names and facts.direction:
        for name in facts.names:
            if facts.street in name:
                text = text.replace(name, "")
        assert text.count(facts.street) == 1  # only the conclusion knows a name that can't be read


@settings(deadline=None, max_examples=50)
@given(facts=PHOTO_FACTS, seed=st.integers(0, 1000))
def test_labels_of_street_views_pass_their_own_checks(facts: Facts, seed: int) -> None:
    text = reason(facts, random.Random(seed))
    assert LabelValidator(STREETS, DISTRICTS, verified=True, mapless=True, concludes="district").problems(text, facts) == []
    address = reason(facts, random.Random(seed), "address")
    assert LabelValidator(STREETS, DISTRICTS, verified=True, mapless=True).problems(address, facts) == []


def test_a_label_names_the_own_street_first_few_names_and_a_crossing_that_is_near_as_a_corner() -> None:
    names = ("Elm Road", "Castle Hill", "Mill Street", "Green Lane")
    for seed in range(20):
        known = Facts("Mill Street", "Harbour", names, tile_colours=("green", "brown", "red"))
        text = explain(known, random.Random(seed))
        assert "Mill Street, Elm Road and Castle Hill" in text
        assert "Green Lane" not in text
        assert ("green and brown" in text, "red" in text.split()) == (True, False)
        corner, away = (
            explain(
                Facts("Mill Street", "Harbour", cross_street="Elm Road", cross_distance_m=m, cross_direction="east"),
                random.Random(seed),
            )
            for m in (0, 10)
        )
        assert ("metres" in corner, "10 metres" in away, "east" in away) == (False, True, True)


def test_wording_varies_within_its_length() -> None:
    known = random_facts(random.Random(1))
    texts = [explain(known, random.Random(seed)) for seed in range(200)]
    assert len(set(texts)) > 190
    assert all(30 <= len(text.split()) <= 75 for text in texts)
    assert distinct_n(texts, 4) > 0.015  # of one place: names and facts are the same in all of them
