#!/usr/bin/env python
"""The main job: train all systems; first prepares, grafts and labels whatever they train on and is missing.

    ray job submit ray_jobs/train.py
    python ray_jobs/train.py --config my_city.yaml --system AddressVLM
    python ray_jobs/train.py --config demo --evaluate          # with the table and report at the end
    python ray_jobs/train.py --config paper-pitts --dry-run    # estimate memory and time
    python ray_jobs/train.py --config world.yaml --evaluate    # many cities, see addressvlm/config/world.py

Rerun it to resume from the last checkpoint. Writes below <storage>/<name>: models/<system>/adapter (PEFT),
models/<system>/merged (an ordinary Hugging Face folder), training/<system> (checkpoints, loss.jsonl, TensorBoard).
"""

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from ray_jobs.progress import Progress, display

    display.begin(Progress("train: loading libraries"))

try:
    import torch

    import addressvlm  # noqa: F401
    from ray_jobs.ray_train import CheckpointReporter, run_training, run_worker, training_workers
except ImportError as missing:
    sys.exit(
        f"error: {missing.name} is not installed for {sys.executable}: activate the environment of `make install` "
        "(. .venv/bin/activate) before `ray start` and before this command."
    )

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.config.train import Data, SystemConfig
from addressvlm.config.world import load_world
from addressvlm.models.loading import resolve_model
from addressvlm.storage import tables
from addressvlm.storage.run_dir import LAST_MODEL_FILE, Run, begin_or_resume, is_done, mark_done
from addressvlm.training.dataset import locatability_scored_by
from addressvlm.training.memory_estimate import print_estimate
from addressvlm.training.stages import training_runs
from addressvlm.training.trainer import train_system
from ray_jobs import graft, label, map_rows, prepare
from ray_jobs.cluster import nodes_ahead, require_possible, wait_for_workers
from ray_jobs.common import connect, job_parser, load_config, run_main
from ray_jobs.progress import display


def settings(config: Config, system: SystemConfig) -> dict[str, Any]:
    """All settings that a trained system depends on; InputError if it needs locatability scores that are missing."""
    keys = {"workers", "strategy", "precision", "packing", "cities", "checkpoint_to_merge", "seed"}
    if config.train.checkpoint_to_merge == "best":
        keys |= {"validate_every", "validate_photos"}
    train = config.train.model_dump(include=keys, exclude_none=True)
    stages = {name: config.train.stages[name].model_dump() for name in system.stages}
    reference = next((s for s in config.train.systems if s.name == system.match_steps_of), None)
    others = {name: config.train.stages[name].model_dump() for name in reference.stages} if reference else {}
    tables_used = tables_of(config, system)
    inputs = (label if "alignment" in tables_used else prepare).settings(config)
    if tables_used & set(map_rows.KINDS):
        inputs |= graft.settings(config)
    if "reasoning" in tables_used:
        inputs["reasoning"] = label.settings(reasoning_labels(config))["labels"]
    if any(stage["locatability"] is not None for stage in [*stages.values(), *others.values()]):
        inputs["locatability"] = {run.folder.name: locatability_scored_by(run) for run, _ in training_runs(config)}
    train = {**train, "system": system.model_dump(), "stages": stages, "equal_to": others}
    return {**inputs, "model": config.model.model_dump(), "train": train}


def tables_of(config: Config, system: SystemConfig) -> set[Data]:
    """The tables that a system trains on, and those that its number of steps depends on."""
    systems = [s for s in config.train.systems if s.name in (system.name, system.match_steps_of)]
    return {kind for s in systems for stage in s.stages for kind in config.train.stages[stage].tables}


def select_systems(config: Config, only: list[str] | None) -> list[SystemConfig]:
    """The systems to train, in the order of the configuration; InputError if a name is not that of a system with stages."""
    systems = [s for s in config.train.systems if s.stages and (not only or s.name in only)]
    if only and len(systems) != len(only):
        names = ", ".join(s.name for s in config.train.systems if s.stages)
        raise InputError(f"--system {', '.join(only)}: systems that can be trained are {names}.")
    return systems


def make_data(config: Config, redo: bool, kinds: set[Data]) -> None:
    """Make the run's own tables that are missing; other cities' are made with their own configurations.

    Raises:
        InputError: another city's table is missing.
    """
    for run, _ in training_runs(config):
        if run.folder.name == config.name:
            continue
        for kind in sorted(kinds):
            if not tables.count_rows(getattr(run, kind), "train"):
                raise InputError(
                    f"train.cities names {run.folder.name}, which has no {kind} in {run.folder}: run ray_jobs/prepare.py, "
                    "graft.py and label.py with its own configuration first."
                )
    if config.name not in (config.train.cities or {config.name: 1.0}):
        return
    prepare.run_step(config, redo)
    if "alignment" in kinds:
        graft.run_step(config, redo)
        label.run_step(config, redo)
    if "reasoning" in kinds:
        label.run_step(reasoning_labels(config), redo)
    map_rows.run_step(config, redo, kinds)


