"""Rows of what the map knows: everywhere along the streets, no photo in tiles, no shortcut in what is to be matched."""

import io
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import shapely
from PIL import Image

from addressvlm import InputError
from addressvlm.config.city import MapRowsConfig, TilesConfig
from addressvlm.demo import city
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.grafting import encode_jpeg
from addressvlm.storage import tables
from addressvlm.tiles import map_rows
from addressvlm.tiles.map_rows import OFF_CENTRE, map_batch, matching_batch, street_points
from addressvlm.tiles.roads import Roads
from tests.support import north

TILES = TilesConfig(side_m=120, pixels=96, font_px=9, map_rows=MapRowsConfig(spacing_m=40))


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gazetteer, dict[str, Path], Path]:
    """The maps of a toy city without any photo, and its gazetteer."""
    folder, world = tmp_path_factory.mktemp("town"), city.toy_world("brinemouth")
    paths = {key: folder / name for key, name in (("streets", "s.geojson"), ("districts", "d.geojson"), ("imagery", "i.tif"))}
    city.write_maps(world, paths)
    shapes: dict[str, dict[str, Any]] = {}
    for key in ("streets", "districts"):
        features = json.loads(paths[key].read_text())["features"]
        shapes[key] = {f["properties"]["name"]: shapely.geometry.shape(f["geometry"]) for f in features}
    addresses = {Address(*city.address_at(world, s, x, y)) for s, x, y in city.street_places(world)}
    gazetteer = Gazetteer(addresses, shapes["streets"], shapes["districts"])
    gazetteer.save(folder / "gazetteer.geojson")
    return gazetteer, paths, folder / "gazetteer.geojson"


def test_points_are_along_all_streets_with_the_right_address(town: Any) -> None:
    gazetteer, paths, _ = town
    roads = Roads(paths["streets"])
    points = list(street_points(roads, gazetteer, 40))
    assert {(p["street"], p["district"]) for p in points} == {(a.street, a.district) for a in gazetteer.addresses}
    metres = sum(road.line.length for road in roads.roads)
    assert len(points) == pytest.approx(metres / 40, rel=0.1)
    for point in points[::7]:
        assert point["street"] in gazetteer.within(point["lat"], point["lon"], 1.0)
        assert point["district"] in gazetteer.within(point["lat"], point["lon"], 0.5, "district")
    assert len({p["id"] for p in points}) == len(points)


def test_streets_that_are_no_addresses_are_an_error(town: Any) -> None:
    with pytest.raises(InputError, match=r"map rows: no street of city\.streets is one of the addresses"):
        list(street_points(Roads(town[1]["streets"]), Gazetteer([Address("Nowhere", "Far")]), 40))


def test_tiles_are_asked_about_as_photos_are(town: Any) -> None:
    gazetteer, paths, file = town
    points = list(street_points(Roads(paths["streets"]), gazetteer, 40))[:30]
    arguments = (str(paths["streets"]), str(paths["imagery"]), TILES.model_dump_json(), (str(file), "1"), 0)
    rows = map_batch(*arguments, points).tables["train"]
    assert map_batch(*arguments, points[::-1]).tables["train"][::-1] == rows
    assert tables.pa.Table.from_pylist(rows, schema=tables.ALIGNMENT).num_rows == 30
    for row, point in zip(rows, points, strict=True):
        assert (row["street"], row["district"]) == (point["street"], point["district"])
        *asked, look = row["rounds"]
        assert len(asked) == 3
        assert look["kind"] == "explanation"
        assert {r["answer"] for r in asked if r["kind"] == "generation"} <= {
            point["street"], point["district"], f"{point['street']}, {point['district']}"
        }  # fmt: skip
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (96, 96)


