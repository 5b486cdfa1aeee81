"""Squares of ground out of web mercator tiles, and archives of tiles."""

import sqlite3
import struct
import zlib
from pathlib import Path

import numpy as np
import pyproj
import pytest
from PIL import Image
from pmtiles.tile import Compression, TileType, zxy_to_tileid
from pmtiles.writer import Writer

from addressvlm import InputError
from addressvlm.config import TilesConfig
from addressvlm.tiles.raster import MbTiles, Mosaic, decode_tile
from addressvlm.tiles.renderer import TileRenderer
from tests.support import town
from tests.support.tile_server import png, tiles_of_town

GLOBE = pyproj.Geod(ellps="WGS84")


class Source:
    """Tiles whose red and green say how far east and north of a point a pixel is: 128 there, one step each 2 m of the globe."""

    name, attribution = "source", ""

    def __init__(self, lat: float, lon: float, zooms: tuple[int, int] = (0, 22)) -> None:
        self.lat, self.lon, self.zooms = lat, lon, zooms
        self.requests: list[tuple[int, int, int]] = []

    def tile(self, z: int, x: int, y: int) -> Image.Image:
        self.requests.append((z, x, y))
        columns, rows = np.meshgrid((np.arange(256) + 0.5) / 256, (np.arange(256) + 0.5) / 256)
        lon = (x + columns) / 2**z * 360 - 180
        lat = np.degrees(np.arctan(np.sinh(np.pi * (1 - 2 * (y + rows) / 2**z))))
        here = np.full(lon.shape, self.lon), np.full(lon.shape, self.lat)
        azimuth, _, metres = GLOBE.inv(*here, lon, lat)
        pixels = [128 + metres * side(np.radians(azimuth)) / 2 for side in (np.sin, np.cos)] + [0 * lon, 0 * lon + 255]
        return Image.fromarray(np.stack(pixels, axis=-1).clip(0, 255).astype(np.uint8), "RGBA")


def crs(lat: float, lon: float) -> str:
    return f"+proj=tmerc +lat_0={lat} +lon_0={lon} +k=1 +datum=WGS84 +units=m"


@pytest.mark.parametrize("lat", [0.0, 60.0, -60.0])
def test_squares_are_correct_at_any_latitude(lat: float) -> None:
    """At 60 degrees a metre of the map is half a metre of the ground."""
    pixels = np.asarray(Mosaic(Source(lat, 25.0), crs(lat, 25.0)).read((-100, -100, 100, 100), 50)).astype(float)
    middles = np.arange(50) * 4 - 98
    east, north = np.meshgrid(middles, -middles)
    assert abs(pixels[..., 0] - (128 + east / 2)).max() <= 2
    assert abs(pixels[..., 1] - (128 + north / 2)).max() <= 2


@pytest.mark.parametrize(
    ("zooms", "fixed", "pixels", "zoom"),
    [
        ((0, 22), None, 128, 16),
        ((0, 22), None, 129, 17),
        ((17, 22), None, 128, 17),
        ((0, 15), None, 128, 15),
        ((0, 22), 18, 128, 18),
    ],
)
def test_the_first_zoom_level_that_is_fine_enough_is_read(
    zooms: tuple[int, int], fixed: int | None, pixels: int, zoom: int
) -> None:
    """At the equator level 16 has 2.39 m a pixel."""
    source, half = Source(0.0, 25.0, zooms), 64 * 2.3887
    Mosaic(source, "EPSG:3857", fixed).read((2782987.27 - half, -half, 2782987.27 + half, half), pixels)
    assert {z for z, _, _ in source.requests} == {zoom}


def test_tiles_wrap_around_the_date_line() -> None:
    """The last column's neighbour is the first; there is nothing north of the first row."""
    source, edge = Source(0.0, 179.99), 20037508.34
    Mosaic(source, "EPSG:3857", 10).read((edge - 60_000, -30_000, edge - 1, 30_000 - 1), 64)
    assert all(0 <= x < 1024 for _, x, _ in source.requests)
    assert {x for _, x, _ in source.requests} >= {0, 1023}
    Mosaic(source, "EPSG:3857", 10).read((-30_000, edge - 60_001, 30_000, edge - 1), 64)
    assert all(0 <= y < 1024 for _, _, y in source.requests)


def test_a_place_on_the_date_line_has_a_tile_of_both_sides() -> None:
    for lon in (180.0, -180.0, 179.9999, -179.9999):
        source = Source(0.0, lon)
        pixels = np.asarray(Mosaic(source, crs(0.0, lon)).read((-100, -100, 100, 100), 50)).astype(float)
        assert abs(pixels[25, :, 0] - (128 + (np.arange(50) * 4 - 98) / 2)).max() <= 2
        assert len({x for _, x, _ in source.requests}) < 4


