"""The streets that tiles are drawn from: lines of a street file in local metres, with a spatial index."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyogrio
import pyproj
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from addressvlm.dataset import geo_files
from addressvlm.dataset.geo_files import GeoFeature, is_road
from addressvlm.errors import InputError
from addressvlm.gazetteer.name_matcher import NameIndex
from addressvlm.gazetteer.names import osm_names
from addressvlm.gazetteer.spatial_index import METRES_PER_DEGREE
from addressvlm.storage.files import atomic_write
from addressvlm.storage.remote_path import AnyPath

# Width of the carriageway in metres by OpenStreetMap's `highway`.
WIDTHS_M = {
    "motorway": 16.0, "trunk": 14.0, "primary": 12.0, "secondary": 10.5, "tertiary": 9.0, "unclassified": 7.5,
    "residential": 7.5, "living_street": 6.0, "service": 4.5, "pedestrian": 5.5, "footway": 2.5, "cycleway": 2.5,
    "path": 2.0, "steps": 2.0,
}  # fmt: skip
DEFAULT_WIDTH_M = 7.5
COLUMNS = ["name", "highway", "alt_name"]
MAX_DISTANCE_M = 2100.0  # a road further from every photo is on no tile, since tiles.side_m is at most 4 km


@dataclass(frozen=True)
class Road:
    """One line of the file: its name ("" if it has none), its width in metres, its geometry in local metres."""

    name: str
    width_m: float
    line: BaseGeometry


class Roads:
    """The lines of a street file in metres around their centre, x east and y north."""

    def __init__(
        self, path: str | AnyPath | None, centre: tuple[float, float] = (0.0, 0.0), language: str | None = None
    ) -> None:
        """Read a file that `addressvlm.dataset.geo_files` reads; without one there are no roads around `centre` (lat, lon).

        Of an OpenStreetMap file the roads and paths, of another all lines. Names are in `language`, if the file has them.

        Raises:
            InputError: the file is missing or damaged, or has no lines.
        """
        features = geo_files.read_geo_file(path, "city.streets", is_road).features if path else []
        features = [f for f in features if f.dimension == 1 or (f.dimension == 2 and is_road(f.tags))]
        if path and not features:
            raise InputError(f"{path} has no lines: give the file of the city's streets.")
        lines = [f.shape if f.dimension == 1 else shapely.boundary(f.shape) for f in features]  # the edge of a paved area
        west, south, east, north = shapely.total_bounds(lines or [shapely.Point(centre[::-1])])
        lat, lon = (south + north) / 2, (west + east) / 2
        self.crs = f"+proj=tmerc +lat_0={lat:.6f} +lon_0={lon:.6f} +k=1 +datum=WGS84 +units=m +no_defs"
        self._project = pyproj.Transformer.from_crs("EPSG:4326", self.crs, always_xy=True).transform
        metres = shapely.transform(np.array(lines, dtype=object), lambda xy: np.column_stack(self._project(xy[:, 0], xy[:, 1])))
        self._variants: dict[str, list[str]] = defaultdict(list)
        self.roads: list[Road] = []
        for feature, line in zip(features, metres, strict=True):
            name, variants = osm_names(feature.tags, language)
            width = WIDTHS_M.get(feature.tags.get("highway", "").removesuffix("_link"), DEFAULT_WIDTH_M)
            self.roads.append(Road(name, width, line))
            self._variants[name] += variants
        self._tree = shapely.STRtree(metres)

    def to_metres(self, lat: float, lon: float) -> tuple[float, float]:
        """Degrees to local metres (x east, y north)."""
        x, y = self._project(lon, lat)
        return float(x), float(y)

    def within(self, x: float, y: float, half_m: float) -> list[Road]:
        """Roads that touch the square around (x, y), in the order of the file."""
        square = shapely.box(x - half_m, y - half_m, x + half_m, y + half_m)
        return [self.roads[i] for i in sorted(self._tree.query(square, predicate="intersects"))]

    def resolve_name(self, street: str) -> str | None:
        """The name on the map of which this is a spelling or a variant, None if there is none."""
        return self._index.resolve(street)

    @cached_property
    def _index(self) -> NameIndex:
        return NameIndex(sorted(name for name in self._variants if name), self._variants)


def write_roads(path: AnyPath, roads: Sequence[GeoFeature], lat: NDArray[np.float64], lon: NDArray[np.float64]) -> None:
    """Write the roads that a tile of a photo at lat (N,), lon (N,) can show, or all if there is none, as a FlatGeobuf file.

    `Roads` opens it faster than the original file.
    """
    written = roads
    if len(lat):  # the roads in the grid cell of a photo or in one of the cells around it
        side = MAX_DISTANCE_M / METRES_PER_DEGREE * np.array([1 / max(np.cos(np.radians(np.abs(lat).max())), 0.01), 1])
        cells = np.unique(np.floor(np.column_stack([lon, lat]) / side), axis=0)
        boxes = shapely.box(*((cells - 1) * side).T, *((cells + 2) * side).T)
        tree = shapely.STRtree([road.shape for road in roads])
        written = [roads[i] for i in np.unique(tree.query(boxes, predicate="intersects")[1])] or roads
    columns = [np.array([road.tags.get(key, "") for road in written], dtype=object) for key in COLUMNS]
    with atomic_write(path) as temporary:
        file = temporary.with_suffix(".fgb")  # with another suffix GDAL makes a folder
        pyogrio.raw.write(
            file, shapely.to_wkb([road.shape for road in written]), columns, COLUMNS,
            layer="roads", driver="FlatGeobuf", geometry_type="Unknown", crs="EPSG:4326", SPATIAL_INDEX="NO",
        )  # fmt: skip
        file.replace(temporary)
