"""Scores of several rows as one; nothing is computed on the cluster."""

from collections.abc import Mapping, Sequence

import numpy as np

from addressvlm import InputError, tables
from addressvlm.addresses import Address
from addressvlm.baselines import fusion
from addressvlm.config_compare import FusionConfig
from addressvlm.evaluation.scores import scored
from ray_jobs.rivals.scored import scores_of
from ray_jobs.rivals.work import Outcome, Row, Work
from ray_jobs.scoring import VALIDATION

Scores = dict[str, list[Row]]  # split -> rows


def run(work: Work, rival: FusionConfig, redo: bool = False) -> Outcome:
    """Fit the weights on the split `val` and fuse both splits.

    Raises:
        InputError: one of the systems has no scores, or there are no validation photos.
    """
    if VALIDATION not in work.ids:
        raise InputError(f"{work.run.photos} has no split {VALIDATION}, on which the weights of '{rival.name}' are fitted.")
    given = {name: _scores(work, rival, name) for name in rival.of}
    addresses = work.gazetteer.addresses
    learnt = tables.read(work.run.photos, "train", ["street", "district"]).to_pylist()
    common = fusion.common(addresses, [Address(row["street"], row["district"]) for row in learnt])
    weights = fusion.fit(_arrays(given, VALIDATION, common), scored(given[rival.of[0]][VALIDATION], work.gazetteer).truth)
    fused: Scores = {}
    for split in work.ids:
        rows = given[rival.of[0]][split]
        total = fusion.fuse(_arrays(given, split, common), weights, len(rows))
        fused[split] = [{**row, "scores": line.tolist()} for row, line in zip(rows, total, strict=True)]
    parts = [work.outcomes[name] for name in rival.of if name in work.outcomes]
    return Outcome(
        scores=fused,
        parameters=sum(part.parameters for part in parts),
        stored_bytes=sum(part.stored_bytes for part in parts),
        licences={what: licence for part in parts for what, licence in part.licences.items()},
        notes={f"weight of {name}": weight for name, weight in weights.items()},
    )


def _scores(work: Work, rival: FusionConfig, name: str) -> Scores:
    """Those of a row before this one, or of a system of `train.systems`; in the order of the photos."""
    found = work.outcomes.get(name)
    scores = found.scores if found and found.scores else None
    if scores is None:
        if name not in {system.name for system in work.config.train.systems}:
            raise InputError(
                f"'{rival.name}' fuses '{name}', which has no scores: name systems of train.systems or rows of the kinds "
                "scored, retrieval, addressclip and fusion that stand before it and did not fail."
            )
        scores = scores_of(work, name)
    return {split: _in_order(scores[split], ids) for split, ids in work.ids.items()}


def _in_order(rows: Sequence[Row], ids: Sequence[str]) -> list[Row]:
    by_id = {row["id"]: row for row in rows}
    return [by_id[photo] for photo in ids]


def _arrays(given: Mapping[str, Scores], split: str, common: np.ndarray) -> dict[str, np.ndarray]:
    scores = {name: np.array([row["scores"] for row in of[split]]) for name, of in given.items()}
    return {**scores, fusion.COMMON: common}
