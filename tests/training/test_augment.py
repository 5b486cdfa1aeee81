"""Photos changed anew at every step"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from addressvlm import InputError
from addressvlm.config import load
from addressvlm.config.train import AugmentConfig
from addressvlm.training.dataset import ASPECT, Schedule, augment_photo
from tests.support.images import encoded
from tests.support.training_tables import ListTable

CHANGED = AugmentConfig(crop=0.5, colour=0.3)


def noise(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


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
    assert [image for pair in zip(*dealt, strict=True) for image in pair] == first
    assert shown(Schedule(table, 6, 5, CHANGED), 0) != first


def test_a_grafted_image_is_not_cropped() -> None:
    stages = "{alignment: {data: [photos, alignment], augment: {crop: 0.5}}, localization: {data: photos}}"
    with pytest.raises(InputError, match=r"augment\.crop is 0\.5, which cuts the map off a grafted image: leave it at 1"):
        load("demo", [f"train.stages={stages}"])
