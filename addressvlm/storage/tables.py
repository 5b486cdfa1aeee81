"""The data format: folders of Parquet files with encoded images, which `datasets.load_dataset("parquet", …)` opens.

A table is a folder of `<split>-NNNNN.parquet` files. Training tables have the columns `image` (encoded bytes) and `rounds`
(the conversation about it), and `tile` where the map is a second image; the other columns say where the row comes from.
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

ROWS_PER_GROUP = 64  # to get one row a reader loads this many images

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROUNDS = pa.list_(pa.struct([
    ("level", pa.string()),  # district, street, address, alignment or reasoning
    ("kind", pa.string()),  # generation, judgment, choice or explanation
    ("question", pa.string()),
    ("answer", pa.string()),
    ("options", pa.list_(pa.string())),  # choice: the names to choose from; judgment: the name in question
]))  # fmt: skip


def with_features(schema: pa.Schema) -> pa.Schema:
    """The schema with the metadata that makes Hugging Face `datasets` decode image columns."""
    features = {field.name: _feature(field.type) for field in schema}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature(dtype: pa.DataType) -> Any:
    if dtype == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_struct(dtype):
        return {dtype.field(i).name: _feature(dtype.field(i).type) for i in range(dtype.num_fields)}
    if pa.types.is_list(dtype):
        return {"feature": _feature(dtype.value_type), "_type": "List"}
    names = {"double": "float64", "float": "float32"}
    return {"dtype": names.get(str(dtype), str(dtype)), "_type": "Value"}


PHOTOS = with_features(pa.schema([
    ("id", pa.string()),
    ("place", pa.string()),
    ("lat", pa.float64()),  # degrees, WGS84
    ("lon", pa.float64()),
    ("heading", pa.float32()),  # degrees clockwise from north, null if unknown
    ("image", IMAGE),
    ("street", pa.string()),  # name in the answers: the sub-street if city.answer is sub_street
    ("main_street", pa.string()),  # the whole street if `street` is a sub-street
    ("district", pa.string()),
    ("sub_street", pa.string()),  # null without a partition
    ("address_source", pa.string()),  # manifest, map, nominatim, google or neighbour
    ("cross_street", pa.string()),  # the nearest other street, null if none is near
    ("distance_m", pa.float32()),  # to the street
    ("margin_m", pa.float32()),  # distance to `second_street` minus distance_m, null without one
    ("second_street", pa.string()),  # the runner-up of the geocoding
    ("ambiguous", pa.bool_()),
    ("rounds", ROUNDS),
]))  # fmt: skip
GRAFTS = with_features(pa.schema([
    ("id", pa.string()),
    ("place", pa.string()),
    ("image", IMAGE),  # grafted image; with tiles.layout two the photo
    ("tile", IMAGE),  # with tiles.layout two the tile, else null
    ("street", pa.string()),
    ("district", pa.string()),
    ("names", pa.list_(pa.string())),  # street names written on the tile
    ("facts", pa.string()),  # JSON of addressvlm.labels.facts.Facts
]))  # fmt: skip
ALIGNMENT = with_features(pa.schema([
    ("id", pa.string()),
    ("place", pa.string()),
    ("image", IMAGE),
    ("tile", IMAGE),  # second image of the conversation, or null
    ("street", pa.string()),
    ("district", pa.string()),
    ("rounds", ROUNDS),  # the last round is the question with the label
    ("source", pa.string()),  # who wrote the label: template, <labeler>:<model>, or fallback:template
    ("attempts", pa.int32()),
]))  # fmt: skip
REASONING = ALIGNMENT  # labels of photos without a map (paper 003)
_PHOTO_KEYS = [  # columns that identify the photo in tables of model outputs
    ("id", pa.string()),
    ("place", pa.string()),
    ("lat", pa.float64()),
    ("lon", pa.float64()),
    ("street", pa.string()),
    ("district", pa.string()),
]
ANSWERS = with_features(pa.schema([
    *_PHOTO_KEYS,
    ("level", pa.string()),
    ("kind", pa.string()),
    ("question", pa.string()),
    ("options", pa.list_(pa.string())),
    ("expected", pa.string()),
    ("answer", pa.string()),  # raw model output
    ("correct", pa.bool_()),
]))  # fmt: skip
# ln p of each address of the gazetteer, in its order; -inf: impossible
SCORES = with_features(pa.schema([*_PHOTO_KEYS, ("scores", pa.list_(pa.float64()))]))
REJECTS = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("id", pa.string()), ("reason", pa.string())]  # rows count from 1
)


def table_files(folder: AnyPath, split: str) -> list[Any]:
    """The sorted files of a split, of the folder's own path type.

    Raises:
        InputError: there is none, or the step that writes them has not finished.
    """
    files = list_files(folder, f"{split}-*.parquet")
    if not files or is_unfinished(folder):
        raise InputError(f"no table {folder}/{split}-*.parquet: run the step that writes it, or give another folder.")
    return files


def count_rows(folder: AnyPath, split: str) -> int:
    """Number of rows of a split; 0 if the split has no files."""
    return sum(count_file_rows(file) for file in list_files(folder, f"{split}-*.parquet"))


def count_file_rows(file: AnyPath) -> int:
    """Number of rows of a Parquet file."""
    with open_parquet(file) as parquet:
        return int(parquet.metadata.num_rows)


def read_table(folder: AnyPath, split: str, columns: list[str] | None = None) -> pa.Table:
    """A split as one table; give `columns` to leave out the images."""
    return pa.concat_tables([read_table_file(file, columns) for file in table_files(folder, split)])


def read_table_file(file: AnyPath, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file as one table."""
    with open_parquet(file) as parquet:
        return parquet.read(columns=columns)


def iter_rows(folder: AnyPath, split: str, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """A split row by row, one row group in memory at a time."""
    for file in table_files(folder, split):
        with open_parquet(file) as parquet:
            for batch in parquet.iter_batches(batch_size=ROWS_PER_GROUP, columns=columns):
                yield from batch.to_pylist()


def write_table(
    folder: AnyPath, split: str, rows: Iterable[dict[str, Any]], schema: pa.Schema, rows_per_file: int = 2048
) -> int:
    """Write rows as `<split>-NNNNN.parquet` and return their number; at most one row group is in memory."""
    remaining, written = iter(rows), 0
    group = list(islice(remaining, min(ROWS_PER_GROUP, rows_per_file)))
    while group:
        room = rows_per_file
        with (
            atomic_write(folder / f"{split}-{written // rows_per_file:05d}.parquet") as path,
            pq.ParquetWriter(path, schema) as writer,
        ):
            while group and room:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                written += len(group)
                room -= len(group)
                group = list(islice(remaining, min(ROWS_PER_GROUP, room or rows_per_file)))
    return written
