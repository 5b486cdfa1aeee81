"""Systems made of other systems' scores: a weighted fusion of several, and one with prior information about each photo."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from addressvlm import InputError
from addressvlm.baselines.fusion import fit_fusion, fuse_scores
from addressvlm.config.compare import FusionConfig, PriorConfig
from addressvlm.evaluation.likelihood import restrict_scores, restriction_stats, scored_photos
from ray_jobs.baselines.system import ComparisonContext, System, SystemOutcome
from ray_jobs.baselines.trained import system_scores
from ray_jobs.evaluation import TEST, VALIDATION, Scores


class FusionSystem(System[FusionConfig]):
    """Several systems as one, with weights fitted on the split `val`; it costs what they cost together."""

    def run(self, context: ComparisonContext, redo: bool = False) -> SystemOutcome:
        names = self.settings.of
        if VALIDATION not in context.ids:
            raise InputError(
                f"{context.run.photos} has no split {VALIDATION}, on which the weights of '{self.name}' are fitted."
            )
        scores = {name: scores_of(context, name, f"'{self.name}' fuses") for name in names}
        truth = scored_photos(scores[names[0]][VALIDATION], context.gazetteer).truth
        weights = fit_fusion(_arrays(scores, VALIDATION), truth)
        fused: Scores = {}
        for split in context.ids:
            total = fuse_scores(_arrays(scores, split), weights)
            fused[split] = [{**row, "scores": line.tolist()} for row, line in zip(scores[names[0]][split], total, strict=True)]
        notes = {f"weight of {name}": weight for name, weight in weights.items()}
        return replace(combined_stats(context, names), scores=fused, notes=notes)


class PriorSystem(System[PriorConfig]):
    """Another system with prior information about each photo: addresses that it rules out score -inf. Costs are the other's."""

    def run(self, context: ComparisonContext, redo: bool = False) -> SystemOutcome:
        other, seed = self.settings.of, context.config.seed
        scores = scores_of(context, other, f"'{self.name}' is of")
        restricted = {split: restrict_scores(rows, self.settings, context.gazetteer, seed) for split, rows in scores.items()}
        if other in context.outcomes and context.outcomes[other].scores:
            for part, cost in context.costs(other).items():
                context.save_cost(self.name, part, cost)
        notes = restriction_stats(restricted[TEST], context.gazetteer)
        return replace(combined_stats(context, [other]), scores=restricted, notes=notes)


def scores_of(context: ComparisonContext, name: str, use: str) -> Scores:
    """The scores of a system before this one, or of a system of `train.systems`, in the order of the photos.

    Args:
        use: begins the error sentence, such as `'Fusion' fuses`.

    Raises:
        InputError: the system has no scores, or does not stand before this one.
    """
    outcome = context.outcomes.get(name)
    scores = outcome.scores if outcome else {}
    if not scores:
        if name not in {system.name for system in context.config.train.systems}:
            raise InputError(
                f"{use} '{name}', which has no scores: name systems of train.systems, or systems of the kinds likelihood, "
                "retrieval, addressclip, fusion and prior that stand before it and did not fail."
            )
        scores = system_scores(context, name)
    rows = {split: {row["id"]: row for row in split_rows} for split, split_rows in scores.items()}
    return {split: [rows[split][photo] for photo in ids] for split, ids in context.ids.items()}


def combined_stats(context: ComparisonContext, names: Iterable[str]) -> SystemOutcome:
    """Trained parameters, stored bytes and licences of some systems together."""
    outcomes = [context.outcomes[name] for name in names if name in context.outcomes]
    return SystemOutcome(
        parameters=sum(outcome.parameters for outcome in outcomes),
        stored_bytes=sum(outcome.stored_bytes for outcome in outcomes),
        licences={part: licence for outcome in outcomes for part, licence in outcome.licences.items()},
    )


def _arrays(scores: Mapping[str, Scores], split: str) -> dict[str, np.ndarray]:
    """System -> its scores of a split, float64 (photos, addresses)."""
    return {name: np.array([row["scores"] for row in splits[split]], dtype=np.float64) for name, splits in scores.items()}
