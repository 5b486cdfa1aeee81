"""Compare the Ray Data graft job with two plain processes: speed, and peak memory by number of photos.

    python benchmarks/graft_job.py
    python benchmarks/graft_job.py --photos 2000 20000 --rounds 3

Both read the same table of photos and write the same table of grafts, on two cores. Rounds alternate in changing order, and the
result is the median ratio. The plain processes graft half of the table each, without markers and without Ray. The time is that
of the step with Ray already running; the start of Ray is reported separately.
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
DISTINCT_PHOTOS = 200  # generated photos; the table repeats them with new ids
VIEWS = 4  # photos per place
SAMPLING_INTERVAL_S = 1.0
MB = 1 << 20


def write_photos(folder: Path, count: int, side: int) -> Config:
    """A run whose photos table has `count` photos of `side` x `side` pixels."""
    world, rng = generate(CITY_SEED), random.Random(CITY_SEED)
    paths = {key: folder / key for key in ("streets", "districts", "imagery")}
    write_maps(world, paths)
    places = list(street_places(world))
    photos = []
    for street, x, y in rng.sample(places, DISTINCT_PHOTOS // VIEWS):
        photos += [
            _camera_jpeg(photograph(world, x, y, heading, 1.0, side // 4), side, rng) for heading in view_headings(street, rng)
        ]

    def rows() -> Iterator[dict[str, Any]]:
        for n in range(count):
            street, x, y = places[n // VIEWS % len(places)]
            lon, lat = to_degrees(world, np.array([[x, y]]))[0]
            image = {"bytes": photos[n % DISTINCT_PHOTOS], "path": f"{n}.jpg"}
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


def _camera_jpeg(image: Image.Image, side: int, rng: random.Random) -> bytes:
    """JPEG bytes at this size, with noise, so that files are about as large as a camera's."""
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = np.random.default_rng(rng.randrange(1 << 32)).normal(0, 6, pixels.shape)
    return encode_jpeg(Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)), 88)


def run_job(config: Config) -> None:
    """Run the graft job like its command."""
    import ray

    from ray_jobs import graft

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    start = time.perf_counter()
    ray.init(address="local", num_cpus=CORES, logging_level="warning")
    ready = time.perf_counter()
    graft.run_step(config, redo=True)
    print(json.dumps({"ray_s": ready - start, "step_s": time.perf_counter() - ready}), flush=True)
    ray.shutdown()


def run_plain(config: Config, part: int, out: Path) -> None:
    """One of `CORES` plain processes: every such shard, `graft_batch`, a Parquet writer."""
    from ray_jobs.graft import COLUMNS, SHARD_ROWS

    run = Run(config)
    with pq.ParquetWriter(out / f"train-{part:05d}.parquet", tables.GRAFTS) as writer:
        for shard in plan_shards(run.photos, "train", SHARD_ROWS)[part::CORES]:
            for batch in shard.batches(COLUMNS):
                rows = graft_batch(str(run.roads), config.tiles.imagery, config.tiles.model_dump_json(), batch).tables["train"]
                writer.write_table(pa.Table.from_pylist(rows, schema=tables.GRAFTS))


@dataclass
class ResourceUsage:
    """Resources of some processes and their children: peak bytes by kind of process, CPU seconds by process."""

    peak: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    cpu_s: dict[int, float] = field(default_factory=dict)


@contextmanager
def monitor(processes: list[psutil.Process]) -> Iterator[ResourceUsage]:
    """Sample them once a second while the block runs; a sample costs a few hundredths of a second."""
    usage = ResourceUsage()
    stopped = threading.Event()

    def sample() -> None:
        while not stopped.wait(SAMPLING_INTERVAL_S):
            sizes: dict[str, int] = defaultdict(int)
            for process in processes:
                with suppress(psutil.Error):
                    for each in [process, *process.children(recursive=True)]:
                        with suppress(psutil.Error):
                            usage.cpu_s[each.pid] = sum(each.cpu_times()[:2])
                            sizes[_kind(each, process)] = max(sizes[_kind(each, process)], _private_bytes(each))
                            if each.name() == "raylet":
                                sizes["object store"] = each.memory_info().shared
            for kind, size in sizes.items():
                usage.peak[kind] = max(usage.peak[kind], size)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield usage
    stopped.set()
    thread.join()


def _kind(process: psutil.Process, root: psutil.Process) -> str:
    if process == root:
        return "driver"
    name = process.name()
    return "worker" if name.startswith(("ray::Map", "ray::IDLE")) else "Ray's own"


def _private_bytes(process: psutil.Process) -> int:
    """Resident memory without shared memory, such as the object store."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def time_job(command: list[str]) -> tuple[dict[str, float], ResourceUsage]:
    """One round of the job: its times and resources."""
    job = subprocess.Popen([*command, "--job"], stdout=subprocess.PIPE, text=True)
    with monitor([psutil.Process(job.pid)]) as usage:
        output, _ = job.communicate()
    if job.returncode:
        raise SystemExit("the job failed")
    return json.loads(output.splitlines()[-1]), usage


def time_plain(command: list[str], out: Path) -> tuple[float, ResourceUsage]:
    """One round of the plain processes: seconds and resources."""
    out.mkdir(exist_ok=True)
    start = time.perf_counter()
    processes = [subprocess.Popen([*command, "--plain", str(part), "--out", str(out)]) for part in range(CORES)]
    with monitor([psutil.Process(p.pid) for p in processes]) as usage:
        failed = [p.wait() for p in processes]
        seconds = time.perf_counter() - start
    if any(failed):
        raise SystemExit("a plain process failed")
    return seconds, usage


def compare(count: int, side: int, rounds: int) -> None:
    """Print the rounds, their median ratio and the peak memory for one number of photos."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = write_photos(folder, count, side)
        (folder / "settings.json").write_text(config.model_dump_json())
        ratios, largest = [], defaultdict(int)
        command, out = [sys.executable, __file__, "--settings", str(folder / "settings.json")], folder / "plain"
        for number in range(1, rounds + 1):
            if number % 2:
                (job, job_usage), (plain_s, plain_usage) = time_job(command), time_plain(command, out)
            else:
                (plain_s, plain_usage), (job, job_usage) = time_plain(command, out), time_job(command)
            assert tables.count_rows(Run(config).grafts, "train") == tables.count_rows(out, "train") == count
            ratios.append(plain_s / job["step_s"])
            for kind, size in [*job_usage.peak.items(), ("plain process", plain_usage.peak["driver"])]:
                largest[kind] = max(largest[kind], size)
            print(
                f"{count:,} photos, round {number}: job {job['step_s']:.1f} s (and {job['ray_s']:.1f} s to start Ray), "
                f"{CORES} plain processes {plain_s:.1f} s, ratio {ratios[-1]:.2f}; CPU time "
                f"{sum(job_usage.cpu_s.values()):.1f} s with Ray's start, {sum(plain_usage.cpu_s.values()):.1f} s",
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
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each (default: 2)")
    for inner in ("--settings", "--plain", "--out"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    if args.settings:
        config = Config.model_validate_json(Path(args.settings).read_text())
        if args.job:
            run_job(config)
        else:
            run_plain(config, int(args.plain), Path(args.out))
        return
    for count in args.photos:
        compare(count, args.photo_side, args.rounds)


if __name__ == "__main__":
    main()
