"""The districts of a city: choosing them in a map file, and looking up the district of a point.

An OpenStreetMap extract has administrative areas of several levels, areas of parts of the town (`place=suburb`, `quarter`,
…), and the centres of such parts as nodes; of nodes the district of a point is the nearest one (Voronoi cells, cut off at the
edge of the extract).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from addressvlm.dataset.geo_files import DISTRICT_PLACES, GeoExtract, GeoFeature, is_district
from addressvlm.errors import InputError

DistrictSource = Literal["auto", "polygons", "admin", "place"]
Layer = list[GeoFeature]  # areas that are districts together

MIN_COVERAGE = 0.9  # share of the streets that a layer must cover to be chosen
Floats = NDArray[np.float64]

DISTRICT_TOLERANCE_M = 50.0  # a point in a gap or just off the edge (a quay, a bridge) belongs to the polygon beside it
CELL_DEG = 0.0006  # 67 m from south to north
MAX_CELLS = 1 << 22  # of a whole country they are larger
METRE_DEG = 1 / 110_574  # the most degrees of latitude that a metre is
FAR_M = 1e9  # coordinate of a point that can't be projected
# Codes of a grid cell besides the district that covers it.
NO_DISTRICT = -1  # none is near
MIXED = -2  # depends on the point
UNCLASSIFIED = -3


def choose_districts(
    extract: GeoExtract,
    streets: NDArray[np.object_],
    path: str,
    source: DistrictSource = "auto",
    admin_level: int | None = None,
) -> Layer:
    """The areas that are the districts, from the named objects of a file.

    `auto` takes the first layer that covers nine of ten streets with two districts or more, yet fewer than half as many as
    there are streets: administrative areas from the finest level, areas of parts of the town from the finest, cells around
    the centres of such parts. Where none does, the layer that covers most. In a table without such tags all areas are
    districts.

    Args:
        streets: a point in degrees (lon, lat) on each named street.
        path: for the error where the file has no district of that source or level.
    """
    if admin_level is not None and source == "auto":
        source = "admin"
    areas = [f for f in extract.features if f.dimension == 2 and (is_district(f.tags) or not extract.osm)]
    levels: dict[int, Layer] = {}
    for area in areas:
        level = area.tags.get("admin_level", "")
        if area.tags.get("boundary") == "administrative" and level.isdecimal() and admin_level in (None, int(level)):
            levels.setdefault(int(level), []).append(area)
    admin = [levels[level] for level in sorted(levels, reverse=True)]
    parts = _layers_by_place(areas)
    centres = _layers_by_place([f for f in extract.features if f.dimension == 0]) if source in ("auto", "place") else []
    box = shapely.box(*extract.bounds)
    layers = {
        "admin": admin,
        "polygons": parts or ([areas] if areas else []),
        "place": [district_cells(layer, box) for layer in sorted(centres, key=len, reverse=True)],
        "auto": [],
    }
    layers["auto"] = admin + parts + layers["place"] or layers["polygons"]
    candidates = layers[source]
    if not candidates:
        raise InputError(_no_districts(path, source, admin_level, extract, areas))
    if len(streets) == 0:
        return candidates[0]

    def score(i: int) -> tuple[bool, float, int]:
        inside = shapely.STRtree([f.shape for f in candidates[i]]).query(streets, predicate="intersects")[0]
        coverage = len(np.unique(inside)) / len(streets)
        plausible = 2 <= len(candidates[i]) < max(len(streets) / 2, 3)
        return coverage >= MIN_COVERAGE and plausible, min(coverage, MIN_COVERAGE), -i

    return candidates[max(range(len(candidates)), key=score)]


def _layers_by_place(features: Sequence[GeoFeature]) -> list[Layer]:
    """Parts of the town by their kind, the finest first."""
    return [layer for place in DISTRICT_PLACES if (layer := [f for f in features if f.tags.get("place") == place])]


def district_cells(points: Sequence[GeoFeature], within: BaseGeometry) -> Layer:
    """Voronoi cells: the part of `within` nearer to a point (degrees) than to any other; of points at one spot the first."""
    scale = np.array([np.cos(np.radians(np.mean([p.shape.y for p in points]))), 1])
    first = {p.shape.coords[0]: p for p in reversed(points)}
    sites = shapely.MultiPoint(np.array(list(first)) * scale)
    area = shapely.transform(within, lambda c: c * scale)
    if len(first) == 1:
        return [GeoFeature(point.tags, within) for point in first.values()]
    voronoi = shapely.get_parts(shapely.voronoi_polygons(sites, extend_to=area, ordered=True))
    cells = shapely.transform(shapely.intersection(voronoi, area), lambda c: c / scale)
    return [GeoFeature(p.tags, cell) for p, cell in zip(first.values(), cells, strict=True) if not cell.is_empty]


def _no_districts(
    path: str, source: DistrictSource, admin_level: int | None, extract: GeoExtract, areas: Sequence[GeoFeature]
) -> str:
    """The error for a file without districts."""
    if source == "admin":
        counts = Counter(f.tags["admin_level"] for f in areas if f.tags.get("admin_level"))
        offer = ", ".join(f"{level} ({n})" for level, n in sorted(counts.items())) or "none"
        level = "" if admin_level is None else f" of level {admin_level}"
        return (
            f"{path} has no complete administrative area{level}: set city.admin_level to a level that it has ({offer}), or "
            f"city.district_source to place."
        )
    if source == "place":
        kinds = ", ".join(f"place={place}" for place in DISTRICT_PLACES)
        return f"{path} has no named nodes with {kinds}: set city.district_source to auto, or city.districts to a polygon file."
    cut = f" ({extract.incomplete} areas are cut off at its edge)" if extract.incomplete else ""
    return (
        f"{path} has no named district{cut}: it needs areas with the property `name`, or OpenStreetMap's administrative "
        f"boundaries or place nodes."
    )


class DistrictIndex:
    """Polygons under a grid of degrees: most points are in a cell that one polygon covers completely."""

    def __init__(
        self, degrees: NDArray[np.object_], metres: NDArray[np.object_], to_metres: Callable[..., tuple[Floats, Floats]]
    ) -> None:
        """The same polygons twice, in degrees (lon, lat) and on the plane of `to_metres` (lat, lon -> x, y)."""
        self._degrees, self._metres, self._to_metres = degrees, metres, to_metres
        self._areas = shapely.area(metres)
        shapely.prepare(degrees)
        self._tree, self._tree_metres = shapely.STRtree(degrees), shapely.STRtree(metres)
        west, south, east, north = shapely.total_bounds(degrees) if len(degrees) else (0.0, 0.0, 0.0, 0.0)
        scale = np.cos(np.radians(max(abs(south), abs(north))))
        self._margin = DISTRICT_TOLERANCE_M * METRE_DEG / max(scale, 0.01)  # in degrees, at least the tolerance
        self._corner = np.array([west, south])
        self._side = max(CELL_DEG, float(np.sqrt((east - west) * (north - south) / MAX_CELLS)))
        shape = [int(length / self._side) + 1 for length in (east - west, north - south)]
        self._cells = np.full(shape, UNCLASSIFIED, np.int32)

    def codes(self, lat: Floats, lon: Floats) -> NDArray[np.int32]:
        """For N points the position of the polygon that contains each (the smallest if they overlap), else of the nearest one.

        -1 for a point further than the tolerance from all of them.
        """
        if not len(self._degrees):
            return np.full(len(lat), NO_DISTRICT, dtype=np.int32)
        columns, rows = self._cells.shape
        column, row = ((v - c) / self._side for v, c in zip((lon, lat), (*self._corner,), strict=True))
        inside = (column >= 0) & (row >= 0) & (column < columns) & (row < rows)
        cell = np.where(inside, column, 0).astype(np.int64) * rows + np.where(inside, row, 0).astype(np.int64)
        self._classify(cell)
        codes = np.where(inside, self._cells.ravel()[cell], np.int32(MIXED))
        rest = np.flatnonzero(codes == MIXED)
        codes[rest] = NO_DISTRICT
        points = shapely.points(lon[rest], lat[rest])
        point, polygon = self._tree.query(points)  # by bounding box
        containing = shapely.intersects(self._degrees[polygon], points[point])
        point, polygon = point[containing], polygon[containing]
        smallest_last = np.lexsort((-polygon, -self._areas[polygon]))
        codes[rest[point[smallest_last]]] = polygon[smallest_last]
        outside = rest[codes[rest] < 0]
        codes[outside] = self._nearest(lat[outside], lon[outside])
        return codes

    def _classify(self, cell: NDArray[np.int64]) -> None:
        """Fill in the codes of cells that are used for the first time."""
        codes = self._cells.ravel()
        new = np.unique(cell[codes[cell] == UNCLASSIFIED])
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
        covered = shapely.contains_properly(self._degrees[polygon], cells[cell]) & alone
        new_codes = np.full(len(new), NO_DISTRICT, dtype=np.int32)
        new_codes[cell] = MIXED
        new_codes[cell[covered]] = polygon[covered]
        codes[new] = new_codes

    def _nearest(self, lat: Floats, lon: Floats) -> NDArray[np.int32]:
        """The nearest polygon within the tolerance, of equally near ones the smallest; -1 where there is none."""
        xy = np.column_stack(self._to_metres(lat, lon))
        points = shapely.points(np.where(np.isfinite(xy).all(axis=1, keepdims=True), xy, FAR_M))
        point, polygon = self._tree_metres.query(points, predicate="dwithin", distance=DISTRICT_TOLERANCE_M)
        metres = shapely.distance(points[point], self._metres[polygon])
        nearest_last = np.lexsort((polygon, self._areas[polygon], metres))[::-1]
        codes = np.full(len(points), NO_DISTRICT, dtype=np.int32)
        codes[point[nearest_last]] = polygon[nearest_last]
        return codes
