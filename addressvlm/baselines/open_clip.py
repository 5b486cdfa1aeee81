"""Dual encoders in open_clip's own format (`open_clip_config.json`, `open_clip_model.safetensors`) as models of transformers.

Those with open_clip's own vision transformer become a CLIPModel, those with timm's SigLIP tower a SiglipModel; both give the
vectors that open_clip gives. Other architectures are refused.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from tokenizers import Regex, normalizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from addressvlm.baselines.checkpoint_formats import (
    OPEN_CLIP_CONFIG,
    CheckpointWeights,
    build_and_load,
    path_in,
    settings_of,
    weights_of,
)
from addressvlm.errors import InputError
from addressvlm.models.loading import dtype_of

# Buffers of old files, and the bias of SigLIP's loss, which CLIPModel has no place for and which changes no order
IGNORED_NAMES = ("attn_mask", "text.attn_mask", "input_resolution", "context_length", "vocab_size", "logit_bias")
LAYER_NAMES = (
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn.qkv.", "attn.in_proj_"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)
PLAIN_IMAGE_NAMES = (
    ("vision_model.", "visual."),
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.patch_embedding", "conv1"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("pre_layrnorm", "ln_pre"),
    ("post_layernorm", "ln_post"),
    ("visual_projection.weight", "visual.proj"),
    *LAYER_NAMES,
)
TIMM_IMAGE_NAMES = (
    ("vision_model.", "visual.trunk."),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("encoder.layers.", "blocks."),
    ("layer_norm", "norm"),
    ("self_attn.qkv", "attn.qkv"),
    ("self_attn.out_proj", "attn.proj"),
    ("post_layernorm", "norm"),
    ("head.probe", "attn_pool.latent"),
    ("head.attention.out_proj", "attn_pool.proj"),
    ("head.layernorm", "attn_pool.norm"),
    ("head.mlp", "attn_pool.mlp"),
)
TEXT_NAMES = (
    ("text_model.", ""),
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm", "ln_final"),
    *LAYER_NAMES,
)
CLIP_TEXT_NAMES, SIGLIP_TEXT_NAMES = (
    (*TEXT_NAMES, ("text_projection.weight", "text_projection")),
    (*TEXT_NAMES, ("head", "text_projection")),
)


def rename_clip(weights: CheckpointWeights) -> Callable[[str], torch.Tensor]:
    """The source of CLIPModel's weights; its projections lie on their other side there."""
    before = _before_text(weights)

    def source(name: str) -> torch.Tensor:
        if name == "logit_scale":
            return weights[name].reshape(())
        found = (
            weights.renamed(name, CLIP_TEXT_NAMES, before)
            if name.startswith("text")
            else weights.renamed(name, PLAIN_IMAGE_NAMES)
        )
        return found.T if name in ("visual_projection.weight", "text_projection.weight") else found

    return source


def rename_siglip(weights: CheckpointWeights) -> Callable[[str], torch.Tensor]:
    """The source of SiglipModel's weights."""
    before = _before_text(weights)

    def source(name: str) -> torch.Tensor:
        if name in ("logit_scale", "logit_bias"):
            return weights[name].reshape(1)
        if name.startswith("text"):
            return weights.renamed(name, SIGLIP_TEXT_NAMES, before)
        if ".in_proj_" in name:
            kind = name.rpartition("_")[2]
            return torch.cat([weights[f"visual.trunk.attn_pool.{part}.{kind}"] for part in ("q", "kv")])
        found = weights.renamed(name, TIMM_IMAGE_NAMES)
        return found[0] if "position_embedding" in name else found

    return source


def _before_text(weights: CheckpointWeights) -> str:
    """Text encoders are a part of their own in some models and spread out in others."""
    return "text." if "text.token_embedding.weight" in weights else ""


