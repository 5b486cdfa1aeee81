"""The address of each place: from the table where it says so, else by the rules of paper 002 (Sec. 5.1 and A.2) and offline.

The street is the nearest named one within a limit, lines of the street map only: buildings and their addresses are set
aside. Neighbours may vote (addressvlm/dataset/geocoding.py), an external geocoder may be asked instead
(addressvlm/dataset/external_geocoder.py), corners are marked ambiguous, the district is the polygon around.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from addressvlm.config.city import CityConfig, PartitionConfig
from addressvlm.dataset import external_geocoder
from addressvlm.dataset.partition import SubStreets
from addressvlm.dataset.photos import Photo, looks_swapped
from addressvlm.dataset.streets import StreetMap
from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import Address
from addressvlm.gazetteer.name_matcher import normalize_name

ROWS_AT_A_TIME = 1 << 18  # bounds the memory beside the columns themselves


@dataclass(frozen=True)
class Annotation:
    """Columns of N rows.

    Attributes:
        street: positions in `StreetMap.street_names` of the nearest street, -1 where none is within the limit.
        distance_m: metres to it, inf where there is none.
        second, second_distance_m: the same for the nearest street of another name.
        district: positions in `StreetMap.district_names`, -1 outside all of them.
    """

    street: NDArray[np.int32]
    distance_m: NDArray[np.float32]
    second: NDArray[np.int32]
    second_distance_m: NDArray[np.float32]
    district: NDArray[np.int32]


def annotate_coordinates(lat: ArrayLike, lon: ArrayLike, streets: StreetMap, limit_m: float) -> Annotation:
    """The columns of N rows in degrees, WGS84; a street counts up to `limit_m`.

    Rows that share a coordinate (the views of a panorama) are looked up once if they are near each other in the table.
    """
    lat, lon = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
    rows = len(lat)
    street, second, district = (np.full(rows, -1, dtype=np.int32) for _ in range(3))
    distance, second_distance = (np.full(rows, np.inf, dtype=np.float32) for _ in range(2))
    for start in range(0, rows, ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        points, row = np.unique(lat[part] + 1j * lon[part], return_inverse=True)
        here = np.ascontiguousarray(points.real), np.ascontiguousarray(points.imag)
        first, metres, other, other_metres = streets.nearest_two(*here, limit_m)
        street[part], distance[part] = first[row], metres[row]
        second[part], second_distance[part] = other[row], other_metres[row]
        district[part] = streets.district_codes(*here)[row]
    return Annotation(street, distance, second, second_distance, district)


MOST_VOTERS = 64  # to each side


def neighbour_vote(
    x: NDArray[np.float64], y: NDArray[np.float64], own: NDArray[np.int32], rival: NDArray[np.int32], reach_m: float
) -> NDArray[np.int32]:
    """The street of each place after its neighbours have voted.

    A photo taken in passing a corner is often nearer to the crossing street than to the one it was taken on. The places
    before and after it on the same drive tell. They are those that come next to it in the order of the rows, to each side as
    long as they stay within reach; each votes for its own nearest street. The rival wins if most voters of one side are for
    it and those of the other side are not against it: a drive that goes straight on has it on both sides, one that turns
    the corner has not. A tie, or no voter, keeps the own. Neighbours from elsewhere in the table have no vote, since those
    on the crossing street would carry the corner as often as not; so rows in a random order are left as they are.

    Args:
        x, y: (N,) metres, in the order of the rows.
        own: (N,) code of the nearest street of each place, -1 where there is none (that place has no vote).
        rival: (N,) code of the other street that a place may be on, -1 where its own is beyond doubt.
        reach_m: how far a voter may be.
    """
    before, after = (_lead(x, y, own, rival, reach_m, side) for side in (-1, 1))
    return np.where((before >= 0) & (after >= 0) & (before + after > 0), rival, own)


def _lead(
    x: NDArray[np.float64], y: NDArray[np.float64], own: NDArray[np.int32], rival: NDArray[np.int32], reach_m: float, side: int
) -> NDArray[np.int64]:
    """By how many votes of one side (-1 before, 1 after) the rival is ahead of each place's own street."""
    lead = np.zeros(len(x), dtype=np.int64)
    place = np.flatnonzero(rival >= 0)
    for step in range(1, MOST_VOTERS + 1):
        voter = place + side * step
        inside = (voter >= 0) & (voter < len(x))
        place, voter = place[inside], voter[inside]
        near = np.hypot(x[place] - x[voter], y[place] - y[voter]) <= reach_m
        place, voter = place[near], voter[near]
        if not len(place):
            break
        lead[place] += (own[voter] == rival[place]).astype(np.int64) - (own[voter] == own[place])
    return lead


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
    source: str = "map"  # of the street: manifest, map, nominatim, google, or neighbour (a geocoder's answer from next to it)
    margin_m: float | None = None  # distance to the other street less that to its own; below 0 if the other is nearer
    second_street: str | None = None  # that other street
    sub_street: str | None = None  # None without city.partition, unless the table gives it


