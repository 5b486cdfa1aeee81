"""Encoded pictures as people see them, the same in the jobs and in the service: upright, 8 bits a channel, opaque, RGB."""

import struct
import warnings
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import ExifTags, Image

# Odd EXIF is read as far as it goes, and sizes are checked by limits of our own.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
ORIENTATION = ExifTags.Base.Orientation
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class PixelDepthError(ValueError):
    """Nobody can know which of the numbers is white."""


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 where there is none that can be read, however odd the rest of the EXIF is."""
    value: Any = None
    with suppress(Exception):  # Pillow raises errors of every kind on damaged EXIF
        value = image.getexif().get(ORIENTATION)
    if value is None:
        with suppress(struct.error):
            value = _scan_exif(image.info.get("exif", b""))
    if isinstance(value, tuple):
        value = value[0] if value else None
    if isinstance(value, bytes):
        value = value[0] if len(value) == 1 and value[0] in _TURNS else value.decode("ascii", "replace")
    with suppress(TypeError, ValueError, OverflowError, ZeroDivisionError):
        return int(value) if int(value) in _TURNS else 1
    return 1


def _scan_exif(exif: bytes) -> int | None:
    """The orientation in the first directory of an EXIF block; Pillow gives up at the first entry that is cut off."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    (entries,) = struct.unpack_from(f"{order}H", exif, start)
    for entry in range(start + 2, start + 2 + 12 * entries, 12):
        tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
        if tag == ORIENTATION:
            return int(struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", exif, entry + 8)[0])
    return None


def upright(image: Image.Image) -> Image.Image:
    """The picture turned by its EXIF orientation."""
    turn = _TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB: 16-bit grey is scaled, what is transparent is white.

    Raises:
        PixelDepthError: its pixels are floats, or integers that 16 bits don't hold.
    """
    image.load()
    if image.mode.startswith("I"):
        grey = image.convert("I")
        values = np.asarray(grey)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise PixelDepthError("pixels of 32 bits: save it with 8 or 16")
        image = grey.point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode == "F":
        raise PixelDepthError("pixels that are floats: save it with 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image if image.mode == "RGB" else image.convert("RGB")


def name_of_kind(head: bytes) -> str:
    """What a file that can't be opened is, and the remedy, from its first bytes; "" if that is unknown."""
    if head[4:8] == b"ftyp":
        if head[8:12] in _HEIF_BRANDS:
            return "HEIC, as phones write it: convert it to JPEG (heif-convert; on the phone: Most Compatible)"
        return "a film or a camera's raw file: save its pictures as JPEG"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS: run git lfs pull"
    if head.startswith(b"%PDF"):
        return "a PDF: save its pictures as JPEG"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "a web page or XML: its download went wrong"
    return ""
