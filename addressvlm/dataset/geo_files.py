"""Map files (OpenStreetMap, Overpass, GeoJSON, and GDAL formats) as features with tags; which are roads, streets, districts.

An OpenStreetMap file is read in three passes (the selected objects, the ways of selected areas, the nodes of all these), so
that memory holds the selection and not the file, and the order of its objects does not matter.
"""

import bz2
import codecs
import glob
import gzip
import json
import re
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from addressvlm.gazetteer.names import DamagedTextError, is_nothing, osm_names, single_names, split_names, without_names
from addressvlm.storage.files import local_copy, open_text
from addressvlm.storage.remote_path import AnyPath

Tags = dict[str, str]
Bounds = tuple[float, float, float, float]  # west, south, east, north in degrees
TagFilter = Callable[[Tags], bool]
Line = NDArray[np.float64]  # (n, 2) lon, lat

OSM_SUFFIXES = (".osm", ".pbf", ".osm.gz", ".osm.bz2", ".o5m", ".opl")
GDAL_SUFFIXES = (".shp", ".gpkg", ".fgb", ".gdb", ".gml", ".kml", ".zip")

# Carriageways of every class, and the ways on foot that houses have their address on: pedestrian zones, living streets,
# named alleys (`service`), passages (`footway`) and stairs. Trails (`path`, `cycleway`, `bridleway`, `track`) have the names
# of routes, which no address has and which run along the street that is meant.
STREET_CLASSES = frozenset(
    "motorway trunk primary secondary tertiary unclassified residential living_street pedestrian service footway steps road "
    "motorway_link trunk_link primary_link secondary_link tertiary_link".split()
)
NO_ROADS = frozenset(("proposed", "construction", "razed", "abandoned", "elevator", "platform", "corridor", "bus_stop"))
# Where addresses are blocks, the unit that an address names, from the finest; where they are streets, see DISTRICT_PLACES.
BLOCK_PLACES = ("city_block", "block", "neighbourhood", "quarter")
BLOCK_LEVELS = ("9", "10", "11")  # administrative areas that Japan's addresses name: 町, 大字, 丁目
DISTRICT_PLACES = ("neighbourhood", "quarter", "suburb", "borough")  # from the finest

CLASS_KEYS = ("highway", "place", "boundary", "admin_level")  # their first value counts
REMARK = re.compile(rb"<remark>(.*?)</remark>", re.DOTALL)  # of the Overpass API
REMARK_BYTES = 4096  # at the end of an answer
CODE_PAGE = re.compile(r"(?:ansi|cp|oem|windows)?[ _-]*(\d{3,5})", re.IGNORECASE)  # as .cpg files have it
CODE_PAGES = {"65001": "utf-8"} | {f"8859{n}": f"iso8859-{n}" for n in range(1, 17)}
DOUBTFUL_DBF_ENCODINGS = (0x00, 0x57)  # not told, and that of the computer that wrote it

OBJECT_KEYS = ("highway", "place", "boundary")  # an object without any of these is neither a street nor a district
TAG_KEYS = re.compile(r"highway|place|boundary|admin_level|area|tunnel|indoor|type|(\w+_)?name(:.*|_\d+)?")
EMPTY_LINE = np.zeros((0, 2))


@dataclass(frozen=True, slots=True)
class GeoFeature:
    """One object: its tags and its shape in degrees (lon, lat), never empty."""

    tags: Tags
    shape: BaseGeometry
    cut: bool = False  # whether a part of its border is not in the file

    @property
    def dimension(self) -> int:
        """0 for points, 1 for lines, 2 for areas."""
        return int(shapely.get_dimensions(self.shape))


@dataclass(frozen=True)
class GeoExtract:
    """The features of a file, and the rectangle that it covers."""

    features: list[GeoFeature]
    bounds: Bounds  # as the file says, else that of the features; zeros without any
    osm: bool = False  # whether it has OpenStreetMap's tags
    incomplete: int = 0  # areas whose border is not all in the file

    @classmethod
    def from_features(
        cls, features: Sequence[GeoFeature], bounds: Bounds | None = None, osm: bool = False, incomplete: int = 0
    ) -> "GeoExtract":
        """Drop features with an empty shape; the default bounds are those of the others."""
        features = [f for f in features if not f.shape.is_empty]
        if bounds is None:
            west, south, east, north = shapely.total_bounds([f.shape for f in features]).tolist() if features else (0.0,) * 4
            bounds = (west, south, east, north)
        return cls(features, bounds, osm, incomplete)


