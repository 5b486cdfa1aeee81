"""Plots of the report as inline SVG; colours come from the page's CSS, so that they follow its light and dark mode."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from addressvlm.evaluation.metrics import Interval
from addressvlm.gazetteer.gazetteer import Gazetteer

MAP_WIDTH = 520.0  # user units; the page scales it
MARGIN = 0.06  # of the map's side, around the test places
TALLEST, FLATTEST = 1.1, 0.6  # height by width; a longer city is shown with more of its surroundings


def interval_bar(cell: Interval, width: float = 120, height: float = 12, low: float = 0, high: float = 1) -> str:
    """A bar from zero to the value, its interval as a whisker, on an axis from `low` to `high`."""
    if cell["value"] is None or cell["low"] is None or cell["high"] is None:
        return ""

    def x(share: float) -> float:
        return round(width * (min(max(share, low), high) - low) / (high - low), 1)

    zero, value, start, end = x(0), x(cell["value"]), x(cell["low"]), x(cell["high"])
    middle = height / 2
    parts = [
        f'<rect class="track" x="0" y="{middle - 3}" width="{width}" height="6" rx="3"/>',
        f'<rect class="bar" x="{min(zero, value)}" y="{middle - 3}" width="{max(abs(value - zero), 1)}" height="6" rx="3"/>',
        f'<line class="whisker" x1="{start}" x2="{end}" y1="{middle}" y2="{middle}"/>',
        *(f'<line class="whisker" x1="{at}" x2="{at}" y1="{middle - 4}" y2="{middle + 4}"/>' for at in (start, end)),
    ]
    if low < 0:
        parts.append(f'<line class="zero" x1="{zero}" x2="{zero}" y1="0" y2="{height}"/>')
    return f'<svg class="interval" viewBox="-1 0 {width + 2} {height}" preserveAspectRatio="none">{"".join(parts)}</svg>'


class CityMap:
    """The streets of a city, drawn once, and any number of maps with test places on them."""

    def __init__(self, points: Sequence[tuple[float, float]], gazetteer: Gazetteer | None) -> None:
        """`points`: (lat, lon) of the test places in degrees; they decide which part of the city the map shows."""
        lat, lon = np.array(points, dtype=float).T
        self._squeeze = math.cos(math.radians(float(lat.mean())))
        x, y = lon * self._squeeze, lat
        pad = 2 * MARGIN * max(np.ptp(x), np.ptp(y), 0.002)
        span_x, span_y = float(np.ptp(x)) + pad, float(np.ptp(y)) + pad
        span_x, span_y = max(span_x, span_y / TALLEST), max(span_y, span_x * FLATTEST)
        self._left = float(x.min() + x.max() - span_x) / 2
        self._top = float(y.min() + y.max() + span_y) / 2
        self._scale = MAP_WIDTH / span_x
        self.width, self.height = MAP_WIDTH, round(span_y * self._scale, 1)
        self.defs = self._defs(gazetteer) if gazetteer else ""

    def draw(self, places: Sequence[Mapping[str, Any]]) -> str:
        """One map; a place has `lat`, `lon`, `share` (of its answers that are right) and a `note` for hovering."""
        marks = "".join(self._mark(place) for place in sorted(places, key=lambda p: p["share"]))
        size = f"{self.width} {self.height}"
        return f'<svg class="map" viewBox="0 0 {size}" role="img"><use href="#city-streets"/>{marks}</svg>'

    def _mark(self, place: Mapping[str, Any]) -> str:
        x, y = map(float, self._xy(np.array([[place["lon"], place["lat"]]]))[0].round(1))
        note = f"<title>{html.escape(place['note'])}</title>"
        if place["share"] == 0:
            return f'<path class="wrong" d="M{x - 4} {y - 4}l8 8M{x + 4} {y - 4}l-8 8">{note}</path>'
        if place["share"] == 1:
            return f'<circle class="right" cx="{x}" cy="{y}" r="5">{note}</circle>'
        angle, r = 2 * math.pi * place["share"], 4.5
        arc = f"A{r} {r} 0 {int(place['share'] > 0.5)} 1 {x + r * math.sin(angle):.1f} {y - r * math.cos(angle):.1f}"
        return (
            f'<g>{note}<circle class="partly" cx="{x}" cy="{y}" r="{r}"/>'
            f'<path class="right" d="M{x:.1f} {y:.1f}V{y - r:.1f}{arc}Z"/></g>'
        )

    def _xy(self, lonlat: np.ndarray) -> np.ndarray:
        """Degrees (n, 2) as lon, lat -> user units (n, 2)."""
        return np.column_stack(
            [(lonlat[:, 0] * self._squeeze - self._left) * self._scale, (self._top - lonlat[:, 1]) * self._scale]
        )

    def _defs(self, gazetteer: Gazetteer) -> str:
        borders = "".join(
            f'<path class="border" d="{self._path(shapely.boundary(shape))}"/>'
            for shape in gazetteer.district_geometry.values()
        )
        streets = "".join(
            f'<path class="street" d="{path}"><title>{html.escape(name)}</title></path>'
            for name, shape in gazetteer.geometry.items()
            if (path := self._path(shape))
        )
        names = "".join(self._district_name(name, shape) for name, shape in gazetteer.district_geometry.items())
        return f'<svg class="defs" width="0" height="0"><defs><g id="city-streets">{borders}{streets}{names}</g></defs></svg>'

    def _view(self, shape: BaseGeometry) -> BaseGeometry:
        """The visible part of a shape in degrees, in user units."""
        drawn = shapely.transform(shape, self._xy)
        return shapely.clip_by_rect(drawn, -10, -10, self.width + 10, self.height + 10)

    def _path(self, shape: BaseGeometry) -> str:
        lines = shapely.get_parts(shapely.simplify(self._view(shape), 0.7))
        points = [shapely.get_coordinates(line).round(1) for line in lines]
        return "".join("M" + "L".join(f"{x:g} {y:g}" for x, y in line) for line in points if len(line) > 1)

    def _district_name(self, name: str, shape: BaseGeometry) -> str:
        view = self._view(shapely.make_valid(shape))
        if view.is_empty or view.area < 0.02 * self.width * self.height:
            return ""
        at = view.representative_point() if not view.contains(view.centroid) else view.centroid
        half = 3.4 * len(name)
        x = min(max(at.x, half + 4), self.width - half - 4)
        y = min(max(at.y, 12), self.height - 6)
        return f'<text class="district" x="{x:.0f}" y="{y:.0f}">{html.escape(name)}</text>'


def loss_curves(stages: Mapping[str, Sequence[tuple[float, float]]], top: float, steps: float) -> str:
    """Loss against optimizer step, stages one after another; thin as logged, thick smoothed.

    Args:
        stages: per stage (step, loss), steps counted over all stages.
        top, steps: ends of the axes, the same for every system so that they can be compared.
    """
    width, height, left, bottom = 320.0, 170.0, 30.0, 20.0

    def xy(step: float, loss: float) -> str:
        x = left + (width - left - 6) * step / max(steps, 1)
        y = (height - bottom) - (height - bottom - 10) * min(loss, top) / top
        return f"{x:.1f},{y:.1f}"

    parts = []
    for value in _ticks(top):
        at = xy(0, value).split(",")[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 6}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick end" x="{left - 5}" y="{float(at) + 3.5}">{value:g}</text>')
    for value in _ticks(steps):
        at = xy(value, 0).split(",")[0]
        parts.append(f'<text class="tick middle" x="{at}" y="{height - 5}">{value:g}</text>')
    for i, points in enumerate(stages.values()):
        for style, line in (("raw", points), ("smooth", _smooth(points))):
            parts.append(f'<polyline class="{style} stage{i % 3}" points="{" ".join(xy(*p) for p in line)}"/>')
    return f'<svg class="loss" viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean over a window of about an eighth of the curve, centred; narrower towards the ends."""
    total = np.concatenate([[0.0], np.cumsum([loss for _, loss in points])])
    half = len(points) // 16
    smoothed = []
    for i, (step, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        smoothed.append((step, float(total[i + reach + 1] - total[i - reach]) / (2 * reach + 1)))
    return smoothed


def _ticks(end: float) -> list[float]:
    """About four round values from 0 to `end`."""
    rough = max(end, 1e-6) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough)
    return [round(i * step, 10) for i in range(math.floor(end / step + 1e-9) + 1)]


