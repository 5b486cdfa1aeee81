"""A city's named streets and districts: which are near a point and how far, and how a map file names them."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyproj
import shapely
from numpy.typing import ArrayLike, NDArray
from shapely.geometry.base import BaseGeometry

from addressvlm.dataset.districts import DistrictIndex, DistrictSource, choose_districts, district_cells
from addressvlm.dataset.geo_files import (
    BLOCK_PLACES,
    Bounds,
    GeoExtract,
    GeoFeature,
    Tags,
    is_block,
    is_district,
    is_road,
    is_street,
    make_valid,
    read_geo_file,
)
from addressvlm.dataset.spellings import translate_spellings, unify_spellings
from addressvlm.errors import InputError
from addressvlm.gazetteer.names import osm_names
from addressvlm.gazetteer.spatial_index import NearestStreets

Unit = Literal["auto", "streets", "blocks"]

ORDINARY = frozenset("primary secondary tertiary unclassified residential living_street pedestrian".split())
NAMED_SHARE = 0.2  # where fewer of the ordinary streets have a name, blocks are the addresses, if there are any


class StreetMap:
    """Named shapes, in metres on a plane around their centre (x east, y north) for everything measured.

    A street is lines; a square, or a block where addresses are blocks, is an area (0 m from every point in it) or a point.

    Attributes:
        street_names, district_names: sorted, each once; empty without a file.
        names, lines: the name and the LineString in metres of every line; the same name may have many.
        district_polygons: those of `district_names`, in metres.
        variants: name of a street or district -> its other names (languages, old and short forms), where it has any.
        bounds: west, south, east, north of all shapes in degrees; None without any.
        roads: what tiles are drawn from (see `select_roads`); empty without `load(with_roads=True)`.
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
        self.roads: list[GeoFeature] = []
        self.variants = {name: list(others) for name, others in (variants or {}).items()}
        everything = [*shapes, *self._district_degrees.values()]
        self.bounds: Bounds | None = tuple(shapely.total_bounds(everything).tolist()) if everything else None
        west, south, east, north = shapely.total_bounds(shapes or everything or [shapely.Point(centre[1], centre[0])])
        middle = f"+lat_0={(south + north) / 2:.6f} +lon_0={(west + east) / 2:.6f}"
        plane = f"+proj=tmerc {middle} +k=1 +datum=WGS84 +units=m +no_defs"
        self._projection = pyproj.Transformer.from_crs("EPSG:4326", plane, always_xy=True)
        metres, is_line = self._project(shapes), shapely.get_dimensions(self._degrees) == 1
        self.street_names = sorted(set(names))
        code = {name: i for i, name in enumerate(self.street_names)}
        self._index = NearestStreets(metres, np.array([code[name] for name in names], dtype=np.int64))
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
        district_source: DistrictSource = "auto",
        admin_level: int | None = None,
        language: str | None = None,
        unit: Unit = "auto",
        encoding: str | None = None,
        with_roads: bool = False,
    ) -> "StreetMap":
        """Read streets and districts from files of any kind that `read_geo_file` supports; the two may be one file.

        Without files the map is empty and measures on a plane around `centre` (lat, lon). The other settings are those of
        `CityConfig`; they say what is taken from an OpenStreetMap extract.

        Raises:
            InputError: a file is missing or damaged, or has nothing named in it.
        """
        one_file = streets is not None and districts is not None and Path(streets) == Path(districts)
        names, polygons = StreetNames([], [], {}, {}), list[tuple[str, BaseGeometry]]()
        roads: list[GeoFeature] = []
        if streets:

            def select(tags: Tags) -> bool:  # `select_streets` counts ordinary streets without a name
                street = is_street(tags) and (has_name(tags) or tags.get("highway") in ORDINARY)
                block = is_block(tags) and has_name(tags)
                return street or block or (one_file and is_district(tags)) or (with_roads and is_road(tags))

            extract = read_geo_file(streets, "city.streets", select, encoding)
            lines = extract
            if one_file and not extract.osm:  # a table of both: its areas are the districts
                lines = GeoExtract.from_features([f for f in extract.features if f.dimension < 2], extract.bounds)
            names = select_streets(lines, str(streets), language, unit)
            roads = select_roads(lines, names, language) if with_roads else []
        if districts:
            if not one_file:
                extract = read_geo_file(districts, "city.districts", is_district, encoding)
            points = shapely.point_on_surface(list(dict(zip(names.names, names.shapes, strict=True)).values()))
            polygons, district_variants = select_districts(
                extract, points, str(districts), language, district_source, admin_level
            )
            for name, others in district_variants.items():
                names.variants[name] = list(dict.fromkeys([*names.variants.get(name, []), *others]))
        street_map = cls(names.names, names.shapes, polygons, centre, names.variants)
        street_map.roads = roads
        return street_map

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
        streets: list[list[tuple[str, float]]] = [[] for _ in x]
        point, code, metres = self._index.within(x, y, limit_m)
        for i, street, distance in zip(point.tolist(), code.tolist(), metres.tolist(), strict=True):
            streets[i].append((self.street_names[street], distance))
        return streets

    def nearest_two(
        self, lat: ArrayLike, lon: ArrayLike, limit_m: float
    ) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.int32], NDArray[np.float64]]:
        """The nearest street and the nearest one of another name for N points, vectorized.

        Returns:
            code: (N,) positions in `street_names`, -1 where there is none within the limit.
            distance: (N,) metres to the cm, inf where there is none.
            second code, second distance: the same for the other street. Of two equally near the first by name comes first.
        """
        x, y = self.to_metres(np.atleast_1d(lat), np.atleast_1d(lon))
        return self._index.nearest_two(x, y, limit_m)

    def nearest(
        self, lat: ArrayLike, lon: ArrayLike, limit_m: float
    ) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[Any], NDArray[np.float64]]:
        """`nearest_two` with names instead of codes: (N,) strings, None where there is no street within the limit."""
        names = np.array([*self.street_names, None], dtype=object)
        first, distance, second, second_distance = self.nearest_two(lat, lon, limit_m)
        return names[first], distance, names[second], second_distance

    def district_codes(self, lat: ArrayLike, lon: ArrayLike) -> NDArray[np.int32]:
        """For N points the district around each (the smallest if they overlap), else the nearest (see DistrictIndex).

        Returns:
            (N,) positions in `district_names`, -1 for a point outside all of them.
        """
        return self._districts.codes(*(np.atleast_1d(np.asarray(v, dtype=float)) for v in (lat, lon)))

    def district(self, lat: ArrayLike, lon: ArrayLike) -> list[str | None]:
        """`district_codes` as names, None for a point outside all districts."""
        return [self.district_names[code] if code >= 0 else None for code in self.district_codes(lat, lon).tolist()]

    def street_shapes(self, names: Sequence[str]) -> dict[str, BaseGeometry]:
        """The shape of each street in degrees (lon, lat), of one or several parts; unknown names are absent."""
        selected = set(names)
        parts: dict[str, list[BaseGeometry]] = defaultdict(list)
        for name, shape in zip(self._names, self._degrees, strict=True):
            if name in selected:
                parts[name].append(shape)
        build = {"LineString": shapely.multilinestrings, "Polygon": shapely.multipolygons, "Point": shapely.multipoints}
        collected = {}
        for name, shapes in parts.items():
            kinds = {shape.geom_type for shape in shapes}
            collect = build[kinds.pop()] if len(kinds) == 1 else shapely.geometrycollections
            collected[name] = collect(shapes) if len(shapes) > 1 else shapes[0]
        return collected

    def district_shapes(self, names: Sequence[str]) -> dict[str, BaseGeometry]:
        """The polygon of each district in degrees (lon, lat); unknown names are absent."""
        return {name: self._district_degrees[name] for name in names if name in self._district_degrees}

    def _project(self, shapes: Sequence[BaseGeometry]) -> NDArray[Any]:
        """Degrees to metres."""
        to_plane = self._projection.transform
        return shapely.transform(np.array(shapes, dtype=object), lambda c: np.column_stack(to_plane(c[:, 0], c[:, 1])))


