"""Tables as streams of rows: CSV as people and spreadsheets write it, JSONL, JSON, Parquet, or a list of file names.

What a table says is taken as it stands. Where it could mean two things (a quote that is never closed, a column named twice, a
row with more cells than the header) the table or the row is refused.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from addressvlm.dataset.readers.rows import Row, clean_text, parse_number
from addressvlm.errors import InputError
from addressvlm.gazetteer.names import clean_name, is_nothing, printable
from addressvlm.storage import remote_path
from addressvlm.storage.files import open_text

ALIASES = {
    **dict.fromkeys(("photo", "image", "filename", "file_name", "image_path", "img"), "file"),
    **dict.fromkeys(("dbimagefns", "qimagefns"), "file"),  # of NetVLAD's listings
    "latitude": "lat",
    **dict.fromkeys(("longitude", "lng"), "lon"),
    "heading_deg": "heading",
}
NEEDED = frozenset(("file", "lat", "lon"))
RECORD_KEYS = ("data", "result", "osv", "photos", "currentpageitems", "images", "annotations")  # keys of the records in JSON
DELIMITERS = ",;\t|"
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # Excel's, above the header
TITLE_LINES = 10  # how far below its first line a header is looked for
HEAD_RECORDS = 20  # of JSON, where a record may leave out what it does not have
CELL_LINES = 200  # a longer cell is a quote that is never closed


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

    def read_as(self, parse: Callable[[Row], Row]) -> Iterator[Row]:
        """The rows with `parse` applied to all that are not empty and have no `PROBLEM`."""
        return (parse(cells) if cells and "PROBLEM" not in cells else cells for cells in self.rows)


def open_table(source: str, what: str = "the manifest") -> Table:
    """Open it and read its header; InputError if that fails, and while rows are read from a damaged file.

    `what` it is, for errors.
    """
    if remote_path.path_of(source).suffix.lower() not in FORMATS:
        raise InputError(f"{what} {source} is not a .csv, .tsv, .jsonl, .parquet or .json file: save it as one of them.")
    rows = _read(source, what)
    return Table(source, next(rows, []), rows)


def _read(source: str, what: str) -> Iterator[Any]:
    """The header, then the rows, {} where no cell says anything; any failure as an InputError."""
    try:
        path = remote_path.path_of(source)
        with path.open("rb") as file:
            rows = FORMATS[path.suffix.lower()](file)
            yield next(rows, [])
            for cells in rows:
                yield cells if any(map(clean_text, cells.values())) else {}
    except FileNotFoundError:
        raise InputError(f"no manifest at {source}: set city.manifest to a CSV, JSONL or Parquet file that exists.") from None
    except UnicodeError:
        raise InputError(f"{what} {source} is not UTF-8 text: save it as UTF-8.") from None
    except RecursionError:
        raise InputError(f"{what} {source} is nested too deeply: write it again.") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{what} {source} is not JSON ({error}): write it again.") from None
    except (csv.Error, pa.ArrowException) as error:
        raise InputError(f"{what} {source} can't be read ({str(error).splitlines()[0]}): write it again.") from None
    except OSError as error:
        raise InputError(f"{what} {source} can't be read ({remote_path.error_text(error)}): check the file.") from None
    except TableError as error:
        raise InputError(f"{what} {source} {printable(str(error))}.") from None
    except ValueError as error:
        raise InputError(f"{what} {source} can't be read ({printable(str(error))}): write it again.") from None


def _csv(file: IO[bytes]) -> Iterator[Any]:
    lines = _numbered_lines(file)
    first = next((line for line in lines if line[1].strip()), None)
    if first is None:
        return
    separator = SEPARATOR_LINE.fullmatch(first[1].strip())
    if separator:
        first = next(lines, (2, ""))
    unquoted = re.sub(r'"[^"]*"', "", first[1])
    delimiter = separator[1] if separator else max(DELIMITERS, key=unquoted.count)
    head = [first, *islice(lines, TITLE_LINES)]
    lines = chain(head, lines)
    _, header = next(_records(lines, delimiter, lambda _: False))
    columns = _our_names(tuple(header))
    needed = max((i for i, name in enumerate(columns, 1) if name), default=0)  # a comma at the end of the header is no column
    for number, line in () if NEEDED & set(columns) else head:
        if _is_header(line):
            raise TableError(f"has its header in line {number}: delete the lines above it")
    yield header

    def is_row(cells: list[str]) -> bool:
        row = dict(zip(columns, cells, strict=False))
        return len(cells) == len(columns) and all(_is_number(row[c]) for c in ("lat", "lon") if c in row)

    for number, cells in _records(lines, delimiter, is_row):
        row: Row = dict(zip(columns, cells, strict=False))
        if isinstance(cells, Problem):
            row["PROBLEM"] = f"stray quote: in line {number} a cell goes on after its closing quote"
        elif any(map(clean_text, cells[len(columns) :])):
            row["PROBLEM"] = f"more cells than columns: {len(cells)} in line {number}, and {len(columns)} columns"
        elif len(cells) < needed and any(map(clean_text, cells)):
            row["PROBLEM"] = f"fewer cells than columns: {len(cells)} in line {number}, and {len(columns)} columns"
        yield row


class TableError(ValueError):
    """What is wrong with a table, as the end of a sentence that begins with its name."""


class Problem(list[str]):
    """The cells of a line whose quotes don't fit, divided at every delimiter."""


