"""Facts about a grafted image, measured without a model on the street network, the tile and the photo."""

import colorsys
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from PIL import Image
from shapely.geometry.base import BaseGeometry

from addressvlm.gazetteer.name_matcher import normalize_name
from addressvlm.labels.lexicon import COMPASS, DIRECTIONS

if TYPE_CHECKING:  # labels are written and validated without any map
    from addressvlm.tiles.renderer import Tile
    from addressvlm.tiles.roads import Roads

# Upper hue in degrees of each chromatic word; after the last, hues are red again.
HUES = [(14, "red"), (42, "orange"), (70, "yellow"), (165, "green"), (255, "blue"), (335, "purple"), (360, "red")]
THUMBNAIL = (48, 48)
TANGENT_M = 15.0  # the street's direction is that of the stretch this far to both sides
MEETING_M = 12.0  # lines that end this near to each other meet (dual carriageways, gaps in the data)
SKY = {"wide": 0.25, "narrow": 0.03, "hidden": 0.0}  # word -> minimum share of the upper half
GREENERY = {"much": 0.25, "some": 0.05, "little": 0.0}  # word -> minimum share of the photo below the sky


@dataclass(frozen=True)
class Facts:
    """Facts about one photo and its tile; None or empty where unknown."""

    street: str
    district: str
    names: tuple[str, ...] = ()  # readable on the tile
    direction: str | None = None  # of the street at the place, one of DIRECTIONS
    view: str | None = None  # along, across or oblique to the street
    facing: str | None = None  # compass word of the camera
    cross_street: str | None = None  # the nearest one that meets `street` on the tile
    cross_distance_m: int | None = None  # from the camera to where they meet, in tens of metres
    cross_direction: str | None = None  # compass word, from the camera
    photo_colours: tuple[str, ...] = ()
    tile_colours: tuple[str, ...] = ()  # empty for a drawn map, whose colours mean nothing
    city: str = ""
    sky: str | None = None  # one of SKY
    greenery: str | None = None  # one of GREENERY
    main_street: str | None = None  # what the map calls it where `street` is a part of it or another spelling

    @property
    def on_map(self) -> str:
        """The street that the map shows: `street`, or what it is a part of."""
        return self.main_street or self.street

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Facts":
        """Parse what `to_json` wrote; unknown fields are ignored."""
        values, names = json.loads(text), {f.name for f in fields(cls)}
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
        return cls(**arguments)


def graft_facts(
    street: str,
    district: str,
    lat: float,
    lon: float,
    heading: float | None,
    photo: Image.Image,
    tile: "Tile",
    roads: "Roads",
    delta: float = 0.5,
    imagery: bool = True,
    main_street: str | None = None,
) -> Facts:
    """Facts of a photo taken at (lat, lon) degrees looking to `heading` (degrees clockwise from north, None if unknown).

    Args:
        photo, tile: as grafted; `delta` is the share of the tile's side that the photo covers.
        roads: the network that the tile was drawn from.
        imagery: whether the tile shows more than the drawn map.
        main_street: what to measure where `street` is a part of it (a sub-street); default: `street` itself.
    """
    on_map = roads.resolve_name(main_street or street) or main_street or street
    x, y = roads.to_metres(lat, lon)
    camera = shapely.Point(x, y)
    half = (tile.bounds[2] - tile.bounds[0]) / 2
    line, others = _lines(roads, on_map, x, y, half)
    bearing = _bearing(line, camera) if line is not None else None
    cross = _nearest_crossing(line, others, camera, half) if line is not None else None
    return Facts(
        street=street,
        district=district,
        names=tuple(tile.names),
        direction=None if bearing is None else DIRECTIONS[round(bearing / 45) % 4],
        view=None if bearing is None or heading is None else _view(heading, bearing),
        facing=None if heading is None else compass(heading),
        cross_street=cross[0] if cross else None,
        cross_distance_m=10 * round(cross[1].distance(camera) / 10) if cross else None,
        cross_direction=compass(math.degrees(math.atan2(cross[1].x - x, cross[1].y - y))) if cross else None,
        photo_colours=tuple(photo_colours(photo)),
        tile_colours=tuple(tile_colours(tile.image, delta)) if imagery else (),
        main_street=on_map if on_map != street else None,
    )


def photo_facts(street: str, district: str, photo: Image.Image, city: str = "") -> Facts:
    """Facts about a street view without any map: its colours, how much sky and how much greenery."""
    return Facts(
        street,
        district,
        photo_colours=tuple(photo_colours(photo)),
        city=city,
        sky=_step(sky_share(photo), SKY),
        greenery=_step(green_share(photo), GREENERY),
    )


def _step(share: float, steps: dict[str, float]) -> str:
    return next(word for word, least in steps.items() if share >= least)


def compass(degrees: float) -> str:
    """One of eight compass words for a direction clockwise from north."""
    return COMPASS[round(degrees / 45) % 8]


def _lines(roads: "Roads", street: str, x: float, y: float, half: float) -> tuple[BaseGeometry | None, dict[str, BaseGeometry]]:
    """The lines of `street` and of each other named street around a point."""
    groups: dict[str, list[BaseGeometry]] = {}
    for road in roads.within(x, y, half):
        if road.name:
            groups.setdefault(road.name, []).append(road.line)
    spellings = [street] if street in groups else [name for name in groups if normalize_name(name) == normalize_name(street)]
    lines = [line for name in spellings for line in groups.pop(name)]
    merged = {name: shapely.line_merge(shapely.union_all(group)) for name, group in groups.items()}
    return (shapely.line_merge(shapely.union_all(lines)) if lines else None), merged


