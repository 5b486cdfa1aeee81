"""A street-view photo of a city: its row, the check of its file, views cut from panoramas."""

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from addressvlm.errors import InputError
from addressvlm.pictures import PixelDepthError, name_of_kind, orientation, to_rgb, upright
from addressvlm.storage import remote_path

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")  # none that runs programs
UNCHANGED_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")  # an MPO begins with a plain JPEG
MIN_SIDE = 16
JPEG_QUALITY = 95
ASPECT_TOLERANCE = 0.01  # how far from 2:1 a panorama's sides may be
OVERSAMPLING = 2.0  # panorama pixels per pixel of the view, beyond which sampling gains nothing


@dataclass(frozen=True, slots=True)
class Photo:
    """One photo; `id` is its key, since the views of one panorama share a row. "" stands for unknown."""

    row: int  # of the table, 1 is the first below the header; of a folder, the place in its sorted list
    id: str
    file: str  # a URI, or a path relative to city.photos
    place: str  # photos with the same place were taken at the same spot
    lat: float  # degrees, WGS84
    lon: float
    heading: float | None = None  # degrees clockwise from north, in [0, 360)
    street: str = ""
    district: str = ""
    sub_street: str = ""
    block: str = ""  # places of a block are split together
    split: str = ""  # as the table has it
    fov_deg: float | None = None  # horizontal field of view
    other_street: str = ""  # the second of several in one cell; the photo may be on either
    view: float | None = None  # cut `file`, a panorama, this many degrees clockwise of its centre; None: `file` is the photo

    def reject(self, reason: str) -> dict[str, Any]:
        """This photo as a row of `tables.REJECTS`; the part of the reason before the colon is what gets counted."""
        return {"file": self.file, "row": self.row, "id": self.id, "reason": reason}


def check_photo(
    path: Path | str, max_megapixels: float, view: float | None = None, fov_deg: float | None = None, pixels: int | None = None
) -> bytes | str:
    """The encoded photo, or the reason why it can't be used (its kind is before the colon).

    `path` may be a URI. The size is checked before anything is decoded, then the picture is decoded once. Bytes stay as they
    are unless the picture must be rotated by its EXIF orientation, has another format than JPEG, PNG or WebP, or other
    channels than grey or RGB; then they are a new JPEG. With `view` the file is a panorama, and the result is the square JPEG
    of `pixels` a side that looks `view` degrees clockwise of its middle and is `fov_deg` wide.
    """
    data = _read_file(path)
    if isinstance(data, str):
        return data
    image = _open(data, str(path), max_megapixels)
    if isinstance(image, str):
        return image
    with image:
        width, height = image.size
        try:
            if view is not None and fov_deg is not None and pixels is not None:
                if orientation(image) >= 5:
                    width, height = height, width
                if not is_equirectangular(width, height):
                    return f"not a panorama: {path} is {width}x{height} pixels, an equirectangular one is twice as wide as high"
                needed = useful_width(fov_deg, pixels)
                image.draft("RGB", (needed, needed // 2))  # decode at the coarsest scale that has all detail of the view
                return _encode_jpeg(cut_view(to_rgb(upright(image)), view, fov_deg, pixels))
            image.load()
            if image.format in UNCHANGED_FORMATS and image.mode in ("RGB", "L") and orientation(image) == 1:
                return data
            return _encode_jpeg(to_rgb(upright(image)))
        except PixelDepthError as error:
            return f"not a photo: {path} has {error}"
        except Exception as error:  # decoders raise anything on arbitrary bytes
            return f"photo damaged: {path} ends early or is corrupt ({error})"


def decode_photo(path: Path | str, max_megapixels: float, side: int, data: bytes | None = None) -> Image.Image | str:
    """The picture, upright in RGB, or the reason as in `check_photo`; decoded once.

    Args:
        side: pixels of a model's input; a JPEG is decoded at the coarsest scale whose shorter side is twice as long at least.
        data: the file, if it was read already.
    """
    content = _read_file(path) if data is None else data
    image = content if isinstance(content, str) else _open(content, str(path), max_megapixels)
    if isinstance(image, str):
        return image
    with image:
        try:
            scale = min(1.0, 2 * side / min(image.size))
            image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
            return to_rgb(upright(image))
        except PixelDepthError as error:
            return f"not a photo: {path} has {error}"
        except Exception as error:  # decoders raise anything on arbitrary bytes
            return f"photo damaged: {path} ends early or is corrupt ({error})"


def _read_file(path: Path | str) -> bytes | str:
    try:
        return remote_path.path_of(path).read_bytes()
    except FileNotFoundError:
        return f"photo missing: no file {path}"
    except OSError as error:
        return f"photo unreadable: {path} ({remote_path.error_text(error)})"
    except (ValueError, InputError) as error:
        return f"photo unreadable: {str(path)!r} ({error})"


def _open(data: bytes, path: str, max_megapixels: float) -> Image.Image | str:
    """The picture before decoding, its size checked."""
    if not data:
        return f"photo empty: {path} has zero bytes"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.init()  # registers the decoders of this build of Pillow
            image = Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN])
    except Image.DecompressionBombError:
        return f"photo too large: {path} has more than {max_megapixels:g} megapixels"
    except Exception:  # decoders raise anything on arbitrary bytes
        return f"not a photo: {path} is {name_of_kind(data[:64]) or 'not a picture in ' + ', '.join(FORMATS)}"
    width, height = image.size
    if width * height > max_megapixels * 1e6:
        return f"photo too large: {path} has {width * height / 1e6:.0f} megapixels, the limit is {max_megapixels:g}"
    if min(width, height) < MIN_SIDE:
        return f"photo too small: {path} is {width}x{height} pixels, both sides must be {MIN_SIDE} at least"
    return image


