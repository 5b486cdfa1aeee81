"""What the code knows about families of vision-language models; a new one is added here and nowhere else.

A family that `AutoModelForImageTextToText` loads needs, to be trained:

- the paths of its vision encoder g, VL adapter h and language model f (paper 001, Fig. 4) in `PART_PATHS`;
- if its language model attends causally to all earlier tokens, the `model_type` of its text configuration in
  `CAUSAL_ATTENTION`: only then can conversations share a row;
- if positions are not plain numbers, a function like `rope_positions`.

A small random model of its class in tests/support/tiny_families.py then learns, is packed, saved, merged, loaded and asked by
tests/models/test_families.py.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from addressvlm.config.train import Part
from addressvlm.errors import InputError

PART_PATHS: dict[Part, tuple[str, ...]] = {
    "vision": ("model.vision_tower", "model.vision_model", "model.visual"),
    "adapter": ("model.multi_modal_projector", "model.connector", "model.visual.merger"),
    "llm": ("model.language_model", "model.text_model"),
}

CAUSAL_ATTENTION = (
    "llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3_vl_text",
)  # fmt: skip


def parts_of(model: nn.Module) -> dict[Part, str]:
    """Module path of each part.

    Raises:
        InputError: the family is unknown.
    """
    modules = dict(model.named_modules())
    parts: dict[Part, str] = {}
    for part, paths in PART_PATHS.items():
        path = next((path for path in paths if path in modules), None)
        if path is None:
            raise InputError(
                f"{type(model).__name__} has no module for its {part} part ({', '.join(paths)}): "
                "add its path to addressvlm/models/parts.py."
            )
        parts[part] = path
    return parts


def part_of(path: str, parts: dict[Part, str]) -> Part | None:
    """The part that a parameter or module path (with or without PEFT's prefix) belongs to; the longest match wins."""
    return _longest_prefix(path, {prefix: part for part, prefix in parts.items()})


def part_of_any_family(path: str) -> Part | None:
    """`part_of` for a model of unknown family."""
    return _longest_prefix(path, {prefix: part for part, paths in PART_PATHS.items() for prefix in paths})


def _longest_prefix(path: str, prefixes: Mapping[str, Part]) -> Part | None:
    path = path.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    matches = [prefix for prefix in prefixes if path == prefix or path.startswith(prefix + ".")]
    return prefixes[max(matches, key=len)] if matches else None


def has_1d_positions(model: Any) -> bool:
    """Whether a token's position is its index in the row, and not also its row and column in the image (as in Qwen-VL)."""
    return not any(hasattr(module, "get_rope_index") for module in model.modules())


def image_merge(processor: Any) -> int | None:
    """Of models with positions by rows and columns: how many patches on a side become one token; None for others."""
    images = processor.image_processor
    return int(images.merge_size) if "image_grid_thw" in images.model_input_names else None


def rope_positions(types: Sequence[int], grids: Sequence[Sequence[int]], merge: int) -> list[list[int]]:
    """Positions of Qwen-VL: time, row and column of every token, as `get_rope_index` of its models.

    Text counts on all three axes. An image's tokens have the position at which it begins, plus their row and column; what
    follows continues after the largest of them.

    Args:
        types: 0 for text, 1 for image, of each token.
        grids: time, height and width of each image in patches.
        merge: see `image_merge`.
    """
    axes: list[list[int]] = [[], [], []]
    images, position = iter(grids), 0
    for is_image, run in itertools.groupby(types):
        if not is_image:
            count = len(list(run))
            for axis in axes:
                axis += range(position, position + count)
            position += count
            continue
        time, height, width = next(images)
        rows, columns = height // merge, width // merge
        for _, row, column in itertools.product(range(time), range(rows), range(columns)):
            for axis, offset in zip(axes, (0, row, column), strict=True):
                axis.append(position + offset)
        position += max(rows, columns)
    return axes


def check_image_token(model: Any, processor: Any, name: str) -> None:
    """Refuse a processor whose image token is not the model's, with an InputError; `name` is the model's."""
    if not hasattr(processor, "image_token"):
        return
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    expected = getattr(model.config, "image_token_id", token)
    if token != expected:
        raise InputError(
            f"the processor of {name} writes images as token {token} ({processor.image_token}), the model reads them at token "
            f"{expected}: correct image_token in processor_config.json or image_token_id in config.json."
        )
