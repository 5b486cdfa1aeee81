"""A gallery of vectors searched by actors that hold a part of it each; what they find is merged, so that it is exact.

Writes <run>/embeddings/<encoder>/<split>-index/NNNNN.faiss, one file a part. A gallery of one part stays in this process.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import faiss
import numpy as np
import ray

from addressvlm.baselines.index import Found, Index, merged
from addressvlm.run import is_done, writing
from addressvlm.stores import AnyPath
from ray_jobs.rivals.embed import Embedded

PART = 250_000  # photos
QUERIES = 4096  # at a time; FAISS goes through the gallery once for so many

Load = Callable[[], Index]


def index_files(gallery: Embedded, redo: bool = False) -> list[AnyPath]:
    """The index of a gallery, one file a part; made if it is not there.

    Raises:
        InputError: the one that is there is of other vectors.
    """
    folder = gallery.folder.with_name(f"{gallery.folder.name}-index")
    settings = {"encoder": gallery.encoder, "data": gallery.data, "photos": len(gallery.photos)}
    starts = range(0, len(gallery.photos), PART)
    if not is_done(folder, settings, redo):
        with writing(folder, settings) as partly:
            for number, start in enumerate(starts):
                Index(gallery.vectors[start : start + PART], gallery.encoder).save(partly / f"{number:05d}.faiss")
    return [folder / f"{number:05d}.faiss" for number in range(len(starts))]


def loads(files: Sequence[AnyPath], gallery: Embedded) -> list[Load]:
    """What loads each part of the index."""
    return [partial(Index.load, file, gallery.encoder, gallery.vectors.shape[1]) for file in files]


class Part:
    """Some parts of a gallery, in this process or in an actor."""

    def __init__(self, loads: Sequence[tuple[int, Load]], threads: int | None = None) -> None:
        """`loads`: position of each part's first photo, and what loads it; `threads`: default: FAISS's own choice."""
        if threads:
            faiss.omp_set_num_threads(threads)
        self.parts = [(first, load()) for first, load in loads]

    def ready(self) -> int:
        """How many photos it holds."""
        return sum(len(index) for _, index in self.parts)

    def search(self, queries: np.ndarray, k: int, farthest: bool) -> Found:
        """Positions are those of the whole gallery."""
        found = [(first, index.search(queries, k, farthest)) for first, index in self.parts]
        return merged([Found(part.similarity, part.position + first) for first, part in found], k, farthest)

    def best(self, queries: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
        """Over its photos; `group` is of the whole gallery."""
        found = [index.best(queries, group[first : first + len(index)], groups) for first, index in self.parts]
        return np.max(found, axis=0)


class Searcher:
    """The whole gallery. Close it, or leave the block, to let go of the actors."""

    def __init__(self, loads: Sequence[Load], part: int = PART) -> None:
        """`loads`: what loads each part; all but the last hold `part` photos."""
        numbered = [(number * part, load) for number, load in enumerate(loads)]
        self._here = Part(numbered) if len(loads) == 1 else None
        actors = 0 if self._here else min(len(loads), max(1, int(ray.cluster_resources().get("CPU", 1))))
        made = ray.remote(num_cpus=1)(Part)
        self._actors = [made.remote(numbered[number::actors], threads=1) for number in range(actors)]
        if self._actors:  # without them Ray is not needed
            ray.get([actor.ready.remote() for actor in self._actors])

    def __enter__(self) -> "Searcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def search(self, queries: np.ndarray, k: int, farthest: bool = False) -> Found:
        """See `Index.search`."""
        found = [merged(parts, k, farthest) for parts in self._asked("search", queries, k, farthest)]
        return Found(np.concatenate([f.similarity for f in found]), np.concatenate([f.position for f in found]))

    def best(self, queries: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
        """See `Index.best`."""
        given = group if self._here else ray.put(group)
        return np.concatenate([np.max(parts, axis=0) for parts in self._asked("best", queries, given, groups)])

    def _asked(self, what: str, queries: np.ndarray, *given: Any) -> Iterator[list[Any]]:
        """What all parts say to each batch of queries; the next batch is under way while one is merged."""
        batches = [queries[start : start + QUERIES] for start in range(0, max(len(queries), 1), QUERIES)]
        if self._here:
            yield from ([getattr(self._here, what)(batch, *given)] for batch in batches)
            return
        asked = []
        for batch in batches:
            sent = ray.put(batch)
            asked.append([getattr(actor, what).remote(sent, *given) for actor in self._actors])
            if len(asked) > 2:
                yield ray.get(asked.pop(0))
        for waiting in asked:
            yield ray.get(waiting)
