"""Photos as training shows them: crops and colours drawn by seed and step, at the size that is needed

python -m pytest -q tests/training/test_augmentation.py
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from addressvlm import InputError
from addressvlm.config import load
from addressvlm.config.train import AugmentConfig
from addressvlm.training.dataset import ASPECT, Schedule, augment_photo, crop_box
from tests.support.images import encoded
from tests.support.training_tables import ListTable, picture, table_rows

CHANGED = AugmentConfig(crop=0.5, colour=0.3)


def noise(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_photo_is_decoded_at_the_size_that_training_needs() -> None:
    data = encoded(noise(640, 320), "JPEG")
    schedule = Schedule(ListTable([]), 1, 0)
    row = {"image": {"bytes": data}, "rounds": [{"question": "q", "answer": "a"}]}
    assert schedule.sample(0, row).image.size == (640, 320)
    schedule.decoded_size = (150, 80)
    assert schedule.sample(0, row).image.size == (160, 80)


def test_a_tile_beside_an_augmented_photo_stays_as_it_is() -> None:
    (row,) = table_rows(1)
    row |= {"image": {"bytes": encoded(noise(), "PNG")}, "tile": picture("green")}
    schedule = Schedule(ListTable([row]), 1, 0, CHANGED)

    class Kept:
        def encode(self, sample: Any) -> Any:
            return sample

    (shown,) = schedule.encoded(Kept(), 0)
    assert shown.tile.tobytes() == Image.new("RGB", (32, 32), "green").tobytes()
    assert shown.image.size < (60, 40)
    assert [question for question, _ in shown.rounds] == ["Which street is this?", "Is it?"]
    assert shown.kinds == ("generation", "judgment")


class Seen:
    """Keeps what would be shown."""

    def encode(self, sample: Any) -> Image.Image:
        return sample.image


def shown(schedule: Schedule, step: int, rank: int = 0, world: int = 1) -> list[bytes]:
    return [image.tobytes() for image in schedule.encoded(Seen(), step, rank, world)]


def photos(count: int) -> ListTable:
    image = {"bytes": encoded(noise(), "PNG"), "path": None}
    return ListTable([{"id": str(i), "image": image, "rounds": [{"question": "q", "answer": "a"}]} for i in range(count)])


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.05, 0.99), st.integers(0, 99))
def test_a_crop_is_a_part_of_the_photo_of_at_least_its_share(width: int, height: int, share: float, seed: int) -> None:
    made = augment_photo(Image.new("RGB", (width, height)), AugmentConfig(crop=share), np.random.default_rng(seed))
    wide, high = made.width / width, made.height / height
    assert 0 < wide <= 1
    assert 0 < high <= 1
    pixel = 1 / width + 1 / height  # of rounding
    assert wide * high >= share / ASPECT - pixel
    assert high / ASPECT - pixel * ASPECT <= wide <= high * ASPECT + pixel * ASPECT


def test_a_crop_is_taken_from_where_it_is() -> None:
    photo = noise()
    made = np.asarray(augment_photo(photo, AugmentConfig(crop=0.4), np.random.default_rng(3)))
    whole = np.asarray(photo)
    places = [
        (y, x)
        for y in range(whole.shape[0] - made.shape[0] + 1)
        for x in range(whole.shape[1] - made.shape[1] + 1)
        if np.array_equal(whole[y : y + made.shape[0], x : x + made.shape[1]], made)
    ]
    assert len(places) == 1


def test_crops_are_of_all_places_sizes_and_shapes() -> None:
    """Of a photo whose colours are its coordinates."""
    side = np.arange(200, dtype=np.uint8)
    photo = Image.fromarray(np.stack([*np.meshgrid(side, side), np.zeros((200, 200), np.uint8)], axis=-1).astype(np.uint8))
    drawn = []
    for seed in range(200):
        made = augment_photo(photo, AugmentConfig(crop=0.25), np.random.default_rng(seed))
        x, y, _ = made.getpixel((0, 0))
        assert made.getpixel((made.width - 1, made.height - 1)) == (x + made.width - 1, y + made.height - 1, 0)
        room = max(200 - made.width, 1), max(200 - made.height, 1)
        drawn.append((made.width * made.height / 200**2, made.width / made.height, x / room[0], y / room[1]))
    area, aspect, left, top = np.array(drawn).T
    assert 0.24 < area.min() < 0.27
    assert area.max() > 0.9
    assert area.mean() == pytest.approx(0.625, abs=0.05)
    assert aspect.min() < 0.8
    assert aspect.max() > 1.25
    assert np.median(aspect) == pytest.approx(1, abs=0.06)
    for share in (left, top):
        assert share.min() < 0.05
        assert share.max() > 0.95
    assert abs(np.corrcoef(left, top)[0, 1]) < 0.2


def test_a_crop_by_hand() -> None:
    assert crop_box((300, 200), 0.25, 1.0, 0.0, 1.0) == (0, 100, 150, 200)
    assert crop_box((300, 200), 0.25, 1.44, 1.0, 0.5) == (120, 58, 300, 141)  # 0.6 wide, 1 / 2.4 high
    assert crop_box((300, 200), 1.0, 4 / 3, 0.5, 0.5) == (0, 14, 300, 187)
    assert crop_box((3, 1), 0.05, 1.0, 0.0, 0.0) == (0, 0, 1, 1)


def test_brightness_contrast_and_saturation_change_each_by_itself() -> None:
    """Of a photo of two colours: the mean's, the greys' and the channels' differences."""
    photo = Image.new("RGB", (2, 1))
    photo.putdata([(60, 80, 100), (110, 140, 120)])

    def measured(image: Image.Image) -> np.ndarray:
        pixels = np.asarray(image, dtype=float)[0]
        greys = pixels @ (0.299, 0.587, 0.114)
        spread = abs(greys[1] - greys[0])
        return np.array([greys.mean(), spread / greys.mean(), np.ptp(pixels[0] - pixels[0].mean()) / spread])

    changes = [augment_photo(photo, AugmentConfig(colour=0.3), np.random.default_rng(seed)) for seed in range(80)]
    factors = np.array([measured(change) for change in changes]) / measured(photo)
    assert (factors.min(axis=0) < 0.8).all()
    assert (factors.max(axis=0) > 1.2).all()
    assert (factors.min(axis=0) > 0.55).all()
    assert (factors.max(axis=0) < 1.5).all()
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.35


