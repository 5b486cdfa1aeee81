"""Folders of tiny encoders in the formats of open_clip, MegaLoc and SALAD, with the names of tensors that these have."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from addressvlm.tools.toy_base import train_tokenizer
from tests.support.tiny import TEXT

Shapes = dict[str, tuple[int, ...]]
VOCABULARY, CONTEXT, EMBED = 330, 24, 16
PLAIN_CFG: dict[str, Any] = {
    "embed_dim": EMBED,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 24, "head_width": 6, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 12, "heads": 2, "layers": 1},
}
SIGLIP_CFG: dict[str, Any] = {
    "embed_dim": EMBED,
    "custom_text": True,
    "init_logit_bias": -10,
    "vision_cfg": {
        "image_size": 32, "timm_model_name": "vit_base_patch16_siglip_224", "timm_model_pretrained": False, "timm_pool": "map",
        "timm_proj": "none", "timm_model_kwargs": {"embed_dim": EMBED, "depth": 2, "num_heads": 2, "img_size": 32},
    },
    "text_cfg": {
        "context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 12, "heads": 2, "layers": 1, "mlp_ratio": 3.7362,
        "tokenizer_kwargs": {"clean": "canonicalize"}, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
        "norm_kwargs": {"eps": 0.01}, "act_kwargs": {"approximate": "tanh"},
    },
}  # fmt: skip
SQUASH = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}
SHORTEST = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bilinear", "resize_mode": "shortest"}
WIDTH = 64  # of the DINOv2: one head


def random_tensors(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Random tensors that depend on their names alone; this generator of numpy never changes."""
    tensors = {}
    for name, shape in shapes.items():
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        scaled = 1.5 * noise / np.prod(shape[1:]) ** 0.5 if len(shape) > 1 else 0.5 + 0.3 * noise
        tensors[name] = torch.tensor(scaled, dtype=torch.float32)
    return tensors


def photo(seed: int) -> Image.Image:
    coarse = np.random.RandomState(seed).randint(0, 256, (5, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((60, 45), Image.Resampling.BICUBIC)


def with_bias(**weights: tuple[int, ...]) -> Shapes:
    """Names with __ for dots -> shapes of weights and biases."""
    dotted = {name.replace("__", "."): shape for name, shape in weights.items()}
    return {
        key: size for name, shape in dotted.items() for key, size in ((f"{name}.weight", shape), (f"{name}.bias", shape[:1]))
    }


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def open_clip_layer(w: int, hidden: int) -> Shapes:
    block = with_bias(ln_1=(w,), ln_2=(w,), attn__out_proj=(w, w), mlp__c_fc=(hidden, w), mlp__c_proj=(w, hidden))
    return block | {"attn.in_proj_weight": (3 * w, w), "attn.in_proj_bias": (3 * w,)}


def open_clip_text(hidden: int) -> Shapes:
    spread = {"token_embedding.weight": (VOCABULARY, 12), "positional_embedding": (CONTEXT, 12)}
    return spread | with_bias(ln_final=(12,)) | prefixed("transformer.resblocks.0.", open_clip_layer(12, hidden))


def plain_shapes() -> Shapes:
    image = {"class_embedding": (24,), "positional_embedding": (17, 24), "conv1.weight": (24, 3, 8, 8), "proj": (24, EMBED)}
    image |= with_bias(ln_pre=(24,), ln_post=(24,))
    for number in range(2):
        image |= prefixed(f"transformer.resblocks.{number}.", open_clip_layer(24, 96))
    return prefixed("visual.", image) | open_clip_text(48) | {"text_projection": (12, EMBED), "logit_scale": ()}


def siglip_shapes() -> Shapes:
    w = EMBED
    mlp, pool = {"mlp__fc1": (4 * w, w), "mlp__fc2": (w, 4 * w)}, {"q": (w, w), "kv": (2 * w, w), "proj": (w, w), "norm": (w,)}
    image = {"pos_embed": (1, 4, w), "attn_pool.latent": (1, 1, w)} | with_bias(patch_embed__proj=(w, 3, 16, 16), norm=(w,))
    image |= prefixed("attn_pool.", with_bias(**pool, **mlp))
    for number in range(2):
        layer = with_bias(norm1=(w,), norm2=(w,), attn__qkv=(3 * w, w), attn__proj=(w, w), **mlp)
        image |= prefixed(f"blocks.{number}.", layer)
    text = open_clip_text(44) | with_bias(text_projection=(w, 12))
    return prefixed("visual.trunk.", image) | prefixed("text.", text) | {"logit_scale": (), "logit_bias": ()}


def dino_shapes() -> Shapes:
    w = WIDTH
    shapes = {"cls_token": (1, 1, w), "pos_embed": (1, 17, w)} | with_bias(patch_embed__proj=(w, 3, 14, 14), norm=(w,))
    for number in range(2):
        layer = with_bias(
            norm1=(w,), norm2=(w,), attn__qkv=(3 * w, w), attn__proj=(w, w), mlp__fc1=(4 * w, w), mlp__fc2=(w, 4 * w)
        )
        shapes |= prefixed(f"blocks.{number}.", layer | {"ls1.gamma": (w,), "ls2.gamma": (w,)})
    return shapes


def salad_shapes(hidden: int) -> Shapes:
    mlps = {"token_features": (2, 5, 2), "cluster_features": (3, 4, 4), "score": (3, 3, 4)}
    shapes: Shapes = {"dust_bin": ()}
    for name, (last, out, dimensions) in mlps.items():
        one = (1,) * (dimensions - 2)
        shapes |= with_bias(**{f"{name}__0": (hidden, WIDTH, *one), f"{name}__{last}": (out, hidden, *one)})
    return shapes


def salad_weights() -> Shapes:
    return prefixed("backbone.model.", dino_shapes() | {"mask_token": (1, WIDTH)}) | prefixed("aggregator.", salad_shapes(512))


def megaloc_weights() -> Shapes:
    linear = with_bias(aggregator__linear=(8, 3 * 4 + 5))
    return prefixed("backbone.", dino_shapes()) | prefixed("aggregator.agg.", salad_shapes(20)) | linear


def write_open_clip(folder: Path, cfg: dict[str, Any] = PLAIN_CFG, photos: dict[str, Any] = SHORTEST) -> Path:
    """Write a tiny CLIP or SigLIP of open_clip and return its folder."""
    shapes = siglip_shapes() if "timm_model_name" in cfg["vision_cfg"] else plain_shapes()
    tokenizer = train_tokenizer(TEXT, VOCABULARY)
    tokenizer.save_pretrained(folder)
    save_file(random_tensors(shapes), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": photos}))
    return folder


def write_places(folder: Path, shapes: Shapes, **settings: Any) -> Path:
    """Write a tiny SALAD or MegaLoc and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(random_tensors(shapes), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
