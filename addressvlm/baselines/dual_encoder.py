"""Two encoders into one space, photo and text (paper 002, Fig. 3): a CLIP-like model, or the halves of a vision-language model.

What is saved is an ordinary Hugging Face folder of that model, and `dual_encoder.json` beside it; for a vision-language model
also `projections.safetensors`.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoProcessor

from addressvlm.baselines.checkpoint_formats import checkpoint_format
from addressvlm.baselines.open_clip import load_open_clip_dual
from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import Address
from addressvlm.models.loading import dtype_of, load_model, local
from addressvlm.models.parts import part_of, parts_of
from addressvlm.storage.remote_path import AnyPath

DUAL_ENCODER_FILE, PROJECTIONS = "dual_encoder.json", "projections.safetensors"
DIMENSION = 256  # of the common space of projections that begin at random
FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0  # 1 / temperature, CLIP's own
LONGEST_TEXT = 512  # tokens; longer captions are cut

Tensors = dict[str, torch.Tensor]


class DualEncoder(nn.Module, ABC):
    """Photos and texts -> vectors of unit length.

    Attributes:
        model, processor: of transformers.
        log_scale: ln of 1 / temperature, learnt.
    """

    kind: str
    log_scale: nn.Parameter

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model, self.processor = model, processor

    @property
    def scale(self) -> torch.Tensor:
        """1 / temperature, at most `LARGEST_SCALE` unless it began higher."""
        return self.log_scale.exp().clamp(max=self.largest).reshape(())

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def pixels(self, images: Sequence[Image.Image]) -> Tensors:
        """What the image encoder takes."""
        made = self.processor.image_processor(images=list(images), return_tensors="pt")
        return {k: v.to(self.model.dtype) if torch.is_floating_point(v) else v for k, v in made.items()}

    def tokens(self, texts: Sequence[str]) -> Tensors:
        """What the text encoder takes; longer texts than it has positions for are cut at their end."""
        padding = "max_length" if self.model.config.model_type.startswith("siglip") else True  # as it was trained
        made = self.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=self.context, padding_side="right", return_tensors="pt"
        )
        return {name: value for name, value in made.items() if name in ("input_ids", "attention_mask")}

    @property
    def context(self) -> int:
        """The most tokens of a text."""
        text = self.model.config.get_text_config()
        known = getattr(text, "max_position_embeddings", None) or LONGEST_TEXT
        return min(known, self.tokenizer.model_max_length, LONGEST_TEXT)

    @property
    def device(self) -> torch.device:
        return self.log_scale.device

    @abstractmethod
    def image_states(self, pixels: Tensors) -> torch.Tensor:
        """One vector a photo, before `project_images`; what the image encoder alone decides."""

    @abstractmethod
    def text_states(self, tokens: Tensors) -> torch.Tensor:
        """One vector a text, before `project_texts`; what the text encoder alone decides."""

    def project_images(self, states: torch.Tensor) -> torch.Tensor:
        """States (N, S) -> unit vectors (N, D)."""
        return F.normalize(states.float(), dim=-1)

    def project_texts(self, states: torch.Tensor) -> torch.Tensor:
        """States (N, S) -> unit vectors (N, D)."""
        return F.normalize(states.float(), dim=-1)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Photos -> unit vectors (N, D), float32."""
        return self.project_images(self.image_states(_to(self.pixels(images), self.device)))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], at_once: int = 64) -> torch.Tensor:
        """Texts -> unit vectors (N, D), float32, encoded `at_once` at a time."""
        parts = [texts[start : start + at_once] for start in range(0, len(texts), at_once)]
        return torch.cat([self.project_texts(self.text_states(_to(self.tokens(part), self.device))) for part in parts])

    @abstractmethod
    def learning(self, image: bool, text: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Weights of the encoders that learn if that one shall, and those that begin at random and learn at any rate."""

    @abstractmethod
    def eyes(self) -> list[nn.Module]:
        """The image encoder."""

    @abstractmethod
    def reader(self) -> list[nn.Module]:
        """The text encoder."""

    def save(self, folder: Path) -> None:
        """Write the folder; `open_encoder` reads it."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        (folder / DUAL_ENCODER_FILE).write_text(json.dumps({"kind": self.kind, "largest_scale": self.largest}))

    def _begin(self, largest: float | None = None) -> None:
        self.largest = largest or max(LARGEST_SCALE, float(self.log_scale.detach().exp().max()))


class ClipLike(DualEncoder):
    """A model with image and text features of its own, such as CLIP or SigLIP; nothing is added to it."""

    kind = "clip"

    def __init__(self, model: Any, processor: Any, largest: float | None = None) -> None:
        super().__init__(model, processor)
        self.log_scale = model.logit_scale
        self._begin(largest)

    def image_states(self, pixels: Tensors) -> torch.Tensor:
        return _vectors(self.model.get_image_features(**pixels))

    def text_states(self, tokens: Tensors) -> torch.Tensor:
        return _vectors(self.model.get_text_features(**tokens))

    def learning(self, image: bool, text: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        chosen = []
        for name, weights in self.model.named_parameters():
            if name in ("logit_scale", "logit_bias"):  # the bias of SigLIP's own loss changes no order
                continue
            if text if name.startswith("text") else image:
                chosen.append(weights)
        return chosen, [self.log_scale] if chosen else []

    def eyes(self) -> list[nn.Module]:
        return [module for name, module in self.model.named_children() if not name.startswith("text")]

    def reader(self) -> list[nn.Module]:
        return [module for name, module in self.model.named_children() if name.startswith("text")]


class PairedEncoders(DualEncoder):
    """The vision encoder with its adapter, and the language model, of a vision-language model.

    A photo is the mean of its image tokens as the language model gets them, a text the mean of the last hidden states of its
    tokens; each goes through a projection of its own that begins at random.
    """

    kind = "halves"

    def __init__(self, model: Any, processor: Any, largest: float | None = None) -> None:
        super().__init__(model, processor)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        width = model.config.get_text_config().hidden_size
        self.of_images, self.of_texts = _projection(width), _projection(width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))
        self.parts = parts_of(model)
        self._begin(largest)

    def image_states(self, pixels: Tensors) -> torch.Tensor:
        tokens = _vectors(self.model.model.get_image_features(**pixels))
        return torch.stack([one.mean(dim=0) for one in tokens])

    def text_states(self, tokens: Tensors) -> torch.Tensor:
        hidden = self.model.get_submodule(self.parts["llm"])(**tokens, use_cache=False).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)

    def project_images(self, states: torch.Tensor) -> torch.Tensor:
        return super().project_images(self.of_images(states.to(self.log_scale.dtype)))

    def project_texts(self, states: torch.Tensor) -> torch.Tensor:
        return super().project_texts(self.of_texts(states.to(self.log_scale.dtype)))

    def learning(self, image: bool, text: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        wanted = {"vision": image, "adapter": image, "llm": text}
        chosen = [
            weights for name, weights in self.model.named_parameters() if (part := part_of(name, self.parts)) and wanted[part]
        ]
        return chosen, [*self.of_images.parameters(), *self.of_texts.parameters(), self.log_scale]

    def eyes(self) -> list[nn.Module]:
        return [self.model.get_submodule(self.parts[part]) for part in ("vision", "adapter")]

    def reader(self) -> list[nn.Module]:
        return [self.model.get_submodule(self.parts["llm"])]

    def save(self, folder: Path) -> None:
        super().save(folder)
        save_file(self._own(), folder / PROJECTIONS)

    def _own(self) -> Tensors:
        return {name: value.contiguous() for name, value in self.state_dict().items() if not name.startswith("model.")}

    def restore(self, own: Tensors) -> None:
        """Put back what `projections.safetensors` holds.

        Raises:
            InputError: it is of another model.
        """
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in self._own().items()}:
            raise InputError(f"{PROJECTIONS} belongs to another model: train it again.")
        self.load_state_dict(own, strict=False)


