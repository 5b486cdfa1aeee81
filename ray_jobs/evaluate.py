#!/usr/bin/env python
"""Test photos and trained models -> answers, metrics with intervals, and a report to look at.

    python ray_jobs/evaluate.py --config demo
    python ray_jobs/evaluate.py --config my_city.yaml --model ours=runs/demo/models/addressvlm/merged --data new_photos.csv
    python ray_jobs/evaluate.py --model runs/a/models/addressvlm/merged --data runs/b
    python ray_jobs/evaluate.py --config demo --priors     # also constrained answers, for the table of modes

Writes <run>/answers/<system>/test-*.parquet, <run>/scores/<system>/{val,test}-*.parquet, <run>/metrics.json, <run>/modes.json
and <run>/report.html; with --model or --data the same into <run>/evaluations/<name of the data>. Into the folders of the
run's trained models: calibration.json, from the split val.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from addressvlm import InputError, tables
from addressvlm.addresses import GAZETTEER, Gazetteer
from addressvlm.answers.calibration import CALIBRATION
from addressvlm.config import Config
from addressvlm.evaluation import asking, metrics, report, table
from addressvlm.evaluation.asking import judged
from addressvlm.evaluation.parsing import Judge
from addressvlm.evaluation.scores import answers_of as answers_by_scores
from addressvlm.files import fetched_model
from addressvlm.models.base import locate
from addressvlm.models.card import set_metrics
from addressvlm.run import Run, is_done, slug, writing
from addressvlm.shards import sources_fingerprint
from addressvlm.stores import AnyPath, StorePath, path_of
from ray_jobs import given, scoring
from ray_jobs.asking import answers_of
from ray_jobs.common import arguments, configure, connect, job, require


@dataclass(frozen=True)
class Job:
    """What is scored, on what, and where the result goes."""

    systems: dict[str, str]  # name -> model folder or hub name
    data: AnyPath  # folder of the photos table
    split: str
    out: AnyPath
    sources: report.Sources
    own: bool = False  # the run's data and systems: these are calibrated
    priors: bool = False  # the table of modes gets constrained answers too


def run_step(config: Config, redo: bool, priors: bool = False) -> None:
    """Score every system of the run on its own test split, and calibrate those that were trained.

    Raises:
        InputError: a system is not trained yet, the data is missing, or the cluster is too small.
    """
    run = Run(config)
    sources = report.Sources(run.photos, run.alignment, run.training, run.rejects)
    evaluate(config, Job(given.systems_of(config, run), run.photos, "test", run.folder, sources, True, priors), redo)


def evaluate(config: Config, task: Job, redo: bool) -> None:
    """Answer, judge, write metrics.json and report.html, print the table.

    Raises:
        InputError: as `run_step`, or a model folder does not exist.
    """
    folders = {name: locate(model) for name, model in task.systems.items()}
    tables.files(task.data, task.split)
    need = config.evaluate
    require("CPU", need.workers * need.cpus_per_worker, "evaluate", "evaluate.workers or evaluate.cpus_per_worker")
    ids = _chosen_ids(config, task)
    judge, gazetteer = _judge(task, folders)
    main = report.main_of(list(folders))
    scores = {name: _scores(config, task, name, folder, ids, main, gazetteer, redo) for name, folder in folders.items()}
    for name, folder in folders.items():
        _answer(config, task, name, folder, ids, judge, gazetteer, scores[name], redo)
    answers = {name: list(tables.rows(task.out / "answers" / slug(name), task.split)) for name in folders}
    scored = {
        "city": gazetteer.city or config.city.name,
        "split": task.split,
        "systems": [
            {"name": name, "metrics": metrics.score(rows, need.bootstrap, config.seed)} for name, rows in answers.items()
        ],
    }
    compared = None
    if task.split in scores[main]:
        rows = scores[main][task.split]
        answered = {need.answers: answers[main]} if need.answers != "scored" else {}
        if task.priors and need.answers != "constrained":
            answered["constrained"] = _constrained(config, task, main, folders[main], ids, judge, gazetteer, redo)
        compared = scoring.compare(config, task.out, main, folders[main], rows, answered, gazetteer)
    try:
        (task.out / "metrics.json").write_text(json.dumps(scored, indent=1, ensure_ascii=False), encoding="utf-8")
        report.write(task.out / "report.html", scored, answers, gazetteer, task.sources, config.seed, need.bootstrap, compared)
    except OSError as error:
        raise InputError(f"{task.out} can't be written ({error.strerror}): free room or give another --out.") from error
    if task.own:
        photos = f"{len(ids):,} photos of the split {task.split}"
        for system in scored["systems"]:
            set_metrics(path_of(folders[system["name"]]).parent, system["metrics"], photos)
    print(f"\n{table.plain(scored['systems'])}\n", flush=True)
    if compared:
        print(f"{table.modes(compared)}\n", flush=True)
    print(f"{task.out / 'metrics.json'}\n{task.out / 'report.html'}", flush=True)


def _scores(
    config: Config, task: Job, name: str, model: str, ids: list[str], main: str, city: Gazetteer, redo: bool
) -> dict[str, list[dict[str, Any]]]:
    """Split -> one system's scores, as far as they are needed: to calibrate it, to answer by them, to compare modes."""
    own = (path_of(model) / GAZETTEER).is_file()
    validation = scoring.validation_ids(config, task.data) if task.own and own else []
    wanted = {scoring.VALIDATION: validation} if validation else {}
    if config.evaluate.answers == "scored" or (name == main and own and (validation or task.priors)):
        wanted[task.split] = ids
    if not wanted:
        return {}
    made_from = {split: _hash(tables.files(task.data, split)) for split in wanted}
    made_from |= {"model": digest(model), "dtype": config.model.dtype, "seed": config.seed}
    found = scoring.score(config, task.out, name, model, task.data, wanted, made_from, city, redo)
    if validation:
        scoring.calibrate(config, name, model, found[scoring.VALIDATION], city)
    return found


