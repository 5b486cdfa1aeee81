"""A city's named streets and districts: what is near a point, how far, and in which direction it runs."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyproj
import shapely
from numpy.typing import ArrayLike, NDArray
from shapely.geometry.base import BaseGeometry

from addressvlm.dataset import districts as districts_of
from addressvlm.dataset import geo_files
from addressvlm.dataset.districts import DistrictIndex, district_cells
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
)
from addressvlm.errors import InputError
from addressvlm.gazetteer.name_matcher import is_distinctive, normalize_name, osm_names
from addressvlm.gazetteer.spatial_index import METRES_PER_DEGREE, NearestStreets

Unit = Literal["auto", "streets", "blocks"]

ORDINARY = frozenset("primary secondary tertiary unclassified residential living_street pedestrian".split())
NAMED_SHARE = 0.2  # where fewer of the ordinary streets have a name, blocks are the addresses, if there are any
SAME_STREET_M = 50.0  # two spellings of one name belong to one street if their lines come this near


@dataclass(frozen=True)
class StreetNames:
    """Named shapes in degrees, and other names of those names (without the names themselves).

    `shown` tells for each spelling of the file under which name it is shown.
    """

    names: list[str]
    shapes: list[BaseGeometry]
    variants: dict[str, list[str]]
    shown: dict[str, str]


def wanted(tags: Tags) -> bool:
    """What of an OpenStreetMap file is needed here: named streets, blocks, and how many ordinary streets have no name."""
    return (is_street(tags) and (named(tags) or tags.get("highway") in ORDINARY)) or (is_block(tags) and named(tags))


def named(tags: Tags) -> bool:
    """Whether there is a name in any language."""
    return any(key == "name" or key.startswith("name:") for key in tags)


def street_names(extract: GeoExtract, path: str, language: str | None = None, unit: Unit = "auto") -> StreetNames:
    """The streets (or blocks) of an extract or of a table, each with the name that is shown.

    All lines of a table count, and its areas and points too unless it has OpenStreetMap's `highway` or `place`, by which
    these are judged then.

    Raises:
        InputError: nothing of it has a name.
    """
    features = [f for f in extract.features if osm_names(f.tags, language)[0]]
    of_osm = extract.osm or any("highway" in f.tags or "place" in f.tags for f in features)
    if unit == "blocks" or (unit == "auto" and of_osm and _few_names(extract)):
        chosen = _blocks(features, extract)
        if chosen or unit == "blocks":
            return _named(chosen, path, language)
    return _named([f for f in features if _counts(f, of_osm, extract.osm)], path, language)


def roads_of(extract: GeoExtract, streets: StreetNames, language: str | None = None) -> list[GeoFeature]:
    """What tiles are drawn from: all that one can walk or drive on, and all lines of a table.

    The names are those of the streets; tags are `name`, `highway` and `alt_name` (the variants).
    """
    found = []
    for feature in extract.features:
        if is_road(feature.tags) if extract.osm or feature.dimension == 2 else feature.dimension == 1:
            written, others = osm_names(feature.tags, language)
            name = streets.shown.get(written, written)
            variants = "; ".join(streets.variants.get(name, others))
            tags = {"name": name, "highway": feature.tags.get("highway", ""), "alt_name": variants}
            found.append(GeoFeature({key: text for key, text in tags.items() if text}, feature.shape))
    return found


def variants_of(
    features: Sequence[GeoFeature], language: str | None = None, shown: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Shown name -> all other names that objects of this name have; `shown` as in `StreetNames`."""
    others: dict[str, dict[str, None]] = defaultdict(dict)
    for feature in features:
        written, more = osm_names(feature.tags, language)
        others[(shown or {}).get(written, written)] |= dict.fromkeys([written, *more])
    found = {name: [other for other in more if other != name] for name, more in others.items() if name}
    return {name: more for name, more in found.items() if more}


def _counts(feature: GeoFeature, of_osm: bool, chosen_by_us: bool) -> bool:
    """Whether a named object is a street; whoever made a table chose its lines."""
    if not of_osm or (feature.dimension == 1 and not chosen_by_us):
        return True
    return is_street(feature.tags) and (feature.dimension > 0 or feature.tags.get("place") == "square")


