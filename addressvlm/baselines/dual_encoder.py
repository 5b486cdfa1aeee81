"""An image and a text encoder with a common space (paper 002, Fig. 3): a CLIP-like model, or parts of a vision-language model.

It is saved as an ordinary Hugging Face folder of that model with `dual_encoder.json`, and `projections.safetensors` for a
vision-language model.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

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
from addressvlm.models.families import parts_of
from addressvlm.models.loading import dtype_of, load_model, local
from addressvlm.storage.remote_path import AnyPath

DUAL_ENCODER_FILE, PROJECTIONS = "dual_encoder.json", "projections.safetensors"
DIMENSION = 256  # of the common space of randomly initialized projections
INITIAL_SCALE, MAX_SCALE = 1 / 0.07, 100.0  # 1 / temperature, as in CLIP
MAX_TEXT_TOKENS = 512  # longer captions are cut

Tensors = dict[str, torch.Tensor]


class DualEncoder(nn.Module, ABC):
    """Photos and texts -> vectors of unit length.

    Attributes:
        model, processor: of transformers.
        log_scale: ln of 1 / temperature, trained.
        of_images, of_texts: projections of the states; none in a CLIP-like model.
    """

    kind: str
    log_scale: nn.Parameter

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.of_images: nn.Module = nn.Identity()
        self.of_texts: nn.Module = nn.Identity()

    @property
    def scale(self) -> torch.Tensor:
        """1 / temperature, at most `MAX_SCALE` unless it was higher at the start."""
        return self.log_scale.exp().clamp(max=self.max_scale).reshape(())

    def pixels(self, images: Sequence[Image.Image]) -> Tensors:
        """The image encoder's inputs."""
        inputs = self.processor.image_processor(images=list(images), return_tensors="pt")
        return {k: v.to(self.model.dtype) if torch.is_floating_point(v) else v for k, v in inputs.items()}

    def tokens(self, texts: Sequence[str]) -> Tensors:
        """The text encoder's inputs; texts longer than its context are cut at their end."""
        config = self.model.config
        padding = "max_length" if config.model_type.startswith("siglip") else True  # as it was trained
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or MAX_TEXT_TOKENS
        context = min(positions, self.processor.tokenizer.model_max_length, MAX_TEXT_TOKENS)
        inputs = self.processor.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=context, padding_side="right", return_tensors="pt"
        )
        return {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}

    @property
    def device(self) -> torch.device:
        return self.log_scale.device

    @abstractmethod
    def image_states(self, pixels: Tensors) -> torch.Tensor:
        """The image encoder's vector of each photo, (N, S), before `project_images`."""

    @abstractmethod
    def text_states(self, tokens: Tensors) -> torch.Tensor:
        """The text encoder's vector of each text, (N, S), before `project_texts`."""

    def project_images(self, states: torch.Tensor) -> torch.Tensor:
        """States (N, S) -> unit vectors (N, D)."""
        return F.normalize(self.of_images(states.to(self.log_scale.dtype)).float(), dim=-1)

    def project_texts(self, states: torch.Tensor) -> torch.Tensor:
        """States (N, S) -> unit vectors (N, D)."""
        return F.normalize(self.of_texts(states.to(self.log_scale.dtype)).float(), dim=-1)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Photos -> unit vectors (N, D), float32."""
        return self.project_images(self.image_states(self._to_device(self.pixels(images))))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """Texts -> unit vectors (N, D), float32."""
        batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        return torch.cat([self.project_texts(self.text_states(self._to_device(self.tokens(batch)))) for batch in batches])

    def _to_device(self, tensors: Tensors) -> Tensors:
        return {name: value.to(self.device) for name, value in tensors.items()}

    @abstractmethod
    def encoder_modules(self, encoder: Literal["image", "text"]) -> list[nn.Module]:
        """The modules of the image or of the text encoder."""

    def trainable(self, image: bool, text: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Pretrained weights of the encoders that are to be trained, and the new weights, which always are."""
        modules = [*(self.encoder_modules("image") if image else []), *(self.encoder_modules("text") if text else [])]
        pretrained = [weights for module in modules for weights in module.parameters()]
        new = [weights for name, weights in self.named_parameters() if not name.startswith("model.")]
        return pretrained, new if pretrained or len(new) > 1 else []  # a temperature alone learns nothing

    def save(self, folder: Path) -> None:
        """Write the folder; `open_encoder` reads it."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        (folder / DUAL_ENCODER_FILE).write_text(json.dumps({"kind": self.kind, "largest_scale": self.max_scale}))

    def _set_scale(self, log_scale: nn.Parameter, max_scale: float | None) -> None:
        self.log_scale = log_scale
        self.max_scale = max_scale or max(MAX_SCALE, float(log_scale.detach().exp().max()))


class ClipLike(DualEncoder):
    """A model with its own image and text features, such as CLIP or SigLIP; nothing is added to it."""

    kind = "clip"

    def __init__(self, model: Any, processor: Any, max_scale: float | None = None) -> None:
        super().__init__(model, processor)
        self._set_scale(model.logit_scale, max_scale)

    def image_states(self, pixels: Tensors) -> torch.Tensor:
        return _vectors(self.model.get_image_features(**pixels))

    def text_states(self, tokens: Tensors) -> torch.Tensor:
        return _vectors(self.model.get_text_features(**tokens))

    def encoder_modules(self, encoder: Literal["image", "text"]) -> list[nn.Module]:
        is_text = encoder == "text"
        return [module for name, module in self.model.named_children() if name.startswith("text") == is_text]


class PairedEncoders(DualEncoder):
    """The vision encoder with its adapter, and the language model, of a vision-language model.

    A photo is the mean of its image tokens after the adapter, a text the mean of the last hidden states of its tokens; each has
    a randomly initialized projection.
    """

    kind = "halves"

    def __init__(self, model: Any, processor: Any, max_scale: float | None = None) -> None:
        super().__init__(model, processor)
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        width = model.config.get_text_config().hidden_size
        self.of_images, self.of_texts = (
            nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, DIMENSION, bias=False))
            for _ in range(2)
        )
        self.parts = parts_of(model)
        self._set_scale(nn.Parameter(torch.tensor(math.log(INITIAL_SCALE))), max_scale)

    def image_states(self, pixels: Tensors) -> torch.Tensor:
        tokens = _vectors(self.model.model.get_image_features(**pixels))
        return torch.stack([photo.mean(dim=0) for photo in tokens])

    def text_states(self, tokens: Tensors) -> torch.Tensor:
        hidden = self.model.get_submodule(self.parts["llm"])(**tokens, use_cache=False).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)

    def encoder_modules(self, encoder: Literal["image", "text"]) -> list[nn.Module]:
        parts = self.parts
        paths = [parts["vision"], parts["adapter"]] if encoder == "image" else [parts["llm"]]
        return [self.model.get_submodule(path) for path in paths]

    def save(self, folder: Path) -> None:
        super().save(folder)
        save_file(self.projection_state(), folder / PROJECTIONS)

    def projection_state(self) -> Tensors:
        """The weights of `projections.safetensors`."""
        return {name: value.contiguous() for name, value in self.state_dict().items() if not name.startswith("model.")}


def build_dual_encoder(base: str | None, vlm: str, dtype: str, seed: int, trust_remote_code: bool = False) -> DualEncoder:
    """A dual encoder before training, in eval mode, on the CPU.

    Args:
        base: folder or Hub name of a CLIP-like model; None takes parts of `vlm` with projections initialized by `seed`.

    Raises:
        InputError: the model is missing, has no safetensors, or is no dual encoder.
    """
    if base is None:
        model, processor = load_model(vlm, dtype, trust_remote_code)
        torch.manual_seed(seed)
        return PairedEncoders(model, processor).eval()
    return ClipLike(*load_clip_like(base, dtype, trust_remote_code)).eval()


def load_clip_like(name: str, dtype: str = "float32", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A CLIP-like model of transformers or open_clip on the CPU and its processor; safetensors only."""
    where = local(name)
    if checkpoint_format(where) == "open_clip":
        return load_open_clip_dual(where, dtype)
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
    """Load a folder of `DualEncoder.save`, in eval mode.

    Raises:
        InputError: the folder holds no dual encoder, or not all of it.
    """
    here = Path(local(str(folder)))
    try:
        about = json.loads((here / DUAL_ENCODER_FILE).read_text())
        if about["kind"] == ClipLike.kind:
            return ClipLike(*load_clip_like(str(here), dtype), about["largest_scale"]).eval().to(device)
        encoder = PairedEncoders(*load_model(str(here), dtype), about["largest_scale"])
        state = load_file(here / PROJECTIONS)
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in encoder.projection_state().items()}:
            raise InputError(f"{PROJECTIONS} belongs to another model: train it again.")
        encoder.load_state_dict(state, strict=False)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{folder} holds no dual encoder ({' '.join(str(error).split())[:120]}): train it again.") from error
    return encoder.eval().to(device)


def _vectors(features: Any) -> Any:
    """The tensor of a features output of transformers."""
    return getattr(features, "pooler_output", features)


class AddressIndex:
    """The encoded texts of all addresses, each distinct text encoded once, so that equal ones get equal scores."""

    def __init__(self, encoder: DualEncoder, addresses: Iterable[Address]) -> None:
        texts = [address.text() for address in addresses]
        if not texts:
            raise InputError("there is no address to compare photos with: give a gazetteer that has some.")
        self.texts = list(dict.fromkeys(texts))
        number = {text: n for n, text in enumerate(self.texts)}
        self.index = np.array([number[text] for text in texts])
        self.encoder = encoder
        self._vectors_TD = encoder.encode_texts(self.texts)

    @torch.inference_mode()
    def scores(self, images: Sequence[Any]) -> np.ndarray:
        """Similarity / temperature of photos (PIL images) and addresses, float64 (photos, addresses).

        That is ln p(address | photo) up to a constant, by the contrastive loss.
        """
        scores = self.encoder.scale.float() * self.encoder.encode_images(images) @ self._vectors_TD.T
        return scores.double().cpu().numpy()[:, self.index]
