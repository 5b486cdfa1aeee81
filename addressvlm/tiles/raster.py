"""Read square windows of georeferenced imagery: GeoTIFF, MBTiles and PMTiles."""

import io
import math
import sqlite3
import warnings
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyproj
import rasterio
from PIL import Image, UnidentifiedImageError
from pmtiles.reader import MmapSource, Reader
from pmtiles.tile import MagicNumberNotFound, SpecVersionUnsupported, TileType
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from addressvlm.errors import InputError

MIN_COVERAGE = 0.5  # share of a tile that the imagery must cover
MARGIN = 2  # source pixels read beyond the tile, for interpolation

Bounds = tuple[float, float, float, float]  # west, south, east, north in local metres


def three_corners(bounds: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """x (3,) and y (3,) of the upper left, upper right and lower left corner.

    At the size of a tile every projection is affine to well below a pixel, so three corners are enough.
    """
    west, south, east, north = bounds
    return np.array([west, east, west]), np.array([north, north, south])


def cut_window(
    values: Image.Image, covered: Image.Image, corners: np.ndarray, pixels: int, source: str,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> Image.Image:  # fmt: skip
    """The square of pixels x pixels whose three corners (3, 2) lie at these columns and rows of `values`.

    Args:
        values: RGB source pixels of about the same resolution.
        covered: mode L, 255 where `values` are valid.
        source: name of the source, for the error.

    Raises:
        InputError: less than half of the square is covered.
    """
    (a, d), (b, e) = (corners[1] - corners[0]) / pixels, (corners[2] - corners[0]) / pixels
    size, affine, place = (pixels, pixels), Image.Transform.AFFINE, (a, b, corners[0, 0], d, e, corners[0, 1])
    share = np.asarray(covered.transform(size, affine, place)).mean() / 255
    if share < MIN_COVERAGE:
        raise InputError(f"{source} covers only {share:.0%} of the tile.")
    return values.transform(size, affine, place, resampling)


# For a COG over http(s): time-outs, and no listing of its folder.
GDAL_OPTIONS = {"GDAL_HTTP_TIMEOUT": 20, "GDAL_HTTP_MAX_RETRY": 3, "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}


class GeoTiff:
    """A GeoTIFF or COG (or any other raster that GDAL reads) in the coordinates `crs`; keeps no pixels in memory."""

    def __init__(self, path: str | Path, crs: str, attribution: str | None = None) -> None:
        """Open the file.

        Raises:
            InputError: the file is missing, has no georeference, or is not 8-bit grey, RGB or palette.
        """
        self._source = _open(path)
        self.path, self.crs = path, crs
        self.attribution = attribution or self._source.tags().get("TIFFTAG_COPYRIGHT", "")
        dtype = self._source.dtypes[0]
        if dtype != "uint8":
            raise InputError(f"{path} has {dtype} samples: convert it to 8 bits (gdal_translate -ot Byte -scale).")
        self._to_source = pyproj.Transformer.from_crs(crs, self._source.crs, always_xy=True).transform
        self._palette: np.ndarray | None = None  # (256, 3)
        if self._source.colorinterp[0] == ColorInterp.palette:
            self._palette = np.zeros((256, 3), np.uint8)
            for value, colour in self._source.colormap(1).items():
                self._palette[value] = colour[:3]

    def read(self, bounds: Bounds, pixels: int) -> Image.Image:
        """As `Imagery.read`."""
        x, y = self._to_source(*three_corners(bounds))
        t = ~self._source.transform
        corners = np.column_stack((t.a * x + t.b * y + t.c, t.d * x + t.e * y + t.f))
        if not np.isfinite(corners).all():
            raise InputError(f"{self.path} covers only 0% of the tile.")
        square = np.vstack((corners, corners[1] + corners[2] - corners[0]))
        first = np.floor(square.min(axis=0) - MARGIN).clip(0).astype(int)
        last = np.ceil(square.max(axis=0) + MARGIN).clip(max=(self._source.width, self._source.height)).astype(int)
        if (last <= first).any():
            raise InputError(f"{self.path} covers only 0% of the tile.")
        shrink = max(1.0, float(np.hypot(*(corners[1] - corners[0]))) / pixels)
        values, covered = self._window(first, last, shrink)
        scale = np.array([values.width, values.height]) / (last - first)
        resampling = Image.Resampling.NEAREST if self._palette is not None else Image.Resampling.BILINEAR
        return cut_window(values, covered, (corners - first) * scale, pixels, str(self.path), resampling)

    def _window(self, first: np.ndarray, last: np.ndarray, shrink: float) -> tuple[Image.Image, Image.Image]:
        """Source pixels from `first` to `last` (column, row), `shrink` times smaller: RGB, and their mask (L)."""
        window = Window.from_slices((first[1], last[1]), (first[0], last[0]))
        width, height = np.maximum(1, np.ceil((last - first) / shrink)).astype(int)
        bands = [1, 2, 3] if self._source.count >= 3 else [1]
        resampling = Resampling.nearest if self._palette is not None else Resampling.average
        try:
            with rasterio.Env(**GDAL_OPTIONS):
                values = self._source.read(bands, window=window, out_shape=(len(bands), height, width), resampling=resampling)
                mask = self._source.dataset_mask(window=window, out_shape=(height, width))
        except RasterioError as error:
            raise InputError(f"{self.path} can't be read ({' '.join(str(error).split())}): is the file complete?") from None
        if self._palette is not None:
            return Image.fromarray(self._palette[values[0]]), Image.fromarray(mask)
        return Image.fromarray(np.stack([*values] if len(bands) == 3 else [*values] * 3, axis=-1)), Image.fromarray(mask)


def geotiff_centre(path: str | Path) -> tuple[float, float]:
    """Latitude and longitude of the centre of a GeoTIFF.

    Raises:
        InputError: it can't be opened or has no georeference.
    """
    with _open(path) as source:
        west, south, east, north = transform_bounds(source.crs, "EPSG:4326", *source.bounds)
    return (south + north) / 2, (west + east) / 2


def _open(path: str | Path) -> rasterio.DatasetReader:
    try:
        with warnings.catch_warnings(), rasterio.Env(**GDAL_OPTIONS):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            source = rasterio.open(path)
    except RasterioError as error:
        raise InputError(f"{path} can't be opened ({' '.join(str(error).split())}): set tiles.imagery to a GeoTIFF.") from None
    if source.crs is None:
        raise InputError(f"{path} has no coordinate system: give a GeoTIFF with one (gdal_translate -a_srs EPSG:…).")
    return source


WORLD_M = 2 * math.pi * 6378137.0  # side of the world square of EPSG:3857
TILE_SIDE = 256  # pixels by which zoom levels are defined; servers may send finer tiles
MAX_SIDE = 1024  # pixels; larger images are refused before they are decoded
MAX_BYTES = 8 << 20
MAX_TILES = 64  # per square
CACHED_TILES = 64  # decoded; neighbouring places share them
FORMATS = ("PNG", "JPEG", "WEBP")


class TileSource(Protocol):
    """A source of web mercator tiles."""

    name: str  # for errors
    attribution: str
    zooms: tuple[int, int]  # the coarsest and the finest level

    def tile(self, z: int, x: int, y: int) -> Image.Image | None:
        """RGBA tile, row y counted from the north; None where there is none.

        Raises:
            InputError: it can't be read, or is not an image.
        """
        ...


class Mosaic:
    """Imagery in the coordinates `crs`, assembled from tiles."""

    def __init__(self, source: TileSource, crs: str, zoom: int | None = None) -> None:
        """`zoom` is the level to read; default: the first that is as fine as the requested square."""
        self.attribution = source.attribution
        self._source, self._fixed_zoom = source, zoom
        self._to_mercator = pyproj.Transformer.from_crs(crs, "EPSG:3857", always_xy=True).transform
        self._tile = lru_cache(CACHED_TILES)(source.tile)
        self._pictures: dict[int, set[int]] = {}  # zoom -> digests of the first tiles, until two differ

    def read(self, bounds: Bounds, pixels: int) -> Image.Image:
        """As `Imagery.read`."""
        metres = np.column_stack(self._to_mercator(*three_corners(bounds)))
        metres[:, 0] += WORLD_M * np.round((metres[0, 0] - metres[:, 0]) / WORLD_M)  # across 180 degrees
        if not np.isfinite(metres).all() or abs(metres[:, 1]).max() > WORLD_M / 2:
            raise InputError(f"{self._source.name} covers only 0% of the tile.")
        zoom = self._fixed_zoom
        if zoom is None:
            metres_per_pixel = float(np.hypot(*(metres[1] - metres[0]))) / pixels
            zoom = math.ceil(math.log2(WORLD_M / TILE_SIDE / metres_per_pixel) - 1e-6)
            zoom = min(max(zoom, self._source.zooms[0]), self._source.zooms[1])
        corners = (metres / WORLD_M * (1, -1) + 0.5) * 2**zoom  # in tiles, from the north-west
        square = np.vstack((corners, corners[1] + corners[2] - corners[0]))
        first = np.floor(square.min(axis=0) - MARGIN / TILE_SIDE).astype(int)
        last = np.floor(square.max(axis=0) + MARGIN / TILE_SIDE).astype(int) + 1
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
        return cut_window(mosaic.convert("RGB"), mosaic.getchannel("A"), corners, pixels, f"{self._source.name} at zoom {zoom}")

    def _mosaic(self, zoom: int, first: np.ndarray, last: np.ndarray) -> Image.Image:
        """Tiles from `first` to `last` (column, row; exclusive) as one RGBA image, transparent where there are none."""
        n = 2**zoom
        tiles = {
            (x - first[0], y - first[1]): self._tile(zoom, int(x) % n, int(y))
            for y in range(first[1], last[1])
            for x in range(first[0], last[0])
            if 0 <= y < n
        }
        self._refuse_placeholders(zoom, [tile for tile in tiles.values() if tile])
        side = max((tile.width for tile in tiles.values() if tile), default=TILE_SIDE)
        columns, rows = last - first
        mosaic = Image.new("RGBA", (int(columns) * side, int(rows) * side))
        for (column, row), tile in tiles.items():
            if tile:
                scaled = tile if tile.size == (side, side) else tile.resize((side, side), Image.Resampling.BILINEAR)
                mosaic.paste(scaled, (int(column) * side, int(row) * side))
        return mosaic

    def _refuse_placeholders(self, zoom: int, tiles: list[Image.Image]) -> None:
        """Servers without imagery at a zoom level may send one and the same picture for every tile of it."""
        pictures = self._pictures.setdefault(zoom, set())
        if len(pictures) < 2:
            pictures.update(hash(tile.tobytes()) for tile in tiles)
            if len(pictures) == 1 and len(tiles) > 1:
                raise InputError(
                    f"{self._source.name} has the same picture for all {len(tiles)} tiles of a place at zoom {zoom}, so "
                    f"probably no imagery there: set tiles.zoom to {zoom - 1} or lower."
                )


def decode_tile(data: bytes, name: str) -> Image.Image:
    """RGBA pixels of an encoded tile.

    Raises:
        InputError: it is not a PNG, JPEG or WebP image, or is larger than a tile can be.
    """
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} is larger than {MAX_BYTES >> 20} MB, too large for a map tile.")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if max(image.size) > MAX_SIDE:
                raise InputError(f"{name} has {image.width} x {image.height} pixels: map tiles have at most {MAX_SIDE}.")
            return image.convert("RGBA")
    except UnidentifiedImageError:
        raise InputError(f"{name} is not a PNG, JPEG or WebP image.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} is a damaged image ({' '.join(str(error).split())}).") from None


VECTOR_TILES = "holds vector tiles: give a raster archive (PNG, JPEG or WebP), or the streets alone for a drawn map."
DAMAGE_ERRORS = (EOFError, OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, zlib.error)


class MbTiles:
    """Tiles of an .mbtiles file."""

    def __init__(self, path: str | Path, attribution: str | None = None) -> None:
        """Open the file.

        Raises:
            InputError: it is missing, is no MBTiles file, is empty, or holds vector tiles.
        """
        self.name = str(path)
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist: set tiles.imagery to an MBTiles file.")
        try:
            self._database = sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)
            self._metadata = dict(self._database.execute("SELECT name, value FROM metadata"))
            zooms = self._database.execute("SELECT MIN(zoom_level), MAX(zoom_level) FROM tiles").fetchone()
        except sqlite3.Error as error:
            raise InputError(f"{path} is not an MBTiles file ({error}): export the imagery again.") from None
        if self._metadata.get("format", "") in ("pbf", "mvt", "application/x-protobuf"):
            raise InputError(f"{path} {VECTOR_TILES}")
        if zooms[0] is None:
            raise InputError(f"{path} has no tiles: export the imagery again.")
        self.zooms = (int(zooms[0]), int(zooms[1]))
        self.attribution = attribution or str(self._metadata.get("attribution") or "")
        self._from_north = str(self._metadata.get("scheme")).lower() == "xyz"

    def tile(self, z: int, x: int, y: int) -> Image.Image | None:
        """As `TileSource.tile`."""
        place = (z, x, y if self._from_north else 2**z - 1 - y)
        query = "SELECT CAST(tile_data AS BLOB) FROM tiles WHERE zoom_level = ? AND tile_column = ? AND tile_row = ?"
        try:
            row = self._database.execute(query, place).fetchone()
            if row is None and not self._from_north and self._database.execute(query, (z, x, y)).fetchone():
                raise InputError(
                    f"{self.name} seems to be upside down: it has no tile {z}/{x}/{y} counted from the south, as in MBTiles, "
                    "but one counted from the north (XYZ). If so, add ('scheme', 'xyz') to its table `metadata`, or export it "
                    "again."
                )
        except sqlite3.Error as error:
            raise InputError(f"{self.name} can't be read ({error}): is the file complete?") from None
        return decode_tile(row[0], f"{self.name} tile {z}/{x}/{y}") if row and row[0] else None

    def centre(self) -> tuple[float, float]:
        """Latitude and longitude of the centre, by the archive's metadata.

        Raises:
            InputError: the metadata has no bounds.
        """
        try:
            west, south, east, north = map(float, str(self._metadata["bounds"]).split(","))
        except (KeyError, ValueError):
            raise InputError(f"{self.name} has no bounds in its metadata: set city.streets as well.") from None
        return (south + north) / 2, (west + east) / 2


class PmTiles:
    """Tiles of a .pmtiles file."""

    def __init__(self, path: str | Path, attribution: str | None = None) -> None:
        """Open the file.

        Raises:
            InputError: it is missing, is no PMTiles file of version 3, or holds vector tiles.
        """
        self.name = str(path)
        try:
            with Path(path).open("rb") as file:
                self._reader = Reader(MmapSource(file))
            self._header: dict[str, Any] = dict(self._reader.header())
            metadata = self._reader.metadata()
        except FileNotFoundError:
            raise InputError(f"{path} does not exist: set tiles.imagery to a PMTiles file.") from None
        except SpecVersionUnsupported:
            raise InputError(f"{path} is not of PMTiles version 3: convert it (pmtiles convert).") from None
        except (*DAMAGE_ERRORS, MagicNumberNotFound) as error:
            raise InputError(
                f"{path} is not a complete PMTiles file ({type(error).__name__}): export the imagery again."
            ) from None
        if self._header["tile_type"] in (TileType.MVT, TileType.MLT):
            raise InputError(f"{path} {VECTOR_TILES}")
        self.zooms = (int(self._header["min_zoom"]), int(self._header["max_zoom"]))
        self.attribution = attribution or str(metadata.get("attribution") or "" if isinstance(metadata, dict) else "")

    def tile(self, z: int, x: int, y: int) -> Image.Image | None:
        """As `TileSource.tile`."""
        try:
            data = self._reader.get(z, x, y)
        except DAMAGE_ERRORS as error:
            raise InputError(f"{self.name} can't be read ({type(error).__name__}): is the file complete?") from None
        return decode_tile(data, f"{self.name} tile {z}/{x}/{y}") if data else None

    def centre(self) -> tuple[float, float]:
        """Latitude and longitude of the centre, by the archive's header."""
        south, north, west, east = (self._header[key] / 1e7 for key in ("min_lat_e7", "max_lat_e7", "min_lon_e7", "max_lon_e7"))
        return (south + north) / 2, (west + east) / 2
