"""Photos from strangers: bytes in, an upright RGB image of bounded size out, or a sentence that says why not."""

import base64
import binascii
import re
import struct
from io import BytesIO

from PIL import Image, ImageOps

from addressvlm import InputError

FORMATS = ("JPEG", "PNG", "WEBP")
LONGEST_SIDE = 2048  # more detail than any model here looks at; bounds what travels to the model
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error, MemoryError)
_DATA_URL = re.compile(r"data:[^,;]*(?:;[^,;]*)*?;base64,", re.IGNORECASE)


def decode_image(data: bytes, max_megapixels: float) -> Image.Image:
    """Decode a JPEG, PNG or WebP, turned as its EXIF says, its longer side at most LONGEST_SIDE pixels.

    Raises:
        InputError: it is empty, another kind of file, damaged, or has more pixels than allowed.
    """
    if not data:
        raise InputError("The image is empty (0 bytes): send a JPEG, PNG or WebP photo.")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"The image has too many pixels, at most {max_megapixels:g} megapixels: send it smaller.") from None
    except _BROKEN:
        raise InputError("This is not a JPEG, PNG or WebP image: send the photo in one of these formats.") from None
    megapixels = image.width * image.height / 1e6
    if megapixels > max_megapixels:
        raise InputError(
            f"The image is {image.width} x {image.height} pixels ({megapixels:.0f} megapixels), "
            f"at most {max_megapixels:g} are accepted: send it smaller."
        )
    try:
        image.draft("RGB", (LONGEST_SIDE, LONGEST_SIDE))  # a JPEG is decoded no larger than needed
        image.load()
    except _BROKEN:
        raise InputError("The image is damaged or cut off: send the whole file again.") from None
    image = _upright(image).convert("RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Turn as EXIF says; broken EXIF is as good as none."""
    try:
        return ImageOps.exif_transpose(image)
    except _BROKEN:
        return image


def bytes_of(text: str) -> bytes:
    """The bytes of an image given as base64 or as a data URL.

    Raises:
        InputError: it is a web address, which is never fetched, or not base64.
    """
    if re.match(r"\s*(https?|ftp|file):", text[:64], re.IGNORECASE):
        raise InputError(
            "Images are not fetched from web addresses: send the image itself as a data URL (data:image/jpeg;base64,…)."
        )
    header = _DATA_URL.match(text[:256])
    if header is None and text[:5].lower() == "data:":
        raise InputError("The data URL is not base64: write it as data:image/jpeg;base64,….")
    try:
        return base64.b64decode(re.sub(r"\s+", "", text[header.end() if header else 0 :]), validate=True)
    except (binascii.Error, ValueError):
        raise InputError("The image is not valid base64: encode the file's bytes, with the padding.") from None
