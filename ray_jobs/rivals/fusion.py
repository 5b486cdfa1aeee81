"""Scores of several rows as one; nothing is computed on the cluster."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from addressvlm import InputError
from addressvlm.baselines import fusion
from addressvlm.config_compare import FusionConfig
from addressvlm.evaluation.scores import scored
from ray_jobs.rivals.parts import Scores, made_of, scores_of_row
from ray_jobs.rivals.work import Outcome, Work
from ray_jobs.scoring import VALIDATION


def run(work: Work, rival: FusionConfig, redo: bool = False) -> Outcome:
    """Fit the weights on the split `val` and fuse both splits.

    Raises:
        InputError: one of the systems has no scores, or there are no validation photos.
    """
    if VALIDATION not in work.ids:
        raise InputError(f"{work.run.photos} has no split {VALIDATION}, on which the weights of '{rival.name}' are fitted.")
    given = {name: scores_of_row(work, name, f"'{rival.name}' fuses") for name in rival.of}
    weights = fusion.fit(_arrays(given, VALIDATION), scored(given[rival.of[0]][VALIDATION], work.gazetteer).truth)
    fused: Scores = {}
    for split in work.ids:
        total = fusion.fuse(_arrays(given, split), weights)
        fused[split] = [{**row, "scores": line.tolist()} for row, line in zip(given[rival.of[0]][split], total, strict=True)]
    weighed = {f"weight of {name}": weight for name, weight in weights.items()}
    return replace(made_of(work, rival.of), scores=fused, notes=weighed)


def _arrays(given: Mapping[str, Scores], split: str) -> dict[str, np.ndarray]:
    return {name: np.array([row["scores"] for row in of[split]], dtype=np.float64) for name, of in given.items()}
