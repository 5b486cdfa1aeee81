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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import ArrayLike, NDArray

from addressvlm.config.city import CityConfig
from addressvlm.dataset.geocoding import annotate_coordinates
from addressvlm.dataset.streets import StreetMap
from addressvlm.errors import InputError
from addressvlm.evaluation.metrics import Interval, share_ci
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.storage.files import atomic_write, local_copy
from addressvlm.storage.remote_path import AnyPath

CLUSTERS_EACH = 4  # clusters for each photo that the strategy `centroid` is asked for
BLOCK = 1 << 24  # similarities that are in memory at a time, 64 MB


@dataclass(frozen=True)
class Neighbours:
    """Photos of a gallery for each of N queries.

    Attributes:
        similarity: cosines, float32 (N, k); the first is the most similar of the nearest, the least similar of the farthest.
        position: of the photos in the gallery, int64 (N, k).
    """

    similarity: np.ndarray
    position: np.ndarray


class VectorIndex:
    """A gallery, or a part of one, in memory.

    Attributes:
        encoder: what made the vectors, as `addressvlm.storage.run_dir` settings name it.
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

    def search(self, queries: np.ndarray, k: int, farthest: bool = False) -> Neighbours:
        """The k nearest photos of each query, or the k farthest; all there are if they are fewer.

        Args:
            queries: float32 (N, D).

        Raises:
            InputError: the queries have another dimension.
        """
        self._fits(queries)
        sign = np.float32(-1 if farthest else 1)
        similarity, position = self._flat.search(np.ascontiguousarray(sign * queries), min(k, len(self)))
        return Neighbours(sign * similarity, position)

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
        with atomic_write(file) as path:
            faiss.write_index(self._flat, str(path))
        with atomic_write(_about(file)) as path:
            path.write_text(json.dumps({"encoder": self.encoder, "dimension": self.dimension, "photos": len(self)}))

    @classmethod
    def load(cls, file: AnyPath, encoder: str, dimension: int) -> "VectorIndex":
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
            flat = faiss.read_index(str(local_copy(file)))
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


def merge_neighbours(parts: Sequence[Neighbours], k: int, farthest: bool = False) -> Neighbours:
    """What several parts of a gallery found as one; of equally similar photos the first in the gallery comes first."""
    similarity = np.concatenate([part.similarity for part in parts], axis=1)
    position = np.concatenate([part.position for part in parts], axis=1)
    order = np.lexsort((position, similarity if farthest else -similarity))[:, :k]
    return Neighbours(np.take_along_axis(similarity, order, 1), np.take_along_axis(position, order, 1))


def random_neighbours(ids: Sequence[str], gallery: int, k: int, seed: int) -> np.ndarray:
    """Positions of any photos for each query, int64 (queries, k), the same for the same id whatever the others."""
    k = min(k, gallery)
    rngs = [np.random.default_rng([seed, zlib.crc32(i.encode())]) for i in ids]
    return np.array([rng.choice(gallery, k, replace=False) for rng in rngs], dtype=np.int64).reshape(len(ids), k)


def cluster_representatives(vectors: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Positions of the photos that stand for the clusters of a gallery, int64 (clusters,), each once.

    Args:
        k: photos that a query will take of them.
    """
    clusters = min(len(vectors), CLUSTERS_EACH * k)
    if not clusters:
        return np.zeros(0, dtype=np.int64)
    means: Any = faiss.Kmeans(vectors.shape[1], clusters, seed=seed, spherical=True, min_points_per_centroid=1)
    means.train(np.ascontiguousarray(vectors))
    return np.unique(VectorIndex(vectors, "centroids").search(means.centroids, 1).position)


def _about(file: AnyPath) -> AnyPath:
    return file.with_name(f"{Path(file.name).stem}.json")


EARTH_M = 6_371_008.8  # mean radius
RADII_M = (25, 50, 100, 500, 1e3, 25e3, 200e3, 750e3, 2500e3)  # within a city; street, city, region, country, continent (004)
TEMPERATURE = 0.01  # of similarities, that of CLIP's training; what is fitted on the split `val` comes on top of it
UNSEEN = -1.01  # similarity of an address without a training photo: less than any photo has
BEHIND = 1e-6  # by how much what has no vote is behind what has one

Row = Mapping[str, Any]


class Geocoder:
    """Reverse geocoding by the city's own map; where it has none, or nothing is near, by the nearest photo's address."""

    def __init__(self, streets: StreetMap, limit_m: float, photos: Sequence[Row]) -> None:
        """`limit_m`: how far a street may be; `photos`: with lat, lon, street and district, at least one."""
        self._streets, self._limit_m = streets, limit_m
        self._lat, self._lon = (np.array([photo[key] for photo in photos], dtype=np.float64) for key in ("lat", "lon"))
        self._own = [Address(photo["street"], photo["district"]) for photo in photos]

    def addresses(self, lat: ArrayLike, lon: ArrayLike) -> list[Address]:
        """The address of each of N points in degrees; it may be one that the gazetteer lacks."""
        lat, lon = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
        found = self.by_map(lat, lon)
        return [
            address or self._own[int(np.argmin(distance_m(y, x, self._lat, self._lon)))]
            for address, y, x in zip(found, lat.tolist(), lon.tolist(), strict=True)
        ]

    def by_map(self, lat: ArrayLike, lon: ArrayLike) -> list[Address | None]:
        """What the map alone says, None where it has no street or district."""
        lat, lon = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
        found: list[Address | None] = [None] * len(lat)
        if self._streets.bounds is None or not (self._streets.street_names and self._streets.district_names):
            return found
        west, south, east, north = self._streets.bounds
        near = np.flatnonzero((lat > south - 1) & (lat < north + 1) & (lon > west - 1) & (lon < east + 1))
        there = annotate_coordinates(lat[near], lon[near], self._streets, self._limit_m)
        for i, street, district in zip(near.tolist(), there.street.tolist(), there.district.tolist(), strict=True):
            if street >= 0 and district >= 0:
                found[i] = Address(self._streets.street_names[street], self._streets.district_names[district])
        return found

    def of_photos(self, gazetteer: Gazetteer) -> NDArray[np.int64]:
        """Number of the address of each photo's coordinates in the gazetteer, (photos,); of its own where the gazetteer lacks
        that one, -1 where it lacks both."""
        number = {address: i for i, address in enumerate(gazetteer.addresses)}
        found = self.by_map(self._lat, self._lon)
        own = zip(found, self._own, strict=True)
        return np.array([number.get(a, number.get(b, -1)) if a else number.get(b, -1) for a, b in own], dtype=np.int64)


