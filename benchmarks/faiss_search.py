"""Measure the overhead of Ray over FAISS: the same exact search of a million vectors in one process and by actors.

    python benchmarks/faiss_search.py
    python benchmarks/faiss_search.py --photos 200000 --queries 256

In one process FAISS uses all cores; each actor uses one. Needs twice the memory of the vectors, 6 GB for a million.
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
    unit = np.random.default_rng(seed).standard_normal((count, dimension), dtype=np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return unit


def gallery_part(count: int, dimension: int, seed: int) -> VectorIndex:
    """A part of the gallery."""
    return VectorIndex(vectors(count, dimension, seed), "random")


def full_index(args: argparse.Namespace) -> faiss.IndexFlatIP:
    """The full gallery in one FAISS index."""
    index = faiss.IndexFlatIP(args.dimension)
    for seed in range(args.photos // args.part):
        index.add(vectors(args.part, args.dimension, seed))
    return index


def seconds(search: Callable[[], object]) -> float:
    """Wall time of one search."""
    start = time.perf_counter()
    search()
    return time.perf_counter() - start


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--part", type=int, default=250_000, help="photos per actor")
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    one_thread = {"env_vars": dict.fromkeys(THREADS, "1")}
    ray.init(address="local", num_cpus=CORES, include_dashboard=False, logging_level="warning", runtime_env=one_thread)
    index, queries = full_index(args), vectors(args.queries, args.dimension, 10_000)
    loads = [partial(gallery_part, args.part, args.dimension, seed) for seed in range(args.photos // args.part)]
    with GallerySearch(loads, args.part) as search:
        alone, by_ray = Neighbours(*index.search(queries, args.k)), search.nearest(queries, args.k)
        agreement = float(np.mean(alone.position == by_ray.position))
        searches = {
            "FAISS, nearest": lambda: index.search(queries, args.k),
            "Ray, nearest": lambda: search.nearest(queries, args.k),
            "Ray, farthest": lambda: search.nearest(queries, args.k, farthest=True),
        }
        times_of: dict[str, list[float]] = {name: [] for name in searches}
        for number in range(args.rounds):
            for name in list(searches) if number % 2 == 0 else reversed(list(searches)):
                times_of[name].append(seconds(searches[name]))
    print(
        f"{args.photos:,} vectors of {args.dimension}, {args.queries} queries, k = {args.k}, {CORES} cores; "
        f"agreement {agreement:.4f}"
    )
    for name, times in times_of.items():
        print(f"{name:16} {statistics.median(times):7.2f} s  {args.queries / statistics.median(times):8.1f} queries/s")
    for name, over in (("Ray, nearest", "FAISS, nearest"), ("Ray, farthest", "Ray, nearest")):
        ratios = [b / a for a, b in zip(times_of[name], times_of[over], strict=True)]
        rounds = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"throughput of '{name}' over '{over}': median {statistics.median(ratios):.3f} ({rounds})")


if __name__ == "__main__":
    main()
