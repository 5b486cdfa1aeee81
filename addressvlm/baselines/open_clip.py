"""Load dual encoders in open_clip's format (`open_clip_config.json`, `open_clip_model.safetensors`) as models of transformers.

Those with open_clip's own vision transformer become a CLIPModel, those with timm's SigLIP tower a SiglipModel; both give the
same vectors as open_clip. Other architectures are refused.
"""

from collections.abc import Collection
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
    find_file,
    read_settings,
    read_weights,
)
from addressvlm.errors import InputError
from addressvlm.models.loading import dtype_of

WEIGHTS, TOKENIZER = "open_clip_model.safetensors", "tokenizer.json"
EPSILON = 1e-5  # of torch's LayerNorm
HEADS = {"vit_base": 12, "vit_large": 16, "vit_so400m": 16, "vit_giantopt": 16}  # of timm's SigLIP towers
TANH_GELU = ("vit_base_patch32", "vit_large_patch16_siglip_512", "vit_so400m_patch16", "vit_giantopt")  # the others: exact GELU

# VISION, TEXT_SETTINGS: settings that are read, with open_clip's defaults. PLAIN_*, SIGLIP_*: those that must have one of some
# values. HARMLESS: those that change no vector. All others must be off.
VISION = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
TEXT_SETTINGS = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
TIMM = ("image_size", "timm_model_name", "timm_model_kwargs")
TIMM_ARGUMENTS = {"num_heads", "embed_dim", "depth", "mlp_ratio", "img_size", "patch_size"}  # from settings or shapes
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

# Buffers of old files, and the bias of SigLIP's loss, which CLIPModel does not have and which changes no order
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


@dataclass(frozen=True)
class OpenClipSettings:
    """The content of `open_clip_config.json`."""

    where: str  # folder or Hub name
    model: dict[str, Any]  # section `model_cfg`
    vision: dict[str, Any]  # `vision_cfg` in it
    text: dict[str, Any]  # `text_cfg` in it
    photos: dict[str, Any]  # section `preprocess_cfg`

    @classmethod
    def read(cls, where: str) -> "OpenClipSettings":
        """Read the file of a folder or Hub model; refuse an architecture that transformers can't reproduce."""
        config = read_settings(where, OPEN_CLIP_CONFIG) or {}
        model, photos = config.get("model_cfg"), config.get("preprocess_cfg") or {}
        sections = [*((model.get(part) for part in ("vision_cfg", "text_cfg")) if isinstance(model, dict) else [None]), photos]
        if not (isinstance(model, dict) and all(isinstance(section, dict) for section in sections)):
            raise InputError(f"{OPEN_CLIP_CONFIG} of '{where}' has no model_cfg with vision_cfg and text_cfg: get it again.")
        settings = cls(where, model, *sections)
        timm, family, arguments = settings.timm, settings.timm_family, settings.vision.get("timm_model_kwargs") or {}
        if timm and (family not in HEADS or "_siglip_" not in timm or "_gap_" in timm):
            settings.refuse("vision_cfg.timm_model_name", timm)
        if timm and not arguments.keys() <= TIMM_ARGUMENTS:
            settings.refuse("vision_cfg.timm_model_kwargs", arguments)
        settings._allow("vision", *((SIGLIP_IMAGE, TIMM) if timm else (PLAIN_IMAGE_SETTINGS, VISION)))
        settings._allow("text", SIGLIP_TEXT_SETTINGS if timm else PLAIN_TEXT, TEXT_SETTINGS)
        return settings

    @property
    def timm(self) -> str:
        """The name of timm's image tower; empty for open_clip's own."""
        return self.vision.get("timm_model_name") or ""

    @property
    def timm_family(self) -> str:
        """Such as `vit_base`."""
        return "_".join(self.timm.split("_")[:2])

    @property
    def side(self) -> int:
        """Of square photos, in pixels."""
        size = self.vision.get("image_size", VISION["image_size"])
        sides = {*size} if isinstance(size, list) else {size}
        if len(sides) != 1:
            self.refuse("vision_cfg.image_size", size)
        return sides.pop()

    def _allow(self, part: str, values: dict[str, tuple[Any, ...]], supported: Collection[str]) -> None:
        section = getattr(self, part)
        for key, allowed in values.items():
            if section.get(key) not in allowed:
                self.refuse(f"{part}_cfg.{key}", section.get(key))
        for key, value in section.items():
            if value and key not in {*values, *supported, *HARMLESS} and (self.timm or not key.startswith("timm_")):
                self.refuse(f"{part}_cfg.{key}", value)

    def refuse(self, key: str, value: Any) -> NoReturn:
        raise InputError(
            f"'{self.where}' has {key} {value!r} in {OPEN_CLIP_CONFIG}, which no model of transformers has: give a plain ViT "
            "or a SigLIP of open_clip, or a model in transformers' own format."
        )