def reasoning_labels(config: Config) -> Config:
    """The same run with labels that are reasons read off the photo alone (paper 003)."""
    return config.model_copy(update={"labels": config.labels.model_copy(update={"prompt": "reasoning"})})


def run_step(config: Config, redo: bool = False, only: list[str] | None = None) -> None:
    """Make the data that is missing and train the systems that are not done yet.

    Raises:
        InputError: settings or data can't be trained with, or the cluster can't have the CPUs or GPUs required.
    """
    systems = select_systems(config, only)
    if missing := untrained_systems(config, systems, redo):
        workers = training_workers(config, missing[0].name, config.train.min_workers)
        require_possible(workers)  # before labels are paid for
        with nodes_ahead(workers, "label", config.cluster.boot_s):
            make_data(config, redo, {kind for system in missing for kind in tables_of(config, system)})
            wait_for_workers(workers, config.cluster.wait_s)
    display.heading("train", f"{len(systems)} {'systems' if len(systems) > 1 else 'system'}")
    train_systems(config, systems, redo)


def untrained_systems(config: Config, systems: list[SystemConfig], redo: bool = False) -> list[SystemConfig]:
    """Those of the systems that are not trained yet; InputError if one was trained with other settings."""
    resolve_model(config.model.base)
    return [s for s in systems if not is_done(Run(config).model_dir(s.name), settings(config, s), redo)]


def train_systems(config: Config, systems: list[SystemConfig], redo: bool = False) -> None:
    """Train those of the systems that are not done yet, whose data is there; errors as `run_step`."""
    run, missing = Run(config), untrained_systems(config, systems, redo)
    for system in systems:
        if system not in missing:
            print(f"train: {system.name}: already done", flush=True)
            continue
        depends_on = settings(config, system)
        wait_for_workers(training_workers(config, system.name, config.train.min_workers), config.cluster.wait_s)
        begin_or_resume(run.training_dir(system.name), depends_on, redo)
        run_training(config, system.name, train_worker, {"system": system.name}, config.train.min_workers)
        mark_done(run.model_dir(system.name), depends_on)
        print(f"train: {system.name}: saved in {run.model_dir(system.name)}", flush=True)
    if systems:
        last = next((s for s in systems if s.name == "AddressVLM"), systems[-1])
        (run.folder.parent / LAST_MODEL_FILE).write_text(f"{run.model_dir(last.name) / 'merged'}\n")


def train_worker(arguments: dict[str, Any]) -> None:
    """Runs on each worker."""

    def work(config: Config, checkpoint: Path | None, device: torch.device) -> None:
        reporter = CheckpointReporter()
        train_system(config, arguments["system"], checkpoint, reporter, device, reporter.is_due)

    run_worker(arguments, work)


def main() -> None:
    parser = job_parser(__doc__ or "")
    parser.add_argument("--system", action="append", metavar="NAME", help="train only this system (may be repeated)")
    parser.add_argument("--evaluate", action="store_true", help="then evaluate, and write table and report")
    parser.add_argument("--dry-run", action="store_true", help="only estimate parameters, memory, steps and time")
    parser.add_argument("--photos", type=int, metavar="N", help="with --dry-run: number of photos, if none are prepared")
    parser.add_argument("--city", metavar="NAME", help="of a file with many cities: only this one")
    parser.add_argument("--status", action="store_true", help="of a file with many cities: only say what is done")
    args = parser.parse_args()
    if world := load_world(args.config, args.sets):
        from ray_jobs import cities

        cities.run(world, args)
        return
    if args.city or args.status:
        raise InputError(f"--city and --status are for many cities, and {args.config} has no section `world` (docs/cities.md).")
    config = load_config(args)
    if args.dry_run:
        print_estimate(config, select_systems(config, args.system), args.photos)
        return
    display.steps = ["prepare", "graft", "label", "train", *(["evaluate", "report"] if args.evaluate else [])]
    connect()
    run_step(config, args.redo, args.system)
    if args.evaluate:
        from ray_jobs import evaluate

        evaluate.run_step(config, args.redo, only=args.system)


if __name__ == "__main__":
    run_main(main)
