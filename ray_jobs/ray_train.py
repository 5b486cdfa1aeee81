"""Run a training on a group of Ray Train workers: restart after failures, report checkpoints, end with one error sentence."""

import errno
import functools
import json
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
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
from ray.train.v2.api.callback import UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.storage.remote_path import AnyPath, filesystem
from addressvlm.storage.run_dir import Run, slug, storage_dir
from addressvlm.training.checkpoint import TrainingCheckpoint
from ray_jobs.cluster import Workers
from ray_jobs.common import absolute_path
from ray_jobs.progress import Progress, display

PREEMPTION_POLL_S = 2.0
TAIL_BYTES = 65536  # of a log, more than its last line
PLACE_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"  # how long Ray waits for resources for all workers
# How long Ray's controller waits for workers to leave their process group; one that stands in a collective never does.
GROUP_SHUTDOWN_TIMEOUT = "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"
PLACE_TIMEOUT_SET = os.environ.get(PLACE_TIMEOUT)


def training_workers(config: Config, name: str, min_workers: int | None = None) -> Workers:
    """The workers without which a training does not start."""
    train, count = config.train, min_workers or config.train.workers
    what, key = f"training '{name}' with {count} workers", "train.min_workers" if min_workers else "train.workers"
    return Workers(what, count, train.cpus_per_worker, train.gpus_per_worker, "train", key)


