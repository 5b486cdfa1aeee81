"""Late fusion: probabilities of several systems as one.

ln p(address) = sum over systems k of w_k * ln p_k(address), up to a constant. The weights are at least 0 and make the true
addresses of validation photos as likely as they can be; a system that adds nothing gets about 0.
"""

from collections.abc import Mapping

import numpy as np
import torch

from addressvlm.errors import InputError

STEPS = 200
RIDGE = 1e-3  # on the weights, per photo: decides where systems agree on every photo


def fit_fusion(scores: Mapping[str, np.ndarray], truth: np.ndarray) -> dict[str, float]:
    """The weight of each system.

    Args:
        scores: system -> ln p up to a constant, float64 (photos, addresses).
        truth: number of the true address of each photo, -1 for one that is not among them.

    Raises:
        InputError: no photo has its true address among those scored, or the systems scored different addresses.
    """
    known = np.flatnonzero(truth >= 0)
    if not len(known):
        raise InputError("no validation photo has an address of the gazetteer: fuse systems on photos of their own city.")
    stacked = torch.stack([torch.from_numpy(of) for of in _stacked(scores)])[:, torch.from_numpy(known)]
    right = torch.from_numpy(truth[known])
    free = torch.zeros(len(stacked), dtype=torch.float64, requires_grad=True)  # softplus of it is the weight
    optimizer = torch.optim.LBFGS([free], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        weights = torch.nn.functional.softplus(free)
        total = torch.nn.functional.cross_entropy(torch.einsum("k,kpa->pa", weights, stacked), right)
        total = total + RIDGE * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    weights = torch.nn.functional.softplus(free.detach()).tolist()
    return dict(zip(scores, weights, strict=True))


def fuse_scores(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """ln p up to a constant of every address, float64 (photos, addresses); `scores` as for `fit_fusion`."""
    return np.einsum("k,kpa->pa", [weights[name] for name in scores], np.stack(_stacked(scores)))


def _stacked(scores: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """ln p of each system, (photos, addresses) each; what a system rules out gets the least that any address has."""
    made = []
    for of in scores.values():
        if not np.isfinite(of).all():
            least = np.where(np.isfinite(of), of, np.inf).min(axis=1, keepdims=True)
            of = np.where(np.isfinite(of), of, least)
        made.append(of - np.logaddexp.reduce(of, axis=1, keepdims=True))
    if len({of.shape[1] for of in made}) > 1:
        sizes = ", ".join(f"{name} {of.shape[1]}" for name, of in zip(scores, made, strict=True))
        raise InputError(f"systems to be fused scored different numbers of addresses ({sizes}): fuse systems of one city.")
    return made