def distance_curves(systems: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy on whole addresses by distance to the nearest training photo, a line for each system.

    A system has `name`, `hue` and `by_distance` with `from_m`, `to_m` and an interval; a point lies at the middle of its band.
    """
    if not systems:
        return ""
    bands = [band for system in systems for band in system["by_distance"]]
    width, height, left, low = 640.0, 300.0, 40.0, 30.0
    furthest = max(band["to_m"] for band in bands) or 1.0
    top = min(1.0, max(0.1, 1.1 * max(band["value"] for band in bands)))

    def xy(metres: float, share: float) -> str:
        return f"{left + metres / furthest * (width - left - 8):.1f},{8 + (1 - share / top) * (height - low - 8):.1f}"

    parts = []
    for share in (0.0, top / 2, top):
        x, y = xy(0, share).split(",")
        parts.append(f'<line class="grid" x1="{x}" x2="{width - 8}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick end" x="{left - 5}" y="{float(y) + 4}">{100 * share:.0f}</text>')
    for metres in (0.0, furthest / 2, furthest):
        x = xy(metres, 0).split(",")[0]
        end = "end" if metres == furthest else "middle"
        parts.append(f'<text class="tick {end}" x="{x}" y="{height - low + 14}">{metres:.0f} m</text>')
    for system in systems:
        points = [((band["from_m"] + band["to_m"]) / 2, band["value"], band) for band in system["by_distance"]]
        parts.append(
            f'<g class="hue{system["hue"]}"><polyline class="smooth" points="{" ".join(xy(m, s) for m, s, _ in points)}"/>'
        )
        for metres, share, band in points:
            x, y = xy(metres, share).split(",")
            note = f"{system['name']}, {band['from_m']:.0f} to {band['to_m']:.0f} m: {100 * share:.1f} % of {band['n']}"
            parts.append(f'<circle class="bin" cx="{x}" cy="{y}" r="4"><title>{html.escape(note)}</title></circle>')
        parts.append("</g>")
    return f'<svg class="loss reliability" viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def reliability_diagram(bins: Sequence[Mapping[str, float]]) -> str:
    """Confidence against accuracy, from `addressvlm.answers.calibration.reliability`."""
    side, left, bottom, top = 300.0, 34.0, 34.0, 8.0

    def xy(confidence: float, right: float) -> tuple[float, float]:
        return round(left + confidence * (side - left - 10), 1), round(top + (1 - right) * (side - bottom - top), 1)

    most = max((b["photos"] for b in bins), default=1)
    low, high = xy(0, 0), xy(1, 1)
    parts = [
        f'<rect class="frame" x="{low[0]}" y="{high[1]}" width="{high[0] - low[0]}" height="{low[1] - high[1]}"/>',
        f'<line class="ideal" x1="{low[0]}" y1="{low[1]}" x2="{high[0]}" y2="{high[1]}"/>',
    ]
    for percent in (0, 25, 50, 75, 100):
        x, y = xy(percent / 100, percent / 100)
        parts.append(f'<text class="tick middle" text-anchor="middle" x="{x}" y="{low[1] + 14}">{percent}</text>')
        parts.append(f'<text class="tick end" x="{low[0] - 5}" y="{y + 4}">{percent}</text>')
    for b in bins:
        (x, y), (_, ideal) = xy(b["confidence"], b["right"]), xy(b["confidence"], b["confidence"])
        note = f"<title>{b['photos']:.0f} photos: confidence {b['confidence']:.0%}, right {b['right']:.0%}</title>"
        parts.append(f'<line class="gap" x1="{x}" x2="{x}" y1="{ideal}" y2="{y}"/>')
        parts.append(f'<circle class="bin" cx="{x}" cy="{y}" r="{3 + 7 * math.sqrt(b["photos"] / most):.1f}">{note}</circle>')
    parts.append(f'<text class="tick" text-anchor="middle" x="{(low[0] + high[0]) / 2}" y="{side - 2}">confidence, %</text>')
    parts.append(f'<text class="tick" x="{low[0] + 8}" y="{high[1] + 16}">right, %</text>')
    return f'<svg class="reliability" viewBox="0 0 {side} {side}" role="img">{"".join(parts)}</svg>'
