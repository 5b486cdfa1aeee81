"""Dual encoders in open_clip's own format (`open_clip_config.json`, `open_clip_model.safetensors`) as models of transformers.

Those with open_clip's own vision transformer become a CLIPModel, those with timm's SigLIP tower a SiglipModel; both give the
vectors that open_clip gives. Other architectures are refused.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NoReturn

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

from addressvlm.baselines import open_clip_names as names
from addressvlm.baselines.weights import OPEN_CLIP_CONFIG, Weights, built, path_in, settings_of, weights_of
from addressvlm.errors import InputError
from addressvlm.models.base import dtype_of

WEIGHTS, TOKENIZER = "open_clip_model.safetensors", "tokenizer.json"
EPSILON = 1e-5  # of torch's LayerNorm
HEADS = {"vit_base": 12, "vit_large": 16, "vit_so400m": 16, "vit_giantopt": 16}  # of timm's SigLIP towers
TANH = ("vit_base_patch32", "vit_large_patch16_siglip_512", "vit_so400m_patch16", "vit_giantopt")  # the others: exact GELU

# What is read, with open_clip's defaults; what has to have one of some values; what changes no vector. The rest has to be off.
VISION = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
TIMM = ("image_size", "timm_model_name", "timm_model_kwargs")
TIMM_READ = {"num_heads", "embed_dim", "depth", "mlp_ratio", "img_size", "patch_size"}  # from settings or shapes
PLAIN_IMAGE = {"pool_type": (None, "tok"), "block_type": (None, "default"), "timm_model_name": (None, "")}
SIGLIP_IMAGE = {"timm_pool": ("map",), "timm_proj": ("none",)}
PLAIN_TEXT = {
    "pool_type": (None, "argmax"),
    "proj_type": (None, "linear"),
    "text_arch": (None, "clip"),
    "block_type": (None, "default"),
}
SIGLIP_TEXT = PLAIN_TEXT | {"pool_type": ("last",), "no_causal_mask": (True,), "proj_bias": (True,)}
HARMLESS = {
    "output_tokens", "patch_dropout", "pos_embed_type", "final_ln_after_pool", "attn_pooler_queries", "attn_pooler_heads",
    "act_kwargs", "norm_kwargs", "timm_model_pretrained", "timm_drop", "timm_drop_path", "hf_model_pretrained", "hf_proj_type",
    "hf_pooler_type", "hf_tokenizer_name", "tokenizer_kwargs", "pad_id", "bos_id", "eos_id",
}  # fmt: skip


@dataclass(frozen=True)
class About:
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
    def read(cls, where: str) -> "About":
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


def open_clip(where: str, dtype: str) -> tuple[Any, Any]:
    """A dual encoder in eval mode on the CPU and its image processor.

    Args:
        where: folder or hub name.
        dtype: see `dtype_of`.

    Raises:
        InputError: the files aren't all there or don't fit each other, or it is of an architecture that transformers hasn't.
    """
    about = About.read(where)
    if about.timm:
        _check_siglip(about)
    else:
        about.allow("vision", PLAIN_IMAGE, VISION)
        about.allow("text", PLAIN_TEXT, TEXT)
    processor, weights = _image_processor(about), weights_of(where, WEIGHTS)
    try:
        config = _siglip(about, weights) if about.timm else _clip(about)
    except (KeyError, TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{OPEN_CLIP_CONFIG} of '{where}' makes no model ({said}): get it again.") from error
    kind, source = (SiglipModel, names.siglip(weights)) if about.timm else (CLIPModel, names.clip(weights))
    model = built(kind, config, dtype_of(dtype), weights, source)
    weights.finish(names.IGNORED)
    return model, processor


def open_clip_with_texts(where: str, dtype: str) -> tuple[Any, Any]:
    """The same with the processor of its photos and texts.

    Raises:
        InputError: as `open_clip`, or it has no tokenizer.json or cleans texts in another way than is known.
    """
    about = About.read(where)
    tokenizer = _tokenizer(about)
    model, photos = open_clip(where, dtype)
    return model, (SiglipProcessor if about.timm else CLIPProcessor)(photos, tokenizer)


def _clip(about: About) -> CLIPConfig:
    vision, width = VISION | about.vision, about.model["embed_dim"]
    if not isinstance(vision["layers"], int):
        about.refuse("vision_cfg.layers", vision["layers"])  # a ResNet
    image = _layers(about, vision, vision["width"] // vision["head_width"])
    image |= {"image_size": _side(about), "patch_size": vision["patch_size"], "projection_dim": width}
    text = _text(about) | {"projection_dim": width, "eos_token_id": 2}  # 2: pools at the highest id of a text, as open_clip
    return CLIPConfig(vision_config=image, text_config=text, projection_dim=width)


def _check_siglip(about: About) -> None:
    family, given = "_".join(about.timm.split("_")[:2]), about.vision.get("timm_model_kwargs") or {}
    if family not in HEADS or "_siglip_" not in about.timm or "_gap_" in about.timm:
        about.refuse("vision_cfg.timm_model_name", about.timm)
    if not given.keys() <= TIMM_READ:
        about.refuse("vision_cfg.timm_model_kwargs", given)
    about.allow("vision", SIGLIP_IMAGE, TIMM)
    about.allow("text", SIGLIP_TEXT, TEXT)


def _siglip(about: About, weights: Weights) -> SiglipConfig:
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


def _text(about: About) -> dict[str, Any]:
    given = TEXT | about.text
    sizes = {"vocab_size": given["vocab_size"], "max_position_embeddings": given["context_length"]}
    return _layers(about, given, given["heads"]) | sizes | {"pad_token_id": None, "bos_token_id": None}


def _layers(about: About, given: dict[str, Any], heads: int) -> dict[str, Any]:
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


def _side(about: About) -> int:
    size = about.vision.get("image_size", VISION["image_size"])
    sides = {*size} if isinstance(size, list) else {size}
    if len(sides) != 1:
        about.refuse("vision_cfg.image_size", size)
    return sides.pop()


def _image_processor(about: About) -> CLIPImageProcessorPil:
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


def _tokenizer(about: About) -> PreTrainedTokenizerFast:
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
