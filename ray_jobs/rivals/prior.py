"""Another row that knows something of each photo beforehand (paper 002, D.1, Table 12); nothing is computed on the cluster."""

from dataclasses import replace

from addressvlm.config_compare import PriorConfig
from addressvlm.evaluation.drawn_priors import restricted, ruled_out
from ray_jobs.rivals.parts import made_of, scores_of_row
from ray_jobs.rivals.work import TEST, Outcome, Work


def run(work: Work, rival: PriorConfig, redo: bool = False) -> Outcome:
    """The other row's scores of every split, -inf where an address is ruled out; its costs are the other row's.

    Raises:
        InputError: the other row has no scores, or the city can't know so much (see `drawn_priors.restricted`).
    """
    given = scores_of_row(work, rival.of, f"'{rival.name}' is of")
    left = {split: restricted(rows, rival, work.gazetteer, work.config.seed) for split, rows in given.items()}
    if rival.of in work.outcomes and work.outcomes[rival.of].scores:
        for what, took in work.noted(rival.of).items():
            work.note(rival.name, what, took)
    return replace(made_of(work, [rival.of]), scores=left, notes=ruled_out(left[TEST], work.gazetteer))