def street_map(city: CityConfig, gazetteer: Gazetteer) -> StreetMap:
    """The map that a city's photos had their addresses from; without one a map that knows nothing.

    Where addresses name sub-streets it is made of the gazetteer's shapes.

    Raises:
        InputError: a file is missing or damaged.
    """
    if city.answer == "sub_street":
        shapes = gazetteer.geometry
        return StreetMap(list(shapes), list(shapes.values()), list(gazetteer.district_geometry.items()))
    return StreetMap.load(
        city.streets, city.districts, district_source=city.district_source, admin_level=city.admin_level,
        language=city.language, unit=city.unit,
    )  # fmt: skip


def nearest_address_scores(nearest: Neighbours, address: NDArray[np.int64], best: np.ndarray) -> np.ndarray:
    """ln p of every address up to a constant, float64 (queries, addresses), all finite.

    Each of the k nearest photos votes with its similarity. Addresses with votes come first, by the logarithm of what they
    got. Those without follow by the similarity s of their most similar photo, as far behind the least vote as exp(s / 0.01)
    is behind that of the k-th photo. With k = 1 all of it is the softmax of s / 0.01 over the addresses.

    Args:
        nearest: the k nearest photos of each query.
        address: number of the address of each photo of the gallery; -1 has no vote.
        best: similarity of the most similar photo of each address, (queries, addresses); -inf where there is none.
    """
    like = np.maximum(np.where(np.isfinite(best), best, UNSEEN), UNSEEN).astype(np.float64)
    found = address[nearest.position]
    weight = np.maximum((1 + nearest.similarity.astype(np.float64)) / 2, 1e-6)
    votes = np.zeros_like(like)
    for column in range(found.shape[1]):
        rows = np.flatnonzero(found[:, column] >= 0)
        np.add.at(votes, (rows, found[rows, column]), weight[rows, column])
    least = np.min(np.where(votes > 0, votes, np.inf), axis=1, initial=np.inf)
    least = np.where(np.isfinite(least), least, 1.0)[:, None]
    last = nearest.similarity[:, -1:].astype(np.float64)
    behind = np.log(least) + np.minimum((like - last) / TEMPERATURE, 0) - BEHIND
    return np.where(votes > 0, np.log(np.where(votes > 0, votes, 1.0)), behind)


def vote_address(nearest: Neighbours, address: NDArray[np.int64], winner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of the nearest photo that voted for each query's winner, (queries,); of the nearest at all where none did."""
    voted = address[nearest.position] == winner[:, None]
    return np.take_along_axis(nearest.position, np.argmax(voted, axis=1)[:, None], 1)[:, 0]


def distance_m(lat: ArrayLike, lon: ArrayLike, other_lat: ArrayLike, other_lon: ArrayLike) -> NDArray[np.float64]:
    """Metres along the sphere between points in degrees, by the haversine; shapes as numpy broadcasts them."""
    a, b, c, d = (np.radians(np.asarray(value, dtype=np.float64)) for value in (lat, lon, other_lat, other_lon))
    half = np.sin((c - a) / 2) ** 2 + np.cos(a) * np.cos(c) * np.sin((d - b) / 2) ** 2
    return 2 * EARTH_M * np.arcsin(np.sqrt(np.minimum(half, 1.0)))


def share_within(
    photos: Sequence[Row], coordinates: Mapping[str, tuple[float, float]], resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Share of photos that are put within each of RADII_M of where they were taken, as `25 m` or `200 km`.

    Args:
        photos: with id, place, lat and lon; those whose own coordinates are unknown are left out.
        coordinates: id -> latitude and longitude in degrees; a photo without counts as too far.
    """
    known = [photo for photo in photos if has_coordinates(photo)]
    off = np.array(
        [
            float(distance_m(photo["lat"], photo["lon"], *coordinates[photo["id"]])) if photo["id"] in coordinates else np.inf
            for photo in known
        ]
    )
    places = [photo["place"] for photo in known]
    return {_shown(radius): share_ci(off <= radius, places, resamples, seed) for radius in RADII_M}


def has_coordinates(photo: Row) -> bool:
    """Whether it is known where a photo was taken."""
    lat, lon = photo["lat"], photo["lon"]
    return lat is not None and lon is not None and bool(np.isfinite(lat) and np.isfinite(lon))


def _shown(radius_m: float) -> str:
    return f"{radius_m:g} m" if radius_m < 1000 else f"{radius_m / 1000:g} km"
