import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from addressvlm import InputError
from addressvlm.grafting import decode_photo, encode_jpeg, encode_pair, graft, graft_photo, pasted_size, side_by_side

SIDES = st.integers(1, 400)


@settings(deadline=None, max_examples=60)
@given(width=SIDES, height=SIDES, side=st.integers(32, 200), delta=st.floats(0.05, 0.9))
def test_only_the_upper_right_corner_changes(width: int, height: int, side: int, delta: float) -> None:
    tile, photo = Image.new("RGB", (side, side), (10, 20, 30)), Image.new("RGB", (width, height), (200, 100, 0))
    grafted = np.asarray(graft(tile, photo, delta))
    w, h = pasted_size((width, height), side, delta)
    assert max(w, h) == round(delta * side)
    inside = np.zeros((side, side), bool)
    inside[:h, side - w :] = True
    assert (grafted[inside] == (200, 100, 0)).all()
    assert (grafted[~inside] == (10, 20, 30)).all()
    assert tile.getpixel((side - 1, 0)) == (10, 20, 30)  # the tile itself stays as it was


@given(width=SIDES, height=SIDES)
def test_aspect_is_kept(width: int, height: int) -> None:
    w, h = pasted_size((width, height), 336, 0.5)
    scale = 168 / max(width, height)
    assert abs(w - width * scale) <= 0.5 or w == 1
    assert abs(h - height * scale) <= 0.5 or h == 1


@pytest.mark.parametrize("delta", [0.0, -0.1, 1.0, 1.5])
def test_delta_outside_its_range(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        graft(Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8)), delta)


def test_golden_image() -> None:
    """A 4x4 tile with a 4x2 photo of two colours at delta 0.5: the photo is 2x1 pixels."""
    tile = Image.new("RGB", (4, 4), (0, 0, 255))
    photo = Image.new("RGB", (40, 20), (255, 0, 0))
    photo.paste((0, 255, 0), (20, 0, 40, 20))
    b, r, g = (0, 0, 255), (255, 0, 0), (0, 255, 0)
    rows = np.asarray(graft(tile, photo, 0.5)).astype(int)
    golden = np.array([[b, b, r, g], [b, b, b, b], [b, b, b, b], [b, b, b, b]])
    assert abs(rows - golden).max() <= 40  # LANCZOS bleeds a little over the edge between red and green
    assert (rows[1:] == golden[1:]).all()


def test_side_by_side_shows_both_images() -> None:
    tile, photo = Image.new("RGB", (40, 40), (0, 0, 255)), Image.new("RGB", (200, 100), (255, 0, 0))
    pixels = np.asarray(side_by_side(tile, photo))
    golden = np.zeros((40, 40, 3), np.uint8)
    golden[10:30, :20], golden[15:25, 20:] = (0, 0, 255), (255, 0, 0)
    assert (pixels == golden).all()
    encoded_photo = picture((200, 100), "PNG")
    assert Image.open(io.BytesIO(graft_photo(tile, encoded_photo, 0, 92)[0])).size == (40, 40)


