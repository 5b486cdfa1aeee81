"""A vision-language model and its processor, prompts in and tokens out: the base of every way of answering.

Everything goes through `AutoProcessor`'s chat template and the model's forward pass, so any image-text-to-text family works.
"""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from PIL import Image
from transformers import DynamicCache

from addressvlm.answers.kv_cache import PrefillCache, fork_cache, keeps_all_tokens, photo_key
from addressvlm.image_decode_worker import MAX_SIDE
from addressvlm.models.families import has_1d_positions
from addressvlm.models.loading import load_model, resolve_model, to_device
from addressvlm.storage.remote_path import AnyPath, path_of

LARGEST_SIDE_SETTING = 4096  # a processor's "longest_edge" above this counts all pixels, not those of one side

Turn = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt as tensors on the CPU, made without the model.

    Attributes:
        text: of the prompt up to its image, with the marker for the image; all of it unless it shows exactly one image.
        inputs: the processor's tensors of `text` and of the images, one row.
        rest: tokens of what follows `text`.
        photo: `photo_key` of its only image; empty if it shows none or several.
    """

    text: str
    inputs: Tensors
    rest: Sequence[int] = ()
    photo: bytes = b""

    def __len__(self) -> int:
        """Number of tokens, images included."""
        return self.inputs["input_ids"].shape[1] + len(self.rest)

    def whole(self) -> Tensors:
        """Its tensors with the rest."""
        ids = self.inputs["input_ids"]
        rest = {"input_ids": torch.tensor([self.rest], dtype=ids.dtype), "attention_mask": torch.ones(1, len(self.rest))}
        return {
            key: torch.cat([value, rest.get(key, torch.zeros(1, len(self.rest))).to(value.dtype)], dim=1)
            if value.shape == ids.shape else value
            for key, value in self.inputs.items()
        }  # fmt: skip


class ChatModel:
    """A model folder or Hub name, loaded.

    Args:
        folder: a model folder, a Hub name, or `toy`.
        device: `cuda` where there is one, else `cpu`.
        dtype: float32, bfloat16 or auto, see `load_model`.
        loaded: model and processor if they are loaded already; then only the city's files are read from the folder.
        adapters: the PEFT model around a loaded model, of which this one is the adapter `adapter`.

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
        adapters: Any = None,
        adapter: str = "",
    ) -> None:
        self.folder = path_of(folder if loaded else resolve_model(str(folder)))
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.adapters, self.adapter = adapters, adapter
        model, self.processor = loaded or load_model(str(folder), dtype=dtype, trust_remote_code=trust_remote_code)
        self.model = model if adapters is not None else to_device(model, self.device).eval()
        if loaded is None:
            use_float32_head(self.model)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        markers = {*self.tokenizer.all_special_tokens, *map(str, self.tokenizer.added_tokens_decoder.values())}
        markers.add(str(getattr(self.processor, "image_token", None) or ""))
        self._special = re.compile(any_of({marker for marker in markers if marker.strip()}))
        eos = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
        self.end_tokens: set[int] = ends - {None}
        config = self.model.config
        self.image_token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        self.image_size = input_size(self.processor.image_processor)  # longer side of an input image, in pixels
        self.has_1d_positions = has_1d_positions(self.model)
        # whether attention takes a mask of its own for every token
        self.takes_4d_masks = config.get_text_config()._attn_implementation in ("eager", "sdpa")
        self._splits_prompts: bool | None = None  # whether a prompt's tokens are those of its parts; None: not known yet
        self._splits_head: bool | None = None  # whether logits are the head's of what `model.model` returns

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
        return self._process(prompts, images).to(self.device, dtype=self.model.dtype)

    def _process(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
        rgb = [[image.convert("RGB") for image in row] for row in images] if any(images) else None
        return self.processor(text=list(prompts), images=rgb, padding=len(prompts) > 1, return_tensors="pt")

    def prepare(self, prompt: str, images: Sequence[Image.Image], same_photo: PreparedPrompt | None = None) -> PreparedPrompt:
        """The prompt as tensors, for `prefill_prompts`; needs no model. Any thread may call it: nothing is padded, which would
        change the tokenizer under another thread.

        Args:
            same_photo: another prompt about the same photo, whose tensors are taken if it begins alike.
        """
        marker = getattr(self.processor, "image_token", None)
        if len(images) != 1 or not marker or self.image_token is None or self._splits_prompts is False:
            photo = photo_key(images[0]) if len(images) == 1 else b""
            return PreparedPrompt(prompt, dict(self._process([prompt], [images])), photo=photo)
        ids = self.tokenizer(prompt)["input_ids"]
        rest = ids[ids.index(self.image_token) + 1 :]
        text = prompt[: prompt.index(marker) + len(marker)]
        if same_photo and same_photo.text == text:
            return PreparedPrompt(text, same_photo.inputs, rest, same_photo.photo)
        prepared = PreparedPrompt(text, dict(self._process([text], [images])), rest, photo_key(images[0]))
        if self._splits_prompts is None:
            whole = dict(self._process([prompt], [images]))
            self._splits_prompts = torch.equal(whole["input_ids"], prepared.whole()["input_ids"])
            return self.prepare(prompt, images)
        return prepared

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

    def forward(self, rows: Sequence["ChatModel"] = (), **inputs: Any) -> Any:
        """The model's output, by its adapter; or each row by that of another model on the same base."""
        names = [row.adapter for row in rows] or [self.adapter]
        if len(set(names)) == 1:
            self._activate(names[0])
            return self.model(**inputs)

        # PeftModel's own `adapter_names` take no modules that were tuned whole, and its hooks stay if the model raises.
        adapted = self._adapted_modules()
        for module in adapted:
            whole = isinstance(module, ModulesToSaveWrapper)
            module.forward = partial(_mix_whole if whole else type(module).forward, module, adapter_names=names)
        try:
            return self.model(**inputs)
        finally:
            for module in adapted:
                del module.forward

    def _adapted_modules(self) -> list[Any]:
        return [m for m in self.adapters.modules() if isinstance(m, LoraLayer | ModulesToSaveWrapper)]

    def can_mix(self, inputs: Tensors) -> bool:
        """Whether a prompt can be in a batch with those of other adapters: all that they adapt sees a row a prompt."""
        return self._mixable_shapes == _image_shapes(inputs)

    @cached_property
    def _mixable_shapes(self) -> tuple[Any, ...] | None:
        """The `_image_shapes` of a prompt with one photo, if adapters can be mixed in a batch of such prompts."""
        photo = Image.new("RGB", (self.image_size, self.image_size))
        prepared = self.prepare(self.prompt([user_turn("?")]), [photo])
        inputs = self.to_device(merge_inputs([prepared.whole()] * 2, self.tokenizer.pad_token_id))
        sizes: set[int] = set()
        hooks = [m.register_forward_pre_hook(lambda _, args: sizes.add(len(args[0]))) for m in self._adapted_modules()]
        self.prefill(inputs)
        for hook in hooks:
            hook.remove()
        return _image_shapes(prepared.whole()) if sizes == {2} else None

    def _activate(self, adapter: str) -> None:
        if self.adapters is not None and self.adapters.active_adapter != adapter:
            self.adapters.set_adapter(adapter, inference_mode=True)

    @torch.inference_mode()
    def prefill(self, inputs: Any, models: Sequence["ChatModel"] = ()) -> PrefillCache:
        """The prompts through the model, once; `models`: whose adapter is that of each."""
        mask = inputs["attention_mask"]
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if self.has_1d_positions else {}
        output = self.forward(models, **inputs, **positions, use_cache=True, logits_to_keep=1)
        position = mask.sum(1)
        if not self.has_1d_positions:  # images whose positions have rows and columns shorten their prompts
            deltas = next(module.rope_deltas for module in self.model.modules() if hasattr(module, "get_rope_index"))
            position = position + deltas[:, 0]
        return PrefillCache(output.past_key_values, mask, output.logits[:, -1], position)

    @torch.inference_mode()
    def extend(
        self,
        state: PrefillCache,
        runs: Sequence[Sequence[int]],
        models: Sequence["ChatModel"] = (),
        in_place: bool = False,
    ) -> PrefillCache:
        """The state after one or more further tokens of each row.

        Args:
            models: whose adapter is that of each row.
            in_place: the cache of `state` itself grows, layer by layer, so that no two are in memory.
        """
        longest, device = max(map(len, runs)), state.mask.device
        tokens = torch.tensor([[0] * (longest - len(run)) + list(run) for run in runs])
        lengths = torch.tensor([len(run) for run in runs])[:, None]
        real = torch.arange(longest) >= longest - lengths
        mask = torch.cat([state.mask, real.to(state.mask)], dim=1)
        position = state.position + lengths[:, 0].to(device)
        output = self.forward(
            models,
            input_ids=tokens.to(device),
            attention_mask=mask,
            position_ids=position[:, None] - torch.arange(longest, 0, -1, device=device),
            past_key_values=state.cache if in_place else fork_cache(state.cache),
            use_cache=True,
            logits_to_keep=1,
        )
        return PrefillCache(output.past_key_values, mask, output.logits[:, -1], position)

    def body(self, **inputs: Any) -> tuple[torch.Tensor, Any]:
        """What the head reads for each token, (rows, tokens, …), and the grown cache; see `head`."""
        if self._splits_head is None:
            ids = torch.tensor([[self.tokenizer.eos_token_id] * 2], device=self.device)
            hidden = self.model.model(input_ids=ids)[0] if hasattr(self.model, "model") else None
            expected = self.forward(input_ids=ids).logits
            self._splits_head = hidden is not None and torch.equal(self.model.get_output_embeddings()(hidden), expected)
        self._activate(self.adapter)
        output = (self.model.model if self._splits_head else self.model)(**inputs)
        return output[0], output.past_key_values

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in float32, (…, vocabulary), of some of what `body` returns."""
        return (self.model.get_output_embeddings()(hidden) if self._splits_head else hidden).float()

    def can_continue(self, length: int) -> bool:
        """Whether caches of up to so many tokens can be cut and put together."""
        return keeps_all_tokens(DynamicCache(config=self.model.config.get_text_config()), length)

    def to_device(self, inputs: Tensors) -> Tensors:
        """Prepared tensors where the model is, pixels in its dtype."""
        return {
            key: value.to(self.device, self.model.dtype if value.is_floating_point() else None, non_blocking=True)
            for key, value in inputs.items()
        }

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def any_of(texts: Collection[str]) -> str:
    """A pattern of any of the texts, the longest that fits, in which texts that begin alike share their beginning.

    Families have a thousand special tokens with the same first letters: one after the other, they would all be tried.
    """
    rests = defaultdict[str, list[str]](list)
    for text in filter(None, texts):
        rests[text[0]].append(text[1:])
    branches = [re.escape(letter) + any_of(rest) for letter, rest in rests.items()]
    if "" in texts:
        return f"(?:{'|'.join(branches)})?" if branches else ""
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def user_turn(question: str) -> Turn:
    """The turn that shows one image and asks about it."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}


def input_size(processor: Any) -> int:
    """Pixels of the longer side to which an image processor resizes; the side of a square for one that limits the area."""
    sizes = [getattr(processor, name, None) for name in ("size", "crop_size")]
    values = {key: value for size in sizes if size for key, value in dict(size).items() if isinstance(value, int)}
    if "longest_edge" in values and (hasattr(processor, "merge_size") or values["longest_edge"] > LARGEST_SIDE_SETTING):
        return min(math.isqrt(values["longest_edge"]), MAX_SIDE)  # Qwen's names for the least and the largest area
    return min(max(values.values(), default=MAX_SIDE), MAX_SIDE)


def _mix_whole(module: ModulesToSaveWrapper, x: torch.Tensor, adapter_names: Sequence[str]) -> torch.Tensor:
    """The output of a module that was tuned whole, each row by the copy of its adapter."""
    rows = {name: [i for i, other in enumerate(adapter_names) if other == name] for name in dict.fromkeys(adapter_names)}
    copies = dict(module.modules_to_save.items())
    parts = [copies.get(name, module.original_module)(x[numbers]) for name, numbers in rows.items()]
    order = torch.tensor([row for numbers in rows.values() for row in numbers], device=x.device)
    return torch.cat(parts)[order.argsort()]


def use_float32_head(model: Any) -> None:
    """Make the logits of a bfloat16 model float32; rounded to bfloat16, the likeliest token can change places."""
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear and head.weight.dtype != torch.float32:
        weight = head.weight.detach().float()
        bias = None if head.bias is None else head.bias.detach().float()
        head.forward = lambda hidden: F.linear(hidden.float(), weight, bias)


def merge_inputs(rows: Sequence[Tensors], pad_token: int) -> Tensors:
    """The inputs of several prompts with the same `input_shapes` as one batch, padded on the left."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    merged = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if values[0].shape == rows[0]["input_ids"].shape:
            fill = pad_token if key == "input_ids" else 0
            values = [F.pad(value, (longest - value.shape[1], 0), value=fill) for value in values]
        merged[key] = torch.cat(values)
    return merged


def input_shapes(inputs: Tensors) -> tuple[Any, ...]:
    """What inputs of one batch must have in common: the kinds and sizes of their images."""
    return tuple((key, value.shape[1:]) for key, value in inputs.items() if value.shape != inputs["input_ids"].shape)


def _image_shapes(inputs: Tensors) -> tuple[Any, ...]:
    return tuple((key, value.shape) for key, value in inputs.items() if value.shape != inputs["input_ids"].shape)


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask (rows, tokens, cache), true where a token attends to another, as attention adds it: (rows, 1, tokens, cache)."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
