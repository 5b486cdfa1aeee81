"""Image encoders for retrieval: models of transformers, CLIP in open_clip's format, MegaLoc, DINOv2 SALAD, or the vision
encoder of a vision-language model.

    Encoder("facebook/dinov2-base").encode(photos)  # float32 (N, 768), each of length 1

The vector of a photo, by kind of model:

- CLIP, SigLIP and other dual encoders: their image features, which are compared with texts;
- other image encoders (DINOv2, ViT, ResNet): the pooled output, else the class token;
- a place-recognition model (MegaLoc, SALAD, or one of remote code, `model.trust_remote_code`): its descriptor;
- a vision-language model: the mean of the adapter's inputs.
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
from addressvlm.models.families import parts_of
from addressvlm.models.loading import dtype_of, load_model, local, to_device
from addressvlm.storage.shards import Rows, ShardResult

LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, SafetensorError)
OTHER_FORMATS: dict[str, Callable[[str, str], tuple[Any, Any]]] = {
    "open_clip": load_open_clip,
    "places": load_place_recognition,
}


class Encoder:
    """An image encoder, loaded.

    Args:
        base: folder, URI or Hub name; `toy` is the embedded model.
        dtype: of the weights, see `addressvlm.models.loading.dtype_of`.
        device: `cuda` where there is one, else `cpu`.

    Raises:
        InputError: it is missing or not an image encoder.
    """

    def __init__(self, base: str, dtype: str = "float32", trust_remote_code: bool = False, device: str | None = None) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        where, options = local(base), {"trust_remote_code": trust_remote_code}
        load, is_vlm, model = OTHER_FORMATS.get(checkpoint_format(where)), False, None
        if load:
            model, self._processor = load(where, dtype)
        else:
            try:
                is_vlm = AutoConfig.from_pretrained(where, **options).model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
                if not is_vlm:
                    self._processor = AutoImageProcessor.from_pretrained(where, backend="pil", **options)
                    model = AutoModel.from_pretrained(where, dtype=dtype_of(dtype), use_safetensors=True, **options)
            except LOAD_ERRORS as error:
                reason = " ".join(str(error).split())[:300]
                raise InputError(
                    f"'{base}' can't be loaded as an image encoder ({reason}): give a folder or hub name of one."
                ) from error
        if is_vlm:
            model, processor = load_model(base, dtype, trust_remote_code)
            model.set_submodule(parts_of(model)["llm"], torch.nn.Identity())
            self._processor = processor.image_processor
        self._model = to_device(model, self.device).eval()
        self._features = self._adapter_inputs if is_vlm else self._pooled

    @torch.inference_mode()
    def encode(self, photos: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors, float32 (photos, D); InputError if the model's output is not one vector a photo."""
        vectors = self._features([photo.convert("RGB") for photo in photos]).float()
        return torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()

    def _inputs(self, photos: Sequence[Image.Image]) -> dict[str, Any]:
        inputs = self._processor(images=list(photos), return_tensors="pt").to(self.device)
        return {k: v.to(self._model.dtype) if torch.is_floating_point(v) else v for k, v in inputs.items()}

    def _pooled(self, photos: Sequence[Image.Image]) -> torch.Tensor:
        """An image encoder's output, (N, D)."""
        output = getattr(self._model, "get_image_features", self._model)(**self._inputs(photos))
        vectors = output if isinstance(output, torch.Tensor) else getattr(output, "pooler_output", None)
        if vectors is None and getattr(output, "last_hidden_state", None) is not None:
            vectors = output.last_hidden_state[:, 0]
        if vectors is None or len(vectors) != len(photos) or vectors.flatten(1).shape != vectors.shape[:2]:
            raise InputError(f"{type(self._model).__name__} gives no vector a photo: name another encoder.base.")
        return vectors.flatten(1)

    def _adapter_inputs(self, photos: Sequence[Image.Image]) -> torch.Tensor:
        """The mean of the adapter's inputs over each photo's patches, (N, D)."""
        patches: list[torch.Tensor] = []
        adapter = self._model.get_submodule(parts_of(self._model)["adapter"])
        hook = adapter.register_forward_pre_hook(lambda _, inputs: patches.append(inputs[0]))
        try:
            self._model.get_image_features(**self._inputs(photos))
            if patches[0].dim() == 3 and len(patches[0]) == len(photos):
                return patches[0].float().mean(1)
            patches.clear()  # all photos' patches in one row, or several views a photo
            for photo in photos:
                self._model.get_image_features(**self._inputs([photo]))
        finally:
            hook.remove()
        return torch.stack([photo_patches.float().flatten(0, -2).mean(0) for photo_patches in patches])


def embed_photos(
    base: str, dtype: str, trust_remote_code: bool, threads: float, batch_size: int, split: str, photos: Rows
) -> ShardResult:
    """Rows of `tables.PHOTOS` -> rows of `split` with `vector` instead of `image`; the encoder stays loaded."""
    encoder, rows = _cached_encoder(base, dtype, trust_remote_code, threads), []
    for start in range(0, len(photos), batch_size):
        batch = photos[start : start + batch_size]
        vectors = encoder.encode([photo_image(photo) for photo in batch])
        for photo, vector in zip(batch, vectors, strict=True):
            rows.append({key: value for key, value in photo.items() if key != "image"} | {"vector": vector})
    return ShardResult({split: rows})


@lru_cache(maxsize=1)
def _cached_encoder(base: str, dtype: str, trust_remote_code: bool, threads: float) -> Encoder:
    torch.set_num_threads(max(1, int(threads)))
    disable_progress_bar()
    return Encoder(base, dtype, trust_remote_code)