def test_one_picture_for_every_tile_of_a_zoom_level_is_a_placeholder() -> None:
    """Servers send it with status 200 where they have no imagery; two different pictures show that it is imagery."""

    class Placeholder(Source):
        def tile(self, z: int, x: int, y: int) -> Image.Image:
            return super().tile(z, x, y) if z < 18 else Image.new("RGBA", (256, 256), (128, 128, 128))

    mosaic = Mosaic(Placeholder(60.0, 25.0), crs(60.0, 25.0))
    with pytest.raises(InputError, match=r"same picture for all \d+ tiles .* zoom 18.*set tiles\.zoom to 17 or lower"):
        mosaic.read((-100, -100, 100, 100), 336)
    mosaic.read((-100, -100, 100, 100), 100)


def test_each_tile_is_decoded_once() -> None:
    source = Source(60.0, 25.0)
    mosaic = Mosaic(source, crs(60.0, 25.0))
    for _ in range(2):
        mosaic.read((-100, -100, 100, 100), 50)
    assert len(source.requests) == len(set(source.requests))


def test_too_many_tiles_are_refused() -> None:
    source = Source(60.0, 25.0)
    with pytest.raises(InputError, match=r"needs 81 tiles of source at zoom 20: set tiles\.zoom lower"):
        Mosaic(source, "EPSG:3857", 20).read((0.0, 0.0, 305.0, 305.0), 50)
    assert source.requests == []


CONFIG = TilesConfig(names=False)
ZOOMS = (17, 18)


def write_mbtiles(path: Path, metadata: dict[str, str] | None = None, zooms: tuple[int, ...] = ZOOMS) -> Path:
    """An MBTiles file of the town."""
    metadata = {"format": "png", "attribution": "© Town", "bounds": bounds(), **(metadata or {})}
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE metadata (name TEXT, value TEXT)")
        base.execute("CREATE TABLE tiles (zoom_level INTEGER, tile_column INTEGER, tile_row INTEGER, tile_data BLOB)")
        base.executemany("INSERT INTO metadata VALUES (?, ?)", metadata.items())
        for z in zooms:
            for x, y in tiles_of_town(z):
                base.execute("INSERT INTO tiles VALUES (?, ?, ?, ?)", (z, x, 2**z - 1 - y, png(z, x, y)))
    base.close()
    return path


def bounds() -> str:
    (south, west), (north, east) = town.degrees(-250, -250), town.degrees(250, 250)
    return f"{west},{south},{east},{north}"


def write_pmtiles(path: Path, kind: TileType = TileType.PNG) -> Path:
    """A PMTiles file of the town."""
    west, south, east, north = (round(float(part) * 1e7) for part in bounds().split(","))
    header = {
        "tile_type": kind, "tile_compression": Compression.NONE, "min_lon_e7": west, "min_lat_e7": south, "max_lon_e7": east,
        "max_lat_e7": north, "center_zoom": 17, "center_lon_e7": (west + east) // 2, "center_lat_e7": (south + north) // 2,
    }  # fmt: skip
    with path.open("wb") as file:
        writer = Writer(file)
        for z in ZOOMS:
            for tile, x, y in sorted((zxy_to_tileid(z, x, y), x, y) for x, y in tiles_of_town(z)):
                writer.write_tile(tile, png(z, x, y))
        writer.finalize(header, {"attribution": "© Town"})
    return path


def write(path: Path) -> Path:
    return write_mbtiles(path) if path.suffix == ".mbtiles" else write_pmtiles(path)


@pytest.mark.parametrize("name", ["town.mbtiles", "town.pmtiles"])
@pytest.mark.parametrize("pixels", [150, 336, 1000])
def test_same_ground_as_the_geotiff(tmp_path: Path, name: str, pixels: int) -> None:
    """At level 17, at 18, and beyond the finest that there is."""
    config = CONFIG.model_copy(update={"pixels": pixels})
    archive, geotiff = write(tmp_path / name), town.write_imagery(tmp_path / "satellite.tif")
    renderer = TileRenderer(None, archive, config)
    drawn = np.asarray(renderer.tile(*town.degrees(-60, 60)).image).astype(int)
    expected = np.asarray(TileRenderer(None, geotiff, config).tile(*town.degrees(-60, 60)).image).astype(int)
    assert (abs(drawn - expected).max(axis=-1) > 60).mean() < 0.015
    assert renderer.imagery is not None
    assert renderer.imagery.attribution == "© Town"
    credited = TileRenderer(None, archive, config.model_copy(update={"attribution": "© Me"}))
    assert credited.imagery is not None
    assert credited.imagery.attribution == "© Me"


