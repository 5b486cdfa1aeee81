"""Photos with their position in the file name: SF-XL and VPR-datasets-downloader, and Pitts250k.

@ UTM east @ UTM north @ zone @ band @ latitude @ longitude @ panorama @ tile @ heading @ pitch @ roll @ height @
timestamp @ note @ .jpg          (any of it may be empty but the UTM position, or else latitude and longitude)

003/003218_pitch1_yaw7.jpg       (Pitts250k: the panorama; its position is in the columns of a table)
"""

import math
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import PurePosixPath

import pyproj

from addressvlm.config.city import CityConfig
from addressvlm.dataset.readers.base import SourceSample, list_photos, source_path
from addressvlm.dataset.readers.rows import Row, clean_text, parse_number
from addressvlm.dataset.readers.table import Table, open_table
from addressvlm.errors import InputError
from addressvlm.storage.remote_path import path_of

FIELDS = ("east", "north", "zone", "band", "lat", "lon", "panorama", "tile", "heading")  # those that are used, in order
BANDS = "CDEFGHJKLMNPQRSTUVWX"  # of latitude, 8 degrees each from 80 south
BAND_TOLERANCE_DEG = 0.01  # a position at the edge is rounded
MAX_DIFFERENCE_M = 20.0  # the two positions of a name are rounded, to 1 m at worst
METRES_PER_DEGREE = 111_195.0
PITTS_NAME = re.compile(r"(?P<panorama>(?:.*/)?\d{6})_pitch\d+_yaw\d+\.\w+$")
PITTS_QUERIES = "queries_real"
PITTS_ZONE = 17  # Pittsburgh is in UTM 17 T
POSITIONS = ({"lat", "lon"}, {"utm_east", "utm_north"})
UTM_ALIASES = {
    **dict.fromkeys(("easting", "utm_e", "utmx", "utm_x", "x", "utmdb_1", "utmq_1"), "utm_east"),
    **dict.fromkeys(("northing", "utm_n", "utmy", "utm_y", "y", "utmdb_2", "utmq_2"), "utm_north"),
}


class SfXl:
    """A folder, a table or a list of files named with @."""

    def recognizes(self, sample: SourceSample) -> bool:
        """All names of the sample begin with an @."""
        return bool(sample.photos) and all(_name(file).startswith("@") for file in sample.photos)

    def rows(self, city: CityConfig) -> Iterator[Row]:
        """A table's cells take precedence over the name."""
        yield from _open_source(source_path(city)).read_as(
            lambda cells: parse_file_name(clean_text(cells.get("file"))) | _non_empty(cells)
        )


class Pitts:
    """A table of Pitts250k's names with UTM (zone 17) or degrees; also after renaming, where the name says it all."""

    def recognizes(self, sample: SourceSample) -> bool:
        """All names are Pitts250k's with a position in the table, or in the note of an @ name."""
        names = sample.photos
        renamed = all(_name(f).startswith("@") and "@pitch" in f and "_yaw" in f for f in names)
        has_position = any(pair <= {UTM_ALIASES.get(c, c) for c in sample.columns} for pair in POSITIONS)
        return bool(names) and (renamed or (has_position and all(PITTS_NAME.search(f) for f in names)))

    def rows(self, city: CityConfig) -> Iterator[Row]:
        """Views of one panorama share its place; the heading is unknown, since yaw is relative to the panorama."""
        yield from _open_source(source_path(city)).read_as(self.parse)

    def parse(self, cells: Row) -> Row:
        """One photo; a listing leaves out the folder that queries are in."""
        cells = {UTM_ALIASES.get(column, column): value for column, value in cells.items()}
        file = clean_text(cells.get("file"))
        if _name(file).startswith("@"):
            return parse_file_name(file) | _non_empty(cells)
        if clean_text(cells.get("role")).startswith("quer") and PITTS_QUERIES not in PurePosixPath(file).parts:
            file = f"{PITTS_QUERIES}/{file}"
        match = PITTS_NAME.search(file)
        place = {"place": match["panorama"]} if match else {}
        try:
            east, north = parse_number(cells, "utm_east"), parse_number(cells, "utm_north")
            if east is not None and north is not None and not clean_text(cells.get("lat")):
                zone = parse_number(cells, "utm_zone")
                lat, lon = utm_to_degrees(east, north, PITTS_ZONE if zone is None else int(zone))
                return {"lat": lat, "lon": lon} | place | _non_empty(cells) | {"file": file}
        except ValueError as error:
            return {"file": file, "PROBLEM": str(error)}
        return place | _non_empty(cells) | {"file": file}


