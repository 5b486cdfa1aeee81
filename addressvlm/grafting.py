"""Graft a street-view photo onto a map tile (paper 001, equation 3): I = M * tile + (1 - M) * photo.

M is 0 in a rectangle in the upper right corner, where the shrunken photo goes, and 1 elsewhere.

    graft_photo(tile, photo_jpeg, delta=0.5, quality=92)

Photos are decoded no larger than needed: a JPEG at 1/2, 1/4 or 1/8 of its size, by scaling its cosine transform.
"""

import io
import math
from typing import Any

from PIL import Image, UnidentifiedImageError

from addressvlm.errors import InputError
from addressvlm.pictures import to_rgb, upright

FILTER = Image.Resampling.HAMMING  # at these sizes as good as LANCZOS and BICUBIC, in about half the time
HALF = 0.5  # of the width, for each of two images side by side
DISPLAY_QUALITY = 92  # of a JPEG that is only displayed


def graft_photo(tile: Image.Image, photo: bytes, delta: float, quality: int) -> tuple[bytes, Image.Image]:
    """Graft an encoded photo onto a tile: the grafted image as JPEG bytes, and the photo, decoded at a reduced size.

    Args:
        tile: square RGB image; it is not changed.
        delta: longer side of the pasted photo / side of the tile, in (0, 1); 0: the two side by side.

    Raises:
        InputError: the photo can't be decoded.
    """
    small = decode_photo(photo, round((delta or HALF) * tile.width))
    return encode_jpeg(graft(tile, small, delta) if delta else side_by_side(tile, small), quality), small


def encode_pair(tile: Image.Image, photo: bytes, quality: int) -> tuple[bytes, bytes, Image.Image]:
    """JPEG bytes of the photo, no larger than the tile, and of the tile; and the decoded photo.

    Raises:
        InputError: the photo can't be decoded.
    """
    decoded = decode_photo(photo, tile.width)
    small = decoded.copy()
    small.thumbnail(tile.size, FILTER, reducing_gap=3.0)
    return encode_jpeg(small, quality), encode_jpeg(tile, quality), decoded


def display_image(row: dict[str, Any]) -> bytes:
    """The image that people and labelers see of a row of GRAFTS or ALIGNMENT, encoded.

    This is the row's image; if the tile is an image of its own, the tile on the left and the photo on the right.

    Raises:
        InputError: one of the two can't be decoded.
    """
    if not row.get("tile"):
        data: bytes = row["image"]["bytes"]
        return data
    images = [decode_photo(row[column]["bytes"]) for column in ("tile", "image")]
    both = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        both.paste(image, (left, (both.height - image.height) // 2))
        left += image.width
    return encode_jpeg(both, DISPLAY_QUALITY)


def graft(tile: Image.Image, photo: Image.Image, delta: float) -> Image.Image:
    """A new RGB image of the tile's size with the photo in its upper right corner.

    Args:
        tile: square RGB image.
        photo: image of any size.
        delta: longer side of the pasted photo / side of the tile, in (0, 1); the paper tries up to 0.7.
    """
    size = pasted_size(photo.size, tile.width, delta)
    grafted = tile.convert("RGB")
    rgb = photo if photo.mode == "RGB" else photo.convert("RGB")
    grafted.paste(rgb.resize(size, FILTER, reducing_gap=3.0), (tile.width - size[0], 0))
    return grafted


def side_by_side(tile: Image.Image, photo: Image.Image) -> Image.Image:
    """A new RGB image of the tile's size: left the tile, right the photo, each shrunk to half the width, on black."""
    half = round(HALF * tile.width)
    both = Image.new("RGB", tile.size)
    for left, image in ((0, tile), (half, photo)):
        size = pasted_size(image.size, tile.width, HALF)
        small = image.convert("RGB").resize(size, FILTER, reducing_gap=3.0)
        both.paste(small, (left + (half - size[0]) // 2, (tile.height - size[1]) // 2))
    return both


def pasted_size(photo: tuple[int, int], side: int, delta: float) -> tuple[int, int]:
    """Width and height of the pasted photo: longer side delta * side, aspect ratio kept, at least one pixel.

    Raises:
        ValueError: delta is not in (0, 1).
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}, it must be in (0, 1)")
    longest = max(photo)
    target = max(1, round(delta * side))
    width, height = (max(1, round(length * target / longest)) for length in photo)
    return width, height


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """JPEG bytes of an RGB image."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)  # full colour resolution keeps street names crisp
    return buffer.getvalue()


def decode_photo(data: bytes, longest_side: float = math.inf) -> Image.Image:
    """Upright RGB photo from encoded bytes, its longer side at least `longest_side` if the file has as many pixels.

    A JPEG is decoded at 1/2, 1/4 or 1/8 scale where that is enough.

    Raises:
        InputError: the bytes are not a complete image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            scale = longest_side / max(image.size)
            if scale < 1:
                image.draft("RGB", (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
            return to_rgb(upright(image))
    except UnidentifiedImageError:
        raise InputError("the photo can't be decoded (it is not an image).") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"the photo can't be decoded ({' '.join(str(error).split())}).") from None
