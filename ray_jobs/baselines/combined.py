"""Scores of other rows, for a row that is made of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from addressvlm import InputError
from addressvlm.baselines import fusion
from addressvlm.config.compare import FusionConfig, PriorConfig
from addressvlm.evaluation.decoding_comparison import restrict_scores, ruled_out
from addressvlm.evaluation.likelihood import scored_photos
from ray_jobs.baselines.context import TEST, ComparisonContext, Row, SystemOutcome
from ray_jobs.baselines.trained import system_scores
from ray_jobs.evaluation import VALIDATION

Scores = dict[str, list[Row]]  # split -> rows


def scores_of_row(work: ComparisonContext, name: str, wanted_by: str) -> Scores:
    """Those of a row before this one, or of a system of `train.systems`; in the order of the photos.

    Args:
        wanted_by: what begins the sentence if there are none, such as `'Fusion' fuses`.

    Raises:
        InputError: the row has no scores, or is none that stands before this one.
    """
    found = work.outcomes.get(name)
    scores = found.scores if found and found.scores else None
    if scores is None:
        if name not in {system.name for system in work.config.train.systems}:
            raise InputError(
                f"{wanted_by} '{name}', which has no scores: name systems of train.systems or rows of the kinds likelihood, "
                "retrieval, addressclip, fusion and prior that stand before it and did not fail."
            )
        scores = system_scores(work, name)
    return {split: _in_order(scores[split], ids) for split, ids in work.ids.items()}


def combined_costs(work: ComparisonContext, names: Iterable[str]) -> SystemOutcome:
    """What a row needs that is made of these: trained numbers, stored bytes and licences of all of them together."""
    parts = [work.outcomes[name] for name in names if name in work.outcomes]
    return SystemOutcome(
        parameters=sum(part.parameters for part in parts),
        stored_bytes=sum(part.stored_bytes for part in parts),
        licences={what: licence for part in parts for what, licence in part.licences.items()},
    )


def _in_order(rows: Sequence[Row], ids: Sequence[str]) -> list[Row]:
    by_id = {row["id"]: row for row in rows}
    return [by_id[photo] for photo in ids]


def run_fusion(work: ComparisonContext, rival: FusionConfig, redo: bool = False) -> SystemOutcome:
    """Fit the weights on the split `val` and fuse both splits.

    Raises:
        InputError: one of the systems has no scores, or there are no validation photos.
    """
    if VALIDATION not in work.ids:
        raise InputError(f"{work.run.photos} has no split {VALIDATION}, on which the weights of '{rival.name}' are fitted.")
    given = {name: scores_of_row(work, name, f"'{rival.name}' fuses") for name in rival.of}
    weights = fusion.fit_fusion(_arrays(given, VALIDATION), scored_photos(given[rival.of[0]][VALIDATION], work.gazetteer).truth)
    fused: Scores = {}
    for split in work.ids:
        total = fusion.fuse_scores(_arrays(given, split), weights)
        fused[split] = [{**row, "scores": line.tolist()} for row, line in zip(given[rival.of[0]][split], total, strict=True)]
    weighed = {f"weight of {name}": weight for name, weight in weights.items()}
    return replace(combined_costs(work, rival.of), scores=fused, notes=weighed)


def _arrays(given: Mapping[str, Scores], split: str) -> dict[str, np.ndarray]:
    return {name: np.array([row["scores"] for row in of[split]], dtype=np.float64) for name, of in given.items()}


def run_prior(work: ComparisonContext, rival: PriorConfig, redo: bool = False) -> SystemOutcome:
    """The other row's scores of every split, -inf where an address is ruled out; its costs are the other row's.

    Raises:
        InputError: the other row has no scores, or the city can't know so much (see `drawn_priors.restricted`).
    """
    given = scores_of_row(work, rival.of, f"'{rival.name}' is of")
    left = {split: restrict_scores(rows, rival, work.gazetteer, work.config.seed) for split, rows in given.items()}
    if rival.of in work.outcomes and work.outcomes[rival.of].scores:
        for what, took in work.noted(rival.of).items():
            work.note(rival.name, what, took)
    return replace(combined_costs(work, [rival.of]), scores=left, notes=ruled_out(left[TEST], work.gazetteer))
