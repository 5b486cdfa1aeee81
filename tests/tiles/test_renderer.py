"""Tiles of a place.

Names are read back from tiles as the model sees them, 336 px for 200 m. On 182 places of a real town, whose photos are not
in the repository, `benchmarks/readable_names.py` tells the share.
"""

import itertools
import json
import random
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.warp import calculate_default_transform, reproject

from addressvlm import InputError
from addressvlm.config import TilesConfig
from addressvlm.dataset.streets import StreetMap
from addressvlm.demo.city import street_places, to_degrees, toy_world
from addressvlm.tiles.renderer import Tile, TileRenderer
from addressvlm.tiles.roads import Roads, write_roads
from tests.support import town
from tests.support.http_server import Server
from tests.support.ocr import NEAR, Reader, letters, wrong

CONFIG = TilesConfig()


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return town.write_streets(tmp_path_factory.mktemp("town") / "streets.geojson")


@pytest.fixture(scope="module")
def imagery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return town.write_imagery(tmp_path_factory.mktemp("town") / "satellite.tif")


def dark(image: Image.Image) -> np.ndarray:
    """Where the letters are, (H, W)."""
    return np.asarray(image.convert("L")) < 90


def test_local_metres_match_the_globe(streets: Path) -> None:
    roads = Roads(streets)
    x0, y0 = roads.to_metres(*town.degrees(0, 0))
    x1, y1 = roads.to_metres(*town.degrees(30, 40))
    assert (x1 - x0, y1 - y0) == pytest.approx((30, 40), abs=0.01)


def test_streets_are_drawn_in_their_position(streets: Path) -> None:
    tile = TileRenderer(streets, None, CONFIG.model_copy(update={"names": False})).tile(*town.degrees(0, 0))
    assert tile.image.size == (CONFIG.pixels, CONFIG.pixels)
    assert tile.image.mode == "RGB"
    assert tile.names == []
    pixels = np.asarray(tile.image)
    centre, metre = CONFIG.pixels // 2, CONFIG.pixels / CONFIG.side_m
    assert tuple(pixels[centre, 20]) == (255, 255, 255)  # Mill Street
    assert tuple(pixels[20, centre + round(40 * metre)]) == (255, 255, 255)  # King Street
    assert tuple(pixels[20, centre]) == (0xF2, 0xEF, 0xE9)  # nothing
    assert not dark(tile.image).any()


def test_listed_names_are_those_drawn(streets: Path) -> None:
    here = town.degrees(0, 0)
    named = TileRenderer(streets, None, CONFIG).tile(*here)
    bare = TileRenderer(streets, None, CONFIG.model_copy(update={"names": False})).tile(*here)
    assert sorted(named.names) == ["King Street", "Mill Street"]  # the alley is too short for its name
    centre, metre = CONFIG.pixels // 2, CONFIG.pixels / CONFIG.side_m
    letters = dark(named.image) & ~dark(bare.image)
    rows, columns = np.nonzero(letters)
    along_mill = abs(rows - centre) <= CONFIG.font_px
    along_king = abs(columns - centre - 40 * metre) <= CONFIG.font_px
    assert along_mill.sum() > 100
    assert along_king.sum() > 100
    assert (along_mill | along_king).all()


@pytest.mark.parametrize("name", ["Mill Street", "King Street"])
def test_a_removed_street_has_no_name_on_the_tile(tmp_path: Path, streets: Path, name: str) -> None:
    without = {n: line for n, line in town.STREETS.items() if n != name}
    fewer = TileRenderer(town.write_streets(tmp_path / "s.geojson", without), None, CONFIG).tile(*town.degrees(0, 0))
    assert name not in fewer.names
    assert dark(fewer.image).sum() < dark(TileRenderer(streets, None, CONFIG).tile(*town.degrees(0, 0)).image).sum()


def test_collision_is_not_reported_as_drawn(tmp_path: Path) -> None:
    both = {"Mill Street": [(-300, 0), (300, 0)], "Mill Lane": [(-300, 1), (300, 1)]}
    path = town.write_streets(tmp_path / "s.geojson", both)
    crowded = CONFIG.model_copy(update={"side_m": 60.0, "font_px": 24.0})
    tile = TileRenderer(path, None, crowded).tile(*town.degrees(0, 0))
    assert len(tile.names) == 1


