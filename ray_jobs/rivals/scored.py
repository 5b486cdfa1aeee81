"""A trained system that answers by its probabilities of all addresses."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from addressvlm import InputError, tables
from addressvlm.addresses import GAZETTEER
from addressvlm.answers.calibration import Calibration
from addressvlm.config import Config
from addressvlm.config_compare import ScoredConfig
from addressvlm.evaluation.scores import calibrated
from addressvlm.run import DONE, slug
from addressvlm.stores import AnyPath, path_of
from ray_jobs import given, scoring
from ray_jobs.answering import files_digest, model_digest
from ray_jobs.rivals.described import described
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
    config = work.config
    named = {s.name: s for s in config.train.systems}
    if system not in named:
        raise InputError(f"compare.systems names {system}: systems of train.systems are {', '.join(named)}.")
    model = given.model_of(config, work.run, named[system])
    found = before_calibration(work, config, system, model, work.ids, redo=redo)
    calibration = Calibration.load(path_of(model)) if named[system].stages else Calibration()
    return {split: calibrated(rows, calibration) for split, rows in found.items()}


def before_calibration(
    work: Work, config: Config, name: str, model: str, asked: Mapping[str, Sequence[str]], shown: AnyPath | None = None,
    redo: bool = False,
) -> dict[str, list[Row]]:  # fmt: skip
    """Split -> rows of SCORES as the model gives them; a trained model's calibration is left in its folder.

    Args:
        config: says how it was trained and is asked.
        name: of the folder below <run>/scores.
        asked: split -> ids.
        shown: the table whose images it is shown, which it is then not calibrated on; default: the run's photos.

    Raises:
        InputError: the model has other addresses than the city.
    """
    own, data = scoring.gazetteer_of(model, work.gazetteer), shown or work.run.photos
    if own.addresses != work.gazetteer.addresses:
        raise InputError(f"{name} knows other addresses than {work.run.gazetteer}: it can't be scored on them; train it anew.")
    trained = (path_of(model) / GAZETTEER).is_file()
    held = scoring.calibrated_on(config, data) if trained and shown is None else {}
    wanted = {**asked, **held}
    made_from = {split: files_digest(tables.files(data, split)) for split in wanted}
    made_from |= {"model": model_digest(model), "dtype": config.model.dtype, "seed": config.seed}
    found = scoring.score(config, work.run.folder, name, model, data, wanted, made_from, work.gazetteer, redo)
    if held:
        scoring.calibrate(config, name, model, found, work.gazetteer)
    return {split: found[split] for split in asked}
