"""A row of `train.systems`, or a variant of one: trained if it is not, then asked in its own words."""

import json
import time
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from safetensors import safe_open

from addressvlm import tables
from addressvlm.config import Config
from addressvlm.config_training import SystemConfig
from addressvlm.evaluation.parsing import Judge
from addressvlm.files import fetched, fetched_model
from addressvlm.models.base import locate
from addressvlm.models.card import base_licence
from addressvlm.run import Run
from addressvlm.stores import AnyPath, files_in, path_of
from ray_jobs import answering, given, train
from ray_jobs.answering import Task
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
    begun = time.monotonic()
    if answering.answer(config, task, own.name, model, ids, judge, work.gazetteer, {}, redo):
        held = {"cpus": need.workers * need.cpus_per_worker, "gpus": need.workers * need.gpus_per_worker}
        work.note(own.name, "answering", {"seconds": time.monotonic() - begun, "photos": len(ids), **held})
    if system.stages:
        work.note(own.name, "training", _training(config, system, its_run))
    notes = {"photos without a tile": without} if without else {}
    trained = its_run.model(system.name) if system.stages and not task.images else None
    return replace(described(config, system), notes=notes, model=trained), answering.read(task, own.name)


def described(config: Config, system: SystemConfig) -> Outcome:
    """What a trained system is made of; without answers."""
    run = Run(config)
    folder = path_of(fetched_model(locate(given.model_of(config, run, system))))
    return Outcome(
        parameters=_numbers(run.model(system.name) / "adapter") if system.stages else 0,
        stored_bytes=sum(file.stat().st_size for file in files_in(folder, "*.safetensors")),
        licences={"base model": base_licence(config) or "not said"},
    )


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


def _numbers(folder: AnyPath) -> int:
    """How many numbers the safetensors files of a folder hold."""
    total = 0
    for file in files_in(folder, "*.safetensors"):
        with safe_open(str(fetched(file)), framework="np") as opened:
            total += sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total