WEIGHTS, TOKENIZER = "open_clip_model.safetensors", "tokenizer.json"
EPSILON = 1e-5  # of torch's LayerNorm
HEADS = {"vit_base": 12, "vit_large": 16, "vit_so400m": 16, "vit_giantopt": 16}  # of timm's SigLIP towers
TANH = ("vit_base_patch32", "vit_large_patch16_siglip_512", "vit_so400m_patch16", "vit_giantopt")  # the others: exact GELU

# What is read, with open_clip's defaults; what has to have one of some values; what changes no vector. The rest has to be off.
VISION = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
TEXT_SETTINGS = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
TIMM = ("image_size", "timm_model_name", "timm_model_kwargs")
TIMM_READ = {"num_heads", "embed_dim", "depth", "mlp_ratio", "img_size", "patch_size"}  # from settings or shapes
PLAIN_IMAGE_SETTINGS = {"pool_type": (None, "tok"), "block_type": (None, "default"), "timm_model_name": (None, "")}
SIGLIP_IMAGE = {"timm_pool": ("map",), "timm_proj": ("none",)}
PLAIN_TEXT = {
    "pool_type": (None, "argmax"),
    "proj_type": (None, "linear"),
    "text_arch": (None, "clip"),
    "block_type": (None, "default"),
}
SIGLIP_TEXT_SETTINGS = PLAIN_TEXT | {"pool_type": ("last",), "no_causal_mask": (True,), "proj_bias": (True,)}
HARMLESS = {
    "output_tokens", "patch_dropout", "pos_embed_type", "final_ln_after_pool", "attn_pooler_queries", "attn_pooler_heads",
    "act_kwargs", "norm_kwargs", "timm_model_pretrained", "timm_drop", "timm_drop_path", "hf_model_pretrained", "hf_proj_type",
    "hf_pooler_type", "hf_tokenizer_name", "tokenizer_kwargs", "pad_id", "bos_id", "eos_id",
}  # fmt: skip


@dataclass(frozen=True)
class OpenClipSettings:
    """What `open_clip_config.json` says.

    Attributes:
        where: folder or hub name.
        model: its section `model_cfg`.
        vision, text: `vision_cfg` and `text_cfg` in it.
        photos: its section `preprocess_cfg`.
    """

    where: str
    model: dict[str, Any]
    vision: dict[str, Any]
    text: dict[str, Any]
    photos: dict[str, Any]

    @classmethod
    def read(cls, where: str) -> "OpenClipSettings":
        """Raises:
        InputError: it isn't there, or lacks a section.
        """
        said = settings_of(where, OPEN_CLIP_CONFIG) or {}
        model, photos = said.get("model_cfg"), said.get("preprocess_cfg") or {}
        sections = [photos, *((model.get(part) for part in ("vision_cfg", "text_cfg")) if isinstance(model, dict) else [None])]
        if not all(isinstance(section, dict) for section in sections) or not isinstance(model, dict):
            raise InputError(f"{OPEN_CLIP_CONFIG} of '{where}' has no model_cfg with vision_cfg and text_cfg: get it again.")
        return cls(where, model, model["vision_cfg"], model["text_cfg"], photos)

    @property
    def timm(self) -> str:
        """The name of timm's image tower; empty for open_clip's own."""
        return self.vision.get("timm_model_name") or ""

    def refuse(self, key: str, value: Any) -> NoReturn:
        raise InputError(
            f"'{self.where}' has {key} {value!r} in {OPEN_CLIP_CONFIG}, which no model of transformers has: give a plain ViT "
            "or a SigLIP of open_clip, or a model in transformers' own format."
        )

    def allow(self, part: str, values: dict[str, tuple[Any, ...]], read: Collection[str]) -> None:
        """Make sure that a section asks for nothing that would be lost.

        Raises:
            InputError: it does.
        """
        section = getattr(self, part)
        for key, allowed in values.items():
            if section.get(key) not in allowed:
                self.refuse(f"{part}_cfg.{key}", section.get(key))
        for key, value in section.items():
            if value and key not in {*values, *read, *HARMLESS} and (self.timm or not key.startswith("timm_")):
                self.refuse(f"{part}_cfg.{key}", value)