@dataclass(frozen=True)
class _AddressClaim:
    """The street that a place is said to be on, and by whom; a geocoder says more."""

    street: str | None
    source: str
    district: str | None = None
    second: str | None = None
    tie: bool = False


@dataclass(frozen=True)
class _PlacePositions:
    """The places as columns, in the order of the rows."""

    ids: list[str]
    groups: list[list[Photo]]
    lat: NDArray[np.float64]
    lon: NDArray[np.float64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]


def assign_addresses(
    photos: Sequence[Photo], streets: StreetMap, city: CityConfig, seed: int = 0, cache: Path | None = None
) -> tuple[dict[str, Place], list[Photo], list[dict[str, Any]]]:
    """Addresses of all places: (places by id, the photos that have one, rows of `tables.REJECTS` for the others).

    Args:
        photos: in the order of the table, which is that of the drive if the neighbours are to vote.
        seed: draws the places that an external geocoder is asked about.
        cache: file of that geocoder's answers where the city's settings name none.

    Raises:
        InputError: rows lack a street (or district) and the city has no streets (or districts) file, latitude and longitude
            are swapped, or the geocoder can't be used.
    """
    _require_maps(photos, city)
    _refuse_swapped(photos, streets, city)
    rejects: list[dict[str, Any]] = []
    spots = _spots(photos, streets, city, rejects)
    if not spots.ids:
        return {}, [], rejects
    found = annotate_coordinates(spots.lat, spots.lon, streets, CROSS_STREET_M)
    near = _Near(spots, streets, found)
    claims = _claims(spots, near, streets, city, seed, cache)
    district_names = [*streets.district_names, None]
    measured = near.to([claim.street for claim in claims])
    places: dict[str, Place] = {}
    addressed: list[Photo] = []
    for i, (claim, (metres, second, second_metres)) in enumerate(zip(claims, measured, strict=True)):
        district = _given(spots.groups[i], "district") or district_names[found.district[i]] or claim.district
        if claim.street is None or district is None:
            reason = _reason(spots, i, near, streets, city, claim.street is None)
            rejects += [photo.reject(reason) for photo in spots.groups[i]]
            continue
        second = second or claim.second
        places[spots.ids[i]] = Place(
            id=spots.ids[i],
            lat=float(spots.lat[i]),
            lon=float(spots.lon[i]),
            x=float(spots.x[i]),
            y=float(spots.y[i]),
            address=Address(claim.street, district),
            distance_m=metres,
            cross_street=second,
            ambiguous=claim.tie or (second_metres is not None and second_metres <= city.ambiguous_m),
            source=claim.source,
            margin_m=None if metres is None or second_metres is None else second_metres - metres,
            second_street=second,
            sub_street=_given(spots.groups[i], "sub_street"),
        )
        addressed += spots.groups[i]
    if city.partition is not None:
        places = with_sub_streets(places, addressed, streets, city.partition)[0]
    return places, addressed, rejects


def with_sub_streets(
    places: Mapping[str, Place],
    photos: Sequence[Photo],
    streets: StreetMap,
    config: PartitionConfig,
    counted: Collection[str] | None = None,
) -> tuple[dict[str, Place], SubStreets]:
    """The places with the sub-streets of a partition made for them, and the partition; what the table gives stays.

    Args:
        photos: of these places.
        counted: ids of the places that count for `min_places` (the training places); default: all.
    """
    given = {place: _given(group, "sub_street") for place, group in _by_place(photos).items()}
    open_ = [p for p in places.values() if not given.get(p.id)]
    counts = [counted is None or p.id in counted for p in open_]
    parts = SubStreets(streets, config, [p.address.street for p in open_], [p.x for p in open_], [p.y for p in open_], counts)
    names = {p.id: name for p, name in zip(open_, parts.names, strict=True)}
    return {i: replace(p, sub_street=names.get(i, given.get(i))) for i, p in places.items()}, parts


class _Near:
    """The two nearest streets of every place, and any other street that is asked for."""

    def __init__(self, spots: _PlacePositions, streets: StreetMap, found: Annotation) -> None:
        self._spots, self._streets = spots, streets
        self.first, self.metres, self.second, self.second_metres = (
            found.street, found.distance_m, found.second, found.second_distance_m
        )  # fmt: skip
        self._names = [*streets.street_names, None]

    def name(self, code: int) -> str | None:
        """The street with this code, None for -1."""
        return self._names[code]

    def to(self, names: Sequence[str | None]) -> list[tuple[float | None, str | None, float | None]]:
        """For the named street of each place: metres to it, the nearest street of another name, metres to that."""
        found: list[tuple[float | None, str | None, float | None]] = []
        others = []
        for i, name in enumerate(names):
            both = [
                (self.name(self.first[i]), float(self.metres[i])),
                (self.name(self.second[i]), float(self.second_metres[i])),
            ]
            found.append(_measured(name, [(n, d) for n, d in both if n is not None]))
            if name is not None and name not in (both[0][0], both[1][0]):
                others.append(i)
        if others:
            around = self._streets.around(self._spots.lat[others], self._spots.lon[others], CROSS_STREET_M)
            for i, streets in zip(others, around, strict=True):
                found[i] = _measured(names[i], streets)
        return found


def _measured(name: str | None, near: Sequence[tuple[str, float]]) -> tuple[float | None, str | None, float | None]:
    """Metres to the named street, the first other one and metres to that, None where there is none."""
    metres = next((d for n, d in near if n == name), None)
    other, other_metres = next(((n, d) for n, d in near if n != name), (None, None))
    return metres, other, other_metres


def _claims(
    spots: _PlacePositions, near: _Near, streets: StreetMap, city: CityConfig, seed: int, cache: Path | None
) -> list[_AddressClaim]:
    """Who says what about the street of each place: the table, else the geocoder if there is one, else the map."""
    given = [_given(group, "street") for group in spots.groups]
    claims = [_AddressClaim(street, "manifest") for street in given]
    if city.geocoder is None:
        own = np.where(near.metres <= city.max_distance_m, near.first, -1)
        if city.neighbour_vote_radius_m > 0:
            code = {name: i for i, name in enumerate(streets.street_names)}
            voters = np.array([o if g is None else code.get(g, -1) for g, o in zip(given, own, strict=True)], dtype=np.int32)
            rivals = np.where(near.second_metres <= min(city.ambiguous_m, city.max_distance_m), near.second, -1)
            own = neighbour_vote(spots.x, spots.y, voters, rivals, city.neighbour_vote_radius_m)
        return [c if c.street else _AddressClaim(near.name(o), "map") for c, o in zip(claims, own.tolist(), strict=True)]
    file = Path(city.geocoder.cache).expanduser() if city.geocoder.cache else cache
    if file is None:
        raise InputError("the geocoder's answers have no file to be kept in: set city.geocoder.cache.")
    open_ = [i for i, street in enumerate(given) if street is None]
    ids, where = [spots.ids[i] for i in open_], (spots.lat[open_], spots.lon[open_], spots.x[open_], spots.y[open_])
    answers, sources = external_geocoder.locate_by_geocoder(ids, *where, city.geocoder, file, seed, city.language)
    spelling = _spelling(streets)
    for i, answer, source in zip(open_, answers, sources, strict=True):
        claims[i] = _AddressClaim(None, source)
        if answer:
            street, second = (name and spelling.get(normalize_name(name), name) for name in (answer.street, answer.second))
            claims[i] = _AddressClaim(street, source, answer.district, second if second != street else None, answer.tie)
    return claims


def _spelling(streets: StreetMap) -> dict[str, str]:
    """Normal form of the names and their variants -> the name as the map writes it."""
    forms = {normalize_name(other): name for name in streets.street_names for other in streets.variants.get(name, [])}
    return forms | {normalize_name(name): name for name in streets.street_names}


def _reason(spots: _PlacePositions, i: int, near: _Near, streets: StreetMap, city: CityConfig, no_street: bool) -> str:
    """Why a place has no address."""
    lat, lon = float(spots.lat[i]), float(spots.lon[i])
    nearest = near.name(near.first[i])
    if streets.bounds is not None and nearest is None:
        west, south, east, north = streets.bounds
        if not (west <= lon <= east and south <= lat <= north):
            covered = f"{south:.4f} to {north:.4f}, {west:.4f} to {east:.4f}"
            return f"outside the map: {lat:.5f}, {lon:.5f} is not in {covered}"
    if not no_street:
        return f"outside all districts: {lat:.5f}, {lon:.5f}"
    if city.geocoder is not None:
        return f"no geocoded street: none for {lat:.5f}, {lon:.5f}, nor within {external_geocoder.MAX_FILL_M:g} m of it"
    distance = f"{nearest} is {near.metres[i]:.0f} m away" if nearest else "none is near"
    return f"no street near: {distance}, the limit is {city.max_distance_m:g} m"


def _require_maps(photos: Sequence[Photo], city: CityConfig) -> None:
    for column, path in (("street", city.streets), ("district", city.districts)):
        row = next((p.row for p in photos if not getattr(p, column)), None)
        if row is not None and not path and city.geocoder is None:
            raise InputError(
                f"row {row} of {city.manifest or city.photos} gives no {column} and city.{column}s is not set: set it to a "
                f"GeoJSON or OpenStreetMap file, or add a column {column} to every row."
            )


def _refuse_swapped(photos: Sequence[Photo], streets: StreetMap, city: CityConfig) -> None:
    if streets.bounds is not None and looks_swapped(photos, streets.bounds):
        raise InputError(
            f"latitude and longitude look swapped in {city.manifest or city.photos}: most photos lie outside of "
            f"{city.streets or city.districts} as they are and inside the other way round; swap the two columns."
        )


def _spots(photos: Sequence[Photo], streets: StreetMap, city: CityConfig, rejects: list[dict[str, Any]]) -> _PlacePositions:
    """The places of the photos, in the order of their first rows; photos that don't fit their place are rejected."""
    groups = {place: _consistent(place, group, streets, city, rejects) for place, group in _by_place(photos).items()}
    groups = {place: group for place, group in groups.items() if group}
    lat = np.array([np.mean([p.lat for p in group]) for group in groups.values()])
    lon = np.array([np.mean([p.lon for p in group]) for group in groups.values()])
    return _PlacePositions(list(groups), list(groups.values()), lat, lon, *streets.to_metres(lat, lon))


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
