"""OpenStreetMap: `.osm.pbf` and `.osm` files by pyosmium, answers of the Overpass API, and which objects are what.

A file is read in three passes (objects that are wanted, ways of wanted areas, nodes of all these), so that memory holds what
is wanted and not the file, and the order of its objects does not matter.
"""

import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import osmium
import pyogrio
import pyproj
import shapely
from numpy.typing import NDArray
from osmium.filter import KeyFilter
from osmium.osm import NODE, WAY
from shapely.geometry.base import BaseGeometry

from addressvlm.errors import InputError
from addressvlm.storage.files import local_copy
from addressvlm.storage.remote_path import AnyPath

Tags = dict[str, str]
Bounds = tuple[float, float, float, float]  # west, south, east, north in degrees


@dataclass(frozen=True, slots=True)
class GeoFeature:
    """One object: its tags and its shape in degrees (lon, lat), never empty."""

    tags: Tags
    shape: BaseGeometry

    @property
    def dimension(self) -> int:
        """0 for points, 1 for lines, 2 for areas."""
        return int(shapely.get_dimensions(self.shape))


@dataclass(frozen=True)
class GeoExtract:
    """The objects of a file, and the rectangle that the file is about."""

    features: list[GeoFeature]
    bounds: Bounds  # as the file says, else that of the objects; zeros without any
    osm: bool = False  # whether it has OpenStreetMap's tags
    incomplete: int = 0  # areas whose border is not all in the file

    @classmethod
    def of(
        cls, features: Sequence[GeoFeature], bounds: Bounds | None = None, osm: bool = False, incomplete: int = 0
    ) -> "GeoExtract":
        """Leaves out objects without a shape, and takes the bounds of the others if none are given."""
        kept = [f for f in features if not f.shape.is_empty]
        if bounds is None:
            west, south, east, north = shapely.total_bounds([f.shape for f in kept]).tolist() if kept else (0.0,) * 4
            bounds = (west, south, east, north)
        return cls(kept, bounds, osm, incomplete)


FILES = (".osm", ".pbf", ".osm.gz", ".osm.bz2", ".o5m", ".opl")
KEYS = ("highway", "place", "boundary")  # an object without any of these is neither a street nor a district

# Carriageways of every class, and the ways on foot that houses have their address on: pedestrian zones, living streets,
# named alleys (`service`), passages (`footway`) and stairs. Trails (`path`, `cycleway`, `bridleway`, `track`) carry the names
# of routes, which no address has and which run beside the street that is meant.
STREET_CLASSES = frozenset(
    "motorway trunk primary secondary tertiary unclassified residential living_street pedestrian service footway steps road "
    "motorway_link trunk_link primary_link secondary_link tertiary_link".split()
)
NOT_BUILT = frozenset(("proposed", "construction", "razed", "abandoned", "elevator", "platform", "corridor", "bus_stop"))
# Where addresses are blocks, the unit that an address names, from the finest; where they are streets, see DISTRICT_PLACES.
BLOCK_PLACES = ("city_block", "block", "neighbourhood", "quarter")
BLOCK_LEVELS = ("9", "10", "11")  # administrative areas that Japan's addresses name: 町, 大字, 丁目
DISTRICT_PLACES = ("neighbourhood", "quarter", "suburb", "borough")  # from the finest

_KEPT = re.compile(r"highway|place|boundary|admin_level|area|tunnel|indoor|type|(\w+_)?name(:.*|_\d+)?")
_Line = NDArray[np.float64]  # (n, 2) lon, lat
_Border = list[tuple[str, _Line]]  # role and line of each way of an area


def is_road(tags: Tags) -> bool:
    """Whether it is something to walk or drive on, named or not."""
    return "highway" in tags and tags["highway"] not in NOT_BUILT


def is_street(tags: Tags) -> bool:
    """Whether an address can be on it: a street of STREET_CLASSES that is not indoors or under the ground, or a square."""
    if tags.get("place") == "square":
        return True
    under = tags.get("tunnel") == "yes" or tags.get("indoor") == "yes"
    return tags.get("highway") in STREET_CLASSES and not under


