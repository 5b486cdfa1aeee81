"""Every decoder's nightmare, and photos that only look like one."""

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image

from tests.support.running_service import photo


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(width: int, height: int, depth: int = 8) -> bytes:
    """A PNG of a few dozen bytes that says it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


RED = Image.new("RGB", (60, 40), (200, 30, 30))
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
ANIMATION = {"save_all": True, "append_images": [Image.new("RGB", (60, 40), "blue")]}
TURNED = Image.Exif()
TURNED[0x0112] = 6  # shot with the camera turned

BAD = {
    "empty": (b"", "0 bytes"),
    "cut off": (photo()[: len(photo()) // 2], "damaged or cut off"),
    "cut off in the header": (photo()[:40], "not a JPEG, PNG or WebP"),
    "text": (b"just some text", "not a JPEG, PNG or WebP"),
    "html": (b"<!doctype html><script>alert(1)</script>", "a web page or XML"),
    "svg": (SVG, "a web page or XML"),
    "gif": (encoded(RED, "GIF"), "not a JPEG, PNG or WebP"),
    "tiff": (encoded(RED, "TIFF"), "not a JPEG, PNG or WebP"),
    "animated png": (encoded(RED, "PNG", **ANIMATION), "animation of 2 frames"),
    "animated webp": (encoded(RED, "WEBP", **ANIMATION), "animation of 2 frames"),
    "too large": (png(3000, 2000), "at most 4 are accepted"),
    "bomb": (png(60000, 60000), "at most 4"),
    "one pixel": (encoded(Image.new("RGB", (1, 1)), "PNG"), "at least 16"),
    "a line": (encoded(Image.new("L", (20000, 1)), "PNG"), "at least 16"),
    "no data": (png(64, 64), "damaged or cut off"),
}
GOOD = {  # what is in it, and the colour of its middle
    "cmyk": (encoded(RED.convert("CMYK"), "JPEG"), (200, 30, 30)),
    "grey": (encoded(RED.convert("L"), "JPEG"), (81, 81, 81)),
    "16 bit": (encoded(Image.fromarray(np.full((40, 60), 40000, np.uint16)), "PNG"), (156, 156, 156)),
    "palette": (encoded(Image.new("P", (60, 40), 0), "PNG"), (0, 0, 0)),
    "transparent": (encoded(Image.new("RGBA", (60, 40), (0, 0, 0, 0)), "PNG"), (255, 255, 255)),
    "one bit": (encoded(Image.new("1", (60, 40), 1), "PNG"), (255, 255, 255)),
    "webp": (encoded(RED, "WEBP", lossless=True), (200, 30, 30)),
    "two pictures of a phone": (encoded(RED, "MPO", **ANIMATION), (200, 30, 30)),
    "turned": (encoded(RED, "JPEG", exif=TURNED), (200, 30, 30)),
    "broken exif": (encoded(RED, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"), (200, 30, 30)),
}
