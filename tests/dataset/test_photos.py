"""Photos of all formats, and views cut out of panoramas"""

import io
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from addressvlm import grafting
from addressvlm.dataset.photos import check_photo, cut_view, decode_photo, is_equirectangular, useful_width, view_positions
from addressvlm.image_decode_worker import decode_image


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


SHORT, LONG, BYTE, ASCII, TWO = (3, 1, 6), (4, 1, 6), (1, 1, 6), (2, 2, 0x36), (3, 2, 6)


def odd_exif(
    kind: int, count: int, value: int, first: bytes = b"", prefix: bytes = b"", tail: bytes = struct.pack("<2I", 6, 1)
) -> bytes:
    """An EXIF block, little-endian, with an orientation of any type after the 12 bytes of another entry."""
    entries = first + struct.pack("<HHII", 0x0112, kind, count, value)
    return prefix + b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries) // 12) + entries + bytes(4) + tail


@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        *((odd_exif(*entry), True) for entry in (SHORT, LONG, BYTE, ASCII, TWO)),
        (odd_exif(5, 1, 26), True),  # a rational of 6/1
        (odd_exif(*SHORT, prefix=b"Exif\0\0"), True),
        (odd_exif(*SHORT, first=struct.pack("<HHII", 0x011A, 2, 2, 0x31)), True),  # a resolution as text
        (odd_exif(*SHORT, first=struct.pack("<HHIf", 0x011A, 11, 1, math.nan)), True),
        (odd_exif(*SHORT, first=struct.pack("<HHIi", 0x0100, 9, 1, -1)), True),
        (odd_exif(*SHORT, first=struct.pack("<HHII", 0x010F, 2, 40, 900)), True),  # its text is cut off
        (odd_exif(*SHORT)[:22], False),
        (odd_exif(3, 1, 0), False),
        (odd_exif(3, 1, 9), False),
        (odd_exif(7, 4, 0x01020304), False),
        (b"Exif\0\0II+\0" + bytes(12), False),
        (b"Exif\0\0", False),
    ],
)
def test_odd_exif_never_loses_a_photo_in_jobs_or_service(tmp_path: Path, exif: bytes, turned: bool) -> None:
    data = encoded(exif=exif)
    (tmp_path / "photo.jpg").write_bytes(data)
    checked, served, located = check_photo(tmp_path / "photo.jpg", 1), decode_image(data, 1), decode_photo("p", 1, 336, data)
    assert isinstance(checked, bytes)
    assert isinstance(located, Image.Image)
    size = Image.open(io.BytesIO(checked)).size
    assert size == (served.width, served.height) == ((20, 40) if turned else (40, 20))
    assert size == located.size == grafting.decode_photo(data).size
    assert turned or checked == data


def test_pixels_of_other_depths_are_what_people_see_or_refused(tmp_path: Path) -> None:
    def check(pixels: np.ndarray, name: str) -> bytes | str:
        Image.fromarray(pixels).save(tmp_path / name)
        return check_photo(tmp_path / name, 1)

    grey = np.full((20, 40), 200, np.float64)
    for pixels, name in ((np.uint16(grey * 256), "a.png"), (np.uint16(grey * 256), "a.tif"), (np.int32(grey * 256), "i.tif")):
        checked = check(pixels, name)
        assert isinstance(checked, bytes)
        assert np.abs(np.asarray(Image.open(io.BytesIO(checked))).astype(int) - 200).max() < 3
    assert str(check(np.float32(grey), "f.tif")).endswith("f.tif has pixels that are floats: save it with 8 or 16 bits")
    assert str(check(np.int32(grey * 1e6), "i.tif")).endswith("i.tif has pixels of 32 bits: save it with 8 or 16")


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x18ftypheic", "HEIC, as phones write it"),
        (b"\0\0\0\x18ftypqt  ", "a film or"),
        (b"\n<!DOCTYPE html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
        (b"%PDF-1.7", "a PDF"),
        (b"neither", "not a picture in JPEG, PNG"),
    ],
)
def test_files_of_other_kinds_are_named(head: bytes, kind: str) -> None:
    assert str(decode_photo("x.jpg", 1, 336, head + bytes(99))).startswith(f"not a photo: x.jpg is {kind}")


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