def build_dual_encoder(base: str | None, vlm: str, dtype: str, seed: int, trust_remote_code: bool = False) -> DualEncoder:
    """A dual encoder that is to be trained, in eval mode, on the CPU.

    Args:
        base: folder or hub name of a CLIP-like model; without one the halves of `vlm` with projections drawn by `seed`.

    Raises:
        InputError: the model isn't there, has no safetensors, or is no dual encoder.
    """
    if base is None:
        model, processor = load_model(vlm, dtype, trust_remote_code)
        torch.manual_seed(seed)
        return PairedEncoders(model, processor).eval()
    return ClipLike(*clip_like(base, dtype, trust_remote_code)).eval()


def clip_like(name: str, dtype: str = "float32", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A model with `get_image_features` and `get_text_features` on the CPU and its processor; safetensors only.

    Raises:
        InputError: the model isn't there, has no safetensors, or has no such features.
    """
    where = local(name)
    if checkpoint_format(where) == "open_clip":
        return load_open_clip_dual(where, dtype)  # as a model of transformers
    try:
        processor = AutoProcessor.from_pretrained(where, backend="pil", trust_remote_code=trust_remote_code)
        model = AutoModel.from_pretrained(
            where, dtype=dtype_of(dtype), use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise InputError(f"dual encoder '{name}' can't be loaded: {' '.join(str(error).split())[:300]}.") from error
    if not (hasattr(model, "get_text_features") and hasattr(model, "logit_scale")):
        raise InputError(
            f"'{name}' is a {type(model).__name__}, which encodes no texts: give a CLIP- or SigLIP-like model, or leave `base` "
            "out to use the parts of model.base."
        )
    return model, processor


def open_encoder(folder: AnyPath, dtype: str = "float32", device: str | torch.device = "cpu") -> DualEncoder:
    """What `DualEncoder.save` wrote, in eval mode.

    Raises:
        InputError: the folder holds no dual encoder, or not all of it.
    """
    here = Path(local(str(folder)))
    try:
        about = json.loads((here / DUAL_ENCODER_FILE).read_text())
        if about["kind"] == ClipLike.kind:
            return ClipLike(*clip_like(str(here), dtype), about["largest_scale"]).eval().to(device)
        made = PairedEncoders(*load_model(str(here), dtype), about["largest_scale"])
        made.restore(load_file(here / PROJECTIONS))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{folder} holds no dual encoder ({' '.join(str(error).split())[:120]}): train it again.") from error
    return made.eval().to(device)


def _projection(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, DIMENSION, bias=False))


def _vectors(features: Any) -> Any:
    """The tensor in what transformers gives for features."""
    return getattr(features, "pooler_output", features)


def _to(tensors: Tensors, device: torch.device) -> Tensors:
    return {name: value.to(device) for name, value in tensors.items()}


class AddressIndex:
    """The addresses that an answer can be, each different text encoded once.

    Attributes:
        texts: the different texts, in the order of the list.
        index: number of each address's text, int64 (addresses,).
    """

    def __init__(self, encoder: DualEncoder, addresses: Iterable[Address]) -> None:
        """Addresses whose texts are the same, such as one that is listed twice, get the same score.

        Raises:
            InputError: there is no address.
        """
        written = [address.text() for address in addresses]
        if not written:
            raise InputError("there is no address to compare photos with: give a gazetteer that has some.")
        self.texts = list(dict.fromkeys(written))
        at = {text: number for number, text in enumerate(self.texts)}
        self.index = np.array([at[text] for text in written])
        self.encoder = encoder
        self._vectors_TD = encoder.encode_texts(self.texts)

    @torch.inference_mode()
    def scores(self, images: Sequence[Any]) -> np.ndarray:
        """Similarity / temperature of photos (PIL images) and addresses, float64 (photos, addresses).

        It is ln of the probability that the photo is of the address up to a constant, as the contrastive loss defines it.
        """
        found = self.encoder.scale.float() * self.encoder.encode_images(images) @ self._vectors_TD.T
        return found.double().cpu().numpy()[:, self.index]
