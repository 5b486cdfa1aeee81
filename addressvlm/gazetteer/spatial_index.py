"""Nearest-neighbour search among named geometries, and among the streets around millions of points."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

METRES_PER_DEGREE = 111_320.0
FIRST_RADIUS_M = 250.0  # doubled until enough names are within


class NearestNames:
    """The nearest names of a name or point; names without a geometry come last."""

    def __init__(self, names: Sequence[str], geometry: Mapping[str, BaseGeometry]) -> None:
        """`geometry` in degrees (lon, lat)."""
        self._names = list(names)
        self._located = [name for name in self._names if name in geometry]
        self._shapes = np.array([geometry[name] for name in self._located], dtype=object)
        self._index = {name: i for i, name in enumerate(self._located)}
        self._tree = shapely.STRtree(self._shapes)
        self._cache: dict[str, list[str]] = {}

    def nearest(self, name: str, k: int) -> list[str]:
        """Up to k other names, nearest first, ties in the order of the names."""
        if name not in self._cache or len(self._cache[name]) < min(k, len(self._names) - 1):
            self._cache[name] = self._search(name, k)
        return self._cache[name][:k]

    def within(self, lat: float, lon: float, metres: float) -> set[str]:
        """The names whose geometry is at most that far from a point."""
        near, distances = self._candidates(shapely.Point(lon, lat), metres)
        return {self._located[i] for i in near[distances <= metres]}

    def _search(self, name: str, k: int) -> list[str]:
        neighbours: list[str] = []
        if name in self._index:
            index, radius, near, distances = self._index[name], FIRST_RADIUS_M, np.zeros(0, dtype=np.int64), np.zeros(0)
            while (distances <= radius).sum() <= k and len(near) < len(self._located):
                radius *= 2
                near, distances = self._candidates(self._shapes[index], radius)
            neighbours = [self._located[i] for i in near[np.lexsort((near, distances))] if i != index][:k]
        if len(neighbours) < k:
            used = {name, *neighbours}
            rest = self._names if name not in self._index else [other for other in self._names if other not in self._index]
            neighbours += [other for other in rest if other not in used]
        return neighbours[:k]

    def _candidates(self, shape: BaseGeometry, metres: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """At least all shapes within a distance of one, and their distances in metres on a local plane."""
        squeeze = max(math.cos(math.radians(shapely.centroid(shape).y)), 0.01)
        west, south, east, north = shapely.bounds(shape)
        dx, dy = metres / (METRES_PER_DEGREE * squeeze), metres / METRES_PER_DEGREE
        near = np.sort(self._tree.query(shapely.box(west - dx, south - dy, east + dx, north + dy)))
        scale = [METRES_PER_DEGREE * squeeze, METRES_PER_DEGREE]
        here, there = (shapely.transform(s, lambda c: c * scale) for s in (shape, self._shapes[near]))
        return near, shapely.distance(here, there)


Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Groups = tuple[Ints, Ints, Floats]  # point, code, metres: sorted by point, then code; each pair once

CELL_M = 24.0
RADIUS_M = CELL_M / 2**0.5  # of the circle around a cell
FIRST_CELL_RADIUS_M = 100.0  # most cells have their two nearest streets within
CELLS_PER_BATCH = 2048
PAIRS_PER_BATCH = 1 << 20  # pairs of a point and a segment: bounds the memory
ROUND = 2  # decimals (cm), so that both streets of a corner are equally near
ROUND_M = 0.01


class NearestStreets:
    """The nearest of many shapes in metres, each with a code; a street may have many shapes. Inside an area it is 0 m."""

    def __init__(self, shapes: NDArray[np.object_], codes: Ints) -> None:
        self._codes = np.asarray(codes, dtype=np.int64)
        self._tree = shapely.STRtree(shapes)
        areas = np.flatnonzero(shapely.get_dimensions(shapes) == 2)
        self._area_tree, self._area_codes = shapely.STRtree(shapes[areas]), self._codes[areas]
        self._begin, self._segments = _segments(shapes)

    def nearest_two(self, x: Floats, y: Floats, limit_m: float) -> tuple[NDArray[np.int32], Floats, NDArray[np.int32], Floats]:
        """The nearest code and the next other one of N points: (code, metres, code, metres), -1 and inf where there is none."""
        codes, metres = np.full((2, len(x)), -1, dtype=np.int32), np.full((2, len(x)), np.inf)
        for groups in self._groups(x, y, limit_m, only_two=True):
            point, two_codes, two_metres = _first_two(*groups)
            codes[:, point], metres[:, point] = two_codes, two_metres
        inside, code = self._inside(x, y)
        if len(inside):
            points = np.unique(inside)
            nearest = [(points, codes[i, points], metres[i, points]) for i in (0, 1)]
            groups = _distinct(*_concatenate([*nearest, (inside, code, np.zeros(len(inside)))]))
            point, two_codes, two_metres = _first_two(*groups)
            codes[:, point], metres[:, point] = two_codes, two_metres
        return codes[0], metres[0], codes[1], metres[1]

    def within(self, x: Floats, y: Floats, limit_m: float) -> Groups:
        """Every code within the limit of each of N points: (point, code, metres), sorted by point, metres, code."""
        inside, code = self._inside(x, y)
        groups = _concatenate([*self._groups(x, y, limit_m, only_two=False), (inside, code, np.zeros(len(inside)))])
        point, code, metres = _distinct(*groups) if len(inside) else groups
        order = np.lexsort((code, metres, point))
        return point[order], code[order], metres[order]

    def _inside(self, x: Floats, y: Floats) -> tuple[Ints, Ints]:
        """The points inside an area, and the code of the area."""
        if not len(self._area_codes):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        point, area = self._area_tree.query(shapely.points(x, y), predicate="intersects")
        return point, self._area_codes[area]

    def _groups(self, x: Floats, y: Floats, limit_m: float, only_two: bool) -> Iterator[Groups]:
        """The codes within the limit (or at least the two nearest), by distance to their segments."""
        order, starts, centres = _cells(x, y)
        for first in range(0, len(centres), CELLS_PER_BATCH):
            begin, segments = self._candidates(centres[first : first + CELLS_PER_BATCH], limit_m, only_two)
            bounds = starts[first : first + len(begin)]
            points = order[bounds[0] : bounds[-1]]
            cell = np.repeat(np.arange(len(begin) - 1), np.diff(bounds))
            last_pair = np.cumsum(np.diff(begin)[cell])
            splits = np.searchsorted(last_pair, np.arange(PAIRS_PER_BATCH, last_pair[-1], PAIRS_PER_BATCH))
            for batch, cells in zip(np.split(points, splits), np.split(cell, splits), strict=True):
                row, pair = _expand(begin, cells)
                if len(row):
                    segment, point = segments[pair], batch[row]
                    metres = self._distance(x[point], y[point], segment)
                    point, code, metres = _least(point, self._codes[self._segments["shape"][segment]], metres)
                    near = metres <= limit_m
                    yield point[near], code[near], np.round(metres[near], ROUND)

    def _candidates(self, centres: Floats, limit_m: float, only_two: bool) -> tuple[Ints, Ints]:
        """The segments that can be nearest to a point of each cell, as (begin, segments): those of cell i start at begin[i].

        If the second nearest street is s from the centre, it is at most s + radius from any point of the cell, so a segment
        further than s + 2 radius from the centre is never among the two nearest. The search widens until it covers that.
        """
        furthest = limit_m + RADIUS_M
        reach = min(FIRST_CELL_RADIUS_M, furthest) if only_two else furthest
        pending = np.arange(len(centres))
        results: list[tuple[Ints, Ints]] = []
        while len(pending):
            here = shapely.points(centres[pending])
            row, shape = self._tree.query(here, predicate="dwithin", distance=reach)
            pair, segment = _expand(self._begin, shape)
            row = row[pair]
            x, y = centres[pending[row]].T
            metres = self._distance(x, y, segment)
            order = np.lexsort((self._codes[self._segments["shape"][segment]], row))
            row, segment, metres = row[order], segment[order], metres[order]
            bound = np.full(len(pending), np.inf)
            if only_two and len(row):
                at, _, nearest = _first_two(*_least(row, self._codes[self._segments["shape"][segment]], metres))
                bound[at] = nearest[1] + 2 * RADIUS_M + ROUND_M
            final = (bound <= reach) | (reach >= furthest)
            keep = final[row] & (metres <= np.minimum(bound, furthest)[row])
            results.append((pending[row[keep]], segment[keep]))
            pending = pending[~final]
            reach = min(2 * reach, furthest)
        cell, segment = (np.concatenate(column) for column in zip(*results, strict=True))
        order = np.argsort(cell, kind="stable")
        begin = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=len(centres)))])
        return begin, segment[order]

    def _distance(self, x: Floats, y: Floats, segment: Ints) -> Floats:
        """Metres from each point to the segment of the same index."""
        s = self._segments
        dx, dy = s["dx"][segment], s["dy"][segment]
        x, y = x - s["x"][segment], y - s["y"][segment]
        along = np.clip((x * dx + y * dy) * s["inverse"][segment], 0, 1)
        return np.hypot(x - along * dx, y - along * dy)


def _segments(shapes: NDArray[np.object_]) -> tuple[Ints, dict[str, NDArray]]:
    """Shapes as segments: (begin, columns), those of shape i start at begin[i]; a point is a segment of length 0."""
    parts, owner = shapely.get_parts(shapes, return_index=True)
    rings, part = shapely.get_rings(parts, return_index=True)
    others = np.flatnonzero(shapely.get_dimensions(parts) < 2)
    pieces = np.concatenate([parts[others], rings])
    of_piece = np.concatenate([owner[others], owner[part]])
    xy, piece = shapely.get_coordinates(pieces, return_index=True)
    follows = np.zeros(len(piece), dtype=bool)
    follows[:-1] = piece[1:] == piece[:-1]
    alone = ~follows
    alone[1:] &= ~follows[:-1]
    start = np.flatnonzero(follows | alone)
    end = np.where(alone[start], start, start + 1)
    shape = of_piece[piece[start]]
    order = np.argsort(shape, kind="stable")
    start, end, shape = start[order], end[order], shape[order]
    (dx, dy), (x, y) = (xy[end] - xy[start]).T, xy[start].T
    square = dx * dx + dy * dy
    inverse = np.divide(1, square, out=np.zeros_like(square), where=square > 0)
    begin = np.concatenate([[0], np.cumsum(np.bincount(shape, minlength=len(shapes)))])
    return begin, {"x": x.copy(), "y": y.copy(), "dx": dx.copy(), "dy": dy.copy(), "inverse": inverse, "shape": shape}


def _cells(x: Floats, y: Floats) -> tuple[Ints, Ints, Floats]:
    """Points by cell: (order that sorts them, start of each cell in it and the end of the last, centres (C, 2) in metres).

    Points that are not finite are in no cell.
    """
    finite = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if not len(finite):
        return finite, np.zeros(1, dtype=np.int64), np.zeros((0, 2))
    column, row = (np.floor(v[finite] / CELL_M).astype(np.int64) for v in (x, y))
    lowest, width = column.min(), np.ptp(column) + 1
    key = row * width + (column - lowest)
    order = np.argsort(key)
    key = key[order]
    first = np.flatnonzero(_changes(key))
    row, column = np.divmod(key[first], width)
    return finite[order], np.append(first, len(key)), (np.column_stack([column + lowest, row]) + 0.5) * CELL_M


def _expand(begin: Ints, rows: Ints) -> tuple[Ints, Ints]:
    """The members of the lists `rows`, list r being stored from begin[r] on: (index into rows, position)."""
    lengths = begin[rows + 1] - begin[rows]
    index = np.repeat(np.arange(len(rows)), lengths)
    return index, np.arange(len(index)) + np.repeat(begin[rows] - np.cumsum(lengths) + lengths, lengths)


def _changes(values: NDArray) -> NDArray[np.bool_]:
    """Where a value differs from the one before it; the first always does."""
    return np.concatenate([[True], values[1:] != values[:-1]])


def _least(point: Ints, code: Ints, metres: Floats) -> Groups:
    """The least distance of each run of equal point and code; the columns must not be empty."""
    start = np.flatnonzero(_changes(point) | _changes(code))
    return point[start], code[start], np.minimum.reduceat(metres, start)


def _distinct(point: Ints, code: Ints, metres: Floats) -> Groups:
    """The least distance of each point and code, in any order."""
    order = np.lexsort((code, point))
    return _least(point[order], code[order], metres[order])


def _concatenate(groups: list[Groups]) -> Groups:
    point, code, metres = (np.concatenate(column) for column in zip(*groups, strict=True))
    return point, code, metres


def _first_two(point: Ints, code: Ints, metres: Floats) -> tuple[Ints, Ints, Floats]:
    """The points of the groups, and the codes (2, P) and metres (2, P) of their two nearest; the lower code wins a tie."""
    start = np.flatnonzero(_changes(point)) if len(point) else np.zeros(0, dtype=np.int64)
    codes, nearest = np.full((2, len(start)), -1), np.full((2, len(start)), np.inf)
    if not len(start):
        return point, codes, nearest
    metres, positions = metres.copy(), np.arange(len(metres))
    lengths = np.diff(np.append(start, len(point)))
    for rank in (0, 1):
        nearest[rank] = np.minimum.reduceat(metres, start)
        at = np.minimum.reduceat(np.where(metres == np.repeat(nearest[rank], lengths), positions, len(metres)), start)
        codes[rank] = np.where(np.isfinite(nearest[rank]), code[at], -1)
        metres[at] = np.inf
    return point[start], codes, nearest
