#!/usr/bin/env python
"""Evaluate trained models on test photos: answers, metrics with confidence intervals, and an HTML report.

    python ray_jobs/evaluate.py --config demo
    python ray_jobs/evaluate.py --config my_city.yaml --model ours=runs/demo/models/addressvlm/merged --data new_photos.csv
    python ray_jobs/evaluate.py --model runs/a/models/addressvlm/merged --data runs/b
    python ray_jobs/evaluate.py --config demo --priors     # also constrained answers, for the table of decoding modes
    python ray_jobs/evaluate.py --config demo --set evaluate.images=grafts    # each photo on the tile of its true place

Writes <run>/answers/<system>/test-*.parquet, <run>/scores/<system>/<split>/*.parquet, <run>/metrics.json, <run>/modes.json,
<run>/report.html and <run>/result.png (some photos and their likeliest addresses); with --model or --data the same into
<run>/evaluations/<name of the data>, with evaluate.images=grafts into <run>/evaluations/grafts. Models trained in the run get a
calibration.json, fitted on the split val, unless they are shown grafts. Rerun it to resume.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from addressvlm import InputError
from addressvlm.answers.calibration import Calibration
from addressvlm.config import Config
from addressvlm.dataset.build import resolve_city_files
from addressvlm.evaluation.comparison import compare_decoding
from addressvlm.evaluation.report import ReportSources, main_system
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE, Gazetteer
from addressvlm.models.cards import set_metrics
from addressvlm.models.loading import resolve_model
from addressvlm.storage import tables
from addressvlm.storage.remote_path import AnyPath, path_of
from addressvlm.storage.run_dir import DONE_FILE, Run, is_done, parse_model_flag, slug
from ray_jobs import evaluation, graft, prepare
from ray_jobs.common import connect, job_parser, load_config, require_evaluation_workers, run_main
from ray_jobs.evaluation import TEST, EvaluationTask, PhotoModel, Row
from ray_jobs.progress import display


def run_step(config: Config, redo: bool, priors: bool = False, only: Sequence[str] | None = None) -> None:
    """Evaluate the systems of the run, or those named, on its own test split, and calibrate those that were trained.

    Raises:
        InputError: a system is not trained yet, the data is missing, or the cluster is too small.
    """
    run = Run(config)
    display.heading("evaluate", "questions about photos of places that training never saw")
    models = {name: resolve_model(model) for name, model in run_models(config, only).items()}
    images = graft.graft_photos(config, run, TEST, redo)
    require_evaluation_workers(config, "evaluate")
    out = output_folder(run, None) if images else run.folder
    task = evaluation.open_task(config, run.photos, TEST, out, models.values(), images)
    sources = ReportSources(run.photos, run.alignment, run.training, run.rejects)
    systems = evaluate(task, models, sources, calibrate=not images, priors=priors, redo=redo)
    if not images:
        photos = f"{len(task.ids):,} photos of the split {TEST}"
        for system in systems:
            set_metrics(path_of(models[system["name"]]).parent, system["metrics"], photos)


def evaluate(
    task: EvaluationTask, models: Mapping[str, str], sources: ReportSources, calibrate: bool, priors: bool, redo: bool
) -> list[Row]:
    """Score, calibrate, ask, judge and report; returns each system's `name` and `metrics`.

    Args:
        models: system -> model folder or hub name.
        calibrate: fit the calibration of models that know the city.
        priors: compare the decoding modes of the main system, with priors and constrained answers.
    """
    main, config = main_system(list(models)), task.config
    by_likelihood = config.evaluate.answers == "likelihood"
    decoding, pictured = None, None
    for name, model in models.items():
        knows_city = (path_of(model) / GAZETTEER_FILE).is_file()
        ids = evaluation.calibration_photos(config, task.data) if calibrate and knows_city else {}
        fit = bool(ids)
        compares = name == main and (by_likelihood or (knows_city and (fit or priors)))
        if by_likelihood or compares:
            ids[task.split] = task.ids
        loader = PhotoModel(model, task.gazetteer, config)
        outputs = evaluation.scores_of(task, name, loader, ids)
        if not by_likelihood:
            outputs.append(evaluation.answers_of(task, name, loader))
        constrained, constrained_name = constrained_task(task), f"{main} constrained"
        if asks_constrained := compares and priors and config.evaluate.answers != "constrained":
            outputs.append(evaluation.answers_of(constrained, constrained_name, loader, ["generation"]))
        made = evaluation.run_model(f"evaluate: {name}", config, task.image_table, outputs, redo)
        if fit:
            evaluation.calibrate(task, name, model)
        if by_likelihood:
            made |= evaluation.likelihood_answers(task, name, model, redo)
        if not made:
            print(f"evaluate: {name}: already answered", flush=True)
        if compares:
            by_mode = {} if by_likelihood else {config.evaluate.answers: task.answers(name)}
            if asks_constrained:
                by_mode["constrained"] = constrained.answers(constrained_name)
            decoding = compare_modes(task, name, model, by_mode)
            scores = evaluation.calibrated_scores(task, name, model, [task.split])
            pictured = scores, evaluation.model_gazetteer(model, task.gazetteer)
    return evaluation.report(task, models, sources, decoding, pictured)


def constrained_task(task: EvaluationTask) -> EvaluationTask:
    """The same task with constrained answers."""
    settings = task.config.evaluate.model_copy(update={"answers": "constrained"})
    return replace(task, config=task.config.model_copy(update={"evaluate": settings}))


def compare_modes(task: EvaluationTask, name: str, model: str, answers: Mapping[str, Iterable[Row]]) -> Row:
    """The decoding modes of one system on the photos that have scores, also written to modes.json; `answers`: mode -> rows."""
    gazetteer, calibration = evaluation.model_gazetteer(model, task.gazetteer), Calibration.load(path_of(model))
    bootstrap, scores = (task.config.evaluate.bootstrap, task.config.seed), task.scores(name, [task.split])
    total = tables.count_rows(scores.folders[task.split], task.split)
    rows = display.count(f"evaluate: {name}: comparing decoding modes", scores.rows(task.split), total, "photos")
    result = {"system": name, **compare_decoding(rows, gazetteer, calibration, answers, bootstrap)}
    (task.out / "modes.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    return result


def run_models(config: Config, only: Sequence[str] | None = None) -> dict[str, str]:
    """System -> model folder of all systems of the run, or of those named."""
    systems = [system for system in config.train.systems if not only or system.name in only]
    return {system.name: evaluation.trained_model(config, system) for system in systems}


def named_models(flags: Sequence[str]) -> dict[str, str]:
    """`name=folder` or `folder` flags as name -> model folder."""
    models: dict[str, str] = {}
    for flag in flags:
        name, folder = parse_model_flag(flag)
        if slug(name) in map(slug, models):
            raise InputError(f"two models are called '{name}': give each a name, --model name=folder.")
        models[name] = folder
    return models


def photos_folder(
    config: Config, data: str, photos: str | None, models: Mapping[str, str], out: AnyPath, redo: bool
) -> AnyPath:
    """The folder of the photos table that --data means; a manifest is prepared first, into `out`."""
    path = path_of(data)
    if path.is_dir():
        return path / "photos" if (path / "photos").is_dir() else path
    if not path.is_file():
        raise InputError(f"--data {data} does not exist: give a run, a folder with test-*.parquet, or a manifest file.")
    if config.city.toy:
        config = resolve_city_files(config, Run(config))
    city = config.city.model_copy(update={"toy": None, "reader": "auto", "manifest": str(path), "photos": photos})
    config = config.model_copy(update={"city": city})
    folder = out / "photos"
    mark = folder / DONE_FILE
    changed = mark.is_file() and mark.stat().st_mtime < path.stat().st_mtime
    if not is_done(folder, prepare.settings(config), redo or changed):
        files = [path_of(model) / GAZETTEER_FILE for model in models.values()]
        first = next((file for file in files if file.is_file()), None)
        prepare.prepare_test(config, folder, Gazetteer.load(first) if first else None)
    return folder


def output_folder(run: Run, data: str | None) -> AnyPath:
    """<run>/evaluations/<name of the data>; for the run's photos on their tiles, <run>/evaluations/grafts."""
    if not data and run.config.evaluate.images == "grafts":
        return run.folder / "evaluations" / "grafts"
    path = path_of(data).resolve() if data else run.folder
    return run.folder / "evaluations" / (path.parent.name if path.name == "photos" else path.stem)


