"""A city's named streets and districts: what is near a point, how far, and in which direction it runs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import shapely
from numpy.typing import ArrayLike, NDArray
from shapely.geometry.base import BaseGeometry

from addressvlm.cities import districts as districts_of
from addressvlm.cities import features
from addressvlm.cities.district_index import DistrictIndex
from addressvlm.cities.extract import Bounds, Extract, Feature
from addressvlm.cities.nearest import NearIndex
from addressvlm.cities.network import Unit, network, roads_of, variants_of, wanted
from addressvlm.cities.osm import is_district, is_road
from addressvlm.names import spellings


class StreetMap:
    """Named shapes, in metres on a plane around their centre (x east, y north) for everything measured.

    A street is lines; a square, or a block where addresses are blocks, is an area (0 m from every point in it) or a point.

    Attributes:
        street_names, district_names: sorted, each once; empty without a file.
        names, lines: the name and the LineString in metres of every line; the same name may have many.
        district_polygons: those of `district_names`, in metres.
        variants: name of a street or district -> its other names (languages, old and short forms), where it has any.
        bounds: west, south, east, north of all shapes in degrees; None without any.
        roads: what tiles are drawn from (see `network.roads_of`), where `load` was asked for it.
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[BaseGeometry],
        districts: Sequence[tuple[str, BaseGeometry]] = (),
        centre: tuple[float, float] = (0.0, 0.0),
        variants: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Shapes and polygons in degrees (lon, lat); `centre` (lat, lon) is used where there is neither."""
        districts = sorted(districts, key=lambda d: d[0])
        self._names, self._degrees = np.array(names, dtype=object), np.array(shapes, dtype=object)
        self._district_degrees = dict(districts)
        self.roads: list[Feature] = []
        self.variants = {name: list(others) for name, others in (variants or {}).items()}
        everything = [*shapes, *self._district_degrees.values()]
        self.bounds: Bounds | None = tuple(shapely.total_bounds(everything).tolist()) if everything else None
        self._projection = _plane(shapes or everything or [shapely.Point(centre[1], centre[0])])
        metres, is_line = self._project(shapes), shapely.get_dimensions(self._degrees) == 1
        self.street_names = sorted(set(names))
        code = {name: i for i, name in enumerate(self.street_names)}
        self._index = NearIndex(metres, np.array([code[name] for name in names], dtype=np.int64))
        self.names, self.lines = self._names[is_line], metres[is_line]
        self.district_names = [name for name, _ in districts]
        self.district_polygons = self._project([polygon for _, polygon in districts])
        polygons = np.array([polygon for _, polygon in districts], dtype=object)
        self._districts = DistrictIndex(polygons, self.district_polygons, self.to_metres)

    @classmethod
    def load(
        cls,
        streets: str | Path | None,
        districts: str | Path | None = None,
        centre: tuple[float, float] = (0.0, 0.0),
        *,
        district_source: districts_of.Source = "auto",
        admin_level: int | None = None,
        language: str | None = None,
        unit: Unit = "auto",
        with_roads: bool = False,
    ) -> "StreetMap":
        """Read streets and districts from files of any kind that `features.read` knows; the two may be one file.

        Without files the map knows nothing and measures on a plane around `centre` (lat, lon). The other settings are those
        of `CityConfig`; they say what is taken from an OpenStreetMap extract. With `with_roads` what tiles show is kept too.

        Raises:
            InputError: a file is missing or damaged, or has nothing named in it.
        """
        both = streets is not None and districts is not None and Path(streets) == Path(districts)
        names, shapes, variants, roads = [], [], {}, []
        if streets:
            extract = features.read(
                streets, "city.streets", lambda t: wanted(t) or (both and is_district(t)) or (with_roads and is_road(t))
            )
            lines = _lines_of(extract) if both else extract
            found = network(lines, str(streets), language, unit)
            names, shapes, variants = found.names, found.shapes, found.variants
            roads = roads_of(lines, found, language) if with_roads else []
        polygons: list[tuple[str, BaseGeometry]] = []
        if districts:
            extract = extract if both else features.read(districts, "city.districts", is_district)
            on_street = shapely.point_on_surface(list(dict(zip(names, shapes, strict=True)).values()))
            layer = districts_of.choose(_named(extract, language), on_street, str(districts), district_source, admin_level)
            polygons = _merged(layer, language)
            for name, others in variants_of(layer, language).items():
                variants[name] = list(dict.fromkeys([*variants.get(name, []), *others]))
        made = cls(names, shapes, polygons, centre, variants)
        made.roads = roads
        return made

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
        x, y = self.to_metres(np.atleast_1d(lat), np.atleast_1d(lon))
        found: list[list[tuple[str, float]]] = [[] for _ in x]
        point, code, metres = self._index.all(x, y, limit_m)
        for i, street, distance in zip(point.tolist(), code.tolist(), metres.tolist(), strict=True):
            found[i].append((self.street_names[street], distance))
        return found

    def nearest_two(
        self, lat: ArrayLike, lon: ArrayLike, limit_m: float
    ) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.int32], NDArray[np.float64]]:
        """The nearest street and the nearest one of another name for N points, without a step of Python a point.

        Returns:
            code: (N,) positions in `street_names`, -1 where there is none within the limit.
            distance: (N,) metres to the cm, inf where there is none.
            second code, second distance: the same for the other street. Of two equally near the first by name comes first.
        """
        x, y = self.to_metres(np.atleast_1d(lat), np.atleast_1d(lon))
        return self._index.two(x, y, limit_m)

    def nearest(
        self, lat: ArrayLike, lon: ArrayLike, limit_m: float
    ) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[Any], NDArray[np.float64]]:
        """`nearest_two` with names instead of codes: (N,) strings, None where there is no street within the limit."""
        names = np.array([*self.street_names, None], dtype=object)
        first, distance, second, second_distance = self.nearest_two(lat, lon, limit_m)
        return names[first], distance, names[second], second_distance

    def district_codes(self, lat: ArrayLike, lon: ArrayLike) -> NDArray[np.int32]:
        """For N points the district around each (the smallest if they overlap), or the one beside it (see DistrictIndex).

        Returns:
            (N,) positions in `district_names`, -1 for a point outside all of them.
        """
        return self._districts.codes(*(np.atleast_1d(np.asarray(v, dtype=float)) for v in (lat, lon)))

    def district(self, lat: ArrayLike, lon: ArrayLike) -> list[str | None]:
        """`district_codes` as names, None for a point outside all districts."""
        return [self.district_names[code] if code >= 0 else None for code in self.district_codes(lat, lon).tolist()]

    def street_shapes(self, names: Sequence[str]) -> dict[str, BaseGeometry]:
        """The shape of each street in degrees (lon, lat), of one or several parts; unknown names are absent."""
        wanted_names = set(names)
        parts: dict[str, list[BaseGeometry]] = defaultdict(list)
        for name, shape in zip(self._names, self._degrees, strict=True):
            if name in wanted_names:
                parts[name].append(shape)
        return {name: _one(found) for name, found in parts.items()}

    def district_shapes(self, names: Sequence[str]) -> dict[str, BaseGeometry]:
        """The polygon of each district in degrees (lon, lat); unknown names are absent."""
        return {name: self._district_degrees[name] for name in names if name in self._district_degrees}

    def _project(self, shapes: Sequence[BaseGeometry]) -> NDArray[Any]:
        """Degrees to metres."""
        return shapely.transform(
            np.array(shapes, dtype=object), lambda c: np.column_stack(self._projection.transform(c[:, 0], c[:, 1]))
        )


def _plane(shapes: Sequence[BaseGeometry]) -> pyproj.Transformer:
    """From degrees to metres on a plane around the middle of the shapes."""
    west, south, east, north = shapely.total_bounds(shapes)
    plane = f"+proj=tmerc +lat_0={(south + north) / 2:.6f} +lon_0={(west + east) / 2:.6f} +k=1 +datum=WGS84 +units=m +no_defs"
    return pyproj.Transformer.from_crs("EPSG:4326", plane, always_xy=True)


def _lines_of(extract: Extract) -> Extract:
    """Of a table that holds streets and districts, the streets; of OpenStreetMap's objects, all."""
    return extract if extract.osm else Extract.of([f for f in extract.features if f.dimension < 2], extract.bounds)


def _named(extract: Extract, language: str | None) -> Extract:
    """The objects that have a name."""
    found = [f for f in extract.features if spellings(f.tags, language)[0]]
    return Extract.of(found, extract.bounds, extract.osm, extract.incomplete)


def _merged(layer: Sequence[Feature], language: str | None) -> list[tuple[str, BaseGeometry]]:
    """Areas of one name as one, under the name that is shown."""
    parts: dict[str, list[BaseGeometry]] = defaultdict(list)
    for area in layer:
        shape = area.shape if area.shape.is_valid else shapely.make_valid(area.shape)
        parts[spellings(area.tags, language)[0]].append(shape)
    return [(name, shapely.union_all(shapes)) for name, shapes in parts.items()]


def _one(parts: list[BaseGeometry]) -> BaseGeometry:
    """Several parts as one shape: a MultiLineString if they are lines."""
    if len(parts) == 1:
        return parts[0]
    kinds = {part.geom_type for part in parts}
    build = {"LineString": shapely.multilinestrings, "Polygon": shapely.multipolygons, "Point": shapely.multipoints}
    return build[kinds.pop()](parts) if len(kinds) == 1 else shapely.geometrycollections(parts)
