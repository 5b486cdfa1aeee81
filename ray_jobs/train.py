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

import functools
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "900")  # importing torch can take minutes on a busy machine
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # or every line of a worker comes twice
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # Ray's own error line; lost nodes are noticed without it

try:
    import ray.train.torch

    import addressvlm  # noqa: F401
except ImportError as missing:
    sys.exit(
        f"error: {missing.name} is not installed for {sys.executable}: activate the environment of `make install` "
        "(. .venv/bin/activate) before `ray start` and before this command."
    )

import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.torch import TorchTrainer

from addressvlm import InputError, tables
from addressvlm.config import Config
from addressvlm.config_training import Data, SystemConfig
from addressvlm.models.base import locate
from addressvlm.run import LAST_MODEL, Run, claim, is_done, mark_done, slug, storage
from addressvlm.stores import AnyPath, filesystem
from addressvlm.training.snapshot import Snapshot
from addressvlm.training.system import cities_of, train_system
from ray_jobs import failures, graft, label, plan, prepare
from ray_jobs.common import arguments, configure, connect, job, require
from ray_jobs.failures import explained, sentence_of, told
from ray_jobs.heartbeat import Heartbeat

QUIET_S = 30.0  # without a step for so long, the driver says that it is still there


def settings(config: Config, system: SystemConfig) -> dict[str, Any]:
    """What a trained system depends on."""
    train = config.train.model_dump(include={"workers", "strategy", "precision", "packing", "cities", "merge"})
    stages = {name: config.train.stages[name].model_dump() for name in system.stages}
    equal = next((s for s in config.train.systems if s.name == system.equal_steps_to), None)
    others = {name: config.train.stages[name].model_dump() for name in equal.stages} if equal else {}
    kinds = tables_of(config, system)
    reasons = [_reasoning(config)] if "reasoning" in kinds else []
    return {
        **(label if "alignment" in kinds else prepare).settings(config),
        **({"reasoning": label.settings(reasons[0])["labels"]} if reasons else {}),
        "model": config.model.model_dump(),
        "train": {**train, "system": system.model_dump(), "stages": stages, "equal_to": others},
    }


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
                    f"train.cities names {run.folder.name}, which has no {kind} in {run.folder}: make it first with its own "
                    f"configuration, `python ray_jobs/label.py --config …`."
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
    """One Ray Train run; the same name and storage path make it go on where it stopped."""
    run, train = Run(config), config.train
    least = train.min_workers or train.workers
    what = f"training '{system.name}' with {least} workers"
    keys = "train.min_workers" if train.min_workers else "train.workers"
    require("CPU", least * train.cpus_per_worker, what, f"{keys} or train.cpus_per_worker")
    require("GPU", least * train.gpus_per_worker, what, f"{keys} or train.gpus_per_worker")
    folder = run.journal(system.name)
    claim(folder, settings(config, system), redo)
    notice = failures.notice()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": _absolute(config).model_dump(), "system": system.name, "notice": notice},
        scaling_config=ScalingConfig(
            num_workers=(train.min_workers, train.workers) if train.min_workers else train.workers,
            use_gpu=train.gpus_per_worker > 0,
            resources_per_worker={"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker},
        ),
        run_config=RunConfig(
            name=slug(system.name),
            **_kept_in(run.training),
            checkpoint_config=CheckpointConfig(num_to_keep=train.keep_checkpoints),
            failure_config=FailureConfig(max_failures=train.max_failures, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="CRITICAL"),  # what matters of it is said below
        ),
    )
    print(f"train: {system.name}: starting {train.workers} worker{'s' if train.workers > 1 else ''}", flush=True)
    try:
        with Heartbeat(functools.partial(_waiting, system.name, folder / "loss.jsonl"), QUIET_S):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise told(notice) or explained(error, config, system.name) or error from error
    if said := told(notice):
        raise said
    mark_done(run.model(system.name), settings(config, system))
    print(f"train: {system.name}: saved in {run.model(system.name)}", flush=True)


def _kept_in(folder: AnyPath) -> dict[str, Any]:
    """Where Ray Train keeps checkpoints, as its RunConfig takes it; a store is asked in the same way as by all else."""
    if isinstance(folder, Path):
        return {"storage_path": str(folder)}
    store, path = filesystem(str(folder))
    return {"storage_path": path, "storage_filesystem": store}


def _absolute(config: Config) -> Config:
    """With paths that mean the same in a worker, whose working directory is another."""
    config = config.model_copy(deep=True)
    config.storage = str(storage(config.storage))
    if Path(config.model.base).expanduser().is_dir():
        config.model.base = str(Path(config.model.base).expanduser().absolute())
    return config


def _waiting(system: str, losses: AnyPath) -> str:
    """What to say while no step is made; nothing while they are."""
    if not losses.is_file():
        return f"train: {system}: waiting for the workers"
    if time.time() - losses.stat().st_mtime < QUIET_S:
        return ""
    return f"train: {system}: {len(losses.read_text().splitlines()):,} steps done, working"


def train_worker(given: dict[str, Any]) -> None:
    """What each worker of the group runs."""
    _be_quiet()
    config, notice = Config.model_validate(given["config"]), given["notice"]
    if ray.get(notice.read.remote()):
        return
    found = ray.train.get_checkpoint()
    try:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(found.to_directory(folder)) if found else None
            train_system(config, given["system"], checkpoint, Reporter(), ray.train.torch.get_device())
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        said = sentence_of(error, config)
        if said is None:
            raise
        ray.get(notice.write.remote(said))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # so that workers waiting for this one end too


def _be_quiet() -> None:
    """No progress bars of loading and no chatter of DeepSpeed between our lines."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train writes a line there at every report


class Reporter:
    """Hands snapshots to Ray Train, which stores one while training goes on; a second one waits for the first."""

    def __init__(self) -> None:
        self.under_way: Path | None = None

    def __call__(self, metrics: dict[str, Any], snapshot: Snapshot | None) -> None:
        """Report from every worker; the first one has the snapshot."""
        if snapshot is None:
            ray.train.report(metrics, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        busy = self.under_way is not None and self.under_way.exists()
        self.under_way = Path(tempfile.mkdtemp())
        snapshot.write(self.under_way)
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(self.under_way),
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if busy else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )


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

        evaluate.run_step(config, args.redo)


if __name__ == "__main__":
    job(main)
