#!/usr/bin/env python
"""Graft each training photo onto the map tile of its place.

    python ray_jobs/graft.py --config demo

Reads <run>/photos (train), writes <run>/grafts; rows without a tile go to <run>/rejects/graft.parquet.
"""

from functools import partial
from typing import Any

import pyarrow as pa

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.dataset.build import resolve_city_files
from addressvlm.storage import tables
from addressvlm.storage.files import write_parquet
from addressvlm.storage.remote_path import AnyPath
from addressvlm.storage.run_dir import Run, is_done, resumable_dir
from addressvlm.storage.shards import ShardWork, invalidate_shards, plan_shards, sources_fingerprint
from addressvlm.tiles.graft_rows import Grafter, graft_batch, graft_photos_batch
from ray_jobs import common, prepare
from ray_jobs.progress import display
from ray_jobs.ray_data import run_shards

SHARD_ROWS = 256  # one or two seconds of work
DOWNLOAD_SETTINGS = {"cache", "per_second", "user_agent", "attribution"}  # they do not change the grafts
COLUMNS = ["id", "place", "lat", "lon", "heading", "image", "street", "main_street", "district"]


def settings(config: Config) -> dict[str, Any]:
    """The settings that the grafts depend on."""
    return {**prepare.settings(config), "tiles": config.tiles.model_dump(exclude=DOWNLOAD_SETTINGS)}


def run_step(config: Config, redo: bool) -> None:
    """Graft the training photos of a run.

    Raises:
        InputError: there are no photos, nothing to draw tiles from, or too many places have no tile.
    """
    run = Run(config)
    display.heading("graft", "each training photo onto the map tile of its place")
    if is_done(run.grafts, settings(config), redo):
        print("graft: already done", flush=True)
        return
    files, tiles = sources(config, run)
    work = ShardWork(partial(graft_batch, *files, tiles), tables.GRAFTS, COLUMNS, sources_fingerprint(*files))
    with resumable_dir(run.grafts, settings(config), redo) as folder:
        written, rejected = _graft_split(run, "train", folder, work, "graft")
    print(f"graft: {written:,} grafted images in {run.grafts}, {rejected:,} rejected", flush=True)


def graft_photos(config: Config, source: Run, split: str, redo: bool = False) -> AnyPath | None:
    """Graft the photos of a split if `evaluate.images` is grafts; the folder of their table, with grafts as images.

    Args:
        config: settings of the tiles, and of the run that stores the result.
        source: the run with the photos and their city.

    Raises:
        InputError: as `run_step`, or tiles.layout is two.
    """
    if config.evaluate.images != "grafts":
        return None
    if config.tiles.layout == "two":
        raise InputError(
            "evaluate.images is grafts and tiles.layout is two, but questions are about one image: set it to graft."
        )
    target = Run(config).grafted_photos / split
    photos = sources_fingerprint(*map(str, tables.table_files(source.photos, split)))
    inputs = {"photos": photos, "tiles": settings(config)["tiles"]}
    if is_done(target, inputs, redo):
        return target
    files, tiles = sources(source.config.model_copy(update={"tiles": config.tiles}), source)
    work = ShardWork(partial(graft_photos_batch, *files, tiles, split), tables.PHOTOS, None, sources_fingerprint(*files))
    with resumable_dir(target, inputs, redo) as folder:
        written, rejected = _graft_split(source, split, folder, work, f"graft-{Run(config).folder.name}-{split}")
    print(f"graft: {written:,} photos of the split {split} grafted in {target}, {rejected:,} rejected", flush=True)
    return target


def sources(config: Config, run: Run) -> tuple[tuple[str | None, str | None], str]:
    """The files of streets and imagery, and the tile settings as JSON; opens the files, so that errors come before any task."""
    config = resolve_city_files(config, run)
    if config.city.streets and not run.roads.is_file():
        raise InputError(f"there is no {run.roads} to draw tiles from: rerun prepare with --redo.")
    files = (str(run.roads) if config.city.streets else None, config.tiles.imagery)
    Grafter(*files, config.tiles)
    return files, config.tiles.model_dump_json()


def _graft_split(run: Run, split: str, folder: AnyPath, work: ShardWork, rejects_name: str) -> tuple[int, int]:
    """Graft a split of a run's photos; the numbers written and rejected, the latter in a file of `run.rejects`.

    Raises:
        InputError: no photo has a tile, or more than `city.max_reject_share` have none.
    """
    shards = plan_shards(run.photos, split, SHARD_ROWS)
    total = sum(shard.rows for shard in shards)
    summaries = run_shards("graft", shards, folder, work)
    written = sum(summary["written"].get(split, 0) for summary in summaries)
    rejects = [reject for summary in summaries for reject in summary["rejects"]]
    file = run.rejects / f"{rejects_name}.parquet"
    write_parquet(pa.Table.from_pylist(rejects, schema=tables.REJECTS), file)
    if not written or len(rejects) > run.config.city.max_reject_share * total:
        invalidate_shards(folder, [summary for summary in summaries if summary["rejects"]])
        first = rejects[0]["reason"].rstrip(".") if rejects else f"there are no {split} photos"
        hint = ", or raise city.max_reject_share" if written else ""
        raise InputError(
            f"{len(rejects)} of {total} photos have no graft (the first: {first}): fix tiles.imagery or city.streets for "
            f"the places listed in {file}{hint}."
        )
    return written, len(rejects)


def main(argv: list[str] | None = None) -> None:
    args = common.job_parser(__doc__).parse_args(argv)
    config = common.load_config(args)
    common.connect()
    run_step(config, args.redo)


if __name__ == "__main__":
    common.run_main(main)