def _answer(
    config: Config, task: Job, name: str, model: str, ids: list[str], judge: Judge, city: Gazetteer,
    scores: dict[str, list[dict[str, Any]]], redo: bool, kinds: Sequence[str] = asking.KINDS,
) -> None:  # fmt: skip
    """One system's answers into answers/<slug>, unless they are there."""
    folder = task.out / "answers" / slug(name)
    settings = {
        "evaluate": config.evaluate.model_dump(include={"answers", "max_new_tokens", "temperature", "max_photos"}),
        "seed": config.seed,
        "dtype": config.model.dtype,
        "split": task.split,
        "data": _hash(tables.files(task.data, task.split)),
        "model": digest(model),
        "kinds": list(kinds),
    }
    if is_done(folder, settings, redo):
        print(f"evaluate: {name}: already answered", flush=True)
        return
    files = tables.files(task.data, task.split)
    with writing(folder, settings) as partial:
        if config.evaluate.answers == "scored":
            columns = [column for column in asking.COLUMNS if column != "image"]
            photos = {row["id"]: row for row in tables.rows(task.data, task.split, columns)}
            found = list(answers_by_scores(scores[task.split], photos, scoring.gazetteer_of(model, city)))
        else:
            found = answers_of(config, name, model, files, ids, city, kinds)
        place = {photo: i for i, photo in enumerate(ids)}
        found.sort(key=lambda row: (place[row["id"]], row["level"], row["kind"], row["question"]))
        tables.write(partial, task.split, judged(found, judge), tables.ANSWERS)


def _constrained(
    config: Config, task: Job, name: str, model: str, ids: list[str], judge: Judge, city: Gazetteer, redo: bool
) -> list[dict[str, Any]]:
    """What the same system generates in the mode `constrained`, from a folder beside its answers."""
    name = f"{name} constrained"
    need = config.evaluate.model_copy(update={"answers": "constrained"})
    _answer(config.model_copy(update={"evaluate": need}), task, name, model, ids, judge, city, {}, redo, ["generation"])
    return list(tables.rows(task.out / "answers" / slug(name), task.split))


def digest(model: str) -> str:
    """What tells two models apart: a hash of a folder's weights and settings; of a hub model its name."""
    folder = fetched_model(model)
    if not folder.is_dir():
        return model
    files = [file for kind in ("*.safetensors", "*.json", "*.jinja") for file in folder.glob(kind)]
    return _hash([file for file in files if file.name != CALIBRATION])


def _hash(files: Sequence[AnyPath]) -> str:
    if any(isinstance(file, StorePath) for file in files):  # not fetched for this: the ends of Parquet files tell them apart
        return sources_fingerprint(*map(str, sorted(files)))[:16]
    total = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as content:
            total.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:16]


def _chosen_ids(config: Config, task: Job) -> list[str]:
    """The photos to ask about, in the order of the table; all, or as many as wanted, drawn by seed.

    Raises:
        InputError: the split has no rows.
    """
    ids = tables.read(task.data, task.split, ["id"])["id"].to_pylist()
    if not ids:
        raise InputError(f"{task.data} has no photos in its split {task.split}: give another --data or --split.")
    wanted = config.evaluate.max_photos
    if not wanted or wanted >= len(ids):
        return ids
    drawn = set(random.Random(config.seed).sample(ids, wanted))
    return [photo for photo in ids if photo in drawn]


def _judge(task: Job, folders: dict[str, str]) -> tuple[Judge, Gazetteer]:
    """One judge for all systems, who knows the names of the data and of every model's city, and the data's gazetteer."""
    truth = tables.read(task.data, task.split, ["street", "district"])
    streets, districts = set(truth["street"].to_pylist()), set(truth["district"].to_pylist())
    variants: dict[str, list[str]] = {}
    own = Gazetteer([])
    for folder in [task.data, *map(path_of, folders.values())]:
        if (folder / GAZETTEER).is_file():
            gazetteer = Gazetteer.load(folder / GAZETTEER)
            own = gazetteer if folder == task.data else own
            streets.update(gazetteer.streets)
            districts.update(gazetteer.districts)
            variants |= gazetteer.variants
    return Judge(sorted(streets), sorted(districts), variants), own


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", action="append", default=[], metavar="[NAME=]FOLDER", help="score this model; repeatable")
    parser.add_argument("--data", metavar="PATH", help="a run, a folder with test-*.parquet, or a manifest (default: the run)")
    parser.add_argument("--photos", metavar="FOLDER", help="what `file` in the manifest is relative to (default: its folder)")
    parser.add_argument("--split", default="test", help="split to score (default: test)")
    parser.add_argument("--priors", action="store_true", help="compare free, constrained and scored answers, and priors")
    parser.add_argument("--out", type=path_of, metavar="FOLDER", help="where the result goes (default: <run>/evaluations/…)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = _parser().parse_args(argv)
    config = configure(args)
    connect()
    if not (args.model or args.data or args.out or args.split != "test"):
        run_step(config, args.redo, args.priors)
        return
    run = Run(config)
    systems = given.named(args.model) or given.systems_of(config, run)
    for model in systems.values():
        locate(model)
    out = (args.out or given.out(run, args.data)).absolute()
    data = given.dataset(config, args.data, args.photos, systems, out, args.redo) if args.data else run.photos
    evaluate(config, Job(systems, data, args.split, out, report.Sources(photos=data), False, args.priors), args.redo)


if __name__ == "__main__":
    job(main)
