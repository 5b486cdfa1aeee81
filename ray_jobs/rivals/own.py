"""A row of `train.systems`, or a variant of one: trained if it is not, then asked as `evaluate.answers` says."""

import json
import time
from dataclasses import dataclass, replace
from typing import Any

from addressvlm import tables
from addressvlm.answers.calibration import Calibration
from addressvlm.config import Config
from addressvlm.config_training import SystemConfig
from addressvlm.evaluation.parsing import Judge
from addressvlm.evaluation.scores import calibrated
from addressvlm.models.base import locate
from addressvlm.run import Run
from addressvlm.stores import path_of
from ray_jobs import answering, given, train
from ray_jobs.answering import Task
from ray_jobs.rivals.described import described
from ray_jobs.rivals.scored import before_calibration
from ray_jobs.rivals.work import Outcome, Row, Work


@dataclass(frozen=True)
class Own:
    """What is trained, as which settings say, and what its row is called."""

    name: str
    config: Config
    system: SystemConfig


def run(work: Work, own: Own, task: Task, judge: Judge, redo: bool = False) -> tuple[Outcome, list[Row]]:
    """The outcome and its judged answers, rows of `tables.ANSWERS`; they are in answers/<slug> of the comparison's run.

    Raises:
        InputError: it can't be trained, or the model can't be asked.
    """
    config, system, its_run = own.config, own.system, Run(own.config)
    if system.stages:
        train.run_step(config, redo, [system.name])
    model = locate(given.model_of(config, its_run, system))
    ids, need = work.ids[task.split], config.evaluate
    task = replace(task, images=given.images(config, work.run, task.split, redo))
    there = set(tables.read(task.shown, task.split, ["id"])["id"].to_pylist())
    without, ids = len(set(ids) - there), [photo for photo in ids if photo in there]
    begun, scores = time.monotonic(), {}
    if need.answers == "scored":
        asked = {task.split: ids} if task.images else work.ids
        scores = before_calibration(work, config, own.name, model, asked, task.images, redo)
    if answering.answer(config, task, own.name, model, ids, judge, work.gazetteer, scores, redo):
        held = {"cpus": need.workers * need.cpus_per_worker, "gpus": need.workers * need.gpus_per_worker}
        work.note(own.name, "answering", {"seconds": time.monotonic() - begun, "photos": len(ids), **held})
    if system.stages:
        work.note(own.name, "training", _training(config, system, its_run))
    notes = {"photos without a tile": without} if without else {}
    trained = its_run.model(system.name) if system.stages and not task.images else None
    calibration = Calibration.load(path_of(model)) if scores else Calibration()
    ranked = {split: calibrated(rows, calibration) for split, rows in scores.items()}
    outcome = replace(described(config, system), scores=ranked, notes=notes, model=trained)
    return outcome, answering.read(task, own.name)


def _training(config: Config, system: SystemConfig, run: Run) -> dict[str, Any]:
    """What the steps of a training took, added up from its journal; starting the workers is not among them."""
    file = run.journal(system.name) / "loss.jsonl"
    train_config, seconds, photos = config.train, 0.0, 0
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        step = json.loads(line)
        stage = train_config.stages[step["stage"]]
        rows = stage.batch_size * stage.accumulate * train_config.workers
        seconds, photos = seconds + rows / step["samples_per_s"], photos + rows
    workers = train_config.workers
    return {
        "seconds": seconds, "photos": photos,
        "cpus": workers * train_config.cpus_per_worker, "gpus": workers * train_config.gpus_per_worker,
    }  # fmt: skip
