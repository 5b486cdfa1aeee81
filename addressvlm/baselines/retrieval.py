"""Retrieval of similar photos: exact search with FAISS, reverse geocoding of the results, and scores of addresses (paper 004).

Vectors have length 1, so that the inner product orders photos as their distance does. The farthest photos from a query are
the nearest to its negative: both searches cost the same. There are two other ways to choose dissimilar photos (paper 004):

- random: any photos, drawn by seed and query;
- centroid: the gallery is clustered (spherical k-means), and a cluster is represented by the photo nearest to its centroid;
  the clusters least similar to the query are taken. The farthest photos of nearly all queries are the same few outliers; these
  are ordinary photos of other kinds of places.
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

CLUSTERS_PER_PHOTO = 4  # of each photo that the strategy `centroid` chooses
BLOCK = 1 << 24  # similarities in memory at a time, 64 MB


@dataclass(frozen=True)
class Neighbours:
    """Photos of a gallery for each of N queries.

    Attributes:
        similarity: cosines, float32 (N, k), descending for the nearest, ascending for the farthest.
        position: of the photos in the gallery, int64 (N, k).
    """

    similarity: np.ndarray
    position: np.ndarray


class VectorIndex:
    """A gallery, or a part of one, in memory.

    Args:
        vectors: of length 1, float32 (N, D).
        encoder: of the vectors, as named in the settings of a run's step.
    """

    def __init__(self, vectors: np.ndarray, encoder: str) -> None:
        self.encoder = encoder
        self._flat: Any = faiss.IndexFlatIP(vectors.shape[1])
        self._flat.add(np.ascontiguousarray(vectors, dtype=np.float32))

    def __len__(self) -> int:
        return int(self._flat.ntotal)

    @property
    def dimension(self) -> int:
        """Of a vector, D."""
        return int(self._flat.d)

    @property
    def vectors(self) -> np.ndarray:
        """The gallery's vectors, float32 (N, D); not a copy."""
        return faiss.rev_swig_ptr(self._flat.get_xb(), len(self) * self.dimension).reshape(len(self), self.dimension)

    def search(self, queries: np.ndarray, k: int, farthest: bool = False) -> Neighbours:
        """The k nearest photos of each query, float32 (N, D), or the k farthest; all photos if they are fewer."""
        self._check_dimension(queries)
        sign = np.float32(-1 if farthest else 1)
        similarity, position = self._flat.search(np.ascontiguousarray(sign * queries), min(k, len(self)))
        return Neighbours(sign * similarity, position)

    def best(self, queries: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
        """The similarity of the most similar photo of each group, float32 (N, groups); -inf where a group has none.

        Args:
            group: index of each photo's group, int (photos,); -1 for none.
        """
        self._check_dimension(queries)
        order = np.argsort(group, kind="stable")
        order = order[group[order] >= 0]
        best = np.full((len(queries), groups), -np.inf, dtype=np.float32)
        if len(order):
            present, starts = np.unique(group[order], return_index=True)
            rows = max(1, BLOCK // len(self))
            for start in range(0, len(queries), rows):
                similarity = queries[start : start + rows] @ self.vectors.T
                best[start : start + rows, present] = np.maximum.reduceat(similarity[:, order], starts, axis=1)
        return best

    def save(self, file: AnyPath) -> None:
        """Write a FAISS index and, last, a JSON file with its encoder and dimension."""
        with atomic_write(file) as path:
            faiss.write_index(self._flat, str(path))
        with atomic_write(_settings_file(file)) as path:
            path.write_text(json.dumps({"encoder": self.encoder, "dimension": self.dimension, "photos": len(self)}))

    @classmethod
    def load(cls, file: AnyPath, encoder: str, dimension: int) -> "VectorIndex":
        """Read what `save` wrote.

        Raises:
            InputError: it is missing or not an index, or has another encoder or dimension.
        """
        try:
            settings = json.loads(_settings_file(file).read_text(encoding="utf-8"))
            if (settings["encoder"], settings["dimension"]) != (encoder, dimension):
                raise InputError(
                    f"{file} was made by the encoder {settings['encoder']} with {settings['dimension']} numbers a photo, but "
                    f"{encoder} with {dimension} is needed: make the index again with --redo."
                )
            flat = faiss.read_index(str(local_copy(file)))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{file} can't be read as an index ({reason}): make it again with --redo.") from None
        index = cls.__new__(cls)
        index.encoder, index._flat = encoder, flat
        return index

    def _check_dimension(self, queries: np.ndarray) -> None:
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise InputError(
                f"queries of {queries.shape[-1]} numbers don't fit an index of {self.dimension}: use the encoder that made it "
                f"({self.encoder})."
            )


def merge_neighbours(parts: Sequence[Neighbours], k: int, farthest: bool = False) -> Neighbours:
    """Search results of several parts of a gallery as one; equally similar photos in the gallery's order."""
    similarity = np.concatenate([part.similarity for part in parts], axis=1)
    position = np.concatenate([part.position for part in parts], axis=1)
    order = np.lexsort((position, similarity if farthest else -similarity))[:, :k]
    return Neighbours(np.take_along_axis(similarity, order, 1), np.take_along_axis(position, order, 1))


def random_neighbours(ids: Sequence[str], gallery: int, k: int, seed: int) -> np.ndarray:
    """Positions of random photos for each query, int64 (queries, k), by seed and the query's id alone."""
    k = min(k, gallery)
    rngs = [np.random.default_rng([seed, zlib.crc32(i.encode())]) for i in ids]
    return np.array([rng.choice(gallery, k, replace=False) for rng in rngs], dtype=np.int64).reshape(len(ids), k)


def cluster_representatives(vectors: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Positions of the photos that represent a gallery's clusters, int64 (clusters,), distinct; a query chooses k of them."""
    clusters = min(len(vectors), CLUSTERS_PER_PHOTO * k)
    if not clusters:
        return np.zeros(0, dtype=np.int64)
    kmeans: Any = faiss.Kmeans(vectors.shape[1], clusters, seed=seed, spherical=True, min_points_per_centroid=1)
    kmeans.train(np.ascontiguousarray(vectors))
    return np.unique(VectorIndex(vectors, "centroids").search(kmeans.centroids, 1).position)


def _settings_file(file: AnyPath) -> AnyPath:
    return file.with_name(f"{Path(file.name).stem}.json")


EARTH_M = 6_371_008.8  # mean radius
RADII_M = (25, 50, 100, 500, 1e3, 25e3, 200e3, 750e3, 2500e3)  # within a city; street, city, region, country, continent (004)
TEMPERATURE = 0.01  # of similarities, as in CLIP's training; the one fitted on the split `val` multiplies it
UNSEEN = -1.01  # similarity of an address without a training photo: less than any photo's
MARGIN = 1e-6  # of the least vote over addresses without votes

Row = Mapping[str, Any]


class Geocoder:
    """Reverse geocoding by the city's map; without one, or where nothing is near, by the nearest photo's address."""

    def __init__(self, streets: StreetMap, limit_m: float, photos: Sequence[Row]) -> None:
        """`limit_m`: largest distance of a street; `photos`: rows with lat, lon, street and district, at least one."""
        self._streets, self._limit_m = streets, limit_m
        self._lat, self._lon = (np.array([photo[key] for photo in photos], dtype=np.float64) for key in ("lat", "lon"))
        self._photo_addresses = [Address(photo["street"], photo["district"]) for photo in photos]

    def addresses(self, lat: ArrayLike, lon: ArrayLike) -> list[Address]:
        """The address of each of N points in degrees; it may be one that the gazetteer lacks."""
        lat, lon = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
        return [
            address or self._photo_addresses[int(np.argmin(distance_m(y, x, self._lat, self._lon)))]
            for address, y, x in zip(self.map_addresses(lat, lon), lat.tolist(), lon.tolist(), strict=True)
        ]

    def map_addresses(self, lat: ArrayLike, lon: ArrayLike) -> list[Address | None]:
        """The addresses by the map alone, None where it has no street or district."""
        lat, lon = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
        addresses: list[Address | None] = [None] * len(lat)
        if self._streets.bounds is None or not (self._streets.street_names and self._streets.district_names):
            return addresses
        west, south, east, north = self._streets.bounds
        near = np.flatnonzero((lat > south - 1) & (lat < north + 1) & (lon > west - 1) & (lon < east + 1))
        there = annotate_coordinates(lat[near], lon[near], self._streets, self._limit_m)
        for i, street, district in zip(near.tolist(), there.street.tolist(), there.district.tolist(), strict=True):
            if street >= 0 and district >= 0:
                addresses[i] = Address(self._streets.street_names[street], self._streets.district_names[district])
        return addresses

    def photo_addresses(self, gazetteer: Gazetteer) -> NDArray[np.int64]:
        """Index of each photo's address in the gazetteer, (photos,): by the map, else its own, else -1."""
        number = {address: i for i, address in enumerate(gazetteer.addresses)}
        by_map = self.map_addresses(self._lat, self._lon)
        pairs = zip(by_map, self._photo_addresses, strict=True)
        return np.array([number.get(a, number.get(b, -1)) if a else number.get(b, -1) for a, b in pairs], dtype=np.int64)


def street_map(city: CityConfig, gazetteer: Gazetteer) -> StreetMap:
    """The map from which a city's photos got their addresses, empty without one; InputError if a file is damaged.

    Where addresses name sub-streets it consists of the gazetteer's shapes.
    """
    if city.answer == "sub_street":
        shapes = gazetteer.geometry
        return StreetMap(list(shapes), list(shapes.values()), list(gazetteer.district_geometry.items()))
    return StreetMap.load(
        city.streets, city.districts, district_source=city.district_source, admin_level=city.admin_level,
        language=city.language, unit=city.unit, encoding=city.encoding,
    )  # fmt: skip


def nearest_address_scores(nearest: Neighbours, address: NDArray[np.int64], best: np.ndarray) -> np.ndarray:
    """ln p of every address up to a constant, float64 (queries, addresses), all finite.

    Each of the k nearest photos votes with its similarity. Addresses with votes come first, by the logarithm of their votes.
    Those without follow by the similarity s of their most similar photo, as far below the least vote as exp(s / 0.01) is below
    that of the k-th photo. With k = 1 this is the softmax of s / 0.01 over the addresses.

    Args:
        nearest: the k nearest photos of each query.
        address: index of the address of each photo of the gallery; -1 has no vote.
        best: similarity of the most similar photo of each address, (queries, addresses); -inf where there is none.
    """
    similarity = np.maximum(np.where(np.isfinite(best), best, UNSEEN), UNSEEN).astype(np.float64)
    voted = address[nearest.position]
    weight = np.maximum((1 + nearest.similarity.astype(np.float64)) / 2, 1e-6)
    votes = np.zeros_like(similarity)
    for column in range(voted.shape[1]):
        rows = np.flatnonzero(voted[:, column] >= 0)
        np.add.at(votes, (rows, voted[rows, column]), weight[rows, column])
    least = np.min(np.where(votes > 0, votes, np.inf), axis=1, initial=np.inf)
    least = np.where(np.isfinite(least), least, 1.0)[:, None]
    last = nearest.similarity[:, -1:].astype(np.float64)
    without_votes = np.log(least) + np.minimum((similarity - last) / TEMPERATURE, 0) - MARGIN
    return np.where(votes > 0, np.log(np.where(votes > 0, votes, 1.0)), without_votes)


def vote_address(nearest: Neighbours, address: NDArray[np.int64], winner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of the nearest photo that voted for each query's winner, (queries,); of the nearest at all where none did."""
    voted = address[nearest.position] == winner[:, None]
    return np.take_along_axis(nearest.position, np.argmax(voted, axis=1)[:, None], 1)[:, 0]


def distance_m(lat: ArrayLike, lon: ArrayLike, other_lat: ArrayLike, other_lon: ArrayLike) -> NDArray[np.float64]:
    """Great-circle metres between points in degrees (haversine); shapes are broadcast."""
    a, b, c, d = (np.radians(np.asarray(value, dtype=np.float64)) for value in (lat, lon, other_lat, other_lon))
    half = np.sin((c - a) / 2) ** 2 + np.cos(a) * np.cos(c) * np.sin((d - b) / 2) ** 2
    return 2 * EARTH_M * np.arcsin(np.sqrt(np.minimum(half, 1.0)))


def share_within(
    photos: Sequence[Row], coordinates: Mapping[str, tuple[float, float]], resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Share of photos located within each of RADII_M, with keys such as `25 m` or `200 km`.

    Args:
        photos: rows with id, place, lat and lon; those without coordinates are left out.
        coordinates: id -> predicted latitude and longitude in degrees; a photo without counts as too far.
    """
    known = [photo for photo in photos if has_coordinates(photo)]
    nowhere = (np.nan, np.nan)
    lat, lon = np.array([coordinates.get(photo["id"], nowhere) for photo in known], dtype=np.float64).reshape(-1, 2).T
    errors_m = distance_m([photo["lat"] for photo in known], [photo["lon"] for photo in known], lat, lon)
    places = [photo["place"] for photo in known]
    names = {radius: f"{radius:g} m" if radius < 1000 else f"{radius / 1000:g} km" for radius in RADII_M}
    return {name: share_ci(errors_m <= radius, places, resamples, seed) for radius, name in names.items()}


def has_coordinates(photo: Row) -> bool:
    """Whether a photo has coordinates."""
    return all(photo[axis] is not None and np.isfinite(photo[axis]) for axis in ("lat", "lon"))
