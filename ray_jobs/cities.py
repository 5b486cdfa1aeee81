"""Many cities by one command: each is prepared, grafted, labelled, trained and evaluated, several at a time.

Cities are threads of this process, which only start work and wait for it; they wait for each other where something is shared:
a few are prepared at a time, one is labelled (so that the limits of the endpoint and the budget hold for all together), and as
many are trained as the cluster has room for. A city that fails is named at the end, and the others go on.
"""

import argparse
import html
import io
import json
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.config.train import Data
from addressvlm.config.world import World, require_files
from addressvlm.evaluation.metrics import METRICS
from addressvlm.evaluation.report import ReportSources, main_system
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE
from addressvlm.labels.response_cache import ResponseCache
from addressvlm.storage import tables
from addressvlm.storage.files import atomic_write
from addressvlm.storage.remote_path import AnyPath, path_of
from addressvlm.storage.run_dir import DONE_FILE, Run, is_done, is_unfinished
from ray_jobs import evaluate, evaluation, graft, label, map_rows, prepare, train
from ray_jobs.cluster import nodes_ahead, require_possible, room_for
from ray_jobs.common import connect
from ray_jobs.evaluation import TEST, TRAINING, VALIDATION, EvaluationTask, PhotoModel
from ray_jobs.progress import display
from ray_jobs.ray_data import to_input_error
from ray_jobs.ray_train import training_workers

EVALUATED_FILE = "_evaluated.json"  # in a city's folder: the settings of its last evaluation
STEPS = ("prepare", "graft", "label", "train", "evaluate")
THREADS = 32  # cities that are under way at a time; most of them wait
SHOWN = ("A_ds", "A_s", "A_d", "A")  # metrics in the table

_city: ContextVar[str] = ContextVar("_city", default="")


def run(world: World, args: argparse.Namespace) -> None:
    """What `train.py` does with a file of many cities.

    Raises:
        InputError: a city of that name is not there, or cities failed; the others are done.
    """
    if args.city and args.city not in world.cities:
        raise InputError(f"--city {args.city}: the table of cities has {', '.join(world.cities)}.")
    names = [args.city] if args.city else list(world.cities)
    if args.status:
        print(status_table(world, names), flush=True)
        return
    if args.dry_run:
        from ray_jobs.city_estimate import print_world_estimate

        print_world_estimate(world, names, args.system, args.photos)
        return
    connect()
    Pipeline(world, args.system, args.evaluate, args.redo).run(names)


