"""The toy world: the same seed gives the same city, and both views show the same things."""

import csv
import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyproj
import pytest
import rasterio

from addressvlm import InputError
from addressvlm.baselines.locatability import Locatability, LocatabilityTexts
from addressvlm.dataset.streets import StreetMap
from addressvlm.demo import city
from addressvlm.demo.camera import CLASSES, PAVEMENT, YARD, photograph, segment
from addressvlm.demo.city import ground_frame, origin, street_places, to_degrees, toy_world, view_headings, write_city
from addressvlm.demo.premise import SHARES, lookup_accuracy
from addressvlm.demo.world import CROWNS, PAVINGS, Character, World, district_at, generate
from addressvlm.tools.toy_locatability import locatability_examples, train_models


def test_a_seed_determines_a_city() -> None:
    one, again, other = generate(1), generate(1), generate(2)
    assert np.array_equal(one.boxes, again.boxes)
    assert [s.name for s in one.streets] == [s.name for s in again.streets]
    assert {s.name for s in one.streets} != {s.name for s in other.streets}
    assert len({s.name for s in one.streets}) == 13


def test_no_two_toy_cities_lie_at_the_same_place() -> None:
    ends = []
    for name in city.TOY_CITIES:
        world = toy_world(name)
        half = np.hypot(*world.size) / 2
        assert np.abs(to_degrees(world, np.array([world.size]) / 2)[0] - city.ORIGIN[::-1]).max() < 1
        ends.append((origin(world)[1] - half, origin(world)[1] + half))
    assert all(below[1] + 1000 < above[0] for below, above in itertools.pairwise(sorted(ends)))


def test_districts_cover_the_city() -> None:
    world = generate(3)
    corners = [(0.0, 0.0), world.size, (world.size[0], 0.0), (-20.0, 1000.0)]
    assert {district_at(world, *corner).name for corner in corners} <= {d.name for d in world.districts}


def test_no_building_stands_on_a_road() -> None:
    world = generate(4)
    for street in world.streets:
        low, high = (1, 3) if street.horizontal else (0, 2)
        along = (0, 2) if street.horizontal else (1, 3)
        beside = (world.boxes[:, along[1]] > street.start) & (world.boxes[:, along[0]] < street.end)
        on_road = (world.boxes[:, low] < street.at + 4) & (world.boxes[:, high] > street.at - 4)
        assert not (beside & on_road).any()


def test_photo_and_satellite_show_the_same_paving(toy_city: dict[str, str]) -> None:
    world = toy_world("alderbrook")
    with rasterio.open(toy_city["imagery"]) as imagery:
        picture, west, north = np.moveaxis(imagery.read(), 0, -1), imagery.bounds.left, imagery.bounds.top
    for street in world.streets[:4]:
        x, y = street.point((street.start + street.end) / 2 + 11)
        offset = 2.5  # off the centre line
        x, y = (x, y + offset) if street.horizontal else (x + offset, y)
        photo = np.asarray(photograph(world, x, y, 0.0 if street.horizontal else np.pi / 2, 1.0))
        east, up = world.to_ground(np.array([[x, y]]))[0] + np.array(origin(world))
        above = picture[int((north - up) / city.GROUND_PIXEL), int((east - west) / city.GROUND_PIXEL)]
        paving = np.array(PAVINGS[street.block_at(x, y).character.paving])
        assert np.abs(above - paving).max() <= 3
        assert np.abs(photo[-4, 80].astype(int) - paving).max() <= 3


def test_segmentation_matches_the_photo() -> None:
    world = generate(3)
    rng = random.Random(0)
    bare = replace(world, trees=world.trees[:0], crowns=world.crowns[:0])
    seen: set[str] = set()
    for street, x, y in rng.sample(list(street_places(world)), 6):
        for heading in view_headings(street, rng):
            classes = segment(world, x, y, heading)
            photo, without = (np.asarray(photograph(w, x, y, heading, 1.0)).astype(int) for w in (world, bare))
            assert classes.shape == photo.shape[:2]
            tree, unchanged = classes == CLASSES.index("tree"), (photo == without).all(axis=-1)
            assert unchanged[~tree].all()
            assert (segment(bare, x, y, heading) == classes)[~tree].all()
            horizon = len(classes) // 2
            for part, colours in (("pavement", [PAVEMENT]), ("yard", [YARD]), ("road", [*PAVINGS.values(), (238, 238, 230)])):
                shown = photo[classes == CLASSES.index(part)]
                assert (shown[:, None] == np.array(colours)[None]).all(axis=-1).any(axis=-1).all()
                assert not (classes[:horizon] == CLASSES.index(part)).any()
            assert not (classes[horizon + 1 :] == CLASSES.index("sky")).any()
            wall = photo[classes == CLASSES.index("building")]
            assert not (wall[:, None] == np.array([PAVEMENT, YARD])[None]).all(axis=-1).any()
            seen |= {CLASSES[number] for number in np.unique(classes)}
    assert seen == set(CLASSES)