def _few_names(extract: GeoExtract) -> bool:
    """Whether most ordinary streets have no name."""
    counts = Counter(named(f.tags) for f in extract.features if f.tags.get("highway") in ORDINARY)
    return counts[True] < NAMED_SHARE * counts.total()


def _blocks(features: Sequence[GeoFeature], extract: GeoExtract) -> list[GeoFeature]:
    """The finest areas that an address can name; beside them, where there are only middles of such, the cells around these."""
    blocks = [f for f in features if is_block(f.tags)]
    areas = [f for f in blocks if f.dimension == 2]
    inner, outer = _intersecting([f.shape.representative_point() for f in areas], areas)
    coarse = {o for i, o in zip(inner, outer, strict=True) if areas[i].shape.area < 0.9 * areas[o].shape.area}
    finest = [area for i, area in enumerate(areas) if i not in coarse]
    points = [f for f in blocks if f.dimension == 0]
    covered = set(_intersecting([f.shape for f in points], finest)[0])
    free = [point for i, point in enumerate(points) if i not in covered]
    if free:
        kinds = Counter(point.tags["place"] for point in free)
        kind = max(BLOCK_PLACES, key=lambda place: kinds[place])
        rest = shapely.difference(shapely.box(*extract.bounds), shapely.union_all([f.shape for f in finest]))
        finest += district_cells([point for point in free if point.tags["place"] == kind], rest)
    return finest


def _intersecting(shapes: list[BaseGeometry], areas: Sequence[GeoFeature]) -> NDArray[np.int64]:
    """Pairs (2, N) of a shape and an area that meet."""
    return shapely.STRtree([f.shape for f in areas]).query(np.array(shapes, dtype=object), predicate="intersects")


def _named(features: Sequence[GeoFeature], path: str, language: str | None) -> StreetNames:
    """Shapes by the name that is shown; a MultiLineString or such is taken apart.

    Raises:
        InputError: there are none.
    """
    if not features:
        raise InputError(
            f"{path} has no named street: it needs lines (or areas, or points) with the property `name`, or OpenStreetMap's "
            f"streets, squares or blocks with one."
        )
    written = [osm_names(f.tags, language)[0] for f in features]
    local = [f.tags.get("name", "").strip() or shown for f, shown in zip(features, written, strict=True)]
    names = _translated(written, local, _one_spelling(local, [f.shape for f in features]))
    one = _one_spelling(names, [f.shape for f in features])
    shown = {spelling: one[name] for spelling, name in zip(written, names, strict=True)}
    parts, owner = shapely.get_parts([f.shape for f in features], return_index=True)
    return StreetNames([shown[written[i]] for i in owner], list(parts), variants_of(features, language, shown), shown)


def _translated(shown: list[str], local: list[str], street: dict[str, str]) -> list[str]:
    """Where only some ways of a street have `name:<language>`, the others take it from them, by their `name`.

    `street` says of such names which are spellings of one.
    """
    said: dict[str, Counter[str]] = defaultdict(Counter)
    for name, of_place in zip(shown, local, strict=True):
        if name != of_place:
            said[street[of_place]][name] += 1
    return [
        said[street[of_place]].most_common(1)[0][0] if name == of_place and street[of_place] in said else name
        for name, of_place in zip(shown, local, strict=True)
    ]


def _one_spelling(names: Sequence[str], shapes: Sequence[BaseGeometry]) -> dict[str, str]:
    """For each spelling the one that is shown: of those with one normal form and touching lines the most frequent.

    Streets of one form in different parts of the city stay apart; so do `E Street` and `East Street`, which may well cross.
    """
    counts = Counter(names)
    forms: dict[str, list[str]] = defaultdict(list)
    for name in sorted(counts, key=lambda n: (-counts[n], -len(n), n)):
        forms[normalize_name(name)].append(name)
    shown = {name: name for name in counts}
    several = [alike for alike in forms.values() if len(alike) > 1 and is_distinctive(alike[0])]
    if not several:
        return shown
    squeeze = np.cos(np.radians(np.mean(shapely.total_bounds(shapes)[1::2])))
    parts = defaultdict(list)
    doubtful = {name for alike in several for name in alike}
    for name, shape in zip(names, shapes, strict=True):
        if name in doubtful:
            parts[name].append(shapely.transform(shape, lambda c: c * METRES_PER_DEGREE * [squeeze, 1]))
    whole = {name: shapely.geometrycollections(found) for name, found in parts.items()}
    for alike in several:
        left = list(alike)
        while left:
            street = [left.pop(0)]
            for member in street:  # grows while it is gone through
                near = [name for name in left if shapely.dwithin(whole[member], whole[name], SAME_STREET_M)]
                street += near
                left = [name for name in left if name not in near]
            shown |= dict.fromkeys(street, street[0])
    return shown


