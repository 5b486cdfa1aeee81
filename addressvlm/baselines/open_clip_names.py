"""What weights of transformers' CLIPModel and SiglipModel are called in open_clip's files."""

from collections.abc import Callable

import torch

from addressvlm.baselines.weights import Weights

# Buffers of old files, and the bias of SigLIP's loss, which CLIPModel has no place for and which changes no order
IGNORED = ("attn_mask", "text.attn_mask", "input_resolution", "context_length", "vocab_size", "logit_bias")
LAYERS = (
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn.qkv.", "attn.in_proj_"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)
PLAIN_IMAGE = (
    ("vision_model.", "visual."),
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.patch_embedding", "conv1"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("pre_layrnorm", "ln_pre"),
    ("post_layernorm", "ln_post"),
    ("visual_projection.weight", "visual.proj"),
    *LAYERS,
)
TIMM_IMAGE = (
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
TEXT = (
    ("text_model.", ""),
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm", "ln_final"),
    *LAYERS,
)
CLIP_TEXT, SIGLIP_TEXT = (*TEXT, ("text_projection.weight", "text_projection")), (*TEXT, ("head", "text_projection"))


def clip(weights: Weights) -> Callable[[str], torch.Tensor]:
    """The source of CLIPModel's weights; its projections lie on their other side there."""
    before = _before_text(weights)

    def source(name: str) -> torch.Tensor:
        if name == "logit_scale":
            return weights[name].reshape(())
        found = weights.renamed(name, CLIP_TEXT, before) if name.startswith("text") else weights.renamed(name, PLAIN_IMAGE)
        return found.T if name in ("visual_projection.weight", "text_projection.weight") else found

    return source


def siglip(weights: Weights) -> Callable[[str], torch.Tensor]:
    """The source of SiglipModel's weights."""
    before = _before_text(weights)

    def source(name: str) -> torch.Tensor:
        if name in ("logit_scale", "logit_bias"):
            return weights[name].reshape(1)
        if name.startswith("text"):
            return weights.renamed(name, SIGLIP_TEXT, before)
        if ".in_proj_" in name:
            kind = name.rpartition("_")[2]
            return torch.cat([weights[f"visual.trunk.attn_pool.{part}.{kind}"] for part in ("q", "kv")])
        found = weights.renamed(name, TIMM_IMAGE)
        return found[0] if "position_embedding" in name else found

    return source


def _before_text(weights: Weights) -> str:
    """Text encoders are a part of their own in some models and spread out in others."""
    return "text." if "text.token_embedding.weight" in weights else ""
