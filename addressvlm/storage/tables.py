"""The one data format: Parquet with encoded image bytes, in the layout `datasets.load_dataset("parquet", …)` opens.

A table is a folder of `<split>-NNNNN.parquet` files. Every table that a model learns from has the columns `image`
(encoded bytes) and `rounds` (the conversation about it), and where an image comes with its map, `tile`; the rest says where
the row comes from.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from addressvlm.errors import InputError
from addressvlm.storage.files import atomic_write, open_parquet
from addressvlm.storage.remote_path import AnyPath, list_files
from addressvlm.storage.run_dir import is_unfinished

ROWS_PER_GROUP = 64  # a reader that wants one row reads this many images

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROUNDS = pa.list_(
    pa.struct(
        [
            ("level", pa.string()),  # district, street, address, alignment or reasoning
            ("kind", pa.string()),  # generation, judgment, choice or explanation
            ("question", pa.string()),
            ("answer", pa.string()),
            ("options", pa.list_(pa.string())),  # choice: the names offered; judgment: the one name asked about
        ]
    )
)


def with_features(schema: pa.Schema) -> pa.Schema:
    """The same schema with the metadata from which Hugging Face `datasets` decodes `image` columns as pictures."""
    features = {field.name: _feature(field.type) for field in schema}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> Any:
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_struct(kind):
        return {kind.field(i).name: _feature(kind.field(i).type) for i in range(kind.num_fields)}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    names = {"double": "float64", "float": "float32"}
    return {"dtype": names.get(str(kind), str(kind)), "_type": "Value"}


PHOTOS = with_features(
    pa.schema(
        [
            ("id", pa.string()),
            ("place", pa.string()),
            ("lat", pa.float64()),  # degrees, WGS84
            ("lon", pa.float64()),
            ("heading", pa.float32()),  # degrees clockwise from north, null if unknown
            ("image", IMAGE),
            ("street", pa.string()),  # as the answers name it: with city.answer sub_street it is the sub-street
            ("main_street", pa.string()),  # the street itself; `street` may be a part of it
            ("district", pa.string()),
            ("sub_street", pa.string()),  # null without a partition
            ("address_source", pa.string()),  # manifest, map, nominatim, google or neighbour
            ("cross_street", pa.string()),  # the nearest other named street, null if none is near
            ("distance_m", pa.float32()),  # to the street
            ("margin_m", pa.float32()),  # how much further `second_street` is, null without one
            ("second_street", pa.string()),  # the one that the address may be confused with
            ("ambiguous", pa.bool_()),
            ("rounds", ROUNDS),
        ]
    )
)
GRAFTS = with_features(
    pa.schema(
        [
            ("id", pa.string()),
            ("place", pa.string()),
            ("image", IMAGE),  # photo grafted onto the tile; with tiles.layout two the photo
            ("tile", IMAGE),  # with tiles.layout two, else null
            ("street", pa.string()),
            ("district", pa.string()),
            ("names", pa.list_(pa.string())),  # street names that can be read on the tile
            ("facts", pa.string()),  # JSON of addressvlm.labels.facts.Facts
        ]
    )
)
ALIGNMENT = with_features(
    pa.schema(
        [
            ("id", pa.string()),
            ("place", pa.string()),
            ("image", IMAGE),
            ("tile", IMAGE),  # a second image of the conversation, or null
            ("street", pa.string()),
            ("district", pa.string()),
            ("rounds", ROUNDS),  # the last one: the question and the label
            ("source", pa.string()),  # who wrote the label: template, <labeler>:<model>, or fallback:template
            ("attempts", pa.int32()),
        ]
    )
)
REASONING = ALIGNMENT  # the same of street views alone (paper 003)
_WHERE = [  # a photo in the tables of what a model makes of it
    ("id", pa.string()),
    ("place", pa.string()),
    ("lat", pa.float64()),
    ("lon", pa.float64()),
    ("street", pa.string()),
    ("district", pa.string()),
]
ANSWERS = with_features(
    pa.schema(
        [
            *_WHERE,
            ("level", pa.string()),
            ("kind", pa.string()),
            ("question", pa.string()),
            ("options", pa.list_(pa.string())),
            ("expected", pa.string()),
            ("answer", pa.string()),  # as the model wrote it
            ("correct", pa.bool_()),
        ]
    )
)
SCORES = with_features(
    pa.schema([*_WHERE, ("scores", pa.list_(pa.float64()))])  # ln p of each address of the gazetteer in its order, -inf: never
)
REJECTS = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("id", pa.string()), ("reason", pa.string())]  # row 1 is the first
)


def table_files(folder: AnyPath, split: str) -> list[Any]:
    """The files of one split, in order, `Path` or `RemotePath` as the folder is.

    Raises:
        InputError: there is none, or the step that writes them has not finished.
    """
    found = list_files(folder, f"{split}-*.parquet")
    if not found or is_unfinished(folder):
        raise InputError(f"no table {folder}/{split}-*.parquet: run the step that writes it, or give another folder.")
    return found


def count_rows(folder: AnyPath, split: str) -> int:
    """Number of rows of a split; 0 if the split has no files."""
    return sum(count_file_rows(file) for file in list_files(folder, f"{split}-*.parquet"))


def count_file_rows(file: AnyPath) -> int:
    """Number of rows of a Parquet file."""
    with open_parquet(file) as opened:
        return int(opened.metadata.num_rows)


def read_table(folder: AnyPath, split: str, columns: list[str] | None = None) -> pa.Table:
    """A split as one table; name the columns where images are not wanted."""
    return pa.concat_tables([read_table_file(file, columns) for file in table_files(folder, split)])


def read_table_file(file: AnyPath, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file as one table."""
    with open_parquet(file) as opened:
        return opened.read(columns=columns)


def iter_rows(folder: AnyPath, split: str, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """A split row by row, one row group in memory at a time."""
    for file in table_files(folder, split):
        with open_parquet(file) as opened:
            for batch in opened.iter_batches(batch_size=ROWS_PER_GROUP, columns=columns):
                yield from batch.to_pylist()


def write_table(
    folder: AnyPath, split: str, items: Iterable[dict[str, Any]], schema: pa.Schema, rows_per_file: int = 2048
) -> int:
    """Write rows as `<split>-NNNNN.parquet`, return how many; memory holds one row group."""
    left, written = iter(items), 0
    group = list(islice(left, min(ROWS_PER_GROUP, rows_per_file)))
    while group:
        room = rows_per_file
        with (
            atomic_write(folder / f"{split}-{written // rows_per_file:05d}.parquet") as path,
            pq.ParquetWriter(path, schema) as out,
        ):
            while group and room:
                out.write_table(pa.Table.from_pylist(group, schema=schema))
                written += len(group)
                room -= len(group)
                group = list(islice(left, min(ROWS_PER_GROUP, room or rows_per_file)))
    return written
