"""Is this file a photo that everything downstream can decode, and which bytes of it are kept."""

import io
import warnings
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps

from addressvlm.cities import storage
from addressvlm.cities.panorama import cut, is_equirectangular, useful_width
from addressvlm.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")  # none that runs programs
KEPT = ("JPEG", "MPO", "PNG", "WEBP")  # an MPO begins with a plain JPEG
ORIENTATION = 0x0112
SMALLEST_SIDE = 16
QUALITY = 95


def check_photo(
    path: Path | str, max_megapixels: float, view: float | None = None, fov_deg: float | None = None, pixels: int | None = None
) -> bytes | str:
    """The encoded photo, or the reason why it can't be used (what stands before the colon is its kind).

    `path` may be a URI as text. The size is checked before anything is decoded, then the whole picture is decoded once.
    Bytes stay as they are unless the picture must be turned by its EXIF orientation, has another format than JPEG, PNG or
    WebP, or other channels than grey or RGB; then they are a new JPEG. With `view` the file is a panorama, and the answer
    is the square JPEG of `pixels` a side that looks `view` degrees clockwise of its middle and is `fov_deg` wide.
    """
    try:
        data = storage.read_bytes(str(path))
    except FileNotFoundError:
        return f"photo missing: no file {path}"
    except OSError as error:
        return f"photo unreadable: {path} ({storage.said(error)})"
    except (ValueError, InputError) as error:
        return f"photo unreadable: {str(path)!r} ({error})"
    return check_bytes(data, str(path), max_megapixels, view, fov_deg, pixels)


def check_bytes(
    data: bytes,
    path: str,
    max_megapixels: float,
    view: float | None = None,
    fov_deg: float | None = None,
    pixels: int | None = None,
) -> bytes | str:
    """The same of a photo that was read already; `path` is what to call it."""
    if not data:
        return f"photo empty: {path} has zero bytes"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError:
        return f"photo too large: {path} has more than {max_megapixels:g} megapixels"
    except Exception:  # decoders raise anything on arbitrary bytes
        return f"not a photo: {path} is not a picture in {', '.join(FORMATS)}"
    with image:
        width, height = image.size
        if width * height > max_megapixels * 1e6:
            return f"photo too large: {path} has {width * height / 1e6:.0f} megapixels, the limit is {max_megapixels:g}"
        if min(width, height) < SMALLEST_SIDE:
            return f"photo too small: {path} is {width}x{height} pixels, both sides must be {SMALLEST_SIDE} at least"
        try:
            if view is not None and fov_deg is not None and pixels is not None:
                return _view(image, path, view, fov_deg, pixels)
            image.load()
            if image.format in KEPT and image.mode in ("RGB", "L") and image.getexif().get(ORIENTATION, 1) == 1:
                return data
            return _encoded(_upright(image))
        except Exception as error:  # decoders raise anything on arbitrary bytes
            return f"photo damaged: {path} ends early or is corrupt ({error})"


@lru_cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow has a decoder for."""
    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)


def _view(image: Image.Image, path: str, view: float, fov_deg: float, pixels: int) -> bytes | str:
    """One view of a panorama, decoded at the coarsest scale that still holds all of its detail."""
    width, height = image.size if image.getexif().get(ORIENTATION, 1) < 5 else image.size[::-1]
    if not is_equirectangular(width, height):
        return f"not a panorama: {path} is {width}x{height} pixels, an equirectangular one is twice as wide as high"
    needed = useful_width(fov_deg, pixels)
    image.draft("RGB", (needed, needed // 2))
    return _encoded(cut(_upright(image), view, fov_deg, pixels))


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says, opaque on white, in RGB."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        upright = upright.point(lambda value: value / 256, "L")
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.new("RGB", layer.size, "white")
        upright.paste(layer, mask=layer.getchannel("A"))
    return upright.convert("RGB")


def _encoded(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
