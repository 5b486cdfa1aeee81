#!/usr/bin/env python
"""The main job: whatever is missing of prepare, graft and label, then both tuning stages of every system on Ray Train.

    ray job submit ray_jobs/train.py
    python ray_jobs/train.py --config my_city.yaml --system AddressVLM
    python ray_jobs/train.py --config demo --evaluate          # and the table and report at the end

A killed run goes on from its last checkpoint when the same command is given again. Writes below <storage>/<name>:
models/<system>/adapter (PEFT), models/<system>/merged (an ordinary Hugging Face folder), training/<system> (checkpoints,
loss.jsonl, TensorBoard).
"""

import functools
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "900")  # importing torch can take minutes on a busy machine

import ray.train
import ray.train.torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from addressvlm import InputError
from addressvlm.config import Config, SystemConfig
from addressvlm.models.base import locate
from addressvlm.run import LAST_MODEL, Run, claim, is_done, mark_done, slug
from addressvlm.training.system import train_system
from ray_jobs import graft, label, prepare
from ray_jobs.common import arguments, configure, connect, job, require_cpus


def settings(config: Config, system: SystemConfig) -> dict[str, Any]:
    """What a trained system depends on."""
    train = config.train.model_dump(include={"workers", "strategy"})
    stages = {name: config.train.stages[name].model_dump() for name in system.stages}
    equal = next((s for s in config.train.systems if s.name == system.equal_steps_to), None)
    others = {name: config.train.stages[name].model_dump() for name in equal.stages} if equal else {}
    return {
        **label.settings(config),
        "model": config.model.model_dump(),
        "train": {**train, "system": system.model_dump(), "stages": stages, "equal_to": others},
    }


def run_step(config: Config, redo: bool = False, only: list[str] | None = None) -> None:
    """Train the systems that are missing, in the order of the configuration.

    Raises:
        InputError: a setting or the data can't be trained with, or the cluster has fewer CPUs or GPUs than asked for.
    """
    run = Run(config)
    locate(config.model.base)
    wanted = [s for s in config.train.systems if s.stages and (not only or s.name in only)]
    if only and len(wanted) != len(only):
        names = ", ".join(s.name for s in config.train.systems if s.stages)
        raise InputError(f"--system {', '.join(only)}: systems that can be trained are {names}.")
    missing = [s for s in wanted if not is_done(run.model(s.name), settings(config, s), redo)]
    for step in (prepare, graft, label) if missing else ():
        step.run_step(config, redo)
    for system in wanted:
        if system in missing:
            _train(config, system, redo)
        else:
            print(f"train: {system.name}: already done", flush=True)
    last = next((s for s in wanted if s.name == "AddressVLM"), wanted[-1])
    (run.folder.parent / LAST_MODEL).write_text(f"{run.model(last.name) / 'merged'}\n")


def _train(config: Config, system: SystemConfig, redo: bool) -> None:
    """One Ray Train run; the same name and storage path make it go on where it stopped."""
    run, train = Run(config), config.train
    needed = train.workers * train.cpus_per_worker
    require_cpus(needed, f"training '{system.name}' with {train.workers} workers", "train.workers or train.cpus_per_worker")
    have = ray.cluster_resources().get("GPU", 0)
    if train.workers * train.gpus_per_worker > have:
        raise InputError(f"train.gpus_per_worker={train.gpus_per_worker:g} asks for more GPUs than the cluster's {have:g}.")
    claim(run.training / slug(system.name), settings(config, system), redo)
    print(f"train: {system.name}: starting {train.workers} workers", flush=True)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config.model_dump(), "system": system.name},
        scaling_config=ScalingConfig(
            num_workers=train.workers,
            use_gpu=train.gpus_per_worker > 0,
            resources_per_worker={"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker},
        ),
        run_config=RunConfig(
            name=slug(system.name),
            storage_path=str(run.training),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=train.max_failures, controller_failure_limit=0),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _sentence(error) from error
    mark_done(run.model(system.name), settings(config, system))
    print(f"train: {system.name}: saved in {run.model(system.name)}", flush=True)


def _sentence(error: Exception) -> Exception:
    """The InputError that a worker ended with, if that is what stopped the training."""
    failures = list(getattr(error, "worker_failures", {}).values()) + [error.__cause__, error]
    for failure in failures:
        while failure is not None:
            if isinstance(failure, InputError):
                return failure
            failure = getattr(failure, "cause", None) or failure.__cause__
    return error


def train_worker(given: dict[str, Any]) -> None:
    """What each worker of the group runs."""
    logging.getLogger("deepspeed").setLevel(logging.ERROR)
    config = Config.model_validate(given["config"])
    found = ray.train.get_checkpoint()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if found:
            checkpoint = Path(found.to_directory(folder))
        train_system(
            config,
            given["system"],
            checkpoint,
            functools.partial(_report, sharded=config.train.strategy != "ddp"),
            ray.train.torch.get_device(),
        )


def _report(metrics: dict[str, Any], folder: Path, sharded: bool) -> None:
    """Hand a checkpoint to Ray Train: rank 0's under DDP, every rank's share under ZeRO."""
    mine = sharded or ray.train.get_context().get_world_rank() == 0
    ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if mine else None)


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--system", action="append", metavar="NAME", help="train only this system (may be repeated)")
    parser.add_argument("--evaluate", action="store_true", help="then answer the test questions and write table and report")
    args = parser.parse_args()
    config = configure(args)
    connect()
    run_step(config, args.redo, args.system)
    if args.evaluate:
        from ray_jobs import evaluate

        evaluate.run_step(config, args.redo)


if __name__ == "__main__":
    job(main)