@dataclass
class Slots:
    """A semaphore whose limit may change: it is what `limit` returns when a thread asks for a slot."""

    limit: Callable[[], int]
    used: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Wait for a slot and hold it."""
        with self.changed:
            while self.used >= self.limit():
                self.changed.wait(5)  # the cluster may have grown
            self.used += 1
        try:
            yield
        finally:
            with self.changed:
                self.used -= 1
                self.changed.notify_all()


class Pipeline:
    """All steps of all cities.

    Args:
        only: names of the systems to train, None for all.

    Attributes:
        errors: city -> why it failed.
    """

    def __init__(self, world: World, only: list[str] | None, with_evaluation: bool, redo: bool) -> None:
        self.world, self.only, self.with_evaluation, self.redo = world, only, with_evaluation, redo
        self.is_joint = world.settings.adapter == "joint"
        self.systems = train.select_systems(world.base, only)
        self.errors: dict[str, str] = {}
        self._counting = threading.Lock()
        workers = training_workers(world.base, "of a city", world.base.train.min_workers)
        self.preparing = Slots(lambda: world.settings.preparing)
        self.labelling = Slots(lambda: 1)
        self.training = Slots(lambda: world.settings.training or room_for(workers))

    def run(self, names: Sequence[str]) -> None:
        """Do what is missing of these cities, then print and write the table.

        Raises:
            InputError: cities failed.
        """
        self.world.folder.mkdir(parents=True, exist_ok=True)
        with redirect_stdout(_CityPrefix(sys.stdout)), display.show("cities", len(names), "cities") as self.progress:
            _in_threads(self._attempt, names)
            done = [name for name in names if name not in self.errors]
            failed_joint: InputError | None = None
            if self.is_joint and done:
                try:
                    copy_context().run(self._train_joint, done)
                except InputError as error:  # the table comes first
                    failed_joint = error
        text = write_results(self.world, self.errors)
        print(f"\n{text}\n", flush=True)
        print(self.world.folder / "report.html", flush=True)
        if failed_joint:
            raise failed_joint
        if self.errors:
            self.errors = {name: self.errors[name] for name in names if name in self.errors}
            first, why = next(iter(self.errors.items()))
            failed = f"{first}: {why}" if len(self.errors) == 1 else f"{', '.join(self.errors)}; {first}: {why}"
            total = "all" if len(self.errors) == len(names) else f"{len(self.errors)} of {len(names)}"
            raise InputError(
                f"{total} cities failed ({failed.rstrip('.')}): fix what each says and rerun; the others are done."
            )

    def _attempt(self, name: str) -> None:
        _city.set(name)
        try:
            self._do_city(self.world.cities[name])
        except Exception as error:
            known = error if isinstance(error, InputError) else to_input_error(error)
            self.errors[name] = str(known or f"{type(error).__name__}: {error}".splitlines()[0])
            if known is None:
                traceback.print_exc()
            print(f"failed: {self.errors[name]}", flush=True)
        with self._counting:
            self.progress.done += 1

    def _do_city(self, config: Config) -> None:
        run, systems = Run(config), train.select_systems(config, self.only)
        trained = {system.name: train.settings(config, system) for system in systems}
        settings = json.loads(json.dumps({"systems": trained, "evaluate": config.evaluate.model_dump()}))
        marker = run.folder / EVALUATED_FILE
        if not self.redo and not self.is_joint and marker.is_file() and json.loads(marker.read_text()) == settings:
            print("already done", flush=True)
            return
        missing = systems if self.is_joint else train.untrained_systems(config, systems, self.redo)
        kinds = {kind for system in missing for kind in train.tables_of(config, system)}
        if missing:
            require_possible(training_workers(config, missing[0].name, config.train.min_workers))  # before labels are paid for
            self._make_data(config, kinds)
        if self.is_joint:
            return
        with self.training.one():
            train.train_systems(config, systems, self.redo)
            if self.with_evaluation:
                evaluate.run_step(config, self.redo, only=self.only)
                with atomic_write(marker) as temporary:
                    temporary.write_text(json.dumps(settings))

    def _make_data(self, config: Config, kinds: set[Data]) -> None:
        require_files(config)
        with self.preparing.one():
            prepare.run_step(config, self.redo)
            if "alignment" in kinds:
                graft.run_step(config, self.redo)
            map_rows.run_step(config, self.redo, kinds)
        if not kinds & {"alignment", "reasoning"}:
            return
        workers = training_workers(config, f"of {config.name}", config.train.min_workers)
        with self.labelling.one(), nodes_ahead(workers, "label", config.cluster.boot_s):
            config = self._within_budget(config)
            if "alignment" in kinds:
                label.run_step(config, self.redo)
            if "reasoning" in kinds:
                label.run_step(train.reasoning_labels(config), self.redo)

    def _within_budget(self, config: Config) -> Config:
        """The configuration with what the other cities have left of the budget of all.

        Raises:
            InputError: nothing is left, and the city's labels are not done.
        """
        labels = config.labels
        if labels.budget_usd is None and labels.budget_tokens is None:
            return config
        spent = [label_costs(other) for name, other in self.world.cities.items() if name != config.name]
        tokens, usd = sum(cost[0] for cost in spent), sum(cost[1] for cost in spent)
        left: dict[str, Any] = {}
        if labels.budget_tokens is not None:
            left["budget_tokens"] = labels.budget_tokens - tokens
        if labels.budget_usd is not None:
            left["budget_usd"] = labels.budget_usd - usd
        if min(left.values()) <= 0 and not is_done(Run(config).alignment, label.settings(config)):
            raise InputError(
                f"label budget exhausted by the other cities ({tokens:,} tokens, {usd:.4g} dollars): raise "
                "labels.budget_usd or labels.budget_tokens and rerun."
            )
        return config.model_copy(update={"labels": labels.model_copy(update=left)})

    def _train_joint(self, names: Sequence[str]) -> None:
        """One model of these cities, calibrated on all of them together, evaluated on each."""
        joint, systems = self.world.joint, self.systems
        weights = {name: weight for name, weight in joint.train.cities.items() if name in names}
        joint = joint.model_copy(update={"train": joint.train.model_copy(update={"cities": weights})})
        _city.set(joint.name)
        train.train_systems(joint, systems, self.redo)
        if not self.with_evaluation:
            return
        models = evaluate.run_models(joint, self.only)
        configs = [self.world.cities[name] for name in names]
        tasks = {c.name: evaluation.open_task(c, Run(c).photos, TEST, Run(c).folder, models.values()) for c in configs}
        calibrate_jointly(Run(joint), tasks, models, self.redo)
        for config in configs:
            _city.set(config.name)
            run = Run(config)
            sources = ReportSources(run.photos, run.alignment, None, run.rejects)
            evaluate.evaluate(tasks[config.name], models, sources, calibrate=False, priors=False, redo=self.redo)


def calibrate_jointly(run: Run, tasks: Mapping[str, EvaluationTask], models: Mapping[str, str], redo: bool) -> None:
    """Fit the calibration of each model that knows the cities to validation photos of all of them."""
    for system, model in models.items():
        if not (path_of(model) / GAZETTEER_FILE).is_file():
            continue
        scored: list[EvaluationTask] = []
        for name, task in tasks.items():
            if ids := evaluation.calibration_photos(task.config, task.data):
                _city.set(name)
                outputs = evaluation.scores_of(task, system, PhotoModel(model, task.gazetteer, task.config), ids)
                evaluation.run_model(f"evaluate: {system}", task.config, task.image_table, outputs, redo)
                scored.append(task)
        if scored:
            _city.set(run.folder.name)
            splits = (VALIDATION, TRAINING)
            rows = {split: chain(*[task.scores(system, [split]).rows(split) for task in scored]) for split in splits}
            together = replace(scored[0], out=run.folder)
            evaluation.write_scores(together, system, rows, {"cities": list(tasks), "model": evaluation.model_digest(model)})
            evaluation.calibrate(together, system, model)


def label_costs(config: Config) -> tuple[int, float]:
    """Tokens and dollars that the labels of a city have cost so far, those of both kinds in its one response cache."""
    run = Run(config)
    kinds = {kind for system in config.train.systems for kind in train.tables_of(config, system)}
    file = (run.reasoning if "reasoning" in kinds else run.alignment) / "labels.json"  # of the kind that is done last
    if file.is_file():
        cost = json.loads(file.read_text())["run"]
        return cost.get("tokens", 0), cost.get("usd", 0.0)
    cache = ResponseCache(run.response_cache)
    return cache.tokens, cache.usd


def city_steps(world: World, config: Config) -> dict[str, str]:
    """Step -> `done`, `begun` or nothing, from the folders of a city."""
    run = Run(config)
    folders = {"prepare": run.photos, "graft": run.grafts, "label": run.alignment}
    steps = {step: _folder_state(folder) for step, folder in folders.items()}
    trained = Run(world.joint) if world.settings.adapter == "joint" else run
    systems = [system for system in config.train.systems if system.stages]
    done = [_folder_state(trained.model_dir(system.name)) == "done" for system in systems]
    begun = any(trained.training_dir(system.name).exists() for system in systems)
    steps["train"] = "done" if done and all(done) else "begun" if begun else ""
    steps["evaluate"] = "done" if run.metrics.is_file() else ""
    return steps


def _folder_state(folder: AnyPath) -> str:
    if (folder / DONE_FILE).is_file():
        return "done"
    return "begun" if is_unfinished(folder) or folder.with_name(folder.name + ".partial").exists() else ""


def status_table(world: World, names: Sequence[str]) -> str:
    """Cities by steps, and what went wrong the last time."""
    file = world.folder / "cities.json"
    errors = {row["name"]: row["error"] for row in json.loads(file.read_text())["cities"]} if file.is_file() else {}
    rows = [[name, *city_steps(world, world.cities[name]).values(), errors.get(name) or ""] for name in names]
    counts = [f"{sum(row[column] == 'done' for row in rows)} of {len(rows)}" for column in range(1, len(STEPS) + 1)]
    return _text_table([["city", *STEPS, ""], *rows, ["done", *counts, ""]])


def write_results(world: World, errors: dict[str, str]) -> str:
    """Write cities.json and report.html to the world's folder; returns the table for the terminal."""
    rows = []
    for name, config in world.cities.items():
        row: dict[str, Any] = {"name": name, "steps": city_steps(world, config), "error": errors.get(name)}
        if Run(config).metrics.is_file():
            systems = {s["name"]: s["metrics"] for s in json.loads(Run(config).metrics.read_text())["systems"]}
            row["metrics"] = systems[main_system(list(systems))]
            row["photos"] = min(tables.count_rows(Run(config).photos, TEST), config.evaluate.max_photos or sys.maxsize)
        rows.append(row)
    means = mean_metrics([(row["metrics"], row["photos"]) for row in rows if "metrics" in row])
    result = {"name": world.name, "adapter": world.settings.adapter, "cities": rows, **means}
    (world.folder / "cities.json").write_text(json.dumps(result, indent=1, ensure_ascii=False))
    (world.folder / "report.html").write_text(_report(result), encoding="utf-8")
    return _text_table([["city", "photos", *SHOWN, ""], *_table_rows(result)])


