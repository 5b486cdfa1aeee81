"""The table of a city's photos, as CSV, JSONL or Parquet: one row a photo, bad rows told apart with a reason."""

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from addressvlm.errors import InputError

ALIASES = {"photo": "file", "image": "file", "latitude": "lat", "longitude": "lon", "lng": "lon", "heading_deg": "heading"}
REQUIRED = ("file", "lat", "lon")


@dataclass(frozen=True)
class Photo:
    """A good row. Row 1 is the first below the header; lat and lon in degrees, WGS84; "" stands for not given."""

    row: int
    id: str
    file: str
    place: str
    lat: float
    lon: float
    heading: float | None = None  # degrees clockwise from north, in [0, 360)
    street: str = ""
    district: str = ""

    def reject(self, reason: str) -> dict[str, Any]:
        """This photo as a row of `tables.REJECTS`; what stands before the colon in the reason is what gets counted."""
        return {"file": self.file, "row": self.row, "id": self.id, "reason": reason}


def read(path: Path) -> tuple[list[Photo], list[dict[str, Any]]]:
    """The good rows, and the bad ones as rows of `tables.REJECTS`.

    Raises:
        InputError: the file is missing, empty, not of its format, or lacks one of the columns file, lat, lon.
    """
    path = Path(path)
    good: list[Photo] = []
    rejects: list[dict[str, Any]] = []
    first_row: dict[str, int] = {}
    total = 0
    for total, cells in enumerate(_rows(path), start=1):
        file, identifier = _text(cells.get("file")), _text(cells.get("id")) or _text(cells.get("file"))
        try:
            if "_problem" in cells:
                raise ValueError(cells["_problem"])
            photo = _photo(total, identifier, cells)
            if identifier in first_row:
                raise ValueError(f"duplicate id: '{identifier}' is already the id of row {first_row[identifier]}")
        except ValueError as error:
            rejects.append({"file": file, "row": total, "id": identifier, "reason": str(error)})
        else:
            first_row[identifier] = total
            good.append(photo)
    if not total:
        raise InputError(f"the manifest {path} has no rows: it needs one per photo, with the columns {', '.join(REQUIRED)}.")
    return good, rejects


def _photo(row: int, identifier: str, cells: dict[str, Any]) -> Photo:
    """Check one row; ValueError says what is wrong with it."""
    if not _text(cells.get("file")):
        raise ValueError("empty cell: file")
    lat, lon = _number(cells, "lat"), _number(cells, "lon")
    if lat is None or lon is None:
        raise ValueError(f"empty cell: {'lat' if lat is None else 'lon'}")
    if abs(lat) > 90:
        raise ValueError(f"latitude out of range: {lat:g} is not in -90..90")
    if abs(lon) > 180:
        raise ValueError(f"longitude out of range: {lon:g} is not in -180..180")
    heading = _number(cells, "heading")
    return Photo(
        row=row,
        id=identifier,
        file=_text(cells["file"]),
        place=_text(cells.get("place")) or f"{lat:.5f},{lon:.5f}",  # about 1 m
        lat=lat,
        lon=lon,
        heading=None if heading is None else heading % 360,
        street=_text(cells.get("street")),
        district=_text(cells.get("district")),
    )


def _text(value: Any) -> str:
    """A cell as text; whole numbers without their decimal point."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _number(cells: dict[str, Any], column: str) -> float | None:
    """A cell as a finite number, None if empty."""
    value = cells.get(column)
    if _text(value) == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"not a number: {column} is {str(value)!r}")
    return number


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows as column -> cell under our column names."""
    if not path.is_file():
        raise InputError(f"no manifest at {path}: set city.manifest to a CSV, JSONL or Parquet file that exists.")
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise InputError(f"the manifest {path} is not a .csv, .tsv, .jsonl or .parquet file: save it as one of them.")
    try:
        yield from readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise InputError(f"the manifest {path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from None
    except (csv.Error, pa.ArrowException) as error:
        raise InputError(f"the manifest {path} can't be read ({str(error).splitlines()[0]}): write it again.") from None
    except OSError as error:
        raise InputError(f"the manifest {path} can't be read ({error.strerror or error}): check the file.") from None


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    columns = _columns(next(rows, []), path)
    for cells in rows:
        if cells:
            yield dict(zip(columns, cells, strict=False))


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    with path.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except ValueError:
                cells = None
            if not isinstance(cells, dict):
                yield {"_problem": "not a JSON object: the line"}
                continue
            if not seen:
                seen.update(_columns(list(cells), path))
            yield dict(zip(_renamed(list(cells)), cells.values(), strict=True))


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as parquet:
        columns = _columns(parquet.schema_arrow.names, path)
        wanted = [i for i, name in enumerate(columns) if name in Photo.__dataclass_fields__]
        for batch in parquet.iter_batches(columns=[parquet.schema_arrow.names[i] for i in wanted]):
            yield from batch.rename_columns(_renamed(batch.schema.names)).to_pylist()


def _columns(written: list[str], path: Path) -> list[str]:
    """The header under our names; InputError if something required is not in it."""
    columns = _renamed(written)
    missing = [c for c in REQUIRED if c not in columns]
    if missing and any(written):
        raise InputError(
            f"the manifest {path} lacks the column {' and '.join(missing)} (it has {', '.join(written)}): add or rename it; "
            "photo or image also stand for file."
        )
    return columns


def _renamed(written: list[str]) -> list[str]:
    """Column names in our words; an alias gives way where the name itself is there too."""
    plain = [str(c).strip().lower() for c in written]
    return [ALIASES[c] if c in ALIASES and ALIASES[c] not in plain else c for c in plain]