def test_colours_change_and_the_size_does_not() -> None:
    grey = Image.new("RGB", (8, 8), (100, 120, 140))
    values = [
        augment_photo(grey, AugmentConfig(colour=0.3), np.random.default_rng(seed)).getpixel((3, 3)) for seed in range(40)
    ]
    brightness = np.array(values, dtype=float).sum(axis=1) / 360
    assert len(set(values)) > 30
    assert 0.68 < brightness.min() < 0.85
    assert 1.15 < brightness.max() < 1.32
    assert augment_photo(grey, CHANGED.model_copy(update={"crop": 1.0}), np.random.default_rng(0)).size == (8, 8)


def test_nothing_is_changed_by_default() -> None:
    table = photos(6)
    assert set(shown(Schedule(table, 3, 0), 0)) == {noise().tobytes()}


def test_what_is_shown_depends_on_seed_and_step_alone() -> None:
    table, whole = photos(6), Schedule(photos(6), 6, 4, CHANGED)
    first = shown(whole, 0)
    assert shown(whole, 1) != first
    assert len(set(first)) == 6
    assert shown(Schedule(table, 6, 4, CHANGED), 0) == first  # as after a resume
    dealt = [shown(Schedule(table, 6, 4, CHANGED), 0, rank, 2) for rank in range(2)]
    assert [image for share in dealt for image in share] == first
    assert shown(Schedule(table, 6, 5, CHANGED), 0) != first


def test_a_grafted_image_is_not_cropped() -> None:
    stages = "{alignment: {data: [photos, alignment], augment: {crop: 0.5}}, localization: {data: photos}}"
    with pytest.raises(InputError, match=r"augment\.crop is 0\.5, which cuts the map off a grafted image: leave it at 1"):
        load("demo", [f"train.stages={stages}"])
