#!/usr/bin/env python
"""Test photos and trained models -> answers, metrics with intervals, and a report to look at.

    python ray_jobs/evaluate.py --config demo
    python ray_jobs/evaluate.py --config my_city.yaml --model ours=runs/demo/models/addressvlm/merged --data new_photos.csv
    python ray_jobs/evaluate.py --model runs/a/models/addressvlm/merged --data runs/b

Writes <run>/answers/<system>/test-*.parquet, <run>/metrics.json and <run>/report.html; with --model or --data the same
three into <run>/evaluations/<name of the data>.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from addressvlm import InputError, tables
from addressvlm.addresses import Gazetteer
from addressvlm.cities.source import resolve
from addressvlm.config import Config
from addressvlm.evaluation import metrics, report, table
from addressvlm.evaluation.asking import judged
from addressvlm.evaluation.parsing import Judge
from addressvlm.models.base import locate
from addressvlm.run import DONE, Run, is_done, slug, writing
from ray_jobs import prepare
from ray_jobs.asking import answers_of
from ray_jobs.common import arguments, configure, connect, job, require


@dataclass(frozen=True)
class Job:
    """What is scored, on what, and where the result goes."""

    systems: dict[str, str]  # name -> model folder or hub name
    data: Path  # folder of the photos table
    split: str
    out: Path
    sources: report.Sources


def run_step(config: Config, redo: bool) -> None:
    """Score every system of the run on its own test split.

    Raises:
        InputError: a system is not trained yet, the data is missing, or the cluster is too small.
    """
    run = Run(config)
    sources = report.Sources(run.photos, run.alignment, run.training, run.rejects)
    evaluate(config, Job(_systems_of(config, run), run.photos, "test", run.folder, sources), redo)


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
    for name, folder in folders.items():
        _answer(config, task, name, folder, ids, judge, redo)
    answers = {name: list(tables.rows(task.out / "answers" / slug(name), task.split)) for name in folders}
    scored = {
        "city": gazetteer.city or config.city.name,
        "split": task.split,
        "systems": [
            {"name": name, "metrics": metrics.score(rows, need.bootstrap, config.seed)} for name, rows in answers.items()
        ],
    }
    try:
        (task.out / "metrics.json").write_text(json.dumps(scored, indent=1, ensure_ascii=False), encoding="utf-8")
        report.write(task.out / "report.html", scored, answers, gazetteer, task.sources, config.seed, need.bootstrap)
    except OSError as error:
        raise InputError(f"{task.out} can't be written ({error.strerror}): free room or give another --out.") from error
    print(f"\n{table.plain(scored['systems'])}\n\n{task.out / 'metrics.json'}\n{task.out / 'report.html'}", flush=True)


def _answer(config: Config, task: Job, name: str, model: str, ids: list[str], judge: Judge, redo: bool) -> None:
    """One system's answers into answers/<slug>, unless they are there."""
    folder = task.out / "answers" / slug(name)
    settings = {
        "evaluate": config.evaluate.model_dump(include={"max_new_tokens", "temperature", "max_photos"}),
        "seed": config.seed,
        "dtype": config.model.dtype,
        "split": task.split,
        "data": _hash(tables.files(task.data, task.split)),
        "model": digest(model),
    }
    if is_done(folder, settings, redo):
        print(f"evaluate: {name}: already answered", flush=True)
        return
    with writing(folder, settings) as partial:
        files = tables.files(task.data, task.split)
        place = {photo: i for i, photo in enumerate(ids)}
        found = answers_of(config, name, model, files, ids)
        found.sort(key=lambda row: (place[row["id"]], row["level"], row["kind"], row["question"]))
        tables.write(partial, task.split, judged(found, judge), tables.ANSWERS)