def _encode_jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def is_equirectangular(width: int, height: int) -> bool:
    """Whether a picture of these sides can be a full panorama: twice as wide as high."""
    return abs(width / (2 * height) - 1) <= ASPECT_TOLERANCE


def useful_width(fov_deg: float, pixels: int) -> int:
    """Width of the panorama beyond which the middle of a view gains nothing, in pixels."""
    return math.ceil(OVERSAMPLING * 2 * math.pi * _focal(fov_deg, pixels))


def cut_view(panorama: Image.Image, heading_deg: float, fov_deg: float, pixels: int) -> Image.Image:
    """The square view of `pixels` a side whose middle looks `heading_deg` clockwise of the panorama's middle column.

    The camera is level and has the horizontal and vertical field of view `fov_deg` (below 180). A panorama much finer than
    the view is shrunk first against aliasing; pixels between its columns and rows are bilinear, and columns wrap.
    """
    width = useful_width(fov_deg, pixels)
    if panorama.width > width:
        panorama = panorama.resize((width, max(2, round(panorama.height * width / panorama.width))), Image.Resampling.BOX)
    source = np.asarray(panorama.convert("RGB"), dtype=np.float32)
    height, width, _ = source.shape
    column, row = view_positions(fov_deg, pixels, width, height)
    column = (column + heading_deg / 360 * width) % width
    left, top = np.floor(column).astype(np.intp), np.floor(row).astype(np.intp)
    right_weight, bottom_weight = (column - left)[..., None], (row - top)[..., None]
    left %= width  # a column a rounding error below the width is column 0
    right, bottom = (left + 1) % width, np.minimum(top + 1, height - 1)
    upper = source[top, left] * (1 - right_weight) + source[top, right] * right_weight
    lower = source[bottom, left] * (1 - right_weight) + source[bottom, right] * right_weight
    return Image.fromarray(np.rint(upper * (1 - bottom_weight) + lower * bottom_weight).astype(np.uint8))


@lru_cache(maxsize=8)
def view_positions(fov_deg: float, pixels: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
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
    """Focal length in pixels."""
    return pixels / 2 / math.tan(math.radians(fov_deg) / 2)


def looks_swapped(photos: Sequence[Photo], bounds: tuple[float, float, float, float]) -> bool:
    """Whether the table has latitude and longitude the wrong way round.

    `bounds` is what the street map covers, (west, south, east, north) in degrees. True when more than half of the photos lie
    outside of it and more than half lie inside once swapped. Single rows whose latitude is out of range are rejected by the
    reader; this is for cities where both numbers pass as a latitude.
    """
    if not photos:
        return False
    west, south, east, north = bounds
    lat, lon = np.array([(photo.lat, photo.lon) for photo in photos]).T

    def inside(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean((x >= west) & (x <= east) & (y >= south) & (y <= north)))

    return inside(lon, lat) < 0.5 < inside(lat, lon)
