"""Image Address Localization annotations (paper 002, Sec. 5.1 and A.2): image, position, street, neighbourhood, cross streets.

JSON (a list of records, or file name -> record), JSONL, CSV or Parquet. Columns may be called by any of the names below;
a position may stand in one column, or in the photo's name as SF-XL writes it. The sub-street is the main street plus the
one or two streets that bound it.
"""

import re
from collections.abc import Iterator
from typing import Any

from addressvlm.config.city import CityConfig
from addressvlm.dataset.readers.base import SourceSample, source_path
from addressvlm.dataset.readers.file_names import parse_file_name
from addressvlm.dataset.readers.table import Row, clean_text, open_table

CROSS = ("cross_streets", "cross_street", "cross", "intersections", "intersecting_streets", "between")
NAMES = {
    "street": ("street", "main_street", "mainstreet", "road", "route"),
    "district": ("neighborhood", "neighbourhood", "district", "area"),
    "sub_street": ("sub_street", "substreet"),
    "position": ("gps", "coordinates", "coordinate", "location", "latlon", "lat_lon", "geometry"),
    "cross": CROSS,
}
KEPT = ("file", "id", "place", "lat", "lon", "heading", "fov_deg", "panorama")
TELLING = frozenset(("neighborhood", "neighbourhood", "main_street", *CROSS))
SEPARATOR = re.compile(r"\s*[&;|]\s*|\s*,\s*|\s+and\s+")


class Ial:
    """One row per annotated image."""

    def recognizes(self, sample: SourceSample) -> bool:
        """A table with a column that only such annotations have."""
        return bool(sample.columns & TELLING)

    def rows(self, city: CityConfig) -> Iterator[Row]:
        """Address and position as annotated."""
        table = open_table(source_path(city))
        table.require(("file",))
        for cells in table.rows:
            yield cells if "PROBLEM" in cells else to_row(cells)


def to_row(cells: Row) -> Row:
    """One annotation under the names of `Photo`."""
    if isinstance(cells.get("address"), dict):
        cells = cells | {str(key).lower(): value for key, value in cells["address"].items()}
    row: Row = {column: cells[column] for column in KEPT if column in cells}
    if "lat" not in row or "lon" not in row:
        row |= _position(_first(cells, NAMES["position"]))
    if "lat" not in row and "@" in clean_text(cells.get("file")):
        row = parse_file_name(clean_text(cells["file"])) | row
    for column in ("street", "district", "sub_street"):
        row[column] = clean_text(_first(cells, NAMES[column]))
    if row["street"] and not row["sub_street"]:
        row["sub_street"] = sub_street(row["street"], _streets(_first(cells, NAMES["cross"])))
    return row


def sub_street(street: str, bounds: list[str]) -> str:
    """The name of the part of a street that these one or two others bound, "" without any."""
    if not bounds:
        return ""
    if len(bounds) == 1:
        return f"{street} from {bounds[0]} on"
    first, last = sorted((bounds[0], bounds[-1]))
    return f"{street} between {first} and {last}"


def _first(cells: Row, names: tuple[str, ...]) -> Any:
    return next((cells[name] for name in names if cells.get(name) not in (None, "", [])), None)


def _streets(value: Any) -> list[str]:
    """Cross streets from a list, or from one text with &, commas or "and" between them."""
    parts = value if isinstance(value, (list, tuple)) else SEPARATOR.split(clean_text(value))
    return list(dict.fromkeys(name for name in (clean_text(part) for part in parts) if name))


def _position(value: Any) -> Row:
    """Latitude and longitude from [lat, lon], "lat, lon", {lat, lng} or a GeoJSON point (which has longitude first)."""
    if isinstance(value, dict):
        if isinstance(value.get("coordinates"), (list, tuple)):
            return _position(list(value["coordinates"])[1::-1])
        plain = {str(key).lower(): number for key, number in value.items()}
        return {"lat": _first(plain, ("lat", "latitude")), "lon": _first(plain, ("lon", "lng", "longitude"))}
    parts = value if isinstance(value, (list, tuple)) else re.split(r"[,;\s]+", clean_text(value).strip("()[] "))
    return {"lat": parts[0], "lon": parts[1]} if len(parts) >= 2 else {}
