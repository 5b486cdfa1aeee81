"""The address of each place: from the manifest where it says so, else the nearest named street and the district around."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from addressvlm.addresses import Address
from addressvlm.cities.manifest import Photo
from addressvlm.cities.streets import StreetMap
from addressvlm.config import CityConfig
from addressvlm.errors import InputError

CROSS_STREET_M = 200.0  # how far a street may be and still be called the nearest other one


@dataclass(frozen=True)
class Place:
    """Where one or several photos were taken (one panorama), and its address."""

    id: str
    lat: float  # mean of its photos, degrees
    lon: float
    x: float  # the same in metres on the plane of the street map
    y: float
    address: Address
    distance_m: float | None  # to the street, None if the map does not have it near
    cross_street: str | None  # nearest street of another name
    ambiguous: bool  # that other street is so near that the address may be judged wrong


def assign(
    photos: Sequence[Photo], streets: StreetMap, city: CityConfig
) -> tuple[dict[str, Place], list[Photo], list[dict[str, Any]]]:
    """Addresses of all places: (places by id, the photos that have one, rows of `tables.REJECTS` for the others).

    Raises:
        InputError: rows lack a street (or district) and the city has no streets (or districts) file.
    """
    _require_maps(photos, city)
    rejects: list[dict[str, Any]] = []
    groups = {place: _consistent(place, group, streets, city, rejects) for place, group in _by_place(photos).items()}
    groups = {place: group for place, group in groups.items() if group}
    if not groups:
        return {}, [], rejects
    lat = np.array([np.mean([p.lat for p in group]) for group in groups.values()])
    lon = np.array([np.mean([p.lon for p in group]) for group in groups.values()])
    x, y = streets.to_metres(lat, lon)
    around = streets.around(lat, lon, max(city.max_distance_m, city.ambiguous_m, CROSS_STREET_M))
    districts = streets.district(lat, lon)
    places: dict[str, Place] = {}
    addressed: list[Photo] = []
    for i, (place, group) in enumerate(groups.items()):
        street, distance = _street(group, around[i], city)
        district = _given(group, "district") or districts[i]
        if street is None or district is None:
            nearest = f"{around[i][0][0]} is {around[i][0][1]:.0f} m away" if around[i] else "none is near"
            no_street = f"no street near: {nearest}, the limit is {city.max_distance_m:g} m"
            no_district = f"outside all districts: {lat[i]:.5f}, {lon[i]:.5f}"
            rejects += [photo.reject(no_street if street is None else no_district) for photo in group]
            continue
        cross, cross_distance = next(((n, d) for n, d in around[i] if n != street), (None, np.inf))
        places[place] = Place(
            id=place,
            lat=float(lat[i]),
            lon=float(lon[i]),
            x=float(x[i]),
            y=float(y[i]),
            address=Address(street, district),
            distance_m=distance,
            cross_street=cross,
            ambiguous=bool(cross_distance <= city.ambiguous_m),
        )
        addressed += group
    return places, addressed, rejects


def _require_maps(photos: Sequence[Photo], city: CityConfig) -> None:
    for column, path in (("street", city.streets), ("district", city.districts)):
        row = next((p.row for p in photos if not getattr(p, column)), None)
        if row is not None and not path:
            raise InputError(
                f"row {row} of {city.manifest} gives no {column} and city.{column}s is not set: set it to a GeoJSON file, or "
                f"add a column {column} to every row."
            )


def _by_place(photos: Sequence[Photo]) -> dict[str, list[Photo]]:
    groups = defaultdict(list)
    for photo in photos:
        groups[photo.place].append(photo)
    return groups


def _consistent(
    place: str, group: list[Photo], streets: StreetMap, city: CityConfig, rejects: list[dict[str, Any]]
) -> list[Photo]:
    """The photos that agree with most of their place on where it is and what its address is called."""
    if len(group) == 1:
        return group
    x, y = streets.to_metres([p.lat for p in group], [p.lon for p in group])
    off = np.hypot(x - np.median(x), y - np.median(y))
    names = {column: _given(group, column) for column in ("street", "district")}
    kept = []
    for photo, metres in zip(group, off, strict=True):
        other = next((c for c, name in names.items() if getattr(photo, c) not in ("", name)), None)
        if metres > city.max_distance_m:
            rejects.append(photo.reject(f"place torn apart: {metres:.0f} m from the other photos of place '{place}'"))
        elif other:
            rejects.append(photo.reject(f"place with two addresses: most photos of '{place}' have the {other} {names[other]}"))
        else:
            kept.append(photo)
    return kept


def _given(group: list[Photo], column: str) -> str | None:
    """What most photos of the group say in the column, the first on a tie; None if none says anything."""
    said = Counter(getattr(p, column) for p in group if getattr(p, column))
    return said.most_common(1)[0][0] if said else None


def _street(group: list[Photo], around: list[tuple[str, float]], city: CityConfig) -> tuple[str | None, float | None]:
    """The street and the distance to it: the given one at any distance, else the nearest within the limit."""
    given = _given(group, "street")
    if given:
        return given, next((d for name, d in around if name == given), None)
    return around[0] if around and around[0][1] <= city.max_distance_m else (None, None)
