"""The lines of a street file in local metres, found by where they are: what tiles are drawn from."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyproj
import shapely
from shapely.geometry.base import BaseGeometry

from addressvlm.cities import features
from addressvlm.cities.osm import is_road
from addressvlm.errors import InputError
from addressvlm.names import spellings

# Width of the carriageway in metres by the `highway` value of OpenStreetMap; other values are residential streets.
WIDTHS_M = {
    "motorway": 16.0,
    "trunk": 14.0,
    "primary": 12.0,
    "secondary": 10.5,
    "tertiary": 9.0,
    "unclassified": 7.5,
    "residential": 7.5,
    "living_street": 6.0,
    "service": 4.5,
    "pedestrian": 5.5,
    "footway": 2.5,
    "cycleway": 2.5,
    "path": 2.0,
    "steps": 2.0,
}
OTHER_WIDTH_M = 7.5


@dataclass(frozen=True)
class Road:
    """One line of the file: its name ("" if it has none), its width in metres, its geometry in local metres."""

    name: str
    width_m: float
    line: BaseGeometry


class Roads:
    """The lines of a street file in metres around their centre, x east and y north."""

    def __init__(self, path: str | Path | None, centre: tuple[float, float] = (0.0, 0.0), language: str | None = None) -> None:
        """Read the whole file; without one there are no roads and the plane lies around `centre` (lat, lon).

        Any kind of file that `addressvlm.cities.features` reads; names in the language if the file has them in it.

        Raises:
            InputError: the file is missing or damaged, or has no lines.
        """
        names, kinds, lines = _read(Path(path), language) if path else ([], [], [])
        west, south, east, north = shapely.total_bounds(lines or [shapely.Point(centre[::-1])])
        lat, lon = (south + north) / 2, (west + east) / 2
        self.crs = f"+proj=tmerc +lat_0={lat:.6f} +lon_0={lon:.6f} +k=1 +datum=WGS84 +units=m +no_defs"
        self._project = pyproj.Transformer.from_crs("EPSG:4326", self.crs, always_xy=True).transform
        metres = shapely.transform(np.array(lines, dtype=object), lambda xy: np.column_stack(self._project(xy[:, 0], xy[:, 1])))
        widths = [WIDTHS_M.get(kind.removesuffix("_link"), OTHER_WIDTH_M) for kind in kinds]
        self.roads = [Road(*road) for road in zip(names, widths, metres, strict=True)]
        self._tree = shapely.STRtree(metres)

    def to_metres(self, lat: float, lon: float) -> tuple[float, float]:
        """Degrees to local metres (x east, y north)."""
        x, y = self._project(lon, lat)
        return float(x), float(y)

    def within(self, x: float, y: float, half_m: float) -> list[Road]:
        """Roads that touch the square around (x, y), in the order of the file."""
        square = shapely.box(x - half_m, y - half_m, x + half_m, y + half_m)
        return [self.roads[i] for i in sorted(self._tree.query(square, predicate="intersects"))]


def _read(path: Path, language: str | None) -> tuple[list[str], list[str], list[BaseGeometry]]:
    """Names ("" where there is none), highway classes and lines (degrees); a paved area is the line around it."""
    names: list[str] = []
    kinds: list[str] = []
    lines: list[BaseGeometry] = []
    for feature in features.read(path, "city.streets", is_road).features:
        if feature.dimension == 1 or (feature.dimension == 2 and is_road(feature.tags)):
            names.append(spellings(feature.tags, language)[0])
            kinds.append(feature.tags.get("highway", ""))
            lines.append(feature.shape if feature.dimension == 1 else shapely.boundary(feature.shape))
    if not lines:
        raise InputError(f"{path} has no lines: give the file of the city's streets.")
    return names, kinds, lines