@dataclass(frozen=True)
class StreetNames:
    """Named shapes in degrees.

    Attributes:
        names: the displayed name of each shape.
        variants: displayed name -> its other names.
        display: spelling in the file -> displayed name.
    """

    names: list[str]
    shapes: list[BaseGeometry]
    variants: dict[str, list[str]]
    display: dict[str, str]


def has_name(tags: Tags) -> bool:
    """Whether there is a name in any language."""
    return any(key == "name" or key.startswith("name:") for key in tags)


def select_streets(extract: GeoExtract, path: str, language: str | None = None, unit: Unit = "auto") -> StreetNames:
    """The streets (or blocks) of an extract or of a table, each with its displayed name.

    All lines of a table count, and its areas and points too unless it has OpenStreetMap's `highway` or `place`, by which
    these are judged then. InputError if nothing of it has a name.
    """
    features = [f for f in extract.features if osm_names(f.tags, language)[0]]
    osm_tags = extract.osm or any("highway" in f.tags or "place" in f.tags for f in features)

    def counts(feature: GeoFeature) -> bool:
        if not osm_tags or (feature.dimension == 1 and not extract.osm):  # whoever made a table selected its lines
            return True
        return is_street(feature.tags) and (feature.dimension > 0 or feature.tags.get("place") == "square")

    use_blocks = unit == "blocks"
    if unit == "auto" and osm_tags:
        ordinary = Counter(has_name(f.tags) for f in extract.features if f.tags.get("highway") in ORDINARY)
        use_blocks = ordinary[True] < NAMED_SHARE * ordinary.total()
    blocks = _finest_blocks(features, extract) if use_blocks else []
    streets = blocks if blocks or unit == "blocks" else [f for f in features if counts(f)]
    if not streets:
        raise InputError(
            f"{path} has no named street: it needs lines (or areas, or points) with the property `name`, or OpenStreetMap's "
            f"streets, squares or blocks with one."
        )
    return _display_names(streets, language)


