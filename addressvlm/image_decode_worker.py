"""Decodes untrusted photos: file bytes in, upright RGB pixels out, or a sentence that says why not.

`python -m addressvlm.image_decode_worker` does so in a process with limited CPU time and memory. For each photo it reads a
line of JSON {"bytes", "max_megapixels", "side", "cpu_s"} and the file's bytes from standard input, and writes a line
{"width", "height"} and the RGB bytes, or a line {"refused"}.
"""

import json
import resource
import sys
import time
from io import BytesIO
from typing import NamedTuple

from PIL import Image

from addressvlm.errors import InputError
from addressvlm.pictures import name_of_kind, to_rgb, upright

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_SIDE = 2048  # pixels; no model here reads more
MIN_SIDE = 16
MEMORY = 1 << 30  # bytes for decoding, on top of what the process has


class DecodedImage(NamedTuple):
    """A photo as RGB bytes, row-major height x width x 3."""

    width: int
    height: int
    rgb: bytes


def limit_resources(cpu_s: int, memory: int = MEMORY) -> None:
    """Limit this process, from now on, to `cpu_s` seconds of CPU time (then the kernel ends it) and to `memory` more bytes."""
    used = int(time.process_time()) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (used + cpu_s, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        with open("/proc/self/statm") as sizes:
            used_memory = int(sizes.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used_memory + memory, resource.RLIM_INFINITY))


def decode_image(data: bytes, max_megapixels: float, side: int = MAX_SIDE) -> DecodedImage:
    """Decode a JPEG, PNG or WebP and rotate it as its EXIF says.

    Args:
        max_megapixels: of the file, checked before decoding.
        side: pixels of the model's input. The photo is shrunk so that its shorter side is at most twice as long and its
            longer side at most MAX_SIDE; JPEG does so while decoding.

    Raises:
        InputError: the file is empty, of another kind, damaged, an animation, too small, or has too many pixels.
    """
    if not data:
        raise InputError("The image is empty (0 bytes): send a JPEG, PNG or WebP photo.")
    image = _open(data, max_megapixels)
    try:
        image.draft(None, _shrunk_size(image.size, side))
        image.load()
        image = to_rgb(upright(image))
    except Exception:
        raise InputError("The image is damaged or cut off: send the whole file again.") from None
    size = _shrunk_size(image.size, side)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return DecodedImage(image.width, image.height, image.tobytes())


def _open(data: bytes, max_megapixels: float) -> Image.Image:
    """Read and check the header, without decoding."""
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        frames = getattr(image, "n_frames", 1) if image.format in ("PNG", "WEBP") else 1  # a phone's JPEG may hold several
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"The image has too many pixels, at most {max_megapixels:g} megapixels: send it smaller.") from None
    except Exception:  # what Pillow raises for damaged files is of every kind
        if kind := name_of_kind(data[:64]):
            raise InputError(f"This is {kind}.") from None
        raise InputError("This is not a JPEG, PNG or WebP image: send the photo in one of these formats.") from None
    megapixels = image.width * image.height / 1e6
    if megapixels > max_megapixels:
        raise InputError(
            f"The image is {image.width} x {image.height} pixels ({megapixels:.0f} megapixels), "
            f"at most {max_megapixels:g} are accepted: send it smaller."
        )
    if min(image.size) < MIN_SIDE:
        raise InputError(
            f"The image is {image.width} x {image.height} pixels: each side needs at least {MIN_SIDE} to show a street."
        )
    if frames > 1:
        raise InputError(f"The image is an animation of {frames} frames: send one still photo.")
    return image


def _shrunk_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = min(1.0, 2 * side / min(size), MAX_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def main() -> None:
    """Decode photos until the input ends."""
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    while line := stdin.readline():
        request = json.loads(line)
        data = stdin.read(request["bytes"])
        limit_resources(request["cpu_s"])
        try:
            width, height, rgb = decode_image(data, request["max_megapixels"], request["side"])
            stdout.write(json.dumps({"width": width, "height": height}).encode() + b"\n" + rgb)
        except InputError as error:
            stdout.write(json.dumps({"refused": str(error)}).encode() + b"\n")
        stdout.flush()


if __name__ == "__main__":
    main()
