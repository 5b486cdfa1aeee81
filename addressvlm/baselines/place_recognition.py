"""Place-recognition models from their own weights: DINOv2 SALAD (arXiv 2311.15937) and MegaLoc (arXiv 2502.17237).

A DINOv2 gives a token for each patch and one for the whole photo. Optimal transport assigns patches to clusters, with a
dustbin for uninformative ones; a cluster's vector is the weighted sum of its patches'. MegaLoc has one more linear layer. All
sizes but that of the photos are read from the weights' shapes.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessorPil, Dinov2Config, Dinov2Model
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from addressvlm.baselines.checkpoint_formats import (
    CONFIG,
    WEIGHTS,
    CheckpointWeights,
    build_and_load,
    read_settings,
    read_weights,
)
from addressvlm.errors import InputError
from addressvlm.models.loading import dtype_of

SIDE = 322  # pixels; both models are evaluated on photos resized to a square of this side
HEAD_WIDTH = 64  # of an attention head in every DINOv2
ROUNDS = 3  # of Sinkhorn's algorithm, as both were trained
OFFSET = 0.1  # of a patch, added by DINOv2 when it interpolates positions; without it the vectors differ
BACKBONE = (
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    ("attention.o_proj", "attn.proj"),
    ("attention.qkv", "attn.qkv"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm", "norm"),
)
AGGREGATION = (
    ("scene.", "token_features."),
    ("score.2", "score.3"),  # the file counts dropout as a layer
    ("local.2", "cluster_features.3"),
    ("local.", "cluster_features."),
)


def sinkhorn(scores: torch.Tensor, dustbin: torch.Tensor, rounds: int = ROUNDS) -> torch.Tensor:
    """The share of each patch in each cluster: entropic optimal transport by Sinkhorn's algorithm (SALAD, Sec. 3.2).

    Each of N patches has mass 1, each of K clusters receives 1 and the dustbin the other N - K; after any number of rounds a
    patch's shares sum to exactly 1.

    Args:
        scores: (B, N, K), N above K; the result has the same shape, without the dustbin.
        dustbin: score of the dustbin, one number.
    """
    batch, patches, clusters = scores.shape
    plan = torch.cat([scores, dustbin.to(scores.dtype).expand(batch, patches, 1)], dim=2).float()
    log_mass = torch.zeros(clusters + 1, device=scores.device)
    log_mass[-1] = math.log(patches - clusters)
    for _ in range(rounds):
        plan = plan - plan.logsumexp(dim=1, keepdim=True) + log_mass
        plan = plan - plan.logsumexp(dim=2, keepdim=True)
    return plan.exp()[:, :, :-1].to(scores.dtype)


class Aggregation(nn.Module):
    """Tokens of a photo -> its vector (SALAD, Sec. 3).

    Args:
        width, hidden: of a token and of the perceptrons; the attribute `width` is that of the vector.
        clusters: number of clusters.
        cluster, scene: dimensions of a cluster's and of the whole photo's part of the vector.
    """

    def __init__(self, width: int, hidden: int, clusters: int, cluster: int, scene: int) -> None:
        super().__init__()
        self.score, self.local, self.scene = (
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out)) for out in (clusters, cluster, scene)
        )
        self.dust_bin = nn.Parameter(torch.ones(()))
        self.width = scene + clusters * cluster

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, 1 + N, W), first that of the whole photo -> unit vectors (B, scene + cluster * clusters)."""
        photo, patches = tokens[:, 0], tokens[:, 1:]
        shares = sinkhorn(self.score(patches), self.dust_bin)
        clusters = F.normalize(self.local(patches).transpose(1, 2) @ shares, dim=1)
        return F.normalize(torch.cat([F.normalize(self.scene(photo), dim=-1), clusters.flatten(1)], dim=-1), dim=-1)


