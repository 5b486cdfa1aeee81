"""The three parts of a vision-language model by name: vision encoder g, VL adapter h, language model f (paper 001, Fig. 4)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from addressvlm.config.train import Part
from addressvlm.errors import InputError

# Where model families keep each part; a new family is a new name here.
NAMES: dict[Part, tuple[str, ...]] = {
    "vision": ("model.vision_tower", "model.vision_model", "model.visual"),
    "adapter": ("model.multi_modal_projector", "model.connector", "model.visual.merger"),
    "llm": ("model.language_model", "model.text_model"),
}


def parts_of(model: nn.Module) -> dict[Part, str]:
    """Module path of each part.

    Raises:
        InputError: a part has none of the names that are known.
    """
    modules = dict(model.named_modules())
    found: dict[Part, str] = {}
    for part, names in NAMES.items():
        here = [name for name in names if name in modules]
        if not here:
            raise InputError(
                f"{type(model).__name__} has no module for its {part} part ({', '.join(names)}): "
                "add its name to addressvlm/models/parts.py."
            )
        found[part] = here[0]
    return found


def part_of(path: str, parts: dict[Part, str]) -> Part | None:
    """Which part a parameter or module path (with or without what PEFT adds to it) belongs to; the longest match wins."""
    return _longest(path, {prefix: part for part, prefix in parts.items()})


def part_named(path: str) -> Part | None:
    """The same of a model whose family is not known."""
    return _longest(path, {name: part for part, names in NAMES.items() for name in names})


def _longest(path: str, prefixes: Mapping[str, Part]) -> Part | None:
    path = path.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    inside = [prefix for prefix in prefixes if path == prefix or path.startswith(prefix + ".")]
    return prefixes[max(inside, key=len)] if inside else None


def linear_leaves(model: nn.Module, part: Part, parts: dict[Part, str]) -> list[str]:
    """Full paths of the part's matrices and convolutions, what LoRA can be attached to."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and part_of(path, parts) == part and not _grouped(module)
    ]


def _grouped(module: Any) -> bool:
    return getattr(module, "groups", 1) > 1
