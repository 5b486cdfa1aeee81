"""Ray Train as the jobs use it: a group of workers that trains, goes on after a failure, and ends in one sentence."""

import errno
import functools
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.storage.remote_path import AnyPath, filesystem
from addressvlm.storage.run_dir import Run, slug, storage_dir
from addressvlm.training.checkpoint import TrainingCheckpoint
from ray_jobs.common import Heartbeat, absolute_path, require_resources


@ray.remote(num_cpus=0)
class ErrorNotice:
    """Holds the sentence with which a worker gave up; a restarted worker group reads it and ends instead of trying again."""

    def __init__(self) -> None:
        self.said: str | None = None

    def write(self, said: str) -> None:
        self.said = self.said or said

    def read(self) -> str | None:
        return self.said


def make_notice() -> Any:
    """A `ErrorNotice` on this node: the job ends when the driver's node is lost, and not when another one is."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ErrorNotice.options(scheduling_strategy=here).remote()


def noticed_error(notice: Any) -> InputError | None:
    """What a worker wrote into the notice."""
    said = ray.get(notice.read.remote())
    return InputError(said) if said else None


def to_user_error(error: Exception, config: Config, system: str) -> InputError | None:
    """A sentence for the failures that somebody at the cluster can mend; None for our defects."""
    failures = getattr(error, "worker_failures", {}).values()
    stored = [user_message(getattr(failure, "_base_exc", failure), config) for failure in failures]  # while training went on
    if said := next((sentence for sentence in stored if sentence), None):
        return InputError(said)
    if any(isinstance(failure, ray.exceptions.RayActorError) for failure in failures):
        return InputError(
            f"training '{system}' lost workers more often than train.max_failures={config.train.max_failures} (out of memory, "
            "or machines went away): lower batch_size of train.stages if memory is short, and run the same command again to "
            "go on from the last checkpoint."
        )
    if isinstance(error, ray.train.ControllerError):
        sentence = " ".join(str(error.controller_failure).split())[:200]
        return InputError(
            f"training '{system}' could not be started ({sentence}): look at `ray status`, run the same command again, and if "
            "it stays so, begin anew with --redo."
        )
    return None


def user_message(error: Exception, config: Config) -> str | None:
    """What a person can do about an error that would come back at every attempt."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "a GPU is out of memory: lower batch_size in train.stages and raise gradient_accumulation_steps by as much."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return f"{config.storage} can't be written ({error.strerror}): free room or set storage elsewhere, then run again."
    return None


os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # or every line of a worker comes twice
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # Ray's own error line; lost nodes are noticed without it


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
    require_resources("CPU", least * train.cpus_per_worker, what, f"{keys} or train.cpus_per_worker")
    require_resources("GPU", least * train.gpus_per_worker, what, f"{keys} or train.gpus_per_worker")


def run_training(
    config: Config, name: str, worker: Callable[[dict[str, Any]], None], given: dict[str, Any], fewest: int | None = None
) -> None:
    """One Ray Train run; the same name and storage path make it go on where it stopped.

    Args:
        worker: runs on each of the workers, on `given` with `config` and `notice`, see `run_worker`.
        fewest: workers to go on with when nodes are lost.

    Raises:
        InputError: a worker or Ray gave up for a reason that a person can mend.
    """
    run, train, notice = Run(config), config.train, make_notice()
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
        with Heartbeat(functools.partial(_waiting, name, run.training_dir(name) / "loss.jsonl"), QUIET_S):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise noticed_error(notice) or to_user_error(error, config, name) or error from error
    if said := noticed_error(notice):
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
    config.storage = str(storage_dir(config.storage))
    config.model.base = absolute_path(config.model.base)
    return config


def _waiting(system: str, losses: AnyPath) -> str:
    """What to say while no step is made; nothing while they are."""
    if not losses.is_file():
        return f"train: {system}: waiting for the workers"
    if time.time() - losses.stat().st_mtime < QUIET_S:
        return ""
    return f"train: {system}: {len(losses.read_text().splitlines()):,} steps done, working"


def run_worker(given: dict[str, Any], work: Callable[[Config, Path | None, torch.device], None]) -> None:
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
        said = user_message(error, config)
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


class CheckpointReporter:
    """Hands snapshots to Ray Train, which stores one while training goes on; a second one waits for the first."""

    def __init__(self) -> None:
        self.under_way: Path | None = None

    def __call__(self, metrics: dict[str, Any], snapshot: TrainingCheckpoint | None) -> None:
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
