#!/usr/bin/env python
"""Time and peak memory of every step of prepare on a city's table, at ten million photos; no picture is read.

    python benchmarks/metadata.py streets.geojson districts.geojson --rows 10000000
    python benchmarks/metadata.py --photos data/photos        # only reading and checking pictures

A manifest (Parquet; id, file, place, coordinates along the streets of the file, heading) is written by seed, then read, given
addresses, split with its buffer, and written as prepare does it: the steps of its driver in order, and on `--sample` rows the
work of its workers. Each line has wall and CPU seconds, memory after the step and the peak so far.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from addressvlm.config.city import CityConfig
from addressvlm.dataset import readers
from addressvlm.dataset.build import (
    LISTING_SCHEMA,
    SPLITS,
    add_conversations,
    answer_places,
    build_gazetteer,
    check_photos,
    listing_rows,
)
from addressvlm.dataset.geocoding import assign_addresses
from addressvlm.dataset.readers.base import list_photos
from addressvlm.dataset.split import split_places, thin_views
from addressvlm.dataset.streets import StreetMap
from addressvlm.storage import tables
from addressvlm.storage.shards import plan_shards, sources_fingerprint
from benchmarks.annotation import sample_points
from ray_jobs.prepare import CHECK_SHARD

VIEWS = 9  # photos of a place, as in SF-IAL-Large (paper 002, Table 1: 1.96 million of 233,820)
CHUNK_ROWS = 1 << 18
MIB = 1 << 20


@contextmanager
def step(name: str, rows: int) -> Iterator[None]:
    """Print the cost of the block."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    now = psutil.Process().memory_info().rss / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{name:28} {wall:8.1f} s {cpu:8.1f} s CPU {1e6 * cpu / rows:8.2f} us/row {now:8,.0f} MiB, peak {peak:8,.0f}",
        flush=True,
    )


def write_manifest(path: Path, maps: tuple[str, str], rows: int, seed: int) -> None:
    """A drive along all streets inside the districts: `VIEWS` photos a place."""
    streets, places = StreetMap.load(*maps), -(-rows // VIEWS)
    lat, lon = sample_points(streets, 2 * places, seed)
    inside = np.flatnonzero(streets.district_codes(lat, lon) >= 0)
    inside = np.sort(np.random.default_rng(seed).choice(inside, places, replace=False))
    lat, lon = lat[inside], lon[inside]
    schema = pa.schema([("id", pa.string()), ("file", pa.string()), ("place", pa.string()), ("lat", pa.float64()),
                        ("lon", pa.float64()), ("heading", pa.float64())])  # fmt: skip
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, CHUNK_ROWS):
            n = np.arange(start, min(start + CHUNK_ROWS, rows))
            place, view = n // VIEWS, n % VIEWS
            ids = [f"{p:08d}_{v}" for p, v in zip(place.tolist(), view.tolist(), strict=True)]
            columns = [ids, [f"{i[:4]}/{i}.jpg" for i in ids], [i[:8] for i in ids], lat[place], lon[place], 40.0 * view]
            writer.write_table(pa.table(columns, schema=schema))


def measure(city: CityConfig, rows: int, sample: int, folder: Path) -> None:
    """All steps in turn."""
    with step("table read", rows):
        photos, rejects = readers.read(city)
    with step("streets read", rows):
        streets = StreetMap.load(city.streets, city.districts, with_roads=True)
    with step("addresses", rows):
        places, photos, without = assign_addresses(photos, streets, city)
        answers = answer_places(places, city)
    with step("list for the workers written", rows):
        tables.write_table(folder / "listed", "photos", listing_rows(photos, places, answers), LISTING_SCHEMA, CHECK_SHARD)
    with step("split with its buffer", rows):
        split = split_places([answers[p] for p in sorted({photo.place for photo in photos})], city, seed=0)
    with step("views thinned, gazetteer", rows):
        photos = thin_views(photos, split.part, city.density.views, 0)
        train = [photo for photo in photos if split.part[photo.place] == "train"]
        gazetteer = build_gazetteer(city, streets, answers, train)
        gazetteer.save(folder / "gazetteer.geojson")
    with step("split of every photo", rows):
        position = {part: number for number, part in enumerate(SPLITS)}
        parts = np.array([position.get(split.part[photo.place], -1) for photo in photos], dtype=np.int8)
    counts = ", ".join(f"{part} {split.count(part):,}" for part in ("train", "val", "test", "aside"))
    print(f"{len(photos):,} photos of {len(places):,} places: {counts}; {len(rejects) + len(without):,} rejected", flush=True)
    done, names = 0, (str(folder / "gazetteer.geojson"), sources_fingerprint(str(folder / "gazetteer.geojson")))
    shards = plan_shards(folder / "listed", "photos", CHECK_SHARD)[: -(-sample // CHECK_SHARD)]
    add_conversations(parts, names, city.model_dump_json(), 0, next(shards[0].batches()))  # loads the gazetteer
    with step(f"questions of {sample:,} rows", sample):
        for shard in shards:
            for batch in shard.batches():
                done += sum(
                    len(rows) for rows in add_conversations(parts, names, city.model_dump_json(), 0, batch).tables.values()
                )


def time_photo_checks(folder: str, count: int) -> None:
    """Time what a worker of prepare does with each photo."""
    files = list_photos(folder)[:count]
    rows = [{"file": file, "row": n, "id": file, "view": None} for n, file in enumerate(files, start=1)]
    with step(f"{len(rows):,} photos checked", len(rows)):
        result = check_photos(folder, CityConfig(photos=folder).model_dump_json(), rows)
    print(f"{len(result.rejects):,} rejected", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("streets", nargs="?", help="file of named lines, as city.streets")
    parser.add_argument("districts", nargs="?", help="file of named polygons, as city.districts")
    parser.add_argument("--photos", metavar="FOLDER", help="check photos of this folder instead")
    parser.add_argument("--rows", type=int, default=1_000_000, help="photos (default: 1,000,000)")
    parser.add_argument("--sample", type=int, default=20_000, help="rows that get questions (default: 20,000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.photos:
        time_photo_checks(args.photos, args.sample)
        return
    if not args.districts:
        parser.error("give streets and districts, or --photos")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifest = folder / "photos.parquet"
        arguments = (manifest, (args.streets, args.districts), args.rows, args.seed)
        writer = multiprocessing.get_context("spawn").Process(target=write_manifest, args=arguments)  # its memory is its own
        writer.start()
        writer.join()
        print(f"{args.rows:,} rows, {manifest.stat().st_size / MIB:,.0f} MiB", flush=True)
        city = CityConfig(manifest=str(manifest), streets=args.streets, districts=args.districts)
        measure(city, args.rows, args.sample, folder)


if __name__ == "__main__":
    main()