def is_road(tags: Tags) -> bool:
    """Whether one can walk or drive on it, named or not."""
    return "highway" in tags and tags["highway"] not in NO_ROADS


def is_street(tags: Tags) -> bool:
    """Whether an address can be on it: a street of STREET_CLASSES that is not indoors or under the ground, or a square."""
    if tags.get("place") == "square":
        return True
    return tags.get("highway") in STREET_CLASSES and "yes" not in (tags.get("tunnel"), tags.get("indoor"))


def is_block(tags: Tags) -> bool:
    """Whether an address can name it where streets have no names; a block that only has a number has no name of its own."""
    fine = tags.get("boundary") == "administrative" and tags.get("admin_level") in BLOCK_LEVELS
    return (fine or tags.get("place") in BLOCK_PLACES) and not tags.get("name", "").isdecimal()


def is_district(tags: Tags) -> bool:
    """Whether it can be a district: an administrative area, or a part of a town."""
    return tags.get("boundary") == "administrative" or tags.get("place") in DISTRICT_PLACES


def read_geo_file(path: str | AnyPath, key: str, select: TagFilter, encoding: str | None = None) -> GeoExtract:
    """Read a file: all features of a table, of OpenStreetMap's objects those whose tags `select` accepts.

    The tags of a table's feature are its properties, as text, without words for nothing; a column `NAME` counts as `name`. A
    street with several names is there once for each.

    Args:
        key: the setting that names the file, for errors.
        encoding: of a shapefile's names; default: as its .cpg file says, else UTF-8.

    Raises:
        InputError: the file is missing, damaged, cut short, of an unknown format or encoding, or not in degrees.
    """
    try:
        path = local_copy(path)
        if not path.exists():
            raise FileNotFoundError
        if path.name.lower().endswith(OSM_SUFFIXES):
            extract = _read_osm(path, select)
        elif path.suffix.lower() in GDAL_SUFFIXES:
            extract = _read_gdal(path, encoding)
        else:
            extract = _read_json(path, key, select)
    except FileNotFoundError:
        raise InputError(f"{path} can't be read (no such file): set {key} to a file that exists.") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror or error}): set {key} to a file that can.") from None
    if extract.features:
        west, south, east, north = extract.bounds
        if not (-180 <= west <= east <= 180 and -90 <= south <= north <= 90):
            span = f"({west:g}, {south:g}) to ({east:g}, {north:g})"
            raise InputError(f"{path} has coordinates from {span}: export it in degrees (WGS84).")
    return replace(extract, features=_single_named(extract, path))


def _single_named(extract: GeoExtract, path: Path) -> list[GeoFeature]:
    """The features with one name each: streets with several once for each, without the names that were damaged before.

    Raises:
        InputError: there are such names in a table, where they come from a wrong encoding.
    """
    features, damaged = [], []
    for feature in extract.features:
        try:
            osm_names(feature.tags)
            street = "highway" in feature.tags or (feature.dimension < 2 and not {"place", "boundary"} & feature.tags.keys())
            names = single_names(feature.tags) if street else [feature.tags]
        except DamagedTextError as error:
            damaged.append(str(error))
            names = [without_names(feature.tags)]
        features += [feature if tags == feature.tags else replace(feature, tags=tags) for tags in names]
    if damaged and not extract.osm:
        raise InputError(f"{path} has {len(damaged)} names with {damaged[0]}: export it again as UTF-8, or set city.encoding.")
    if damaged:
        print(f"prepare: {len(damaged)} names in {path} are left out, the first for {damaged[0]}", flush=True)
    return features


# Tables


def _read_json(path: Path, key: str, select: TagFilter) -> GeoExtract:
    try:
        with path.open("rb") as file:
            tree = json.load(open_text(file))
        if isinstance(tree, dict) and "elements" in tree:
            require_whole(path, str(tree.get("remark") or ""))
            return _read_overpass(tree, select)
        features = [
            GeoFeature(_property_tags(item.get("properties") or {}), shapely.force_2d(shapely.geometry.shape(item["geometry"])))
            for item in tree["features"]
            if item.get("geometry")
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, shapely.errors.ShapelyError) as error:
        detail = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise InputError(
            f"{path} is not GeoJSON or Overpass JSON ({detail}): export it again, or set {key} to an .osm.pbf or .shp file."
        ) from None
    return GeoExtract.from_features(features)


