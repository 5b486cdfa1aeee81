"""The district around each of very many points: `StreetMap.district_codes` at the speed of `StreetMap.nearest_two`."""

import numpy as np
import shapely
from numpy.typing import NDArray

from addressvlm.cities.streets import DISTRICT_TOLERANCE_M, StreetMap

CELL_DEG = 0.0006  # 67 m from south to north
METRE_DEG = 1 / 110_574  # the most degrees of latitude that a metre is
NONE, SEVERAL, UNKNOWN = -1, -2, -3  # of a cell: no district near, points must be looked at, cell hasn't been looked at


class DistrictIndex:
    """The districts of a map under a grid of degrees: most points are in a cell that is in one district altogether."""

    def __init__(self, streets: StreetMap) -> None:
        self._streets = streets
        shapes = streets.district_shapes(streets.district_names)
        self._polygons = np.array([shapes[name] for name in streets.district_names], dtype=object)
        self._areas = shapely.area(streets.district_polygons)
        shapely.prepare(self._polygons)
        self._tree = shapely.STRtree(self._polygons)
        west, south, east, north = shapely.total_bounds(self._polygons) if len(shapes) else (0.0, 0.0, 0.0, 0.0)
        squeeze = np.cos(np.radians(max(abs(south), abs(north))))
        self._margin = DISTRICT_TOLERANCE_M * METRE_DEG / max(squeeze, 0.01)  # in degrees, too much rather than too little
        self._corner = np.array([west, south])
        self._cells = np.full((int((east - west) / CELL_DEG) + 1, int((north - south) / CELL_DEG) + 1), UNKNOWN, np.int32)

    def codes(self, lat: NDArray[np.float64], lon: NDArray[np.float64]) -> NDArray[np.int32]:
        """(N,) positions in `streets.district_names`, -1 outside all of them."""
        if not len(self._polygons):
            return np.full(len(lat), -1, dtype=np.int32)
        columns, rows = self._cells.shape
        column, row = ((v - c) / CELL_DEG for v, c in zip((lon, lat), (*self._corner,), strict=True))
        inside = (column >= 0) & (row >= 0) & (column < columns) & (row < rows)
        cell = np.where(inside, column, 0).astype(np.int64) * rows + np.where(inside, row, 0).astype(np.int64)
        self._look_at(cell)
        codes = np.where(inside, self._cells.ravel()[cell], np.int32(SEVERAL))
        rest = np.flatnonzero(codes == SEVERAL)
        codes[rest] = self._around(lat[rest], lon[rest])
        beside = rest[codes[rest] < 0]
        codes[beside] = self._streets.district_codes(lat[beside], lon[beside])
        return codes

    def _look_at(self, cell: NDArray[np.int64]) -> None:
        """Find what there is to know about the cells that haven't been looked at."""
        known = self._cells.ravel()
        new = np.unique(cell[known[cell] == UNKNOWN])
        if not len(new):
            return
        column, row = np.divmod(new, self._cells.shape[1])
        west, south = self._corner[0] + column * CELL_DEG, self._corner[1] + row * CELL_DEG
        east, north = west + CELL_DEG, south + CELL_DEG
        cells = shapely.box(west, south, east, north)
        grown = shapely.box(west - self._margin, south - self._margin, east + self._margin, north + self._margin)
        cell, polygon = self._tree.query(grown)
        near = shapely.intersects(self._polygons[polygon], grown[cell])
        cell, polygon = cell[near], polygon[near]
        inside = shapely.intersects(self._polygons[polygon], cells[cell])
        alone = np.bincount(cell, inside, len(new))[cell] == 1
        whole = shapely.contains_properly(self._polygons[polygon], cells[cell]) & alone
        found = np.full(len(new), NONE, dtype=np.int32)
        found[cell] = SEVERAL
        found[cell[whole]] = polygon[whole]
        known[new] = found

    def _around(self, lat: NDArray[np.float64], lon: NDArray[np.float64]) -> NDArray[np.int32]:
        """The smallest polygon around each point, -1 where there is none."""
        points = shapely.points(lon, lat)
        point, polygon = self._tree.query(points)  # by bounding box
        inside = shapely.intersects(self._polygons[polygon], points[point])
        point, polygon = point[inside], polygon[inside]
        smallest_last = np.lexsort((-polygon, -self._areas[polygon]))
        codes = np.full(len(points), -1, dtype=np.int32)
        codes[point[smallest_last]] = polygon[smallest_last]
        return codes
