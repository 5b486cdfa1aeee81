"""The district around each of very many points, at the speed of `NearIndex`."""

from collections.abc import Callable

import numpy as np
import shapely
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DISTRICT_TOLERANCE_M = 50.0  # a point in a gap or just off the edge (a quay, a bridge) belongs to the polygon beside it
CELL_DEG = 0.0006  # 67 m from south to north
MOST_CELLS = 1 << 22  # of a whole country they are larger
METRE_DEG = 1 / 110_574  # the most degrees of latitude that a metre is
FAR_M = 1e9  # where a point is that the projection can't place
NONE, SEVERAL, UNKNOWN = -1, -2, -3  # of a cell: no district near, points must be looked at, cell hasn't been looked at


class DistrictIndex:
    """Polygons under a grid of degrees: most points are in a cell that is in one polygon altogether."""

    def __init__(
        self, degrees: NDArray[np.object_], metres: NDArray[np.object_], to_metres: Callable[..., tuple[Floats, Floats]]
    ) -> None:
        """The same polygons twice, in degrees (lon, lat) and on the plane of `to_metres` (lat, lon -> x, y)."""
        self._degrees, self._metres, self._to_metres = degrees, metres, to_metres
        self._areas = shapely.area(metres)
        shapely.prepare(degrees)
        self._tree, self._tree_metres = shapely.STRtree(degrees), shapely.STRtree(metres)
        west, south, east, north = shapely.total_bounds(degrees) if len(degrees) else (0.0, 0.0, 0.0, 0.0)
        squeeze = np.cos(np.radians(max(abs(south), abs(north))))
        self._margin = DISTRICT_TOLERANCE_M * METRE_DEG / max(squeeze, 0.01)  # in degrees, too much rather than too little
        self._corner = np.array([west, south])
        self._side = max(CELL_DEG, float(np.sqrt((east - west) * (north - south) / MOST_CELLS)))
        shape = [int(length / self._side) + 1 for length in (east - west, north - south)]
        self._cells = np.full(shape, UNKNOWN, np.int32)

    def codes(self, lat: Floats, lon: Floats) -> NDArray[np.int32]:
        """For N points the position of the polygon around each, the smallest if they overlap, or of the one beside it.

        -1 for a point further than the tolerance from all of them.
        """
        if not len(self._degrees):
            return np.full(len(lat), NONE, dtype=np.int32)
        columns, rows = self._cells.shape
        column, row = ((v - c) / self._side for v, c in zip((lon, lat), (*self._corner,), strict=True))
        inside = (column >= 0) & (row >= 0) & (column < columns) & (row < rows)
        cell = np.where(inside, column, 0).astype(np.int64) * rows + np.where(inside, row, 0).astype(np.int64)
        self._look_at(cell)
        codes = np.where(inside, self._cells.ravel()[cell], np.int32(SEVERAL))
        rest = np.flatnonzero(codes == SEVERAL)
        codes[rest] = self._around(lat[rest], lon[rest])
        beside = rest[codes[rest] < 0]
        codes[beside] = self._beside(lat[beside], lon[beside])
        return codes

    def _look_at(self, cell: NDArray[np.int64]) -> None:
        """Find what there is to know about the cells that haven't been looked at."""
        known = self._cells.ravel()
        new = np.unique(cell[known[cell] == UNKNOWN])
        if not len(new):
            return
        column, row = np.divmod(new, self._cells.shape[1])
        west, south = self._corner[0] + column * self._side, self._corner[1] + row * self._side
        east, north = west + self._side, south + self._side
        cells = shapely.box(west, south, east, north)
        grown = shapely.box(west - self._margin, south - self._margin, east + self._margin, north + self._margin)
        cell, polygon = self._tree.query(grown)
        near = shapely.intersects(self._degrees[polygon], grown[cell])
        cell, polygon = cell[near], polygon[near]
        inside = shapely.intersects(self._degrees[polygon], cells[cell])
        alone = np.bincount(cell, inside, len(new))[cell] == 1
        whole = shapely.contains_properly(self._degrees[polygon], cells[cell]) & alone
        found = np.full(len(new), NONE, dtype=np.int32)
        found[cell] = SEVERAL
        found[cell[whole]] = polygon[whole]
        known[new] = found

    def _around(self, lat: Floats, lon: Floats) -> NDArray[np.int32]:
        """The smallest polygon around each point, -1 where there is none."""
        points = shapely.points(lon, lat)
        point, polygon = self._tree.query(points)  # by bounding box
        inside = shapely.intersects(self._degrees[polygon], points[point])
        point, polygon = point[inside], polygon[inside]
        smallest_last = np.lexsort((-polygon, -self._areas[polygon]))
        codes = np.full(len(points), NONE, dtype=np.int32)
        codes[point[smallest_last]] = polygon[smallest_last]
        return codes

    def _beside(self, lat: Floats, lon: Floats) -> NDArray[np.int32]:
        """The nearest polygon within the tolerance, of equally near ones the smallest; -1 where there is none."""
        xy = np.column_stack(self._to_metres(lat, lon))
        points = shapely.points(np.where(np.isfinite(xy).all(axis=1, keepdims=True), xy, FAR_M))
        point, polygon = self._tree_metres.query(points, predicate="dwithin", distance=DISTRICT_TOLERANCE_M)
        metres = shapely.distance(points[point], self._metres[polygon])
        nearest_last = np.lexsort((polygon, self._areas[polygon], metres))[::-1]
        codes = np.full(len(points), NONE, dtype=np.int32)
        codes[point[nearest_last]] = polygon[nearest_last]
        return codes
