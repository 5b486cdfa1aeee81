"""A street as one measured line, and the places where other streets cross it: what the address partition is cut along.

Streets are seldom one clean line. Carriageways run side by side, parts are missing, spurs and loops hang on; here the
longest lines become the axis, what runs beside them is measured on them, and the parts are laid end to end.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import shapely
import shapely.ops
from numpy.typing import ArrayLike, NDArray
from shapely.geometry.base import BaseGeometry

from addressvlm.config.city import PartitionConfig
from addressvlm.dataset.streets import StreetMap

BESIDE_M = 35.0  # a carriageway, spur or slip road that stays this near to the axis is part of it
STEP_M = 20.0  # between the points at which that is looked at
APART_M = 150.0  # parts further apart than this are pieces of their own: another street of the same name, maybe
VERTEX_M = 0.05  # two lines have a node here if a vertex of one of them is this near to where they meet


@dataclass(frozen=True)
class Crossing:
    """Where another street meets this one, in metres along it."""

    at: float
    name: str
    x: float
    y: float


class StreetAxis:
    """One street with a coordinate along it, in metres; it runs from west to east or, if it is steeper, south to north.

    Attributes:
        parts: LineStrings in metres, in order; holes between them count into the coordinate.
        starts: the coordinate at which each part begins.
        spans: (begin, end) of each run of parts that are near each other, in order.
    """

    def __init__(self, shapes: Sequence[BaseGeometry]) -> None:
        """The lines of one street in metres; shapes that are no lines (a square's area) are left out."""
        pieces = shapely.get_parts(np.array(shapes, dtype=object))
        lines = [p for p in pieces if shapely.get_dimensions(p) == 1 and p.length > 0]
        self.parts = _in_order(_without_beside(_merged(lines))) if lines else []
        self.starts: list[float] = []
        self.spans: list[tuple[float, float]] = []
        end = 0.0
        for i, part in enumerate(self.parts):
            hole = math.dist(self.parts[i - 1].coords[-1], part.coords[0]) if i else 0.0
            apart = i > 0 and shapely.distance(self.parts[i - 1], part) > APART_M
            self.starts.append(end + hole)
            end += hole + part.length
            if apart or not i:
                self.spans.append((self.starts[-1], end))
            else:
                self.spans[-1] = (self.spans[-1][0], end)

    def locate(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """The coordinate of the point of the axis that is nearest to each of N points."""
        points = shapely.points(x, y)
        distance = np.array([shapely.distance(points, part) for part in self.parts])
        which = distance.argmin(axis=0)
        along = np.array([shapely.line_locate_point(part, points) for part in self.parts])
        return along[which, np.arange(len(points))] + np.array(self.starts)[which]

    def shape(self, start: float, end: float) -> BaseGeometry:
        """The axis between two coordinates, in metres."""
        cut = [
            shapely.ops.substring(part, max(start - begin, 0.0), min(end - begin, part.length))
            for part, begin in zip(self.parts, self.starts, strict=True)
            if begin <= end and start <= begin + part.length
        ]
        return shapely.union_all([c for c in cut if c.length > 0] or cut)


def _merged(lines: Sequence[BaseGeometry]) -> list[BaseGeometry]:
    """Lines joined where exactly two meet, the longest first; the order and direction of the input don't matter."""
    joined = shapely.get_parts(shapely.line_merge(shapely.union_all(shapely.normalize(lines))))
    return sorted(shapely.normalize(joined), key=lambda line: (-round(line.length, 3), line.wkb))


def _without_beside(lines: list[BaseGeometry]) -> list[BaseGeometry]:
    """The stretches of the lines that are not beside a longer line or, after a turn, beside an earlier stretch."""
    kept: list[BaseGeometry] = []
    for line in lines:
        count = math.ceil(line.length / STEP_M)
        ends = np.linspace(0, line.length, count + 1)
        middle = (ends[1:] + ends[:-1]) / 2
        points = shapely.line_interpolate_point(line, middle)
        xy = shapely.get_coordinates(points)
        earlier = middle[:, None] - middle[None, :] > 3 * BESIDE_M
        beside = (earlier & (np.linalg.norm(xy[:, None] - xy[None, :], axis=2) <= BESIDE_M)).any(axis=1)
        if kept:
            beside |= shapely.distance(points, shapely.multilinestrings(kept)) <= BESIDE_M
            for begin, end in _runs(~beside):
                beside[begin:end] |= ends[end] - ends[begin] < BESIDE_M
        if not beside.all():  # where a stretch leaves the axis it begins at the axis
            for begin, end in _runs(beside):
                beside[begin:end] &= ends[end] - ends[begin] >= 2 * BESIDE_M
        kept += [shapely.ops.substring(line, ends[begin], ends[end]) for begin, end in _runs(~beside)]
    return kept


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(begin, end) of each run of True."""
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    return [(int(begin), int(end)) for begin, end in changes.reshape(-1, 2)]


def _in_order(lines: list[BaseGeometry]) -> list[BaseGeometry]:
    """The lines from one end of the street to the other, each in that direction."""
    points = np.concatenate([shapely.get_coordinates(shapely.segmentize(line, STEP_M)) for line in lines])
    _, vectors = np.linalg.eigh(np.cov((points - points.mean(axis=0)).T))
    direction = vectors[:, -1]
    direction = direction * np.sign(direction[np.abs(direction).argmax()])

    def along(line: BaseGeometry, at: float) -> float:
        return float(np.dot(shapely.get_coordinates(shapely.line_interpolate_point(line, at, normalized=True))[0], direction))

    facing = [line if along(line, 1) >= along(line, 0) else shapely.reverse(line) for line in lines]
    return sorted(facing, key=lambda line: (along(line, 0.5), line.wkb))


class Crossings:
    """Where the streets of a map meet.

    Two lines meet where one of them has a vertex. If most meetings of the map are of this kind, as in OpenStreetMap, the
    others are bridges and tunnels and don't count; in a map that has no such nodes all of them count.
    """

    def __init__(self, streets: StreetMap) -> None:
        lines, codes = np.asarray(streets.lines, dtype=object), np.searchsorted(streets.street_names, streets.names)
        first, second = shapely.STRtree(lines).query(lines, predicate="intersects") if len(lines) else np.zeros((2, 0), int)
        other = codes[first] < codes[second]
        first, second = first[other], second[other]
        xy, pair = shapely.get_coordinates(shapely.intersection(lines[first], lines[second]), return_index=True)
        first, second = first[pair], second[pair]
        vertices = np.array([shapely.multipoints(shapely.get_coordinates(line)) for line in lines], dtype=object)
        points = shapely.points(xy)
        node = np.minimum(shapely.distance(points, vertices[first]), shapely.distance(points, vertices[second])) <= VERTEX_M
        if len(node) and node.mean() > 0.5:
            xy, first, second = xy[node], first[node], second[node]
        self._names = streets.street_names
        self._xy = np.concatenate([xy, xy])
        self._street = np.concatenate([codes[first], codes[second]])
        self._other = np.concatenate([codes[second], codes[first]])
        order = np.lexsort((self._xy[:, 1], self._xy[:, 0], self._other, self._street))
        self._xy, self._street, self._other = self._xy[order], self._street[order], self._other[order]
        length = np.bincount(codes, shapely.length(lines), len(self._names)) if len(lines) else np.zeros(0)
        self._length = dict(zip(self._names, length.tolist(), strict=True))

    def of(self, street: str, axis: StreetAxis) -> list[Crossing]:
        """The crossings of a street along its axis; of several names at one corner the longest street comes first."""
        code = int(np.searchsorted(self._names, street))
        begin, end = np.searchsorted(self._street, [code, code + 1])
        if begin == end or self._names[code] != street or not axis.parts:
            return []
        xy = self._xy[begin:end]
        at = axis.locate(xy[:, 0], xy[:, 1])
        found = [
            Crossing(float(s), self._names[other], float(x), float(y))
            for s, other, (x, y) in zip(at, self._other[begin:end], xy, strict=True)
        ]
        return sorted(found, key=lambda c: (round(c.at), -self._length[c.name], c.name, c.at))


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
        self._axes: dict[str, StreetAxis] = {}
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
            axis = self._axes[name] = StreetAxis(lines[name])
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
class _StreetPart:
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
    street: str, axis: StreetAxis, crossings: list[Crossing], x: NDArray, y: NDArray, counted: NDArray, config: PartitionConfig
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


def _cut(axis: StreetAxis, crossings: list[Crossing], gap: float) -> list[_StreetPart]:
    """The stretches between crossings, each as long as the gap at least unless the run of lines it is on is shorter."""
    parts: list[_StreetPart] = []
    for span, (begin, end) in enumerate(axis.spans):
        here = [c for c in crossings if begin <= c.at <= end]
        left = next((c for c in here if c.at - begin < gap), None)
        near_end = [c for c in here if end - c.at < gap]
        last = next((c for c in near_end if round(c.at) == round(near_end[-1].at)), None)
        for crossing in here:
            if crossing.at - begin >= gap and end - crossing.at >= gap:
                parts.append(_StreetPart(begin, crossing.at, left, crossing, span))
                begin, left = crossing.at, crossing
        parts.append(_StreetPart(begin, end, left, last, span))
    return parts


def _merge(
    parts: list[_StreetPart], small: Callable[[_StreetPart], bool], size: Callable[[_StreetPart], float]
) -> list[_StreetPart]:
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


def _join(parts: list[_StreetPart], i: int, j: int) -> None:
    """Put one part in the place of two neighbours."""
    a, b = parts[min(i, j)], parts[max(i, j)]
    parts[min(i, j) : max(i, j) + 1] = [_StreetPart(a.start, b.end, a.left, b.right, parts[j].span, a.places + b.places)]


def _named(street: str, axis: StreetAxis, parts: list[_StreetPart]) -> tuple[list[_StreetPart], list[str]]:
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


def _name(street: str, part: _StreetPart) -> str:
    if len(part.bounds) == 2:
        return f"{street} between {part.bounds[0]} and {part.bounds[1]}"
    return f"{street} from {part.bounds[0]} on" if part.bounds else street


def _by_side(street: str, axis: StreetAxis, part: _StreetPart) -> str:
    """`Forbes Avenue west of Atwood Street`, where that is the only street that bounds it."""
    if len(part.bounds) != 1:
        return _name(street, part)
    crossing = part.left or part.right
    middle = shapely.centroid(axis.shape(part.start, part.end))
    angle = math.degrees(math.atan2(middle.y - crossing.y, middle.x - crossing.x)) if crossing else 0.0
    return f"{street} {SIDES[round(angle / 90) % 4]} of {part.bounds[0]}"