def is_block(tags: Tags) -> bool:
    """Whether an address can name it where streets have no names; a block that only has a number has no name of its own."""
    fine = tags.get("boundary") == "administrative" and tags.get("admin_level") in BLOCK_LEVELS
    return (fine or tags.get("place") in BLOCK_PLACES) and not tags.get("name", "").isdecimal()


def is_district(tags: Tags) -> bool:
    """Whether it can be a district: an administrative area, or a part of a town."""
    return tags.get("boundary") == "administrative" or tags.get("place") in DISTRICT_PLACES


def read_file(path: Path, wanted: Callable[[Tags], bool]) -> GeoExtract:
    """The wanted ones among the objects with one of KEYS. Nodes that the file lacks are left out of their ways.

    Raises:
        InputError: the file is cut short or damaged.
        OSError: it can't be opened.
    """
    path.open("rb").close()  # pyosmium says all that goes wrong in one way
    try:
        with osmium.io.Reader(str(path), osmium.osm.NOTHING) as reader:
            bounds = _header_bounds(reader.header().box())
        return _Reading(path, wanted).extract(bounds)
    except RuntimeError as error:  # the only kind that pyosmium raises
        detail = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is cut short or damaged ({detail}): download it again.") from None


def read_overpass(tree: dict[str, Any], wanted: Callable[[Tags], bool]) -> GeoExtract:
    """The wanted objects of an answer of the Overpass API, with `out geom` or with the nodes as elements of their own.

    Raises:
        KeyError, TypeError, ValueError: the tree is not such an answer.
    """
    elements = {kind: [e for e in tree["elements"] if e["type"] == kind] for kind in ("node", "way", "relation")}
    nodes = {e["id"]: (e["lon"], e["lat"]) for e in elements["node"]}
    ways = {e["id"]: _overpass_line(e, nodes) for e in elements["way"]}

    def chosen(kind: str) -> Iterator[tuple[Tags, Any]]:
        for element in elements[kind]:
            tags = _kept((element.get("tags") or {}).items())
            if tags and wanted(tags):
                yield tags, element

    points = [(tags, nodes[e["id"]]) for tags, e in chosen("node") if "place" in tags]
    lines = [(tags, ways[e["id"]]) for tags, e in chosen("way")]
    areas = [
        (tags, [(m.get("role", ""), _overpass_line(m, nodes) if m.get("geometry") else ways.get(m["ref"], _NOWHERE))
                for m in e.get("members", ()) if m["type"] == "way"])
        for tags, e in chosen("relation") if _is_area_relation(tags)
    ]  # fmt: skip
    return _extract(points, lines, areas, None)


class _Reading:
    """The three passes over one file."""

    def __init__(self, path: Path, wanted: Callable[[Tags], bool]) -> None:
        self.path = str(path)
        self.points: list[tuple[Tags, tuple[float, float]]] = []
        self.relations: list[tuple[Tags, list[tuple[str, int]]]] = []
        self.tagged: list[tuple[Tags, int]] = []  # way ids
        self.refs: dict[int, NDArray[np.int64]] = {}  # nodes of each way
        self.needed = osmium.IdTracker()
        for item in osmium.FileProcessor(self.path).with_filter(KeyFilter(*KEYS)):
            tags = _kept((tag.k, tag.v) for tag in item.tags)
            if wanted(tags):
                self._keep(item, tags)
        if self.relations:
            for way in self._needed_objects(WAY):
                self._keep_way(way)

    def extract(self, bounds: Bounds | None) -> GeoExtract:
        """The third pass: the nodes; then shapes."""
        ids, lon, lat = array("q"), array("d"), array("d")
        for node in self._needed_objects(NODE):
            if node.location.valid():
                ids.append(node.id)
                lon.append(node.lon)
                lat.append(node.lat)
        order = np.argsort(np.asarray(ids))
        known, places = np.asarray(ids)[order], np.column_stack([lon, lat])[order]

        def line(way: int) -> _Line:
            refs = self.refs.get(way)
            if refs is None or not len(known):
                return _NOWHERE
            at = np.minimum(np.searchsorted(known, refs), len(known) - 1)
            return places[at[known[at] == refs]]

        lines = [(tags, line(way)) for tags, way in self.tagged]
        areas = [(tags, [(role, line(way)) for role, way in members]) for tags, members in self.relations]
        return _extract(self.points, lines, areas, bounds)

    def _needed_objects(self, kind: Any) -> Iterator[Any]:
        """The objects of a kind that are needed."""
        return iter(osmium.FileProcessor(self.path, kind).with_filter(self.needed.id_filter()))

    def _keep(self, item: Any, tags: Tags) -> None:
        if item.is_node():
            if "place" in tags and item.location.valid():
                self.points.append((tags, (item.lon, item.lat)))
        elif item.is_way():
            self.tagged.append((tags, item.id))
            self._keep_way(item)
        elif item.is_relation() and _is_area_relation(tags):
            self.relations.append((tags, [(m.role, m.ref) for m in item.members if m.type == "w"]))
            self.needed.add_references(item)

    def _keep_way(self, way: Any) -> None:
        if way.id not in self.refs:
            self.refs[way.id] = np.fromiter((node.ref for node in way.nodes), dtype=np.int64)
            self.needed.add_references(way)


