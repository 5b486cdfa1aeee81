"""A street as one measured line, and the places where other streets cross it: what the address partition is cut along.

Streets are seldom one clean line. Carriageways run side by side, parts are missing, spurs and loops hang on; here the
longest lines become the axis, what runs beside them is measured on them, and the parts are laid end to end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
import shapely.ops
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from addressvlm.cities.streets import StreetMap

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


class Axis:
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

    def of(self, street: str, axis: Axis) -> list[Crossing]:
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
