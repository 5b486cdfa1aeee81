"""Scores of other rows, for a row that is made of them."""

from collections.abc import Iterable, Sequence

from addressvlm import InputError
from ray_jobs.rivals.scored import scores_of
from ray_jobs.rivals.work import Outcome, Row, Work

Scores = dict[str, list[Row]]  # split -> rows


def scores_of_row(work: Work, name: str, wanted_by: str) -> Scores:
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
                f"{wanted_by} '{name}', which has no scores: name systems of train.systems or rows of the kinds scored, "
                "retrieval, addressclip, fusion and prior that stand before it and did not fail."
            )
        scores = scores_of(work, name)
    return {split: _in_order(scores[split], ids) for split, ids in work.ids.items()}


def made_of(work: Work, names: Iterable[str]) -> Outcome:
    """What a row needs that is made of these: trained numbers, stored bytes and licences of all of them together."""
    parts = [work.outcomes[name] for name in names if name in work.outcomes]
    return Outcome(
        parameters=sum(part.parameters for part in parts),
        stored_bytes=sum(part.stored_bytes for part in parts),
        licences={what: licence for part in parts for what, licence in part.licences.items()},
    )


def _in_order(rows: Sequence[Row], ids: Sequence[str]) -> list[Row]:
    by_id = {row["id"]: row for row in rows}
    return [by_id[photo] for photo in ids]