def load_open_clip(where: str, dtype: str) -> tuple[Any, Any]:
    """A dual encoder (folder or Hub name) in eval mode on the CPU and its image processor.

    Raises:
        InputError: files are missing or don't fit each other, or transformers does not have the architecture.
    """
    settings = OpenClipSettings.read(where)
    processor, weights = _image_processor(settings), read_weights(where, WEIGHTS)
    try:
        config = _siglip_config(settings, weights) if settings.timm else _clip_config(settings)
    except (KeyError, TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{OPEN_CLIP_CONFIG} of '{where}' makes no model ({reason}): get it again.") from error
    convert = siglip_tensor if settings.timm else clip_tensor
    kind = SiglipModel if settings.timm else CLIPModel
    model = build_and_load(kind, config, dtype_of(dtype), weights, lambda name: convert(weights, name))
    weights.require_all_used(IGNORED_NAMES)
    return model, processor


def load_open_clip_dual(where: str, dtype: str) -> tuple[Any, Any]:
    """The same with the processor of its photos and texts."""
    settings = OpenClipSettings.read(where)
    tokenizer = _tokenizer(settings)
    model, image_processor = load_open_clip(where, dtype)
    return model, (SiglipProcessor if settings.timm else CLIPProcessor)(image_processor, tokenizer)


def clip_tensor(weights: CheckpointWeights, name: str) -> torch.Tensor:
    """The tensor of CLIPModel's `name`; open_clip's projections are transposed."""
    if name == "logit_scale":
        return weights[name].reshape(())
    if name.startswith("text"):
        tensor = weights.renamed(name, (*TEXT_NAMES, ("text_projection.weight", "text_projection")), _text_prefix(weights))
    else:
        tensor = weights.renamed(name, PLAIN_IMAGE_NAMES)
    return tensor.T if name in ("visual_projection.weight", "text_projection.weight") else tensor


def siglip_tensor(weights: CheckpointWeights, name: str) -> torch.Tensor:
    """The tensor of SiglipModel's `name`."""
    if name in ("logit_scale", "logit_bias"):
        return weights[name].reshape(1)
    if name.startswith("text"):
        return weights.renamed(name, (*TEXT_NAMES, ("head", "text_projection")), _text_prefix(weights))
    if ".in_proj_" in name:
        kind = name.rpartition("_")[2]
        return torch.cat([weights[f"visual.trunk.attn_pool.{part}.{kind}"] for part in ("q", "kv")])
    tensor = weights.renamed(name, TIMM_IMAGE_NAMES)
    return tensor[0] if "position_embedding" in name else tensor


def _text_prefix(weights: CheckpointWeights) -> str:
    return "text." if "text.token_embedding.weight" in weights else ""


def _clip_config(settings: OpenClipSettings) -> CLIPConfig:
    vision, width = VISION | settings.vision, settings.model["embed_dim"]
    if not isinstance(vision["layers"], int):
        settings.refuse("vision_cfg.layers", vision["layers"])  # a ResNet
    image = _transformer_config(settings, vision, vision["width"] // vision["head_width"])
    image |= {"image_size": settings.side, "patch_size": vision["patch_size"], "projection_dim": width}
    # eos_token_id 2: pools at the highest id of a text, as open_clip
    text = _text_config(settings) | {"projection_dim": width, "eos_token_id": 2}
    return CLIPConfig(vision_config=image, text_config=text, projection_dim=width)


def _siglip_config(settings: OpenClipSettings, weights: CheckpointWeights) -> SiglipConfig:
    """Settings of a SigLIP; those that only timm's code has are read from the weights' shapes."""
    patches = weights["visual.trunk.patch_embed.proj.weight"]
    arguments = settings.vision.get("timm_model_kwargs") or {}
    image = {
        "hidden_size": patches.shape[0],
        "intermediate_size": weights["visual.trunk.blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": weights.count("visual.trunk.blocks."),
        "num_attention_heads": arguments.get("num_heads", HEADS[settings.timm_family]),
        "hidden_act": "gelu_pytorch_tanh" if settings.timm.startswith(TANH_GELU) else "gelu",
        "image_size": settings.side,
        "patch_size": patches.shape[-1],
    }
    text = {"projection_size": settings.model["embed_dim"], "bos_token_id": None, "eos_token_id": None}
    return SiglipConfig(vision_config=image, text_config=_text_config(settings) | text)


def _text_config(settings: OpenClipSettings) -> dict[str, Any]:
    text = TEXT_SETTINGS | settings.text
    sizes = {"vocab_size": text["vocab_size"], "max_position_embeddings": text["context_length"]}
    return _transformer_config(settings, text, text["heads"]) | sizes | {"pad_token_id": None, "bos_token_id": None}


def _transformer_config(settings: OpenClipSettings, section: dict[str, Any], heads: int) -> dict[str, Any]:
    """Settings of one of open_clip's own transformers."""
    quick = bool(settings.model.get("quick_gelu"))
    act, norm = section.get("act_kwargs") or {}, section.get("norm_kwargs") or {}
    if act not in ({}, {"approximate": "tanh"}) or (quick and act):
        settings.refuse("act_kwargs", act)
    if not norm.keys() <= {"eps"}:
        settings.refuse("norm_kwargs", norm)
    return {
        "hidden_size": section["width"],
        "intermediate_size": int(section["width"] * section["mlp_ratio"]),
        "num_hidden_layers": section["layers"],
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu" if quick else "gelu_pytorch_tanh" if act else "gelu",
        "layer_norm_eps": norm.get("eps", EPSILON),
    }


def _image_processor(settings: OpenClipSettings) -> CLIPImageProcessorPil:
    side, photos = settings.side, settings.photos
    mode = photos.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        settings.refuse("preprocess_cfg.resize_mode", mode)
    square = {"height": side, "width": side}
    bilinear = photos.get("interpolation") == "bilinear"
    return CLIPImageProcessorPil(
        size=square if mode == "squash" else {"shortest_edge": side}, do_center_crop=mode == "shortest", crop_size=square,
        resample=Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC,
        image_mean=photos.get("mean") or OPENAI_CLIP_MEAN, image_std=photos.get("std") or OPENAI_CLIP_STD,
    )  # fmt: skip


def _tokenizer(settings: OpenClipSettings) -> PreTrainedTokenizerFast:
    """The model's tokenizer, preceded by open_clip's cleaning of texts."""
    if find_file(settings.where, TOKENIZER) is None:
        name = settings.text.get("hf_tokenizer_name") or "openai/clip-vit-base-patch32"
        raise InputError(
            f"'{settings.where}' has no {TOKENIZER}: copy {TOKENIZER} and tokenizer_config.json of {name} into it."
        )
    spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    lower = [normalizers.Lowercase(), *spaces]
    punctuation = [normalizers.Replace("_", " "), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")]
    cleaning = {"whitespace": spaces, "lower": lower, "canonicalize": [*punctuation, *lower]}
    arguments = settings.text.get("tokenizer_kwargs") or {}
    clean = arguments.get("clean", "whitespace")
    if not arguments.keys() <= {"clean"} or clean not in cleaning:
        settings.refuse("text_cfg.tokenizer_kwargs", arguments)
    inputs = ["input_ids"] if settings.timm else ["input_ids", "attention_mask"]  # SigLIP attends to its padding
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(settings.where, model_input_names=inputs)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{TOKENIZER} of '{settings.where}' can't be read ({str(error)[:200]}): get it again.") from error
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([*cleaning[clean], *([backend.normalizer] if backend.normalizer else [])])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer
