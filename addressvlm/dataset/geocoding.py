"""The address of each place: from the table where it has one, else by the rules of paper 002 (Sec. 5.1 and A.2), offline.

The street is the nearest named one within a limit, by the lines of the street map only: buildings and their addresses are
ignored. Neighbours may vote, an external geocoder may replace the map (addressvlm/dataset/external_geocoder.py), corners are
marked ambiguous, the district is the polygon that contains the place.
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
from addressvlm.dataset.partition import StreetPartition
from addressvlm.dataset.photos import Photo, looks_swapped
from addressvlm.dataset.spellings import KnownNames, most_frequent_spellings
from addressvlm.dataset.streets import StreetMap
from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import Address

Floats = NDArray[np.float64]
Codes = NDArray[np.int32]

CROSS_STREET_M = 200.0  # how far a street may be and still be called the nearest other one
MAX_VOTERS = 64  # to each side
CHUNK_ROWS = 1 << 18  # bounds the memory besides the columns themselves


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
    margin_m: float | None = None  # distance to the other street minus that to its own; below 0 if the other is nearer
    second_street: str | None = None  # that other street
    sub_street: str | None = None  # None without city.partition, unless the table has it


@dataclass(frozen=True)
class _Places:
    """The places as N rows, in the order of the table."""

    ids: list[str]
    photos: list[list[Photo]]
    lat: Floats
    lon: Floats
    x: Floats
    y: Floats

    def column(self, name: str) -> list[str | None]:
        """The value of most photos of each place, None where there is none."""
        return [_majority(photos, name) for photos in self.photos]


@dataclass(frozen=True)
class _StreetChoice:
    """The street of a place and its source; a geocoder has more to say."""

    street: str | None
    source: str
    district: str | None = None
    second: str | None = None
    tie: bool = False


def assign_addresses(
    photos: Sequence[Photo], streets: StreetMap, city: CityConfig, seed: int = 0, cache_file: Path | None = None
) -> tuple[dict[str, Place], list[Photo], list[dict[str, Any]]]:
    """Addresses of all places: (places by id, the photos that have one, rows of `tables.REJECTS` for the others).

    Args:
        photos: in the order of the table, which is that of the drive if the neighbours are to vote.
        seed: draws the places that are sent to an external geocoder.
        cache_file: that geocoder's answers, unless city.geocoder.cache is set.

    Raises:
        InputError: rows lack a street (or district) and the city has no streets (or districts) file, latitude and longitude
            are swapped, or the geocoder can't be used.
    """
    _check_inputs(photos, streets, city)
    rejects: list[dict[str, Any]] = []
    rows = _group_by_place(_with_one_spelling(photos, streets), streets, city, rejects)
    if not rows.ids:
        return {}, [], rejects
    nearby = annotate_coordinates(rows.lat, rows.lon, streets, CROSS_STREET_M)
    choices = _choose_streets(rows, nearby, streets, city, seed, cache_file)
    distances = _measure([choice.street for choice in choices], rows, nearby, streets)
    district_names = [*streets.district_names, None]
    table_districts, sub_streets = rows.column("district"), rows.column("sub_street")
    places: dict[str, Place] = {}
    addressed: list[Photo] = []
    for i, (choice, (metres, second, second_metres)) in enumerate(zip(choices, distances, strict=True)):
        district = table_districts[i] or district_names[nearby.district[i]] or choice.district
        if choice.street is None or district is None:
            reason = _reject_reason(rows, i, nearby, streets, city, choice.street is None)
            rejects += [photo.reject(reason) for photo in rows.photos[i]]
            continue
        second = second or choice.second
        places[rows.ids[i]] = Place(
            id=rows.ids[i],
            lat=float(rows.lat[i]),
            lon=float(rows.lon[i]),
            x=float(rows.x[i]),
            y=float(rows.y[i]),
            address=Address(choice.street, district),
            distance_m=metres,
            cross_street=second,
            ambiguous=choice.tie or (second_metres is not None and second_metres <= city.ambiguous_m),
            source=choice.source,
            margin_m=None if metres is None or second_metres is None else second_metres - metres,
            second_street=(choice.second if choice.tie else None) or second,
            sub_street=sub_streets[i],
        )
        addressed += rows.photos[i]
    if city.partition is not None:
        places = with_sub_streets(places, addressed, streets, city.partition)[0]
    return places, addressed, rejects


def _with_one_spelling(photos: Sequence[Photo], streets: StreetMap) -> Sequence[Photo]:
    """The photos with the names of their rows as the map spells them, else as most rows do."""
    street_names, district_names = (KnownNames(n, streets.variants) for n in (streets.street_names, streets.district_names))
    columns = {
        "street": street_names,
        "other_street": street_names,
        "district": district_names,
        "sub_street": KnownNames((), {}),
    }
    changed: dict[int, dict[str, Any]] = defaultdict(dict)
    for column, known in columns.items():
        read = ("street", "other_street") if known is street_names else (column,)
        counts = Counter(name for photo in photos for c in read if (name := getattr(photo, c)))
        candidates = {name: known.candidates(name) for name in counts}
        spelling = most_frequent_spellings(Counter({name: n for name, n in counts.items() if not candidates[name]}))
        other = {name for name in counts if (candidates[name] or [spelling[name]]) != [name]}
        for i, photo in enumerate(photos if other else ()):
            name = getattr(photo, column)
            if name in other:
                several = candidates[name] or [spelling[name]]
                if len(several) > 1:  # streets in different parts of the city
                    near = [
                        street for street, _ in streets.around(photo.lat, photo.lon, CROSS_STREET_M)[0] if street in several
                    ]
                    several = near or several
                changed[i][column] = several[0]
    return [replace(photo, **changed[i]) if i in changed else photo for i, photo in enumerate(photos)] if changed else photos


def with_sub_streets(
    places: Mapping[str, Place],
    photos: Sequence[Photo],
    streets: StreetMap,
    config: PartitionConfig,
    counted: Collection[str] | None = None,
) -> tuple[dict[str, Place], StreetPartition]:
    """The places with the sub-streets of a partition made for them, and the partition; sub-streets of the table stay.

    Args:
        photos: of these places.
        counted: ids of the places that count for `min_places` (the training places); default: all.
    """
    from_table = {place: _majority(group, "sub_street") for place, group in _photos_by_place(photos).items()}
    missing = [p for p in places.values() if not from_table.get(p.id)]
    counts = [counted is None or p.id in counted for p in missing]
    names = [p.address.street for p in missing]
    partition = StreetPartition(streets, config, names, [p.x for p in missing], [p.y for p in missing], counts)
    computed = {p.id: name for p, name in zip(missing, partition.names, strict=True)}
    return {i: replace(p, sub_street=computed.get(i, from_table.get(i))) for i, p in places.items()}, partition


@dataclass(frozen=True)
class Annotation:
    """Columns of N rows.

    Attributes:
        street: positions in `StreetMap.street_names` of the nearest street, -1 where none is within the limit.
        distance_m: metres to it, inf where there is none.
        second, second_distance_m: the same for the nearest street of another name.
        district: positions in `StreetMap.district_names`, -1 outside all of them.
    """

    street: Codes
    distance_m: NDArray[np.float32]
    second: Codes
    second_distance_m: NDArray[np.float32]
    district: Codes


def annotate_coordinates(lat: ArrayLike, lon: ArrayLike, streets: StreetMap, limit_m: float) -> Annotation:
    """The columns of N rows in degrees, WGS84; a street counts up to `limit_m`.

    Rows that share a coordinate (the views of a panorama) are looked up once if they are near each other in the table.
    """
    lat, lon = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
    rows = len(lat)
    street, second, district = (np.full(rows, -1, dtype=np.int32) for _ in range(3))
    distance, second_distance = (np.full(rows, np.inf, dtype=np.float32) for _ in range(2))
    for start in range(0, rows, CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        points, row = np.unique(lat[chunk] + 1j * lon[chunk], return_inverse=True)
        position = np.ascontiguousarray(points.real), np.ascontiguousarray(points.imag)
        first, metres, other, other_metres = streets.nearest_two(*position, limit_m)
        street[chunk], distance[chunk] = first[row], metres[row]
        second[chunk], second_distance[chunk] = other[row], other_metres[row]
        district[chunk] = streets.district_codes(*position)[row]
    return Annotation(street, distance, second, second_distance, district)


def neighbour_vote(x: Floats, y: Floats, nearest: Codes, alternative: Codes, radius_m: float) -> Codes:
    """The street of each place after a vote of its neighbours.

    A photo taken in passing a corner is often nearer to the crossing street than to the one it was taken on. The places
    before and after it on the same drive decide. They are those that come next to it in the order of the rows, to each side as
    long as they stay within the radius; each votes for its own nearest street. The alternative wins if most voters of one
    side are for it and those of the other side are not against it: a drive that goes straight on has it on both sides, one
    that turns the corner has not. A tie, or no voter, keeps the nearest. Neighbours from elsewhere in the table have no vote,
    since those on the crossing street would carry the corner as often as not; so rows in a random order stay as they are.

    Args:
        x, y: (N,) metres, in the order of the rows.
        nearest: (N,) code of the nearest street of each place, -1 where there is none (that place has no vote).
        alternative: (N,) code of the other street that a place may be on, -1 where the nearest is certain.
        radius_m: how far a voter may be.
    """
    leads = []
    for side in (-1, 1):  # before and after
        lead = np.zeros(len(x), dtype=np.int64)  # votes for the alternative minus those for the nearest street
        place = np.flatnonzero(alternative >= 0)
        for step in range(1, MAX_VOTERS + 1):
            voter = place + side * step
            inside = (voter >= 0) & (voter < len(x))
            place, voter = place[inside], voter[inside]
            near = np.hypot(x[place] - x[voter], y[place] - y[voter]) <= radius_m
            place, voter = place[near], voter[near]
            if not len(place):
                break
            lead[place] += (nearest[voter] == alternative[place]).astype(np.int64) - (nearest[voter] == nearest[place])
        leads.append(lead)
    return np.where((leads[0] >= 0) & (leads[1] >= 0) & (leads[0] + leads[1] > 0), alternative, nearest)


def _choose_streets(
    rows: _Places, nearby: Annotation, streets: StreetMap, city: CityConfig, seed: int, cache_file: Path | None
) -> list[_StreetChoice]:
    """The street of each place by the table, else by the geocoder if there is one, else by the map."""
    table_streets, others = rows.column("street"), rows.column("other_street")
    others = [other if other != street else None for street, other in zip(table_streets, others, strict=True)]
    choices = [
        _StreetChoice(street, "manifest", second=other, tie=other is not None)
        for street, other in zip(table_streets, others, strict=True)
    ]
    if city.geocoder is None:
        nearest = np.where(nearby.distance_m <= city.max_distance_m, nearby.street, -1)
        if city.neighbour_vote_radius_m > 0:
            code = {name: i for i, name in enumerate(streets.street_names)}
            voters = [n if name is None else code.get(name, -1) for name, n in zip(table_streets, nearest, strict=True)]
            near_corner = nearby.second_distance_m <= min(city.ambiguous_m, city.max_distance_m)
            alternative = np.where(near_corner, nearby.second, -1)
            radius_m = city.neighbour_vote_radius_m
            nearest = neighbour_vote(rows.x, rows.y, np.array(voters, dtype=np.int32), alternative, radius_m)
        names = [*streets.street_names, None]
        return [c if c.street else _StreetChoice(names[n], "map") for c, n in zip(choices, nearest.tolist(), strict=True)]
    cache_file = Path(city.geocoder.cache).expanduser() if city.geocoder.cache else cache_file
    if cache_file is None:
        raise InputError("there is no file to store the geocoder's answers in: set city.geocoder.cache.")
    missing = [i for i, street in enumerate(table_streets) if street is None]
    positions = (rows.lat[missing], rows.lon[missing], rows.x[missing], rows.y[missing])
    answers, sources = external_geocoder.locate_by_geocoder(
        [rows.ids[i] for i in missing], *positions, city.geocoder, cache_file, seed, city.language
    )
    known = KnownNames(streets.street_names, streets.variants)
    for i, answer, source in zip(missing, answers, sources, strict=True):
        choices[i] = _StreetChoice(None, source)
        if answer:
            street, second = (name and next(iter(known.candidates(name)), name) for name in (answer.street, answer.second))
            choices[i] = _StreetChoice(street, source, answer.district, second if second != street else None, answer.tie)
    return choices


def _measure(
    names: Sequence[str | None], rows: _Places, nearby: Annotation, streets: StreetMap
) -> list[tuple[float | None, str | None, float | None]]:
    """For the named street of each place: metres to it, the nearest street of another name, metres to that."""
    street_names = [*streets.street_names, None]
    nearest = [(street_names[a], street_names[b]) for a, b in zip(nearby.street, nearby.second, strict=True)]
    # places whose street is neither of the two nearest
    far = [i for i, name in enumerate(names) if name is not None and name not in nearest[i]]
    around = dict(zip(far, streets.around(rows.lat[far], rows.lon[far], CROSS_STREET_M), strict=True)) if far else {}
    distances = []
    for i, name in enumerate(names):
        both = zip(nearest[i], (float(nearby.distance_m[i]), float(nearby.second_distance_m[i])), strict=True)
        near = around[i] if i in around else [(street, metres) for street, metres in both if street is not None]
        metres = next((d for street, d in near if street == name), None)
        other, other_metres = next(((street, d) for street, d in near if street != name), (None, None))
        distances.append((metres, other, other_metres))
    return distances


def _reject_reason(rows: _Places, i: int, nearby: Annotation, streets: StreetMap, city: CityConfig, no_street: bool) -> str:
    lat, lon = float(rows.lat[i]), float(rows.lon[i])
    nearest = [*streets.street_names, None][nearby.street[i]]
    if streets.bounds is not None and nearest is None:
        west, south, east, north = streets.bounds
        if not (west <= lon <= east and south <= lat <= north):
            covered = f"{south:.4f} to {north:.4f}, {west:.4f} to {east:.4f}"
            return f"outside the map: {lat:.5f}, {lon:.5f} is not in {covered}"
    if not no_street:
        return f"outside all districts: {lat:.5f}, {lon:.5f}"
    if city.geocoder is not None:
        return f"no geocoded street: none for {lat:.5f}, {lon:.5f}, nor within {external_geocoder.MAX_FILL_M:g} m of it"
    distance = f"{nearest} is {nearby.distance_m[i]:.0f} m away" if nearest else "none is near"
    return f"no street near: {distance}, the limit is {city.max_distance_m:g} m"


def _check_inputs(photos: Sequence[Photo], streets: StreetMap, city: CityConfig) -> None:
    """Raise InputError if an address can't be had from table or map, or if the coordinates are swapped."""
    for column, path in (("street", city.streets), ("district", city.districts)):
        row = next((p.row for p in photos if not getattr(p, column)), None)
        if row is not None and not path and city.geocoder is None:
            raise InputError(
                f"row {row} of {city.manifest or city.photos} gives no {column} and city.{column}s is not set: set it to a "
                f"GeoJSON or OpenStreetMap file, or add a column {column} to every row."
            )
    if streets.bounds is not None and looks_swapped(photos, streets.bounds):
        raise InputError(
            f"latitude and longitude look swapped in {city.manifest or city.photos}: most photos lie outside of "
            f"{city.streets or city.districts} as they are and inside the other way round; swap the two columns."
        )


