"""Load a vision-language model and its processor, any family that `AutoModelForImageTextToText` knows."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from addressvlm.errors import InputError
from addressvlm.models import block_attention
from addressvlm.models.families import CAUSAL_ATTENTION, check_image_token, parts_of
from addressvlm.storage.files import local_model_copy
from addressvlm.storage.remote_path import RemotePath, is_remote, path_of

MANY_CONVOLUTIONS = 8  # a convolutional vision encoder has more, a transformer has one
TOY_BASE = Path(__file__).parents[1] / "demo" / "base"


def resolve_model(name: str) -> str:
    """Resolve `model.base`: the built-in model's folder for `toy`, else folder, URI or hub name.

    Raises:
        InputError: the folder is missing or holds no model.
    """
    if name == "toy":
        return str(TOY_BASE)
    folder = path_of(name)
    if isinstance(folder, RemotePath) or folder.is_dir():
        if not any((folder / about).is_file() for about in ("config.json", "open_clip_config.json")):
            raise InputError(f"{folder} holds no model (no config.json): give the folder that save_pretrained wrote.")
        return str(folder)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise InputError(f"no model folder {name}: give an existing folder, a hub name like owner/model, or `toy`.")
    return name


def local(name: str) -> str:
    """As `resolve_model`, but a folder in remote storage is copied to this machine.

    Raises:
        InputError: as `resolve_model`, or the storage can't be read.
    """
    where = resolve_model(name)
    return str(local_model_copy(where)) if is_remote(where) else where


def load_model(
    name: str, dtype: str = "float32", trust_remote_code: bool = False, attention: str | None = None
) -> tuple[Any, Any]:
    """Model in eval mode on the CPU and its processor; safetensors only.

    Args:
        dtype: of the weights, see `dtype_of`.
        attention: an attention implementation of transformers; by default its own choice where there is a GPU, else
            `eager`, whose step on a CPU takes a quarter less in bfloat16 than that of `sdpa` (float32: a twentieth).

    Raises:
        InputError: the model or its processor isn't there, isn't a vision-language model, or has no chat template.
    """
    where = local(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    attention = attention or (None if torch.cuda.is_available() else "eager")
    try:
        # The Pillow image processors: the default ones need torchvision, which has no CPU build.
        processor = AutoProcessor.from_pretrained(where, backend="pil", **options)
        model = AutoModelForImageTextToText.from_pretrained(
            where, dtype=dtype_of(dtype), use_safetensors=True, attn_implementation=attention, **options
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise InputError(f"model '{name}' can't be loaded: {' '.join(str(error).split())[:300]}.") from error
    if not getattr(processor, "chat_template", None):
        raise InputError(f"model '{name}' has no chat template: add chat_template.jinja to its folder.")
    check_image_token(model, processor, name)
    return model.eval(), processor


def dtype_of(name: str) -> torch.dtype:
    """The dtype float32 or bfloat16 by name; auto is bfloat16 where the device has instructions for it."""
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 matrix instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def autocast(device: torch.device, weights: torch.dtype, precision: str) -> torch.autocast:
    """The context of a forward pass: matrix products and convolutions in bfloat16, sums and norms in float32; or nothing.

    Args:
        weights: dtype of the base model; with bfloat16 weights beside float32 adapters the products are in bfloat16.
        precision: float32, bfloat16, or auto, which is bfloat16 where the device multiplies it faster than float32.
    """
    enabled = multiplies_bfloat16(device) if precision == "auto" else precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled or weights == torch.bfloat16)


def to_device(model: Any, device: str | torch.device) -> Any:
    """The model on a device; on a CPU, a convolutional encoder is stored channels-last."""
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    if torch.device(device).type == "cpu" and convolutions > MANY_CONVOLUTIONS:
        model.to(memory_format=torch.channels_last)  # a fifth off a ResNet's time
    return model.to(device)


def context_length(model: Any) -> int | None:
    """The model's context length in tokens, None if its configuration has none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def enable_packing(model: Any, packing: str, device: torch.device, name: str) -> bool:
    """Decide whether conversations share a row; if so, switch the language model to block attention.

    Args:
        packing: `train.packing`. `auto` packs on CPUs, where padding costs as much as tokens. On GPUs rows of this data are
            about equally long, and one batched product is worth more than the padding.
        name: the base model's, for the error.

    Raises:
        InputError: packing is `on` and the model's attention does not support it.
    """
    text = model.config.get_text_config()
    supported = text.model_type in CAUSAL_ATTENTION and not getattr(text, "sliding_window", None)
    if packing == "on" and not supported:
        raise InputError(
            f"train.packing is on, which the attention of {name} ({text.model_type}) does not allow: set it to auto."
        )
    if packing == "off" or not supported or (packing == "auto" and device.type != "cpu"):
        return False
    path = parts_of(model)["llm"]
    model.get_submodule(path).set_attn_implementation(block_attention.register())
    return True