def picture(size: tuple[int, int], form: str = "JPEG", **options: object) -> bytes:
    image = Image.new("RGB", size, (255, 255, 255))
    image.paste((255, 0, 0), (0, 0, size[0] // 2, size[1] // 2))  # red upper left
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_large_jpegs_are_decoded_small_but_large_enough() -> None:
    photo = decode_photo(picture((2048, 1024)), 168)
    assert photo.size == (256, 128)
    assert decode_photo(picture((100, 50)), 168).size == (100, 50)
    assert decode_photo(picture((2048, 1024), "PNG"), 168).mode == "RGB"


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    photo = decode_photo(picture((400, 200), exif=exif), 100)
    assert photo.height == 2 * photo.width
    assert photo.getpixel((photo.width - 2, 1))[1] < 60  # red is now in the upper right


@pytest.mark.parametrize("data", [b"", b"no picture", picture((64, 64))[:200]])
def test_damaged_photos_are_errors(data: bytes) -> None:
    with pytest.raises(InputError, match="can't be decoded"):
        decode_photo(data, 168)


def test_jpegs_keep_letters_crisp() -> None:
    tile = Image.new("RGB", (64, 64), (255, 255, 255))
    tile.paste((200, 0, 0), (30, 0, 32, 64))
    again = np.asarray(Image.open(io.BytesIO(encode_jpeg(tile, 92)))).astype(int)
    assert abs(again - np.asarray(tile).astype(int)).mean() < 3


def test_jpegs_have_full_colour_resolution_and_the_requested_quality() -> None:
    image = Image.open(io.BytesIO(encode_jpeg(textured((64, 64), 5), 92)))
    assert {sampling[1:3] for sampling in image.layer} == {(1, 1)}  # type: ignore[attr-defined]
    assert len(encode_jpeg(textured((64, 64), 5), 50)) < len(encode_jpeg(textured((64, 64), 5), 92))


def test_a_pair_is_the_photo_no_larger_than_the_tile_and_the_tile() -> None:
    tile = textured((100, 100), 1)
    for size, expected in (((400, 200), (100, 50)), ((200, 400), (50, 100)), ((60, 30), (60, 30))):
        photo, beneath, decoded = encode_pair(tile, encoded(Image.new("RGB", size, (200, 0, 0)), "PNG"), 92)
        assert Image.open(io.BytesIO(photo)).size == expected
        assert abs(np.asarray(Image.open(io.BytesIO(photo))).astype(int) - (200, 0, 0)).max() < 9
        assert beneath == encode_jpeg(tile, 92)
        assert decoded.size == size


def textured(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture with detail of all sizes, as photos have, and hard edges, as maps have."""
    rng = np.random.default_rng(seed)
    pixels = np.full((size[1], size[0], 3), 128.0)
    for octave in range(2, 9):
        noise = Image.fromarray(rng.integers(0, 255, (2**octave, 2**octave, 3), dtype=np.uint8))
        pixels += (np.asarray(noise.resize(size, Image.Resampling.BICUBIC)) - 127.5) / octave**1.5
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.paste((255, 255, 255), (size[0] // 3, 0, size[0] // 2, size[1]))
    return image


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(640, 640), (640, 480), (1920, 1080), (400, 700), (168, 168), (90, 60)])
def test_pixels_are_close_to_those_of_plain_pillow(size: tuple[int, int]) -> None:
    """Draft decoding and a cheaper filter against opening all of it and LANCZOS, on the scale to 255."""
    tile, photo = textured((336, 336), 1), encoded(textured(size, 2), "JPEG", quality=90)
    jpeg, _ = graft_photo(tile, photo, delta=0.5, quality=92)

    expected = tile.copy()
    opened = Image.open(io.BytesIO(photo)).convert("RGB")
    small = opened.resize(pasted_size(opened.size, 336, 0.5), Image.Resampling.LANCZOS)
    expected.paste(small, (336 - small.width, 0))
    plain = encoded(expected, "JPEG", quality=92, subsampling=0)

    first, second = (np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (plain, jpeg))
    apart = abs(first - second)
    assert apart.mean() < 2
    assert np.percentile(apart, 99.9) <= 25
    assert abs((first - second).mean()) < 0.3  # no brighter, no darker


def test_grafting_does_not_change_the_tile() -> None:
    tile = textured((160, 160), 1)
    photos = [encoded(textured((300, 200), seed), "JPEG") for seed in range(3)]
    together = [graft_photo(tile, photo, 0.5, 92)[0] for photo in photos]
    assert together == [graft_photo(textured((160, 160), 1), photo, 0.5, 92)[0] for photo in photos]
    assert len(set(together)) == 3


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_photos_of_any_mode(mode: str) -> None:
    photo = decode_photo(encoded(textured((640, 320), 3).convert(mode), "JPEG"), 168)
    assert (photo.mode, photo.size) == ("RGB", (320, 160))