def box(x: float, y: float, colour: tuple[int, int, int]) -> World:
    """A world of one tower of 20 m a side around (x, y), and nothing else."""
    return World(
        0.0, (400.0, 400.0), [], [], boxes=np.array([[x - 10, y - 10, x + 10, y + 10]], np.float32),
        heights=np.array([40.0], np.float32), facades=np.array([colour], np.float32), roofs=np.array([colour], np.float32),
        windows=np.array([3.0], np.float32),
    )  # fmt: skip


@pytest.mark.parametrize("heading", [0.0, 1.1, math.pi / 2, 3.0, -2.0])
@pytest.mark.parametrize("thing", ["building", "tree"])
def test_a_photo_shows_things_on_the_side_where_they_stand(thing: str, heading: float) -> None:
    """The field of view is 90 degrees: 20 degrees to the right is 0.364 of half the width from the middle."""
    for degrees in (-20, 0, 20, 100):  # to the right of the heading
        turn = heading - math.radians(degrees)
        x, y = 200 + 50 * math.cos(turn), 200 + 50 * math.sin(turn)
        world = (
            box(x, y, (200, 0, 0)) if thing == "building" else box(200, 200, (0, 0, 0))
        )  # which stands around the camera and is not seen from within
        if thing == "tree":
            world.trees, world.crowns = np.array([[x, y, 2.0]], np.float32), np.array([[0, 200, 0]], np.float32)
        columns = np.nonzero((segment(world, 200, 200, heading) == CLASSES.index(thing)).any(axis=0))[0]
        if degrees == 100:
            assert not len(columns)
        else:
            assert columns.mean() == pytest.approx(79.5 + 80 * math.tan(math.radians(degrees)), abs=8)


def test_headings_of_the_manifest_are_those_on_the_globe() -> None:
    """Degrees clockwise from north, whatever way the city is turned; one step ahead of the camera lies there."""
    for world in (toy_world("brinemouth"), generate(11)):
        for heading in (0.0, 0.7, 2.0, 4.5):
            steps = np.array([[100.0, 100.0], [100 + 50 * math.cos(heading), 100 + 50 * math.sin(heading)]])
            here, ahead = to_degrees(world, steps)
            azimuth, _, metres = pyproj.Geod(ellps="WGS84").inv(*here, *ahead)
            assert metres == pytest.approx(50, abs=0.1)
            assert (city.compass_heading(world, heading) - azimuth + 180) % 360 - 180 == pytest.approx(
                0, abs=1.5
            )  # UTM's own north
            assert 0 <= city.compass_heading(world, heading) < 360


