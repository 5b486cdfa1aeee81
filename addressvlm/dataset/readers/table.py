"""Tables of photos as streams of rows (CSV, JSONL, Parquet, JSON, or a list of file names), and rows as photos."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from addressvlm.config.city import PanoramaConfig
from addressvlm.dataset.photos import Photo
from addressvlm.errors import InputError
from addressvlm.storage import remote_path

# Column in small letters -> cell; under PROBLEM, which no column is called, the reason why the row can't be used
Row = dict[str, Any]

ALIASES = {
    **dict.fromkeys(("photo", "image", "filename", "file_name", "image_path", "img"), "file"),
    **dict.fromkeys(("dbimagefns", "qimagefns"), "file"),  # of NetVLAD's listings
    "latitude": "lat",
    **dict.fromkeys(("longitude", "lng"), "lon"),
    "heading_deg": "heading",
}
RECORD_KEYS = ("data", "result", "osv", "photos", "currentpageitems", "images", "annotations")  # keys of the records in JSON


@dataclass
class Table:
    """A stream of rows under our column names."""

    source: str
    header: list[str]  # the column names as they are in the file, of the first record in JSON
    rows: Iterator[Row]

    @property
    def columns(self) -> list[str]:
        """The same under our names."""
        return list(_our_names(tuple(self.header)))

    def require(self, needed: Sequence[str], hint: str = "") -> None:
        """Raise InputError when one of the columns is not there."""
        missing = [column for column in needed if column not in self.columns]
        if missing and any(self.header):
            raise InputError(
                f"the manifest {self.source} lacks the column {' and '.join(missing)} (it has {', '.join(self.header)}): "
                f"add or rename it; photo or image also stand for file{hint}."
            )


def open_table(source: str) -> Table:
    """Open it and read its header; InputError if that fails, and while rows are read from a damaged file."""
    if remote_path.path_of(source).suffix.lower() not in FORMATS:
        raise InputError(f"the manifest {source} is not a .csv, .tsv, .jsonl, .parquet or .json file: save it as one of them.")
    rows = _read(source)
    return Table(source, next(rows, []), rows)


def _read(source: str) -> Iterator[Any]:
    """The header, then the rows; any failure as an InputError."""
    try:
        path = remote_path.path_of(source)
        with path.open("rb") as file:
            yield from FORMATS[path.suffix.lower()](file)
    except FileNotFoundError:
        raise InputError(f"no manifest at {source}: set city.manifest to a CSV, JSONL or Parquet file that exists.") from None
    except UnicodeDecodeError:
        raise InputError(f"the manifest {source} is not UTF-8 text: save it as UTF-8.") from None
    except RecursionError:
        raise InputError(f"the manifest {source} is nested too deeply: write it again.") from None
    except json.JSONDecodeError as error:
        raise InputError(f"the manifest {source} is not JSON ({error}): write it again.") from None
    except (csv.Error, pa.ArrowException) as error:
        raise InputError(f"the manifest {source} can't be read ({str(error).splitlines()[0]}): write it again.") from None
    except OSError as error:
        raise InputError(f"the manifest {source} can't be read ({remote_path.error_text(error)}): check the file.") from None


def _csv(file: IO[bytes]) -> Iterator[Any]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    first = text.readline()
    lines = csv.reader(chain([first], text), delimiter=max(",;\t", key=first.count))
    header = next(lines, [])
    yield header
    columns = _our_names(tuple(header))
    for cells in lines:
        if cells:
            yield dict(zip(columns, cells, strict=False))


def _file_list(file: IO[bytes]) -> Iterator[Any]:
    yield ["file"]
    for line in io.TextIOWrapper(file, encoding="utf-8-sig"):
        if line.strip():
            yield {"file": line.strip()}


def _jsonl(file: IO[bytes]) -> Iterator[Any]:
    def parse(line: str) -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            return None

    yield from _with_header(parse(line) for line in io.TextIOWrapper(file, encoding="utf-8-sig") if line.strip())


def _json(file: IO[bytes]) -> Iterator[Any]:
    yield from _with_header(iter(_records(json.load(io.TextIOWrapper(file, encoding="utf-8-sig")))))


def _records(tree: Any) -> list[Any]:
    """The records in a JSON document: a list, at the top or one or two levels down, GeoJSON features, or name -> record."""
    if not isinstance(tree, dict):
        return tree if isinstance(tree, list) else [tree]
    if isinstance(tree.get("features"), list):
        return [
            f["properties"] | {"geometry": f.get("geometry")}
            if isinstance(f, dict) and isinstance(f.get("properties"), dict)
            else None
            for f in tree["features"]
        ]
    for key, value in tree.items():
        if key.lower() in RECORD_KEYS and isinstance(value, (list, dict)):
            return _records(value)
    if tree and all(isinstance(value, dict) for value in tree.values()):
        return [{"file": name} | record for name, record in tree.items()]
    return [tree] if tree else []


def _with_header(records: Iterator[Any]) -> Iterator[Any]:
    """The keys of the first JSON object, then all records as rows."""
    skipped: list[Any] = []
    for record in records:
        skipped.append(record)
        if isinstance(record, dict):
            break
    yield list(skipped[-1]) if skipped and isinstance(skipped[-1], dict) else []
    for record in chain(skipped, records):
        if isinstance(record, dict):
            yield dict(zip(_our_names(tuple(record)), record.values(), strict=True))
        else:
            yield {"PROBLEM": "not a JSON object: the line"}


def _parquet(file: IO[bytes]) -> Iterator[Any]:
    with pq.ParquetFile(file) as parquet:
        schema = parquet.schema_arrow
        columns = [field.name for field in schema if not _has_images(field.type)]
        yield columns
        for batch in parquet.iter_batches(columns=columns):
            yield from batch.rename_columns(list(_our_names(tuple(batch.schema.names)))).to_pylist()


def _has_images(kind: pa.DataType) -> bool:
    """Whether the column holds images, which are not read."""
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in binary) or (pa.types.is_struct(kind) and any(_has_images(part.type) for part in kind))


@lru_cache(maxsize=1024)
def _our_names(header: tuple[str, ...]) -> tuple[str, ...]:
    """Our names of the columns; an alias stays as it is where the name itself, or an alias before it, is there too."""
    plain = [str(c).strip().lower() for c in header]
    columns: list[str] = []
    for column in plain:
        ours = ALIASES.get(column, column)
        columns.append(column if ours in plain or ours in columns else ours)
    return tuple(columns)


FORMATS: dict[str, Callable[[IO[bytes]], Iterator[Any]]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _file_list,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".geojson": _json,
    ".parquet": _parquet,
}


NOWHERE_DEG = 1e-6  # cameras write 0, 0 when they have no fix
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def to_photos(rows: Iterable[Row], panorama: PanoramaConfig | None) -> tuple[list[Photo], list[dict[str, Any]]]:
    """The good photos, and the bad rows as rows of `tables.REJECTS`; rows are numbered from 1.

    A row may have the fields of `Photo`, `panorama` (whether the file is one, if that is known) and `PROBLEM` (why it
    can't be used). With `panorama` set, a row that is or may be a panorama becomes one photo per heading.
    """
    good: list[Photo] = []
    rejects: list[dict[str, Any]] = []
    first_row: dict[str, int] = {}
    for number, cells in enumerate(rows, start=1):
        file, is_panorama = clean_text(cells.get("file")), clean_text(cells.get("panorama")).lower()
        identifier = clean_text(cells.get("id")) or file
        try:
            if "PROBLEM" in cells:
                raise ValueError(cells["PROBLEM"])
            if identifier in first_row:
                raise ValueError(f"duplicate id: '{identifier}' is already the id of row {first_row[identifier]}")
            photo = _photo(number, identifier, file, cells)
            if is_panorama and is_panorama not in BOOLEANS:
                raise ValueError(f"not yes or no: panorama is {is_panorama!r}")
            photos = _views(photo, BOOLEANS.get(is_panorama), panorama)
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
    if fov_deg is not None and not 0 < fov_deg <= 360:
        raise ValueError(f"field of view out of range: {fov_deg:g} is not in 0..360")
    return Photo(
        row=row,
        id=identifier,
        file=file,
        place=clean_text(cells.get("place")) or f"{lat:.5f},{lon:.5f}",  # about 1 m
        lat=lat,
        lon=lon,
        heading=None if heading is None else _normalize_degrees(heading),
        street=clean_text(cells.get("street")),
        district=clean_text(cells.get("district")),
        sub_street=clean_text(cells.get("sub_street")),
        block=clean_text(cells.get("block")),
        split=clean_text(cells.get("split")),
        fov_deg=fov_deg,
    )


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
    """A cell as text; whole numbers without their decimal point."""
    if isinstance(value, str):
        return value.strip()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def parse_number(cells: Row, column: str) -> float | None:
    """A cell as a finite number, None if empty; ValueError if it is something else."""
    value = cells.get(column)
    if clean_text(value) == "":
        return None
    try:
        result = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise ValueError(f"not a number: {column} is {str(value)!r}")
    return result
