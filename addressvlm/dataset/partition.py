"""Semantic address partition: streets cut into sub-streets at intersections (paper 002, Sec. 4.1 and A.2).

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

PARALLEL_M = 35.0  # a carriageway, spur or slip road that stays this near to the axis is part of it
STEP_M = 20.0  # between the points at which that is checked
MAX_HOLE_M = 150.0  # parts further apart than this are separate spans: another street of the same name, maybe
VERTEX_M = 0.05  # two lines have a node here if a vertex of one of them is this near to where they meet
DIRECTIONS = ("east", "north", "west", "south")


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


class StreetPartition:
    """The partition of a city's streets, made for its places.

    Attributes:
        names: the sub-street of each place, in the order of the arguments.
        sub_streets: those that have places, by street and in order along it.
    """

    def __init__(
        self, streets: StreetMap, config: PartitionConfig, street: Sequence[str], x: ArrayLike, y: ArrayLike,
        counts: ArrayLike | None = None,
    ) -> None:  # fmt: skip
        """Cut the streets of N places.

        At first a street is cut at each crossing that is at least `gap_m` from the cut before it and from the street's end
        (a crossing nearer to the end names it). Then sub-streets with fewer than `min_places` places are merged, the
        emptiest first and with the emptier neighbour, until there are none or the street is one piece. Parts without any
        place are skipped and get no name.

        Args:
            street: (N,) names as in `streets.street_names`; a street without lines there is not cut.
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
        self.sub_streets: list[SubStreet] = []
        for name in sorted(members):
            places = np.array(members[name])
            axis = self._axes[name] = StreetAxis(lines[name])
            on_street = crossings.on_street(name, axis)
            sub_streets, index = _partition(name, axis, on_street, x[places], y[places], counted[places], config)
            self.sub_streets += sub_streets
            for i, sub_street in zip(members[name], index, strict=True):
                self.names[i] = sub_streets[sub_street].name

    def shapes(self) -> dict[str, BaseGeometry]:
        """The line of each sub-street by its name, in degrees (lon, lat); those of streets without lines are absent."""
        shapes = {}
        for sub_street in self.sub_streets:
            if self._axes[sub_street.street].parts:
                metres = self._axes[sub_street.street].substring(sub_street.start_m, sub_street.end_m)
                shapes[sub_street.name] = shapely.transform(
                    metres, lambda c: np.column_stack(self._streets.to_degrees(c[:, 0], c[:, 1])[::-1])
                )
        return shapes


@dataclass(frozen=True)
class Crossing:
    """Where another street meets this one."""

    along_m: float  # position on this street's axis
    name: str
    x: float
    y: float


@dataclass(frozen=True)
class _Segment:
    """A stretch of a street while it is being cut and merged, with what crosses at its ends."""

    start: float
    end: float
    start_crossing: Crossing | None
    end_crossing: Crossing | None
    span: int  # of the axis
    places: int = 0  # that count

    @property
    def bounds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c.name for c in (self.start_crossing, self.end_crossing) if c))


def _partition(
    street: str, axis: "StreetAxis", crossings: list[Crossing], x: NDArray, y: NDArray, counted: NDArray,
    config: PartitionConfig,
) -> tuple[list[SubStreet], NDArray[np.int64]]:  # fmt: skip
    """The sub-streets of one street that have places, and the index of the sub-street of each place."""
    if not axis.parts:
        return [SubStreet(street, street, (), 0.0, 0.0, int(counted.sum()))], np.zeros(len(x), dtype=int)
    along = axis.locate(x, y)
    segments = _merge(_cut(axis, crossings, config.gap_m), lambda s: s.end - s.start, config.gap_m)
    index = np.searchsorted([s.start for s in segments], along, side="right") - 1
    places, occupied = Counter(index[counted].tolist()), set(index.tolist())
    segments = [replace(s, places=places[i]) for i, s in enumerate(segments) if i in occupied]
    segments = _merge(segments, lambda s: s.places, config.min_places)
    segments, names = _unique_names(street, axis, segments)
    sub_streets = [SubStreet(street, n, s.bounds, s.start, s.end, s.places) for s, n in zip(segments, names, strict=True)]
    return sub_streets, np.searchsorted([s.start for s in segments], along, side="right") - 1


def _cut(axis: "StreetAxis", crossings: list[Crossing], gap: float) -> list[_Segment]:
    """The stretches between crossings, each at least as long as the gap unless its span is shorter."""
    segments: list[_Segment] = []
    for span, (begin, end) in enumerate(axis.spans):
        on_span = [c for c in crossings if begin <= c.along_m <= end]
        start_crossing = next((c for c in on_span if c.along_m - begin < gap), None)
        near_end = [c for c in on_span if end - c.along_m < gap]
        end_crossing = next((c for c in near_end if round(c.along_m) == round(near_end[-1].along_m)), None)
        for crossing in on_span:
            if crossing.along_m - begin >= gap and end - crossing.along_m >= gap:
                segments.append(_Segment(begin, crossing.along_m, start_crossing, crossing, span))
                begin, start_crossing = crossing.along_m, crossing
        segments.append(_Segment(begin, end, start_crossing, end_crossing, span))
    return segments


