"""Squares of local ground out of web mercator tiles (z/x/y), whoever keeps the tiles."""

import io
import math
from functools import lru_cache
from typing import Protocol

import numpy as np
import pyproj
from PIL import Image, UnidentifiedImageError

from addressvlm.errors import InputError
from addressvlm.maps.window import EDGE, Bounds, corners_of, cut

WORLD_M = 2 * math.pi * 6378137.0  # side of the square world of EPSG:3857
TILE_SIDE = 256  # pixels that a zoom level stands for; servers may send finer ones
MAX_SIDE = 1024  # pixels; larger "tiles" are refused before they are decoded
MAX_BYTES = 8 << 20
MAX_TILES = 64  # that one square may need
KEPT = 64  # decoded tiles; neighbouring places share them
FORMATS = ("PNG", "JPEG", "WEBP")


class TileSource(Protocol):
    """Where web mercator tiles come from."""

    name: str  # for errors
    attribution: str
    zooms: tuple[int, int]  # the coarsest and the finest that there are

    def tile(self, z: int, x: int, y: int) -> Image.Image | None:
        """RGBA tile, row y counted from the north; None where there is none.

        Raises:
            InputError: it can't be had, or is not an image.
        """
        ...


class Mosaic:
    """Imagery in the coordinates `crs` put together from tiles."""

    def __init__(self, source: TileSource, crs: str, zoom: int | None = None) -> None:
        """`zoom` is the level to read; by default the first that is as fine as what is asked for."""
        self.attribution = source.attribution
        self._source, self._fixed = source, zoom
        self._to_mercator = pyproj.Transformer.from_crs(crs, "EPSG:3857", always_xy=True).transform
        self._tile = lru_cache(KEPT)(source.tile)

    def read(self, bounds: Bounds, pixels: int) -> Image.Image:
        """The square `bounds` (west, south, east, north in `crs`) as an RGB image of pixels x pixels.

        Raises:
            InputError: the tiles cover less than half of it, one can't be had, or too many would be needed.
        """
        metres = np.column_stack(self._to_mercator(*corners_of(bounds)))
        if not np.isfinite(metres).all() or abs(metres[:, 1]).max() > WORLD_M / 2:
            raise InputError(f"{self._source.name} covers only 0% of the tile.")
        zoom = self._zoom(float(np.hypot(*(metres[1] - metres[0]))) / pixels)
        corners = (metres / WORLD_M * (1, -1) + 0.5) * 2**zoom  # in tiles, from the north-west
        square = np.vstack((corners, corners[1] + corners[2] - corners[0]))
        first = np.floor(square.min(axis=0) - EDGE / TILE_SIDE).astype(int)
        last = np.floor(square.max(axis=0) + EDGE / TILE_SIDE).astype(int) + 1
        count = int(np.prod(last - first))
        if count > MAX_TILES:
            raise InputError(
                f"a tile of the city needs {count} tiles of {self._source.name} at zoom {zoom}: set tiles.zoom lower."
            )
        mosaic = self._mosaic(zoom, first, last)
        corners = (corners - first) * (mosaic.width / (last - first)[0])
        shrink = np.hypot(*(corners[1] - corners[0])) / pixels
        if shrink > 1:
            smaller = np.ceil(np.array(mosaic.size) / shrink).astype(int)
            corners = corners * smaller / mosaic.size
            mosaic = mosaic.resize((smaller[0], smaller[1]), Image.Resampling.BOX)
        return cut(mosaic.convert("RGB"), mosaic.getchannel("A"), corners, pixels, f"{self._source.name} at zoom {zoom}")

    def _zoom(self, metres_per_pixel: float) -> int:
        coarsest, finest = self._source.zooms
        wanted = math.ceil(math.log2(WORLD_M / TILE_SIDE / metres_per_pixel) - 1e-6)
        return self._fixed if self._fixed is not None else min(max(wanted, coarsest), finest)

    def _mosaic(self, zoom: int, first: np.ndarray, last: np.ndarray) -> Image.Image:
        """Tiles from `first` to before `last` (column, row) side by side (RGBA); transparent where there are none."""
        n = 2**zoom
        tiles = {
            (x - first[0], y - first[1]): self._tile(zoom, int(x) % n, int(y))
            for y in range(first[1], last[1])
            for x in range(first[0], last[0])
            if 0 <= y < n
        }
        side = max((tile.width for tile in tiles.values() if tile), default=TILE_SIDE)
        columns, rows = last - first
        mosaic = Image.new("RGBA", (int(columns) * side, int(rows) * side))
        for (column, row), tile in tiles.items():
            if tile:
                whole = tile if tile.size == (side, side) else tile.resize((side, side), Image.Resampling.BILINEAR)
                mosaic.paste(whole, (int(column) * side, int(row) * side))
        return mosaic


def decode(data: bytes, name: str) -> Image.Image:
    """RGBA pixels of an encoded tile.

    Raises:
        InputError: it is not a PNG, JPEG or WebP image, or is larger than a tile can be.
    """
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} is larger than {MAX_BYTES >> 20} MB: that is no map tile.")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if max(image.size) > MAX_SIDE:
                raise InputError(f"{name} has {image.width} x {image.height} pixels: map tiles have at most {MAX_SIDE}.")
            return image.convert("RGBA")
    except UnidentifiedImageError:
        raise InputError(f"{name} is not a PNG, JPEG or WebP image.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} is a damaged image ({' '.join(str(error).split())}).") from None
