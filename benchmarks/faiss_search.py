"""What Ray adds to FAISS: the same exact search of a million vectors in one process and by actors, in turn.

    python benchmarks/faiss_search.py
    python benchmarks/faiss_search.py --photos 200000 --queries 256

In one process FAISS has all cores; of the actors each has one. Needs twice the memory of the vectors, 6 GB for a million.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

CORES = len(os.sched_getaffinity(0))
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # read when FAISS is loaded
os.environ |= dict.fromkeys(THREADS, str(CORES))

import faiss  # noqa: E402
import numpy as np  # noqa: E402
import ray  # noqa: E402

from addressvlm.baselines.retrieval import Neighbours, VectorIndex  # noqa: E402
from ray_jobs.baselines.retrieval import GallerySearch  # noqa: E402


def vectors(count: int, dimension: int, seed: int) -> np.ndarray:
    """Random unit vectors, float32 (count, dimension)."""
    made = np.random.default_rng(seed).standard_normal((count, dimension), dtype=np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return made


def part(count: int, dimension: int, seed: int) -> VectorIndex:
    """A part of the gallery."""
    return VectorIndex(vectors(count, dimension, seed), "random")


def bare(args: argparse.Namespace) -> faiss.IndexFlatIP:
    """The whole gallery as FAISS alone has it."""
    index = faiss.IndexFlatIP(args.dimension)
    for seed in range(args.photos // args.part):
        index.add(vectors(args.part, args.dimension, seed))
    return index


def seconds(search: Callable[[], object]) -> float:
    """Of one search."""
    begun = time.perf_counter()
    search()
    return time.perf_counter() - begun


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--part", type=int, default=250_000, help="photos that one index of the actors holds")
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    one = {"env_vars": dict.fromkeys(THREADS, "1")}
    ray.init(address="local", num_cpus=CORES, include_dashboard=False, logging_level="warning", runtime_env=one)
    index, queries = bare(args), vectors(args.queries, args.dimension, 10_000)
    loads = [partial(part, args.part, args.dimension, seed) for seed in range(args.photos // args.part)]
    with GallerySearch(loads, args.part) as search:
        alone, by_ray = Neighbours(*index.search(queries, args.k)), search.nearest(queries, args.k)
        same = float(np.mean(alone.position == by_ray.position))
        ways = {
            "FAISS, nearest": lambda: index.search(queries, args.k),
            "Ray, nearest": lambda: search.nearest(queries, args.k),
            "Ray, farthest": lambda: search.nearest(queries, args.k, farthest=True),
        }
        took: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(args.rounds):
            for name in list(ways) if number % 2 == 0 else reversed(list(ways)):
                took[name].append(seconds(ways[name]))
    print(f"{args.photos:,} vectors of {args.dimension}, {args.queries} queries, k = {args.k}, {CORES} cores, same: {same:.4f}")
    for name, times in took.items():
        print(f"{name:16} {statistics.median(times):7.2f} s  {args.queries / statistics.median(times):8.1f} queries/s")
    for name, over in (("Ray, nearest", "FAISS, nearest"), ("Ray, farthest", "Ray, nearest")):
        ratios = [b / a for a, b in zip(took[name], took[over], strict=True)]
        shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"throughput of '{name}' over '{over}': median {statistics.median(ratios):.3f} ({shown})")


if __name__ == "__main__":
    main()