def _group_by_place(photos: Sequence[Photo], streets: StreetMap, city: CityConfig, rejects: list[dict[str, Any]]) -> _Places:
    """The places in the order of their first rows; photos that differ from most of their place become rejects."""
    groups: dict[str, list[Photo]] = {}
    for place, group in _photos_by_place(photos).items():
        if len(group) == 1:
            groups[place] = group
            continue
        x, y = streets.to_metres([p.lat for p in group], [p.lon for p in group])
        offset_m = np.hypot(x - np.median(x), y - np.median(y))
        names = {column: _majority(group, column) for column in ("street", "district")}
        consistent = []
        for photo, metres in zip(group, offset_m, strict=True):
            other = next((c for c, name in names.items() if getattr(photo, c) not in ("", name)), None)
            if metres > city.max_distance_m:
                rejects.append(photo.reject(f"place torn apart: {metres:.0f} m from the other photos of place '{place}'"))
            elif other:
                reason = f"place with two addresses: most photos of '{place}' have the {other} {names[other]}"
                rejects.append(photo.reject(reason))
            else:
                consistent.append(photo)
        if consistent:
            groups[place] = consistent
    lat = np.array([np.mean([p.lat for p in group]) for group in groups.values()])
    lon = np.array([np.mean([p.lon for p in group]) for group in groups.values()])
    return _Places(list(groups), list(groups.values()), lat, lon, *streets.to_metres(lat, lon))


def _photos_by_place(photos: Sequence[Photo]) -> dict[str, list[Photo]]:
    groups = defaultdict(list)
    for photo in photos:
        groups[photo.place].append(photo)
    return groups


def _majority(photos: list[Photo], column: str) -> str | None:
    """The most frequent value of the column, the first on a tie; None without any."""
    counts = Counter(getattr(p, column) for p in photos if getattr(p, column))
    return counts.most_common(1)[0][0] if counts else None
