"""Draw maps of a city with matplotlib, in degrees that are true to shape."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry


def squeeze(lat: float) -> float:
    """Length of a degree of longitude / length of a degree of latitude."""
    return float(np.cos(np.radians(lat)))


def new_figure(panels: int, size: tuple[float, float] | None = None) -> tuple[Any, Any]:
    """A figure with `panels` axes side by side, and the axes (panels,)."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "map"  # reproducible files
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False, layout="constrained")
    return figure, axes[0]


def draw_outline(axis: Any, shape: BaseGeometry, colour: Any, width: float, order: float) -> None:
    """Draw the lines of a shape, or the outline of an area; `order` is matplotlib's zorder."""
    for line in shapely.get_parts(shapely.boundary(shape) if shape.geom_type.endswith("Polygon") else shape):
        axis.plot(*shapely.get_coordinates(line).T, color=colour, linewidth=width, solid_capstyle="round", zorder=order)


def set_extent(axis: Any, west: float, south: float, east: float, north: float) -> None:
    """Show this part of the city, true to shape and without ticks."""
    axis.set_xlim(west, east)
    axis.set_ylim(south, north)
    axis.set_aspect(1 / squeeze((south + north) / 2))
    axis.set_xticks([])
    axis.set_yticks([])


def save_figure(figure: Any, path: Path, attribution: Iterable[str]) -> None:
    """Write and close a figure with the sources of its map."""
    from matplotlib import pyplot as plt

    if attribution:
        figure.supxlabel("; ".join(attribution), fontsize=7)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
