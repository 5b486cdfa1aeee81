#!/usr/bin/env python
"""Photos -> grafted images: each training photo in the corner of the tile of its place, street names on the tile.

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
from ray_jobs.ray_data import run_shards

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
    files, tiles = _sources(config, run)
    work = ShardWork(partial(graft_batch, *files, tiles), tables.GRAFTS, COLUMNS, sources_fingerprint(*files))
    with resumable_dir(run.grafts, settings(config), redo) as folder:
        told = _make(run, "train", folder, work, "graft")
    print(f"graft: {told[0]:,} grafted images in {run.grafts}, {told[1]:,} rejected", flush=True)


def photos_on_tiles(config: Config, of: Run, split: str, redo: bool = False) -> AnyPath:
    """The photos of a split, each on the tile of its place, for `evaluate.images: grafts`: their table with other images.

    Args:
        config: whose tiles they are, and whose run keeps them.
        of: the run with the photos and their city.

    Raises:
        InputError: as `run_step`, or a graft would be two images.
    """
    if config.tiles.layout == "two":
        raise InputError("evaluate.images is grafts and tiles.layout is two, but one image is asked about: set it to graft.")
    target = Run(config).grafted_photos / split
    photos = sources_fingerprint(*map(str, tables.table_files(of.photos, split)))
    made_from = {"photos": photos, "tiles": settings(config)["tiles"]}
    if is_done(target, made_from, redo):
        return target
    files, tiles = _sources(of.config.model_copy(update={"tiles": config.tiles}), of)
    work = ShardWork(partial(graft_photos_batch, *files, tiles, split), tables.PHOTOS, None, sources_fingerprint(*files))
    with resumable_dir(target, made_from, redo) as folder:
        told = _make(of, split, folder, work, f"graft-{Run(config).folder.name}-{split}")
    print(f"graft: {told[0]:,} photos of the split {split} on their tiles in {target}, {told[1]:,} rejected", flush=True)
    return target


def _sources(config: Config, run: Run) -> tuple[tuple[str | None, str | None], str]:
    """The files of streets and imagery, and the settings of tiles as JSON; a missing file is told before Ray is asked."""
    sources = resolve_city_files(config, run)
    if sources.city.streets and not run.roads.is_file():
        raise InputError(f"there is no {run.roads} to draw tiles from: run prepare again, with --redo.")
    files = (str(run.roads) if sources.city.streets else None, sources.tiles.imagery)
    Grafter(*files, sources.tiles)
    return files, sources.tiles.model_dump_json()


def _make(run: Run, split: str, folder: AnyPath, work: ShardWork, step: str) -> tuple[int, int]:
    """Graft a split of a run's photos; how many were written and rejected."""
    shards = plan_shards(run.photos, split, SHARD)
    total = sum(shard.rows for shard in shards)
    made = run_shards("graft", shards, folder, work)
    written = sum(summary["written"].get(split, 0) for summary in made)
    rejects = [reject for summary in made for reject in summary["rejects"]]
    file = run.rejects / f"{step}.parquet"
    write_parquet(pa.Table.from_pylist(rejects, schema=tables.REJECTS), file)
    if not written or len(rejects) > run.config.city.max_reject_share * total:
        invalidate_shards(folder, [summary for summary in made if summary["rejects"]])
        first = rejects[0]["reason"].rstrip(".") if rejects else f"there are no {split} photos"
        more = ", or raise city.max_reject_share" if written else ""
        raise InputError(
            f"{len(rejects)} of {total} photos have no graft (the first: {first}): mend tiles.imagery or city.streets for "
            f"the places listed in {file}{more}."
        )
    return written, len(rejects)


def main(argv: list[str] | None = None) -> None:
    args = common.job_parser(__doc__).parse_args(argv)
    config = common.load_config(args)
    common.connect()
    run_step(config, args.redo)


if __name__ == "__main__":
    common.run_main(main)
