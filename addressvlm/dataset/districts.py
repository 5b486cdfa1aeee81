"""What the districts of a city are: polygons of a table, or what an OpenStreetMap extract offers.

An extract offers administrative areas of several levels, areas of parts of the town (`place=suburb`, `quarter`, …), and the
middles of such parts as nodes; of nodes the district of a point is the nearest one (Voronoi cells, cut off at the edge of
the extract).
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

Source = Literal["auto", "polygons", "admin", "place"]
Layer = list[GeoFeature]  # areas that are districts together

COVERS = 0.9  # share of the streets that the districts of a layer must cover to be chosen by themselves


def choose_districts(
    extract: GeoExtract, streets: NDArray[np.object_], path: str, source: Source = "auto", admin_level: int | None = None
) -> Layer:
    """The areas that are the districts, from a file of which all named objects have been read.

    `auto` takes the first of these that covers nine of ten streets with two districts or more, yet fewer than half as many
    as there are streets: administrative areas from the finest level, areas of parts of the town from the finest, cells around
    the middles of such parts. Where none does, the layer that covers most. A table without such tags is all districts.

    Args:
        streets: a point in degrees (lon, lat) on each named street.
        path: of the file, for errors.

    Raises:
        InputError: the file has no named district of that source or level.
    """
    if admin_level is not None and source == "auto":
        source = "admin"
    areas = [f for f in extract.features if f.dimension == 2 and (is_district(f.tags) or not extract.osm)]
    admin = _admin_layers(areas, admin_level)
    parts = [layer for place in DISTRICT_PLACES if (layer := [f for f in areas if f.tags.get("place") == place])]
    layers = {
        "admin": admin,
        "polygons": parts or ([areas] if areas else []),
        "place": _cell_layers(extract) if source in ("auto", "place") else [],
        "auto": [],
    }
    layers["auto"] = admin + parts + layers["place"] or layers["polygons"]
    candidates = layers[source]
    if not candidates:
        raise InputError(_nothing(path, source, admin_level, extract, areas))
    if len(streets) == 0:
        return candidates[0]
    shares = [_share(layer, streets) for layer in candidates]
    several = [2 <= len(layer) < max(len(streets) / 2, 3) for layer in candidates]
    best = max(range(len(candidates)), key=lambda i: (shares[i] >= COVERS and several[i], min(shares[i], COVERS), -i))
    return candidates[best]


def _admin_layers(areas: Sequence[GeoFeature], admin_level: int | None) -> list[Layer]:
    """Administrative areas by level, the finest first."""
    levels: dict[int, Layer] = {}
    for area in areas:
        level = area.tags.get("admin_level", "")
        if area.tags.get("boundary") == "administrative" and level.isdecimal() and admin_level in (None, int(level)):
            levels.setdefault(int(level), []).append(area)
    return [levels[level] for level in sorted(levels, reverse=True)]


def _cell_layers(extract: GeoExtract) -> list[Layer]:
    """Cells around the middles of parts of the town, the kind of part with the most of them first."""
    points = [f for f in extract.features if f.dimension == 0]
    layers = [layer for place in DISTRICT_PLACES if (layer := [f for f in points if f.tags.get("place") == place])]
    return [district_cells(layer, shapely.box(*extract.bounds)) for layer in sorted(layers, key=len, reverse=True)]


def district_cells(points: Sequence[GeoFeature], within: BaseGeometry) -> Layer:
    """The part of `within` that is nearer to each of the points (degrees) than to any other; of two at one spot the first."""
    squeeze = np.array([np.cos(np.radians(np.mean([p.shape.y for p in points]))), 1])
    first = {p.shape.coords[0]: p for p in reversed(points)}
    sites = shapely.MultiPoint(np.array(list(first)) * squeeze)
    area = shapely.transform(within, lambda c: c * squeeze)
    if len(first) == 1:
        return [GeoFeature(point.tags, within) for point in first.values()]
    found = shapely.get_parts(shapely.voronoi_polygons(sites, extend_to=area, ordered=True))
    cut = shapely.transform(shapely.intersection(found, area), lambda c: c / squeeze)
    return [GeoFeature(p.tags, cell) for p, cell in zip(first.values(), cut, strict=True) if not cell.is_empty]


def _share(layer: Layer, streets: NDArray[np.object_]) -> float:
    """Share of the points that are in some area of the layer."""
    inside = shapely.STRtree([f.shape for f in layer]).query(streets, predicate="intersects")[0]
    return len(np.unique(inside)) / len(streets)


def _nothing(path: str, source: Source, admin_level: int | None, extract: GeoExtract, areas: Sequence[GeoFeature]) -> str:
    """The sentence for a file without districts."""
    if source == "admin":
        counts = Counter(f.tags["admin_level"] for f in areas if f.tags.get("admin_level"))
        offer = ", ".join(f"{level} ({n})" for level, n in sorted(counts.items())) or "none"
        level = "" if admin_level is None else f" of level {admin_level}"
        return (
            f"{path} has no whole administrative area{level}: set city.admin_level to one of the levels it has ({offer}), or "
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


Floats = NDArray[np.float64]

DISTRICT_TOLERANCE_M = 50.0  # a point in a gap or just off the edge (a quay, a bridge) belongs to the polygon beside it
CELL_DEG = 0.0006  # 67 m from south to north
MOST_CELLS = 1 << 22  # of a whole country they are larger
METRE_DEG = 1 / 110_574  # the most degrees of latitude that a metre is
FAR_M = 1e9  # where a point is that the projection can't place
NO_DISTRICT, SEVERAL_DISTRICTS, UNKNOWN_DISTRICT = (
    -1,
    -2,
    -3,
)  # of a cell: no district near, points must be looked at, cell hasn't been looked at


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
        self._cells = np.full(shape, UNKNOWN_DISTRICT, np.int32)

    def codes(self, lat: Floats, lon: Floats) -> NDArray[np.int32]:
        """For N points the position of the polygon around each, the smallest if they overlap, or of the one beside it.

        -1 for a point further than the tolerance from all of them.
        """
        if not len(self._degrees):
            return np.full(len(lat), NO_DISTRICT, dtype=np.int32)
        columns, rows = self._cells.shape
        column, row = ((v - c) / self._side for v, c in zip((lon, lat), (*self._corner,), strict=True))
        inside = (column >= 0) & (row >= 0) & (column < columns) & (row < rows)
        cell = np.where(inside, column, 0).astype(np.int64) * rows + np.where(inside, row, 0).astype(np.int64)
        self._look_at(cell)
        codes = np.where(inside, self._cells.ravel()[cell], np.int32(SEVERAL_DISTRICTS))
        rest = np.flatnonzero(codes == SEVERAL_DISTRICTS)
        codes[rest] = self._around(lat[rest], lon[rest])
        beside = rest[codes[rest] < 0]
        codes[beside] = self._beside(lat[beside], lon[beside])
        return codes

    def _look_at(self, cell: NDArray[np.int64]) -> None:
        """Find what there is to know about the cells that haven't been looked at."""
        known = self._cells.ravel()
        new = np.unique(cell[known[cell] == UNKNOWN_DISTRICT])
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
        found = np.full(len(new), NO_DISTRICT, dtype=np.int32)
        found[cell] = SEVERAL_DISTRICTS
        found[cell[whole]] = polygon[whole]
        known[new] = found

    def _around(self, lat: Floats, lon: Floats) -> NDArray[np.int32]:
        """The smallest polygon around each point, -1 where there is none."""
        points = shapely.points(lon, lat)
        point, polygon = self._tree.query(points)  # by bounding box
        inside = shapely.intersects(self._degrees[polygon], points[point])
        point, polygon = point[inside], polygon[inside]
        smallest_last = np.lexsort((-polygon, -self._areas[polygon]))
        codes = np.full(len(points), NO_DISTRICT, dtype=np.int32)
        codes[point[smallest_last]] = polygon[smallest_last]
        return codes

    def _beside(self, lat: Floats, lon: Floats) -> NDArray[np.int32]:
        """The nearest polygon within the tolerance, of equally near ones the smallest; -1 where there is none."""
        xy = np.column_stack(self._to_metres(lat, lon))
        points = shapely.points(np.where(np.isfinite(xy).all(axis=1, keepdims=True), xy, FAR_M))
        point, polygon = self._tree_metres.query(points, predicate="dwithin", distance=DISTRICT_TOLERANCE_M)
        metres = shapely.distance(points[point], self._metres[polygon])
        nearest_last = np.lexsort((polygon, self._areas[polygon], metres))[::-1]
        codes = np.full(len(points), NO_DISTRICT, dtype=np.int32)
        codes[point[nearest_last]] = polygon[nearest_last]
        return codes
