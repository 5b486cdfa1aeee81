"""Archives of web mercator tiles in one file: MBTiles (SQLite) and PMTiles (version 3), raster ones."""

import sqlite3
import zlib
from pathlib import Path
from typing import Any

from PIL import Image
from pmtiles.reader import MmapSource, Reader
from pmtiles.tile import MagicNumberNotFound, SpecVersionUnsupported, TileType

from addressvlm.errors import InputError
from addressvlm.maps.mercator import decode

VECTOR = "holds vector tiles: give a raster archive (PNG, JPEG or WebP), or the streets alone for a drawn map."
DAMAGED = (EOFError, OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, zlib.error)


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
            self._base = sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)
            self._metadata = dict(self._base.execute("SELECT name, value FROM metadata"))
            zooms = self._base.execute("SELECT MIN(zoom_level), MAX(zoom_level) FROM tiles").fetchone()
        except sqlite3.Error as error:
            raise InputError(f"{path} is not an MBTiles file ({error}): export the imagery again.") from None
        if self._metadata.get("format", "") in ("pbf", "mvt", "application/x-protobuf"):
            raise InputError(f"{path} {VECTOR}")
        if zooms[0] is None:
            raise InputError(f"{path} has no tiles: export the imagery again.")
        self.zooms = (int(zooms[0]), int(zooms[1]))
        self.attribution = attribution or str(self._metadata.get("attribution") or "")

    def tile(self, z: int, x: int, y: int) -> Image.Image | None:
        """RGBA tile; None where the archive has none.

        Raises:
            InputError: the file is damaged there.
        """
        place = (z, x, 2**z - 1 - y)
        query = "SELECT CAST(tile_data AS BLOB) FROM tiles WHERE zoom_level = ? AND tile_column = ? AND tile_row = ?"
        try:
            row = self._base.execute(query, place).fetchone()
        except sqlite3.Error as error:
            raise InputError(f"{self.name} can't be read ({error}): is the file complete?") from None
        return decode(row[0], f"{self.name} tile {z}/{x}/{y}") if row and row[0] else None

    def centre(self) -> tuple[float, float]:
        """Latitude and longitude of the middle, by the archive's own metadata.

        Raises:
            InputError: it does not say.
        """
        try:
            west, south, east, north = map(float, str(self._metadata["bounds"]).split(","))
        except (KeyError, ValueError):
            raise InputError(f"{self.name} does not say its bounds: set city.streets as well.") from None
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
        except (*DAMAGED, MagicNumberNotFound) as error:
            raise InputError(
                f"{path} is not a whole PMTiles file ({type(error).__name__}): export the imagery again."
            ) from None
        if self._header["tile_type"] in (TileType.MVT, TileType.MLT):
            raise InputError(f"{path} {VECTOR}")
        self.zooms = (int(self._header["min_zoom"]), int(self._header["max_zoom"]))
        self.attribution = attribution or str(metadata.get("attribution") or "" if isinstance(metadata, dict) else "")

    def tile(self, z: int, x: int, y: int) -> Image.Image | None:
        """RGBA tile; None where the archive has none.

        Raises:
            InputError: the file is damaged there.
        """
        try:
            data = self._reader.get(z, x, y)
        except DAMAGED as error:
            raise InputError(f"{self.name} can't be read ({type(error).__name__}): is the file complete?") from None
        return decode(data, f"{self.name} tile {z}/{x}/{y}") if data else None

    def centre(self) -> tuple[float, float]:
        """Latitude and longitude of the middle, by the archive's header."""
        south, north, west, east = (self._header[key] / 1e7 for key in ("min_lat_e7", "max_lat_e7", "min_lon_e7", "max_lon_e7"))
        return (south + north) / 2, (west + east) / 2