def _merge(segments: list[_Segment], size: Callable[[_Segment], float], minimum: float) -> list[_Segment]:
    """Segments in order, those below the minimum joined to their smaller neighbour, on the same span if there is one."""
    segments = list(segments)
    while len(segments) > 1:
        i = min(range(len(segments)), key=lambda i: (size(segments[i]), i))
        if size(segments[i]) >= minimum:
            break
        neighbours = [j for j in (i - 1, i + 1) if 0 <= j < len(segments)]
        _join(segments, i, min(neighbours, key=lambda j: (segments[j].span != segments[i].span, size(segments[j]), j)))
    return segments


def _join(segments: list[_Segment], i: int, j: int) -> None:
    """Replace two neighbours by one segment."""
    a, b = segments[min(i, j)], segments[max(i, j)]
    joined = _Segment(a.start, b.end, a.start_crossing, b.end_crossing, segments[j].span, a.places + b.places)
    segments[min(i, j) : max(i, j) + 1] = [joined]


def _unique_names(street: str, axis: "StreetAxis", segments: list[_Segment]) -> tuple[list[_Segment], list[str]]:
    """The segments with unique names; those that no name distinguishes are joined.

    `Forbes Avenue west of Atwood Street` is for a segment that shares its name and has one bound.
    """
    segments = list(segments)
    while True:
        names = []
        for segment in segments:
            ends = " and ".join(segment.bounds)
            names.append(
                f"{street} between {ends}" if len(segment.bounds) == 2 else f"{street} from {ends} on" if ends else street
            )
        shared = {name for name, n in Counter(names).items() if n > 1}
        for i, segment in enumerate(segments):
            crossing = segment.start_crossing or segment.end_crossing
            if names[i] in shared and len(segment.bounds) == 1 and crossing:
                middle = shapely.centroid(axis.substring(segment.start, segment.end))
                angle = math.degrees(math.atan2(middle.y - crossing.y, middle.x - crossing.x))
                names[i] = f"{street} {DIRECTIONS[round(angle / 90) % 4]} of {crossing.name}"
        repeated = next((i for i, name in enumerate(names) if name in names[:i]), None)
        if repeated is None:
            return segments, names
        _join(segments, repeated, repeated - 1)


class Crossings:
    """Where the streets of a map meet.

    Two lines meet where one of them has a vertex. If most meetings of the map are of this kind, as in OpenStreetMap, the
    others are bridges and tunnels and don't count; in a map that has no such nodes all of them count.
    """

    def __init__(self, streets: StreetMap) -> None:
        lines, codes = np.asarray(streets.lines, dtype=object), np.searchsorted(streets.street_names, streets.names)
        first, second = shapely.STRtree(lines).query(lines, predicate="intersects") if len(lines) else np.zeros((2, 0), int)
        different = codes[first] < codes[second]
        first, second = first[different], second[different]
        xy, pair = shapely.get_coordinates(shapely.intersection(lines[first], lines[second]), return_index=True)
        first, second = first[pair], second[pair]
        vertices = np.array([shapely.multipoints(shapely.get_coordinates(line)) for line in lines], dtype=object)
        points = shapely.points(xy)
        node = np.minimum(shapely.distance(points, vertices[first]), shapely.distance(points, vertices[second])) <= VERTEX_M
        if len(node) and node.mean() > 0.5:
            xy, first, second = xy[node], first[node], second[node]
        self._names = streets.street_names
        both = np.concatenate([xy, xy])
        street, other = codes[np.concatenate([first, second])], codes[np.concatenate([second, first])]
        order = np.lexsort((both[:, 1], both[:, 0], other, street))
        self._xy, self._street, self._other = both[order], street[order], other[order]
        length = np.bincount(codes, shapely.length(lines), len(self._names)) if len(lines) else np.zeros(0)
        self._length = dict(zip(self._names, length.tolist(), strict=True))

    def on_street(self, street: str, axis: "StreetAxis") -> list[Crossing]:
        """The crossings of a street along its axis; of several names at one corner the longest street comes first."""
        code = int(np.searchsorted(self._names, street))
        begin, end = np.searchsorted(self._street, [code, code + 1])
        if begin == end or self._names[code] != street or not axis.parts:
            return []
        xy = self._xy[begin:end]
        along = axis.locate(xy[:, 0], xy[:, 1])
        crossings = [
            Crossing(float(s), self._names[other], float(x), float(y))
            for s, other, (x, y) in zip(along, self._other[begin:end], xy, strict=True)
        ]
        return sorted(crossings, key=lambda c: (round(c.along_m), -self._length[c.name], c.name, c.along_m))


