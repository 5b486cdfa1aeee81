"""Perspective views cut out of an equirectangular panorama."""

import math
from functools import lru_cache

import numpy as np
from PIL import Image

SLACK = 0.01  # how far from 2:1 a panorama's sides may be
FINER = 2.0  # sampling needs no more than this many panorama pixels per pixel of the view


def is_equirectangular(width: int, height: int) -> bool:
    """Whether a picture of these sides can be a full panorama: twice as wide as high."""
    return abs(width / (2 * height) - 1) <= SLACK


def useful_width(fov_deg: float, pixels: int) -> int:
    """Width of the panorama beyond which the middle of a view gains nothing, in pixels."""
    return math.ceil(FINER * 2 * math.pi * _focal(fov_deg, pixels))


def cut(panorama: Image.Image, heading_deg: float, fov_deg: float, pixels: int) -> Image.Image:
    """The square view of `pixels` a side whose middle looks `heading_deg` clockwise of the panorama's middle column.

    The camera is level and has the horizontal and vertical field of view `fov_deg` (below 180). A panorama much finer than
    the view is shrunk first, so that nothing flickers; pixels between its columns and rows are bilinear, and columns wrap.
    """
    width = useful_width(fov_deg, pixels)
    if panorama.width > width:
        panorama = panorama.resize((width, max(2, round(panorama.height * width / panorama.width))), Image.Resampling.BOX)
    source = np.asarray(panorama.convert("RGB"), dtype=np.float32)
    height, width, _ = source.shape
    column, row = positions(fov_deg, pixels, width, height)
    column = (column + heading_deg / 360 * width) % width
    left, top = np.floor(column).astype(np.intp), np.floor(row).astype(np.intp)
    right_share, low_share = (column - left)[..., None], (row - top)[..., None]
    left %= width  # a column a rounding error below the width is column 0
    right, low = (left + 1) % width, np.minimum(top + 1, height - 1)
    upper = source[top, left] * (1 - right_share) + source[top, right] * right_share
    lower = source[low, left] * (1 - right_share) + source[low, right] * right_share
    return Image.fromarray(np.rint(upper * (1 - low_share) + lower * low_share).astype(np.uint8))


@lru_cache(maxsize=8)
def positions(fov_deg: float, pixels: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel of a view at heading 0 lies in a panorama: (column, row), float32 of shape (pixels, pixels).

    0 is the middle of the first column or row; rows stay inside, columns may be negative.
    """
    focal = _focal(fov_deg, pixels)
    offset = np.arange(pixels) + 0.5 - pixels / 2
    right, down = np.meshgrid(offset, offset)
    longitude = np.arctan2(right, focal)
    latitude = np.arctan2(-down, np.hypot(right, focal))
    column = (longitude / (2 * np.pi) + 0.5) * width - 0.5
    row = (0.5 - latitude / np.pi) * height - 0.5
    return column.astype(np.float32), np.clip(row, 0, height - 1).astype(np.float32)


def _focal(fov_deg: float, pixels: int) -> float:
    """Distance of the picture plane, in its pixels."""
    return pixels / 2 / math.tan(math.radians(fov_deg) / 2)
