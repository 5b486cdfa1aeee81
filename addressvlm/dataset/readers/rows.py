"""Rows of tables as photos: one reading of ids, numbers and missing values for all jobs, and why a row is no photo."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from addressvlm.config.city import PanoramaConfig
from addressvlm.dataset.photos import Photo
from addressvlm.gazetteer.names import is_nothing, printable, split_names

# Column in small letters -> cell; under PROBLEM, which no column is called, the reason why the row can't be used. An empty row
# has no cells.
Row = dict[str, Any]

COLUMNS = frozenset(
    "file id place lat lon heading fov_deg street district sub_street block split panorama".split()
)  # that have a meaning
NOWHERE_DEG = 1e-6  # cameras write 0, 0 when they have no fix
BOOLEANS = {
    **dict.fromkeys(("true", "yes", "1", "t", "y"), True),
    **dict.fromkeys(("false", "no", "0", "f", "n"), False),
}
LAST_EXACT_FLOAT = 2**53
ROUNDED_ID = re.compile(r"\d[.,]\d+E\+\d+", re.IGNORECASE)  # as spreadsheets show a number of many digits
PLAIN_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?", re.ASCII)
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
DEGREES = ("lat", "lon", "heading", "fov_deg")  # a comma in one of these never separates thousands
_SPELLED_NUMBER = str.maketrans({"\u2212": "-", "\u00a0": " ", "\u202f": " ", "_": "?"})  # the true minus; 1_000 is Python's


def to_photos(
    rows: Iterable[Row], panorama: PanoramaConfig | None, find: Callable[[str], str] = str
) -> tuple[list[Photo], list[dict[str, Any]]]:
    """The good photos, and the bad rows as rows of `tables.REJECTS`; rows are numbered from 1, and empty ones are neither.

    A row may have the fields of `Photo`, `panorama` (whether the file is one, if that is known) and `PROBLEM` (why it
    can't be used). With `panorama` set, a row that is or may be a panorama becomes one photo per heading. `find` gives the
    path of a file as the photos' folder has it (ValueError: it can't be told which it is).
    """
    good: list[Photo] = []
    rejects: list[dict[str, Any]] = []
    first_row: dict[str, int] = {}
    for number, cells in enumerate(rows, start=1):
        if not cells:
            continue
        try:
            identifier, file = identify(number, cells, first_row)
            photo = _photo(number, identifier, find(file), cells)
            is_panorama = clean_text(cells.get("panorama")).lower()
            if is_panorama and is_panorama not in BOOLEANS:
                raise ValueError(f"not yes or no: panorama is {is_panorama!r}")
            good += _views(photo, BOOLEANS.get(is_panorama), panorama)
            first_row[identifier] = number
        except ValueError as error:
            rejects.append(reject(number, cells, str(error)))
    return good, rejects


def identify(number: int, cells: Row, first_row: dict[str, int]) -> tuple[str, str]:
    """The id of a row (its file's name if it has none) and its file.

    Args:
        first_row: id -> number of the row that has it already.

    Raises:
        ValueError: the row can't be used, has no file, or its id can't be told from those of other rows.
    """
    if "PROBLEM" in cells:
        raise ValueError(cells["PROBLEM"])
    value, file = cells.get("id"), clean_text(cells.get("file"))
    identifier = clean_text(value)
    for column, text in (("file", file), ("id", identifier), ("place", clean_text(cells.get("place")))):
        if text.isascii() and text.isprintable():
            continue
        if printable(text) != text or "\ufffd" in text:
            raise ValueError(f"{column} not in UTF-8: rename {printable(text)!r} (convmv does that for a folder)")
        if any(character < " " for character in text):
            raise ValueError(f"control characters: {column} is {text!r}")
    if ROUNDED_ID.fullmatch(identifier) or (isinstance(value, float) and abs(value) >= LAST_EXACT_FLOAT):
        raise ValueError(f"id rounded: {identifier} has lost digits, write ids as text")
    if not file:
        raise ValueError("empty cell: file")
    identifier = identifier or file
    if identifier in first_row:
        raise ValueError(f"duplicate id: '{identifier}' is already the id of row {first_row[identifier]}")
    return identifier, file


def reject(number: int, cells: Row, reason: str) -> dict[str, Any]:
    """A row of `tables.REJECTS`."""
    file = printable(clean_text(cells.get("file")))
    return {"file": file, "row": number, "id": printable(clean_text(cells.get("id"))) or file, "reason": printable(reason)}


def _photo(row: int, identifier: str, file: str, cells: Row) -> Photo:
    """Check one row; ValueError says what is wrong with it."""
    lat, lon = parse_number(cells, "lat"), parse_number(cells, "lon")
    if lat is None or lon is None:
        raise ValueError(f"empty cell: {'lat' if lat is None else 'lon'}")
    if abs(lat) > 90:
        swapped = "; latitude and longitude look swapped" if abs(lat) <= 180 and abs(lon) <= 90 else ""
        raise ValueError(f"latitude out of range: {lat:g} is not in -90..90{swapped}")
    if abs(lon) > 180:
        raise ValueError(f"longitude out of range: {lon:g} is not in -180..180")
    if abs(lat) < NOWHERE_DEG and abs(lon) < NOWHERE_DEG:
        raise ValueError("position is 0, 0: the camera had no fix")
    heading, fov_deg = parse_number(cells, "heading"), parse_number(cells, "fov_deg")
    if heading is not None and abs(heading) > 360:
        raise ValueError(f"direction out of range: heading is {heading:g}, not in -360..360")
    if fov_deg is not None and not 0 < fov_deg <= 360:
        raise ValueError(f"field of view out of range: {fov_deg:g} is not in 0..360")
    streets, district, sub_street = (
        split_names(cells.get("street")),
        _one_name(cells, "district"),
        _one_name(cells, "sub_street"),
    )
    return Photo(
        row=row,
        id=identifier,
        file=file,
        place=clean_text(cells.get("place")) or f"{lat:.5f},{lon:.5f}",  # about 1 m
        lat=lat,
        lon=lon,
        heading=None if heading is None else _normalize_degrees(heading),
        street=streets[0] if streets else "",
        other_street=streets[1] if len(streets) > 1 else "",
        district=district,
        sub_street=sub_street,
        block=clean_text(cells.get("block")),
        split=clean_text(cells.get("split")),
        fov_deg=fov_deg,
    )


def _one_name(cells: Row, column: str) -> str:
    names = split_names(cells.get(column))
    if len(names) > 1:
        raise ValueError(f"several names in one cell: {column} is {'; '.join(names)}")
    return names[0] if names else ""


def _views(photo: Photo, is_panorama: bool | None, panorama: PanoramaConfig | None) -> list[Photo]:
    """The photo itself, or the views that a panorama is cut into."""
    if is_panorama and panorama is None:
        raise ValueError("panorama: set city.panorama to cut it into views")
    if panorama is None or is_panorama is False:
        return [photo]
    views = []
    for view in dict.fromkeys(_normalize_degrees(heading) for heading in panorama.headings):
        heading = None if photo.heading is None else _normalize_degrees(photo.heading + view)
        views.append(replace(photo, id=f"{photo.id}@{view:g}", heading=heading, fov_deg=panorama.fov_deg, view=view))
    return views


def _normalize_degrees(degrees: float) -> float:
    """The same direction in [0, 360); the remainder of a tiny negative number is 360 itself."""
    return degrees % 360 % 360


def clean_text(value: Any) -> str:
    """A cell as text, "" for the words of `names.NO_VALUE`; whole numbers without their decimal point."""
    if isinstance(value, str):
        text = value.strip()
        return "" if is_nothing(text) else text
    if value is None or value == [] or value == {}:
        return ""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
    return "" if is_nothing(text) else text


def parse_number(cells: Row, column: str) -> float | None:
    """A cell as a finite number, None if empty; ValueError if it is something else.

    A decimal comma is read in degrees; in metres it could as well separate thousands.
    """
    value = cells.get(column)
    if isinstance(value, float) or (isinstance(value, str) and PLAIN_NUMBER.fullmatch(value)):
        number = float(value)
        if math.isfinite(number):
            return number
    text = clean_text(value)
    if text == "":
        return None
    if isinstance(value, str):
        value = text.translate(_SPELLED_NUMBER)
        if column in DEGREES and DECIMAL_COMMA.fullmatch(value):
            value = value.replace(",", ".")
    try:
        result = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise ValueError(f"not a number: {column} is {text!r}")
    return result