class StreetAxis:
    """One street with a coordinate along it, in metres; it runs from west to east or, if it is steeper, south to north.

    Attributes:
        parts: LineStrings in metres, in order; holes between them count into the coordinate.
        starts: the coordinate at which each part begins.
        spans: (begin, end) of each run of parts that are near each other, in order.
    """

    def __init__(self, shapes: Sequence[BaseGeometry]) -> None:
        """The lines of one street in metres; shapes that are no lines (a square's area) are skipped."""
        pieces = shapely.get_parts(np.array(shapes, dtype=object))
        lines = [p for p in pieces if shapely.get_dimensions(p) == 1 and p.length > 0]
        # joined where exactly two meet, the longest first, whatever the order and direction of the input
        joined = shapely.normalize(shapely.get_parts(shapely.line_merge(shapely.union_all(shapely.normalize(lines)))))
        longest_first = sorted(joined, key=lambda line: (-round(line.length, 3), line.wkb))
        self.parts = _align(_drop_parallel(longest_first)) if lines else []
        self.starts: list[float] = []
        self.spans: list[tuple[float, float]] = []
        end = 0.0
        for i, part in enumerate(self.parts):
            hole = math.dist(self.parts[i - 1].coords[-1], part.coords[0]) if i else 0.0
            new_span = i == 0 or shapely.distance(self.parts[i - 1], part) > MAX_HOLE_M
            self.starts.append(end + hole)
            end += hole + part.length
            if new_span:
                self.spans.append((self.starts[-1], end))
            else:
                self.spans[-1] = (self.spans[-1][0], end)

    def locate(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """The coordinate of the point of the axis that is nearest to each of N points."""
        points = shapely.points(x, y)
        distance = np.array([shapely.distance(points, part) for part in self.parts])
        nearest = distance.argmin(axis=0)
        along = np.array([shapely.line_locate_point(part, points) for part in self.parts])
        return along[nearest, np.arange(len(points))] + np.array(self.starts)[nearest]

    def substring(self, start: float, end: float) -> BaseGeometry:
        """The axis between two coordinates, in metres."""
        pieces = [
            shapely.ops.substring(part, max(start - begin, 0.0), min(end - begin, part.length))
            for part, begin in zip(self.parts, self.starts, strict=True)
            if begin <= end and start <= begin + part.length
        ]
        return shapely.union_all([p for p in pieces if p.length > 0] or pieces)


def _drop_parallel(lines: list[BaseGeometry]) -> list[BaseGeometry]:
    """The stretches of the lines that are not beside a longer line or, after a turn, beside an earlier stretch."""
    axis: list[BaseGeometry] = []
    for line in lines:
        count = math.ceil(line.length / STEP_M)
        ends = np.linspace(0, line.length, count + 1)
        middle = (ends[1:] + ends[:-1]) / 2
        points = shapely.line_interpolate_point(line, middle)
        xy = shapely.get_coordinates(points)
        earlier = middle[:, None] - middle[None, :] > 3 * PARALLEL_M
        parallel = (earlier & (np.linalg.norm(xy[:, None] - xy[None, :], axis=2) <= PARALLEL_M)).any(axis=1)
        if axis:
            parallel |= shapely.distance(points, shapely.multilinestrings(axis)) <= PARALLEL_M
            for begin, end in _runs(~parallel):
                parallel[begin:end] |= ends[end] - ends[begin] < PARALLEL_M
        if not parallel.all():  # where a stretch leaves the axis it begins at the axis
            for begin, end in _runs(parallel):
                parallel[begin:end] &= ends[end] - ends[begin] >= 2 * PARALLEL_M
        axis += [shapely.ops.substring(line, ends[begin], ends[end]) for begin, end in _runs(~parallel)]
    return axis


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(begin, end) of each run of True."""
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    return [(int(begin), int(end)) for begin, end in changes.reshape(-1, 2)]


def _align(lines: list[BaseGeometry]) -> list[BaseGeometry]:
    """The lines in order from one end of the street to the other, each in that direction."""
    points = np.concatenate([shapely.get_coordinates(shapely.segmentize(line, STEP_M)) for line in lines])
    _, vectors = np.linalg.eigh(np.cov((points - points.mean(axis=0)).T))
    direction = vectors[:, -1]
    direction = direction * np.sign(direction[np.abs(direction).argmax()])

    def along(line: BaseGeometry, share: float) -> float:
        point = shapely.line_interpolate_point(line, share, normalized=True)
        return float(np.dot(shapely.get_coordinates(point)[0], direction))

    aligned = [line if along(line, 1) >= along(line, 0) else shapely.reverse(line) for line in lines]
    return sorted(aligned, key=lambda line: (along(line, 0.5), line.wkb))