_NOWHERE = np.zeros((0, 2))


def _kept(tags: Iterable[tuple[str, str]]) -> Tags:
    """The tags that matter here."""
    return {key: value for key, value in tags if _KEPT.fullmatch(key)}


def _is_area_relation(tags: Tags) -> bool:
    return tags.get("type") in ("multipolygon", "boundary")


def _header_bounds(box: Any) -> Bounds | None:
    """The rectangle that a file says it is about, if it does."""
    if not box.valid():
        return None
    return box.bottom_left.lon, box.bottom_left.lat, box.top_right.lon, box.top_right.lat


def _overpass_line(element: dict[str, Any], nodes: dict[int, tuple[float, float]]) -> _Line:
    """The known nodes of a way: Overpass writes null for those outside its rectangle."""
    if element.get("geometry"):
        found = [(point["lon"], point["lat"]) for point in element["geometry"] if point]
    else:
        found = [nodes[ref] for ref in element.get("nodes", ()) if ref in nodes]
    return np.array(found, dtype=float).reshape(-1, 2)


def _extract(
    points: list[tuple[Tags, tuple[float, float]]],
    lines: list[tuple[Tags, _Line]],
    areas: list[tuple[Tags, _Border]],
    bounds: Bounds | None,
) -> GeoExtract:
    """Shapes of what was read; ways and areas of which too little is in the file are left out, such areas counted."""
    features = [GeoFeature(tags, shapely.Point(place)) for tags, place in points]
    for tags, line in lines:
        closed = len(line) > 3 and (line[0] == line[-1]).all()
        if closed and _is_area(tags):
            features.append(GeoFeature(tags, _valid(shapely.polygons(line))))
        elif len(line) > 1:
            features.append(GeoFeature(tags, shapely.linestrings(line)))
    shapes = [(tags, _area(border)) for tags, border in areas]
    features += [GeoFeature(tags, shape) for tags, shape in shapes if not shape.is_empty]
    return GeoExtract.of(features, bounds, osm=True, incomplete=sum(shape.is_empty for _, shape in shapes))


def _is_area(tags: Tags) -> bool:
    """Whether a closed way is what it encloses: a square is, a street that runs in a circle is not."""
    return tags.get("area") == "yes" or ("highway" not in tags and tags.get("area") != "no")


def _area(border: _Border) -> shapely.Geometry:
    """What the rings of an area enclose, without its holes; empty if no ring is whole."""

    def enclosed(inner: bool) -> shapely.Geometry:
        lines = [shapely.linestrings(line) for role, line in border if (role == "inner") == inner and len(line) > 1]
        return shapely.union_all([_valid(ring) for ring in shapely.get_parts(shapely.polygonize(lines))])

    return shapely.difference(enclosed(inner=False), enclosed(inner=True))


