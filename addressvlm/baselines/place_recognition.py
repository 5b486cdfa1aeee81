"""Place-recognition models: DINOv2 SALAD (arXiv 2311.15937) and MegaLoc (arXiv 2502.17237), read from their own weights.

A DINOv2 gives a token for each patch and one for the whole photo. Patches are shared out among clusters by optimal transport,
with a dustbin for patches that tell nothing; a cluster's vector is the sum of what its patches say. MegaLoc sends the joint
vector through one linear layer more. All sizes but those of the photos are read from the weights' shapes.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessorPil, Dinov2Config, Dinov2Model
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from addressvlm.baselines.checkpoint_formats import CONFIG, WEIGHTS, CheckpointWeights, build_and_load, settings_of, weights_of
from addressvlm.errors import InputError
from addressvlm.models.loading import dtype_of

SIDE = 322  # pixels; both models' evaluations squeeze photos to a square of this side
HEAD = 64  # width of an attention head in every DINOv2
ROUNDS = 3  # of Sinkhorn's algorithm, as both were trained
OFFSET = 0.1  # DINOv2 counts a tenth of a patch more when it stretches its positions; leaving it out changes the vectors
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
    ("score.2", "score.3"),  # there, dropout is a layer of the sequence
    ("local.2", "cluster_features.3"),
    ("local.", "cluster_features."),
)


def sinkhorn(scores: torch.Tensor, dustbin: torch.Tensor, rounds: int = ROUNDS) -> torch.Tensor:
    """How much of each patch goes to each cluster: entropic optimal transport by Sinkhorn's algorithm (SALAD, Sec. 3.2).

    Each of N patches has mass 1, each of K clusters takes 1 and the dustbin the other N - K; after any number of rounds, what
    leaves a patch is exactly 1.

    Args:
        scores: (B, N, K), N above K.
        dustbin: the score of throwing a patch away, one number.

    Returns:
        (B, N, K), the dustbin left out.
    """
    batch, patches, clusters = scores.shape
    plan = torch.cat([scores, dustbin.to(scores.dtype).expand(batch, patches, 1)], dim=2).float()
    takes = torch.zeros(clusters + 1, device=scores.device)
    takes[-1] = math.log(patches - clusters)
    for _ in range(rounds):
        plan = plan - plan.logsumexp(dim=1, keepdim=True) + takes
        plan = plan - plan.logsumexp(dim=2, keepdim=True)
    return plan.exp()[:, :, :-1].to(scores.dtype)


class Aggregation(nn.Module):
    """Tokens of a photo -> its vector (SALAD, Sec. 3).

    Args:
        width: of a token.
        hidden: of the perceptrons.
        clusters, cluster, scene: how many clusters, and the numbers of a cluster's and of the whole photo's part.

    Attributes:
        width: of the vector.
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
        whole, patches = tokens[:, 0], tokens[:, 1:]
        shares = sinkhorn(self.score(patches), self.dust_bin)
        clusters = F.normalize(self.local(patches).transpose(1, 2) @ shares, dim=1)
        return F.normalize(torch.cat([F.normalize(self.scene(whole), dim=-1), clusters.flatten(1)], dim=-1), dim=-1)


class PlaceRecognition(nn.Module):
    """Photos -> vectors that are alike where photos show one place.

    Args:
        backbone: DINOv2.
        linear: MegaLoc's last layer; SALAD has none.
    """

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


