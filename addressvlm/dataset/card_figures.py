"""Figures of the dataset card as PNG bytes: streets in colours, map of the splits, long tail."""

import heapq
import io
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import pyproj
import shapely
import shapely.affinity
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from shapely.geometry.base import BaseGeometry

from addressvlm.dataset.geocoding import Place
from addressvlm.gazetteer.gazetteer import Gazetteer

BACKGROUND, INK, SOFT, BORDER, FAINT = "#fffefb", "#22262b", "#656b73", "#c4bcab", "#dcd6ca"
HUES = ("#0f7f6f", "#c8434f", "#3b78b5", "#c98a2b", "#6f66c4", "#b3557f", "#6a8f3a", "#2f9fb5", "#8a5a3c", "#d96f2e")
SPLITS = {"train": ("#0f7f6f", "training"), "val": ("#c98a2b", "validation"), "test": ("#c8434f", "test"),
          "aside": ("#b9b2a4", "in no split")}  # fmt: skip
MAX_ASPECT, MIN_ASPECT = 1.0, 0.55  # height by width of a map
NEIGHBOUR_M = 40.0  # streets this near each other get different colours
MAX_LABELS = 60  # streets whose names may be on the map, those with most places first


class CityFigures:
    """Maps of the streets and places of a city on an equal-area plane around its middle, in metres."""

    def __init__(self, places: Sequence[Place], gazetteer: Gazetteer) -> None:
        self.places = list(places)
        lat, lon = np.mean([(p.lat, p.lon) for p in self.places], axis=0)
        plane = f"+proj=laea +lat_0={lat:.6f} +lon_0={lon:.6f} +datum=WGS84 +units=m +no_defs"
        self._projection = pyproj.Transformer.from_crs("EPSG:4326", plane, always_xy=True)
        self.xy = self._project(np.array([(p.lon, p.lat) for p in self.places]))
        low, high = self.xy.min(axis=0), self.xy.max(axis=0)
        width, height = (high - low) + 2 * max(0.05 * float((high - low).max()), 60.0)
        width = max(width, height / MAX_ASPECT)
        height = max(height, width * MIN_ASPECT)
        x, y = (low + high) / 2
        self.frame = (float(x - width / 2), float(y - height / 2), float(x + width / 2), float(y + height / 2))
        self._line_scale = min(1.0, (1500 / (self.frame[2] - self.frame[0])) ** 0.4)  # thinner where more of a city is shown
        self.streets = {name: self._view(shape) for name, shape in gazetteer.geometry.items()}
        self.districts = {name: self._view(shapely.make_valid(s)) for name, s in gazetteer.district_geometry.items()}
        borders = shapely.union_all([shapely.boundary(shape) for shape in gazetteer.district_geometry.values()])
        self.borders = shapely.line_merge(self._view(borders))

    def street_map(self) -> bytes:
        """Every place in the colour of its sub-street, or of its street where there is no partition."""
        groups = [p.sub_street or p.address.street for p in self.places]
        partitioned = any(p.sub_street for p in self.places)
        shapes = {group: shapely.MultiPoint(self.xy[members]) for group, members in _members(groups).items()}
        colours = _colours(shapes if partitioned else shapes | {n: s for n, s in self.streets.items() if not s.is_empty})
        figure, axes = self._map(9.4)
        lines = [FAINT if partitioned or name not in colours else f"{colours[name]}66" for name in self.streets]
        _draw_lines(axes, list(self.streets.values()), lines, 2.6 * self._line_scale)
        x, y = self.xy.T
        axes.scatter(x, y, s=16 * self._line_scale**2, c=[colours[group] for group in groups], linewidths=0, zorder=3)
        self._street_names(axes, self._district_names(axes))
        return _png(figure)

    def split_map(self, part: Mapping[str, str]) -> bytes:
        """Every place in the colour of its split."""
        figure, axes = self._map(5.2)
        _draw_lines(axes, list(self.streets.values()), [FAINT] * len(self.streets), 1.4 * self._line_scale)
        parts = np.array([part[p.id] for p in self.places])
        for name in [n for n in reversed(SPLITS) if (parts == n).any()]:
            colour, title = SPLITS[name]
            label = f"{title}, {int((parts == name).sum()):,}"
            x, y = self.xy[parts == name].T
            axes.scatter(x, y, s=13 * self._line_scale**2, c=colour, linewidths=0, label=label, zorder=3)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles[::-1], labels[::-1], loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(labels), frameon=False,
            fontsize=8.5, labelcolor=INK, handletextpad=0.1, columnspacing=1.4, markerscale=1.6 / self._line_scale,
        )  # fmt: skip
        return _png(figure)

    def _map(self, width: float) -> tuple[Figure, Axes]:
        """Axes with the frame of the city, borders of districts, and a scale bar."""
        left, bottom, right, top = self.frame
        figure = Figure(figsize=(width, width * (top - bottom) / (right - left)), facecolor=BACKGROUND)
        FigureCanvasAgg(figure)  # measures texts
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
        axes.set_axis_off()
        _draw_lines(axes, [self.borders], [BORDER], 0.8, dashes=(6, 4))
        unit = 10.0 ** math.floor(math.log10((right - left) / 5))
        length = max(m * unit for m in (1, 2, 5) if m * unit <= (right - left) / 5)
        x, y = left + 0.03 * (right - left), bottom + 0.03 * (right - left)
        axes.plot([x, x + length], [y, y], color=INK, linewidth=2.2, solid_capstyle="butt", zorder=6)
        label = f"{length:g} m" if length < 1000 else f"{length / 1000:g} km"
        axes.annotate(label, (x + length / 2, y), (0, 4), textcoords="offset points", ha="center", va="bottom", fontsize=8,
                      color=INK, path_effects=_halo(2.5), zorder=6)  # fmt: skip
        return figure, axes

    def _district_names(self, axes: Axes) -> list[BaseGeometry]:
        """Write names near the middle of the districts, off the places where possible; return their boxes in pixels."""
        boxes: list[BaseGeometry] = []
        dots = shapely.MultiPoint(axes.transData.transform(self.xy))
        for name, shape in sorted(self.districts.items(), key=lambda item: -item[1].area):
            if shape.is_empty or not _font_characters().issuperset(name.upper()):
                continue
            middle = shape.centroid if shape.contains(shape.centroid) else shape.representative_point()
            for points, obstacles in [*((points, [dots]) for points in (0, 12, -12, 24, -24, 36, -36)), (0, [])]:
                text = axes.annotate(name.upper(), (middle.x, middle.y), (0, points), textcoords="offset points", fontsize=7.5,
                                     color=SOFT, ha="center", va="center", path_effects=_halo(2.5), zorder=4)  # fmt: skip
                if _place_text(text, boxes, axes, obstacles):
                    break
        return boxes

    def _street_names(self, axes: Axes, boxes: list[BaseGeometry]) -> None:
        """Write names beside the streets with most places, where there is no text yet."""
        by_street = _members([p.address.street for p in self.places])
        ranked = sorted(by_street, key=lambda name: (-len(by_street[name]), name))[:MAX_LABELS]
        for name in [n for n in ranked if _font_characters().issuperset(n)]:
            for at, angle in self._label_positions(name, by_street[name]):
                turn = math.radians(angle + 90)
                text = axes.annotate(name, at, (5 * math.cos(turn), 5 * math.sin(turn)), textcoords="offset points",
                                     fontsize=7, color=INK, rotation=angle, ha="center", va="center", zorder=5,
                                     path_effects=_halo(2.0))  # fmt: skip
                text.set_rotation_mode("anchor")
                if _place_text(text, boxes, axes):
                    break

    def _label_positions(self, name: str, members: Sequence[int]) -> list[tuple[tuple[float, float], float]]:
        """Position and angle (degrees) of a name: along the street at some of its places, or level where it has no lines."""
        middle = self.xy[members].mean(axis=0)
        sample = members[:: max(1, len(members) // 12)]
        sample = sorted(sample, key=lambda i: float(np.hypot(*(self.xy[i] - middle))))
        names = {name, *(self.places[i].sub_street or name for i in members)}
        parts, positions = shapely.get_parts([self.streets[n] for n in sorted(names) if n in self.streets]), []
        if not len(parts):
            return [((x, y), 0.0) for x, y in self.xy[sample]]
        for point in shapely.points(self.xy[sample]):
            nearest = parts[int(np.argmin(shapely.distance(parts, point)))]
            along = shapely.line_locate_point(nearest, point)
            a, b = (shapely.line_interpolate_point(nearest, max(along + d, 0.0)) for d in (-15.0, 15.0))
            angle = math.degrees(math.atan2(b.y - a.y, b.x - a.x))
            at = shapely.line_interpolate_point(nearest, along)
            positions.append(((at.x, at.y), (angle + 90) % 180 - 90))
        return positions

    def _project(self, lonlat: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.column_stack(self._projection.transform(lonlat[:, 0], lonlat[:, 1]))

    def _view(self, shape: BaseGeometry) -> BaseGeometry:
        """The part of a shape in degrees that the frame shows, in metres."""
        return shapely.clip_by_rect(shapely.transform(shape, self._project), *self.frame)


def long_tail(streets: Mapping[str, int], sub_streets: Mapping[str, int]) -> bytes:
    """Places of each street, the most photographed first, and the same after the partition (paper 002, Fig. 10).

    Args:
        streets, sub_streets: name -> number of places; without a partition the second is empty.
    """
    rows = [("street", streets, HUES[1])] + ([("sub-street", sub_streets, HUES[0])] if sub_streets else [])
    figure = Figure(figsize=(5.2, 3.2 if len(rows) == 1 else 4.4), facecolor=BACKGROUND, layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(rows), 1, sharey=True))
    for axes, (unit, places, colour) in zip(panels, rows, strict=True):
        counts = np.sort(np.array(list(places.values())))[::-1]
        rank = np.arange(1, len(counts) + 1)
        axes.fill_between(np.append(rank - 0.5, rank[-1] + 0.5), np.append(counts, counts[-1]), step="post", color=colour, lw=0)
        axes.set_xlim(0.5, len(counts) + 0.5)
        axes.set_ylim(0, None)
        axes.set_facecolor(BACKGROUND)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(SOFT)
        axes.tick_params(colors=SOFT, labelsize=8.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.set_ylabel("places", color=SOFT, fontsize=9)
        axes.set_xlabel(f"{unit}s, the most photographed first", color=SOFT, fontsize=9)
        summary = f"{len(counts):,} {unit}s\nlargest {counts[0]:,}, median {np.median(counts):g} places"
        axes.text(0.98, 0.94, summary, transform=axes.transAxes, ha="right", va="top", fontsize=9.5, color=INK, linespacing=1.5)
    return _png(figure)


def _members(groups: Sequence[str]) -> dict[str, list[int]]:
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    return dict(members)


def _colours(shapes: Mapping[str, BaseGeometry]) -> dict[str, str]:
    """A colour for each name, different ones for neighbours as far as possible, all about equally often.

    Greedy colouring in DSatur order: next is the name whose neighbours have most colours.
    """
    names = sorted(shapes)
    geometry = np.array([shapes[n] for n in names], dtype=object)
    neighbours: dict[int, list[int]] = defaultdict(list)
    for i, j in shapely.STRtree(geometry).query(geometry, predicate="dwithin", distance=NEIGHBOUR_M).T:
        if i != j:
            neighbours[int(i)].append(int(j))
    colours: dict[int, int] = {}
    neighbour_hues: list[Counter[int]] = [Counter() for _ in names]
    used = [0] * len(HUES)
    queue = [(0, -len(neighbours[i]), i) for i in range(len(names))]
    heapq.heapify(queue)
    while queue:
        i = heapq.heappop(queue)[2]
        if i in colours:
            continue
        colours[i] = hue = min(range(len(HUES)), key=lambda h: (neighbour_hues[i][h], used[h], h))
        used[hue] += 1
        for j in neighbours[i]:
            neighbour_hues[j][hue] += 1
            heapq.heappush(queue, (-len(neighbour_hues[j]), -len(neighbours[j]), j))
    return {name: HUES[colours[i]] for i, name in enumerate(names)}


def _draw_lines(
    axes: Axes, shapes: Sequence[BaseGeometry], colours: Sequence[str], width: float, dashes: tuple[int, int] | None = None
) -> None:
    """All lines of the shapes, each shape in its colour."""
    parts, shape_of = shapely.get_parts(np.array(shapes, dtype=object), return_index=True)
    lines = [shapely.get_coordinates(part) for part in parts]
    axes.add_collection(
        LineCollection(lines, colors=[colours[i] for i in shape_of], linewidths=width, capstyle="round", zorder=2,
                       linestyles=[(0, dashes)] if dashes else "solid"),
        autolim=False,
    )  # fmt: skip


def _place_text(text: Text, boxes: list[BaseGeometry], axes: Axes, obstacles: Sequence[BaseGeometry] = ()) -> bool:
    """Add the box of the text to the others, or remove the text if it would overlap something or leave the map."""
    angle = text.get_rotation()
    text.set_rotation(0)
    level = text.get_window_extent()
    text.set_rotation(angle)
    box = shapely.box(level.x0 - 2, level.y0, level.x1 + 2, level.y1)
    box = shapely.affinity.rotate(box, angle, origin="center")
    if shapely.box(*axes.bbox.extents).contains(box) and not any(box.intersects(other) for other in (*boxes, *obstacles)):
        boxes.append(box)
        return True
    text.remove()
    return False


def _halo(width: float) -> list[object]:
    return [withStroke(linewidth=width, foreground=BACKGROUND)]


@cache
def _font_characters() -> frozenset[str]:
    return frozenset(map(chr, FT2Font(findfont("DejaVu Sans")).get_charmap()))


def _png(figure: Figure) -> bytes:
    full, encoded = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=170, facecolor=BACKGROUND, bbox_inches="tight", pad_inches=0.05)
    Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(encoded, "PNG", optimize=True)
    return encoded.getvalue()