def _read_gdal(path: Path, encoding: str | None) -> GeoExtract:
    """All layers of a file, in degrees; without a projection its coordinates are taken to be degrees."""
    features = []
    try:
        for layer, kind in pyogrio.list_layers(path):
            if kind is None:
                continue
            codec = _names_encoding(path, encoding)
            as_bytes = "ISO-8859-1" if codec else None  # keeps all bytes, GDAL replaces those that another encoding lacks
            meta, _, encoded, columns = pyogrio.raw.read(path, layer=layer, force_2d=True, encoding=as_bytes)
            if codec:
                columns = [
                    [text.encode("latin-1").decode(codec) if isinstance(text, str) else text for text in column]
                    for column in columns
                ]
            shapes = shapely.from_wkb(encoded)
            if meta["crs"] is not None and pyproj.CRS(meta["crs"]) != pyproj.CRS("EPSG:4326"):
                transform = pyproj.Transformer.from_crs(meta["crs"], "EPSG:4326", always_xy=True).transform
                shapes = shapely.transform(shapes, lambda xy, to=transform: np.column_stack(to(xy[:, 0], xy[:, 1])))
            rows = zip(*columns, strict=True) if len(columns) else ((),) * len(shapes)
            for shape, row in zip(shapes, rows, strict=True):
                if shape is not None:
                    features.append(GeoFeature(_property_tags(dict(zip(meta["fields"], row, strict=True))), shape))
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, shapely.errors.ShapelyError) as error:
        raise InputError(f"{path} can't be read by GDAL ({' '.join(str(error).split())[:120]}): export it again.") from None
    except UnicodeError:
        used = encoding or "UTF-8, or as its .cpg file says"
        raise InputError(f"{path} has names that are not in {used}: set city.encoding, to cp1252 for example.") from None
    return GeoExtract.from_features(features)


def _names_encoding(path: Path, encoding: str | None) -> str | None:
    """The encoding of a shapefile's names by the setting, else by its .cpg file, else UTF-8; None where GDAL knows."""
    told, codepage = "", b""
    if path.suffix.lower() == ".shp":
        beside = {file.suffix.lower(): file for file in path.parent.glob(f"{glob.escape(path.stem)}.*")}
        told = beside[".cpg"].read_text("latin-1") if ".cpg" in beside else ""
        codepage = beside[".dbf"].read_bytes()[29:30] if ".dbf" in beside else b""
    elif path.suffix.lower() == ".zip" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = {Path(name).suffix.lower(): name for name in archive.namelist()}
            if ".shp" not in members:
                return None
            told = archive.read(members[".cpg"]).decode("latin-1") if ".cpg" in members else ""
    else:
        return None
    if encoding is not None:
        try:
            return codecs.lookup(encoding).name
        except LookupError:
            raise InputError(f"city.encoding is {encoding}, which is no encoding: set it to cp1252, for example.") from None
    if told:
        number = CODE_PAGE.fullmatch(told.strip())
        try:
            return codecs.lookup(CODE_PAGES.get(number[1], f"cp{number[1]}") if number else told.strip()).name
        except LookupError:
            return None
    return "UTF-8" if not codepage or codepage[0] in DOUBTFUL_DBF_ENCODINGS else None


def _property_tags(properties: Mapping[str, Any]) -> Tags:
    """Properties as text, without empty ones and words for nothing, lists between semicolons.

    A table's `NAME` or `Name` is the name if there is no other; `tags` may hold more, as osmtogeojson writes them.
    """
    tags = {}
    nested = properties.get("tags")
    for key, value in {**properties, **(nested if isinstance(nested, dict) else {})}.items():
        values = value.tolist() if isinstance(value, np.ndarray) else value
        texts = split_names(values) if isinstance(values, list) or key in CLASS_KEYS else [str(values).strip()]
        if texts and values is not None and values == values and not is_nothing(texts[0]):
            tags[str(key)] = texts[0] if key in CLASS_KEYS else ";".join(texts)
    name = next((text for key, text in tags.items() if key.lower() == "name"), None)
    return tags if name is None or "name" in tags else tags | {"name": name}


