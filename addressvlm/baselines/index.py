"""Photos by the likeness of their vectors: exact search with FAISS, nearest and farthest.

Vectors have length 1, so that the inner product orders photos as their distance does. What is farthest from a query is
what is nearest to its opposite: both searches go through the same numbers at the same cost.

Besides the farthest there are two other ways to take photos that are unlike a query (`dissimilar` of paper 004):

- random: any photos, drawn by seed and query;
- centroid: the gallery is put into clusters (spherical k-means); each is stood for by the photo nearest to its centroid, and
  those of the clusters least like the query are taken. The farthest photos of nearly all queries are the same few odd ones;
  these are ordinary photos of other kinds of places.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from addressvlm.errors import InputError
from addressvlm.files import fetched, whole
from addressvlm.stores import AnyPath

CLUSTERS_EACH = 4  # clusters for each photo that the strategy `centroid` is asked for
BLOCK = 1 << 24  # similarities that are in memory at a time, 64 MB


@dataclass(frozen=True)
class Found:
    """Photos of a gallery for each of N queries.

    Attributes:
        similarity: cosines, float32 (N, k); the first is the most similar of the nearest, the least similar of the farthest.
        position: of the photos in the gallery, int64 (N, k).
    """

    similarity: np.ndarray
    position: np.ndarray


class Index:
    """A gallery, or a part of one, in memory.

    Attributes:
        encoder: what made the vectors, as `addressvlm.run` settings name it.
    """

    def __init__(self, vectors: np.ndarray, encoder: str) -> None:
        """`vectors`: of length 1, float32 (N, D)."""
        self.encoder = encoder
        self._flat: Any = faiss.IndexFlatIP(vectors.shape[1])
        self._flat.add(np.ascontiguousarray(vectors, dtype=np.float32))

    def __len__(self) -> int:
        return int(self._flat.ntotal)

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        return int(self._flat.d)

    @property
    def vectors(self) -> np.ndarray:
        """What it was made of, float32 (N, D); not a copy."""
        return faiss.rev_swig_ptr(self._flat.get_xb(), len(self) * self.dimension).reshape(len(self), self.dimension)

    def search(self, queries: np.ndarray, k: int, farthest: bool = False) -> Found:
        """The k nearest photos of each query, or the k farthest; all there are if they are fewer.

        Args:
            queries: float32 (N, D).

        Raises:
            InputError: the queries have another dimension.
        """
        self._fits(queries)
        sign = np.float32(-1 if farthest else 1)
        similarity, position = self._flat.search(np.ascontiguousarray(sign * queries), min(k, len(self)))
        return Found(sign * similarity, position)

    def best(self, queries: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
        """The similarity of the most similar photo of each group, float32 (N, groups); -inf where a group has none.

        Args:
            group: number of each photo's group, int (photos,); -1 for none.

        Raises:
            InputError: the queries have another dimension.
        """
        self._fits(queries)
        order = np.argsort(group, kind="stable")
        order = order[group[order] >= 0]
        found = np.full((len(queries), groups), -np.inf, dtype=np.float32)
        if len(order):
            there, starts = np.unique(group[order], return_index=True)
            rows = max(1, BLOCK // len(self))
            for start in range(0, len(queries), rows):
                like = queries[start : start + rows] @ self.vectors.T
                found[start : start + rows, there] = np.maximum.reduceat(like[:, order], starts, axis=1)
        return found

    def save(self, file: AnyPath) -> None:
        """Write as a FAISS index, and its encoder and dimension beside it, last."""
        with whole(file) as path:
            faiss.write_index(self._flat, str(path))
        with whole(_about(file)) as path:
            path.write_text(json.dumps({"encoder": self.encoder, "dimension": self.dimension, "photos": len(self)}))

    @classmethod
    def load(cls, file: AnyPath, encoder: str, dimension: int) -> "Index":
        """Read what `save` wrote.

        Raises:
            InputError: it is not there or no index, or was made by another encoder or with another dimension.
        """
        try:
            about = json.loads(_about(file).read_text(encoding="utf-8"))
            if (about["encoder"], about["dimension"]) != (encoder, dimension):
                raise InputError(
                    f"{file} was made by the encoder {about['encoder']} with {about['dimension']} numbers a photo, and "
                    f"{encoder} with {dimension} is asked for: make the index again with --redo."
                )
            flat = faiss.read_index(str(fetched(file)))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            said = " ".join(str(error).split())[:200]
            raise InputError(f"{file} can't be read as an index ({said}): make it again with --redo.") from None
        made = cls.__new__(cls)
        made.encoder, made._flat = encoder, flat
        return made

    def _fits(self, queries: np.ndarray) -> None:
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise InputError(
                f"queries of {queries.shape[-1]} numbers don't fit an index of {self.dimension}: use the encoder that made it "
                f"({self.encoder})."
            )


def merged(parts: Sequence[Found], k: int, farthest: bool = False) -> Found:
    """What several parts of a gallery found as one; of equally similar photos the first in the gallery comes first."""
    similarity = np.concatenate([part.similarity for part in parts], axis=1)
    position = np.concatenate([part.position for part in parts], axis=1)
    order = np.lexsort((position, similarity if farthest else -similarity))[:, :k]
    return Found(np.take_along_axis(similarity, order, 1), np.take_along_axis(position, order, 1))


def drawn(ids: Sequence[str], gallery: int, k: int, seed: int) -> np.ndarray:
    """Positions of any photos for each query, int64 (queries, k), the same for the same id whatever the others."""
    k = min(k, gallery)
    rngs = [np.random.default_rng([seed, zlib.crc32(i.encode())]) for i in ids]
    return np.array([rng.choice(gallery, k, replace=False) for rng in rngs], dtype=np.int64).reshape(len(ids), k)


def typical(vectors: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Positions of the photos that stand for the clusters of a gallery, int64 (clusters,), each once.

    Args:
        k: photos that a query will take of them.
    """
    clusters = min(len(vectors), CLUSTERS_EACH * k)
    if not clusters:
        return np.zeros(0, dtype=np.int64)
    means: Any = faiss.Kmeans(vectors.shape[1], clusters, seed=seed, spherical=True, min_points_per_centroid=1)
    means.train(np.ascontiguousarray(vectors))
    return np.unique(Index(vectors, "centroids").search(means.centroids, 1).position)


def _about(file: AnyPath) -> AnyPath:
    return file.with_name(f"{Path(file.name).stem}.json")
