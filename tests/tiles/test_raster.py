"""Squares of ground out of web mercator tiles"""

import numpy as np
import pyproj
import pytest
from PIL import Image

from addressvlm import InputError
from addressvlm.tiles.raster import Mosaic

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