def parse_file_name(file: str) -> Row:
    """Cells of one @ name: file, lat, lon, place, heading; or a `PROBLEM`.

    Latitude and longitude come from UTM where it is there (to a centimetre, in degrees they have 5 decimals).
    """
    fields = _name(file).split("@")
    if len(fields) < 4 or fields[0]:
        return {"file": file, "PROBLEM": "name without a position: it is not like @east@north@zone@band@lat@lon@...@.jpg"}
    parts: Row = dict(zip(FIELDS, fields[1:-1], strict=False))
    cells: Row = {"file": file, "lat": parts.get("lat"), "lon": parts.get("lon"), "heading": parts.get("heading")}
    if parts.get("panorama"):
        cells["place"] = "".join(file.rpartition("/")[:2]) + parts["panorama"]
    try:
        east, north, zone, lat, lon = (parse_number(parts, c) for c in ("east", "north", "zone", "lat", "lon"))
        if east is not None and north is not None and zone is not None:
            band = clean_text(parts.get("band")).upper()
            cells["lat"], cells["lon"] = utm_to_degrees(east, north, int(zone), _is_south(band, lat))
            _check_band(band, cells["lat"], lat)
            if lat is not None and lon is not None:
                degrees = math.hypot(cells["lat"] - lat, (cells["lon"] - lon) * math.cos(math.radians(cells["lat"])))
                if degrees * METRES_PER_DEGREE > MAX_DIFFERENCE_M:
                    raise ValueError(f"positions differ: UTM is {cells['lat']:.5f}, {cells['lon']:.5f} in degrees")
    except ValueError as error:
        return {"file": file, "PROBLEM": str(error)}
    return cells


def utm_to_degrees(east: float, north: float, zone: int, south: bool = False) -> tuple[float, float]:
    """Latitude and longitude (WGS84) of a position in a UTM zone; ValueError outside of what UTM covers."""
    if not 1 <= zone <= 60:
        raise ValueError(f"UTM zone out of range: {zone} is not in 1..60")
    if not (0 < east < 1_000_000 and 0 <= north <= 10_000_000):
        raise ValueError(f"UTM out of range: {east:g}, {north:g} is not a position in metres")
    lon, lat = _from_utm(zone, south).transform(east, north)
    return lat, lon


@lru_cache(maxsize=120)
def _from_utm(zone: int, south: bool) -> pyproj.Transformer:
    return pyproj.Transformer.from_crs((32700 if south else 32600) + zone, 4326, always_xy=True)


def _is_south(band: str, lat: float | None) -> bool:
    """By the latitude if it is there, since an S may be the band (32 to 40 north) or mean south."""
    if lat is not None:
        return lat < 0
    if band not in (*BANDS, ""):
        raise ValueError(f"not a UTM band: {band!r} is not one of {BANDS}")
    return bool(band) and band < "N"


def _check_band(band: str, lat: float, given_lat: float | None) -> None:
    """ValueError if the position is not in the band; with a latitude in the name N and S may mean north and south."""
    if band not in (*BANDS,) or (given_lat is not None and band == ("N" if lat >= 0 else "S")):
        return
    south = -80 + 8 * BANDS.index(band)
    north = 84 if band == "X" else south + 8
    if not south - BAND_TOLERANCE_DEG <= lat <= north + BAND_TOLERANCE_DEG:
        raise ValueError(f"UTM band against latitude: band {band} is from {south} to {north} and the position at {lat:.2f}")


def _open_source(source: str) -> Table:
    """The files of a folder, or the rows of a table."""
    if path_of(source).is_dir():
        return Table(source, ["file"], ({"file": file} for file in list_photos(source)))
    if source.lower().endswith(".mat"):
        raise InputError(
            f"{source} is a MATLAB file: save its dbImageFns and utmDb as a CSV with the columns file, utm_east, utm_north."
        )
    table = open_table(source)
    table.require(("file",))
    return table


def _non_empty(cells: Row) -> Row:
    return {column: value for column, value in cells.items() if clean_text(value)}


def _name(file: str) -> str:
    return file.rpartition("/")[2]