def require_whole(path: Path, remark: str) -> None:
    """InputError if the Overpass API remarked that its answer is not whole."""
    if remark:
        text = " ".join(remark.split())[:200]
        raise InputError(f"{path} is cut short, Overpass says {text!r}: ask again for a smaller area or with a longer timeout.")


# OpenStreetMap


def _end_of_xml(path: Path) -> bytes:
    """The last bytes of an XML file, compressed or not, where a remark stands; nothing of other formats and damaged files."""
    with path.open("rb") as file:  # raises OSError: pyosmium has one error for everything
        unpacked = {".osm": file, ".gz": gzip.GzipFile(fileobj=file), ".bz2": bz2.BZ2File(file)}.get(path.suffix.lower())
        end = b""
        try:
            if unpacked is file:
                file.seek(max(0, file.seek(0, 2) - REMARK_BYTES))
            while unpacked and (chunk := unpacked.read(REMARK_BYTES)):
                end = (end + chunk)[-REMARK_BYTES:]
        except (OSError, EOFError):
            return b""
    return end


def _read_osm(path: Path, select: TagFilter) -> GeoExtract:
    """The selected ones among the objects with one of OBJECT_KEYS; nodes that the file lacks are missing from their ways."""
    remark = REMARK.search(_end_of_xml(path))
    require_whole(path, remark[1].decode("utf-8", "replace").strip() if remark else "")
    try:
        with osmium.io.Reader(str(path), osmium.osm.NOTHING) as reader:
            box = reader.header().box()
        bounds = (box.bottom_left.lon, box.bottom_left.lat, box.top_right.lon, box.top_right.lat) if box.valid() else None
        return _read_osm_objects(str(path), select, bounds)
    except (RuntimeError, ValueError, osmium.InvalidLocationError) as error:  # pyosmium raises no other kinds
        detail = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is cut short or damaged ({detail}): download it again.") from None


def _read_osm_objects(path: str, select: TagFilter, bounds: Bounds | None) -> GeoExtract:
    """The three passes over one file: selected objects, the ways of selected areas, the nodes of all these."""
    points: list[tuple[Tags, tuple[float, float]]] = []
    ways: list[tuple[Tags, int]] = []
    areas: list[tuple[Tags, list[tuple[str, int]]]] = []  # role and id of each way of the border
    refs: dict[int, NDArray[np.int64]] = {}  # node ids of each way, selected or of an area
    needed = osmium.IdTracker()

    def add_refs(way: Any) -> None:
        if way.id not in refs:
            refs[way.id] = np.fromiter((node.ref for node in way.nodes), dtype=np.int64)
            needed.add_references(way)

    objects: Iterable[Any] = osmium.FileProcessor(path).with_filter(KeyFilter(*OBJECT_KEYS))
    for item in objects:
        tags = _relevant_tags((tag.k, tag.v) for tag in item.tags)
        if not select(tags):
            continue
        if item.is_node() and "place" in tags and item.location.valid():
            points.append((tags, (item.lon, item.lat)))
        elif item.is_way():
            ways.append((tags, item.id))
            add_refs(item)
        elif item.is_relation() and _is_area_relation(tags):
            areas.append((tags, [(m.role, m.ref) for m in item.members if m.type == "w"]))
            needed.add_references(item)
    if areas:
        for way in osmium.FileProcessor(path, WAY).with_filter(needed.id_filter()):
            add_refs(way)
    node_ids, lon, lat = array("q"), array("d"), array("d")
    nodes: Iterable[Any] = osmium.FileProcessor(path, NODE).with_filter(needed.id_filter())
    for node in nodes:
        if node.location.valid():
            node_ids.append(node.id)
            lon.append(node.lon)
            lat.append(node.lat)
    order = np.argsort(np.asarray(node_ids))
    ids, lonlat = np.asarray(node_ids)[order], np.column_stack([lon, lat])[order]

    def line(way: int) -> Line:
        if way not in refs or not len(ids):
            return EMPTY_LINE
        at = np.minimum(np.searchsorted(ids, refs[way]), len(ids) - 1)
        return lonlat[at[ids[at] == refs[way]]]

    def whole(way: int) -> bool:
        return way in refs and len(line(way)) == len(refs[way])

    borders = [(tags, [(role, line(way), whole(way)) for role, way in members]) for tags, members in areas]
    return _build_extract(points, [(tags, line(way)) for tags, way in ways], borders, bounds)