def run_training(
    config: Config,
    name: str,
    worker: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    min_workers: int | None = None,
) -> None:
    """One Ray Train run; rerun with the same name and storage it resumes.

    Args:
        worker: runs on each worker, with `arguments` and `config` and `notice`, see `run_worker`.
        min_workers: continue with so few when nodes are lost.

    Raises:
        InputError: a worker or Ray failed for a reason that a user can fix.
    """
    run, train, notice = Run(config), config.train, make_notice()
    os.environ[PLACE_TIMEOUT] = PLACE_TIMEOUT_SET or place_timeout_s(config, min_workers)
    if train.gpus_per_worker:  # a worker that hangs in NCCL without an error ends the attempt after ten minutes
        os.environ.setdefault("RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR", "1")
        os.environ.setdefault("RAY_TRAIN_NCCL_RAS_ACTION", "fail")
    storage: dict[str, Any] = {"storage_path": str(run.training)}
    if not isinstance(run.training, Path):  # a bucket, read and written as everywhere else
        remote, path = filesystem(str(run.training))
        storage = {"storage_path": path, "storage_filesystem": remote}
    trainer = TorchTrainer(
        worker,
        train_loop_config={"config": with_absolute_paths(config).model_dump(), "notice": notice, **arguments},
        scaling_config=ScalingConfig(
            num_workers=(min_workers, train.workers) if min_workers else train.workers,
            use_gpu=train.gpus_per_worker > 0,
            resources_per_worker={"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker},
        ),
        run_config=RunConfig(
            name=slug(name),
            **storage,
            checkpoint_config=CheckpointConfig(num_to_keep=train.keep_checkpoints),
            # A worker that is lost while it starts, or nodes that are late, count as failures of the controller.
            failure_config=FailureConfig(train.max_failures, controller_failure_limit=train.max_failures),
            callbacks=[UserErrorCallback(config, notice)],
            logging_config=LoggingConfig(log_level="CRITICAL"),  # errors are raised below
        ),
    )
    try:
        with display.show(
            f"train: {name}", look=functools.partial(look_at_training, run.training_dir(name), notice, time.time())
        ):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise noticed_error(notice) or to_user_error(error, config, name) or error from error
    if user_error := noticed_error(notice):
        raise user_error


def place_timeout_s(config: Config, min_workers: int | None) -> str:
    """Seconds that Ray Train waits for its workers' resources.

    For all workers: until a lost node is replaced. With `min_workers`, Ray counts nodes every 20 s, so right after a loss it
    requests resources that are gone; that wait must end before it tries with the remaining nodes.
    """
    return "60" if min_workers else f"{config.cluster.wait_s:.0f}"


def with_absolute_paths(config: Config) -> Config:
    """The configuration with paths that mean the same in a worker, whose working directory is another."""
    config = config.model_copy(deep=True)
    config.storage = str(storage_dir(config.storage))
    config.model.base = absolute_path(config.model.base)
    return config


def look_at_training(folder: AnyPath, notice: Any, since: float, progress: Progress) -> None:
    """Read how far a training is from its last line of loss.jsonl, and print what its workers have to say.

    Args:
        folder: `Run.training_dir`.
        notice: of `make_notice`.
        since: when it began, in seconds of the epoch; earlier lines are of another attempt.
    """
    for line in ray.get(notice.take.remote()):
        print(line, flush=True)
    losses = folder / "loss.jsonl"
    if not losses.is_file() or losses.stat().st_mtime < since:
        progress.note = "starting the workers"
        return
    with losses.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = file.read().splitlines()
    if lines:
        last = json.loads(lines[-1])
        if progress.unit != (unit := f"steps of {last['stage']}"):
            progress.unit, progress.first, progress.began = unit, None, time.monotonic()
        progress.done, progress.total = last["step"], last["steps"]
        waits = "".join(f", waiting for {what} {share:.0%}" for what, share in last.get("waits", {}).items() if share >= 0.01)
        progress.note = f"loss {last['loss']:.3f}, {last['samples_per_s']:.1f} photos/s{waits}"


def run_worker(arguments: dict[str, Any], train: Callable[[Config, Path | None, torch.device], None]) -> None:
    """Train on this worker from the last checkpoint; an error that a user can fix goes into the notice and ends the run."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train logs a line at every report
    config, notice = Config.model_validate(arguments["config"]), arguments["notice"]
    if ray.get(notice.read.remote()):
        return
    messages = logging.getLogger("addressvlm")
    messages.setLevel(logging.INFO)
    messages.addHandler(NoticeHandler(notice))
    checkpoint = ray.train.get_checkpoint()
    try:
        with checkpoint.as_directory() if checkpoint else nullcontext() as folder:  # one copy a node
            train(config, Path(folder) if folder else None, ray.train.torch.get_device())
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        if message := user_message(error, config):
            ray.get(notice.write.remote(message))
        raise  # so that Ray ends the workers that wait for this one in a collective operation


class UserErrorCallback(UserCallback):
    """Ends the run at an error that a user can fix; Ray would restart all workers and meet it again."""

    def __init__(self, config: Config, notice: Any) -> None:
        self.config, self.notice = config, notice

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the error; called by Ray's controller within seconds."""
        os.environ.setdefault(GROUP_SHUTDOWN_TIMEOUT, "3")
        messages = [user_message(getattr(error, "_base_exc", error), self.config) for error in worker_exceptions.values()]
        error = next((InputError(message) for message in messages if message), None) or noticed_error(self.notice)
        if error:
            ray.get(self.notice.write.remote(str(error)))
            raise error


class NoticeHandler(logging.Handler):
    """Passes what this package logs in a worker on to the driver, which prints it."""

    def __init__(self, notice: Any) -> None:
        super().__init__()
        self.notice = notice

    def emit(self, record: logging.LogRecord) -> None:
        self.notice.say.remote(f"train: {record.getMessage()}")


class CheckpointReporter:
    """Hands checkpoints to Ray Train; one is written and uploaded while training continues, the next waits for it."""

    def __init__(self) -> None:
        self.stored = threading.Event()
        self.stored.set()
        self._steps, self._every, self._began = 0, 0, 0.0
        self._is_preempted = False

    def is_due(self) -> bool:
        """Whether a node of the training is about to be taken away, once; all workers call it after every step.

        Asking costs the workers a round trip together, so they ask about every two seconds: the first worker's time for its
        second step says how many steps that is.
        """
        self._steps += 1
        if self._steps == 1:
            self._began = time.monotonic()
        elif self._steps == 2:
            every = min(math.ceil(PREEMPTION_POLL_S / max(time.monotonic() - self._began, 1e-3)), 50)
            self._every = ray.train.collective.broadcast_from_rank_zero(every)
        if self._is_preempted or not self._every or self._steps % self._every:
            return False
        self._is_preempted = ray.train.get_preemption_info() is not None
        return self._is_preempted

    def __call__(self, metrics: dict[str, Any], checkpoint: TrainingCheckpoint | None) -> None:
        """Report from every worker; the first has the checkpoint."""
        if checkpoint is None:
            ray.train.report(metrics, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        self.stored.wait()
        self.stored.clear()
        storage = ray.train.get_context().get_storage()

        def write_and_upload(local: Checkpoint, name: str) -> Checkpoint:
            try:
                checkpoint.write(Path(local.path))
                return storage.persist_current_checkpoint(local, name)
            finally:
                self.stored.set()

        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(tempfile.mkdtemp()),  # filled when it is uploaded
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=write_and_upload,
            delete_local_checkpoint_after_upload=True,
        )


@ray.remote(num_cpus=0)
class Notice:
    """Holds what workers have to say to the user, and a user error; with one, a restarted worker group ends at once."""

    def __init__(self) -> None:
        self.message: str | None = None
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def take(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines

    def write(self, message: str) -> None:
        self.message = self.message or message

    def read(self) -> str | None:
        return self.message


def make_notice() -> Any:
    """A `Notice` on this node, so that it is lost only with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Notice.options(scheduling_strategy=here).remote()


def noticed_error(notice: Any) -> InputError | None:
    """The error that a worker wrote into the notice."""
    message = ray.get(notice.read.remote())
    return InputError(message) if message else None


def to_user_error(error: Exception, config: Config, system: str) -> InputError | None:
    """The error for failures that a user can fix; None for defects of this program."""
    failures = getattr(error, "worker_failures", {}).values()
    messages = [user_message(getattr(failure, "_base_exc", failure), config) for failure in failures]
    if message := next((message for message in messages if message), None):
        return InputError(message)
    if any(isinstance(failure, ray.exceptions.RayActorError) for failure in failures):
        return InputError(
            f"training '{system}' lost workers more often than train.max_failures={config.train.max_failures} (out of memory, "
            "or nodes went away): lower batch_size of train.stages if memory is short, and rerun to resume from the last "
            "checkpoint."
        )
    if isinstance(error, ray.train.ControllerError):
        reason = " ".join(str(error.controller_failure).split())[:200]
        return InputError(
            f"training '{system}' could not be started ({reason}): look at `ray status`, rerun, and if it fails again, start "
            "over with --redo."
        )
    return None


def user_message(error: Exception, config: Config) -> str | None:
    """What a user can do about an error that would come back at every attempt."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "a GPU is out of memory: lower batch_size in train.stages and raise gradient_accumulation_steps by as much."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return f"{config.storage} can't be written ({error.strerror}): free space or set storage elsewhere, then rerun."
    return None
