"""Photos as vectors: any image encoder of transformers, CLIP in open_clip's format, MegaLoc and DINOv2 SALAD, or the vision
encoder of a vision-language model.

    Encoder("facebook/dinov2-base").encode(photos)  # float32 (N, 768), each of length 1

What a vector is, by kind of model:

- CLIP, SigLIP and other dual encoders: their own image features, which their texts are compared with;
- other image encoders (DINOv2, ViT, ResNet): the pooled output, else the class token;
- a place-recognition model (MegaLoc, SALAD, or one of remote code, `model.trust_remote_code`): the descriptor that it gives;
- a vision-language model: the mean over what its adapter is given of the photo, before the adapter itself.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from addressvlm.baselines.checkpoint_formats import checkpoint_format
from addressvlm.baselines.open_clip import load_open_clip
from addressvlm.baselines.place_recognition import load_place_recognition
from addressvlm.errors import InputError
from addressvlm.evaluation.run_questions import photo_image
from addressvlm.models.loading import dtype_of, load_model, local, to_device
from addressvlm.models.parts import parts_of
from addressvlm.storage.shards import Rows, ShardResult

CANT_LOAD = (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, SafetensorError)
OTHER_FORMATS: dict[str, Callable[[str, str], tuple[Any, Any]]] = {
    "open_clip": load_open_clip,
    "places": load_place_recognition,
}


class Encoder:
    """An image encoder, loaded.

    Args:
        base: folder, URI or hub name; `toy` is the embedded model.
        dtype: of the weights, see `addressvlm.models.loading.dtype_of`.
        device: `cuda` where there is one, else `cpu`.

    Raises:
        InputError: it is not there, or is no image encoder.
    """

    def __init__(self, base: str, dtype: str = "float32", trust_remote_code: bool = False, device: str | None = None) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        where, speaks = local(base), False
        other = OTHER_FORMATS.get(checkpoint_format(where))
        if other:
            model, self._processor = other(where, dtype)
        else:
            speaks = _config(base, trust_remote_code).model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
            model, self._processor = (_vision_part if speaks else _image_encoder)(base, dtype, trust_remote_code)
        self._model = to_device(model, self.device).eval()
        self._features = self._before_adapter if speaks else self._pooled

    @torch.inference_mode()
    def encode(self, photos: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors, float32 (photos, D).

        Raises:
            InputError: the model gives something else than one vector a photo.
        """
        vectors = self._features([photo.convert("RGB") for photo in photos]).float()
        return torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()

    def _inputs(self, photos: Sequence[Image.Image]) -> dict[str, Any]:
        made = self._processor(images=list(photos), return_tensors="pt").to(self.device)
        return {k: v.to(self._model.dtype) if torch.is_floating_point(v) else v for k, v in made.items()}

    def _pooled(self, photos: Sequence[Image.Image]) -> torch.Tensor:
        """What an image encoder makes of the photos, (N, D)."""
        inputs = self._inputs(photos)
        out = getattr(self._model, "get_image_features", self._model)(**inputs)
        found = out if isinstance(out, torch.Tensor) else getattr(out, "pooler_output", None)
        if found is None and getattr(out, "last_hidden_state", None) is not None:
            found = out.last_hidden_state[:, 0]
        if found is None or len(found) != len(photos) or found.flatten(1).shape != found.shape[:2]:
            raise InputError(f"{type(self._model).__name__} gives no vector a photo: name another encoder.base.")
        return found.flatten(1)

    def _before_adapter(self, photos: Sequence[Image.Image]) -> torch.Tensor:
        """The mean over the photo's patches before the adapter, (N, D)."""
        seen: list[torch.Tensor] = []
        adapter = self._model.get_submodule(parts_of(self._model)["adapter"])
        hook = adapter.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            self._model.get_image_features(**self._inputs(photos))
            if seen[0].dim() == 3 and len(seen[0]) == len(photos):
                return seen[0].float().mean(1)
            seen.clear()  # all photos' patches in one row, or several views a photo
            for photo in photos:
                self._model.get_image_features(**self._inputs([photo]))
        finally:
            hook.remove()
        return torch.stack([patches.float().flatten(0, -2).mean(0) for patches in seen])


def _config(base: str, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(local(base), trust_remote_code=trust_remote_code)
    except CANT_LOAD as error:
        raise _refused(base, error) from error


def _image_encoder(base: str, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Model and image processor of an encoder."""
    where = local(base)
    try:
        processor = AutoImageProcessor.from_pretrained(where, backend="pil", trust_remote_code=trust_remote_code)
        model = AutoModel.from_pretrained(
            where, dtype=dtype_of(dtype), use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except CANT_LOAD as error:
        raise _refused(base, error) from error
    return model, processor


def _vision_part(base: str, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """A vision-language model without its language model, and its image processor."""
    model, processor = load_model(base, dtype, trust_remote_code)
    model.set_submodule(parts_of(model)["llm"], torch.nn.Identity())
    return model, processor.image_processor


def _refused(base: str, error: Exception) -> InputError:
    said = " ".join(str(error).split())[:300]
    return InputError(f"'{base}' can't be loaded as an image encoder ({said}): give a folder or hub name of one.")


def embed_photos(
    base: str, dtype: str, trust_remote_code: bool, threads: float, batch_size: int, split: str, photos: Rows
) -> ShardResult:
    """Rows of `tables.PHOTOS` -> the same with `vector` instead of `image`; the encoder stays loaded.

    Args:
        threads: that a worker may use.
        split: that the rows go to.

    Raises:
        InputError: as Encoder.
    """
    encoder, rows = _loaded(base, dtype, trust_remote_code, threads), []
    for start in range(0, len(photos), batch_size):
        batch = photos[start : start + batch_size]
        vectors = encoder.encode([photo_image(photo) for photo in batch])
        for photo, vector in zip(batch, vectors, strict=True):
            rows.append({key: value for key, value in photo.items() if key != "image"} | {"vector": vector})
    return ShardResult({split: rows})


@lru_cache(maxsize=1)
def _loaded(base: str, dtype: str, trust_remote_code: bool, threads: float) -> Encoder:
    torch.set_num_threads(max(1, int(threads)))
    disable_progress_bar()
    return Encoder(base, dtype, trust_remote_code)
