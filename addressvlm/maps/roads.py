"""The lines of a street file in local metres, found by where they are: what tiles are drawn from."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyproj
import shapely
import shapely.geometry
from shapely.geometry.base import BaseGeometry

from addressvlm.errors import InputError

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
    """The lines of a GeoJSON file (WGS84) around their centre, x east and y north in metres."""

    def __init__(self, path: str | Path | None, centre: tuple[float, float] = (0.0, 0.0)) -> None:
        """Read the whole file; without one there are no roads and the plane lies around `centre` (lat, lon).

        Raises:
            InputError: the file is missing, is not GeoJSON, or has no lines.
        """
        names, kinds, lines = _read(Path(path)) if path else ([], [], [])
        geometries = np.array(lines, dtype=object)
        west, south, east, north = shapely.total_bounds(lines or [shapely.Point(centre[::-1])])
        if not (-180 <= west <= east <= 180 and -90 <= south <= north <= 90):
            span = f"({west:g}, {south:g}) to ({east:g}, {north:g})"
            raise InputError(f"{path} has coordinates from {span}: export it in degrees (WGS84).")
        lat, lon = (south + north) / 2, (west + east) / 2
        self.crs = f"+proj=tmerc +lat_0={lat:.6f} +lon_0={lon:.6f} +k=1 +datum=WGS84 +units=m +no_defs"
        self._project = pyproj.Transformer.from_crs("EPSG:4326", self.crs, always_xy=True).transform
        metres = shapely.transform(geometries, lambda xy: np.column_stack(self._project(xy[:, 0], xy[:, 1])))
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


def _read(path: Path) -> tuple[list[str], list[str], list[BaseGeometry]]:
    """Names, highway classes and lines (degrees) of a GeoJSON file."""
    names: list[str] = []
    kinds: list[str] = []
    lines: list[BaseGeometry] = []
    try:
        for feature in json.loads(path.read_text(encoding="utf-8"))["features"]:
            geometry, properties = feature.get("geometry") or {}, feature.get("properties") or {}
            if geometry.get("type") in ("LineString", "MultiLineString"):
                names.append(str(properties.get("name") or "").strip())
                kinds.append(str(properties.get("highway") or ""))
                lines.append(shapely.force_2d(shapely.geometry.shape(geometry)))
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): set city.streets to a GeoJSON file that exists.") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, shapely.errors.ShapelyError) as error:
        raise InputError(f"{path} is not GeoJSON ({type(error).__name__}): export the streets again as GeoJSON.") from None
    if not lines:
        raise InputError(f"{path} has no LineString features: give the GeoJSON of the city's streets.")
    return names, kinds, lines
