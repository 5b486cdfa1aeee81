#!/usr/bin/env python
"""The main job: whatever is missing of prepare, and of graft and label if labels are learnt from, then every system's stages.

    ray job submit ray_jobs/train.py
    python ray_jobs/train.py --config my_city.yaml --system AddressVLM
    python ray_jobs/train.py --config demo --evaluate          # and the table and report at the end
    python ray_jobs/train.py --config paper-pitts --dry-run    # what it will take, nothing is begun

A killed run goes on from its last checkpoint when the same command is given again. Writes below <storage>/<name>:
models/<system>/adapter (PEFT), models/<system>/merged (an ordinary Hugging Face folder), training/<system> (checkpoints,
loss.jsonl, TensorBoard).
"""

import sys
from pathlib import Path
from typing import Any

try:
    import torch

    import addressvlm  # noqa: F401
    from ray_jobs.fitting import Reporter, fit, guarded, require_workers
except ImportError as missing:
    sys.exit(
        f"error: {missing.name} is not installed for {sys.executable}: activate the environment of `make install` "
        "(. .venv/bin/activate) before `ray start` and before this command."
    )

from addressvlm import InputError, tables
from addressvlm.config import Config
from addressvlm.config_training import Data, StageConfig, SystemConfig
from addressvlm.models.base import locate
from addressvlm.run import LAST_MODEL, Run, claim, is_done, mark_done
from addressvlm.training.locatable import scored_by
from addressvlm.training.system import cities_of, train_system
from ray_jobs import graft, label, plan, prepare
from ray_jobs.common import arguments, configure, connect, job


def settings(config: Config, system: SystemConfig) -> dict[str, Any]:
    """What a trained system depends on.

    Raises:
        InputError: it depends on the locatability of photos that have not been scored.
    """
    kept = {"workers", "strategy", "precision", "packing", "cities", "merge", "seed"}
    if config.train.merge == "best":
        kept |= {"validate_every", "validate_photos"}
    train = config.train.model_dump(include=kept, exclude_none=True)
    stages = {name: _stage(config.train.stages[name]) for name in system.stages}
    equal = next((s for s in config.train.systems if s.name == system.equal_steps_to), None)
    others = {name: _stage(config.train.stages[name]) for name in equal.stages} if equal else {}
    choosy = any("locatability" in stage for stage in [*stages.values(), *others.values()])
    kinds = tables_of(config, system)
    reasons = [_reasoning(config)] if "reasoning" in kinds else []
    return {
        **(label if "alignment" in kinds else prepare).settings(config),
        **({"reasoning": label.settings(reasons[0])["labels"]} if reasons else {}),
        **({"locatability": {run.folder.name: scored_by(run) for run, _ in cities_of(config)}} if choosy else {}),
        "model": config.model.model_dump(),
        "train": {**train, "system": system.model_dump(), "stages": stages, "equal_to": others},
    }


def _stage(stage: StageConfig) -> dict[str, Any]:
    """Its settings; what is not set was no setting when runs of earlier versions finished."""
    later = {"locatability", "augment"}
    return stage.model_dump(exclude=later) | stage.model_dump(include=later, exclude_defaults=True)


def tables_of(config: Config, system: SystemConfig) -> set[Data]:
    """What a system learns from, and what its number of steps depends on."""
    with_steps = [s for s in config.train.systems if s.name in (system.name, system.equal_steps_to)]
    return {kind for s in with_steps for stage in s.stages for kind in config.train.stages[stage].tables}


def chosen(config: Config, only: list[str] | None) -> list[SystemConfig]:
    """The systems to train, in the order of the configuration.

    Raises:
        InputError: one of the names is not that of a system with stages.
    """
    wanted = [s for s in config.train.systems if s.stages and (not only or s.name in only)]
    if only and len(wanted) != len(only):
        names = ", ".join(s.name for s in config.train.systems if s.stages)
        raise InputError(f"--system {', '.join(only)}: systems that can be trained are {names}.")
    return wanted


def _make_data(config: Config, redo: bool, kinds: set[Data]) -> None:
    """Whatever is missing of the run's own tables; those of other cities are made by their own configurations.

    Raises:
        InputError: another city's table is missing.
    """
    for run, _ in cities_of(config):
        if run.folder.name == config.name:
            continue
        for kind in sorted(kinds):
            if not tables.count(getattr(run, kind), "train"):
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
        label.run_step(_reasoning(config), redo)


def _reasoning(config: Config) -> Config:
    """The same run whose labels are reasons read off the photo alone."""
    return config.model_copy(update={"labels": config.labels.model_copy(update={"prompt": "reasoning"})})


def run_step(config: Config, redo: bool = False, only: list[str] | None = None) -> None:
    """Train the systems that are missing, in the order of the configuration.

    Raises:
        InputError: a setting or the data can't be trained with, or the cluster has fewer CPUs or GPUs than asked for.
    """
    run = Run(config)
    locate(config.model.base)
    wanted = chosen(config, only)
    missing = [s for s in wanted if not is_done(run.model(s.name), settings(config, s), redo)]
    if missing:
        _make_data(config, redo, {kind for system in missing for kind in tables_of(config, system)})
    for system in wanted:
        if system in missing:
            _train(config, system, redo)
        else:
            print(f"train: {system.name}: already done", flush=True)
    if wanted:
        last = next((s for s in wanted if s.name == "AddressVLM"), wanted[-1])
        (run.folder.parent / LAST_MODEL).write_text(f"{run.model(last.name) / 'merged'}\n")


def _train(config: Config, system: SystemConfig, redo: bool) -> None:
    """Train a system, or go on where it stopped."""
    run, made_from = Run(config), settings(config, system)
    require_workers(config, system.name, config.train.min_workers)
    claim(run.journal(system.name), made_from, redo)
    fit(config, system.name, train_worker, {"system": system.name}, config.train.min_workers)
    mark_done(run.model(system.name), made_from)
    print(f"train: {system.name}: saved in {run.model(system.name)}", flush=True)


def train_worker(given: dict[str, Any]) -> None:
    """What each worker of the group runs."""

    def work(config: Config, checkpoint: Path | None, device: torch.device) -> None:
        train_system(config, given["system"], checkpoint, Reporter(), device)

    guarded(given, work)


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--system", action="append", metavar="NAME", help="train only this system (may be repeated)")
    parser.add_argument("--evaluate", action="store_true", help="then answer the test questions and write table and report")
    parser.add_argument(
        "--dry-run", action="store_true", help="only print parameters, memory, steps and time, and what can't fit"
    )
    parser.add_argument("--photos", type=int, metavar="N", help="with --dry-run: how many there will be, if none are prepared")
    args = parser.parse_args()
    config = configure(args)
    if args.dry_run:
        plan.show(config, chosen(config, args.system), args.photos)
        return
    connect()
    run_step(config, args.redo, args.system)
    if args.evaluate:
        from ray_jobs import evaluate

        evaluate.run_step(config, args.redo, only=args.system)


if __name__ == "__main__":
    job(main)