def load_open_clip(where: str, dtype: str) -> tuple[Any, Any]:
    """A dual encoder in eval mode on the CPU and its image processor.

    Args:
        where: folder or hub name.
        dtype: see `dtype_of`.

    Raises:
        InputError: the files aren't all there or don't fit each other, or it is of an architecture that transformers hasn't.
    """
    about = OpenClipSettings.read(where)
    if about.timm:
        _check_siglip(about)
    else:
        about.allow("vision", PLAIN_IMAGE_SETTINGS, VISION)
        about.allow("text", PLAIN_TEXT, TEXT_SETTINGS)
    processor, weights = _image_processor(about), weights_of(where, WEIGHTS)
    try:
        config = _siglip(about, weights) if about.timm else _clip(about)
    except (KeyError, TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{OPEN_CLIP_CONFIG} of '{where}' makes no model ({said}): get it again.") from error
    kind, source = (SiglipModel, rename_siglip(weights)) if about.timm else (CLIPModel, rename_clip(weights))
    model = build_and_load(kind, config, dtype_of(dtype), weights, source)
    weights.finish(IGNORED_NAMES)
    return model, processor


def load_open_clip_dual(where: str, dtype: str) -> tuple[Any, Any]:
    """The same with the processor of its photos and texts.

    Raises:
        InputError: as `load_open_clip`, or it has no tokenizer.json or cleans texts in another way than is known.
    """
    about = OpenClipSettings.read(where)
    tokenizer = _tokenizer(about)
    model, photos = load_open_clip(where, dtype)
    return model, (SiglipProcessor if about.timm else CLIPProcessor)(photos, tokenizer)


def _clip(about: OpenClipSettings) -> CLIPConfig:
    vision, width = VISION | about.vision, about.model["embed_dim"]
    if not isinstance(vision["layers"], int):
        about.refuse("vision_cfg.layers", vision["layers"])  # a ResNet
    image = _layers(about, vision, vision["width"] // vision["head_width"])
    image |= {"image_size": _side(about), "patch_size": vision["patch_size"], "projection_dim": width}
    text = _text(about) | {"projection_dim": width, "eos_token_id": 2}  # 2: pools at the highest id of a text, as open_clip
    return CLIPConfig(vision_config=image, text_config=text, projection_dim=width)


def _check_siglip(about: OpenClipSettings) -> None:
    family, given = "_".join(about.timm.split("_")[:2]), about.vision.get("timm_model_kwargs") or {}
    if family not in HEADS or "_siglip_" not in about.timm or "_gap_" in about.timm:
        about.refuse("vision_cfg.timm_model_name", about.timm)
    if not given.keys() <= TIMM_READ:
        about.refuse("vision_cfg.timm_model_kwargs", given)
    about.allow("vision", SIGLIP_IMAGE, TIMM)
    about.allow("text", SIGLIP_TEXT_SETTINGS, TEXT_SETTINGS)


def _siglip(about: OpenClipSettings, weights: CheckpointWeights) -> SiglipConfig:
    """Settings of a SigLIP; those that only timm's code says are read from the weights' shapes."""
    patches = weights["visual.trunk.patch_embed.proj.weight"]
    given = about.vision.get("timm_model_kwargs") or {}
    image = {
        "hidden_size": patches.shape[0],
        "intermediate_size": weights["visual.trunk.blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": weights.count("visual.trunk.blocks."),
        "num_attention_heads": given.get("num_heads", HEADS["_".join(about.timm.split("_")[:2])]),
        "hidden_act": "gelu_pytorch_tanh" if about.timm.startswith(TANH) else "gelu",
        "image_size": _side(about),
        "patch_size": patches.shape[-1],
    }
    text = _text(about) | {"projection_size": about.model["embed_dim"], "bos_token_id": None, "eos_token_id": None}
    return SiglipConfig(vision_config=image, text_config=text)


def _text(about: OpenClipSettings) -> dict[str, Any]:
    given = TEXT_SETTINGS | about.text
    sizes = {"vocab_size": given["vocab_size"], "max_position_embeddings": given["context_length"]}
    return _layers(about, given, given["heads"]) | sizes | {"pad_token_id": None, "bos_token_id": None}


def _layers(about: OpenClipSettings, given: dict[str, Any], heads: int) -> dict[str, Any]:
    """Settings of a transformer of open_clip's own."""
    quick, wish, norm = bool(about.model.get("quick_gelu")), given.get("act_kwargs") or {}, given.get("norm_kwargs") or {}
    if wish not in ({}, {"approximate": "tanh"}) or (quick and wish):
        about.refuse("act_kwargs", wish)
    if not norm.keys() <= {"eps"}:
        about.refuse("norm_kwargs", norm)
    return {
        "hidden_size": given["width"],
        "intermediate_size": int(given["width"] * given["mlp_ratio"]),
        "num_hidden_layers": given["layers"],
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu" if quick else "gelu_pytorch_tanh" if wish else "gelu",
        "layer_norm_eps": norm.get("eps", EPSILON),
    }


def _side(about: OpenClipSettings) -> int:
    size = about.vision.get("image_size", VISION["image_size"])
    sides = {*size} if isinstance(size, list) else {size}
    if len(sides) != 1:
        about.refuse("vision_cfg.image_size", size)
    return sides.pop()


def _image_processor(about: OpenClipSettings) -> CLIPImageProcessorPil:
    side, photos, mode = _side(about), about.photos, about.photos.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        about.refuse("preprocess_cfg.resize_mode", mode)
    square = {"height": side, "width": side}
    bilinear = photos.get("interpolation") == "bilinear"
    return CLIPImageProcessorPil(
        size=square if mode == "squash" else {"shortest_edge": side}, do_center_crop=mode == "shortest", crop_size=square,
        resample=Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC,
        image_mean=photos.get("mean") or OPENAI_CLIP_MEAN, image_std=photos.get("std") or OPENAI_CLIP_STD,
    )  # fmt: skip


def _tokenizer(about: OpenClipSettings) -> PreTrainedTokenizerFast:
    """Its tokenizer, which cleans texts as open_clip does before it."""
    if path_in(about.where, TOKENIZER) is None:
        said = about.text.get("hf_tokenizer_name") or "openai/clip-vit-base-patch32"
        raise InputError(f"'{about.where}' has no {TOKENIZER}: copy {TOKENIZER} and tokenizer_config.json of {said} into it.")
    wish = about.text.get("tokenizer_kwargs") or {}
    if not wish.keys() <= {"clean"} or wish.get("clean", "whitespace") not in ("canonicalize", "whitespace", "lower"):
        about.refuse("text_cfg.tokenizer_kwargs", wish)
    given = ["input_ids"] if about.timm else ["input_ids", "attention_mask"]  # SigLIP looks at its padding
    try:
        made = PreTrainedTokenizerFast.from_pretrained(about.where, model_input_names=given)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{TOKENIZER} of '{about.where}' can't be read ({str(error)[:200]}): get it again.") from error
    inside = made.backend_tokenizer
    cleaning = _cleaning(wish.get("clean", "whitespace")) + ([inside.normalizer] if inside.normalizer else [])
    inside.normalizer = normalizers.Sequence(cleaning)
    made.pad_token = made.pad_token or made.eos_token
    return made


def _cleaning(kind: str) -> list[normalizers.Normalizer]:
    spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if kind == "whitespace":
        return spaces
    lower = normalizers.Lowercase()
    if kind == "lower":
        return [lower, *spaces]
    return [normalizers.Replace("_", " "), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""), lower, *spaces]
