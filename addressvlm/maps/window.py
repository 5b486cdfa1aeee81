"""From source pixels to the square of a tile: what all kinds of imagery share."""

import numpy as np
from PIL import Image

from addressvlm.errors import InputError

MIN_COVERED = 0.5  # share of a tile that the imagery must cover
EDGE = 2  # source pixels read beyond the tile, for interpolation

Bounds = tuple[float, float, float, float]  # west, south, east, north in local metres


def corners_of(bounds: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """x and y (3,) of the upper left, upper right and lower left corner.

    Over the side of a tile every projection is straight to far less than a pixel, so three corners place it.
    """
    west, south, east, north = bounds
    return np.array([west, east, west]), np.array([north, north, south])


def cut(
    values: Image.Image,
    covered: Image.Image,
    corners: np.ndarray,
    pixels: int,
    source: str,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> Image.Image:
    """The square of pixels x pixels whose three corners (3, 2) lie at these columns and rows of `values`.

    Args:
        values: RGB source pixels, about as fine as the square's.
        covered: L, 255 where `values` are known.
        source: its name, for the error.

    Raises:
        InputError: less than half of the square is known.
    """
    (a, d), (b, e) = (corners[1] - corners[0]) / pixels, (corners[2] - corners[0]) / pixels
    size, affine, place = (pixels, pixels), Image.Transform.AFFINE, (a, b, corners[0, 0], d, e, corners[0, 1])
    share = np.asarray(covered.transform(size, affine, place)).mean() / 255
    if share < MIN_COVERED:
        raise InputError(f"{source} covers only {share:.0%} of the tile.")
    return values.transform(size, affine, place, resampling)
