"""The tile of a place: the square of ground around it from above, street names written along the streets.

    TileRenderer("streets.geojson", "satellite.tif", TilesConfig()).tile(52.2053, 0.1218).image.save("tile.png")

Without imagery the tile is a street map drawn by mapnik. A renderer keeps its styles, its index of the roads and its
imagery open between calls; it belongs to one thread.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mapnik
import numpy as np
import shapely
from PIL import Image
from shapely.geometry.base import BaseGeometry
from shapely.ops import substring

from addressvlm.config import TilesConfig
from addressvlm.errors import InputError
from addressvlm.maps.roads import Road, Roads
from addressvlm.maps.sources import centre_of, open_imagery
from addressvlm.maps.style import Lettering, map_style, name_style
from addressvlm.maps.window import Bounds
from addressvlm.names import normal

BEND = 0.75  # of a street that its name may ignore, as a multiple of the font's size
TRIED = 6  # stretches of each street that its name is tried on
PLANE = "epsg:3857"  # mapnik's word for "already in metres"; map and layers agree, so nothing is projected


@dataclass(frozen=True)
class Tile:
    """A place from above: RGB image (pixels x pixels), the names that can be read on it, its bounds in local metres."""

    image: Image.Image
    names: list[str]
    bounds: Bounds


class TileRenderer:
    """Draws tiles of one city."""

    def __init__(
        self, streets: str | Path | None, imagery: str | Path | None, config: TilesConfig, language: str | None = None
    ) -> None:
        """Open the sources: a file of streets and imagery (see `sources.open_imagery`); one of the two may be absent.

        Names are written in `language` where the file of streets has them in it.

        Raises:
            InputError: both are absent, a file is missing or is not what it should be.
        """
        if not streets and not imagery:
            raise InputError("there is nothing to draw tiles from: set city.streets or tiles.imagery.")
        self.config = config
        self.roads = Roads(streets, centre_of(imagery) if imagery and not streets else (0.0, 0.0), language)
        self.imagery = open_imagery(imagery, self.roads.crs, config) if imagery else None
        self._lettering = Lettering(config.font)
        size, scale = config.pixels, config.pixels / config.side_m
        self._map = mapnik.Map(size, size, PLANE)
        mapnik.load_map_from_string(self._map, map_style(scale, over_imagery=self.imagery is not None))
        self._names = {on_line: mapnik.Map(size, size, PLANE) for on_line in (True, False)}
        for on_line, canvas in self._names.items():
            mapnik.load_map_from_string(canvas, name_style(self._lettering.faces, config.font_px, on_line))

    def tile(self, lat: float, lon: float, street: str = "") -> Tile:
        """Draw the tile centred on a point given in degrees; `street` is named first, by default the nearest one.

        Raises:
            InputError: neither a street nor the imagery is there.
        """
        x, y = self.roads.to_metres(lat, lon)
        street = self.roads.same(street) or street
        half = self.config.side_m / 2
        bounds = (x - half, y - half, x + half, y + half)
        roads = self.roads.within(x, y, half)
        canvas = mapnik.Image(self.config.pixels, self.config.pixels)
        if self.imagery is None:
            if not roads:
                raise InputError(f"no street of the map is within {half:g} m of ({lat:.6f}, {lon:.6f}).")
            self._draw_roads(canvas, bounds, roads)
            base = None
        else:
            base = self.imagery.read(bounds, self.config.pixels)
            if self.config.names:
                self._draw_roads(canvas, bounds, roads)
        names = self._draw_names(canvas, bounds, roads, street) if self.config.names else []
        drawn = Image.frombytes("RGBA", (self.config.pixels, self.config.pixels), canvas.to_string())
        if base is None:
            return Tile(drawn.convert("RGB"), names, bounds)
        base.paste(drawn, mask=drawn.getchannel("A"))
        return Tile(base, names, bounds)

    def _draw_roads(self, canvas: mapnik.Image, bounds: Bounds, roads: list[Road]) -> None:
        source = mapnik.MemoryDatasource()
        for number, road in enumerate(sorted(roads, key=lambda r: r.width_m)):
            source.add_feature(_feature(number, road.line, width=road.width_m))
        for layer in self._map.layers:
            layer.datasource = source
        self._map.zoom_to_box(mapnik.Box2d(*bounds))
        mapnik.render(self._map, canvas)

    def _draw_names(self, canvas: mapnik.Image, bounds: Bounds, roads: list[Road], street: str) -> list[str]:
        """Write each street's name once where it has room, the place's own street first; return the names written.

        The corner that the photo will cover stays free. One map is rendered per name: only so is it known which names
        mapnik drew and which it dropped for want of room.
        """
        size, font = self.config.pixels, self.config.font_px
        metre = size / self.config.side_m
        free = _free_area(bounds, self.config.covered, margin=0.6 * font / metre)
        detector = mapnik.LabelCollisionDetector(mapnik.Box2d(0, 0, size, size))
        corner = round(self.config.covered * size)
        detector.insert(mapnik.Box2d(size - corner, 0, size, corner))
        written = []
        for number, (name, pieces) in enumerate(_labels(roads, bounds, free, street, simplify_m=2 / metre)):
            if not self._lettering.has(name):
                continue
            length = (self._lettering.width(name) + 1) * font / metre
            stretches = _stretches(pieces[:3], length, bend_m=BEND * font / metre)
            if any(self._write(canvas, detector, bounds, name, stretch, on_line=True) for stretch in stretches):
                written.append(name)
            elif number == 0:  # the place's own street is worth a level name, if it is too short, too bent or hidden
                points = _beside(name, roads, bounds, font / metre)
                if any(self._write(canvas, detector, bounds, name, point, on_line=False) for point in points):
                    written.append(name)
        return written

    def _write(
        self,
        canvas: mapnik.Image,
        detector: mapnik.LabelCollisionDetector,
        bounds: Bounds,
        name: str,
        geometry: BaseGeometry,
        on_line: bool,
    ) -> bool:
        """Try one name at one place; whether it was drawn (its letters then occupy boxes in the detector)."""
        source = mapnik.MemoryDatasource()
        source.add_feature(_feature(1, geometry, name=name))
        labels = self._names[on_line]
        labels.layers[0].datasource = source
        labels.zoom_to_box(mapnik.Box2d(*bounds))
        before = len(detector.boxes())
        mapnik.render_with_detector(labels, canvas, detector)
        return len(detector.boxes()) > before


def _free_area(bounds: Bounds, delta: float, margin: float) -> BaseGeometry:
    """Where names may run: the square less a margin and less the upper right corner, in metres."""
    west, south, east, north = bounds
    side = (east - west) * delta
    inner = shapely.box(west + margin, south + margin, east - margin, north - margin)
    return inner.difference(shapely.box(east - side, north - side, east, north))


def _labels(
    roads: list[Road], bounds: Bounds, free: BaseGeometry, street: str, simplify_m: float
) -> list[tuple[str, list[shapely.LineString]]]:
    """Names and the pieces of their streets in the free area, the longest first; `street` or the nearest comes first."""
    centre = shapely.Point((bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2)
    by_name: dict[str, list[BaseGeometry]] = defaultdict(list)
    for road in roads:
        if road.name:
            by_name[road.name].append(road.line)
    entries, wanted = [], normal(street)
    for name, lines in by_name.items():
        merged = shapely.line_merge(shapely.union_all(lines))
        inside = shapely.simplify(shapely.intersection(merged, free), simplify_m)
        parts = shapely.get_parts(shapely.line_merge(inside) if inside.geom_type.startswith("Multi") else inside)
        pieces = sorted((p for p in parts if p.geom_type == "LineString" and p.length > 0), key=lambda p: -p.length)
        own = normal(name) == wanted
        if pieces or own:
            entries.append((-1.0 if own else merged.distance(centre), -pieces[0].length if pieces else 0.0, name, pieces))
    entries.sort(key=lambda e: (e[0], e[2]))
    ordered = entries[:1] + sorted(entries[1:], key=lambda e: (e[1], e[2]))
    return [(name, pieces) for _, _, name, pieces in ordered]


def _stretches(pieces: list[shapely.LineString], length: float, bend_m: float) -> Iterator[BaseGeometry]:
    """Where to try a name `length` metres long: the straightest stretches of its street first, at last whole pieces.

    A stretch that leaves its chord by less than `bend_m` is straightened: level letters are read more easily.
    """
    found = []
    for piece in pieces:
        starts = np.arange(0, piece.length - length, length / 10)
        for start in starts:
            stretch = shapely.simplify(substring(piece, start, start + length), bend_m)
            bent = 1 - shapely.Point(stretch.coords[0]).distance(shapely.Point(stretch.coords[-1])) / stretch.length
            found.append((round(200 * bent), abs(start + length / 2 - piece.length / 2), stretch))
    yield from (stretch for _, _, stretch in sorted(found, key=lambda f: f[:2])[:TRIED])
    yield from pieces


def _beside(name: str, roads: list[Road], bounds: Bounds, font_m: float) -> list[BaseGeometry]:
    """Where to try a level name: around the tile's centre, first where it lies on no other street, then outwards."""
    x, y = (bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2
    others = shapely.union_all([road.line for road in roads if road.name != name])
    half = 0.36 * font_m * len(name)  # half the width of the name, about
    steps = np.array([(column, row) for column in range(-10, 3) for row in range(-6, 7)])
    at = np.array([x, y]) + font_m * steps
    boxes = shapely.box(at[:, 0] - half, at[:, 1] - font_m, at[:, 0] + half, at[:, 1] + font_m)
    covered = shapely.length(shapely.intersection(boxes, others)) // font_m
    distance = abs(steps[:, 0]) / 2 + abs(steps[:, 1])  # a name is wider than it is high
    return [shapely.Point(at[i]) for i in np.lexsort((distance, covered))]


def _feature(number: int, geometry: BaseGeometry, **attributes: str | float) -> mapnik.Feature:
    context = mapnik.Context()
    for key in attributes:
        context.push(key)
    feature = mapnik.Feature(context, number)
    for key, value in attributes.items():
        feature[key] = value
    feature.geometry = mapnik.Geometry.from_wkb(shapely.to_wkb(geometry))
    return feature
