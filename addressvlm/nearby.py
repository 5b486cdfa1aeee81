"""Which of some named shapes are near to one of them, or to a point, whatever their number."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

METRES_PER_DEGREE = 111_320.0
FIRST_REACH_M = 250.0


class NearNames:
    """Names in order; those without a shape are further away than all others."""

    def __init__(self, names: Sequence[str], shapes: Mapping[str, BaseGeometry]) -> None:
        """`shapes` in degrees (lon, lat)."""
        self._names = list(names)
        self._shaped = [name for name in self._names if name in shapes]
        self._shapes = np.array([shapes[name] for name in self._shaped], dtype=object)
        self._at = {name: i for i, name in enumerate(self._shaped)}
        self._tree = shapely.STRtree(self._shapes)
        self._known: dict[str, list[str]] = {}

    def nearest(self, name: str, k: int) -> list[str]:
        """Up to k other names, the nearest first, of equally near ones the first in order."""
        if name not in self._known or len(self._known[name]) < min(k, len(self._names) - 1):
            self._known[name] = self._search(name, k)
        return self._known[name][:k]

    def around(self, lat: float, lon: float, metres: float) -> set[str]:
        """The names whose shape is that near to a point."""
        near, distances = self._within(shapely.Point(lon, lat), metres)
        return {self._shaped[i] for i in near[distances <= metres]}

    def _search(self, name: str, k: int) -> list[str]:
        found: list[str] = []
        if name in self._at:
            own, reach, near, distances = self._at[name], FIRST_REACH_M, np.zeros(0, dtype=np.int64), np.zeros(0)
            while (distances <= reach).sum() <= k and len(near) < len(self._shaped):
                reach *= 2
                near, distances = self._within(self._shapes[own], reach)
            found = [self._shaped[i] for i in near[np.lexsort((near, distances))] if i != own][:k]
        if len(found) < k:
            taken = {name, *found}
            found += [other for other in self._names if other not in taken and (name not in self._at or other not in self._at)]
        return found[:k]

    def _within(self, shape: BaseGeometry, metres: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """All shapes within a distance of one, and some more, with their distances in metres on a plane around it."""
        squeeze = max(math.cos(math.radians(shapely.centroid(shape).y)), 0.01)
        west, south, east, north = shapely.bounds(shape)
        dx, dy = metres / (METRES_PER_DEGREE * squeeze), metres / METRES_PER_DEGREE
        near = np.sort(self._tree.query(shapely.box(west - dx, south - dy, east + dx, north + dy)))
        scale = [METRES_PER_DEGREE * squeeze, METRES_PER_DEGREE]
        here, there = (shapely.transform(s, lambda c: c * scale) for s in (shape, self._shapes[near]))
        return near, shapely.distance(here, there)
