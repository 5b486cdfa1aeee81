"""Rows of any reader -> good photos and rejects: what every source of photos must pass."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from addressvlm.cities.photo import Photo
from addressvlm.cities.readers.table import Row
from addressvlm.config_city import PanoramaConfig

NOWHERE_DEG = 1e-6  # cameras write 0, 0 when they have no fix
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def to_photos(rows: Iterable[Row], panorama: PanoramaConfig | None) -> tuple[list[Photo], list[dict[str, Any]]]:
    """The good photos, and the bad rows as rows of `tables.REJECTS`; rows are numbered from 1.

    A row may hold the fields of `Photo`, `panorama` (whether the file is one, if that is known) and `PROBLEM` (why it
    can't be used). With `panorama` set, a row that is or may be a panorama becomes one photo per heading.
    """
    good: list[Photo] = []
    rejects: list[dict[str, Any]] = []
    first_row: dict[str, int] = {}
    for number, cells in enumerate(rows, start=1):
        file = text(cells.get("file"))
        identifier = text(cells.get("id")) or file
        try:
            if "PROBLEM" in cells:
                raise ValueError(cells["PROBLEM"])
            if identifier in first_row:
                raise ValueError(f"duplicate id: '{identifier}' is already the id of row {first_row[identifier]}")
            photos = list(_views(_photo(number, identifier, file, cells), _flag(cells, "panorama"), panorama))
        except ValueError as error:
            rejects.append({"file": file, "row": number, "id": identifier, "reason": str(error)})
        else:
            first_row[identifier] = number
            good += photos
    return good, rejects


def _photo(row: int, identifier: str, file: str, cells: Row) -> Photo:
    """Check one row; ValueError says what is wrong with it."""
    if not file:
        raise ValueError("empty cell: file")
    lat, lon = number(cells, "lat"), number(cells, "lon")
    if lat is None or lon is None:
        raise ValueError(f"empty cell: {'lat' if lat is None else 'lon'}")
    if abs(lat) > 90:
        swapped = "; latitude and longitude look swapped" if abs(lat) <= 180 and abs(lon) <= 90 else ""
        raise ValueError(f"latitude out of range: {lat:g} is not in -90..90{swapped}")
    if abs(lon) > 180:
        raise ValueError(f"longitude out of range: {lon:g} is not in -180..180")
    if abs(lat) < NOWHERE_DEG and abs(lon) < NOWHERE_DEG:
        raise ValueError("position is 0, 0: the camera had no fix")
    heading, fov_deg = number(cells, "heading"), number(cells, "fov_deg")
    if fov_deg is not None and not 0 < fov_deg <= 360:
        raise ValueError(f"field of view out of range: {fov_deg:g} is not in 0..360")
    return Photo(
        row=row,
        id=identifier,
        file=file,
        place=text(cells.get("place")) or f"{lat:.5f},{lon:.5f}",  # about 1 m
        lat=lat,
        lon=lon,
        heading=None if heading is None else _turn(heading),
        street=text(cells.get("street")),
        district=text(cells.get("district")),
        sub_street=text(cells.get("sub_street")),
        fov_deg=fov_deg,
    )


def _views(photo: Photo, is_panorama: bool | None, panorama: PanoramaConfig | None) -> Iterator[Photo]:
    """The photo itself, or the views that a panorama is cut into."""
    if is_panorama and panorama is None:
        raise ValueError("panorama: set city.panorama to cut it into views")
    if panorama is None or is_panorama is False:
        yield photo
        return
    for view in dict.fromkeys(_turn(heading) for heading in panorama.headings):
        heading = None if photo.heading is None else _turn(photo.heading + view)
        yield replace(photo, id=f"{photo.id}@{view:g}", heading=heading, fov_deg=panorama.fov_deg, view=view)


def _turn(degrees: float) -> float:
    """The same direction in [0, 360); the remainder of a tiny negative number is 360 itself."""
    return degrees % 360 % 360


def text(value: Any) -> str:
    """A cell as text; whole numbers without their decimal point."""
    if isinstance(value, str):
        return value.strip()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def number(cells: Row, column: str) -> float | None:
    """A cell as a finite number, None if empty; ValueError if it is something else."""
    value = cells.get(column)
    if text(value) == "":
        return None
    try:
        result = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise ValueError(f"not a number: {column} is {str(value)!r}")
    return result


def _flag(cells: Row, column: str) -> bool | None:
    """A cell as yes or no, None if empty; ValueError if it is something else."""
    value = text(cells.get(column)).lower()
    if value and value not in WORDS:
        raise ValueError(f"not yes or no: {column} is {value!r}")
    return WORDS.get(value)
