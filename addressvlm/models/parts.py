"""Where each VLM family keeps its vision encoder g, VL adapter h and language model f (paper 001, Fig. 4).

Add a family here: its module paths in `PART_PATHS`. If its language model attends causally to all earlier tokens, add it to
`CAUSAL_ATTENTION` in addressvlm/models/loading.py, so that rows can be packed.
"""

from collections.abc import Mapping

from torch import nn

from addressvlm.config.train import Part
from addressvlm.errors import InputError

PART_PATHS: dict[Part, tuple[str, ...]] = {
    "vision": ("model.vision_tower", "model.vision_model", "model.visual"),
    "adapter": ("model.multi_modal_projector", "model.connector", "model.visual.merger"),
    "llm": ("model.language_model", "model.text_model"),
}


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