def _read_overpass(tree: dict[str, Any], select: TagFilter) -> GeoExtract:
    """The selected objects of an answer of the Overpass API, with `out geom` or with the nodes as elements of their own."""
    elements = {kind: [e for e in tree["elements"] if e["type"] == kind] for kind in ("node", "way", "relation")}
    nodes = {e["id"]: (e["lon"], e["lat"]) for e in elements["node"]}

    def line(element: dict[str, Any]) -> Line:
        """The nodes of a way that are in the answer: Overpass writes null for those outside its rectangle."""
        if element.get("geometry"):
            points = [(point["lon"], point["lat"]) for point in element["geometry"] if point]
        else:
            points = [nodes[ref] for ref in element.get("nodes", ()) if ref in nodes]
        return np.array(points, dtype=float).reshape(-1, 2)

    def selected(kind: str) -> Iterator[tuple[Tags, Any]]:
        for element in elements[kind]:
            tags = _relevant_tags((element.get("tags") or {}).items())
            if tags and select(tags):
                yield tags, element

    ways = {e["id"]: line(e) for e in elements["way"]}
    whole_ways = {e["id"] for e in elements["way"] if len(ways[e["id"]]) == len(e.get("nodes") or e.get("geometry", ()))}
    points = [(tags, nodes[e["id"]]) for tags, e in selected("node") if "place" in tags]
    lines = [(tags, ways[e["id"]]) for tags, e in selected("way")]
    areas = [
        (tags, [(m.get("role", ""), line(m) if m.get("geometry") else ways.get(m["ref"], EMPTY_LINE),
                 None not in m["geometry"] if m.get("geometry") else m["ref"] in whole_ways)
                for m in e.get("members", ()) if m["type"] == "way"])
        for tags, e in selected("relation") if _is_area_relation(tags)
    ]  # fmt: skip
    return _build_extract(points, lines, areas, None)


def _relevant_tags(tags: Iterable[tuple[str, str]]) -> Tags:
    return {key: value for key, value in tags if TAG_KEYS.fullmatch(key)}


def _is_area_relation(tags: Tags) -> bool:
    return tags.get("type") in ("multipolygon", "boundary")


def _build_extract(
    points: list[tuple[Tags, tuple[float, float]]],
    lines: list[tuple[Tags, Line]],
    areas: list[tuple[Tags, list[tuple[str, Line, bool]]]],
    bounds: Bounds | None,
) -> GeoExtract:
    """Shapes of what was read, areas from the role and line of each way of their border, and whether all of it is there.

    A way without two nodes and an area without a complete ring are dropped; such areas are counted.
    """
    features = [GeoFeature(tags, shapely.Point(lonlat)) for tags, lonlat in points]
    for tags, line in lines:
        closed = len(line) > 3 and (line[0] == line[-1]).all()
        # a square is what it encloses, a street that runs in a circle is not
        if closed and (tags.get("area") == "yes" or ("highway" not in tags and tags.get("area") != "no")):
            features.append(GeoFeature(tags, make_valid(shapely.polygons(line))))
        elif len(line) > 1:
            features.append(GeoFeature(tags, shapely.linestrings(line)))
    incomplete = 0
    for tags, border in areas:
        enclosed, cut = [], not all(whole for _, _, whole in border)  # by the outer rings, and by the holes
        for inner in (False, True):
            ways = [shapely.linestrings(line) for role, line, _ in border if (role == "inner") == inner and len(line) > 1]
            rings, *rest = shapely.polygonize_full(ways)
            enclosed.append(shapely.union_all([make_valid(ring) for ring in shapely.get_parts(rings)]))
            cut = cut or not all(shapely.is_empty(rest))
        features.append(GeoFeature(tags, shapely.difference(*enclosed), cut))
        incomplete += features[-1].shape.is_empty
    return GeoExtract.from_features(features, bounds, osm=True, incomplete=incomplete)


def make_valid(area: BaseGeometry) -> BaseGeometry:
    """The same area without self-intersections, unchanged if it has none."""
    return area if area.is_valid else shapely.make_valid(area)