class PlaceRecognition(nn.Module):
    """Photos -> vectors that are similar for photos of one place, by DINOv2; `linear` is MegaLoc's last layer."""

    def __init__(self, backbone: Any, aggregation: Aggregation, linear: nn.Linear | None) -> None:
        super().__init__()
        self.backbone, self.aggregation, self.linear = backbone, aggregation, linear

    @property
    def dtype(self) -> torch.dtype:
        return self.aggregation.dust_bin.dtype

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, H, W), H and W multiples of the patch size -> vectors (B, D)."""
        embeddings, side = self.backbone.embeddings, self.backbone.config.patch_size
        patches = embeddings.patch_embeddings(pixel_values)
        tokens = torch.cat([embeddings.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        tokens = tokens + interpolate_positions(
            embeddings.position_embeddings, *(size // side for size in pixel_values.shape[2:])
        )
        vectors = self.aggregation(self.backbone.layernorm(self.backbone.encoder(tokens).last_hidden_state))
        return vectors if self.linear is None else self.linear(vectors)


def interpolate_positions(embeddings: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """DINOv2's position embeddings of a square, interpolated to another grid as DINOv2 does it.

    The embedding layer of transformers interpolates a little differently.

    Args:
        embeddings: (1, 1 + M * M, W), first that of the whole photo; the result is (1, 1 + rows * columns, W).
    """
    side = math.isqrt(embeddings.shape[1] - 1)
    if (rows, columns) == (side, side):
        return embeddings
    square = embeddings[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = ((rows + OFFSET) / side, (columns + OFFSET) / side)
    grid = F.interpolate(square, scale_factor=scale, mode="bicubic")
    return torch.cat([embeddings[:, :1], grid.flatten(2).transpose(1, 2).to(embeddings.dtype)], dim=1)


def load_place_recognition(where: str, dtype: str) -> tuple[PlaceRecognition, Any]:
    """A model in eval mode on the CPU and its image processor.

    Args:
        where: folder or Hub name. `image_size` in its config.json, one side or [height, width], replaces `SIDE`.

    Raises:
        InputError: a weight is missing or has another shape, or the photos' size doesn't fit.
    """
    weights = read_weights(where, WEIGHTS)
    megaloc = "aggregator.linear.weight" in weights
    prefix = "backbone." if "backbone.cls_token" in weights else "backbone.model."
    backbone = _backbone(weights, prefix, dtype)
    aggregation = _aggregation(weights, "aggregator.agg." if megaloc else "aggregator.", backbone.config.hidden_size)
    linear = None
    if megaloc:
        linear = nn.Linear(aggregation.width, weights["aggregator.linear.weight"].shape[0])
        state = weights.state_dict(linear.state_dict(), lambda name: weights[f"aggregator.linear.{name}"])
        linear.load_state_dict(state)
    weights.require_all_used({f"{prefix}mask_token"})
    size = _size(where, backbone.config.patch_size, clusters=aggregation.score[2].out_features)
    processor = CLIPImageProcessorPil(
        size=size, do_center_crop=False, resample=Image.Resampling.BILINEAR,
        image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD,
    )  # fmt: skip
    return PlaceRecognition(backbone, aggregation, linear).to(dtype_of(dtype)).eval(), processor


def _backbone(weights: CheckpointWeights, prefix: str, dtype: str) -> Any:
    patch, positions = weights[f"{prefix}patch_embed.proj.weight"], weights[f"{prefix}pos_embed"]
    width, side = patch.shape[0], patch.shape[-1]
    if width % HEAD_WIDTH:
        raise InputError(
            f"{weights.name}: a DINOv2 {width} wide has no heads of {HEAD_WIDTH} numbers: give a DINOv2 of 384 to 1024."
        )
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=weights.count(f"{prefix}blocks."), num_attention_heads=width // HEAD_WIDTH,
        mlp_ratio=weights[f"{prefix}blocks.0.mlp.fc1.weight"].shape[0] // width, patch_size=side,
        image_size=side * math.isqrt(positions.shape[1] - 1), use_mask_token=False,
    )  # fmt: skip
    return build_and_load(Dinov2Model, config, dtype_of(dtype), weights, lambda name: weights.renamed(name, BACKBONE, prefix))


def _aggregation(weights: CheckpointWeights, prefix: str, width: int) -> Aggregation:
    hidden = weights[f"{prefix}score.0.weight"].shape[0]
    sizes = (weights[f"{prefix}{part}.weight"].shape[0] for part in ("score.3", "cluster_features.3", "token_features.2"))
    aggregation = Aggregation(width, hidden, *sizes)

    def source(name: str) -> torch.Tensor:
        tensor = weights.renamed(name, AGGREGATION, prefix)
        return tensor.flatten(1) if tensor.dim() == 4 else tensor  # a convolution of 1 x 1 is a linear layer

    aggregation.load_state_dict(weights.state_dict(aggregation.state_dict(), source))
    return aggregation


def _size(where: str, patch: int, clusters: int) -> dict[str, int]:
    """Height and width of photos in pixels, as an image processor's `size`."""
    setting = (read_settings(where, CONFIG) or {}).get("image_size", SIDE)
    size = [setting, setting] if isinstance(setting, int) else setting
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
        raise InputError(f"image_size of '{where}' ({CONFIG}) is {setting}: give a side in pixels, or [height, width].")
    if any(side % patch for side in size):
        raise InputError(f"image_size of '{where}' ({CONFIG}) is {setting}: give multiples of {patch}, such as {23 * patch}.")
    if math.prod(size) // patch**2 <= clusters:
        raise InputError(
            f"image_size of '{where}' ({CONFIG}) is {setting}, which leaves no more patches than the {clusters} clusters: give "
            f"more, such as {23 * patch}."
        )
    return {"height": size[0], "width": size[1]}
