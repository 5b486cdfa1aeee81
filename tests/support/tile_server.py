"""The hand-drawn town as web mercator tiles, and an answer of a tests.support.http_server.Server with them."""

import io
import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import pyproj
from PIL import Image

from tests.support import town
from tests.support.http_server import Answer, Request

WORLD_M = 2 * math.pi * 6378137.0
_UTM = pyproj.Transformer.from_crs("EPSG:3857", "EPSG:32631", always_xy=True)
_HERE = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:32631", always_xy=True).transform(town.LON, town.LAT)


def ground(z: int, x: int, y: int, side: int = 256) -> Image.Image:
    """What `town.write_imagery` draws, as the tile z/x/y (RGBA, transparent beyond the town)."""
    columns, rows = np.meshgrid(np.arange(side) + 0.5, np.arange(side) + 0.5)
    mx = ((x + columns / side) / 2**z - 0.5) * WORLD_M
    my = (0.5 - (y + rows / side) / 2**z) * WORLD_M
    east, north = _UTM.transform(mx, my)
    east, north = east - _HERE[0], north - _HERE[1]
    pixels = np.zeros((side, side, 4), np.uint8)
    pixels[east < 0] = (200, 0, 0, 255)
    pixels[east >= 0] = (0, 0, 200, 255)
    pixels[(east < -125) & (north > 125)] = (0, 180, 0, 255)
    pixels[np.maximum(abs(east), abs(north)) > 250] = 0
    return Image.fromarray(pixels)


@cache
def png(z: int, x: int, y: int) -> bytes:
    """`ground`, encoded."""
    return encoded(ground(z, x, y))


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def tiles_of_town(zoom: int) -> Iterator[tuple[int, int]]:
    """Columns and rows of the tiles that the town lies on."""
    x, y = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:3857", always_xy=True).transform(town.LON, town.LAT)
    column, row = (x / WORLD_M + 0.5) * 2**zoom, (0.5 - y / WORLD_M) * 2**zoom
    reach = 450 / (WORLD_M / 2**zoom)  # 250 m on the ground are 408 m of web mercator here
    for i in range(math.floor(column - reach), math.floor(column + reach) + 1):
        for j in range(math.floor(row - reach), math.floor(row + reach) + 1):
            yield i, j


def good(request: Request) -> Answer:
    """A PNG of the ground for /z/x/y.png; a town of water elsewhere has no tiles."""
    z, x, y = map(int, request.path.strip("/").removesuffix(".png").split("/"))
    return 200, {"Content-Type": "image/png"}, png(z, x, y)