def test_names_leave_the_photo_corner_free(streets: Path) -> None:
    renderer = TileRenderer(streets, None, CONFIG)
    corner = round(CONFIG.delta * CONFIG.pixels)
    for x in range(-60, 61, 20):
        tile = renderer.tile(*town.degrees(x, -30))
        assert tile.names
        assert not dark(tile.image)[:corner, -corner:].any()


def test_the_places_street_is_named_even_if_the_photo_hides_it(tmp_path: Path) -> None:
    hidden = {"Hidden Yard": [(5, 20), (60, 60)], "Mill Street": [(-300, -30), (300, -30)]}
    renderer = TileRenderer(town.write_streets(tmp_path / "s.geojson", hidden), None, CONFIG)
    assert renderer.tile(*town.degrees(0, 0), street="hidden yard").names == ["Hidden Yard", "Mill Street"]


def test_names_with_missing_glyphs_are_not_listed(tmp_path: Path) -> None:
    streets = {"東京通り": [(-300, 0), (300, 0)], "Rue de l'Évêché": [(-300, -40), (300, -40)]}
    tile = TileRenderer(town.write_streets(tmp_path / "s.geojson", streets), None, CONFIG).tile(*town.degrees(0, 0))
    assert tile.names == ["Rue de l'Évêché"]


def test_a_second_font_draws_missing_glyphs(tmp_path: Path) -> None:
    """STIX stands for a font of another script: it has letters that DejaVu Sans Bold lacks."""
    path = town.write_streets(tmp_path / "s.geojson", {"𝒜𝒞𝒟 Mill Street": [(-300, 0), (300, 0)]})
    font = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "STIXGeneral.ttf"))
    assert TileRenderer(path, None, CONFIG).tile(*town.degrees(0, 0)).names == []
    named = TileRenderer(path, None, CONFIG.model_copy(update={"font": font})).tile(*town.degrees(0, 0))
    assert named.names == ["𝒜𝒞𝒟 Mill Street"]
    plain = TileRenderer(town.write_streets(tmp_path / "p.geojson", {"Mill Street": [(-300, 0), (300, 0)]}), None, CONFIG)
    spans = [
        np.ptp(np.nonzero(np.asarray(tile.image.convert("L")) < 150)[1]) for tile in (named, plain.tile(*town.degrees(0, 0)))
    ]
    assert spans[0] > spans[1] + 2 * CONFIG.font_px
    for bad in (str(tmp_path / "none.ttf"), str(path)):
        with pytest.raises(InputError, match=r"set tiles\.font to"):
            TileRenderer(path, None, CONFIG.model_copy(update={"font": bad}))


def test_names_lie_on_the_straight_part_of_a_street(tmp_path: Path) -> None:
    """A street with a bend and a long straight stretch: all letters are level, and beside the bend there are none."""
    path = town.write_streets(tmp_path / "s.geojson", {"Mill Street": [(-90, 10), (-75, -40), (-60, -80), (300, -80)]})
    tile = TileRenderer(path, None, CONFIG).tile(*town.degrees(0, 0))
    assert tile.names == ["Mill Street"]
    rows, columns = np.nonzero(dark(tile.image))
    assert np.ptp(rows) <= CONFIG.font_px * 1.2
    assert columns.min() > CONFIG.pixels / 2 - 60 * CONFIG.pixels / CONFIG.side_m


def test_rendering_is_deterministic(streets: Path) -> None:
    renderer = TileRenderer(streets, None, CONFIG)
    first = renderer.tile(*town.degrees(0, 0))
    renderer.tile(*town.degrees(50, 50))
    again = renderer.tile(*town.degrees(0, 0))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.names == again.names


def test_the_roads_file_of_a_run_renders_the_same_pixels(tmp_path: Path, streets: Path, imagery: Path) -> None:
    write_roads(tmp_path / "roads.fgb", StreetMap.load(streets, with_roads=True).roads, *np.array([town.degrees(0, 0)]).T)
    for source in (None, imagery):
        whole, kept = (TileRenderer(file, source, CONFIG) for file in (streets, tmp_path / "roads.fgb"))
        for point in ((0, 0), (38, -90), (-50, -40)):
            one, other = (renderer.tile(*town.degrees(*point)) for renderer in (whole, kept))
            assert one.image.tobytes() == other.image.tobytes()
            assert one.names == other.names


