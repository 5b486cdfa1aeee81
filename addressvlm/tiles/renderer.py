"""Render the tile of a place: a square of imagery or street map with street names along the streets.

    TileRenderer("streets.geojson", "satellite.tif", TilesConfig()).tile(52.2053, 0.1218).image.save("tile.png")

Mapnik draws the street map and the names. A renderer keeps its files open between calls; it is not thread-safe.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.sax.saxutils import quoteattr

import mapnik
import matplotlib
import numpy as np
import shapely
from matplotlib.ft2font import FT2Font, LoadFlags
from PIL import Image
from shapely.geometry.base import BaseGeometry
from shapely.ops import substring

from addressvlm.config.city import TilesConfig
from addressvlm.errors import InputError
from addressvlm.gazetteer.name_matcher import normalize_name
from addressvlm.tiles.imagery import imagery_centre, open_imagery
from addressvlm.tiles.raster import Bounds
from addressvlm.tiles.roads import Road, Roads

UNIT_PX = 64  # font size at which letters are measured
GROUND = "#f2efe9"
CASING = "#bdb6ac"
STREET = "#ffffff"
MAIN_STREET = "#fbe3a1"
MAIN_WIDTH_M = 9.0  # streets at least this wide are drawn as main streets
TEXT = "#1b1b1b"


class Lettering:
    """The fonts of street names; each letter is drawn in the first font that has it."""

    def __init__(self, font: str | None = None) -> None:
        """DejaVu Sans Bold (Latin, Greek, Cyrillic, Arabic and more), then the font file, for other scripts.

        Raises:
            InputError: the file is missing or is not a font.
        """
        files = [str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")), *([font] if font else [])]
        self._fonts = []
        for file in files:
            try:
                face = FT2Font(file)
                face.set_size(UNIT_PX, 72)
            except (OSError, RuntimeError) as error:
                text = " ".join(str(error).split())
                raise InputError(f"{file} is not a font ({text}): set tiles.font to a TTF or OTF file.") from None
            mapnik.FontEngine.register_font(file)
            self._fonts.append(face)
        self._letters = [frozenset(map(chr, face.get_charmap())) for face in self._fonts]
        self.faces = [f"{face.family_name} {face.style_name}" for face in self._fonts]

    def has(self, name: str) -> bool:
        """Whether every letter of the name can be drawn."""
        return frozenset().union(*self._letters).issuperset(name.replace(" ", ""))

    def width(self, name: str) -> float:
        """Length of a name that `has` accepts, as a multiple of the font's size."""
        return sum(self._advance(letter) for letter in name)

    @cache  # noqa: B019 - there is one Lettering per renderer, and few letters
    def _advance(self, letter: str) -> float:
        number = next((i for i, letters in enumerate(self._letters) if letter in letters), 0)
        glyph = self._fonts[number].load_char(ord(letter), flags=LoadFlags.NO_HINTING)
        return float(glyph.linearHoriAdvance) / 65536 / UNIT_PX


def map_style(pixels_per_m: float, over_imagery: bool) -> str:
    """Mapnik style of streets with an attribute `width` in metres: casing and fill, or thin lines over imagery."""
    if over_imagery:
        line = '<LineSymbolizer stroke="#ffffff" stroke-width="1" stroke-opacity="0.55" stroke-linecap="round"/>'
        return _map("", {"lines": f"<Rule>{line}</Rule>"})
    width = f"[width] * {pixels_per_m:.6f}"
    join = 'stroke-linecap="round" stroke-linejoin="round"'
    casing = f'<LineSymbolizer stroke="{CASING}" stroke-width="{width} + 2" {join}/>'
    fill = f'<LineSymbolizer stroke="{{}}" stroke-width="{width}" {join}/>'
    fills = (
        f"<Rule><Filter>[width] &lt; {MAIN_WIDTH_M}</Filter>{fill.format(STREET)}</Rule>"
        f"<Rule><Filter>[width] &gt;= {MAIN_WIDTH_M}</Filter>{fill.format(MAIN_STREET)}</Rule>"
    )
    return _map(f'background-color="{GROUND}"', {"casing": f"<Rule>{casing}</Rule>", "fill": fills})


def name_style(faces: list[str], font_px: float, on_line: bool) -> str:
    """Mapnik style of an attribute `name`: along a line, or horizontal at a point."""
    place = (
        'placement="line" spacing="0" max-char-angle-delta="35" label-position-tolerance="400" margin="2"'
        if on_line
        else 'placement="point" avoid-edges="true" margin="2"'
    )
    text = (
        f'<TextSymbolizer fontset-name="names" size="{font_px:g}" fill="{TEXT}" halo-fill="#ffffff" '
        f'halo-radius="{max(1.0, font_px * 0.14):.2f}" {place}>[name]</TextSymbolizer>'
    )
    fonts = "".join(f"<Font face-name={quoteattr(face)}/>" for face in faces)
    return _map("", {"names": f"<Rule>{text}</Rule>"}, f'<FontSet name="names">{fonts}</FontSet>')


