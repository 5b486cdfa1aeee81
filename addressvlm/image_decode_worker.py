"""Photos from strangers: bytes in, the pixels of one upright photo out, or a sentence that says why not.

`python -m addressvlm.image_decode_worker` decodes in a process of its own, which the kernel ends when a photo costs too much. For each
photo it reads a line of JSON {"bytes", "max_megapixels", "side", "cpu_s"} and the bytes from standard input, and writes a
line {"width", "height"} and the RGB bytes, or a line {"refused"}.
"""

import json
import resource
import sys
import time
from io import BytesIO
from typing import NamedTuple

from PIL import Image, ImageOps

from addressvlm.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP")
LONGEST_SIDE = 2048  # more detail than any model here looks at
SHORTEST_SIDE = 16  # less is no photo
MEMORY = 1 << 30  # bytes that decoding may take on top of what the process has


class DecodedImage(NamedTuple):
    """A photo as RGB bytes, row by row, height x width x 3."""

    width: int
    height: int
    rgb: bytes


def limit_resources(cpu_s: int, memory: int = MEMORY) -> None:
    """From here on the kernel ends this process after `cpu_s` more seconds of its CPU time, and refuses it more memory."""
    used = int(time.process_time()) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (used + cpu_s, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        with open("/proc/self/statm") as sizes:
            held = int(sizes.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + memory, resource.RLIM_INFINITY))


def decode_image(data: bytes, max_megapixels: float, side: int = LONGEST_SIDE) -> DecodedImage:
    """Decode a JPEG, PNG or WebP, turned as its EXIF says and without EXIF.

    Args:
        side: pixels of the model's input. A shorter side of more than twice as many is brought down to that, already
            while decoding where the format can; the longer one is at most LONGEST_SIDE.

    Raises:
        InputError: it is empty, another kind of file, damaged, an animation, too small, or has more pixels than allowed.
    """
    if not data:
        raise InputError("The image is empty (0 bytes): send a JPEG, PNG or WebP photo.")
    image = _open(data, max_megapixels)
    scale = _scale(image.size, side)
    try:
        image.draft(None, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        image.load()
        image = _eight_bits(_upright(image))
    except Exception:
        raise InputError("The image is damaged or cut off: send the whole file again.") from None
    scale = _scale(image.size, side)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return DecodedImage(image.width, image.height, image.tobytes())


def _open(data: bytes, max_megapixels: float) -> Image.Image:
    """The image with its header read and judged, nothing decoded."""
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        frames = getattr(image, "n_frames", 1) if image.format in ("PNG", "WEBP") else 1  # a phone's JPEG may hold several
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"The image has too many pixels, at most {max_megapixels:g} megapixels: send it smaller.") from None
    except Exception:  # what Pillow raises for damaged files is of every kind
        raise InputError("This is not a JPEG, PNG or WebP image: send the photo in one of these formats.") from None
    megapixels = image.width * image.height / 1e6
    if megapixels > max_megapixels:
        raise InputError(
            f"The image is {image.width} x {image.height} pixels ({megapixels:.0f} megapixels), "
            f"at most {max_megapixels:g} are accepted: send it smaller."
        )
    if min(image.size) < SHORTEST_SIDE:
        raise InputError(
            f"The image is {image.width} x {image.height} pixels: each side needs at least {SHORTEST_SIDE} to show a street."
        )
    if frames > 1:
        raise InputError(f"The image is an animation of {frames} frames: send one still photo.")
    return image


def _scale(size: tuple[int, int], side: int) -> float:
    return min(1.0, 2 * side / min(size), LONGEST_SIDE / max(size))


def _eight_bits(image: Image.Image) -> Image.Image:
    """As RGB: 16-bit grey is scaled, not cut off, and what is transparent is white."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turn as EXIF says; broken EXIF is as good as none."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def main() -> None:
    """Decode what comes in until the input ends."""
    source, out = sys.stdin.buffer, sys.stdout.buffer
    while line := source.readline():
        asked = json.loads(line)
        data = source.read(asked["bytes"])
        limit_resources(asked["cpu_s"])
        try:
            width, height, rgb = decode_image(data, asked["max_megapixels"], asked["side"])
            out.write(json.dumps({"width": width, "height": height}).encode() + b"\n" + rgb)
        except InputError as error:
            out.write(json.dumps({"refused": str(error)}).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
