"""The Ray Data grafting job against two bare processes with the same kernel: speed, and peak memory as photos grow.

    python benchmarks/graft_job.py
    python benchmarks/graft_job.py --photos 2000 20000 --rounds 3

Both read the same table of photos and write the same table of grafts, on two cores. They take turns, each goes first as often
as the other, and the median ratio counts. The bare processes have half of the table each, no marks, no Ray. What is compared
is the time from the step's beginning, with Ray there, to its end; the start of Ray is shown beside it.
"""

import argparse
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from addressvlm.config import Config, validate
from addressvlm.dataset.streets import StreetMap
from addressvlm.demo.camera import photograph
from addressvlm.demo.city import street_places, to_degrees, view_headings, write_maps
from addressvlm.demo.world import generate
from addressvlm.grafting import encode_jpeg
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.storage.shards import plan_shards
from addressvlm.tiles.graft_rows import graft_batch
from addressvlm.tiles.roads import write_roads

CITY_SEED = 1
CORES = 2
DISTINCT = 200  # photos that are drawn; the table has them again and again under new ids
VIEWS = 4  # photos of a place
LOOK_EVERY_S = 1.0
MB = 1 << 20


def write_photos(folder: Path, count: int, side: int) -> Config:
    """A run whose photos table has `count` photos of `side` x `side` pixels."""
    world, rng = generate(CITY_SEED), random.Random(CITY_SEED)
    paths = {key: folder / key for key in ("streets", "districts", "imagery")}
    write_maps(world, paths)
    spots = list(street_places(world))
    drawn = []
    for street, x, y in rng.sample(spots, DISTINCT // VIEWS):
        drawn += [
            _like_a_camera(photograph(world, x, y, heading, 1.0, side // 4), side, rng)
            for heading in view_headings(street, rng)
        ]

    def rows() -> Iterator[dict[str, Any]]:
        for n in range(count):
            street, x, y = spots[n // VIEWS % len(spots)]
            lon, lat = to_degrees(world, np.array([[x, y]]))[0]
            image = {"bytes": drawn[n % DISTINCT], "path": f"{n}.jpg"}
            yield {"id": str(n), "place": str(n // VIEWS), "lat": lat, "lon": lon, "heading": 90.0 * (n % VIEWS),
                   "image": image, "street": street.name, "main_street": street.name, "district": "Benchmark",
                   "rounds": []}  # fmt: skip

    tree = {
        "name": "benchmark",
        "storage": str(folder / "runs"),
        "city": {"manifest": "unused.csv", "streets": str(paths["streets"])},
        "tiles": {"imagery": str(paths["imagery"])},
    }
    config = validate(tree, "the benchmark's settings")
    run = Run(config)
    tables.write_table(run.photos, "train", rows(), tables.PHOTOS)
    write_roads(run.roads, StreetMap.load(paths["streets"], with_roads=True).roads, np.zeros(0), np.zeros(0))
    return config


def _like_a_camera(picture: Image.Image, side: int, rng: random.Random) -> bytes:
    """JPEG bytes of the picture at this size, with grain: files are about as large as a camera's."""
    pixels = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = np.random.default_rng(rng.randrange(1 << 32)).normal(0, 6, pixels.shape)
    return encode_jpeg(Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)), 88)


def run_job(config: Config) -> None:
    """The job, as its command does it."""
    import ray

    from ray_jobs import graft

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    started = time.perf_counter()
    ray.init(address="local", num_cpus=CORES, logging_level="warning")
    ready = time.perf_counter()
    graft.run_step(config, redo=True)
    print(json.dumps({"ray_s": ready - started, "step_s": time.perf_counter() - ready}), flush=True)
    ray.shutdown()


def run_bare(config: Config, part: int, out: Path) -> None:
    """One of `CORES` bare processes: every such shard, the kernel, a Parquet writer."""
    from ray_jobs.graft import COLUMNS, SHARD

    run = Run(config)
    with pq.ParquetWriter(out / f"train-{part:05d}.parquet", tables.GRAFTS) as writer:
        for shard in plan_shards(run.photos, "train", SHARD)[part::CORES]:
            for batch in shard.batches(COLUMNS):
                rows = graft_batch(str(run.roads), config.tiles.imagery, config.tiles.model_dump_json(), batch).tables["train"]
                writer.write_table(pa.Table.from_pylist(rows, schema=tables.GRAFTS))


@dataclass
class Use:
    """What some processes and all that they started used: peak bytes by kind of process, CPU seconds by process."""

    peak: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    cpu_s: dict[int, float] = field(default_factory=dict)


@contextmanager
def watched(processes: list[psutil.Process]) -> Iterator[Use]:
    """Look at them once a second while the block runs; a look takes some hundredths of a second from the cores."""
    use = Use()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_EVERY_S):
            now: dict[str, int] = defaultdict(int)
            for process in processes:
                with suppress(psutil.Error):
                    for each in [process, *process.children(recursive=True)]:
                        with suppress(psutil.Error):
                            use.cpu_s[each.pid] = sum(each.cpu_times()[:2])
                            now[_kind(each, process)] = max(now[_kind(each, process)], _own(each))
                            if each.name() == "raylet":
                                now["object store"] = each.memory_info().shared
            for kind, size in now.items():
                use.peak[kind] = max(use.peak[kind], size)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield use
    over.set()
    thread.join()


def _kind(process: psutil.Process, root: psutil.Process) -> str:
    if process == root:
        return "driver"
    name = process.name()
    return "worker" if name.startswith(("ray::Map", "ray::IDLE")) else "Ray's own"


def _own(process: psutil.Process) -> int:
    """Resident memory less what is shared, such as the object store."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def time_job(me: list[str]) -> tuple[dict[str, float], Use]:
    """One turn of the job: its times, what it used."""
    job = subprocess.Popen([*me, "--job"], stdout=subprocess.PIPE, text=True)
    with watched([psutil.Process(job.pid)]) as use:
        said, _ = job.communicate()
    if job.returncode:
        raise SystemExit("the job failed")
    return json.loads(said.splitlines()[-1]), use


def time_bare(me: list[str], out: Path) -> tuple[float, Use]:
    """One turn of the bare processes: seconds, what they used."""
    out.mkdir(exist_ok=True)
    started = time.perf_counter()
    bare = [subprocess.Popen([*me, "--bare", str(part), "--out", str(out)]) for part in range(CORES)]
    with watched([psutil.Process(p.pid) for p in bare]) as use:
        failed = [p.wait() for p in bare]
        seconds = time.perf_counter() - started
    if any(failed):
        raise SystemExit("a bare process failed")
    return seconds, use


def compare(count: int, side: int, rounds: int) -> None:
    """Print the turns, their median ratio and the largest memories for one number of photos."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = write_photos(folder, count, side)
        (folder / "settings.json").write_text(config.model_dump_json())
        ratios, largest = [], defaultdict(int)
        me, out = [sys.executable, __file__, "--settings", str(folder / "settings.json")], folder / "bare"
        for turn in range(1, rounds + 1):
            if turn % 2:
                (job, job_use), (bare, bare_use) = time_job(me), time_bare(me, out)
            else:
                (bare, bare_use), (job, job_use) = time_bare(me, out), time_job(me)
            assert tables.count_rows(Run(config).grafts, "train") == tables.count_rows(out, "train") == count
            ratios.append(bare / job["step_s"])
            for kind, size in [*job_use.peak.items(), ("bare process", bare_use.peak["driver"])]:
                largest[kind] = max(largest[kind], size)
            print(
                f"{count:,} photos, turn {turn}: job {job['step_s']:.1f} s (and {job['ray_s']:.1f} s to start Ray), "
                f"{CORES} bare processes {bare:.1f} s, ratio {ratios[-1]:.2f}; of CPU {sum(job_use.cpu_s.values()):.1f} s "
                f"with Ray's start, {sum(bare_use.cpu_s.values()):.1f} s",
                flush=True,
            )
        memory = ", ".join(f"{kind} {largest[kind] / MB:,.0f} MB" for kind in sorted(largest))
        rate = count / job["step_s"]
        print(f"{count:,} photos: ratio {statistics.median(ratios):.2f}, {rate:.0f} photos/s; peak {memory}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, nargs="+", default=[2000, 20000], help="(default: 2000 20000)")
    parser.add_argument("--photo-side", type=int, default=640, help="of the square photos, in pixels (default: 640)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each (default: 2)")
    for inner in ("--settings", "--bare", "--out"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    if args.settings:
        config = Config.model_validate_json(Path(args.settings).read_text())
        if args.job:
            run_job(config)
        else:
            run_bare(config, int(args.bare), Path(args.out))
        return
    for count in args.photos:
        compare(count, args.photo_side, args.rounds)


if __name__ == "__main__":
    main()
