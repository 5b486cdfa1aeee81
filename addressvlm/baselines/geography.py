"""From coordinates to addresses and back to what that is worth (papers 002, Sec. 6.5, and 004).

Retrieval says where a photo is by where the most similar training photo was taken. Its scores of all addresses follow from
the same search: an address is as likely as the most similar photo whose coordinates the geocoder puts there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from addressvlm.addresses import Address, Gazetteer
from addressvlm.baselines.index import Found
from addressvlm.cities.annotation import annotate
from addressvlm.cities.streets import StreetMap
from addressvlm.config_city import CityConfig
from addressvlm.evaluation.metrics import Interval, share

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
        there = annotate(lat[near], lon[near], self._streets, self._limit_m)
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


def address_scores(nearest: Found, address: NDArray[np.int64], best: np.ndarray) -> np.ndarray:
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


def chosen(nearest: Found, address: NDArray[np.int64], winner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of the nearest photo that voted for each query's winner, (queries,); of the nearest at all where none did."""
    voted = address[nearest.position] == winner[:, None]
    return np.take_along_axis(nearest.position, np.argmax(voted, axis=1)[:, None], 1)[:, 0]


def distance_m(lat: ArrayLike, lon: ArrayLike, other_lat: ArrayLike, other_lon: ArrayLike) -> NDArray[np.float64]:
    """Metres along the sphere between points in degrees, by the haversine; shapes as numpy broadcasts them."""
    a, b, c, d = (np.radians(np.asarray(value, dtype=np.float64)) for value in (lat, lon, other_lat, other_lon))
    half = np.sin((c - a) / 2) ** 2 + np.cos(a) * np.cos(c) * np.sin((d - b) / 2) ** 2
    return 2 * EARTH_M * np.arcsin(np.sqrt(np.minimum(half, 1.0)))


def within(
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
    return {_shown(radius): share(off <= radius, places, resamples, seed) for radius in RADII_M}


def has_coordinates(photo: Row) -> bool:
    """Whether it is known where a photo was taken."""
    lat, lon = photo["lat"], photo["lon"]
    return lat is not None and lon is not None and bool(np.isfinite(lat) and np.isfinite(lon))


def _shown(radius_m: float) -> str:
    return f"{radius_m:g} m" if radius_m < 1000 else f"{radius_m / 1000:g} km"