def mean_metrics(cities: Sequence[tuple[dict[str, Any], int]]) -> dict[str, dict[str, float | None]]:
    """`macro`: the mean of the cities' values of each metric; `weighted`: weighted by photos; `cities`: metrics and photos."""
    result: dict[str, dict[str, float | None]] = {"macro": {}, "weighted": {}}
    for metric in METRICS:
        values = [(m[metric]["value"], photos) for m, photos in cities if m.get(metric) and m[metric]["value"] is not None]
        total = sum(photos for _, photos in values)
        result["macro"][metric] = sum(value for value, _ in values) / len(values) if values else None
        result["weighted"][metric] = sum(value * photos for value, photos in values) / total if total else None
    return result


def _table_rows(result: dict[str, Any]) -> list[list[str]]:
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    rows = []
    for row in result["cities"]:
        values = [(row.get("metrics", {}).get(metric) or {"value": None})["value"] for metric in SHOWN]
        left = next((step for step in STEPS if row["steps"][step] != "done"), "")
        note = f"failed: {row['error']}" if row["error"] else f"{left} is not done" if left else ""
        rows.append([row["name"], f"{row.get('photos', 0):,}", *map(percent, values), note])
    for kind, title in (("macro", "mean of cities"), ("weighted", "weighted by photos")):
        rows.append([title, "", *(percent(result[kind][metric]) for metric in SHOWN), ""])
    return rows


