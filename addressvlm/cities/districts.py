"""What the districts of a city are: polygons of a table, or what an OpenStreetMap extract offers.

An extract offers administrative areas of several levels, areas of parts of the town (`place=suburb`, `quarter`, …), and the
middles of such parts as nodes; of nodes the district of a point is the nearest one (Voronoi cells, cut off at the edge of
the extract).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from addressvlm.cities.extract import Extract, Feature
from addressvlm.cities.osm import DISTRICT_PLACES, is_district
from addressvlm.errors import InputError

Source = Literal["auto", "polygons", "admin", "place"]
Layer = list[Feature]  # areas that are districts together

COVERS = 0.9  # share of the streets that the districts of a layer must cover to be chosen by themselves


def choose(
    extract: Extract, streets: NDArray[np.object_], path: str, source: Source = "auto", admin_level: int | None = None
) -> Layer:
    """The areas that are the districts, from a file of which all named objects have been read.

    `auto` takes the first of these that covers nine of ten streets with two districts or more, yet fewer than half as many
    as there are streets: administrative areas from the finest level, areas of parts of the town from the finest, cells around
    the middles of such parts. Where none does, the layer that covers most. A table without such tags is all districts.

    Args:
        streets: a point in degrees (lon, lat) on each named street.
        path: of the file, for errors.

    Raises:
        InputError: the file has no named district of that source or level.
    """
    if admin_level is not None and source == "auto":
        source = "admin"
    areas = [f for f in extract.features if f.dimension == 2 and (is_district(f.tags) or not extract.osm)]
    admin = _admin_layers(areas, admin_level)
    parts = [layer for place in DISTRICT_PLACES if (layer := [f for f in areas if f.tags.get("place") == place])]
    layers = {
        "admin": admin,
        "polygons": parts or ([areas] if areas else []),
        "place": _cell_layers(extract) if source in ("auto", "place") else [],
        "auto": [],
    }
    layers["auto"] = admin + parts + layers["place"] or layers["polygons"]
    candidates = layers[source]
    if not candidates:
        raise InputError(_nothing(path, source, admin_level, extract, areas))
    if len(streets) == 0:
        return candidates[0]
    shares = [_share(layer, streets) for layer in candidates]
    several = [2 <= len(layer) < max(len(streets) / 2, 3) for layer in candidates]
    best = max(range(len(candidates)), key=lambda i: (shares[i] >= COVERS and several[i], min(shares[i], COVERS), -i))
    return candidates[best]


def _admin_layers(areas: Sequence[Feature], admin_level: int | None) -> list[Layer]:
    """Administrative areas by level, the finest first."""
    levels: dict[int, Layer] = {}
    for area in areas:
        level = area.tags.get("admin_level", "")
        if area.tags.get("boundary") == "administrative" and level.isdecimal() and admin_level in (None, int(level)):
            levels.setdefault(int(level), []).append(area)
    return [levels[level] for level in sorted(levels, reverse=True)]


def _cell_layers(extract: Extract) -> list[Layer]:
    """Cells around the middles of parts of the town, the kind of part with the most of them first."""
    points = [f for f in extract.features if f.dimension == 0]
    layers = [layer for place in DISTRICT_PLACES if (layer := [f for f in points if f.tags.get("place") == place])]
    return [cells(layer, shapely.box(*extract.bounds)) for layer in sorted(layers, key=len, reverse=True)]


def cells(points: Sequence[Feature], within: BaseGeometry) -> Layer:
    """The part of `within` that is nearer to each of the points (degrees) than to any other; of two at one spot the first."""
    squeeze = np.array([np.cos(np.radians(np.mean([p.shape.y for p in points]))), 1])
    first = {p.shape.coords[0]: p for p in reversed(points)}
    sites = shapely.MultiPoint(np.array(list(first)) * squeeze)
    area = shapely.transform(within, lambda c: c * squeeze)
    if len(first) == 1:
        return [Feature(point.tags, within) for point in first.values()]
    found = shapely.get_parts(shapely.voronoi_polygons(sites, extend_to=area, ordered=True))
    cut = shapely.transform(shapely.intersection(found, area), lambda c: c / squeeze)
    return [Feature(p.tags, cell) for p, cell in zip(first.values(), cut, strict=True) if not cell.is_empty]


def _share(layer: Layer, streets: NDArray[np.object_]) -> float:
    """Share of the points that are in some area of the layer."""
    inside = shapely.STRtree([f.shape for f in layer]).query(streets, predicate="intersects")[0]
    return len(np.unique(inside)) / len(streets)


def _nothing(path: str, source: Source, admin_level: int | None, extract: Extract, areas: Sequence[Feature]) -> str:
    """The sentence for a file without districts."""
    if source == "admin":
        counts = Counter(f.tags["admin_level"] for f in areas if f.tags.get("admin_level"))
        offer = ", ".join(f"{level} ({n})" for level, n in sorted(counts.items())) or "none"
        level = "" if admin_level is None else f" of level {admin_level}"
        return (
            f"{path} has no whole administrative area{level}: set city.admin_level to one of the levels it has ({offer}), or "
            f"city.district_source to place."
        )
    if source == "place":
        kinds = ", ".join(f"place={place}" for place in DISTRICT_PLACES)
        return f"{path} has no named nodes with {kinds}: set city.district_source to auto, or city.districts to a polygon file."
    cut = f" ({extract.incomplete} areas are cut off at its edge)" if extract.incomplete else ""
    return (
        f"{path} has no named district{cut}: it needs areas with the property `name`, or OpenStreetMap's administrative "
        f"boundaries or place nodes."
    )
