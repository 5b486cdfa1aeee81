"""Rows of prompts' states, and the caches of recent photos: which are kept, and which photos count as the same."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from addressvlm.answers.kv_cache import PhotoCache, PhotoCaches, PrefillCache, keeps_all_tokens, photo_key
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


def test_a_photo_larger_than_all_memory_is_the_only_one_kept():
    caches = PhotoCaches(10_000)
    for seed in (0, 1):
        caches.get(photo_key(picture(seed))).scores = torch.zeros(10_000)
        assert caches.get(photo_key(picture(seed))).scores is not None
    assert len(caches._caches) == 1
    caches.clear()
    assert caches.get(photo_key(picture(1))).scores is None


def test_a_photo_takes_the_memory_of_its_keys_values_and_scores():
    cache = PhotoCache(state=state_of([1, 1, 1]), scores=torch.zeros(10, dtype=torch.float64))
    assert cache.nbytes() - PhotoCache().nbytes() == 2 * 3 * 4 + 10 * 8


def test_scores_are_good_for_the_weights_they_were_made_for():
    cache, ones = PhotoCache(), np.ones(3)
    assert not cache.has_scores(None)
    cache.scores = torch.zeros(3)
    assert cache.has_scores(None)
    assert cache.has_scores(ones)
    cache.weights = ones
    assert cache.has_scores(np.ones(3))
    assert not cache.has_scores(np.array([1.0, 2.0, 1.0]))
    assert not cache.has_scores(None)


def state_of(*masks):
    """A state of prompts; the key of a token is 10 times its prompt's number and its place in the row."""
    rows, length = len(masks), len(masks[0])
    keys = (10.0 * torch.arange(1, rows + 1)[:, None] + torch.arange(length))[:, None, :, None]
    cache, mask = DynamicCache(), torch.tensor(masks)
    cache.update(keys, -keys, 0)
    return PrefillCache(cache, mask, torch.arange(rows)[:, None].float(), mask.sum(1))


def keys_of(state):
    (layer,) = state.cache.layers
    assert torch.equal(layer.keys, -layer.values)
    assert layer.keys.shape[2] == state.mask.shape[1] == state.cache.get_seq_length()
    assert torch.equal(state.position, state.mask.sum(1))
    return layer.keys[:, 0, :, 0].tolist()


def test_rows_of_a_state_in_any_order_without_padding_that_all_have():
    state = state_of([0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1])
    assert keys_of(state.rows([0])) == [[12, 13]]
    assert keys_of(state.rows([2, 0, 2])) == [[32, 33], [12, 13], [32, 33]]
    some = state.rows([2, 1])
    assert (keys_of(some), some.mask.tolist()) == ([[31, 32, 33], [21, 22, 23]], [[0, 0, 1], [1, 1, 1]])
    assert some.logits.tolist() == [[2], [1]]
    assert len(keys_of(state)[0]) == 4


def test_a_prompts_beginning_is_what_comes_before_its_last_tokens():
    state = state_of([0, 0, 1, 1], [0, 1, 1, 1])
    beginning = state.beginning(1, 2)
    assert (keys_of(beginning), beginning.mask.tolist(), beginning.logits.tolist()) == ([[21]], [[1]], [[1]])
    assert keys_of(state.beginning(0, 0)) == [[12, 13]]


def test_states_of_other_lengths_are_put_together_padded_on_the_left():
    one, other = state_of([0, 1, 1], [1, 1, 1]), state_of([1, 1])
    both = PrefillCache.concat([other, one])
    assert both.mask.tolist() == [[0, 1, 1], [0, 1, 1], [1, 1, 1]]
    assert keys_of(both) == [[0, 10, 11], [10, 11, 12], [20, 21, 22]]
    assert both.logits.tolist() == [[0], [0], [1]]
    assert len(keys_of(other)[0]) == 2


def test_a_window_keeps_all_tokens_while_it_is_longer_than_they_are():
    cache = DynamicCache()
    assert keeps_all_tokens(cache, 10**6)
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=8))
    assert keeps_all_tokens(cache, 7)
    assert not keeps_all_tokens(cache, 8)


@pytest.mark.parametrize("work", [lambda s: s.rows([1]), lambda s: s.beginning(1, 1), lambda s: PrefillCache.concat([s, s])])
def test_a_window_knows_how_many_tokens_it_has(work):
    cache, mask = DynamicCache(), torch.tensor([[0, 0, 1], [0, 1, 1]])
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=8))
    cache.update(torch.ones(2, 1, 3, 1), torch.ones(2, 1, 3, 1), 0)
    state = work(PrefillCache(cache, mask, torch.zeros(2, 1), mask.sum(1)))
    assert state.cache.get_seq_length() == state.mask.shape[1] == state.cache.layers[0].keys.shape[2]