def digest(model: str) -> str:
    """What tells two models apart: a hash of a folder's weights and settings; of a hub model its name."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    return _hash([file for kind in ("*.safetensors", "*.json", "*.jinja") for file in folder.glob(kind)])


def _hash(files: Sequence[Path]) -> str:
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
    for folder in [task.data, *map(Path, folders.values())]:
        if (folder / "gazetteer.geojson").is_file():
            gazetteer = Gazetteer.load(folder / "gazetteer.geojson")
            own = gazetteer if folder == task.data else own
            streets.update(gazetteer.streets)
            districts.update(gazetteer.districts)
            variants |= gazetteer.variants
    return Judge(sorted(streets), sorted(districts), variants), own


def _systems_of(config: Config, run: Run) -> dict[str, str]:
    """Name -> model of every system of the run.

    Raises:
        InputError: one is not trained yet.
    """
    systems = {}
    for system in config.train.systems:
        merged = run.model(system.name) / "merged"
        if system.stages and not merged.is_dir():
            raise InputError(f"'{system.name}' is not trained yet (no {merged}): run ray_jobs/train.py first.")
        systems[system.name] = str(merged) if system.stages else config.model.base
    return systems


def _named(given: list[str]) -> dict[str, str]:
    """`name=folder` or `folder` flags as name -> folder; without a name the folder's own (`x/merged` is called x).

    Raises:
        InputError: two models have one name.
    """
    systems: dict[str, str] = {}
    for flag in given:
        name, equals, folder = flag.partition("=")
        if not equals or Path(flag).is_dir():
            path = Path(flag)
            name, folder = (path.parent.name if path.name == "merged" else path.name), flag
        if slug(name) in map(slug, systems):
            raise InputError(f"two models are called '{name}': give each a name, --model name=folder.")
        systems[name] = folder
    return systems


def _dataset(config: Config, given: str, photos: str | None, models: dict[str, str], out: Path, redo: bool) -> Path:
    """The folder of the photos table that --data means; a manifest is prepared first.

    Raises:
        InputError: there is nothing at the path.
    """
    path = Path(given)
    if path.is_dir():
        return path / "photos" if (path / "photos").is_dir() else path
    if not path.is_file():
        raise InputError(f"--data {given} does not exist: give a run, a folder with test-*.parquet, or a manifest file.")
    if config.city.toy:
        config = resolve(config, Run(config))
    city = config.city.model_copy(update={"toy": None, "reader": "auto", "manifest": str(path), "photos": photos})
    config = config.model_copy(update={"city": city})
    folder = out / "photos"
    mark = folder / DONE
    changed = mark.is_file() and mark.stat().st_mtime < path.stat().st_mtime
    if not is_done(folder, prepare.settings(config), redo or changed):
        known = [Path(m) / "gazetteer.geojson" for m in models.values() if (Path(m) / "gazetteer.geojson").is_file()]
        prepare.prepare_test(config, folder, Gazetteer.load(known[0]) if known else None)
    return folder


def _out(run: Run, data: str | None) -> Path:
    """<run>/evaluations/<name of the data>."""
    path = Path(data).resolve() if data else run.folder
    return run.folder / "evaluations" / (path.parent.name if path.name == "photos" else path.stem)


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", action="append", default=[], metavar="[NAME=]FOLDER", help="score this model; repeatable")
    parser.add_argument("--data", metavar="PATH", help="a run, a folder with test-*.parquet, or a manifest (default: the run)")
    parser.add_argument("--photos", metavar="FOLDER", help="what `file` in the manifest is relative to (default: its folder)")
    parser.add_argument("--split", default="test", help="split to score (default: test)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the result goes (default: <run>/evaluations/…)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = _parser().parse_args(argv)
    config = configure(args)
    connect()
    if not (args.model or args.data or args.out or args.split != "test"):
        run_step(config, args.redo)
        return
    run = Run(config)
    systems = _named(args.model) or _systems_of(config, run)
    for model in systems.values():
        locate(model)
    out = (args.out or _out(run, args.data)).absolute()
    data = _dataset(config, args.data, args.photos, systems, out, args.redo) if args.data else run.photos
    evaluate(config, Job(systems, data, args.split, out, report.Sources(photos=data)), args.redo)


if __name__ == "__main__":
    job(main)