def main(argv: list[str] | None = None) -> None:
    parser = job_parser(__doc__ or "")
    parser.add_argument("--model", action="append", default=[], metavar="[NAME=]FOLDER", help="evaluate this model; repeatable")
    parser.add_argument("--data", metavar="PATH", help="a run, a folder with test-*.parquet, or a manifest (default: the run)")
    parser.add_argument("--photos", metavar="FOLDER", help="what `file` in the manifest is relative to (default: its folder)")
    parser.add_argument("--split", default="test", help="split to evaluate (default: test)")
    parser.add_argument("--priors", action="store_true", help="compare free, constrained and likelihood answers, and priors")
    parser.add_argument("--out", type=path_of, metavar="FOLDER", help="output folder (default: <run>/evaluations/…)")
    args = parser.parse_args(argv)
    config = load_config(args)
    connect()
    if not (args.model or args.data or args.out or args.split != "test"):
        run_step(config, args.redo, args.priors)
        return
    run = Run(config)
    if args.data and config.evaluate.images == "grafts":
        raise InputError("--data and evaluate.images=grafts don't go together: the run's map does not cover other photos.")
    models = {name: resolve_model(model) for name, model in (named_models(args.model) or run_models(config)).items()}
    out = (args.out or output_folder(run, args.data)).absolute()
    data = photos_folder(config, args.data, args.photos, models, out, args.redo) if args.data else run.photos
    images = graft.graft_photos(config, run, args.split, args.redo)
    require_evaluation_workers(config, "evaluate")
    task = evaluation.open_task(config, data, args.split, out, models.values(), images)
    evaluate(task, models, ReportSources(photos=data), calibrate=False, priors=args.priors, redo=args.redo)


if __name__ == "__main__":
    run_main(main)
