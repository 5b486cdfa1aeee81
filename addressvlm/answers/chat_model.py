"""A vision-language model and its processor as prompts in, tokens out: what every way of answering builds on.

Everything goes through `AutoProcessor`'s chat template and the model's forward pass, so any image-text-to-text family will
do. A key-value cache is never changed in place here: `fork_cache` gives another one that shares its tensors.
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
    """Prompts that went through the model: what answers to them go on from.

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

    def row(self, number: int) -> "PrefillCache":
        """One of the prompts."""
        return self.rows([number])

    def rows(self, numbers: Sequence[int]) -> "PrefillCache":
        """Some of the prompts, in this order, each as often as it is named."""
        chosen = torch.tensor(numbers, device=self.mask.device)
        return PrefillCache(fork_cache(self.cache, rows=chosen), self.mask[chosen], self.logits[chosen], self.position[chosen])


class ChatModel:
    """A model folder or hub name, loaded.

    Args:
        folder: a model folder, a hub name, or `toy`.
        device: `cuda` where there is one, else `cpu`.
        dtype: float32, bfloat16 or auto, see `load_model`.
        loaded: model and processor that are there already; the folder then only holds what is known of the city.

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
        self._special = re.compile("|".join(map(re.escape, _markers(self.processor))))
        self.ends = _end_tokens(self.model, self.tokenizer)
        config = self.model.config
        self.image_token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        self.one_dimensional = has_1d_positions(self.model)
        # whether attention takes a mask of its own for every token
        self.takes_masks = config.get_text_config()._attn_implementation in ("eager", "sdpa")

    def prompt(self, turns: Sequence[Turn], finished: bool = False) -> str:
        """The turns as the model reads them; what someone writes can't pass for an image or the end of a turn."""
        turns = [turn | {"content": [self._plain(part) for part in turn["content"]]} for turn in turns]
        return self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=not finished)

    def inputs(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
        """What the processor makes of prompts and the images of each."""
        pictures = [[image.convert("RGB") for image in shown] for shown in images] if any(images) else None
        inputs = self.processor(text=list(prompts), images=pictures, padding=True, return_tensors="pt")
        return inputs.to(self.device, dtype=self.model.dtype)

    def continuation(self, turns: Sequence[Turn], answer: str) -> list[int]:
        """The tokens after a prompt that say the answer, its end included; made apart from the prompt, as in training."""
        prompt = self.prompt(turns)
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        whole = self.prompt([*turns, said], finished=True)
        ids = self.tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        for at, token in enumerate(ids):
            if token in self.ends:
                return ids[: at + 1]
        return [*ids, self.tokenizer.eos_token_id]

    @torch.inference_mode()
    def read(self, inputs: Any) -> PrefillCache:
        """The prompts through the model, once."""
        read = self.model(**inputs, use_cache=True, logits_to_keep=1)
        mask = inputs["attention_mask"]
        return PrefillCache(read.past_key_values, mask, read.logits[:, -1], self._next(mask))

    def _next(self, mask: torch.Tensor) -> torch.Tensor:
        """The position after prompts that were read just now, (B,); images that count in two dimensions shorten them."""
        if self.one_dimensional:
            return torch.full((len(mask),), mask.shape[1], device=mask.device)
        deltas = next(module.rope_deltas for module in self.model.modules() if hasattr(module, "get_rope_index"))
        return mask.sum(1) + deltas[:, 0]

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say, without the marks of turns."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def plain_text(self, text: str) -> str:
        """Text without anything that the model would take for an image or the end of a turn."""
        return " ".join(self._special.split(text))

    def _plain(self, part: dict[str, Any]) -> dict[str, Any]:
        return part | {"text": self.plain_text(part["text"])} if part["type"] == "text" else part


def user_turn(question: str) -> Turn:
    """The turn that shows one image and asks about it."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}


def fork_cache(cache: Any, remove: int = 0, rows: torch.Tensor | None = None) -> Any:
    """A cache that grows apart from this one, without its last `remove` tokens, of the `rows` chosen (or all)."""
    apart = copy.copy(cache)
    apart.layers = [copy.copy(layer) for layer in cache.layers]
    if remove:
        apart.crop(-remove)
    if rows is not None:
        apart.batch_select_indices(rows)
    return apart


def additive_mask(sees: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask (rows, tokens, cache), true where a token sees another, as attention adds it: (rows, 1, tokens, cache)."""
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return mask.masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def cache_grew(cache: Any, length: int) -> bool:
    """Whether all layers keep keys and values of all tokens up to this length, so that a mask can choose among them."""
    return all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and length < layer.sliding_window)
        for layer in cache.layers
    )


def _markers(processor: Any) -> list[str]:
    """Texts that the tokenizer or the processor would take for something else than text, longest first."""
    markers = {*processor.tokenizer.all_special_tokens, *(str(t) for t in processor.tokenizer.added_tokens_decoder.values())}
    image = getattr(processor, "image_token", None)
    return sorted({m for m in markers | {str(image or "")} if m.strip()}, key=len, reverse=True)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a turn, by the model's and the tokenizer's word."""
    configured = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id} | set(configured if isinstance(configured, list) else [configured])
    return {token for token in ends if token is not None}