def _valid(area: shapely.Geometry) -> shapely.Geometry:
    return area if area.is_valid else shapely.make_valid(area)


GDAL_FILES = (".shp", ".gpkg", ".fgb", ".gdb", ".gml", ".kml", ".zip")


def read_geo_file(path: str | AnyPath, key: str, wanted: Callable[[Tags], bool]) -> GeoExtract:
    """Read a file: a table whole, of OpenStreetMap's objects those whose tags are wanted.

    The tags of a table's feature are its properties, as text; a column `NAME` counts as `name`. `key` is the setting that
    names the file, for errors.

    Raises:
        InputError: the file is missing, damaged, of no known format or not in degrees.
    """
    try:
        path = local_copy(path)
    except FileNotFoundError:
        raise InputError(f"{path} can't be read (no such file): set {key} to a file that exists.") from None
    if not path.exists():
        raise InputError(f"{path} can't be read (no such file): set {key} to a file that exists.")
    try:
        if path.name.lower().endswith(FILES):
            extract = read_file(path, wanted)
        elif path.suffix.lower() in GDAL_FILES:
            extract = _gdal(path)
        else:
            extract = _json(path, key, wanted)
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror or error}): set {key} to a file that can.") from None
    if extract.features:
        west, south, east, north = extract.bounds
        if not (-180 <= west <= east <= 180 and -90 <= south <= north <= 90):
            span = f"({west:g}, {south:g}) to ({east:g}, {north:g})"
            raise InputError(f"{path} has coordinates from {span}: export it in degrees (WGS84).")
    return extract


def _json(path: Path, key: str, wanted: Callable[[Tags], bool]) -> GeoExtract:
    """GeoJSON or Overpass JSON."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(tree, dict) and "elements" in tree:
            return read_overpass(tree, wanted)
        found = [
            GeoFeature(_tags(feature.get("properties") or {}), shapely.force_2d(shapely.geometry.shape(feature["geometry"])))
            for feature in tree["features"]
            if feature.get("geometry")
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, shapely.errors.ShapelyError) as error:
        detail = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise InputError(
            f"{path} is not GeoJSON or Overpass JSON ({detail}): export it again, or set {key} to an .osm.pbf or .shp file."
        ) from None
    return GeoExtract.of(found)


def _gdal(path: Path) -> GeoExtract:
    """All layers of a file that GDAL reads, in degrees."""
    found = []
    try:
        for layer, kind in pyogrio.list_layers(path):
            if kind is None:
                continue
            meta, _, shapes, columns = pyogrio.raw.read(path, layer=layer, force_2d=True)
            degrees = _degrees(shapely.from_wkb(shapes), meta["crs"])
            rows = zip(*columns, strict=True) if len(columns) else ((),) * len(degrees)
            for shape, row in zip(degrees, rows, strict=True):
                if shape is not None:
                    found.append(GeoFeature(_tags(dict(zip(meta["fields"], row, strict=True))), shape))
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, shapely.errors.ShapelyError) as error:
        raise InputError(f"{path} can't be read by GDAL ({' '.join(str(error).split())[:120]}): export it again.") from None
    return GeoExtract.of(found)


def _degrees(shapes: Any, crs: str | None) -> Any:
    """Shapes of a projection in degrees; without one they are taken to be degrees."""
    if crs is None or pyproj.CRS(crs) == pyproj.CRS("EPSG:4326"):
        return shapes
    transform = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform
    return shapely.transform(shapes, lambda xy: np.column_stack(transform(xy[:, 0], xy[:, 1])))


def _tags(properties: Mapping[str, Any]) -> Tags:
    """Properties as text, empty ones left out; a table's `NAME` or `Name` is the name if there is no other."""
    known = {str(key): str(value).strip() for key, value in properties.items() if value is not None and value == value}
    tags = {key: text for key, text in known.items() if text}
    name = next((text for key, text in tags.items() if key.lower() == "name"), None)
    return tags if name is None or "name" in tags else tags | {"name": name}