def _text_table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _report(result: dict[str, Any]) -> str:
    """A page with the table; cities link to their own reports."""
    lines = []
    for number, row in enumerate(_table_rows(result)):
        cells = [html.escape(cell) for cell in row]
        if number < len(result["cities"]) and "metrics" in result["cities"][number]:
            cells[0] = f'<a href="{cells[0]}/report.html">{cells[0]}</a>'
        lines.append("<tr><td>" + "</td><td>".join(cells) + "</td></tr>")
    head = "".join(f"<th>{cell}</th>" for cell in ("city", "photos", *SHOWN, ""))
    title = html.escape(f"{result['name']}: {len(result['cities'])} cities, adapter: {result['adapter']}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        "<style>body{font:15px system-ui;margin:2rem}td,th{padding:.2rem .8rem;text-align:left;font-variant-numeric:"
        "tabular-nums}tr:nth-child(even){background:#f4f4f4}</style>"
        f"<h1>{title}</h1><table><tr>{head}</tr>{''.join(lines)}</table>"
        "<p>Percent of the questions about test photos.</p></html>"
    )


def _in_threads(work: Callable[[str], None], names: Sequence[str]) -> None:
    """Call it for every name, in the order of the names; threads end with the process."""
    left = deque(names)

    def take() -> None:
        while True:
            try:
                name = left.popleft()
            except IndexError:
                return
            work(name)

    threads = [threading.Thread(target=take, daemon=True) for _ in range(min(THREADS, len(names)))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.2)  # not join: Ctrl-C ends the command at once


class _CityPrefix(io.TextIOBase):
    """Writes each line with the city whose thread prints it."""

    def __init__(self, out: Any) -> None:
        self.out = out
        self.begun: dict[str, str] = {}  # city -> the line that it has not ended yet
        self.lock = threading.Lock()

    def write(self, text: str) -> int:
        city = _city.get()
        with self.lock:
            *lines, rest = (self.begun.get(city, "") + text).split("\n")
            self.begun[city] = rest
            for line in lines:
                self.out.write(f"{city}: {line}\n" if city and line else f"{line}\n")
        return len(text)

    def flush(self) -> None:
        self.out.flush()