def test_places_of_the_manifest_match_the_street_and_district_files(
    toy_city: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(city, "SPACING", 160.0)  # as the fixture has it
    world = toy_world("alderbrook")
    streets = StreetMap.load(toy_city["streets"], toy_city["districts"])
    with open(toy_city["manifest"], encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["file"].endswith("_0.jpg")]
    truth = [(street, x, y, city.address_at(world, street, x, y)) for street, x, y in street_places(world)]
    assert len(rows) == len(truth)
    lat, lon = (np.array([float(row[column]) for row in rows]) for column in ("lat", "lon"))
    near = streets.around(lat, lon, 3)
    assert all(names[0] in [name for name, _ in near_names] for near_names, (_, _, _, names) in zip(near, truth, strict=True))
    for district, (_, x, y, (_, known)), at in zip(streets.district(lat, lon), truth, np.column_stack([lat, lon]), strict=True):
        edges = [abs(v - e) for d in world.districts for v, e in ((x, d.box[0]), (x, d.box[2]), (y, d.box[1]), (y, d.box[3]))]
        assert district == known or min(edges) < 3, at
    first = [float(row["heading"]) for row in rows]
    for heading, (street, *_) in zip(first, truth, strict=True):  # the first view looks along the street
        along = city.compass_heading(world, 0.0 if street.horizontal else math.pi / 2)
        assert abs((heading - along + 180) % 360 - 180) <= math.degrees(0.2) + 0.1


def test_traits_describe_a_block_and_from_above_a_part_of_them() -> None:
    block = Character("white", 6, "pine", 6.0, "gravel", 5.0)
    assert block.traits() == [
        "gravel road", "white fronts", "pine trees", "dense trees", "6 floors", "wide windows",
    ]  # fmt: skip
    assert block.traits(from_above=True) == block.traits()[:4]
    for trait, kind in zip(block.traits(), Character.trait_values(), strict=True):
        assert trait in kind


def test_blocks_cover_their_street_and_end_at_crossings() -> None:
    world = generate(5)
    for street in world.streets:
        assert (street.blocks[0].start, street.blocks[-1].end) == (street.start, street.end)
        assert all(a.end == b.start for a, b in itertools.pairwise(street.blocks))
        crossings = {other.at for other in world.streets if other.horizontal != street.horizontal}
        assert {block.start for block in street.blocks[1:]} <= crossings
    places = [(street.block_at(x, y), x, y) for street, x, y in street_places(world)]
    for (block, *a), (other, *b) in itertools.combinations(places, 2):
        assert block is other or math.dist(a, b) >= 25  # the guard between splits costs no place


def test_clues_of_the_toy_city_score_its_photos(tmp_path: Path) -> None:
    train_models(tmp_path, steps=2, batch=2)
    words = LocatabilityTexts.read(tmp_path / "clues.yaml")
    assert {"gravel road", "pine trees", "red fronts"} <= set(words.clues)
    assert "the sky" in words.others
    scorer = Locatability(str(tmp_path / "segmentation"), str(tmp_path / "clip"), words)
    assert scorer.model.config.id2label[0] == "sky"
    some = [next(locatability_examples(random.Random(0)))]
    assert all(0 < score < 1 for score in scorer.scores([one.photo for one in some]))
    assert scorer.classes([some[0].photo])[0].shape == some[0].classes.shape
    tokens = scorer.clip.tokens(["red fronts", "red roofs of all houses"])["input_ids"]
    assert (tokens == scorer.clip.processor.tokenizer.eos_token_id).any(dim=1).all()


def test_trees_have_the_species_of_their_block() -> None:
    world = generate(6)
    kinds = {tuple(CROWNS[block.character.crown]) for street in world.streets for block in street.blocks}
    for crown in world.crowns[:200]:
        assert min(np.abs(np.array(kind) - crown).max() for kind in kinds) <= 21


def test_degrees_and_metres_agree() -> None:
    world = generate(7)
    lon, lat = to_degrees(world, np.array([[10.0, 20.0]]))[0]
    east, north = ground_frame().transform(lon, lat, direction="INVERSE")
    expected = world.to_ground(np.array([[10.0, 20.0]]))[0] + np.array(origin(world))
    assert np.allclose([east, north], expected, atol=0.01)


def test_a_toy_city_has_the_files_of_a_real_one(toy_city: dict[str, str]) -> None:
    paths = toy_city
    assert set(paths) == {"manifest", "photos", "streets", "districts", "imagery"}
    with open(paths["manifest"], encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "place", "lat", "lon", "heading", "block"]
    assert all((Path(paths["photos"]) / row["file"]).is_file() for row in rows)
    before = Path(paths["manifest"]).stat().st_mtime_ns
    assert write_city("alderbrook", Path(paths["manifest"]).parent) == paths
    assert Path(paths["manifest"]).stat().st_mtime_ns == before


def test_an_unknown_toy_city_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="alderbrook, brinemouth"):
        write_city("atlantis", tmp_path)


@pytest.mark.parametrize("share", SHARES)
def test_the_map_tells_far_more_of_blocks_without_photos_than_photos_of_others(share: float) -> None:
    """Nothing can be learnt from a map of which this is not so."""
    worlds = [generate(seed) for seed in (1, 2, 3001, 3002)]
    by_photos, by_map = np.mean([lookup_accuracy(world, share, random.Random(0)) for world in worlds], axis=0)
    assert by_photos < 0.35
    assert by_map > 0.85
