"""Find out a model's format, and load tensors of other formats than transformers' by their names there."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING
from transformers.utils import cached_file

from addressvlm.errors import InputError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
OPEN_CLIP_CONFIG = "open_clip_config.json"
PLACE_RECOGNITION = re.compile(r"aggregator\.(agg\.)?score\.0\.weight")  # a tensor of every SALAD and MegaLoc
PICKLES = (".ckpt", ".pth", ".pt", ".bin")

Format = Literal["transformers", "open_clip", "places"]
Renames = Iterable[tuple[str, str]]


class CheckpointWeights:
    """The tensors of a safetensors file, and which of them were used; `name` is the file's, for messages."""

    def __init__(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        self.name, self._tensors, self._used, self._last = name, tensors, set[str](), ""

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor; InputError if it is missing."""
        if name not in self._tensors:
            raise InputError(f"{self.name} has no '{name}': get the whole file, or give a model of this architecture.")
        self._last = name
        self._used.add(name)
        return self._tensors[name]

    def count(self, before: str) -> int:
        """How many numbers follow `before` in names: the number of layers."""
        return len({match[1] for name in self._tensors if (match := re.match(rf"{re.escape(before)}(\d+)\.", name))})

    def renamed(self, name: str, renames: Renames, prefix: str = "") -> torch.Tensor:
        """The tensor of transformers' `name`; queries, keys and values (`q_proj`...) are thirds of one tensor `qkv`.

        Args:
            renames: pairs of a part of a name in transformers and in the file, replaced one after the other.
            prefix: of names in the file.
        """
        third = re.search(r"\.([qkv])_proj\.", name)
        file_name = name.replace(third[0], ".qkv.") if third else name
        for ours, theirs in renames:
            file_name = file_name.replace(ours, theirs)
        tensor = self[prefix + file_name]
        return tensor.chunk(3)["qkv".index(third[1])].clone() if third else tensor

    def state_dict(self, like: dict[str, torch.Tensor], source: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state dict with the names and shapes of another, from the `source` of each name's tensor."""
        state = {}
        for name, tensor in like.items():
            state[name] = source(name).contiguous()
            if state[name].shape != tensor.shape:
                actual, expected = (" x ".join(map(str, t.shape)) or "1" for t in (state[name], tensor))
                raise InputError(
                    f"{self.name}: '{self._last}' makes {actual} numbers where its settings or other weights ask for "
                    f"{expected}: give the settings and weights of one model."
                )
        return state

    def require_all_used(self, ignored: Iterable[str] = ()) -> None:
        """Refuse a file with tensors that the model does not have."""
        unused = sorted(set(self._tensors) - self._used - set(ignored))
        if unused:
            raise InputError(
                f"{self.name} has '{unused[0]}', which no supported architecture has: give a model of an architecture that "
                "docs/comparison.md lists."
            )


def checkpoint_format(where: str) -> Format:
    """The format of a folder or Hub model; an unknown one is left to transformers."""
    settings = read_settings(where, CONFIG)
    if settings and settings.get("model_type") in CONFIG_MAPPING:
        return "transformers"
    if find_file(where, OPEN_CLIP_CONFIG):
        return "open_clip"
    if settings is None or "architecture" in settings:  # the latter is timm's
        return "transformers"
    path = find_file(where, WEIGHTS)
    if path is None:
        _refuse_pickles(where)
        return "transformers"
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no safetensors file ({error}): get the file again.") from error
    return "places" if any(map(PLACE_RECOGNITION.fullmatch, names)) else "transformers"


def find_file(where: str, file: str) -> Path | None:
    """A file of a folder or Hub model on this machine, None if it has none or the Hub can't be reached."""
    if Path(where).is_dir():
        return Path(where, file) if Path(where, file).is_file() else None
    try:
        path = cached_file(where, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
    return Path(path) if path else None


def read_settings(where: str, file: str) -> dict[str, Any] | None:
    """A JSON file of a folder or Hub model, None if it has none."""
    path = find_file(where, file)
    if path is None:
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} of '{where}' is no JSON ({error}): get the file again.") from error
    if not isinstance(settings, dict):
        raise InputError(f"{file} of '{where}' is no JSON object: get the file again.")
    return settings


def read_weights(where: str, file: str) -> CheckpointWeights:
    """The tensors of a folder or Hub model."""
    path = find_file(where, file)
    if path is None:
        _refuse_pickles(where)
        raise InputError(f"'{where}' has no {file}: get the file, or give a model that has its weights in safetensors.")
    try:
        return CheckpointWeights(f"{file} of '{where}'", load_file(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no safetensors file ({error}): get the file again.") from error


def build_and_load(
    kind: Any, config: Any, dtype: torch.dtype, weights: CheckpointWeights, source: Callable[[str], torch.Tensor]
) -> Any:
    """A model of the class `kind` in eval mode on the CPU; `source` gives the tensor for a name of its state dict."""
    with torch.device("meta"):
        like = kind(config).state_dict()
    return kind.from_pretrained(None, config=config, state_dict=weights.state_dict(like, source), dtype=dtype).eval()


def _refuse_pickles(where: str) -> None:
    folder = Path(where)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES) if folder.is_dir() else []
    if pickles and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{where} has only pickled weights ({pickles[0]}), which could run code: save them as safetensors "
            "(docs/comparison.md, Encoders)."
        )
