"""The one reader of geographic files: what has a shape and tags, in degrees, whatever the format.

GeoJSON and Overpass JSON are told apart by what is in them; `.osm.pbf`, `.osm` (also packed) are read by pyosmium; shapefiles,
GeoPackages and whatever else GDAL knows by pyogrio, with a projection if they have one.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pyproj
import shapely

from addressvlm.cities import osm
from addressvlm.cities.extract import Extract, Feature, Tags
from addressvlm.errors import InputError
from addressvlm.files import fetched
from addressvlm.stores import AnyPath

GDAL_FILES = (".shp", ".gpkg", ".fgb", ".gdb", ".gml", ".kml", ".zip")


def read(path: str | AnyPath, key: str, wanted: Callable[[Tags], bool]) -> Extract:
    """Read a file: a table whole, of OpenStreetMap's objects those whose tags are wanted.

    The tags of a table's feature are its properties, as text; a column `NAME` counts as `name`. `key` is the setting that
    names the file, for errors.

    Raises:
        InputError: the file is missing, damaged, of no known format or not in degrees.
    """
    try:
        path = fetched(path)
    except FileNotFoundError:
        raise InputError(f"{path} can't be read (no such file): set {key} to a file that exists.") from None
    if not path.exists():
        raise InputError(f"{path} can't be read (no such file): set {key} to a file that exists.")
    try:
        if path.name.lower().endswith(osm.FILES):
            extract = osm.read_file(path, wanted)
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


def _json(path: Path, key: str, wanted: Callable[[Tags], bool]) -> Extract:
    """GeoJSON or Overpass JSON."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(tree, dict) and "elements" in tree:
            return osm.read_overpass(tree, wanted)
        found = [
            Feature(_tags(feature.get("properties") or {}), shapely.force_2d(shapely.geometry.shape(feature["geometry"])))
            for feature in tree["features"]
            if feature.get("geometry")
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, shapely.errors.ShapelyError) as error:
        detail = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise InputError(
            f"{path} is not GeoJSON or Overpass JSON ({detail}): export it again, or set {key} to an .osm.pbf or .shp file."
        ) from None
    return Extract.of(found)


def _gdal(path: Path) -> Extract:
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
                    found.append(Feature(_tags(dict(zip(meta["fields"], row, strict=True))), shape))
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, shapely.errors.ShapelyError) as error:
        raise InputError(f"{path} can't be read by GDAL ({' '.join(str(error).split())[:120]}): export it again.") from None
    return Extract.of(found)


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
