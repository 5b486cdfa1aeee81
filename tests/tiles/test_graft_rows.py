"""Rows of photos into rows of grafts, without a cluster"""

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from addressvlm.config import TilesConfig
from addressvlm.tiles import graft_rows
from addressvlm.tiles.graft_rows import Grafter, graft_photos_batch
from tests.support import town

STREETS = {
    "Mill Street": [(-300, 0), (300, 0)],
    "King Street": [(-300, -12), (300, -12)],
    "High Street": [(40, -300), (40, 300)],
}


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(town.write_streets(tmp_path_factory.mktemp("town") / "streets.geojson", STREETS))  # type: ignore[arg-type]


def photo(key: str, x: float, y: float, colour: tuple[int, int, int], **changes: Any) -> dict[str, Any]:
    buffer, (lat, lon) = io.BytesIO(), town.degrees(x, y)
    Image.new("RGB", (64, 48), colour).save(buffer, "JPEG")
    where = {"lat": lat, "lon": lon, "heading": None, "main_street": "Mill Street", "street": "Mill Street"}
    row = {"id": key, "place": f"p{key}", "district": "Harbour", "image": {"bytes": buffer.getvalue(), "path": f"{key}.jpg"}}
    return row | where | changes


PHOTOS = [
    photo("a", 0, -5, (200, 0, 0), heading=90.0),
    photo("b", 0, -5, (0, 200, 0), heading=0.0, street="King Street", main_street="King Street"),
    photo("far", 9000, 9000, (0, 0, 200)),
    photo("c", 60, -5, (200, 200, 0), heading=200.0, district="Castle"),
    photo("far2", 9000, 9000, (0, 0, 200)),
    photo("none", 0, -5, (0, 0, 0)) | {"image": {"bytes": b"no picture", "path": "none.jpg"}},
]


@pytest.mark.parametrize("layout", ["graft", "beside", "two"])
def test_rows_do_not_depend_on_the_batch(streets: str, layout: str) -> None:
    config = TilesConfig(pixels=160, font_px=10, layout=layout)  # type: ignore[arg-type]
    together = list(Grafter(streets, None, config).graft_rows(PHOTOS))
    assert together == [next(Grafter(streets, None, config).graft_rows([row])) for row in PHOTOS]
    assert [row["id"] for row in together] == [row["id"] for row in PHOTOS]
    assert [row["reason"] is None for row in together] == [True, True, False, True, False, False]
    assert {row["reason"] for row in together if row["id"].startswith("far")} == {together[2]["reason"]}
    first, second, _, third, *_ = together
    assert (first["names"][0], second["names"][0]) == ("Mill Street", "King Street")  # one spot, two streets
    facts = [json.loads(row["facts"]) for row in (first, second, third)]
    assert [(f["street"], f["district"], f["view"]) for f in facts][:2] == [
        ("Mill Street", "Harbour", "along"),
        ("King Street", "Harbour", "across"),
    ]
    assert facts[2]["district"] == "Castle"
    assert [row["image"]["path"] for row in together] == [f"{row['id']}.jpg" for row in PHOTOS]
    assert (first["tile"] is not None) is (layout == "two")


def test_a_graft_is_the_tile_with_the_photo_in_its_upper_right_corner(streets: str) -> None:
    for delta in (0.5, 0.25):
        config = TilesConfig(pixels=160, font_px=10, delta=delta)
        grafter = Grafter(streets, None, config)
        image = Image.open(io.BytesIO(next(grafter.graft_rows(PHOTOS[:1]))["image"]["bytes"]))
        pixels, side = np.asarray(image).astype(int), round(delta * 160)
        is_photo = abs(pixels - (200, 0, 0)).max(axis=-1) < 60
        assert is_photo[2 : side * 3 // 4 - 2, 162 - side : -2].all()
        assert not is_photo[side * 3 // 4 + 2 :].any()
        assert not is_photo[:, : 158 - side].any()
        assert (
            abs(pixels - np.asarray(grafter.renderer.tile(PHOTOS[0]["lat"], PHOTOS[0]["lon"], "Mill Street").image))[
                side:
            ].mean()
            < 6
        )


def test_photos_of_a_split_are_replaced_by_grafts(streets: str) -> None:
    config = TilesConfig(pixels=160, font_px=10)
    made = graft_photos_batch(streets, None, config.model_dump_json(), "val", PHOTOS)
    assert list(made.tables) == ["val"]
    whole = {row["id"]: row["image"] for row in Grafter(streets, None, config).graft_rows(PHOTOS)}
    kept = [row for row in PHOTOS if row["id"] in ("a", "b", "c")]
    assert made.tables["val"] == [{**row, "image": whole[row["id"]]} for row in kept]
    assert [(reject["id"], reject["file"]) for reject in made.rejects] == [(k, f"{k}.jpg") for k in ("far", "far2", "none")]
    assert "can't be decoded" in made.rejects[2]["reason"]


def test_the_cached_grafter_depends_on_the_settings(streets: str) -> None:
    for pixels in (160, 96, 160):
        made = graft_rows.graft_batch(streets, None, TilesConfig(pixels=pixels, font_px=10).model_dump_json(), PHOTOS[:1])
        assert Image.open(io.BytesIO(made.tables["train"][0]["image"]["bytes"])).size == (pixels, pixels)


def test_the_tiles_of_the_last_places_are_cached(streets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graft_rows, "CACHED_TILES", 2)
    grafter = Grafter(streets, None, TilesConfig(pixels=64, names=False))
    drawn: list[float] = []
    draw = grafter.renderer.tile
    monkeypatch.setattr(grafter.renderer, "tile", lambda *spot: (drawn.append(spot[1]), draw(*spot))[1])
    spots = [photo(str(x), x, 0, (9, 9, 9)) for x in (0, 50, 0, 100, 0, 50)]  # the one used last is kept
    list(grafter.graft_rows(spots))
    assert drawn == [spots[i]["lon"] for i in (0, 1, 3, 5)]