def _map(attributes: str, styles: dict[str, str], fonts: str = "") -> str:
    """A mapnik map with one layer per style."""
    body = fonts + "".join(f'<Style name="{name}">{rules}</Style>' for name, rules in styles.items())
    layers = "".join(f'<Layer name="{name}" srs="epsg:3857"><StyleName>{name}</StyleName></Layer>' for name in styles)
    return f'<Map srs="epsg:3857" {attributes}>{body}{layers}</Map>'


BEND = 0.75  # a name straightens bends of its street up to this multiple of the font size
MAX_STRETCHES = 6  # of each street that its name is tried on
PLANE = "epsg:3857"  # coordinates are local metres; map and layers have the same value, so mapnik projects nothing


@dataclass(frozen=True)
class Tile:
    """RGB image (pixels x pixels) of a place, the street names written on it, and its bounds in local metres."""

    image: Image.Image
    names: list[str]
    bounds: Bounds


class TileRenderer:
    """Draws tiles of one city."""

    def __init__(
        self, streets: str | Path | None, imagery: str | Path | None, config: TilesConfig, language: str | None = None
    ) -> None:
        """Open a street file and imagery (see `imagery.open_imagery`); one of the two may be None.

        Names are in `language`, if the street file has them in it.

        Raises:
            InputError: both are None, or a file is missing or invalid.
        """
        if not streets and not imagery:
            raise InputError("there is nothing to draw tiles from: set city.streets or tiles.imagery.")
        self.config = config
        self.roads = Roads(streets, imagery_centre(imagery) if imagery and not streets else (0.0, 0.0), language)
        self.imagery = open_imagery(imagery, self.roads.crs, config) if imagery else None
        self._lettering = Lettering(config.font)
        size, scale = config.pixels, config.pixels / config.side_m
        self._map = mapnik.Map(size, size, PLANE)
        mapnik.load_map_from_string(self._map, map_style(scale, over_imagery=self.imagery is not None))
        self._names = {on_line: mapnik.Map(size, size, PLANE) for on_line in (True, False)}
        for on_line, canvas in self._names.items():
            mapnik.load_map_from_string(canvas, name_style(self._lettering.faces, config.font_px, on_line))

    def tile(self, lat: float, lon: float, street: str = "") -> Tile:
        """Render the tile around a point in degrees; `street` is labelled first, by default the nearest one.

        Raises:
            InputError: there is neither a street nor imagery.
        """
        x, y = self.roads.to_metres(lat, lon)
        street = self.roads.resolve_name(street) or street
        half = self.config.side_m / 2
        bounds = (x - half, y - half, x + half, y + half)
        roads = self.roads.within(x, y, half)
        canvas = mapnik.Image(self.config.pixels, self.config.pixels)
        if self.imagery is None and not roads:
            raise InputError(f"no street of the map is within {half:g} m of ({lat:.6f}, {lon:.6f}).")
        background = self.imagery.read(bounds, self.config.pixels) if self.imagery else None
        if background is None or self.config.names:
            source = mapnik.MemoryDatasource()
            for number, road in enumerate(sorted(roads, key=lambda r: r.width_m)):
                source.add_feature(_feature(number, road.line, width=road.width_m))
            for layer in self._map.layers:
                layer.datasource = source
            self._map.zoom_to_box(mapnik.Box2d(*bounds))
            mapnik.render(self._map, canvas)
        names = self._draw_names(canvas, bounds, roads, street) if self.config.names else []
        drawing = Image.frombytes("RGBA", (self.config.pixels, self.config.pixels), canvas.to_string())
        if background is None:
            return Tile(drawing.convert("RGB"), names, bounds)
        background.paste(drawing, mask=drawing.getchannel("A"))
        return Tile(background, names, bounds)

    def _draw_names(self, canvas: mapnik.Image, bounds: Bounds, roads: list[Road], street: str) -> list[str]:
        """Write each street's name once where there is room, the place's street first; return the names written.

        The corner that the photo will cover stays free. Each name is rendered as a map of its own, because mapnik does not
        report which names it dropped for lack of room.
        """
        size, font = self.config.pixels, self.config.font_px
        px_per_m = size / self.config.side_m
        west, south, east, north = bounds
        margin, photo = 0.6 * font / px_per_m, self.config.side_m * self.config.covered
        inner = shapely.box(west + margin, south + margin, east - margin, north - margin)
        free = inner.difference(shapely.box(east - photo, north - photo, east, north))
        detector = mapnik.LabelCollisionDetector(mapnik.Box2d(0, 0, size, size))
        corner = round(self.config.covered * size)
        detector.insert(mapnik.Box2d(size - corner, 0, size, corner))
        written = []
        for number, (name, pieces) in enumerate(_labels(roads, bounds, free, street, simplify_m=2 / px_per_m)):
            if not self._lettering.has(name):
                continue
            length = (self._lettering.width(name) + 1) * font / px_per_m
            stretches = _stretches(pieces[:3], length, bend_m=BEND * font / px_per_m)
            if any(self._write(canvas, detector, bounds, name, stretch, on_line=True) for stretch in stretches):
                written.append(name)
            elif number == 0:  # the place's street is too short, too bent or hidden: write its name horizontally
                points = _label_points(name, roads, bounds, font / px_per_m)
                if any(self._write(canvas, detector, bounds, name, point, on_line=False) for point in points):
                    written.append(name)
        return written

    def _write(
        self, canvas: mapnik.Image, detector: mapnik.LabelCollisionDetector, bounds: Bounds,
        name: str, geometry: BaseGeometry, on_line: bool,
    ) -> bool:  # fmt: skip
        """Try to write a name at one place; whether it was drawn (its letters then occupy boxes in the detector)."""
        source = mapnik.MemoryDatasource()
        source.add_feature(_feature(1, geometry, name=name))
        labels = self._names[on_line]
        labels.layers[0].datasource = source
        labels.zoom_to_box(mapnik.Box2d(*bounds))
        before = len(detector.boxes())
        mapnik.render_with_detector(labels, canvas, detector)
        return len(detector.boxes()) > before


