"""Open the imagery of a setting: a GeoTIFF or COG, an MBTiles or PMTiles archive, or an XYZ server.

Tiles of an XYZ server (https://host/{z}/{x}/{y}.png) are downloaded once, into a cache folder that all workers share. All
processes of a machine share one rate limit, and each respects the waiting time that the server tells any of them (429 and 5xx
with Retry-After). After several failures in a row the server counts as down and is tried again only every 30 s.
"""

import hashlib
import re
import string
import time
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from PIL import Image

from addressvlm.config.city import TilesConfig
from addressvlm.errors import InputError
from addressvlm.storage.files import atomic_write, local_copy
from addressvlm.storage.http_client import HttpClient, SharedRateLimiter, UnavailableError, status_text
from addressvlm.tiles import raster
from addressvlm.tiles.raster import MAX_BYTES, Bounds, GeoTiff, MbTiles, Mosaic, PmTiles, decode_tile

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


TIMEOUT_S = 15.0  # of one request with its full response
MAX_ATTEMPTS = 4  # of a request that fails with a temporary error
BACKOFF_S = 1.0  # before the second attempt; doubles; Retry-After takes precedence
MAX_WAIT_S = 60.0  # a server that asks for a longer wait counts as failing
MAX_FAILURES = 3  # tiles in a row; then the server counts as down
DOWN_S = 30.0  # interval of attempts while it is down
FINEST_ZOOM = 23
NO_TILE_STATUS = {204, 404, 410}
PLACEHOLDERS = {"z", "x", "y", "-y", "q", "s"}
HINTS = {401: "is the key in tiles.imagery right?", 403: "is the key in tiles.imagery right, and tiles.user_agent set?"}


class XyzServer:
    """Web mercator tiles of an address with {z}, {x} and {y} ({-y} counts from the south), or with {q} (quadkey)."""

    def __init__(
        self, template: str, cache: Path, user_agent: str, per_second: float = 4.0, attribution: str | None = None,
        timeout_s: float = TIMEOUT_S, backoff_s: float = BACKOFF_S,
    ) -> None:  # fmt: skip
        """Create the cache folder; nothing is requested yet.

        Raises:
            InputError: the address is not an XYZ address, or the folder can't be written.
        """
        host = _parse_host(template)
        self.name, self.attribution = f"{urlsplit(template).scheme}://{host}", attribution or f"Imagery from {host}"
        self.zooms = (0, FINEST_ZOOM)
        self._template = template
        self._folder = cache / f"{re.sub('[^A-Za-z0-9.-]', '_', host)}-{hashlib.sha256(template.encode()).hexdigest()[:12]}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self._folder} can't be created ({error.strerror}): set tiles.cache to a folder with free space."
            ) from None
        limiter = SharedRateLimiter(
            self._folder.parent / f"{self._folder.name.rpartition('-')[0]}.pace", per_second
        )  # of the host
        headers = {"User-Agent": user_agent, "Accept": "image/*"}
        self._client = HttpClient(limiter, headers, timeout_s, MAX_BYTES, MAX_WAIT_S, backoff_s)
        self._absent: set[tuple[int, int, int]] = set()
        self._failures, self._retry_at = 0, 0.0

    def tile(self, z: int, x: int, y: int) -> Image.Image | None:
        """RGBA tile from the cache or the server; None where the server has none.

        Raises:
            InputError: the server denies access, keeps failing, hangs, or sends something that is not a map tile.
        """
        if (z, x, y) in self._absent:
            return None
        file, name = self._folder / str(z) / str(x) / str(y), f"{self.name} tile {z}/{x}/{y}"
        if file.is_file():
            try:
                return decode_tile(file.read_bytes(), name)
            except InputError:
                file.unlink(missing_ok=True)  # damaged on disk: download it again
        data = self._download(z, x, y, name)
        if data is None:
            self._absent.add((z, x, y))
            return None
        image = decode_tile(data, name)
        try:
            with atomic_write(file) as path:
                path.write_bytes(data)
        except OSError as error:
            raise InputError(
                f"{file} can't be written ({error.strerror}): set tiles.cache to a folder with free space."
            ) from None
        return image

    def _download(self, z: int, x: int, y: int, name: str) -> bytes | None:
        """The bytes of a tile, after several attempts if necessary, or None if there is none."""
        is_down = self._failures >= MAX_FAILURES
        if is_down and time.monotonic() < self._retry_at:
            raise InputError(f"{self.name} is down (see the rows before): rerun this step when it works.")
        try:
            response = self._client.get(_address(self._template, z, x, y), 1 if is_down else MAX_ATTEMPTS)
        except UnavailableError as error:
            self._failures, self._retry_at = self._failures + 1, time.monotonic() + DOWN_S
            raise InputError(f"{name} can't be downloaded ({error}): rerun this step when the server works.") from None
        self._failures = 0
        if response.status in NO_TILE_STATUS or response.headers.get("X-VE-Tile-Info") == "no-tile":  # the latter is Bing's
            return None
        if response.status != 200:
            hint = HINTS.get(response.status, "check tiles.imagery.")
            raise InputError(f"{name} is refused ({status_text(response.status)}): {hint}")
        kind = response.content_type
        if kind.startswith("text/") or kind.endswith(("json", "xml")):
            raise InputError(f"{name} is {kind}, not an image: check tiles.imagery.")
        return response.body


def _parse_host(template: str) -> str:
    """The host of an XYZ address; checks its placeholders."""
    try:
        parts = urlsplit(template)
        fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
        host = parts.hostname + (f":{parts.port}" if parts.port else "") if parts.hostname else ""
    except ValueError as error:
        raise InputError(f"tiles.imagery is no web address ({error}): write https://host/{{z}}/{{x}}/{{y}}.png.") from None
    if parts.scheme not in ("http", "https") or not host or "{" in parts.netloc.replace("{s}", ""):
        raise InputError(
            f"tiles.imagery is {parts.scheme}://{host}: an XYZ address begins with http:// or https:// and a host."
        )
    unknown = fields - PLACEHOLDERS
    if unknown:
        raise InputError(
            f"tiles.imagery has {{{min(unknown)}}}: the placeholders are {{z}}, {{x}}, {{y}}, {{-y}}, {{s}} and {{q}}."
        )
    if not ({"z", "x"} <= fields and fields & {"y", "-y"}) and "q" not in fields:
        raise InputError("tiles.imagery needs {z}, {x} and {y}, or {q}: for instance https://host/{z}/{x}/{y}.png.")
    return host.replace("{s}", "a")


def _address(template: str, z: int, x: int, y: int) -> str:
    quadkey = "".join(str((x >> bit & 1) + 2 * (y >> bit & 1)) for bit in range(z - 1, -1, -1))
    values = {"z": z, "x": x, "y": y, "-y": 2**z - 1 - y, "q": quadkey, "s": "abc"[(x + y) % 3]}
    return re.sub(r"\{(-?\w+)\}", lambda match: str(values[match[1]]), template)
