"""Late fusion of several systems' address distributions.

ln p(address) = sum over systems k of w_k * ln p_k(address), up to a constant. The weights are at least 0 and maximize the
likelihood of the true addresses of validation photos; a system that adds nothing gets about 0.
"""

from collections.abc import Mapping

import numpy as np
import torch

from addressvlm.errors import InputError

STEPS = 200
RIDGE = 1e-3  # on the weights, per photo: makes them unique where systems agree on every photo


def fit_fusion(scores: Mapping[str, np.ndarray], truth: np.ndarray) -> dict[str, float]:
    """The weight of each system.

    Args:
        scores: system -> ln p up to a constant, float64 (photos, addresses).
        truth: index of the true address of each photo, -1 where it is none of them.

    Raises:
        InputError: no photo has its true address among those scored, or the systems scored different addresses.
    """
    known = np.flatnonzero(truth >= 0)
    if not len(known):
        raise InputError("no validation photo has an address of the gazetteer: fuse systems on photos of their own city.")
    log_p = torch.from_numpy(_log_probabilities(scores))[:, torch.from_numpy(known)]
    target = torch.from_numpy(truth[known])
    parameters = torch.zeros(len(log_p), dtype=torch.float64, requires_grad=True)  # softplus of them are the weights
    optimizer = torch.optim.LBFGS([parameters], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        weights = torch.nn.functional.softplus(parameters)
        total = torch.nn.functional.cross_entropy(torch.einsum("k,kpa->pa", weights, log_p), target)
        total = total + RIDGE * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return dict(zip(scores, torch.nn.functional.softplus(parameters.detach()).tolist(), strict=True))


def fuse_scores(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """ln p up to a constant of every address, float64 (photos, addresses); `scores` as for `fit_fusion`."""
    return np.einsum("k,kpa->pa", [weights[name] for name in scores], _log_probabilities(scores))


def _log_probabilities(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """ln p (systems, photos, addresses); an address that a system rules out gets the system's least ln p of the photo."""
    sizes = {name: array.shape[1] for name, array in scores.items()}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(f"systems to be fused scored different numbers of addresses ({counts}): fuse systems of one city.")
    log_p = []
    for array in scores.values():
        finite = np.isfinite(array)
        filled = np.where(finite, array, np.where(finite, array, np.inf).min(axis=1, keepdims=True))
        log_p.append(filled - np.logaddexp.reduce(filled, axis=1, keepdims=True))
    return np.stack(log_p)