def interpolate_positions(learnt: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """DINOv2's embeddings of a square's positions, stretched to another grid as DINOv2 does it.

    transformers stretches a little differently, which is why its own embedding layer isn't used.

    Args:
        learnt: (1, 1 + M * M, W), first that of the whole photo.

    Returns:
        (1, 1 + rows * columns, W).
    """
    side = math.isqrt(learnt.shape[1] - 1)
    if (rows, columns) == (side, side):
        return learnt
    square = learnt[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = ((rows + OFFSET) / side, (columns + OFFSET) / side)
    grid = F.interpolate(square, scale_factor=scale, mode="bicubic")
    return torch.cat([learnt[:, :1], grid.flatten(2).transpose(1, 2).to(learnt.dtype)], dim=1)


def load_place_recognition(where: str, dtype: str) -> tuple[PlaceRecognition, Any]:
    """A model in eval mode on the CPU and its image processor.

    Args:
        where: folder or hub name. `image_size` of its config.json, one side or [height, width], replaces `SIDE`.
        dtype: see `dtype_of`.

    Raises:
        InputError: a weight is missing or has another shape, or the size of photos doesn't fit.
    """
    weights = weights_of(where, WEIGHTS)
    mega = "aggregator.linear.weight" in weights
    before = "backbone." if "backbone.cls_token" in weights else "backbone.model."
    backbone = _backbone(weights, before, dtype)
    aggregation = _aggregation(weights, "aggregator.agg." if mega else "aggregator.", backbone.config.hidden_size)
    linear = _linear(weights, aggregation.width) if mega else None
    weights.finish({f"{before}mask_token"})
    size = _size(where, backbone.config.patch_size, clusters=aggregation.score[2].out_features)
    processor = CLIPImageProcessorPil(
        size=size, do_center_crop=False, resample=Image.Resampling.BILINEAR,
        image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD,
    )  # fmt: skip
    return PlaceRecognition(backbone, aggregation, linear).to(dtype_of(dtype)).eval(), processor


def _backbone(weights: CheckpointWeights, before: str, dtype: str) -> Any:
    patch, learnt = weights[f"{before}patch_embed.proj.weight"], weights[f"{before}pos_embed"]
    width, side = patch.shape[0], patch.shape[-1]
    if width % HEAD:
        raise InputError(f"{weights.name}: a DINOv2 {width} wide has no heads of {HEAD} numbers: give a DINOv2 of 384 to 1024.")
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=weights.count(f"{before}blocks."), num_attention_heads=width // HEAD,
        mlp_ratio=weights[f"{before}blocks.0.mlp.fc1.weight"].shape[0] // width, patch_size=side,
        image_size=side * math.isqrt(learnt.shape[1] - 1), use_mask_token=False,
    )  # fmt: skip
    return build_and_load(Dinov2Model, config, dtype_of(dtype), weights, lambda name: weights.renamed(name, BACKBONE, before))


def _aggregation(weights: CheckpointWeights, before: str, width: int) -> Aggregation:
    hidden = weights[f"{before}score.0.weight"].shape[0]
    parts = (weights[f"{before}{part}.weight"].shape[0] for part in ("score.3", "cluster_features.3", "token_features.2"))
    made = Aggregation(width, hidden, *parts)

    def source(name: str) -> torch.Tensor:
        found = weights.renamed(name, AGGREGATION, before)
        return found.flatten(1) if found.dim() == 4 else found  # a convolution of 1 x 1 is a linear layer

    made.load_state_dict(weights.fit({name: tensor.shape for name, tensor in made.state_dict().items()}, source))
    return made


def _linear(weights: CheckpointWeights, width: int) -> nn.Linear:
    made = nn.Linear(width, weights["aggregator.linear.weight"].shape[0])
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    made.load_state_dict(weights.fit(shapes, lambda name: weights.renamed(name, (), "aggregator.linear.")))
    return made


def _size(where: str, patch: int, clusters: int) -> dict[str, int]:
    """Height and width of photos in pixels, as image processors take it."""
    wish = (settings_of(where, CONFIG) or {}).get("image_size", SIDE)
    size = [wish, wish] if isinstance(wish, int) else wish
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
        raise InputError(f"image_size of '{where}' ({CONFIG}) is {wish}: give a side in pixels, or [height, width].")
    if any(side % patch for side in size):
        raise InputError(f"image_size of '{where}' ({CONFIG}) is {wish}: give multiples of {patch}, such as {23 * patch}.")
    if math.prod(size) // patch**2 <= clusters:
        raise InputError(
            f"image_size of '{where}' ({CONFIG}) is {wish}, which leaves no more patches than the {clusters} clusters: give "
            f"more, such as {23 * patch}."
        )
    return {"height": size[0], "width": size[1]}