@pytest.mark.parametrize("name", ["town.mbtiles", "town.pmtiles"])
def test_outside_the_archive(tmp_path: Path, name: str) -> None:
    renderer = TileRenderer(None, write(tmp_path / name), CONFIG)
    half = np.asarray(renderer.tile(*town.degrees(-240, -100)).image)  # the west of the square is not covered
    assert half[200, 20].max() == 0
    assert half[200, -20].argmax() == 0
    with pytest.raises(InputError, match=rf"{name} at zoom 18 covers only 0% of the tile"):
        renderer.tile(*town.degrees(5000, 5000))


def test_vector_archives_are_errors(tmp_path: Path) -> None:
    for path in (
        write_mbtiles(tmp_path / "vector.mbtiles", {"format": "pbf"}),
        write_pmtiles(tmp_path / "vector.pmtiles", TileType.MVT),
    ):
        with pytest.raises(InputError, match=f"{path.name} holds vector tiles: give a raster archive"):
            TileRenderer(None, path, CONFIG)


@pytest.mark.parametrize("name", ["x.mbtiles", "x.pmtiles"])
def test_files_that_are_no_archive(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} does not exist"):
        TileRenderer(None, tmp_path / name, CONFIG)
    for content in (b"", b"no tiles here, only words\n" * 50):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name} is not a"):
            TileRenderer(None, tmp_path / name, CONFIG)


@pytest.mark.parametrize("name", ["x.mbtiles", "x.pmtiles"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_truncated_archives(tmp_path: Path, name: str, share: float) -> None:
    """A sentence, at opening or where the tiles are missing; never another exception."""
    path = write(tmp_path / name)
    whole = path.read_bytes()
    path.write_bytes(whole[: round(len(whole) * share)])
    with pytest.raises(InputError, match=name):
        everything(path)


def everything(path: Path) -> None:
    """Read all of an archive."""
    renderer = TileRenderer(None, path, CONFIG)
    for x in range(-150, 151, 100):
        for y in range(-150, 151, 100):
            renderer.tile(*town.degrees(x, y))


def test_an_empty_archive_and_one_without_bounds(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no tiles"):
        TileRenderer(None, write_mbtiles(tmp_path / "empty.mbtiles", zooms=()), CONFIG)
    lost = write_mbtiles(tmp_path / "lost.mbtiles", {"bounds": "everywhere"})
    with pytest.raises(InputError, match=r"has no bounds in its metadata: set city\.streets"):
        TileRenderer(None, lost, CONFIG)
    assert TileRenderer(town.write_streets(tmp_path / "s.geojson"), lost, CONFIG).tile(*town.degrees(0, 0)).image


def test_tiles_that_are_no_image(tmp_path: Path) -> None:
    path = write_mbtiles(tmp_path / "bad.mbtiles")
    with sqlite3.connect(path) as base:
        base.execute("UPDATE tiles SET tile_data = 'GIF89a'")
    base.close()
    with pytest.raises(InputError, match="is not a PNG, JPEG or WebP image"):
        TileRenderer(None, path, CONFIG).tile(*town.degrees(0, 0))


def test_oversized_tiles_are_refused_before_decoding() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    with pytest.raises(InputError, match=r"bomb .*(60000|limit)"):
        decode_tile(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""), "bomb")


@pytest.mark.parametrize("scheme", [None, "xyz", "tms"])
def test_mbtiles_that_are_stored_upside_down_are_read_only_if_they_say_so(tmp_path: Path, scheme: str | None) -> None:
    file = write_mbtiles(tmp_path / "town.mbtiles", {"scheme": scheme} if scheme else None)
    right = np.asarray(MbTiles(file).tile(17, *next(tiles_of_town(17)))) if scheme != "xyz" else None
    with sqlite3.connect(file) as base:
        base.execute("UPDATE tiles SET tile_row = (1 << zoom_level) - 1 - tile_row")
    base.close()
    z, (x, y) = 17, next(tiles_of_town(17))
    if scheme == "xyz":
        assert np.array_equal(np.asarray(MbTiles(file).tile(z, x, y)), np.asarray(decode_tile(png(z, x, y), "")))
    else:
        assert right is not None
        with pytest.raises(InputError, match=r"upside down: .*add \('scheme', 'xyz'\)"):
            MbTiles(file).tile(z, x, y)
