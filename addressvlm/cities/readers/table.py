"""Tables of photos as streams of rows: CSV, JSONL, Parquet, JSON, or a plain list of file names."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from addressvlm.cities import storage
from addressvlm.errors import InputError

# Column in small letters -> cell; under PROBLEM, which no column can be called, the reason why the row can't be used
Row = dict[str, Any]

ALIASES = {
    **dict.fromkeys(("photo", "image", "filename", "file_name", "image_path", "img"), "file"),
    **dict.fromkeys(("dbimagefns", "qimagefns"), "file"),  # of NetVLAD's listings
    "latitude": "lat",
    **dict.fromkeys(("longitude", "lng"), "lon"),
    "heading_deg": "heading",
}
NESTS = ("data", "result", "osv", "photos", "currentpageitems", "images", "annotations")  # where JSON keeps its records


@dataclass
class Table:
    """Rows under our column names, read as they are asked for."""

    where: str
    written: list[str]  # the column names as they stand in the file, of the first record in JSON
    rows: Iterator[Row]

    @property
    def columns(self) -> list[str]:
        """The same under our names."""
        return list(_renamed(tuple(self.written)))

    def require(self, needed: Sequence[str], hint: str = "") -> None:
        """Raise InputError when one of the columns is not there."""
        missing = [column for column in needed if column not in self.columns]
        if missing and any(self.written):
            raise InputError(
                f"the manifest {self.where} lacks the column {' and '.join(missing)} (it has {', '.join(self.written)}): "
                f"add or rename it; photo or image also stand for file{hint}."
            )


def open_table(where: str) -> Table:
    """Open it and read its header.

    Raises:
        InputError: there is no such file or it is none of these formats; also while rows are read, when it is damaged.
    """
    if storage.suffix(where) not in FORMATS:
        raise InputError(f"the manifest {where} is not a .csv, .tsv, .jsonl, .parquet or .json file: save it as one of them.")
    stream = _guarded(where)
    return Table(where, next(stream, []), stream)


def _guarded(where: str) -> Iterator[Any]:
    """The header as written, then the rows; whatever goes wrong becomes one sentence."""
    try:
        with storage.open_binary(where) as file:
            yield from FORMATS[storage.suffix(where)](file)
    except FileNotFoundError:
        raise InputError(f"no manifest at {where}: set city.manifest to a CSV, JSONL or Parquet file that exists.") from None
    except UnicodeDecodeError:
        raise InputError(f"the manifest {where} is not UTF-8 text: save it as UTF-8.") from None
    except RecursionError:
        raise InputError(f"the manifest {where} is nested too deeply: write it again.") from None
    except json.JSONDecodeError as error:
        raise InputError(f"the manifest {where} is not JSON ({error}): write it again.") from None
    except (csv.Error, pa.ArrowException) as error:
        raise InputError(f"the manifest {where} can't be read ({str(error).splitlines()[0]}): write it again.") from None
    except OSError as error:
        raise InputError(f"the manifest {where} can't be read ({storage.said(error)}): check the file.") from None


def _csv(file: IO[bytes]) -> Iterator[Any]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    first = text.readline()
    lines = csv.reader(chain([first], text), delimiter=max(",;\t", key=first.count))
    written = next(lines, [])
    yield written
    columns = _renamed(tuple(written))
    for cells in lines:
        if cells:
            yield dict(zip(columns, cells, strict=False))


def _names(file: IO[bytes]) -> Iterator[Any]:
    yield ["file"]
    for line in io.TextIOWrapper(file, encoding="utf-8-sig"):
        if line.strip():
            yield {"file": line.strip()}


def _jsonl(file: IO[bytes]) -> Iterator[Any]:
    yield from _with_header(_parsed(line) for line in io.TextIOWrapper(file, encoding="utf-8-sig") if line.strip())


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _json(file: IO[bytes]) -> Iterator[Any]:
    yield from _with_header(iter(_records(json.load(io.TextIOWrapper(file, encoding="utf-8-sig")))))


def _records(tree: Any) -> list[Any]:
    """The list of records in a JSON document: itself, one level or two down, GeoJSON features, or name -> record."""
    if not isinstance(tree, dict):
        return tree if isinstance(tree, list) else [tree]
    if isinstance(tree.get("features"), list):
        return [_flat(feature) for feature in tree["features"]]
    for key, value in tree.items():
        if key.lower() in NESTS and isinstance(value, (list, dict)):
            return _records(value)
    if tree and all(isinstance(value, dict) for value in tree.values()):
        return [{"file": name} | record for name, record in tree.items()]
    return [tree] if tree else []


def _flat(feature: Any) -> Any:
    if not isinstance(feature, dict) or not isinstance(feature.get("properties"), dict):
        return None
    return feature["properties"] | {"geometry": feature.get("geometry")}


def _with_header(records: Iterator[Any]) -> Iterator[Any]:
    """The keys of the first record that is one, then all records as rows."""
    before: list[Any] = []
    for record in records:
        before.append(record)
        if isinstance(record, dict):
            break
    yield list(before[-1]) if before and isinstance(before[-1], dict) else []
    for record in chain(before, records):
        if isinstance(record, dict):
            yield dict(zip(_renamed(tuple(record)), record.values(), strict=True))
        else:
            yield {"PROBLEM": "not a JSON object: the line"}


def _parquet(file: IO[bytes]) -> Iterator[Any]:
    with pq.ParquetFile(file) as parquet:
        schema = parquet.schema_arrow
        wanted = [field.name for field in schema if not _is_heavy(field.type)]
        yield wanted
        for batch in parquet.iter_batches(columns=wanted):
            yield from batch.rename_columns(list(_renamed(tuple(batch.schema.names)))).to_pylist()


def _is_heavy(kind: pa.DataType) -> bool:
    """Pictures inside the table, which are not read."""
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in binary) or (pa.types.is_struct(kind) and any(_is_heavy(part.type) for part in kind))


@lru_cache(maxsize=1024)
def _renamed(written: tuple[str, ...]) -> tuple[str, ...]:
    """Column names in our words; an alias gives way where the name itself, or an alias before it, is there too."""
    plain = [str(c).strip().lower() for c in written]
    columns: list[str] = []
    for column in plain:
        ours = ALIASES.get(column, column)
        columns.append(column if ours in plain or ours in columns else ours)
    return tuple(columns)


FORMATS: dict[str, Callable[[IO[bytes]], Iterator[Any]]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _names,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".geojson": _json,
    ".parquet": _parquet,
}
