"""AddressCLIP's three losses (paper 002, Sec. 4.2 to 4.4) on the features of a whole step, all workers' photos together."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from addressvlm.config_compare import LossWeights


def contrastive_loss(images_ND: torch.Tensor, texts_ND: torch.Tensor, scale: torch.Tensor, names_N: torch.Tensor) -> Any:  # noqa: N803
    """Image-text contrastive loss of unit vectors in both directions (eqs. 1 and 2), a scalar.

    The paper takes every other photo of the batch as a negative, also one of the same address, whose text is the very same:
    one and the same pair of vectors would be pulled together and pushed apart. Here all photos with the same text are right
    answers in equal parts; where no two texts are alike this is the paper's loss.

    Args:
        scale: 1 / temperature.
        names_N: a number for each text, equal for equal texts.
    """
    logits = scale * images_ND @ texts_ND.T
    same = (names_N[:, None] == names_N[None, :]).to(logits.dtype)
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def distances(positions_N2: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """Manhattan distances (N, N) of positions min-max normalised over the batch, each axis by itself (eq. 3); 0 to 2.

    As each axis has its own unit, UTM metres and degrees give the same over a city.
    """
    low, high = positions_N2.amin(dim=0), positions_N2.amax(dim=0)
    unit = (positions_N2 - low) / (high - low).clamp_min(1e-9)
    return torch.cdist(unit, unit, p=1)


def geography_loss(images_ND: torch.Tensor, positions_N2: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """Image-geography matching loss (eqs. 3 to 5): the cosine similarity of two photos shall follow their distance D.

    As printed, eq. 5 draws the similarity towards D itself, so that photos of opposite ends of the city become alike and
    neighbours differ, which is the opposite of what Sec. 4.3 says it is for. Here the target is 1 - D/2: 1 for photos of one
    place, 0 for opposite corners. It is the mean of two triangular kernels, 1 - |east| and 1 - |north|, so unit vectors with
    exactly these similarities exist.

    Args:
        images_ND: unit vectors.
        positions_N2: east and north, in UTM metres or degrees; photos without are NaN and left out.
    """
    known = positions_N2.isfinite().all(dim=1)
    if not known.any():
        return images_ND.sum() * 0
    similarity = images_ND[known] @ images_ND[known].T
    return F.mse_loss(similarity, (1 - distances(positions_N2[known]) / 2).to(similarity.dtype))


def total_loss(features: Mapping[str, torch.Tensor], weights: LossWeights) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum (eq. 6) and its parts.

    Args:
        features: `images`, `addresses` and `captions` as unit vectors (N, D), `scale`, `positions` (N, 2), and the numbers
            of the texts `address_names` and `caption_names` (N,); what weighs nothing may be absent.
    """
    images, scale = features["images"], features["scale"]
    parts = {}
    if weights.address:
        parts["address"] = contrastive_loss(images, features["addresses"], scale, features["address_names"])
    if weights.caption and "captions" in features:
        parts["caption"] = contrastive_loss(images, features["captions"], scale, features["caption_names"])
    if weights.geography:
        parts["geography"] = geography_loss(images, features["positions"])
    total = sum((getattr(weights, name) * loss for name, loss in parts.items()), torch.zeros_like(scale).sum())
    return total, parts


class _Gather(torch.autograd.Function):
    """All workers' rows in the order of their ranks.

    Every worker computes the same loss of the same rows, so the gradient of its own rows is a slice of what it has already and
    needs no exchange. It is multiplied by the number of workers because gradients of weights are averaged over them later.
    """

    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor) -> torch.Tensor:
        ctx.first, ctx.count = dist.get_rank() * len(mine), len(mine)
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(found, mine.contiguous())
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0][ctx.first : ctx.first + ctx.count] * dist.get_world_size()


def gathered(features: Mapping[str, torch.Tensor], shared: Sequence[str] = ("scale",)) -> dict[str, torch.Tensor]:
    """The features of all workers' photos, so that each is the others' negative; `shared` are the same on every worker.

    With weights averaged over workers, as DistributedDataParallel does, gradients are those of the joint batch on one worker.
    Workers must bring equally many photos.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return dict(features)
    return {name: value if name in shared else _Gather.apply(value) for name, value in features.items()}
