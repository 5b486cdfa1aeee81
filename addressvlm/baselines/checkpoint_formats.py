"""Models in other formats than transformers': which format it is, its files, and its tensors by the names they have there."""

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
PLACES = re.compile(r"aggregator\.(agg\.)?score\.0\.weight")  # what all SALAD and MegaLoc have
PICKLES = (".ckpt", ".pth", ".pt", ".bin")

Format = Literal["transformers", "open_clip", "places"]
Renames = Iterable[tuple[str, str]]


class CheckpointWeights:
    """The tensors of a safetensors file, and which of them were asked for.

    Attributes:
        name: of the file, for messages.
        last: the name that was asked for last.
    """

    def __init__(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        self.name, self.last, self._tensors, self._used = name, "", tensors, set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor.

        Raises:
            InputError: there is none of this name.
        """
        if name not in self._tensors:
            raise InputError(f"{self.name} has no '{name}': get the whole file, or give a model of this architecture.")
        self.last = name
        self._used.add(name)
        return self._tensors[name]

    def count(self, before: str) -> int:
        """How many numbers follow `before` in names, such as those of the layers."""
        return len({found[1] for name in self._tensors if (found := re.match(rf"{re.escape(before)}(\d+)\.", name))})

    def renamed(self, name: str, renames: Renames, before: str = "") -> torch.Tensor:
        """The tensor that is `name` in a model here; queries, keys and values (`q_proj`...) are thirds of one, `qkv`.

        Args:
            renames: pairs of words here and words there, replaced one after the other.
            before: what names begin with there.

        Raises:
            InputError: there is none.
        """
        third = re.search(r"\.([qkv])_proj\.", name)
        other = name.replace(third[0], ".qkv.") if third else name
        for ours, theirs in renames:
            other = other.replace(ours, theirs)
        found = self[before + other]
        return found.chunk(3)["qkv".index(third[1])].clone() if third else found

    def fit(self, shapes: dict[str, torch.Size], source: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state dict of these shapes.

        Args:
            source: the tensor for a name of the state dict.

        Raises:
            InputError: a tensor is missing or has another shape.
        """
        made = {}
        for name, shape in shapes.items():
            made[name] = source(name).contiguous()
            if made[name].shape != shape:
                found, wanted = (" x ".join(map(str, size)) or "1" for size in (made[name].shape, shape))
                raise InputError(
                    f"{self.name}: '{self.last}' makes {found} numbers where its settings or other weights ask for {wanted}: "
                    "give the settings and weights of one model."
                )
        return made

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Make sure that nothing that matters was left over.

        Raises:
            InputError: something was.
        """
        left = sorted(set(self._tensors) - self._used - set(ignored))
        if left:
            raise InputError(
                f"{self.name} has '{left[0]}', which the architecture read here has not: give a model of an architecture that "
                "docs/comparison.md lists."
            )


def checkpoint_format(where: str) -> Format:
    """The format of a model; what can't be told apart is left to transformers.

    Args:
        where: folder or hub name.

    Raises:
        InputError: a file is damaged, or the folder has pickled weights only.
    """
    about = settings_of(where, CONFIG)
    if about and about.get("model_type") in CONFIG_MAPPING:
        return "transformers"
    if path_in(where, OPEN_CLIP_CONFIG):
        return "open_clip"
    if about is None or "architecture" in about:  # the latter is timm's
        return "transformers"
    weights = path_in(where, WEIGHTS)
    if weights is None:
        _refuse_pickles(where)
    elif any(PLACES.fullmatch(name) for name in _names(weights)):
        return "places"
    return "transformers"


def path_in(where: str, file: str) -> Path | None:
    """A file of a folder or hub model on this machine, None if it has none or the hub can't be asked."""
    if Path(where).is_dir():
        return Path(where, file) if Path(where, file).is_file() else None
    try:
        found = cached_file(where, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


def settings_of(where: str, file: str) -> dict[str, Any] | None:
    """A JSON file of a folder or hub model, None if it has none.

    Raises:
        InputError: it is no JSON object.
    """
    path = path_in(where, file)
    if path is None:
        return None
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} of '{where}' is no JSON ({error}): get the file again.") from error
    if not isinstance(about, dict):
        raise InputError(f"{file} of '{where}' is no JSON object: get the file again.")
    return about


def weights_of(where: str, file: str) -> CheckpointWeights:
    """The tensors of a folder or hub model.

    Raises:
        InputError: the file isn't there or is damaged.
    """
    path = path_in(where, file)
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
    """A model of transformers in eval mode on the CPU.

    Args:
        kind: its class.
        source: the tensor for a name of its state dict.

    Raises:
        InputError: a tensor is missing or has another shape.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
    return kind.from_pretrained(None, config=config, state_dict=weights.fit(shapes, source), dtype=dtype).eval()


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no safetensors file ({error}): get the file again.") from error


def _refuse_pickles(where: str) -> None:
    here = Path(where)
    pickles = sorted(file.name for file in here.iterdir() if file.suffix in PICKLES) if here.is_dir() else []
    if pickles and not any(here.glob("*.safetensors")):
        raise InputError(
            f"{where} has only pickled weights ({pickles[0]}), which could run code: save them as safetensors "
            "(docs/comparison.md, Encoders)."
        )
