"""Key-value caches of recent photos, so that the next question about one does not start with the photo again.

A `PrefixCacheEntry` is the cache after the beginning of a prompt, its image included; a prompt with the same beginning
continues from it. So an image goes through vision encoder, adapter and language model once.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from addressvlm.answers.chat_model import ChatModel, PrefillCache, fork_cache, keeps_all_tokens


@dataclass(frozen=True)
class PrefixCacheEntry:
    """The model's state after the beginning of a prompt.

    Attributes:
        text: the beginning, with the image's marker for the image.
        cache: keys and values of its tokens.
        length: number of its tokens.
        position: of the token that follows.
    """

    text: str
    cache: Any
    length: int
    position: int

    @classmethod
    def up_to_image(cls, model: ChatModel, prompt: str, ids: torch.Tensor, prefill: PrefillCache) -> "PrefixCacheEntry | None":
        """The state after the only image of one prompt with tokens `ids` (1, T); None if nothing can continue from there.

        That is so if the text behind the image would be other tokens when it stands alone, or early tokens are forgotten.
        """
        marker = getattr(model.processor, "image_token", None)
        if not marker or model.image_token is None or prompt.count(marker) != 1:
            return None
        if not keeps_all_tokens(prefill.cache, ids.shape[1]) or not bool(prefill.mask.all()):
            return None
        text_end = prompt.index(marker) + len(marker)
        end = int((ids[0] == model.image_token).nonzero()[-1]) + 1
        rest = ids[0, end:].tolist()
        if model.tokenizer(prompt[text_end:], add_special_tokens=False)["input_ids"] != rest:
            return None
        cache = fork_cache(prefill.cache, remove=len(rest))
        return cls(prompt[:text_end], cache, end, int(prefill.position[0]) - len(rest))


@dataclass
class PhotoCache:
    """The state after a photo, if its family can continue from one, and the scores of all addresses for it."""

    prefix: PrefixCacheEntry | None = None
    scores: torch.Tensor | None = None

    def nbytes(self) -> int:
        """Approximate size."""
        layers = self.prefix.cache.layers if self.prefix else []
        tensors = [*(tensor for layer in layers for tensor in (layer.keys, layer.values)), self.scores]
        return 4096 + sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass
class PhotoCaches:
    """The caches of the most recent photos, up to `max_bytes` together."""

    max_bytes: int
    _caches: OrderedDict[bytes, PhotoCache] = field(default_factory=OrderedDict)

    def get(self, image: Image.Image) -> PhotoCache:
        """The cache of a photo, by its pixels; a new photo gets an empty one."""
        if not self.max_bytes:
            return PhotoCache()
        key = hashlib.blake2b(image.tobytes(), digest_size=16, person=f"{image.mode}{image.size}".encode()[:16]).digest()
        cache = self._caches.setdefault(key, PhotoCache())
        self._caches.move_to_end(key)
        used = 0
        for old in reversed(list(self._caches)):
            used += self._caches[old].nbytes()
            if used > self.max_bytes and old != key:
                del self._caches[old]
        return cache


def extend_prefixes(model: ChatModel, prompt: str, prefixes: Iterable[PrefixCacheEntry | None]) -> PrefillCache | None:
    """Prefill one prompt from the longest prefix that it starts with; None if it starts with none."""
    matches = [prefix for prefix in prefixes if prefix and prompt.startswith(prefix.text) and prompt != prefix.text]
    if not matches:
        return None
    prefix = max(matches, key=lambda prefix: prefix.length)
    ids = model.tokenizer(prompt[len(prefix.text) :], add_special_tokens=False)["input_ids"]
    if model.image_token in ids:
        return None
    mask = torch.ones(1, prefix.length + len(ids), dtype=torch.long, device=model.device)
    with torch.inference_mode():
        output = model.model(
            input_ids=torch.tensor([ids], device=model.device),
            attention_mask=mask,
            position_ids=prefix.position + torch.arange(len(ids), device=model.device)[None],
            past_key_values=fork_cache(prefix.cache),
            use_cache=True,
            logits_to_keep=1,
        )
    position = torch.tensor([prefix.position + len(ids)], device=model.device)
    return PrefillCache(output.past_key_values, mask, output.logits[:, -1], position)
