"""Decoding of untrusted photos: upright, in their colours, of limited size, damaged ones refused."""

import resource
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from addressvlm import InputError
from addressvlm.image_decode_worker import MAX_SIDE, decode_image, limit_resources
from tests.support.images import BAD, GOOD, TURNED, encoded
from tests.support.running_service import photo

pytestmark = pytest.mark.xdist_group("serve")


@pytest.mark.parametrize("case", GOOD)
def test_colours_are_kept(case: str) -> None:
    data, colour = GOOD[case]
    width, height, rgb = decode_image(data, 50)
    middle = 3 * (height // 2 * width + width // 2)
    assert all(abs(a - b) < 8 for a, b in zip(rgb[middle : middle + 3], colour, strict=True))
    assert len(rgb) == 3 * width * height


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_photos_come_upright_and_no_larger_than_the_model_needs(kind: str) -> None:
    data = encoded(Image.new("RGB", (3000, 1500), "red"), kind, exif=TURNED)
    assert decode_image(data, 50)[:2] == (MAX_SIDE // 2, MAX_SIDE)
    assert decode_image(data, 50, side=336)[:2] == (672, 1344)
    assert decode_image(encoded(Image.new("RGB", (640, 480)), kind), 50, side=336)[:2] == (640, 480)  # as it is


def test_the_bounds_of_a_photo_are_themselves_allowed() -> None:
    assert decode_image(encoded(Image.new("RGB", (200, 100)), "PNG"), 0.02)[:2] == (200, 100)
    assert decode_image(encoded(Image.new("RGB", (16, 40)), "PNG"), 50)[:2] == (16, 40)
    for size, words in (((201, 100), "at most 0.02"), ((15, 40), "at least 16"), ((40, 15), "at least 16")):
        with pytest.raises(InputError, match=words):
            decode_image(encoded(Image.new("RGB", size), "PNG"), 0.02)


def test_a_turned_photo_stands_on_its_feet() -> None:
    lying = Image.new("RGB", (60, 40), "blue")
    lying.paste("red", (0, 0, 30, 40))  # what is left in the file is above when shown
    width, height, rgb = decode_image(encoded(lying, "PNG", exif=TURNED), 50)
    assert (width, height, rgb[:3], rgb[-3:]) == (40, 60, b"\xff\0\0", b"\0\0\xff")


def test_each_photo_has_its_own_cpu_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much time the process used for those before."""
    limits: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: limits.update({kind: limit}))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits.get(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)))
    used = iter([3.5, 20.0])
    monkeypatch.setattr(time, "process_time", lambda: next(used))
    limit_resources(10, 1 << 20)
    room = limits[resource.RLIMIT_AS][0]
    assert limits[resource.RLIMIT_CPU] == (14, resource.RLIM_INFINITY)
    assert room > 1 << 20
    limit_resources(10, 1 << 40)
    assert limits[resource.RLIMIT_CPU] == (31, resource.RLIM_INFINITY)
    assert limits[resource.RLIMIT_AS][0] == room  # given once, or it would grow with what was used


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_damaged_photos_are_refused_or_read(data: st.DataObject) -> None:
    source = bytearray(data.draw(st.sampled_from([photo(), *(d for d, _ in [*BAD.values(), *GOOD.values()] if d)])))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(source) - 1), st.integers(0, 255)), max_size=20)):
        source[at] = value
    end = data.draw(st.integers(0, len(source)))
    try:
        width, height, rgb = decode_image(bytes(source[:end]), 4)
    except InputError:
        return
    assert len(rgb) == 3 * width * height
