"""The toy world: the same seed gives the same city, and both views show the same things."""

import csv
import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio

from addressvlm import InputError
from addressvlm.baselines.locatability import Locatability, Texts
from addressvlm.demo import city
from addressvlm.demo.camera import PARTS, PAVEMENT, YARD, parts, photograph
from addressvlm.demo.city import ground_frame, origin, places, to_degrees, toy_world, views, write_city
from addressvlm.demo.clues import lessons, make
from addressvlm.demo.world import CROWNS, PAVINGS, district_at, generate


def test_a_seed_is_a_city() -> None:
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
        paving = np.array(PAVINGS[street.character.paving])
        assert np.abs(above - paving).max() <= 3
        assert np.abs(photo[-4, 80].astype(int) - paving).max() <= 3


def test_parts_are_what_the_photo_shows() -> None:
    world = generate(3)
    rng = random.Random(0)
    bare = replace(world, trees=world.trees[:0], crowns=world.crowns[:0])
    seen: set[str] = set()
    for street, x, y in rng.sample(list(places(world)), 6):
        for heading in views(street, rng):
            found = parts(world, x, y, heading)
            photo, without = (np.asarray(photograph(w, x, y, heading, 1.0)).astype(int) for w in (world, bare))
            assert found.shape == photo.shape[:2]
            tree, unchanged = found == PARTS.index("tree"), (photo == without).all(axis=-1)
            assert unchanged[~tree].all()
            assert (parts(bare, x, y, heading) == found)[~tree].all()
            horizon = len(found) // 2
            for part, colours in (("pavement", [PAVEMENT]), ("yard", [YARD]), ("road", [*PAVINGS.values(), (238, 238, 230)])):
                shown = photo[found == PARTS.index(part)]
                assert (shown[:, None] == np.array(colours)[None]).all(axis=-1).any(axis=-1).all()
                assert not (found[:horizon] == PARTS.index(part)).any()
            assert not (found[horizon + 1 :] == PARTS.index("sky")).any()
            wall = photo[found == PARTS.index("building")]
            assert not (wall[:, None] == np.array([PAVEMENT, YARD])[None]).all(axis=-1).any()
            seen |= {PARTS[number] for number in np.unique(found)}
    assert seen == set(PARTS)


def test_clues_of_the_toy_city_score_its_photos(tmp_path: Path) -> None:
    make(tmp_path, steps=2, batch=2)
    words = Texts.read(tmp_path / "clues.yaml")
    assert {"gravel road", "pine trees", "red fronts"} <= set(words.clues)
    assert "the sky" in words.others
    scorer = Locatability(str(tmp_path / "segmentation"), str(tmp_path / "clip"), words)
    assert scorer.model.config.id2label[0] == "sky"
    some = [next(lessons(random.Random(0)))]
    assert all(0 < score < 1 for score in scorer.scores([one.photo for one in some]))
    assert scorer.classes([some[0].photo])[0].shape == some[0].classes.shape
    tokens = scorer.clip.tokens(["red fronts", "red roofs of all houses"])["input_ids"]
    assert (tokens == scorer.clip.tokenizer.eos_token_id).any(dim=1).all()


def test_trees_are_of_the_street_s_kind() -> None:
    world = generate(6)
    kinds = {tuple(CROWNS[s.character.crown]) for s in world.streets}
    for crown in world.crowns[:200]:
        assert min(np.abs(np.array(kind) - crown).max() for kind in kinds) <= 21


def test_degrees_and_metres_agree() -> None:
    world = generate(7)
    lon, lat = to_degrees(world, np.array([[10.0, 20.0]]))[0]
    east, north = ground_frame().transform(lon, lat, direction="INVERSE")
    expected = world.to_ground(np.array([[10.0, 20.0]]))[0] + np.array(origin(world))
    assert np.allclose([east, north], expected, atol=0.01)


def test_a_toy_city_comes_as_a_real_one_does(toy_city: dict[str, str]) -> None:
    paths = toy_city
    assert set(paths) == {"manifest", "photos", "streets", "districts", "imagery"}
    with open(paths["manifest"], encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "place", "lat", "lon", "heading"]
    assert all((Path(paths["photos"]) / row["file"]).is_file() for row in rows)
    before = Path(paths["manifest"]).stat().st_mtime_ns
    assert write_city("alderbrook", Path(paths["manifest"]).parent) == paths
    assert Path(paths["manifest"]).stat().st_mtime_ns == before


def test_an_unknown_toy_city_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="alderbrook, brinemouth"):
        write_city("atlantis", tmp_path)
