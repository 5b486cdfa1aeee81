"""The toy world: the same seed gives the same city, and both views show the same things."""

import csv
from pathlib import Path

import numpy as np
import pytest
import rasterio

from addressvlm import InputError
from addressvlm.demo import city
from addressvlm.demo.camera import photograph
from addressvlm.demo.city import ground_frame, origin, to_degrees, write_city
from addressvlm.demo.world import CROWNS, PAVINGS, district_at, generate


def test_a_seed_is_a_city() -> None:
    one, again, other = generate(1), generate(1), generate(2)
    assert np.array_equal(one.boxes, again.boxes)
    assert [s.name for s in one.streets] == [s.name for s in again.streets]
    assert {s.name for s in one.streets} != {s.name for s in other.streets}
    assert len({s.name for s in one.streets}) == 13


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
    world = generate(city.TOY_CITIES["alderbrook"])
    with rasterio.open(toy_city["imagery"]) as imagery:
        picture, west, north = np.moveaxis(imagery.read(), 0, -1), imagery.bounds.left, imagery.bounds.top
    for street in world.streets[:4]:
        x, y = street.point((street.start + street.end) / 2 + 11)
        offset = 2.5  # off the centre line
        x, y = (x, y + offset) if street.horizontal else (x + offset, y)
        photo = np.asarray(photograph(world, x, y, 0.0 if street.horizontal else np.pi / 2, 1.0))
        east, up = world.to_ground(np.array([[x, y]]))[0] + np.array(origin())
        above = picture[int((north - up) / city.GROUND_PIXEL), int((east - west) / city.GROUND_PIXEL)]
        paving = np.array(PAVINGS[street.character.paving])
        assert np.abs(above - paving).max() <= 3
        assert np.abs(photo[-4, 80].astype(int) - paving).max() <= 3


def test_trees_are_of_the_street_s_kind() -> None:
    world = generate(6)
    kinds = {tuple(CROWNS[s.character.crown]) for s in world.streets}
    for crown in world.crowns[:200]:
        assert min(np.abs(np.array(kind) - crown).max() for kind in kinds) <= 21


def test_degrees_and_metres_agree() -> None:
    world = generate(7)
    lon, lat = to_degrees(world, np.array([[10.0, 20.0]]))[0]
    east, north = ground_frame().transform(lon, lat, direction="INVERSE")
    expected = world.to_ground(np.array([[10.0, 20.0]]))[0] + np.array(origin())
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
