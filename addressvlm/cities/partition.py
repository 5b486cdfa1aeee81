"""Semantic address partition: streets cut into sub-streets at their intersections (paper 002, Sec. 3 and A.2).

A sub-street is called after its street and the one or two streets that bound it: `Forbes Avenue between Atwood Street and
Meyran Avenue`, `Forbes Avenue from Atwood Street on`.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray
from shapely.geometry.base import BaseGeometry

from addressvlm.cities.axes import Axis, Crossing, Crossings
from addressvlm.cities.streets import StreetMap
from addressvlm.config_city import PartitionConfig

SIDES = ("east", "north", "west", "south")


@dataclass(frozen=True)
class SubStreet:
    """A part of a street on which places are.

    Attributes:
        name: as an answer says it; no two of a city share one.
        bounds: the streets that cross at its ends, none to two, each once.
        start_m, end_m: where it lies along the street's axis, in metres.
        places: how many of the places that count are on it.
    """

    street: str
    name: str
    bounds: tuple[str, ...]
    start_m: float
    end_m: float
    places: int


class SubStreets:
    """The partition of a city's streets, made for its places.

    Attributes:
        names: the sub-street of each place, in the order they were given.
        parts: the sub-streets that have places, by street and in order along it.
    """

    def __init__(
        self, streets: StreetMap, config: PartitionConfig, street: Sequence[str], x: ArrayLike, y: ArrayLike,
        counts: ArrayLike | None = None,
    ) -> None:  # fmt: skip
        """Cut the streets of N places.

        At first a street is cut at each crossing that is at least `gap_m` from the cut before it and from the street's end
        (a crossing nearer to the end names it). Then sub-streets with fewer than `min_places` places are merged, the
        emptiest first and with the emptier neighbour, until there are none or the street is one piece. Parts without any
        place are left out of that and get no name.

        Args:
            street: (N,) names as in `streets.street_names`; a street without lines there stays whole.
            x, y: (N,) metres on the plane of the map.
            counts: (N,) whether a place counts for `min_places` (the training places, say); default: all do.
        """
        self._streets = streets
        self._axes: dict[str, Axis] = {}
        x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        counted = np.ones(len(street), dtype=bool) if counts is None else np.asarray(counts, dtype=bool)
        members = defaultdict(list)
        for i, name in enumerate(street):
            members[name].append(i)
        lines = defaultdict(list)
        for name, line in zip(streets.names, streets.lines, strict=True):
            if name in members:
                lines[name].append(line)
        crossings = Crossings(streets)
        self.names = list(street)
        self.parts: list[SubStreet] = []
        for name in sorted(members):
            here = np.array(members[name])
            axis = self._axes[name] = Axis(lines[name])
            parts, which = _partition(name, axis, crossings.of(name, axis), x[here], y[here], counted[here], config)
            self.parts += parts
            for i, part in zip(members[name], which, strict=True):
                self.names[i] = parts[part].name

    def shapes(self) -> dict[str, BaseGeometry]:
        """The line of each sub-street by its name, in degrees (lon, lat); those of streets without lines are absent."""
        found = {}
        for part in self.parts:
            if self._axes[part.street].parts:
                metres = self._axes[part.street].shape(part.start_m, part.end_m)
                found[part.name] = shapely.transform(
                    metres, lambda c: np.column_stack(self._streets.to_degrees(c[:, 0], c[:, 1])[::-1])
                )
        return found


@dataclass(frozen=True)
class _Part:
    """A stretch of a street while it is being cut and merged; `left` and `right` are what crosses at its ends."""

    start: float
    end: float
    left: Crossing | None
    right: Crossing | None
    span: int  # of the axis
    places: int = 0  # that count

    @property
    def length(self) -> float:
        return self.end - self.start

    @property
    def bounds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c.name for c in (self.left, self.right) if c))


def _partition(
    street: str, axis: Axis, crossings: list[Crossing], x: NDArray, y: NDArray, counted: NDArray, config: PartitionConfig
) -> tuple[list[SubStreet], NDArray[np.int64]]:
    """The sub-streets of one street that have places, and which of them each place is on."""
    if not axis.parts:
        return [SubStreet(street, street, (), 0.0, 0.0, int(counted.sum()))], np.zeros(len(x), dtype=int)
    at = axis.locate(x, y)
    parts = _merge(_cut(axis, crossings, config.gap_m), lambda p: p.length < config.gap_m, lambda p: p.length)
    which = np.searchsorted([p.start for p in parts], at, side="right") - 1
    places, all_places = Counter(which[counted].tolist()), set(which.tolist())
    parts = [replace(p, places=places[i]) for i, p in enumerate(parts) if i in all_places]
    parts = _merge(parts, lambda p: p.places < config.min_places, lambda p: p.places)
    parts, names = _named(street, axis, parts)
    found = [SubStreet(street, n, p.bounds, p.start, p.end, p.places) for p, n in zip(parts, names, strict=True)]
    return found, np.searchsorted([p.start for p in parts], at, side="right") - 1


def _cut(axis: Axis, crossings: list[Crossing], gap: float) -> list[_Part]:
    """The stretches between crossings, each as long as the gap at least unless the run of lines it is on is shorter."""
    parts: list[_Part] = []
    for span, (begin, end) in enumerate(axis.spans):
        here = [c for c in crossings if begin <= c.at <= end]
        left = next((c for c in here if c.at - begin < gap), None)
        near_end = [c for c in here if end - c.at < gap]
        last = next((c for c in near_end if round(c.at) == round(near_end[-1].at)), None)
        for crossing in here:
            if crossing.at - begin >= gap and end - crossing.at >= gap:
                parts.append(_Part(begin, crossing.at, left, crossing, span))
                begin, left = crossing.at, crossing
        parts.append(_Part(begin, end, left, last, span))
    return parts


def _merge(parts: list[_Part], small: Callable[[_Part], bool], size: Callable[[_Part], float]) -> list[_Part]:
    """Parts in order, with each small one joined to its smaller neighbour, on the same run of lines if there is one."""
    parts = list(parts)
    while len(parts) > 1:
        candidates = [i for i, part in enumerate(parts) if small(part)]
        if not candidates:
            break
        i = min(candidates, key=lambda i: (size(parts[i]), i))
        beside = [j for j in (i - 1, i + 1) if 0 <= j < len(parts)]
        _join(parts, i, min(beside, key=lambda j: (parts[j].span != parts[i].span, size(parts[j]), j)))
    return parts


def _join(parts: list[_Part], i: int, j: int) -> None:
    """Put one part in the place of two neighbours."""
    a, b = parts[min(i, j)], parts[max(i, j)]
    parts[min(i, j) : max(i, j) + 1] = [_Part(a.start, b.end, a.left, b.right, parts[j].span, a.places + b.places)]


def _named(street: str, axis: Axis, parts: list[_Part]) -> tuple[list[_Part], list[str]]:
    """The parts with names that tell them apart; parts that no name tells apart are joined."""
    parts = list(parts)
    while True:
        names = [_name(street, part) for part in parts]
        shared = {name for name, n in Counter(names).items() if n > 1}
        names = [_by_side(street, axis, p) if n in shared else n for p, n in zip(parts, names, strict=True)]
        again = next((i for i, name in enumerate(names) if name in names[:i]), None)
        if again is None:
            return parts, names
        _join(parts, again, again - 1)


def _name(street: str, part: _Part) -> str:
    if len(part.bounds) == 2:
        return f"{street} between {part.bounds[0]} and {part.bounds[1]}"
    return f"{street} from {part.bounds[0]} on" if part.bounds else street


def _by_side(street: str, axis: Axis, part: _Part) -> str:
    """`Forbes Avenue west of Atwood Street`, where that is the only street that bounds it."""
    if len(part.bounds) != 1:
        return _name(street, part)
    crossing = part.left or part.right
    middle = shapely.centroid(axis.shape(part.start, part.end))
    angle = math.degrees(math.atan2(middle.y - crossing.y, middle.x - crossing.x)) if crossing else 0.0
    return f"{street} {SIDES[round(angle / 90) % 4]} of {part.bounds[0]}"
