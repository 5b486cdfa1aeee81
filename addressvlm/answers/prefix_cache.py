"""Photos that the model has looked at lately, so that the next question about one does not begin with the photo again.

A `PrefixCacheEntry` is the key-value cache after the beginning of a prompt, its image included. A prompt that begins alike goes on from
there. What an image costs is read once: vision encoder, adapter, and the language model over all its tokens.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from addressvlm.answers.chat_model import ChatModel, PrefillCache, cache_grew, fork_cache


@dataclass(frozen=True)
class PrefixCacheEntry:
    """What the model keeps of the beginning of a prompt.

    Attributes:
        head: the beginning as text, with the image's marker for the image.
        cache: keys and values of its tokens.
        length: number of its tokens.
        position: of the token that follows.
    """

    head: str
    cache: Any
    length: int
    position: int

    def bytes(self) -> int:
        """Size of the cache."""
        tensors = (tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass
class PhotoCache:
    """A photo: the look at it, if its family allows to go on from one, and the scores of addresses found for it."""

    look: PrefixCacheEntry | None = None
    scores: torch.Tensor | None = None

    def bytes(self) -> int:
        """Size of all that is kept, about."""
        return 4096 + (self.look.bytes() if self.look else 0) + (0 if self.scores is None else self.scores.nbytes)


@dataclass
class PhotoCaches:
    """The photos seen last, up to a number of bytes of what is kept of them."""

    most_bytes: int
    _seen: OrderedDict[bytes, PhotoCache] = field(default_factory=OrderedDict)

    def of(self, image: Image.Image) -> PhotoCache:
        """What is kept of a photo, by its pixels; empty for a new one, and then kept."""
        key = hashlib.blake2b(image.tobytes(), digest_size=16, person=f"{image.mode}{image.size}".encode()[:16]).digest()
        found = self._seen.setdefault(key, PhotoCache())
        self._seen.move_to_end(key)
        used = 0
        for old in reversed(list(self._seen)):
            used += self._seen[old].bytes()
            if used > self.most_bytes and old != key:
                del self._seen[old]
        return found if self.most_bytes else PhotoCache()


def prefill_photo(model: ChatModel, prompt: str, ids: torch.Tensor, prefix: PrefillCache) -> PrefixCacheEntry | None:
    """The look at the only image of one prompt (ids (1, T)) that was read, None if nothing can go on from one.

    That is so if the text behind the image would be other tokens when it stands alone, or early tokens are forgotten.
    """
    head = _head(model, prompt)
    if head is None or not cache_grew(prefix.cache, ids.shape[1]) or not bool(prefix.mask.all()):
        return None
    end = int((ids[0] == model.image_token).nonzero()[-1]) + 1
    rest = ids[0, end:].tolist()
    if model.tokenizer(prompt[len(head) :], add_special_tokens=False)["input_ids"] != rest:
        return None
    return PrefixCacheEntry(head, fork_cache(prefix.cache, remove=len(rest)), end, int(prefix.position[0]) - len(rest))


def extend_prefixes(model: ChatModel, prompt: str, looks: Iterable[PrefixCacheEntry | None]) -> PrefillCache | None:
    """The prompt read on from the look that holds most of it; None if none holds its beginning."""
    fitting = [look for look in looks if look is not None and prompt.startswith(look.head) and prompt != look.head]
    if not fitting:
        return None
    look = max(fitting, key=lambda look: look.length)
    ids = model.tokenizer(prompt[len(look.head) :], add_special_tokens=False)["input_ids"]
    if model.image_token in ids:
        return None
    device = model.device
    tokens = torch.tensor([ids], device=device)
    mask = torch.ones(1, look.length + len(ids), dtype=torch.long, device=device)
    with torch.inference_mode():
        read = model.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=look.position + torch.arange(len(ids), device=device)[None],
            past_key_values=fork_cache(look.cache),
            use_cache=True,
            logits_to_keep=1,
        )
    position = torch.tensor([look.position + len(ids)], device=device)
    return PrefillCache(read.past_key_values, mask, read.logits[:, -1], position)


def full_prompt(prompt: str, prefix: PrefillCache) -> PrefixCacheEntry:
    """The look at everything of one prompt."""
    return PrefixCacheEntry(prompt, prefix.cache, prefix.mask.shape[1], int(prefix.position[0]))


def _head(model: ChatModel, prompt: str) -> str | None:
    """The prompt up to the end of its image's marker; None unless there is exactly one."""
    marker = getattr(model.processor, "image_token", None)
    if not marker or model.image_token is None or prompt.count(marker) != 1:
        return None
    return prompt[: prompt.index(marker) + len(marker)]
