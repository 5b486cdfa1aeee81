"""A trained system that answers by its probabilities of all addresses."""

import time
from dataclasses import replace

from addressvlm import InputError, tables
from addressvlm.config_compare import ScoredConfig
from addressvlm.evaluation.scores import calibrated
from addressvlm.run import DONE, slug
from ray_jobs import given, scoring
from ray_jobs.answering import files_digest, model_digest
from ray_jobs.rivals.own import described
from ray_jobs.rivals.work import Outcome, Row, Work


def run(work: Work, rival: ScoredConfig, redo: bool = False) -> Outcome:
    """Scores of the splits `val` and `test`, calibrated as the model's own folder then says.

    Raises:
        InputError: there is no such system, it is not trained, or its model has other addresses than the city.
    """
    begun, known = time.monotonic(), (work.run.folder / "scores" / slug(rival.of) / DONE).is_file() and not redo
    scores = scores_of(work, rival.of, redo)
    if not known:
        need, photos = work.config.evaluate, sum(map(len, work.ids.values()))
        held = {"cpus": need.workers * need.cpus_per_worker, "gpus": need.workers * need.gpus_per_worker}
        work.note(rival.name, "answering", {"seconds": time.monotonic() - begun, "photos": photos, **held})
    made = described(work.config, next(s for s in work.config.train.systems if s.name == rival.of))
    return replace(made, scores=scores)


def scores_of(work: Work, system: str, redo: bool = False) -> dict[str, list[Row]]:
    """Split -> rows of `tables.SCORES` of a system of `train.systems`, from <run>/scores or new, calibrated if it was trained.

    Raises:
        InputError: see `run`.
    """
    config, run = work.config, work.run
    named = {s.name: s for s in config.train.systems}
    if system not in named:
        raise InputError(f"compare.systems names {system}: systems of train.systems are {', '.join(named)}.")
    model = given.model_of(config, run, named[system])
    own = scoring.gazetteer_of(model, work.gazetteer)
    if own.addresses != work.gazetteer.addresses:
        raise InputError(f"{system} knows other addresses than {run.gazetteer}: it can't be scored on them; train it anew.")
    held = scoring.calibrated_on(config, run.photos) if named[system].stages else {}
    wanted = {**work.ids, **held}
    made_from = {split: files_digest(tables.files(run.photos, split)) for split in wanted}
    made_from |= {"model": model_digest(model), "dtype": config.model.dtype, "seed": config.seed}
    found = scoring.score(config, run.folder, system, model, run.photos, wanted, made_from, work.gazetteer, redo)
    if not held:
        return found
    calibration = scoring.calibrate(config, system, model, found, work.gazetteer)
    return {split: calibrated(found[split], calibration) for split in work.ids}
