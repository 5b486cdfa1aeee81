#!/usr/bin/env python
"""Photos -> grafted images: each training photo in the corner of the tile of its place, street names on the tile.

    python ray_jobs/graft.py --config demo

Reads <run>/photos (train), writes <run>/grafts; rows without a tile go to <run>/rejects/graft.parquet.
"""

from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from addressvlm import InputError, tables
from addressvlm.cities.source import resolve
from addressvlm.config import Config
from addressvlm.maps.grafts import Grafter, graft_rows
from addressvlm.run import Run, is_done, resuming, storage
from addressvlm.shards import Made, Rows, Work, forget, plan, sources_fingerprint
from ray_jobs import common, prepare
from ray_jobs.stream import sharded

SHARD = 256  # photos; a second or two of work
FETCHING_ONLY = {"cache", "per_second", "user_agent", "attribution"}  # settings that no graft depends on
COLUMNS = ["id", "place", "lat", "lon", "heading", "image", "street", "district"]


def settings(config: Config) -> dict[str, Any]:
    """What the grafts depend on."""
    return {**prepare.settings(config), "tiles": config.tiles.model_dump(exclude=FETCHING_ONLY)}


def run_step(config: Config, redo: bool) -> None:
    """Graft the training photos of a run.

    Raises:
        InputError: there are no photos, nothing to draw tiles from, or too many places have no tile.
    """
    run = Run(config)
    if is_done(run.grafts, settings(config), redo):
        print("graft: already done", flush=True)
        return
    shards = plan(run.photos, "train", SHARD)
    total = sum(shard.rows for shard in shards)
    sources = resolve(config, run)
    files = (sources.city.streets, sources.tiles.imagery)
    tiles = config.tiles.model_copy(update={"cache": config.tiles.cache or str(storage(config.storage) / "tile-cache")})
    Grafter(*files, tiles, config.city.language)  # a missing file is told before Ray is asked
    function = partial(graft_batch, *files, tiles.model_dump_json(), config.city.language)
    with resuming(run.grafts, settings(config), redo) as folder:
        made = sharded("graft", shards, folder, Work(function, tables.GRAFTS, COLUMNS, sources_fingerprint(*files)))
        written = sum(summary["written"].get("train", 0) for summary in made)
        rejects = [reject for summary in made for reject in summary["rejects"]]
        _write_rejects(run, rejects)
        if not written or len(rejects) > config.city.max_reject_share * total:
            forget(folder, [summary for summary in made if summary["rejects"]])
            first = rejects[0]["reason"] if rejects else "there are no training photos"
            bad = f"{len(rejects)} of {total} photos have no graft (first: {first})"
            raise InputError(f"{bad}: see {run.rejects}/graft.parquet.")
    print(f"graft: {written:,} grafted images in {run.grafts}, {len(rejects):,} rejected", flush=True)


def graft_batch(streets: str | None, imagery: str | None, tiles: str, language: str | None, photos: Rows) -> Made:
    """Rows of PHOTOS -> rows of GRAFTS, and rejects where there is no image; see `graft_rows`."""
    good, rejects = [], []
    for row in graft_rows(streets, imagery, tiles, photos, language):
        reason = row.pop("reason")
        if reason is None:
            good.append(row)
        else:
            rejects.append({"file": row["image"]["path"], "row": None, "id": row["id"], "reason": reason})
    return Made({"train": good}, rejects)


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