def test_a_matched_photo_is_off_the_centre_and_half_without_names(town: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gazetteer, paths, file = town
    points = list(street_points(Roads(paths["streets"]), gazetteer, 40))
    jpeg = encode_jpeg(Image.fromarray(np.full((64, 64, 3), (200, 30, 30), np.uint8)), 90)
    photos = [
        {**p, "place": p["id"], "main_street": p["street"], "image": {"bytes": jpeg, "path": "x.jpg"}} for p in points[:60]
    ]
    drawn = []
    from addressvlm.tiles.renderer import TileRenderer

    tile = TileRenderer.tile

    def record(self: TileRenderer, lat: float, lon: float, street: str = "") -> Any:
        drawn.append((lat, lon, self.config.names))
        return tile(self, lat, lon, street)

    monkeypatch.setattr(TileRenderer, "tile", record)
    result = matching_batch(str(paths["streets"]), str(paths["imagery"]), TILES.model_dump_json(), (str(file), "1"), 0, photos)
    rows = result.tables["train"]
    assert len(rows) == 60
    assert not result.rejects
    assert 20 <= sum(names for *_, names in drawn) <= 40
    answers = Counter(r["answer"] for row in rows for r in row["rounds"] if r["level"] == "alignment")
    assert set(answers) == {"Yes", "No"}
    north, east = [], []
    for row, photo, (lat, lon, _) in zip(rows, photos, drawn, strict=True):
        red = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))[8:40, 56:88]
        assert (red[..., 0] > 150).all()  # the photo is in the corner
        if row["rounds"][0]["answer"] != "No":
            north.append(abs(lat - photo["lat"]) * 111_195)
            east.append(abs(lon - photo["lon"]) * 111_195 * math.cos(math.radians(lat)))
    reach = OFF_CENTRE * TILES.side_m
    assert 0.9 * reach < max(north) <= reach + 0.1
    assert 0.9 * reach < max(east) <= reach + 0.1


@pytest.mark.parametrize(("apart", "wrong"), [(90, False), (150, True)])
@pytest.mark.parametrize("way", [(1, 0), (0, 1)])
def test_a_photo_s_wrong_tile_shows_another_place(
    town: Any, monkeypatch: pytest.MonkeyPatch, way: tuple[int, int], apart: float, wrong: bool
) -> None:
    """Two spots far from the equator: where a tile of 120 m shows both, no photo is asked about the other spot's."""
    drawn: list[tuple[float, float, str]] = []

    def tile(lat: float, lon: float, street: str) -> Any:
        drawn.append((lat, lon, street))
        return SimpleNamespace(image=Image.new("RGB", (96, 96)))

    monkeypatch.setattr(map_rows, "_renderer", lambda *_: SimpleNamespace(tile=tile))
    jpeg = {"bytes": encode_jpeg(Image.new("RGB", (32, 32)), 90), "path": "x.jpg"}
    spots = [north.at(0, 0), north.at(apart * way[0], apart * way[1])]
    address = town[0].addresses[0]
    about = {"street": address.street, "district": address.district, "image": jpeg}
    photos = [
        {"id": f"{n}", "place": "p", "lat": spots[n % 2][0], "lon": spots[n % 2][1], "main_street": f"Street {n % 2}", **about}
        for n in range(80)
    ]
    rows = matching_batch("s", None, TILES.model_dump_json(), (str(town[2]), "1"), 0, photos).tables["train"]
    answers = [row["rounds"][0]["answer"] for row in rows if row["rounds"][0]["level"] == "alignment"]
    assert len(answers) > 10
    assert ("No" in answers) is wrong
    reach = OFF_CENTRE * TILES.side_m
    for number, (row, (lat, lon, street)) in enumerate(zip(rows, drawn, strict=True)):
        first = row["rounds"][0]
        spot = 1 - number % 2 if (first["level"], first["answer"]) == ("alignment", "No") else number % 2
        assert street == f"Street {spot}"
        assert north.metres((lat, lon), spots[spot]) <= 1.01 * reach * 2**0.5
    east = [north.metres((lat, lon), (lat, spots[int(street[-1])][1])) for lat, lon, street in drawn]
    assert 0.9 * reach < max(east) <= 1.01 * reach
