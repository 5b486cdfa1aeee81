"""The caches of recent photos: which are kept, and which photos count as the same."""

import torch
from PIL import Image

from addressvlm.answers.kv_cache import PhotoCaches, photo_key
from tests.support.families import picture


def test_scores_that_are_kept_count_as_memory():
    caches = PhotoCaches(3 * 10_000)
    for seed in range(4):
        caches.get(photo_key(picture(seed))).scores = torch.zeros(1000, dtype=torch.float64)
    assert caches.get(photo_key(picture(3))).scores is not None
    assert len(caches._caches) == 2


def test_photos_that_were_asked_about_last_are_kept():
    caches = PhotoCaches(3 * 10_000)
    for seed in (0, 1):
        caches.get(photo_key(picture(seed))).scores = torch.zeros(1000, dtype=torch.float64)
    assert caches.get(photo_key(picture(0))).scores is not None  # so that 1 is the one used least recently
    caches.get(photo_key(picture(2))).scores = torch.zeros(1000, dtype=torch.float64)
    caches.get(photo_key(picture(2)))
    assert caches.get(photo_key(picture(0))).scores is not None
    assert caches.get(photo_key(picture(1))).scores is None


def test_photos_of_the_same_bytes_and_another_shape_are_others():
    caches, wide = PhotoCaches(1_000_000), picture(1, (20, 10))
    caches.get(photo_key(wide)).scores = torch.zeros(3)
    assert caches.get(photo_key(wide.copy())).scores is not None
    assert caches.get(photo_key(Image.frombytes("RGB", (10, 20), wide.tobytes()))).scores is None
    nothing = PhotoCaches(0)
    nothing.get(photo_key(wide)).scores = torch.zeros(3)
    assert nothing.get(photo_key(wide)).scores is None