def select_districts(
    extract: GeoExtract, points: NDArray[np.object_], path: str, language: str | None, source: DistrictSource, level: int | None
) -> tuple[list[tuple[str, BaseGeometry]], dict[str, list[str]]]:
    """The districts (name and polygon) that `choose_districts` finds among the named objects, and their variants."""
    named = [f for f in extract.features if osm_names(f.tags, language)[0]]
    layer = choose_districts(replace(extract, features=named), points, path, source, level)
    if cut := sorted({osm_names(area.tags, language)[0] for area in layer if area.cut}):
        some = ", ".join(cut[:5]) + (", …" if len(cut) > 5 else "")
        print(f"prepare: {path} lacks parts of the border of {some} ({len(cut)} in all): take a larger extract", flush=True)
    parts = defaultdict(list)
    for area in layer:
        parts[osm_names(area.tags, language)[0]].append(make_valid(area.shape))
    return [(name, shapely.union_all(shapes)) for name, shapes in parts.items()], collect_variants(layer, language)


def select_roads(extract: GeoExtract, streets: StreetNames, language: str | None = None) -> list[GeoFeature]:
    """What tiles are drawn from: all that one can walk or drive on, and all lines of a table.

    The names are those of the streets; tags are `name`, `highway` and `alt_name` (the variants).
    """
    roads = []
    for feature in extract.features:
        if is_road(feature.tags) if extract.osm or feature.dimension == 2 else feature.dimension == 1:
            spelling, others = osm_names(feature.tags, language)
            name = streets.display.get(spelling, spelling)
            variants = "; ".join(streets.variants.get(name, others))
            tags = {"name": name, "highway": feature.tags.get("highway", ""), "alt_name": variants}
            roads.append(GeoFeature({key: text for key, text in tags.items() if text}, feature.shape))
    return roads


def collect_variants(
    features: Sequence[GeoFeature], language: str | None = None, display: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Displayed name -> all other names that features of this name have; `display` as in `StreetNames`."""
    variants: dict[str, dict[str, None]] = defaultdict(dict)
    for feature in features:
        spelling, others = osm_names(feature.tags, language)
        variants[(display or {}).get(spelling, spelling)] |= dict.fromkeys([spelling, *others])
    lists = {name: [other for other in others if other != name] for name, others in variants.items() if name}
    return {name: others for name, others in lists.items() if others}


def _finest_blocks(features: Sequence[GeoFeature], extract: GeoExtract) -> list[GeoFeature]:
    """The finest areas that an address can name, and where there are only centre nodes of such, the cells around these."""

    def intersecting(shapes: list[BaseGeometry], areas: Sequence[GeoFeature]) -> NDArray[np.int64]:
        """Pairs (2, N) of a shape and an area."""
        return shapely.STRtree([f.shape for f in areas]).query(np.array(shapes, dtype=object), predicate="intersects")

    blocks = [f for f in features if is_block(f.tags)]
    areas = [f for f in blocks if f.dimension == 2]
    inner, outer = intersecting([f.shape.representative_point() for f in areas], areas)
    coarse = {o for i, o in zip(inner, outer, strict=True) if areas[i].shape.area < 0.9 * areas[o].shape.area}
    finest = [area for i, area in enumerate(areas) if i not in coarse]
    nodes = [f for f in blocks if f.dimension == 0]
    covered = set(intersecting([f.shape for f in nodes], finest)[0])
    free = [node for i, node in enumerate(nodes) if i not in covered]
    if free:
        counts = Counter(node.tags["place"] for node in free)
        kind = max(BLOCK_PLACES, key=lambda place: counts[place])
        rest = shapely.difference(shapely.box(*extract.bounds), shapely.union_all([f.shape for f in finest]))
        finest += district_cells([node for node in free if node.tags["place"] == kind], rest)
    return finest


def _display_names(features: Sequence[GeoFeature], language: str | None) -> StreetNames:
    """Shapes by displayed name; multi-part shapes are split into their parts."""
    shapes = [f.shape for f in features]
    spellings = [osm_names(f.tags, language)[0] for f in features]
    local = [f.tags.get("name", "").strip() or spelling for f, spelling in zip(features, spellings, strict=True)]
    names = translate_spellings(spellings, local, unify_spellings(local, shapes))
    unified = unify_spellings(names, shapes)
    display = {spelling: unified[name] for spelling, name in zip(spellings, names, strict=True)}
    parts, feature = shapely.get_parts(shapes, return_index=True)
    return StreetNames(
        [display[spellings[i]] for i in feature], list(parts), collect_variants(features, language, display), display
    )
