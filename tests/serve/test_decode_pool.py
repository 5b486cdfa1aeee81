"""Photos before the model, without Ray: decoded, upright, small, and by processes that can do no harm."""

import asyncio
import resource
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from addressvlm import InputError
from addressvlm.image_decode_worker import MAX_SIDE, decode_image, limit_resources
from serve.errors import ApiError
from serve.images import WORKER_COMMAND, DecodePool, decode_base64
from tests.support.images import BAD, GOOD, TURNED, encoded
from tests.support.running_service import photo

pytestmark = pytest.mark.xdist_group("serve")
IMPORT = f"from {limit_resources.__module__} import {limit_resources.__name__} as limit"  # for processes of their own


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


@given(st.one_of(st.text(), st.text().map(lambda text: f"data:image/png;base64,{text}"), st.binary().map(repr)))
@settings(max_examples=100, deadline=None)
def test_texts_are_images_or_refused(text: str) -> None:
    try:
        found = decode_base64(text)
    except InputError:
        return
    assert isinstance(found, bytes)


def run(work: object) -> object:
    return asyncio.run(work)  # type: ignore[arg-type]


def test_a_decoder_that_hangs_is_ended_and_the_next_photo_is_read() -> None:
    hangs = [
        sys.executable,
        "-c",
        f"{IMPORT}; limit(0)\nwhile True: pass",
    ]

    async def both() -> None:
        decoders = DecodePool(1, cpu_s=20, max_megapixels=4)
        decoders.command = hangs
        with pytest.raises(InputError, match="too long to decode"):
            await decoders.decode(photo(), 336)
        decoders.command = WORKER_COMMAND
        assert (await decoders.decode(photo(), 336))[:2] == (320, 240)
        with pytest.raises(InputError, match="damaged"):
            await decoders.decode(photo()[:1000], 336)
        assert len(decoders.idle) == 1
        await decoders.close()

    run(both())


def test_a_decoder_gets_no_more_memory_than_allowed() -> None:
    greedy = f'{IMPORT}; limit(9, 1 << 27); x = bytearray(1 << 29); print(\'{{"refused": "got it"}}\')'

    async def decode_greedily() -> None:
        with pytest.raises(InputError, match="too long to decode"):
            await DecodePool(1, 20, 4, [sys.executable, "-c", greedy]).decode(photo(), 336)

    run(decode_greedily())


def test_decoders_see_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADDRESSVLM_API_KEYS", "a-key-that-is-secret")
    tells = "import os, sys; sys.stdout.write('{\"refused\": \"' + ' '.join(os.environ) + '\"}\\n')"

    async def decode_once() -> None:
        decoders = DecodePool(1, 20, 4, [sys.executable, "-c", tells])
        with pytest.raises(InputError, match="PYTHONPATH") as caught:
            await decoders.decode(b"", 336)
        await decoders.close()
        assert "KEYS" not in str(caught.value)

    run(decode_once())


def test_a_turn_that_does_not_come_is_the_services_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.images.WALL_TIME_FACTOR", 0.01)

    async def wait_for_a_turn() -> None:
        decoders = DecodePool(1, 1, 4)
        async with decoders.slots:
            with pytest.raises(ApiError) as caught:
                await decoders.decode(photo(), 336)
        assert caught.value.status == 503
        assert not decoders.slots.locked()

    run(wait_for_a_turn())


def test_a_process_that_can_not_be_had_is_the_services_trouble() -> None:
    async def decode_without() -> None:
        with pytest.raises(ApiError) as caught:
            await DecodePool(1, 20, 4, ["/no/such/program"]).decode(photo(), 336)
        assert caught.value.status == 503

    run(decode_without())


def test_a_process_that_died_while_it_waited_is_not_asked() -> None:
    async def decode_twice() -> None:
        decoders = DecodePool(1, 20, 4)
        await decoders.decode(photo(), 336)
        (process,) = decoders.idle
        process.kill()
        await process.wait()
        assert (await decoders.decode(photo(), 60))[:2] == (160, 120)  # twice the side that the model looks at
        assert process not in decoders.idle
        (other,) = decoders.idle
        sizes = [(60, 40), (40, 60), (50, 50)]
        photos = [encoded(Image.new("RGB", size), "PNG") for size in sizes]
        found = await asyncio.gather(*(decoders.decode(data, 336) for data in photos))
        assert [one[:2] for one in found] == sizes
        assert decoders.idle == [other]  # one process, as many as it was told
        await decoders.close()
        assert other.returncode is not None

    run(decode_twice())