class StreetMap:
    """Named shapes, in metres on a plane around their centre (x east, y north) for everything measured.

    A street is lines; a square, or a block where addresses are blocks, is an area (0 m from every point in it) or a point.

    Attributes:
        street_names, district_names: sorted, each once; empty without a file.
        names, lines: the name and the LineString in metres of every line; the same name may have many.
        district_polygons: those of `district_names`, in metres.
        variants: name of a street or district -> its other names (languages, old and short forms), where it has any.
        bounds: west, south, east, north of all shapes in degrees; None without any.
        roads: what tiles are drawn from (see `street_names.roads_of`), where `load` was asked for it.
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
        self._projection = _plane(shapes or everything or [shapely.Point(centre[1], centre[0])])
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
        district_source: districts_of.Source = "auto",
        admin_level: int | None = None,
        language: str | None = None,
        unit: Unit = "auto",
        with_roads: bool = False,
    ) -> "StreetMap":
        """Read streets and districts from files of any kind that `geo_files.read_geo_file` knows; the two may be one file.

        Without files the map knows nothing and measures on a plane around `centre` (lat, lon). The other settings are those
        of `CityConfig`; they say what is taken from an OpenStreetMap extract. With `with_roads` what tiles show is kept too.

        Raises:
            InputError: a file is missing or damaged, or has nothing named in it.
        """
        both = streets is not None and districts is not None and Path(streets) == Path(districts)
        names, shapes, variants, roads = [], [], {}, []
        if streets:
            extract = geo_files.read_geo_file(
                streets, "city.streets", lambda t: wanted(t) or (both and is_district(t)) or (with_roads and is_road(t))
            )
            lines = _lines_of(extract) if both else extract
            found = street_names(lines, str(streets), language, unit)
            names, shapes, variants = found.names, found.shapes, found.variants
            roads = roads_of(lines, found, language) if with_roads else []
        polygons: list[tuple[str, BaseGeometry]] = []
        if districts:
            extract = extract if both else geo_files.read_geo_file(districts, "city.districts", is_district)
            on_street = shapely.point_on_surface(list(dict(zip(names, shapes, strict=True)).values()))
            layer = districts_of.choose_districts(
                _named_shapes(extract, language), on_street, str(districts), district_source, admin_level
            )
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


def _lines_of(extract: GeoExtract) -> GeoExtract:
    """Of a table that holds streets and districts, the streets; of OpenStreetMap's objects, all."""
    return extract if extract.osm else GeoExtract.of([f for f in extract.features if f.dimension < 2], extract.bounds)


def _named_shapes(extract: GeoExtract, language: str | None) -> GeoExtract:
    """The objects that have a name."""
    found = [f for f in extract.features if osm_names(f.tags, language)[0]]
    return GeoExtract.of(found, extract.bounds, extract.osm, extract.incomplete)


def _merged(layer: Sequence[GeoFeature], language: str | None) -> list[tuple[str, BaseGeometry]]:
    """Areas of one name as one, under the name that is shown."""
    parts: dict[str, list[BaseGeometry]] = defaultdict(list)
    for area in layer:
        shape = area.shape if area.shape.is_valid else shapely.make_valid(area.shape)
        parts[osm_names(area.tags, language)[0]].append(shape)
    return [(name, shapely.union_all(shapes)) for name, shapes in parts.items()]


def _one(parts: list[BaseGeometry]) -> BaseGeometry:
    """Several parts as one shape: a MultiLineString if they are lines."""
    if len(parts) == 1:
        return parts[0]
    kinds = {part.geom_type for part in parts}
    build = {"LineString": shapely.multilinestrings, "Polygon": shapely.multipolygons, "Point": shapely.multipoints}
    return build[kinds.pop()](parts) if len(kinds) == 1 else shapely.geometrycollections(parts)
