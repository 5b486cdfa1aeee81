#!/usr/bin/env python
"""What the map knows, as training rows: tiles of points along all streets, and photos to be matched with tiles.

    python ray_jobs/map_rows.py --config demo

Reads <run>/photos, writes <run>/map (tiles of places with and without photos, no photo in them) and <run>/matching (training
photos on tiles off their centre, half without names). `train.stages.<name>.data: [map, matching]` trains on them.
"""

from collections.abc import Collection
from functools import partial

import pyarrow as pa

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.config.train import Data
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.storage import tables
from addressvlm.storage.files import write_parquet
from addressvlm.storage.run_dir import WORK_DIR, Run, is_done, resumable_dir
from addressvlm.storage.shards import ShardWork, plan_shards, sources_fingerprint
from addressvlm.tiles.map_rows import POINTS, map_batch, matching_batch, street_points
from addressvlm.tiles.roads import Roads
from ray_jobs import common, graft
from ray_jobs.ray_data import run_shards

SHARD_ROWS = 256
KINDS: tuple[Data, ...] = ("map", "matching")
COLUMNS = ["id", "place", "lat", "lon", "image", "street", "main_street", "district"]


def run_step(config: Config, redo: bool = False, kinds: Collection[Data] = KINDS) -> None:
    """Make the tables of these kinds that are missing.

    Raises:
        InputError: there are no photos or no streets, or the tiles have another layout than graft.
    """
    run = Run(config)
    missing = [kind for kind in KINDS if kind in kinds and not is_done(getattr(run, kind), graft.settings(config), redo)]
    if not missing:
        return
    if config.tiles.layout != "graft":
        raise InputError(f"map rows are tiles and grafts, and tiles.layout is {config.tiles.layout}: set it to graft.")
    files, tiles = graft.sources(config, run)
    if files[0] is None:
        raise InputError("map rows come from the streets of the map: set city.streets.")
    gazetteer = (str(run.gazetteer), sources_fingerprint(str(run.gazetteer)))
    for kind in missing:
        batch, columns = (map_batch, None) if kind == "map" else (matching_batch, COLUMNS)
        function = partial(batch, *files, tiles, gazetteer, config.seed)
        work = ShardWork(function, tables.ALIGNMENT, columns, sources_fingerprint(*files) + gazetteer[1])
        with resumable_dir(getattr(run, kind), graft.settings(config), redo) as folder:
            source = run.photos
            if kind == "map":
                source = folder / WORK_DIR / "points"
                points = street_points(Roads(files[0]), Gazetteer.load(run.gazetteer), config.tiles.map_rows.spacing_m)
                tables.write_table(source, "train", points, POINTS, SHARD_ROWS)
            shards = plan_shards(source, "train", SHARD_ROWS)
            summaries = run_shards(kind, shards, folder, work, unit="tiles" if kind == "map" else "photos")
            rejects = [reject for summary in summaries for reject in summary["rejects"]]
            write_parquet(pa.Table.from_pylist(rejects, schema=tables.REJECTS), run.rejects / f"{kind}.parquet")
        written = sum(summary["written"].get("train", 0) for summary in summaries)
        print(f"map_rows: {written:,} rows in {getattr(run, kind)}, {len(rejects):,} rejected", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = common.job_parser(__doc__).parse_args(argv)
    config = common.load_config(args)
    common.connect()
    run_step(config, args.redo)


if __name__ == "__main__":
    common.run_main(main)
