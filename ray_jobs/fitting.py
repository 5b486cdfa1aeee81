"""Ray Train as the jobs use it: a group of workers that trains, goes on after a failure, and ends in one sentence."""

import functools
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # or every line of a worker comes twice
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # Ray's own error line; lost nodes are noticed without it

import ray.train.torch
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

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.run import Run, slug, storage
from addressvlm.stores import AnyPath, filesystem
from addressvlm.training.snapshot import Snapshot
from ray_jobs import failures
from ray_jobs.common import absolute, require
from ray_jobs.failures import explained, sentence_of, told
from ray_jobs.heartbeat import Heartbeat

QUIET_S = 30.0  # without a step for so long, the driver says that it is still there
PLACE_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"  # how long Ray waits for nodes that have room for all workers
PLACE_TIMEOUT_SET = os.environ.get(PLACE_TIMEOUT)


def require_workers(config: Config, name: str, fewest: int | None = None) -> None:
    """Refuse a training that has to wait for its workers in vain.

    Raises:
        InputError: the cluster has fewer CPUs or GPUs.
    """
    train = config.train
    least = fewest or train.workers
    what, keys = f"training '{name}' with {least} workers", "train.min_workers" if fewest else "train.workers"
    require("CPU", least * train.cpus_per_worker, what, f"{keys} or train.cpus_per_worker")
    require("GPU", least * train.gpus_per_worker, what, f"{keys} or train.gpus_per_worker")


def fit(
    config: Config, name: str, worker: Callable[[dict[str, Any]], None], given: dict[str, Any], fewest: int | None = None
) -> None:
    """One Ray Train run; the same name and storage path make it go on where it stopped.

    Args:
        worker: runs on each of the workers, on `given` with `config` and `notice`, see `guarded`.
        fewest: workers to go on with when nodes are lost.

    Raises:
        InputError: a worker or Ray gave up for a reason that a person can mend.
    """
    run, train, notice = Run(config), config.train, failures.notice()
    os.environ[PLACE_TIMEOUT] = PLACE_TIMEOUT_SET or place_timeout_s(fewest)
    trainer = TorchTrainer(
        worker,
        train_loop_config={"config": _absolute(config).model_dump(), "notice": notice, **given},
        scaling_config=ScalingConfig(
            num_workers=(fewest, train.workers) if fewest else train.workers,
            use_gpu=train.gpus_per_worker > 0,
            resources_per_worker={"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker},
        ),
        run_config=RunConfig(
            name=slug(name),
            **_kept_in(run.training),
            checkpoint_config=CheckpointConfig(num_to_keep=train.keep_checkpoints),
            failure_config=failures_allowed(config, fewest),
            logging_config=LoggingConfig(log_level="CRITICAL"),  # what matters of it is said below
        ),
    )
    print(f"train: {name}: starting {train.workers} worker{'s' if train.workers > 1 else ''}", flush=True)
    try:
        with Heartbeat(functools.partial(_waiting, name, run.journal(name) / "loss.jsonl"), QUIET_S):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise told(notice) or explained(error, config, name) or error from error
    if said := told(notice):
        raise said


def place_timeout_s(fewest: int | None) -> str:
    """How long Ray Train waits for room for its workers, in seconds.

    All of them: until a lost node is replaced. With `fewest`, Ray counts nodes again every 20 s, so that after a loss it first
    asks for room that is gone; then the wait must end before it tries with those that are left.
    """
    return "60" if fewest else "900"


def failures_allowed(config: Config, fewest: int | None) -> FailureConfig:
    """How often Ray Train tries again: after lost workers, and with `fewest` when there was no room for what it asked for."""
    most = config.train.max_failures
    return FailureConfig(max_failures=most, controller_failure_limit=most if fewest else 0)


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
    config.model.base = absolute(config.model.base)
    return config


def _waiting(system: str, losses: AnyPath) -> str:
    """What to say while no step is made; nothing while they are."""
    if not losses.is_file():
        return f"train: {system}: waiting for the workers"
    if time.time() - losses.stat().st_mtime < QUIET_S:
        return ""
    return f"train: {system}: {len(losses.read_text().splitlines()):,} steps done, working"


def guarded(given: dict[str, Any], work: Callable[[Config, Path | None, torch.device], None]) -> None:
    """Run a worker's part from the last checkpoint on; what a person can mend goes into the notice and is not tried again."""
    _be_quiet()
    config, notice = Config.model_validate(given["config"]), given["notice"]
    if ray.get(notice.read.remote()):
        return
    found = ray.train.get_checkpoint()
    try:
        with tempfile.TemporaryDirectory() as folder:
            work(config, Path(found.to_directory(folder)) if found else None, ray.train.torch.get_device())
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
