#!/usr/bin/env python
"""Photos -> grafted images: each training photo in the corner of the tile of its place, street names on the tile.

    python ray_jobs/graft.py --config demo

Reads <run>/photos (train), writes <run>/grafts; rows without a tile go to <run>/rejects/graft.parquet.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from addressvlm import InputError, tables
from addressvlm.cities.source import resolve
from addressvlm.config import Config
from addressvlm.maps.grafts import Grafter, graft_rows
from addressvlm.run import Run, is_done, writing
from ray_jobs import common, prepare
from ray_jobs.stream import Rows, mapped

BATCH = 64  # photos at a time
COLUMNS = ["id", "place", "lat", "lon", "heading", "image", "street", "district"]
RESULT = pa.schema([*tables.GRAFTS, ("reason", pa.string())])


def settings(config: Config) -> dict[str, Any]:
    """What the grafts depend on."""
    return {**prepare.settings(config), "tiles": config.tiles.model_dump()}


def run_step(config: Config, redo: bool) -> None:
    """Graft the training photos of a run.

    Raises:
        InputError: there are no photos, nothing to draw tiles from, or too many places have no tile.
    """
    run = Run(config)
    if is_done(run.grafts, settings(config), redo):
        print("graft: already done", flush=True)
        return
    tables.files(run.photos, "train")  # says which step is missing
    total = tables.count(run.photos, "train")
    sources = resolve(config, run)
    Grafter(sources.city.streets, sources.tiles.imagery, config.tiles)  # a missing file is told before Ray is asked
    function = partial(graft_rows, sources.city.streets, sources.tiles.imagery, config.tiles.model_dump_json())
    common.progress("graft", 0, total)
    with writing(run.grafts, settings(config)) as folder:
        rejects: Rows = []
        found = mapped("graft", run.photos, "train", COLUMNS, function, RESULT, BATCH)
        written = tables.write(folder, "train", _good(found, rejects, total), tables.GRAFTS)
        _write_rejects(run, rejects)
        if not written or len(rejects) > config.city.max_reject_share * total:
            first = rejects[0]["reason"] if rejects else "there are no training photos"
            bad = f"{len(rejects)} of {total} photos have no graft (first: {first})"
            raise InputError(f"{bad}: see {run.rejects}/graft.parquet.")
    print(f"graft: {written:,} grafted images in {run.grafts}, {len(rejects):,} rejected", flush=True)


def _good(rows: Iterator[dict[str, Any]], rejects: Rows, total: int) -> Iterator[dict[str, Any]]:
    """The rows that have an image; the others are appended to `rejects`."""
    for done, row in enumerate(rows, start=1):
        reason = row.pop("reason")
        if reason is None:
            yield row
        else:
            rejects.append({"file": row["image"]["path"], "row": None, "id": row["id"], "reason": reason})
        common.progress("graft", done, total)


def _write_rejects(run: Run, rejects: Rows) -> None:
    run.rejects.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rejects, schema=tables.REJECTS), run.rejects / "graft.parquet")


def main(argv: list[str] | None = None) -> None:
    args = common.arguments(__doc__).parse_args(argv)
    config = common.configure(args)
    common.connect()
    run_step(config, args.redo)


if __name__ == "__main__":
    common.job(main)
