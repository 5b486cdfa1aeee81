"""A row of `train.systems`, or a variant of one: trained if it is not, then asked as `evaluate.answers` says."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from addressvlm import InputError
from addressvlm.answers.calibration import Calibration
from addressvlm.config import Config
from addressvlm.config.compare import LikelihoodConfig
from addressvlm.config.train import SystemConfig
from addressvlm.evaluation.likelihood import calibrated_rows
from addressvlm.evaluation.parsing import Judge
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE
from addressvlm.models.loading import resolve_model
from addressvlm.storage import tables
from addressvlm.storage.remote_path import AnyPath, path_of
from addressvlm.storage.run_dir import DONE_FILE, Run, slug
from ray_jobs import evaluation, resolve_args, train
from ray_jobs.baselines.context import ComparisonContext, Row, SystemOutcome, model_stats
from ray_jobs.evaluation import EvaluationTask, files_digest, model_digest


def run_likelihood(work: ComparisonContext, rival: LikelihoodConfig, redo: bool = False) -> SystemOutcome:
    """Scores of the splits `val` and `test`, calibrated as the model's own folder then says.

    Raises:
        InputError: there is no such system, it is not trained, or its model has other addresses than the city.
    """
    begun, known = time.monotonic(), (work.run.folder / "scores" / slug(rival.of) / DONE_FILE).is_file() and not redo
    scores = system_scores(work, rival.of, redo)
    if not known:
        need, photos = work.config.evaluate, sum(map(len, work.ids.values()))
        held = {"cpus": need.workers * need.cpus_per_worker, "gpus": need.workers * need.gpus_per_worker}
        work.note(rival.name, "answering", {"seconds": time.monotonic() - begun, "photos": photos, **held})
    made = model_stats(work.config, next(s for s in work.config.train.systems if s.name == rival.of))
    return replace(made, scores=scores)


def system_scores(work: ComparisonContext, system: str, redo: bool = False) -> dict[str, list[Row]]:
    """Split -> rows of `tables.SCORES` of a system of `train.systems`, from <run>/scores or new, calibrated if it was trained.

    Raises:
        InputError: see `run_likelihood`.
    """
    config = work.config
    named = {s.name: s for s in config.train.systems}
    if system not in named:
        raise InputError(f"compare.systems names {system}: systems of train.systems are {', '.join(named)}.")
    model = resolve_args.model_of(config, work.run, named[system])
    found = uncalibrated_scores(work, config, system, model, work.ids, redo=redo)
    calibration = Calibration.load(path_of(model)) if named[system].stages else Calibration()
    return {split: calibrated_rows(rows, calibration) for split, rows in found.items()}


def uncalibrated_scores(
    work: ComparisonContext, config: Config, name: str, model: str, asked: Mapping[str, Sequence[str]], shown: AnyPath | None = None,
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
    own, data = evaluation.gazetteer_of(model, work.gazetteer), shown or work.run.photos
    if own.addresses != work.gazetteer.addresses:
        raise InputError(f"{name} knows other addresses than {work.run.gazetteer}: it can't be scored on them; train it anew.")
    trained = (path_of(model) / GAZETTEER_FILE).is_file()
    held = evaluation.calibration_photos(config, data) if trained and shown is None else {}
    wanted = {**asked, **held}
    made_from = {split: files_digest(tables.table_files(data, split)) for split in wanted}
    made_from |= {"model": model_digest(model), "dtype": config.model.dtype, "seed": config.seed}
    found = evaluation.score_addresses(config, work.run.folder, name, model, data, wanted, made_from, work.gazetteer, redo)
    if held:
        evaluation.fit_and_save_calibration(config, name, model, found, work.gazetteer)
    return {split: found[split] for split in asked}


@dataclass(frozen=True)
class TrainedSystem:
    """What is trained, as which settings say, and what its row is called."""

    name: str
    config: Config
    system: SystemConfig


def run_trained(
    work: ComparisonContext, own: TrainedSystem, task: EvaluationTask, judge: Judge, redo: bool = False
) -> tuple[SystemOutcome, list[Row]]:
    """The outcome and its judged answers, rows of `tables.ANSWERS`; they are in answers/<slug> of the comparison's run.

    Raises:
        InputError: it can't be trained, or the model can't be asked.
    """
    config, system, its_run = own.config, own.system, Run(own.config)
    if system.stages:
        train.run_step(config, redo, [system.name])
    model = resolve_model(resolve_args.model_of(config, its_run, system))
    ids, need = work.ids[task.split], config.evaluate
    task = replace(task, images=resolve_args.shown_images(config, work.run, task.split, redo))
    there = set(tables.read_table(task.shown, task.split, ["id"])["id"].to_pylist())
    without, ids = len(set(ids) - there), [photo for photo in ids if photo in there]
    begun, scores = time.monotonic(), {}
    if need.answers == "likelihood":
        asked = {task.split: ids} if task.images else work.ids
        scores = uncalibrated_scores(work, config, own.name, model, asked, task.images, redo)
    if evaluation.answer_questions(config, task, own.name, model, ids, judge, work.gazetteer, scores, redo):
        held = {"cpus": need.workers * need.cpus_per_worker, "gpus": need.workers * need.gpus_per_worker}
        work.note(own.name, "answering", {"seconds": time.monotonic() - begun, "photos": len(ids), **held})
    if system.stages:
        work.note(own.name, "training", _training(config, system, its_run))
    notes = {"photos without a tile": without} if without else {}
    trained = its_run.model_dir(system.name) if system.stages and not task.images else None
    calibration = Calibration.load(path_of(model)) if scores else Calibration()
    ranked = {split: calibrated_rows(rows, calibration) for split, rows in scores.items()}
    outcome = replace(model_stats(config, system), scores=ranked, notes=notes, model=trained)
    return outcome, evaluation.read_answers(task, own.name)


def _training(config: Config, system: SystemConfig, run: Run) -> dict[str, Any]:
    """What the steps of a training took, added up from its journal; starting the workers is not among them."""
    file = run.training_dir(system.name) / "loss.jsonl"
    train_config, seconds, photos = config.train, 0.0, 0
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        step = json.loads(line)
        stage = train_config.stages[step["stage"]]
        rows = stage.batch_size * stage.gradient_accumulation_steps * train_config.workers
        seconds, photos = seconds + rows / step["samples_per_s"], photos + rows
    workers = train_config.workers
    return {
        "seconds": seconds, "photos": photos,
        "cpus": workers * train_config.cpus_per_worker, "gpus": workers * train_config.gpus_per_worker,
    }  # fmt: skip
