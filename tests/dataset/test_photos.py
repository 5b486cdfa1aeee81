"""Photos as they come"""

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from addressvlm.dataset.photos import check_photo


def encoded(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 20), **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_good_photo_keeps_its_bytes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo"
    path.write_bytes(encoded(kind))
    assert check_photo(path, 1) == path.read_bytes()


@pytest.mark.parametrize(("kind", "mode"), [("BMP", "RGB"), ("TIFF", "RGB"), ("GIF", "P"), ("JPEG", "CMYK"), ("PNG", "RGBA")])
def test_other_formats_become_rgb_jpeg(tmp_path: Path, kind: str, mode: str) -> None:
    path = tmp_path / "photo"
    path.write_bytes(encoded(kind, mode))
    data = check_photo(path, 1)
    assert isinstance(data, bytes)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 20))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(exif=exif))
    data = check_photo(path, 1)
    assert isinstance(data, bytes)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (20, 40)
        assert image.getexif().get(0x0112, 1) == 1


def test_a_turned_photo_is_upright_and_what_is_transparent_is_white(tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (40, 20), "white"), Image.Exif()
    image.paste((255, 0, 0), (0, 0, 20, 10))  # red upper left: upper right after a quarter turn to the right
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    clear = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 20, 20))
    clear.save(tmp_path / "clear.png")
    Image.fromarray(np.full((20, 40), 200 * 256, np.uint16)).save(tmp_path / "deep.png")
    turned, opaque, deep = (
        np.asarray(Image.open(io.BytesIO(check_photo(tmp_path / name, 1)))).astype(int)  # type: ignore[arg-type]
        for name in ("turned.jpg", "clear.png", "deep.png")
    )
    assert [turned[y, x, 1] > 128 for y, x in ((8, 4), (8, 16), (32, 4), (32, 16))] == [True, False, True, True]
    assert abs(opaque[10, 5] - 255).max() < 9
    assert abs(opaque[10, 35] - (255, 0, 0)).max() < 9
    assert abs(deep - 200).max() < 3


@pytest.mark.parametrize(("size", "good"), [((1000, 1000), True), ((1001, 1000), False), ((16, 40), True), ((40, 15), False)])
def test_the_limits_of_a_photo_s_size(tmp_path: Path, size: tuple[int, int], good: bool) -> None:
    (tmp_path / "photo.png").write_bytes(encoded("PNG", size=size))
    assert isinstance(check_photo(tmp_path / "photo.png", 1), bytes) is good


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "photo missing"),
        (b"", "photo empty"),
        (b"GIF89a, or so it says", "not a photo"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", "not a photo"),
        (encoded(size=(200, 100))[:5000], "photo damaged"),
        (encoded("PNG")[:500], "photo damaged"),
        (encoded(size=(2000, 1000)), "photo too large"),
        (encoded(size=(900, 1)), "photo too small"),
    ],
)
def test_a_bad_photo_has_a_reason(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "photo.jpg"
    if content is not None:
        path.write_bytes(content)
    answer = check_photo(path, 1)
    assert isinstance(answer, str)
    assert answer.startswith(f"{reason}: ")
    assert "photo.jpg" in answer


@pytest.mark.parametrize("side", [14_143, 30_000])  # 200 megapixels, and more than Pillow opens
def test_a_huge_photo_is_refused_unread(tmp_path: Path, side: int) -> None:
    path = tmp_path / "photo.png"
    header = encoded("PNG")
    path.write_bytes(
        header[:16] + side.to_bytes(4, "big") * 2 + header[24:29] + _crc(header[12:16], side, header[24:29]) + header[33:]
    )
    answer = check_photo(path, 100)
    assert isinstance(answer, str)
    assert answer.startswith("photo too large: ")


def _crc(kind: bytes, side: int, rest: bytes) -> bytes:
    return zlib.crc32(kind + side.to_bytes(4, "big") * 2 + rest).to_bytes(4, "big")


def test_a_photo_at_an_address(tmp_path: Path) -> None:
    path = tmp_path / "a photo.jpg"
    path.write_bytes(encoded())
    assert check_photo(path.as_uri(), 1) == path.read_bytes()
    assert str(check_photo("nowhere://bucket/photo.jpg", 1)).startswith("photo unreadable: ")