def _bearing(line: BaseGeometry, camera: shapely.Point) -> float:
    """Direction of the line at its point nearest to `camera`, degrees clockwise from north, in [0, 180)."""
    part = min(shapely.get_parts(line), key=lambda p: p.distance(camera))
    at = part.project(camera)
    first, last = part.interpolate(max(0.0, at - TANGENT_M)), part.interpolate(min(part.length, at + TANGENT_M))
    return math.degrees(math.atan2(last.x - first.x, last.y - first.y)) % 180


def _view(heading: float, bearing: float) -> str:
    """How the camera looks at a street of that bearing."""
    angle = abs((heading - bearing + 90) % 180 - 90)
    return "along" if angle <= 30 else "across" if angle >= 60 else "oblique"


def _nearest_crossing(
    line: BaseGeometry, others: dict[str, BaseGeometry], camera: shapely.Point, half: float
) -> tuple[str, shapely.Point] | None:
    """The street that meets `line` nearest to `camera`, and where, within `half` metres; None if none does."""
    crossings: list[tuple[float, str, shapely.Point]] = []
    for name, other in others.items():
        meeting = line.intersection(other)
        if meeting.is_empty and line.distance(other) <= MEETING_M:
            meeting = shapely.Point(shapely.shortest_line(line, other).coords[0])
        if meeting.is_empty:
            continue
        point = shapely.get_point(shapely.shortest_line(camera, meeting), 1)
        crossings.append((point.distance(camera), name, point))
    nearest = min(crossings, key=lambda crossing: crossing[:2], default=None)
    return (nearest[1], nearest[2]) if nearest and nearest[0] <= half else None


def colour_word(red: int, green: int, blue: int) -> str:
    """The word for one sRGB colour (0 to 255): red, orange, brown, yellow, cream, green, blue, purple, grey, white or dark."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    if value < 0.22:
        return "dark"
    if saturation < 0.16:
        return "white" if value > 0.86 else "grey"
    word = next(name for upper, name in HUES if hue * 360 <= upper)
    if word in ("orange", "yellow") and saturation < 0.38 and value > 0.6:
        return "cream"
    greyish = {"red": 0.5, "orange": 0.75}  # a dark orange is brown, a dark red only if it is dull
    return "brown" if value < 0.62 and saturation < greyish.get(word, 0) else word


# The word of every colour with 4 bits per channel: a lookup table for thumbnails.
_TABLE = np.array([colour_word(17 * r, 17 * g, 17 * b) for r in range(16) for g in range(16) for b in range(16)])


def _colour_words(pixels: np.ndarray) -> np.ndarray:
    """The words of pixels, uint8 (N, 3)."""
    fine = pixels.astype(np.uint16) >> 4
    return _TABLE[fine[:, 0] << 8 | fine[:, 1] << 4 | fine[:, 2]]


def dominant_colours(pixels: np.ndarray, mask: np.ndarray, least: float) -> list[str]:
    """The words that cover at least a share `least` of the masked pixels, the largest share first.

    Args:
        pixels: uint8 (H, W, 3), RGB.
        mask: bool (H, W).
    """
    names, counts = np.unique(_colour_words(pixels[mask]), return_counts=True)
    return [str(names[i]) for i in np.argsort(-counts, kind="stable") if counts[i] >= least * counts.sum()]


def photo_colours(photo: Image.Image) -> list[str]:
    """Up to two colours of the middle band of a street-view photo, where the buildings are, without the sky."""
    pixels = _thumbnail(photo)
    row = np.arange(len(pixels))[:, None] / len(pixels)
    return dominant_colours(pixels, (row >= 0.25) & (row < 0.55) & ~_sky(pixels), least=0.12)[:2]


def tile_colours(tile: Image.Image, delta: float) -> list[str]:
    """Up to three colours around the place on its tile, without the corner that the photo covers and without road colours."""
    row, column = np.mgrid[0 : THUMBNAIL[1], 0 : THUMBNAIL[0]] / THUMBNAIL[0]
    near = (abs(row - 0.5) < 0.3) & (abs(column - 0.5) < 0.3) & ~((row < delta) & (column >= 1 - delta))
    return [c for c in dominant_colours(_thumbnail(tile), near, least=0.06) if c not in ("grey", "white", "dark")][:3]


def sky_share(photo: Image.Image) -> float:
    """Share of the upper half of a street view that is sky."""
    return float(_sky(_thumbnail(photo))[: THUMBNAIL[1] // 2].mean())


def green_share(photo: Image.Image) -> float:
    """Share of the photo without its sky that is green."""
    pixels = _thumbnail(photo)
    words = _colour_words(pixels[~_sky(pixels)])
    return float((words == "green").mean()) if len(words) else 0.0


def _sky(pixels: np.ndarray) -> np.ndarray:
    """Bool (H, W): bright blue or white from the top edge down to the first pixel that is neither."""
    red, blue = pixels[..., 0].astype(int), pixels[..., 2].astype(int)
    brightest, darkest = pixels.max(axis=-1).astype(int), pixels.min(axis=-1).astype(int)
    bright = (brightest > 175) & (((blue == brightest) & (red == darkest)) | (brightest - darkest < 30))
    return np.logical_and.accumulate(bright, axis=0)


def _thumbnail(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize(THUMBNAIL, Image.Resampling.BOX))
