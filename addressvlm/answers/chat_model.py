"""A vision-language model and its processor, prompts in and tokens out: the base of every way of answering.

Everything goes through `AutoProcessor`'s chat template and the model's forward pass, so any image-text-to-text family works.
A key-value cache is never changed in place: `fork_cache` gives another one that shares its tensors.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from addressvlm.models.loading import has_1d_positions, load_model, resolve_model, to_device
from addressvlm.storage.remote_path import AnyPath, path_of

Turn = dict[str, Any]


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
        return PrefillCache(fork_cache(self.cache, rows=rows), self.mask[rows], self.logits[rows], self.position[rows])


class ChatModel:
    """A model folder or Hub name, loaded.

    Args:
        folder: a model folder, a Hub name, or `toy`.
        device: `cuda` where there is one, else `cpu`.
        dtype: float32, bfloat16 or auto, see `load_model`.
        loaded: model and processor if they are loaded already; then only the city's files are read from the folder.

    Raises:
        InputError: the folder does not exist or is not a model.
    """

    def __init__(
        self,
        folder: str | AnyPath,
        device: str | None = None,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        loaded: tuple[Any, Any] | None = None,
    ) -> None:
        self.folder = path_of(folder if loaded else resolve_model(str(folder)))
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, self.processor = loaded or load_model(str(folder), dtype=dtype, trust_remote_code=trust_remote_code)
        self.model = to_device(model, self.device).eval()
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        markers = {*self.tokenizer.all_special_tokens, *map(str, self.tokenizer.added_tokens_decoder.values())}
        markers.add(str(getattr(self.processor, "image_token", None) or ""))
        longest_first = sorted({marker for marker in markers if marker.strip()}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)))
        eos = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
        self.end_tokens: set[int] = ends - {None}
        config = self.model.config
        self.image_token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        self.has_1d_positions = has_1d_positions(self.model)
        # whether attention takes a mask of its own for every token
        self.takes_4d_masks = config.get_text_config()._attn_implementation in ("eager", "sdpa")

    def prompt(self, turns: Sequence[Turn], finished: bool = False) -> str:
        """The turns in the model's chat template; a user's text can't pass for an image or the end of a turn."""
        turns = [
            turn | {"content": [
                p | {"text": " ".join(self._special.split(p["text"]))} if p["type"] == "text" else p for p in turn["content"]
            ]}
            for turn in turns
        ]  # fmt: skip
        return self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=not finished)

    def inputs(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
        """The processor's tensors of prompts and the images of each."""
        rgb = [[image.convert("RGB") for image in row] for row in images] if any(images) else None
        inputs = self.processor(text=list(prompts), images=rgb, padding=True, return_tensors="pt")
        return inputs.to(self.device, dtype=self.model.dtype)

    def answer_tokens(self, turns: Sequence[Turn], answer: str) -> list[int]:
        """The tokens of an answer to the turns, its end included; tokenized apart from the prompt, as in training."""
        prompt = self.prompt(turns)
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        conversation = self.prompt([*turns, reply], finished=True)
        ids = self.tokenizer(conversation[len(prompt) :], add_special_tokens=False)["input_ids"]
        for index, token in enumerate(ids):
            if token in self.end_tokens:
                return ids[: index + 1]
        return [*ids, self.tokenizer.eos_token_id]

    @torch.inference_mode()
    def prefill(self, inputs: Any) -> PrefillCache:
        """The prompts through the model, once."""
        output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        mask = inputs["attention_mask"]
        if self.has_1d_positions:
            position = torch.full((len(mask),), mask.shape[1], device=mask.device)
        else:  # images whose positions have rows and columns shorten their prompts
            deltas = next(module.rope_deltas for module in self.model.modules() if hasattr(module, "get_rope_index"))
            position = mask.sum(1) + deltas[:, 0]
        return PrefillCache(output.past_key_values, mask, output.logits[:, -1], position)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def user_turn(question: str) -> Turn:
    """The turn that shows one image and asks about it."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}


def fork_cache(cache: Any, remove: int = 0, rows: torch.Tensor | None = None) -> Any:
    """A cache that grows independently of this one, without its last `remove` tokens, of some `rows` (or all)."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    if remove:
        fork.crop(-remove)
    if rows is not None:
        fork.batch_select_indices(rows)
    return fork


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask (rows, tokens, cache), true where a token attends to another, as attention adds it: (rows, 1, tokens, cache)."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def keeps_all_tokens(cache: Any, length: int) -> bool:
    """Whether all layers keep keys and values of all tokens up to this length, so that a mask can choose among them."""
    return all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and length < layer.sliding_window)
        for layer in cache.layers
    )
