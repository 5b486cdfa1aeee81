"""A city's named streets and districts from GeoJSON: what is near a point, how far, and in which direction it runs."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import shapely
from numpy.typing import ArrayLike, NDArray
from shapely.geometry import LineString, MultiLineString
from shapely.geometry.base import BaseGeometry

from addressvlm.errors import InputError

DISTRICT_TOLERANCE_M = 50.0  # a point in a gap or just off the edge (a quay, a bridge) belongs to the polygon beside it
POINTS_AT_A_TIME = 2048


class StreetMap:
    """Named lines and polygons, in metres on a plane around their centre (x east, y north) for everything measured.

    Attributes:
        names: one per line, as written in the file; the same name may have many lines.
        lines: LineStrings in metres.
        district_names, district_polygons: the same for districts, polygons in metres; empty without a districts file.
    """

    def __init__(
        self,
        names: Sequence[str],
        lines: Sequence[BaseGeometry],
        districts: Sequence[tuple[str, BaseGeometry]] = (),
        centre: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Lines and polygons in degrees (lon, lat); `centre` (lat, lon) is used where there is neither."""
        self._degrees = np.array(lines, dtype=object)
        around = lines or [polygon for _, polygon in districts] or [shapely.Point(centre[1], centre[0])]
        west, south, east, north = shapely.total_bounds(around)
        plane = f"+proj=aeqd +lat_0={(south + north) / 2:.6f} +lon_0={(west + east) / 2:.6f} +datum=WGS84 +units=m +no_defs"
        self._projection = pyproj.Transformer.from_crs("EPSG:4326", plane, always_xy=True)
        self.names = np.array(names, dtype=object)
        self.lines = self._project(lines)
        self.district_names = [name for name, _ in districts]
        self.district_polygons = self._project([polygon for _, polygon in districts])
        self._district_degrees = dict(districts)
        self._areas = shapely.area(self.district_polygons)
        self._tree = shapely.STRtree(self.lines)
        self._district_tree = shapely.STRtree(self.district_polygons)
        self.street_names = sorted(set(names))
        self._codes = np.searchsorted(self.street_names, names) if len(names) else np.zeros(0, dtype=int)

    @classmethod
    def load(
        cls, streets: str | Path | None, districts: str | Path | None = None, centre: tuple[float, float] = (0.0, 0.0)
    ) -> "StreetMap":
        """Read GeoJSON in degrees (WGS84) with the property `name`; features without a name are left out.

        Without files the map knows nothing and measures on a plane around `centre` (lat, lon).

        Raises:
            InputError: a file is missing, is not such GeoJSON, or has nothing named in it.
        """
        lines = _features(Path(streets), ("LineString", "MultiLineString"), "street", "city.streets") if streets else []
        polygons = _features(Path(districts), ("Polygon", "MultiPolygon"), "district", "city.districts") if districts else []
        parts = [(name, part) for name, shape in lines for part in shapely.get_parts(shape)]
        merged: dict[str, list[BaseGeometry]] = {}
        for name, polygon in polygons:
            merged.setdefault(name, []).append(polygon if polygon.is_valid else shapely.make_valid(polygon))
        whole = [(name, shapely.union_all(shapes)) for name, shapes in merged.items()]
        return cls([name for name, _ in parts], [part for _, part in parts], whole, centre)

    def to_metres(self, lat: ArrayLike, lon: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Degrees to x (east) and y (north) in metres from the centre of the map."""
        x, y = self._projection.transform(np.asarray(lon, dtype=float), np.asarray(lat, dtype=float))
        return x, y

    def to_degrees(self, x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The inverse of `to_metres`: (lat, lon)."""
        lon, lat = self._projection.transform(np.asarray(x, dtype=float), np.asarray(y, dtype=float), direction="INVERSE")
        return lat, lon

    def around(self, lat: ArrayLike, lon: ArrayLike, limit_m: float) -> list[list[tuple[str, float]]]:
        """For each point the named streets within the limit as (name, metres), the nearest first, each name once."""
        points = shapely.points(*self.to_metres(np.atleast_1d(lat), np.atleast_1d(lon)))
        found: list[list[tuple[str, float]]] = [[] for _ in points]
        for start in range(0, len(points), POINTS_AT_A_TIME):
            part = points[start : start + POINTS_AT_A_TIME]
            index, line = self._tree.query(part, predicate="dwithin", distance=limit_m)
            distance = np.round(shapely.distance(part[index], self.lines[line]), 2)  # cm, so that a corner is a tie
            order = np.lexsort((self._codes[line], distance, index))
            seen: set[tuple[int, int]] = set()
            for i in order:
                key = (int(index[i]), int(self._codes[line[i]]))
                if key not in seen:
                    seen.add(key)
                    found[start + key[0]].append((self.street_names[key[1]], float(distance[i])))
        return found

    def nearest(
        self, lat: ArrayLike, lon: ArrayLike, limit_m: float
    ) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[Any], NDArray[np.float64]]:
        """The nearest street and the nearest street of another name, for N points.

        Returns:
            street: (N,) names, None where there is none within the limit.
            distance: (N,) metres, inf where there is none.
            second, second distance: the same for the other street.
        """
        found = [streets[:2] + [(None, math.inf)] * 2 for streets in self.around(lat, lon, limit_m)]
        first, second = [f[0] for f in found], [f[1] for f in found]
        return (
            np.array([name for name, _ in first], dtype=object),
            np.array([distance for _, distance in first]),
            np.array([name for name, _ in second], dtype=object),
            np.array([distance for _, distance in second]),
        )

    def district(self, lat: ArrayLike, lon: ArrayLike) -> list[str | None]:
        """For each point the district around it (the smallest if they overlap), or the one beside it, else None."""
        points = shapely.points(*self.to_metres(np.atleast_1d(lat), np.atleast_1d(lon)))
        index, polygon = self._district_tree.query(points, predicate="dwithin", distance=DISTRICT_TOLERANCE_M)
        distance = shapely.distance(points[index], self.district_polygons[polygon])
        names: list[str | None] = [None] * len(points)
        for i in np.lexsort((self._areas[polygon], distance, index))[::-1]:  # the best comes last and stays
            names[index[i]] = self.district_names[polygon[i]]
        return names

    def lines_near(self, x: float, y: float, half_side_m: float) -> list[tuple[str, LineString]]:
        """Named lines that touch the square around a point, in metres, in the order of the file."""
        square = shapely.box(x - half_side_m, y - half_side_m, x + half_side_m, y + half_side_m)
        return [(self.names[i], self.lines[i]) for i in sorted(self._tree.query(square, predicate="intersects"))]

    def bearing(self, x: float, y: float, name: str | None = None, limit_m: float = 500.0) -> float | None:
        """Direction of the nearest line (of that name) where it passes the point: degrees from north in [0, 180).

        None if there is no such line within the limit.
        """
        point = shapely.Point(x, y)
        near = [i for i in self._tree.query(point, predicate="dwithin", distance=limit_m) if name in (None, self.names[i])]
        if not near:
            return None
        line = self.lines[min(near, key=lambda i: (shapely.distance(point, self.lines[i]), i))]
        at = shapely.line_locate_point(line, point)
        reach = min(1.0, line.length)
        back = shapely.line_interpolate_point(line, max(at - reach, 0.0))
        forth = shapely.line_interpolate_point(line, min(at + reach, line.length))
        return math.degrees(math.atan2(forth.x - back.x, forth.y - back.y)) % 180

    def street_shapes(self, names: Sequence[str]) -> dict[str, BaseGeometry]:
        """The lines of each street in degrees (lon, lat); unknown names are absent."""
        wanted = set(names)
        parts: dict[str, list[BaseGeometry]] = {}
        for name, line in zip(self.names, self._degrees, strict=True):
            if name in wanted:
                parts.setdefault(name, []).append(line)
        return {name: lines[0] if len(lines) == 1 else MultiLineString(lines) for name, lines in parts.items()}

    def district_shapes(self, names: Sequence[str]) -> dict[str, BaseGeometry]:
        """The polygon of each district in degrees (lon, lat); unknown names are absent."""
        return {name: self._district_degrees[name] for name in names if name in self._district_degrees}

    def _project(self, shapes: Sequence[BaseGeometry]) -> NDArray[Any]:
        """Degrees to metres."""
        return shapely.transform(
            np.array(shapes, dtype=object), lambda c: np.column_stack(self._projection.transform(c[:, 0], c[:, 1]))
        )


def _features(path: Path, kinds: tuple[str, ...], what: str, key: str) -> list[tuple[str, BaseGeometry]]:
    """Name and shape of the named features of these kinds; InputError if there are none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        shapes = [
            (str(f["properties"]["name"]).strip(), shapely.force_2d(shapely.geometry.shape(f["geometry"])))
            for f in tree["features"]
            if (f.get("geometry") or {}).get("type") in kinds and str((f.get("properties") or {}).get("name") or "").strip()
        ]
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): set {key} to a GeoJSON file that exists.") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, shapely.errors.ShapelyError) as error:
        detail = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is not GeoJSON ({type(error).__name__}: {detail}): export it again as GeoJSON.") from None
    shapes = [(name, shape) for name, shape in shapes if not shape.is_empty]
    if not shapes:
        raise InputError(f"{path} has no named {what}: it needs {kinds[0]} features with the property `name`.")
    west, south, east, north = shapely.total_bounds([shape for _, shape in shapes])
    if not (-180 <= west <= east <= 180 and -90 <= south <= north <= 90):
        raise InputError(
            f"{path} has coordinates from ({west:g}, {south:g}) to ({east:g}, {north:g}): export it in degrees (WGS84)."
        )
    return shapes
