"""Open the imagery of a setting: a GeoTIFF or COG, an MBTiles or PMTiles archive, or an XYZ server."""

from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from PIL import Image

from addressvlm.config.city import TilesConfig
from addressvlm.errors import InputError
from addressvlm.storage.files import local_copy
from addressvlm.tiles import raster
from addressvlm.tiles.raster import Bounds, GeoTiff, MbTiles, Mosaic, PmTiles
from addressvlm.tiles.xyz import XyzServer

STORES = ("s3", "gs", "gcs")
ARCHIVES: dict[str, type[MbTiles] | type[PmTiles]] = {".mbtiles": MbTiles, ".pmtiles": PmTiles}


class Imagery(Protocol):
    """Satellite or aerial images of a city."""

    attribution: str

    def read(self, bounds: Bounds, pixels: int) -> Image.Image:
        """The square `bounds` (west, south, east, north in local metres) as an RGB image of pixels x pixels.

        Raises:
            InputError: the imagery covers too little of it, or can't be read.
        """
        ...


def open_imagery(text: str | Path, crs: str, config: TilesConfig) -> Imagery:
    """Imagery in the coordinates `crs`; `text` is a path or an address.

    Raises:
        InputError: it is missing or invalid, is an address that is neither http nor https, or is an XYZ server and tiles.cache
            is not set.
    """
    name = _local_name(str(text))
    if "{" in name:
        if config.cache is None:
            raise InputError("there is no folder for the tiles of an XYZ server: set tiles.cache.")
        server = XyzServer(name, Path(config.cache).expanduser(), config.user_agent, config.per_second, config.attribution)
        return Mosaic(server, crs, config.zoom)
    if "://" in name and urlsplit(name).scheme not in ("http", "https"):
        raise InputError(
            f"tiles.imagery is {name}: give a file, an http(s) address of a COG, or https://host/{{z}}/{{x}}/{{y}}.png."
        )
    archive = ARCHIVES.get(Path(name).suffix.lower())
    if archive:
        return Mosaic(archive(name, config.attribution), crs, config.zoom)
    return GeoTiff(name, crs, config.attribution)


def _local_name(name: str) -> str:
    """The path of the local copy of a file in an object store; other names are returned unchanged."""
    if name.partition("://")[0] not in STORES or "{" in name:
        return name
    try:
        return str(local_copy(name))
    except FileNotFoundError:
        raise InputError(f"tiles.imagery is {name}, and there is no such file: set it to one that exists.") from None


def imagery_centre(text: str | Path) -> tuple[float, float]:
    """Latitude and longitude of the centre of the imagery.

    Raises:
        InputError: it can't be opened, or does not say where it lies.
    """
    name = _local_name(str(text))
    if "{" in name:
        raise InputError("an XYZ server has no centre: set city.streets as well.")
    archive = ARCHIVES.get(Path(name).suffix.lower())
    return archive(name).centre() if archive else raster.geotiff_centre(name)