# views of panoramas


def noise(width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (width // 2, width, 3), dtype=np.uint8))


def ramp(width: int) -> np.ndarray:
    """A panorama in which red tells the column and green the row, both as a share of 250."""
    column, row = np.meshgrid(np.arange(width) / width, np.arange(width // 2) / (width // 2))
    return np.stack([column * 250, row * 250, column * 0], axis=-1)


@given(st.floats(20, 140), st.integers(1, 200), st.integers(16, 2000))
@settings(max_examples=60, deadline=None)
def test_the_middle_of_a_view_is_the_middle_of_the_panorama(fov_deg: float, half: int, width: int) -> None:
    column, row = view_positions(fov_deg, 2 * half + 1, width, width // 2)
    assert column[half, half] == pytest.approx(width / 2 - 0.5, abs=1e-3)
    assert row[half, half] == pytest.approx(width // 2 / 2 - 0.5, abs=1e-3)


@given(st.floats(20, 140), st.integers(8, 300))
@settings(max_examples=60, deadline=None)
def test_the_edges_of_a_view_are_half_its_field_apart(fov_deg: float, pixels: int) -> None:
    width = 3600
    column, row = view_positions(fov_deg, pixels, width, width // 2)
    per_degree = width / 360
    focal = pixels / 2 / math.tan(math.radians(fov_deg / 2))
    last = math.degrees(math.atan((pixels / 2 - 0.5) / focal))  # of the outermost pixel's middle
    middle = pixels // 2
    right = (column[middle, -1] - (width / 2 - 0.5)) / per_degree
    assert right == pytest.approx(last, abs=0.01)
    assert column[middle, 0] - (width / 2 - 0.5) == pytest.approx(-right * per_degree, abs=0.05)
    if pixels % 2:
        assert ((width / 4 - 0.5) - row[0, middle]) / per_degree == pytest.approx(last, abs=0.01)
    assert row.min() >= 0
    assert row.max() <= width // 2 - 1


@given(st.integers(0, 63), st.sampled_from([60.0, 90.0, 120.0]))
@settings(max_examples=30, deadline=None)
def test_turning_the_heading_rolls_the_panorama(columns: int, fov_deg: float) -> None:
    panorama = noise(64)
    rolled = Image.fromarray(np.roll(np.asarray(panorama), -columns, axis=1))
    turned = cut_view(panorama, columns * 360 / 64, fov_deg, 24)
    straight = cut_view(rolled, 0, fov_deg, 24)
    assert np.abs(np.asarray(turned, int) - np.asarray(straight, int)).max() <= 1


def test_headings_are_cyclic_and_wrap_around_the_seam() -> None:
    panorama = noise(64)
    for heading in (-90.0, 0.0, 180.0):
        assert np.array_equal(cut_view(panorama, heading, 90, 16), cut_view(panorama, heading + 360, 90, 16))
    flat = np.full((32, 64, 3), 10, np.uint8)
    flat[:, :4] = flat[:, -4:] = 200  # a stripe behind the camera
    behind = np.asarray(cut_view(Image.fromarray(flat), 180, 90, 33))
    assert behind[16, 16].tolist() == [200] * 3
    assert np.array_equal(behind, behind[:, ::-1])


def test_golden_view_of_a_ramp() -> None:
    view = np.asarray(cut_view(Image.fromarray(ramp(360).astype(np.uint8)), 60, 90, 5)).astype(int)
    degrees = [math.degrees(math.atan(x / 2.5)) for x in (-2, -1, 0, 1, 2)]
    assert view[2, :, 0].tolist() == pytest.approx([(180 + 60 + d - 0.5) / 360 * 250 for d in degrees], abs=1.2)
    assert view[:, 2, 1].tolist() == pytest.approx([(90 + d - 0.5) / 180 * 250 for d in degrees], abs=1.2)
    corner = math.degrees(math.atan(2 / math.hypot(2, 2.5)))  # lines of equal height bend towards the horizon
    assert view[0, 0, 1] == pytest.approx((90 - corner - 0.5) / 180 * 250, abs=1.2)


def test_a_fine_panorama_is_shrunk_before_it_is_sampled() -> None:
    checked = np.indices((512, 1024)).sum(axis=0) % 2 * 255
    panorama = Image.fromarray(np.repeat(checked[..., None], 3, axis=2).astype(np.uint8))
    assert panorama.width > 2 * useful_width(90, 64)
    assert np.abs(np.asarray(cut_view(panorama, 10, 90, 64), int) - 127.5).max() < 20  # picked out, pixels are 127.5 off


@pytest.mark.parametrize(
    ("size", "expected"),
    [((4096, 2048), True), ((4000, 2001), True), ((3328, 512), False), ((4000, 3000), False), ((2048, 4096), False)],
)
def test_only_two_to_one_is_a_panorama(size: tuple[int, int], expected: bool) -> None:
    assert is_equirectangular(*size) is expected


def test_a_photo_checked_as_a_panorama_gives_its_view(tmp_path: Path) -> None:
    path = tmp_path / "round.png"
    panorama = Image.fromarray(ramp(128).astype(np.uint8))
    panorama.save(path)
    data = check_photo(path, 1, view=45.0, fov_deg=90.0, pixels=32)
    assert isinstance(data, bytes)
    with Image.open(io.BytesIO(data)) as view:
        assert (view.format, view.size, view.mode) == ("JPEG", (32, 32), "RGB")
        difference = np.asarray(view, int) - np.asarray(cut_view(panorama, 45, 90, 32), int)
    assert np.abs(difference).max() <= 8  # the loss of one JPEG
    assert check_photo(path, 1, view=135.0, fov_deg=90.0, pixels=32) != data


def test_a_scaled_jpeg_shows_the_same_as_a_whole_one(tmp_path: Path) -> None:
    smooth = Image.fromarray(ramp(2048).astype(np.uint8))
    smooth.save(tmp_path / "round.jpg", quality=95)
    data = check_photo(tmp_path / "round.jpg", 10, view=30.0, fov_deg=90.0, pixels=64)
    assert isinstance(data, bytes)
    with Image.open(io.BytesIO(data)) as view:
        difference = np.asarray(view, int) - np.asarray(cut_view(smooth, 30, 90, 64), int)
    assert np.abs(difference).max() <= 8


@pytest.mark.parametrize(("size", "reason"), [((96, 64), "not a panorama: "), ((40, 8), "photo too small: ")])
def test_a_photo_of_another_shape_is_no_panorama(tmp_path: Path, size: tuple[int, int], reason: str) -> None:
    path = tmp_path / "flat.jpg"
    Image.new("RGB", size).save(path)
    answer = check_photo(path, 1, view=0.0, fov_deg=90.0, pixels=32)
    assert isinstance(answer, str)
    assert answer.startswith(reason)
    assert f"{size[0]}x{size[1]}" in answer


def test_a_damaged_panorama_has_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "round.jpg"
    noise(512).save(path)
    path.write_bytes(path.read_bytes()[:20_000])
    answer = check_photo(path, 1, view=0.0, fov_deg=90.0, pixels=32)
    assert isinstance(answer, str)
    assert answer.startswith("photo damaged: ")


def test_a_photo_for_a_model_is_decoded_at_the_scale_that_it_needs(tmp_path):
    path = tmp_path / "large.jpg"
    photo = Image.radial_gradient("L").resize((1600, 1200)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(path, exif=exif)
    full, small = decode_photo(path, 10, 1000), decode_photo(path, 10, 150)
    assert (full.size, small.size) == ((1200, 1600), (300, 400))
    difference = np.abs(np.asarray(full.resize(small.size), float) - np.asarray(small, float))
    assert difference.mean() < 3
    assert decode_photo(path, 1, 150) == check_photo(path, 1)
    for wrong in (b"", b"<html>", path.read_bytes()[:900]):
        path.write_bytes(wrong)
        reason = decode_photo(path, 10, 150)
        assert isinstance(reason, str)
        assert decode_photo(path, 10, 150, wrong) == reason
        assert reason.partition(":")[0] == check_photo(path, 10).partition(":")[0]
    assert decode_photo(tmp_path / "none.jpg", 10, 150) == check_photo(tmp_path / "none.jpg", 10)
