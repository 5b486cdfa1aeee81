"""Windows of a georeferenced image of the city (satellite, aerial or scanned map), read one at a time."""

import warnings
from pathlib import Path

import numpy as np
import pyproj
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from addressvlm.errors import InputError
from addressvlm.maps.window import EDGE, Bounds, corners_of, cut

# For a COG behind http(s): bounded waits, and no listing of the folder it lies in.
GDAL_OPTIONS = {"GDAL_HTTP_TIMEOUT": 20, "GDAL_HTTP_MAX_RETRY": 3, "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}


class GeoTiff:
    """A GeoTIFF or COG (or anything else GDAL reads) seen in the coordinates `crs`; holds no pixels between calls."""

    def __init__(self, path: str | Path, crs: str, attribution: str | None = None) -> None:
        """Open the file.

        Raises:
            InputError: the file is missing, has no georeference, or is not 8-bit grey, RGB or palette.
        """
        self._source = _open(path)
        self.path, self.crs = path, crs
        self.attribution = attribution or self._source.tags().get("TIFFTAG_COPYRIGHT", "")
        kind = self._source.dtypes[0]
        if kind != "uint8":
            raise InputError(f"{path} has {kind} samples: convert it to 8 bits (gdal_translate -ot Byte -scale).")
        self._to_source = pyproj.Transformer.from_crs(crs, self._source.crs, always_xy=True).transform
        self._palette = self._read_palette()

    def _read_palette(self) -> np.ndarray | None:
        """Table (256, 3) of a palette image."""
        if self._source.colorinterp[0] != ColorInterp.palette:
            return None
        table = np.zeros((256, 3), np.uint8)
        for value, colour in self._source.colormap(1).items():
            table[value] = colour[:3]
        return table

    def read(self, bounds: Bounds, pixels: int) -> Image.Image:
        """The square `bounds` (west, south, east, north in `crs`) as an RGB image of pixels x pixels.

        Raises:
            InputError: the imagery covers less than half of it, or its file is damaged there.
        """
        x, y = self._to_source(*corners_of(bounds))
        t = ~self._source.transform
        corners = np.column_stack((t.a * x + t.b * y + t.c, t.d * x + t.e * y + t.f))
        if not np.isfinite(corners).all():
            raise InputError(f"{self.path} covers only 0% of the tile.")
        fourth = corners[1] + corners[2] - corners[0]
        square = np.vstack((corners, fourth))
        first = np.floor(square.min(axis=0) - EDGE).clip(0).astype(int)
        last = np.ceil(square.max(axis=0) + EDGE).clip(max=(self._source.width, self._source.height)).astype(int)
        if (last <= first).any():
            raise InputError(f"{self.path} covers only 0% of the tile.")
        shrink = max(1.0, float(np.hypot(*(corners[1] - corners[0]))) / pixels)
        values, covered = self._window(first, last, shrink)
        scale = np.array([values.width, values.height]) / (last - first)
        smooth = Image.Resampling.NEAREST if self._palette is not None else Image.Resampling.BILINEAR
        return cut(values, covered, (corners - first) * scale, pixels, str(self.path), smooth)

    def _window(self, first: np.ndarray, last: np.ndarray, shrink: float) -> tuple[Image.Image, Image.Image]:
        """Source pixels from `first` to `last` (column, row), `shrink` times smaller: RGB, and where there are any (L)."""
        window = Window.from_slices((first[1], last[1]), (first[0], last[0]))
        width, height = np.maximum(1, np.ceil((last - first) / shrink)).astype(int)
        bands = [1, 2, 3] if self._source.count >= 3 else [1]
        smooth = Resampling.nearest if self._palette is not None else Resampling.average
        try:
            with rasterio.Env(**GDAL_OPTIONS):
                values = self._source.read(bands, window=window, out_shape=(len(bands), height, width), resampling=smooth)
                mask = self._source.dataset_mask(window=window, out_shape=(height, width))
        except RasterioError as error:
            raise InputError(f"{self.path} can't be read ({' '.join(str(error).split())}): is the file complete?") from None
        if self._palette is not None:
            return Image.fromarray(self._palette[values[0]]), Image.fromarray(mask)
        return Image.fromarray(np.stack([*values] if len(bands) == 3 else [*values] * 3, axis=-1)), Image.fromarray(mask)


def centre_of(path: str | Path) -> tuple[float, float]:
    """Latitude and longitude of the middle of a GeoTIFF.

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
