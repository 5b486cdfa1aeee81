"""Key-value caches: the state after a batch of prompts, and those of recent photos, so that no photo is read twice.

A cache is never changed in place: what grows or shrinks is another one that shares its tensors.
"""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


@dataclass(frozen=True)
class PrefillCache:
    """The state after B prompts, from which answers continue.

    Attributes:
        cache: key-value cache of all rows.
        mask: 1 where a token is real, long (B, P).
        logits: of the token that follows, (B, vocabulary).
        position: of the token that follows, long (B,).
    """

    cache: Any
    mask: torch.Tensor
    logits: torch.Tensor
    position: torch.Tensor

    def rows(self, numbers: Sequence[int]) -> "PrefillCache":
        """Some of the prompts, in this order, each as often as its number occurs."""
        rows = torch.tensor(numbers, device=self.mask.device)
        mask = self.mask[rows]
        padding = int(mask.any(dim=0).int().argmax()) if keeps_all_tokens(self.cache, mask.shape[1]) else 0
        cache = fork_cache(self.cache, rows=rows)
        if padding:
            _cut_columns(cache, padding, mask.shape[1])
        return PrefillCache(cache, mask[:, padding:], self.logits[rows], self.position[rows])

    def beginning(self, row: int, remove: int) -> "PrefillCache":
        """The state of one prompt before its last `remove` tokens; its logits are not those of its own last token."""
        padding, stop = int((self.mask[row] == 0).sum()), self.mask.shape[1] - remove
        cache = fork_cache(self.cache, rows=torch.tensor([row], device=self.mask.device))
        _cut_columns(cache, padding, stop)
        row_slice = slice(row, row + 1)
        return PrefillCache(
            cache, self.mask[row_slice, padding:stop], self.logits[row_slice], self.position[row_slice] - remove
        )

    @classmethod
    def concat(cls, states: Sequence["PrefillCache"]) -> "PrefillCache":
        """The rows of all states, padded on the left; caches must keep all tokens."""
        if len(states) == 1:
            return states[0]
        longest = max(state.mask.shape[1] for state in states)
        padding = [longest - state.mask.shape[1] for state in states]
        cache = fork_cache(states[0].cache)
        for number, layer in enumerate(cache.layers):
            for name in ("keys", "values"):
                parts = [getattr(state.cache.layers[number], name) for state in states]
                setattr(layer, name, torch.cat([F.pad(p, (0, 0, pad, 0)) for p, pad in zip(parts, padding, strict=True)]))
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = longest
        mask = torch.cat([F.pad(state.mask, (pad, 0)) for state, pad in zip(states, padding, strict=True)])
        logits = torch.cat([state.logits for state in states])
        return cls(cache, mask, logits, torch.cat([state.position for state in states]))


@dataclass
class PhotoCache:
    """What is known of a photo.

    Attributes:
        text, state: the beginning of a prompt and the state after it.
        scores: of all addresses.
        weights: of the addresses for which the scores are exact enough; None: for all weights.
    """

    text: str = ""
    state: PrefillCache | None = None
    scores: torch.Tensor | None = None
    weights: np.ndarray | None = None

    def has_scores(self, weights: np.ndarray | None) -> bool:
        """Whether its scores are good for these weights."""
        fits = self.weights is None or (weights is not None and np.array_equal(self.weights, weights))
        return self.scores is not None and fits

    def nbytes(self) -> int:
        """Approximate size."""
        layers = self.state.cache.layers if self.state else []
        tensors = [*(tensor for layer in layers for tensor in (layer.keys, layer.values)), self.scores]
        return 4096 + sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass
class PhotoCaches:
    """The caches of the most recent photos, up to `max_bytes` together."""

    max_bytes: int
    _caches: OrderedDict[bytes, PhotoCache] = field(default_factory=OrderedDict)

    def get(self, key: bytes) -> PhotoCache:
        """The cache of a photo with this `photo_key`; a new photo gets an empty one."""
        if not self.max_bytes:
            return PhotoCache()
        cache = self._caches.setdefault(key, PhotoCache())
        self._caches.move_to_end(key)
        used = 0
        for old in reversed(list(self._caches)):
            used += self._caches[old].nbytes()
            if used > self.max_bytes and old != key:
                del self._caches[old]
        return cache

    def clear(self) -> None:
        """Forget all photos."""
        self._caches.clear()


def photo_key(image: Image.Image) -> bytes:
    """The same for photos of the same pixels, and for no others."""
    person = f"{image.mode}{image.size}".encode()[:16]
    return hashlib.blake2b(image.tobytes(), digest_size=16, person=person).digest()


def fork_cache(cache: Any, rows: torch.Tensor | None = None) -> Any:
    """A cache that grows independently of this one, of some `rows` or all."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    if rows is not None:
        fork.batch_select_indices(rows)
    return fork


def keeps_all_tokens(cache: Any, length: int) -> bool:
    """Whether all layers keep keys and values of all tokens up to this length, so that a mask can choose among them."""
    return all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and length < layer.sliding_window)
        for layer in cache.layers
    )


def _cut_columns(cache: Any, start: int, stop: int) -> None:
    """Keep only the tokens from `start` to `stop`, in place."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, start:stop].clone(), layer.values[:, :, start:stop].clone()
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = stop - start