def _numbered_lines(file: IO[bytes]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(open_text(file, newline=""), 1):
        if "\0" in line:
            raise UnicodeError("NUL")
        yield number, line


def _records(
    lines: Iterator[tuple[int, str]], delimiter: str, is_row: Callable[[list[str]], bool]
) -> Iterator[tuple[int, list[str]]]:
    """The number of each record's first line and its cells, a `Problem` where the quotes of a line don't fit.

    A cell in quotes may have line breaks.

    Raises:
        TableError: such a cell is never closed, or has lines that are rows themselves: a quote that nobody meant to open.
    """

    def split(text: list[str]) -> list[str]:
        return next(csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=delimiter != "\t"), [])

    longest = csv.field_size_limit()
    for number, line in lines:
        if '"' not in line and len(line) < longest:
            yield number, line.rstrip("\r\n").split(delimiter)
            continue
        record = [line]
        while True:
            try:
                yield number, split(record)
                break
            except csv.Error as error:
                unclosed = str(error) == "unexpected end of data"
                if '"' not in line or (len(record) == 1 and not unclosed):
                    if "larger than field limit" in str(error):
                        raise
                    yield number, Problem(line.rstrip("\r\n").split(delimiter))
                    break
            follows = next(lines, None) if unclosed else None
            if follows is None or len(record) == CELL_LINES or _is_row(follows[1], split, is_row):
                raise TableError(f"has a quote in line {number} that is not closed: close it, or write it twice")
            record.append(follows[1])


def _is_header(line: str) -> bool:
    """Whether a line names two of the needed columns, between any delimiters."""
    return any(len(NEEDED & set(_names(line.replace('"', "").split(mark)))) > 1 for mark in DELIMITERS)


def _is_row(line: str, split: Callable[[list[str]], list[str]], is_row: Callable[[list[str]], bool]) -> bool:
    try:
        return is_row(split([line]))
    except csv.Error:
        return False


def _is_number(text: str) -> bool:
    try:
        return parse_number({"lat": text}, "lat") is not None
    except ValueError:
        return False


def _txt(file: IO[bytes]) -> Iterator[Any]:
    """A list of file names, or a table, which spreadsheets also save as .txt."""
    lines = _numbered_lines(file)
    first = next((line for _, line in lines if line.strip()), "")
    if _is_header(first):
        file.seek(0)
        yield from _csv(file)
        return
    yield ["file"]
    for line in chain([first], (line for _, line in lines)):
        yield {"file": line.strip()}


def _jsonl(file: IO[bytes]) -> Iterator[Any]:
    def parse(line: str) -> Any:
        try:
            return json.loads(line, object_pairs_hook=_record) if line.strip() else {}
        except ValueError as error:
            return str(error) if isinstance(error, TableError) else None
        except RecursionError:
            return None

    yield from _with_header(parse(line) for _, line in _numbered_lines(file))


def _json(file: IO[bytes]) -> Iterator[Any]:
    yield from _with_header(iter(_json_records(json.load(open_text(file), object_pairs_hook=_record))))


def _record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise TableError(f"has the key {next(key for key in record if keys.count(key) > 1)} twice in one object: remove one")
    return record


def _json_records(tree: Any) -> list[Any]:
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
            return _json_records(value)
    if tree and all(isinstance(value, dict) for value in tree.values()):
        return [{"file": name} | record for name, record in tree.items()]
    return [tree] if tree else []


def _with_header(records: Iterator[Any]) -> Iterator[Any]:
    """The keys of the first JSON objects, then all records as rows; a text is the problem of a line."""
    head = list(islice(records, HEAD_RECORDS))
    header: dict[str, str] = {}  # our name -> theirs
    for record in head:
        if isinstance(record, dict):
            theirs = tuple(record)
            header = dict(zip(_our_names(theirs), theirs, strict=True)) | header
    yield list(header.values())
    for record in chain(head, records):
        if not isinstance(record, dict):
            yield {"PROBLEM": f"JSON line: it {record}" if isinstance(record, str) else "not a JSON object: the line"}
            continue
        try:
            yield dict(zip(_our_names(tuple(record)), record.values(), strict=True))
        except TableError as error:
            yield {"PROBLEM": f"JSON object: it {error}"}


def _parquet(file: IO[bytes]) -> Iterator[Any]:
    with pq.ParquetFile(file) as parquet:
        schema = parquet.schema_arrow
        columns = [field.name for field in schema if not _has_images(field.type)]
        names = list(_our_names(tuple(columns)))
        yield columns
        for batch in parquet.iter_batches(columns=columns):
            yield from batch.rename_columns(names).to_pylist()


def _has_images(kind: pa.DataType) -> bool:
    """Whether the column holds images, which are not read."""
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in binary) or (pa.types.is_struct(kind) and any(_has_images(part.type) for part in kind))


def _names(header: Sequence[Any]) -> list[str]:
    names = (clean_name(str(column)).lower() for column in header)
    return ["" if is_nothing(name) else ALIASES.get(name, name) for name in names]


@lru_cache(maxsize=1024)
def _our_names(header: tuple[str, ...]) -> tuple[str, ...]:
    """Our names of the columns; TableError if two have one name or stand for the same, since nobody knows which is meant."""
    try:
        names = _names(header)
    except ValueError as error:
        raise TableError(f"has a column with {error}") from None
    for name in names:
        if name and names.count(name) > 1:
            first, second = [column.strip() for column, ours in zip(header, names, strict=True) if ours == name][:2]
            twice = f"the column {first} twice" if first == second else f"the columns {first} and {second}, both for {name}"
            raise TableError(f"has {twice}: remove or rename one")
    return tuple(names)


FORMATS: dict[str, Callable[[IO[bytes]], Iterator[Any]]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".geojson": _json,
    ".parquet": _parquet,
}
