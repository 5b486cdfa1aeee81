#!/usr/bin/env python
"""Test photos and trained models -> answers, metrics with intervals, and a report to look at.

    python ray_jobs/evaluate.py --config demo
    python ray_jobs/evaluate.py --config my_city.yaml --model ours=runs/demo/models/addressvlm/merged --data new_photos.csv
    python ray_jobs/evaluate.py --model runs/a/models/addressvlm/merged --data runs/b
    python ray_jobs/evaluate.py --config demo --priors     # also constrained answers, for the table of modes
    python ray_jobs/evaluate.py --config demo --set evaluate.images=grafts    # photos on the tile of their true place

Writes <run>/answers/<system>/test-*.parquet, <run>/scores/<system>/{val,test}-*.parquet, <run>/metrics.json, <run>/modes.json
and <run>/report.html; with --model or --data the same into <run>/evaluations/<name of the data>, and with
evaluate.images=grafts into <run>/evaluations/grafts. Into the folders of the run's trained models, unless they are asked about
grafts: calibration.json, from the split val.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.evaluation import metrics, report, text_table
from addressvlm.evaluation.parsing import Judge
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE, Gazetteer
from addressvlm.models.cards import set_metrics
from addressvlm.models.loading import resolve_model
from addressvlm.storage import tables
from addressvlm.storage.remote_path import path_of
from addressvlm.storage.run_dir import Run
from ray_jobs import evaluation, resolve_args
from ray_jobs.common import connect, job_parser, load_config, require_resources, run_main
from ray_jobs.evaluation import EvaluationTask, files_digest, model_digest


def run_step(config: Config, redo: bool, priors: bool = False, only: Sequence[str] | None = None) -> None:
    """Score every system of the run, or those of these names, on its own test split, and calibrate those that were trained.

    Raises:
        InputError: a system is not trained yet, the data is missing, or the cluster is too small.
    """
    run = Run(config)
    sources = report.ReportSources(run.photos, run.alignment, run.training, run.rejects)
    systems, images = resolve_args.systems_of(config, run, only), resolve_args.shown_images(config, run, "test", redo)
    out = resolve_args.output_folder(run, None) if images else run.folder
    evaluate(config, EvaluationTask(systems, run.photos, "test", out, sources, not images, priors, images), redo)


def evaluate(config: Config, task: EvaluationTask, redo: bool) -> None:
    """Answer, judge, write metrics.json and report.html, print the table.

    Raises:
        InputError: as `run_step`, or a model folder does not exist.
    """
    folders = {name: resolve_model(model) for name, model in task.systems.items()}
    tables.table_files(task.data, task.split)
    need = config.evaluate
    require_resources("CPU", need.workers * need.cpus_per_worker, "evaluate", "evaluate.workers or evaluate.cpus_per_worker")
    ids = evaluation.choose_photos(config, task)
    judge, gazetteer = evaluation.make_judge(task, folders)
    main = report.main_system(list(folders))
    scores = {name: _scores(config, task, name, folder, ids, main, gazetteer, redo) for name, folder in folders.items()}
    for name, folder in folders.items():
        evaluation.answer_questions(config, task, name, folder, ids, judge, gazetteer, scores[name], redo)
    answers = {name: evaluation.read_answers(task, name) for name in folders}
    scored = {
        "city": gazetteer.city or config.city.name,
        "split": task.split,
        "systems": [
            {"name": name, "metrics": metrics.compute_metrics(rows, need.bootstrap, config.seed)}
            for name, rows in answers.items()
        ],
    }
    compared = None
    if task.split in scores[main]:
        rows = scores[main][task.split]
        answered = {need.answers: answers[main]} if need.answers != "likelihood" else {}
        if task.priors and need.answers != "constrained":
            answered["constrained"] = _constrained(config, task, main, folders[main], ids, judge, gazetteer, redo)
        compared = evaluation.compare_decoding_modes(config, task.out, main, folders[main], rows, answered, gazetteer)
    try:
        (task.out / "metrics.json").write_text(json.dumps(scored, indent=1, ensure_ascii=False), encoding="utf-8")
        report.write_report(
            task.out / "report.html", scored, answers, gazetteer, task.sources, config.seed, need.bootstrap, compared
        )
    except OSError as error:
        raise InputError(f"{task.out} can't be written ({error.strerror}): free room or give another --out.") from error
    if task.own:
        photos = f"{len(ids):,} photos of the split {task.split}"
        for system in scored["systems"]:
            set_metrics(path_of(folders[system["name"]]).parent, system["metrics"], photos)
    print(f"\n{text_table.metrics_table(scored['systems'])}\n", flush=True)
    if compared:
        print(f"{text_table.decoding_table(compared)}\n", flush=True)
    print(f"{task.out / 'metrics.json'}\n{task.out / 'report.html'}", flush=True)


def _scores(
    config: Config, task: EvaluationTask, name: str, model: str, ids: list[str], main: str, city: Gazetteer, redo: bool
) -> dict[str, list[dict[str, Any]]]:
    """Split -> one system's scores, as far as they are needed: to calibrate it, to answer by them, to compare modes."""
    own = (path_of(model) / GAZETTEER_FILE).is_file()
    held = evaluation.calibration_photos(config, task.data) if task.own and own else {}
    wanted = dict(held)
    if config.evaluate.answers == "likelihood" or (name == main and own and (held or task.priors)):
        wanted[task.split] = ids
    if not wanted:
        return {}
    made_from = {split: files_digest(tables.table_files(task.shown, split)) for split in wanted}
    made_from |= {"model": model_digest(model), "dtype": config.model.dtype, "seed": config.seed}
    found = evaluation.score_addresses(config, task.out, name, model, task.shown, wanted, made_from, city, redo)
    if held:
        evaluation.fit_and_save_calibration(config, name, model, found, city)
    return found


def _constrained(
    config: Config, task: EvaluationTask, name: str, model: str, ids: list[str], judge: Judge, city: Gazetteer, redo: bool
) -> list[dict[str, Any]]:
    """What the same system generates in the mode `constrained`, from a folder beside its answers."""
    name = f"{name} constrained"
    need = config.evaluate.model_copy(update={"answers": "constrained"})
    evaluation.answer_questions(
        config.model_copy(update={"evaluate": need}), task, name, model, ids, judge, city, {}, redo, ["generation"]
    )
    return evaluation.read_answers(task, name)


def _parser() -> argparse.ArgumentParser:
    parser = job_parser(__doc__ or "")
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
    config = load_config(args)
    connect()
    if not (args.model or args.data or args.out or args.split != "test"):
        run_step(config, args.redo, args.priors)
        return
    run = Run(config)
    if args.data and config.evaluate.images == "grafts":
        raise InputError(
            "--data and evaluate.images=grafts don't go together, the run has no map of other photos: leave one out."
        )
    systems = resolve_args.named_models(args.model) or resolve_args.systems_of(config, run)
    for model in systems.values():
        resolve_model(model)
    out = (args.out or resolve_args.output_folder(run, args.data)).absolute()
    data = resolve_args.dataset(config, args.data, args.photos, systems, out, args.redo) if args.data else run.photos
    images = resolve_args.shown_images(config, run, args.split, args.redo)
    evaluate(
        config,
        EvaluationTask(systems, data, args.split, out, report.ReportSources(photos=data), False, args.priors, images),
        args.redo,
    )


if __name__ == "__main__":
    run_main(main)