def test_wide_streets_by_class(tmp_path: Path) -> None:
    line = {"Main Road": [(-300.0, 0.0), (300.0, 0.0)]}
    small = CONFIG.model_copy(update={"names": False})
    shares = []
    for kind in ("footway", "primary"):
        path = town.write_streets(tmp_path / f"{kind}.geojson", line, highway=kind)
        tile = TileRenderer(path, None, small).tile(*town.degrees(0, 0))
        shares.append(float((np.asarray(tile.image)[:, 100] != (0xF2, 0xEF, 0xE9)).any(axis=-1).sum()))
    assert shares[1] > 2 * shares[0]


@pytest.mark.parametrize(("side_m", "pixels"), [(200.0, 336), (100.0, 300)])
def test_carriageways_are_as_wide_as_on_the_ground(tmp_path: Path, side_m: float, pixels: int) -> None:
    """Between its casings, a pixel each; 9 m and more have the main streets' colour and lie above the others."""
    lines = {"Main": [(-300.0, 0.0), (300.0, 0.0)], "Side": [(-20.0, -300.0), (-20.0, 300.0)]}
    config = CONFIG.model_copy(update={"names": False, "side_m": side_m, "pixels": pixels})
    shown = {"primary": 12.0, "primary_link": 12.0, "tertiary": 9.0, "residential": 7.5, "unknown": 7.5, "footway": 2.5}
    for kind, metres in shown.items():
        path = town.write_streets(tmp_path / "s.geojson", {"Main": lines["Main"]}, highway=kind)
        column = np.asarray(TileRenderer(path, None, config).tile(*town.degrees(0, 0)).image)[:, pixels // 4]
        width = (column != (0xF2, 0xEF, 0xE9)).any(axis=-1).sum()
        assert width == pytest.approx(metres * pixels / side_m + 3, abs=1.5)
        assert tuple(column[pixels // 2]) == ((0xFB, 0xE3, 0xA1) if metres >= 9 else (255, 255, 255))
    features = [json.loads(town.write_streets(tmp_path / f"{k}.geojson", {n: lines[n]}, highway=k).read_text())["features"][0]
                for n, k in (("Main", "primary"), ("Side", "residential"))]  # fmt: skip
    (tmp_path / "both.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    crossing = np.asarray(TileRenderer(tmp_path / "both.geojson", None, config).tile(*town.degrees(-20, 0)).image)
    assert tuple(crossing[pixels // 2, pixels // 2]) == (0xFB, 0xE3, 0xA1)


def test_the_places_street_comes_first_by_any_of_its_names(tmp_path: Path) -> None:
    """King Street is nearer and longer; the place is on Mill Street, which the address calls otherwise."""
    lines = {"King Street": [(-300.0, -2.0), (300.0, -2.0)], "Mill Street": [(-90.0, -40.0), (90.0, -40.0)]}
    path = town.write_streets(tmp_path / "s.geojson", lines)
    tree = json.loads(path.read_text())
    tree["features"][1]["properties"]["alt_name"] = "Rue du Moulin"
    path.write_text(json.dumps(tree))
    renderer, here = TileRenderer(path, None, CONFIG), town.degrees(0, 0)
    names = [renderer.tile(*here, street=street).names[0] for street in ("Mill Street", "rue du moulin", "", "Elm Road")]
    assert names == ["Mill Street", "Mill Street", "King Street", "King Street"]


def test_imagery_lies_north_up_under_the_names(streets: Path, imagery: Path) -> None:
    tile = TileRenderer(streets, imagery, CONFIG).tile(*town.degrees(0, 0))
    pixels = np.asarray(tile.image).astype(int)
    assert sorted(tile.names) == ["King Street", "Mill Street"]
    assert pixels[-30, 30, 0] > 150  # red in the west
    assert pixels[-30, 30, 2] < 50
    assert pixels[30, -30, 2] > 150  # blue in the east
    assert pixels[30, -30, 0] < 50
    assert (pixels.min(axis=-1) > 240).sum() > 300  # white halos
    bare = TileRenderer(streets, imagery, CONFIG.model_copy(update={"names": False})).tile(*town.degrees(0, 0))
    assert (np.asarray(bare.image).min(axis=-1) > 240).sum() == 0


def test_imagery_in_any_projection_and_scale(tmp_path: Path, streets: Path, imagery: Path) -> None:
    """The same ground from UTM and from degrees, at 1 m and at 0.25 m a pixel: the same tile within a pixel's width."""
    bare = CONFIG.model_copy(update={"names": False})
    expected = np.asarray(TileRenderer(None, imagery, bare).tile(*town.degrees(-60, 60)).image).astype(int)
    for crs, finer in (("EPSG:4326", 1), ("EPSG:3857", 1), ("EPSG:32631", 4)):
        other = tmp_path / "other.tif"
        with rasterio.open(imagery) as source:
            transform, width, height = calculate_default_transform(source.crs, crs, source.width, source.height, *source.bounds)
            size = {"width": width * finer, "height": height * finer, "transform": transform * transform.scale(1 / finer)}
            with rasterio.open(other, "w", **{**source.profile, **size, "crs": crs}) as out:
                reproject(rasterio.band(source, [1, 2, 3]), rasterio.band(out, [1, 2, 3]))
        drawn = np.asarray(TileRenderer(None, other, bare).tile(*town.degrees(-60, 60)).image).astype(int)
        assert (abs(drawn - expected).max(axis=-1) > 60).mean() < 0.01


def test_imagery_by_http(imagery: Path) -> None:
    """A GeoTIFF on a web server is read in ranges."""
    data, bare = imagery.read_bytes(), CONFIG.model_copy(update={"names": False})
    with Server(lambda path: (200, {}, data)).running() as running:
        remote_tile = TileRenderer(None, f"{running.url}/satellite.tif", bare).tile(*town.degrees(-60, 60))
        assert {request.headers["Range"][:6] for request in running.requests[1:]} == {"bytes="}  # the first is a HEAD
    assert remote_tile.image.tobytes() == TileRenderer(None, imagery, bare).tile(*town.degrees(-60, 60)).image.tobytes()


def test_imagery_of_one_band_and_with_a_palette(tmp_path: Path) -> None:
    grey, palette = tmp_path / "grey.tif", tmp_path / "palette.tif"
    with rasterio.open(town.write_imagery(tmp_path / "rgb.tif")) as source:
        profile, red = {**source.profile, "count": 1}, source.read(1)
    with rasterio.open(grey, "w", **profile) as out:
        out.write(red, 1)
    with rasterio.open(palette, "w", **{**profile, "photometric": "palette"}) as out:
        out.write((red > 0).astype(np.uint8), 1)
        out.write_colormap(1, {0: (1, 2, 3, 255), 1: (250, 240, 230, 255)})
    here = town.degrees(0, -50)
    pixels = np.asarray(TileRenderer(None, grey, CONFIG).tile(*here).image)
    assert tuple(pixels[200, 20]) == (200, 200, 200)
    pixels = np.asarray(TileRenderer(None, palette, CONFIG).tile(*here).image)
    assert tuple(pixels[200, 20]) == (250, 240, 230)
    assert tuple(pixels[200, -20]) == (1, 2, 3)


def test_a_tile_half_outside_the_imagery(tmp_path: Path, imagery: Path) -> None:
    renderer = TileRenderer(None, imagery, CONFIG)
    pixels = np.asarray(renderer.tile(*town.degrees(-200, -100)).image)  # half of it, 50 m, lies to the west of the imagery
    assert pixels[200, 20].max() == 0
    assert pixels[200, -20].argmax() == 0
    with pytest.raises(InputError, match="covers only"):
        renderer.tile(*town.degrees(-300, -100))


def test_imagery_without_streets(imagery: Path) -> None:
    tile = TileRenderer(None, imagery, CONFIG).tile(*town.degrees(-100, 100))
    assert tile.names == []
    assert np.asarray(tile.image)[20, 20].argmax() == 1  # green in the north-west


def test_a_place_outside_the_sources_has_no_tile(streets: Path, imagery: Path) -> None:
    far = town.degrees(5000, 5000)
    with pytest.raises(InputError, match="no street"):
        TileRenderer(streets, None, CONFIG).tile(*far)
    with pytest.raises(InputError, match="covers only 0%"):
        TileRenderer(streets, imagery, CONFIG).tile(*far)


def test_errors_name_the_bad_source(tmp_path: Path, streets: Path) -> None:
    with pytest.raises(InputError, match="nothing to draw"):
        TileRenderer(None, None, CONFIG)
    with pytest.raises(InputError, match=r"nowhere.geojson can't be read"):
        TileRenderer(tmp_path / "nowhere.geojson", None, CONFIG)
    (tmp_path / "not.geojson").write_text("lat,lon")
    with pytest.raises(InputError, match="is not GeoJSON"):
        TileRenderer(tmp_path / "not.geojson", None, CONFIG)
    (tmp_path / "empty.geojson").write_text('{"features": []}')
    with pytest.raises(InputError, match="has no lines"):
        TileRenderer(tmp_path / "empty.geojson", None, CONFIG)
    (tmp_path / "not.tif").write_text("no picture")
    with pytest.raises(InputError, match=r"not.tif can't be opened"):
        TileRenderer(streets, tmp_path / "not.tif", CONFIG)
    with pytest.raises(InputError, match="no coordinate system"):
        TileRenderer(streets, town.write_imagery(tmp_path / "no_crs.tif", crs=None), CONFIG)
    with pytest.raises(InputError, match=r"ftp://bucket/city.tif: give a file"):
        TileRenderer(streets, "ftp://bucket/city.tif", CONFIG)
    with pytest.raises(InputError, match="uint16 samples"):
        TileRenderer(streets, town.write_imagery(tmp_path / "deep.tif", dtype="uint16"), CONFIG)


# In metres: level, upright, slanting, bent and curved streets, and three that are too short or too bent for their names.
STREETS: dict[str, list[tuple[float, float]]] = {
    "Trumpington Street": [(-300, -62), (300, -50)],
    "Saint Andrew's Street": [(-70, -300), (-62, 300)],
    "Garret Hostel Lane": [(-58, 20), (-20, -20), (90, -50)],
    "Free School Lane": [(20, -300), (30, -120), (45, -90), (50, -57)],
    "Rue de l'Évêché": [(-99, 80), (-75, 50), (-62, 10)],
    "Jesus Lane": [(60 * np.cos(a) - 20, 60 * np.sin(a) - 40) for a in np.linspace(-2.2, -0.9, 12)],
    "Pembroke Court": [(70, -58), (72, -66)],
    "Quayside": [(-30, 60), (-28, 66)],
}


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader()


@pytest.fixture
def toy_tiles(toy_city: dict[str, str]) -> list[Tile]:
    """Three tiles of a toy city with its satellite image below."""
    world = toy_world("alderbrook")
    renderer = TileRenderer(toy_city["streets"], toy_city["imagery"], CONFIG)
    chosen = random.Random(1).sample(list(street_places(world)), 3)
    return [renderer.tile(*to_degrees(world, np.array([[x, y]]))[0][::-1], street.name) for street, x, y in chosen]


@pytest.fixture
def town_tiles(tmp_path: Path) -> list[Tile]:
    """Three tiles of a drawn town."""
    renderer = TileRenderer(town.write_streets(tmp_path / "streets.geojson", STREETS), None, CONFIG)
    return [renderer.tile(*town.degrees(x, y)) for x, y in ((0, 0), (-30, -20), (10, -60))]


@pytest.mark.parametrize("drawn", ["town_tiles", "toy_tiles"])
def test_ocr_reads_the_listed_names_and_no_others(drawn: str, request: pytest.FixtureRequest, reader: Reader) -> None:
    tiles = request.getfixturevalue(drawn)
    read = [reader.read(tile.image) for tile in tiles]
    pieces = [[*texts, *map("".join, itertools.pairwise(texts))] for texts in read]  # some names are read in two pieces
    listed = [(name, texts) for tile, texts in zip(tiles, pieces, strict=True) for name in tile.names]
    assert len(listed) >= 7
    assert sum(wrong(name, texts) <= NEAR for name, texts in listed) >= 0.9 * len(listed)
    for tile, texts in zip(tiles, read, strict=True):
        whole = "".join(map(letters, tile.names))
        strangers = [text for text in texts if len(letters(text)) >= 5 and wrong(text, [whole]) > 0.4]
        assert not strangers


def test_ocr_reads_nothing_without_names(tmp_path: Path, reader: Reader) -> None:
    bare = CONFIG.model_copy(update={"names": False})
    renderer = TileRenderer(town.write_streets(tmp_path / "streets.geojson", STREETS), None, bare)
    assert not [text for text in reader.read(renderer.tile(*town.degrees(0, 0)).image) if len(letters(text)) >= 4]
