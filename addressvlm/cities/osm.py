"""OpenStreetMap: `.osm.pbf` and `.osm` files by pyosmium, answers of the Overpass API, and which objects are what.

A file is read in three passes (objects that are wanted, ways of wanted areas, nodes of all these), so that memory holds what
is wanted and not the file, and the order of its objects does not matter.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import osmium
import shapely
from numpy.typing import NDArray
from osmium.filter import KeyFilter
from osmium.osm import NODE, WAY

from addressvlm.cities.extract import Bounds, Extract, Feature, Tags
from addressvlm.errors import InputError

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


def read_file(path: Path, wanted: Callable[[Tags], bool]) -> Extract:
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


def read_overpass(tree: dict[str, Any], wanted: Callable[[Tags], bool]) -> Extract:
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

    def extract(self, bounds: Bounds | None) -> Extract:
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
) -> Extract:
    """Shapes of what was read; ways and areas of which too little is in the file are left out, such areas counted."""
    features = [Feature(tags, shapely.Point(place)) for tags, place in points]
    for tags, line in lines:
        closed = len(line) > 3 and (line[0] == line[-1]).all()
        if closed and _is_area(tags):
            features.append(Feature(tags, _valid(shapely.polygons(line))))
        elif len(line) > 1:
            features.append(Feature(tags, shapely.linestrings(line)))
    shapes = [(tags, _area(border)) for tags, border in areas]
    features += [Feature(tags, shape) for tags, shape in shapes if not shape.is_empty]
    return Extract.of(features, bounds, osm=True, incomplete=sum(shape.is_empty for _, shape in shapes))


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