def _labels(
    roads: list[Road], bounds: Bounds, free: BaseGeometry, street: str, simplify_m: float
) -> list[tuple[str, list[shapely.LineString]]]:
    """Names and the pieces of their streets in the free area, longest first; `street` or the nearest street comes first."""
    centre = shapely.Point((bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2)
    by_name: dict[str, list[BaseGeometry]] = defaultdict(list)
    for road in roads:
        if road.name:
            by_name[road.name].append(road.line)
    entries, target = [], normalize_name(street)
    for name, lines in by_name.items():
        merged = shapely.line_merge(shapely.union_all(lines))
        inside = shapely.simplify(shapely.intersection(merged, free), simplify_m)
        parts = shapely.get_parts(shapely.line_merge(inside) if inside.geom_type.startswith("Multi") else inside)
        pieces = sorted((p for p in parts if p.geom_type == "LineString" and p.length > 0), key=lambda p: -p.length)
        is_target = normalize_name(name) == target
        if pieces or is_target:
            entries.append((-1.0 if is_target else merged.distance(centre), -pieces[0].length if pieces else 0.0, name, pieces))
    entries.sort(key=lambda e: (e[0], e[2]))
    ordered = entries[:1] + sorted(entries[1:], key=lambda e: (e[1], e[2]))
    return [(name, pieces) for _, _, name, pieces in ordered]


def _stretches(pieces: list[shapely.LineString], length: float, bend_m: float) -> Iterator[BaseGeometry]:
    """Lines for a name `length` metres long: the straightest stretches of its street first, full pieces last.

    Bends below `bend_m` are straightened, which makes letters easier to read.
    """
    candidates = []
    for piece in pieces:
        starts = np.arange(0, piece.length - length, length / 10)
        for start in starts:
            stretch = shapely.simplify(substring(piece, start, start + length), bend_m)
            bend = 1 - shapely.Point(stretch.coords[0]).distance(shapely.Point(stretch.coords[-1])) / stretch.length
            candidates.append((round(200 * bend), abs(start + length / 2 - piece.length / 2), stretch))
    yield from (stretch for _, _, stretch in sorted(candidates, key=lambda c: c[:2])[:MAX_STRETCHES])
    yield from pieces


def _label_points(name: str, roads: list[Road], bounds: Bounds, font_m: float) -> list[BaseGeometry]:
    """Points for a horizontal name around the tile's centre: first those where it covers no other street, then the nearest."""
    x, y = (bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2
    others = shapely.union_all([road.line for road in roads if road.name != name])
    half = 0.36 * font_m * len(name)  # about half the width of the name
    steps = np.array([(column, row) for column in range(-10, 3) for row in range(-6, 7)])
    points = np.array([x, y]) + font_m * steps
    boxes = shapely.box(points[:, 0] - half, points[:, 1] - font_m, points[:, 0] + half, points[:, 1] + font_m)
    covered = shapely.length(shapely.intersection(boxes, others)) // font_m
    distance = abs(steps[:, 0]) / 2 + abs(steps[:, 1])  # a name is wider than it is high
    return [shapely.Point(points[i]) for i in np.lexsort((distance, covered))]


def _feature(number: int, geometry: BaseGeometry, **attributes: str | float) -> mapnik.Feature:
    context = mapnik.Context()
    for key in attributes:
        context.push(key)
    feature = mapnik.Feature(context, number)
    for key, value in attributes.items():
        feature[key] = value
    feature.geometry = mapnik.Geometry.from_wkb(shapely.to_wkb(geometry))
    return feature
