#!/usr/bin/env python
"""Photos -> grafted images: each training photo in the corner of the tile of its place, street names on the tile.

    python ray_jobs/graft.py --config demo

Reads <run>/photos (train), writes <run>/grafts; rows without a tile go to <run>/rejects/graft.parquet.
"""

from functools import partial
from typing import Any

import pyarrow as pa

from addressvlm import InputError, tables
from addressvlm.cities.source import resolve
from addressvlm.config import Config
from addressvlm.files import write_parquet
from addressvlm.maps.grafts import Grafter, graft_batch
from addressvlm.run import Run, is_done, resuming
from addressvlm.shards import Rows, Work, forget, plan, sources_fingerprint
from ray_jobs import common, prepare
from ray_jobs.stream import sharded

SHARD = 256  # photos; a second or two of work
FETCHING_ONLY = {"cache", "per_second", "user_agent", "attribution"}  # settings that no graft depends on
COLUMNS = ["id", "place", "lat", "lon", "heading", "image", "street", "main_street", "district"]


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
    if sources.city.streets and not run.roads.is_file():
        raise InputError(f"there is no {run.roads} to draw tiles from: run prepare again, with --redo.")
    files = (str(run.roads) if sources.city.streets else None, sources.tiles.imagery)
    Grafter(*files, sources.tiles)  # a missing file is told before Ray is asked
    function = partial(graft_batch, *files, sources.tiles.model_dump_json())
    with resuming(run.grafts, settings(config), redo) as folder:
        made = sharded("graft", shards, folder, Work(function, tables.GRAFTS, COLUMNS, sources_fingerprint(*files)))
        written = sum(summary["written"].get("train", 0) for summary in made)
        rejects = [reject for summary in made for reject in summary["rejects"]]
        _write_rejects(run, rejects)
        if not written or len(rejects) > config.city.max_reject_share * total:
            forget(folder, [summary for summary in made if summary["rejects"]])
            first = rejects[0]["reason"].rstrip(".") if rejects else "there are no training photos"
            more = ", or raise city.max_reject_share" if written else ""
            raise InputError(
                f"{len(rejects)} of {total} photos have no graft (the first: {first}): mend tiles.imagery or city.streets for "
                f"the places listed in {run.rejects / 'graft.parquet'}{more}."
            )
    print(f"graft: {written:,} grafted images in {run.grafts}, {len(rejects):,} rejected", flush=True)


def _write_rejects(run: Run, rejects: Rows) -> None:
    write_parquet(pa.Table.from_pylist(rejects, schema=tables.REJECTS), run.rejects / "graft.parquet")


def main(argv: list[str] | None = None) -> None:
    args = common.arguments(__doc__).parse_args(argv)
    config = common.configure(args)
    common.connect()
    run_step(config, args.redo)


if __name__ == "__main__":
    common.job(main)
