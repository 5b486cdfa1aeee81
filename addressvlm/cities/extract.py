"""What is read from a geographic file: objects with tags and a shape."""

from collections.abc import Sequence
from dataclasses import dataclass

import shapely
from shapely.geometry.base import BaseGeometry

Tags = dict[str, str]
Bounds = tuple[float, float, float, float]  # west, south, east, north in degrees


@dataclass(frozen=True, slots=True)
class Feature:
    """One object: its tags and its shape in degrees (lon, lat), never empty."""

    tags: Tags
    shape: BaseGeometry

    @property
    def dimension(self) -> int:
        """0 for points, 1 for lines, 2 for areas."""
        return int(shapely.get_dimensions(self.shape))


@dataclass(frozen=True)
class Extract:
    """The objects of a file, and the rectangle that the file is about."""

    features: list[Feature]
    bounds: Bounds  # as the file says, else that of the objects; zeros without any
    osm: bool = False  # whether it has OpenStreetMap's tags
    incomplete: int = 0  # areas whose border is not all in the file

    @classmethod
    def of(cls, features: Sequence[Feature], bounds: Bounds | None = None, osm: bool = False, incomplete: int = 0) -> "Extract":
        """Leaves out objects without a shape, and takes the bounds of the others if none are given."""
        kept = [f for f in features if not f.shape.is_empty]
        if bounds is None:
            west, south, east, north = shapely.total_bounds([f.shape for f in kept]).tolist() if kept else (0.0,) * 4
            bounds = (west, south, east, north)
        return cls(kept, bounds, osm, incomplete)
