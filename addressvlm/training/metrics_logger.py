"""What the first worker writes during training: `loss.jsonl`, TensorBoard, optional loggers, a progress line.

And the figures it needs of a device: peak operations per second, memory.
"""

import importlib.util
import json
import logging
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensorboardX import SummaryWriter

from addressvlm.errors import InputError
from addressvlm.storage.files import download, upload
from addressvlm.storage.remote_path import AnyPath, RemotePath

messages = logging.getLogger(__name__)

WAITS = ("data", "checkpoints", "workers", "validation")  # what a step may wait for
SCALARS = ("loss", "learning_rate", "gradient_norm", "samples_per_s", "tokens_per_s", "mfu", "memory_gib")
LINE_EVERY_S = 5.0
SYNC_EVERY_S = 30.0  # to remote storage, besides every checkpoint
LOSS_FILE, VALIDATION_FILE = "loss.jsonl", "validation.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one optimizer step, a line of `loss.jsonl`. Rates are over the whole step, with all that it waited for."""

    stage: str
    step: int  # steps done, from 1
    steps: int
    loss: float  # mean over the answer tokens of all workers
    learning_rate: float
    gradient_norm: float
    samples_per_s: float
    tokens: int  # answer tokens of the step
    tokens_per_s: float  # all tokens, without padding
    mfu: float | None  # model FLOPs utilization of all workers, None if their peak is unknown
    memory_gib: float  # peak of this worker
    by_kind: dict[str, float] = field(default_factory=dict)  # loss by kind of question
    rejected: int = 0  # rows that this worker could not use, since the stage began
    seconds: float = 0.0  # from the end of the last step to the end of this one
    waits: dict[str, float] = field(default_factory=dict)  # share of them that this worker waited, by what for, see WAITS

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class StepClock:
    """Seconds from the end of one step to the end of the next, and how many of them were spent waiting for what."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Begin a step now."""
        self.began = time.perf_counter()
        self.waited = dict.fromkeys(WAITS, 0.0)
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Count the block's time as a wait for `what`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.waited[what] += time.perf_counter() - began

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Count the time of a collective operation as a wait for other workers; on a GPU without synchronizing with it."""
        if self.device.type != "cuda":
            with self.waiting("workers"):
                yield
            return
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        yield
        events[1].record()
        self._events.append(events)

    def lap(self) -> tuple[float, dict[str, float]]:
        """Seconds of the step and the share of each wait; begins the next step. The device must have done its work."""
        self.waited["workers"] += sum(start.elapsed_time(end) for start, end in self._events) / 1000
        seconds, waited = time.perf_counter() - self.began, self.waited
        self.restart()
        return seconds, {what: waited[what] / seconds for what in WAITS}


class MetricsLogger:
    """Logs a system's training; a resumed run continues its files.

    Objects in remote storage can't be appended to: there the files are kept on this machine and uploaded now and then.
    """

    def __init__(self, folder: AnyPath, system: str, done: int, total: int, loggers: Sequence[str] = (), run: str = "") -> None:
        self.remote = folder if isinstance(folder, RemotePath) else None
        self._scratch = tempfile.TemporaryDirectory() if self.remote else None
        local = Path(self._scratch.name) if self._scratch else Path(str(folder))
        local.mkdir(parents=True, exist_ok=True)
        self.losses, self.validations = local / LOSS_FILE, local / VALIDATION_FILE
        for file in (self.losses, self.validations):
            if self.remote and (self.remote / file.name).is_file():
                download(self.remote / file.name, file)
        lines = self.losses.read_text().splitlines()[:done] if self.losses.is_file() else []
        self.losses.write_text("".join(f"{line}\n" for line in lines))
        if self.validations.is_file():
            lines = [line for line in self.validations.read_text().splitlines() if json.loads(line)["done"] <= done]
            self.validations.write_text("".join(f"{line}\n" for line in lines))
        self.tensorboard = SummaryWriter(str(local / "tensorboard"))
        self.system, self.done, self.first, self.total = system, done, done, total
        self.loggers = [external_logger(name, run, system) for name in loggers]
        self.began = self.last_line = self.last_sync = time.monotonic()
        self.since_line: list[StepMetrics] = []

    def log_step(self, metrics: StepMetrics) -> None:
        """Log one optimizer step."""
        self.done += 1
        with self.losses.open("a") as file:
            file.write(json.dumps(metrics.as_dict()) + "\n")
        scalars = {key: value for key in SCALARS if (value := getattr(metrics, key)) is not None}
        scalars |= {f"loss of {kind}": loss for kind, loss in metrics.by_kind.items()}
        scalars |= {f"wait for {what}": share for what, share in metrics.waits.items()}
        self._log_scalars(metrics.stage, scalars, metrics.step)
        self.since_line.append(metrics)
        now = time.monotonic()
        if now - self.last_line >= LINE_EVERY_S or self.done in (self.first + 1, self.total):
            self.last_line = now
            print(f"train: {self.system}: {self._progress_line(now)}", flush=True)
            self.since_line = []
        if now - self.last_sync >= SYNC_EVERY_S:
            self.sync()

    def log_validation(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of the validation after a step."""
        self._log_scalars(f"{stage}/val", dict(metrics), step)
        with self.validations.open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step, "done": self.done, **metrics}) + "\n")
        shares = ", ".join(
            f"{name} {100 * value:.1f} %" for name, value in metrics.items() if name in ("A_d", "A_s", "A", "A_ds")
        )
        messages.info(f"{self.system}: {stage} step {step}, validation {shares}")

    def sync(self) -> None:
        """Upload all files to remote storage; called before every checkpoint, since resuming needs them.

        Raises:
            InputError: the storage can't be written.
        """
        if self.remote is None:
            return
        self.tensorboard.flush()
        folder = self.losses.parent
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            upload(file, self.remote / file.relative_to(folder).as_posix())
        self.last_sync = time.monotonic()

    def _log_scalars(self, group: str, scalars: dict[str, float], step: int) -> None:
        for key, value in scalars.items():
            self.tensorboard.add_scalar(f"{group}/{key}", value, step)
        for log in self.loggers:
            log({f"{group}/{key}": value for key, value in scalars.items()}, self.done)

    def _progress_line(self, now: float) -> str:
        """The last step; rates and waits are means over the steps since the last line."""
        metrics, seconds = self.since_line[-1], sum(step.seconds for step in self.since_line)

        def mean(values: Iterable[float]) -> float:
            weighted = (value * step.seconds for value, step in zip(values, self.since_line, strict=True))
            return sum(weighted) / seconds if seconds else 0.0

        photos, tokens = (mean(getattr(step, key) for step in self.since_line) for key in ("samples_per_s", "tokens_per_s"))
        mfu = "" if metrics.mfu is None else f", {100 * mean(step.mfu or 0.0 for step in self.since_line):.1f} % of peak"
        waits = {what: mean(step.waits.get(what, 0.0) for step in self.since_line) for what in WAITS}
        waited = ", ".join(f"{what} {100 * share:.0f} %" for what, share in waits.items() if share >= 0.005)
        seconds_left = (now - self.began) / (self.done - self.first) * (self.total - self.done)
        rejected = f", {metrics.rejected:,} rows rejected" if metrics.rejected else ""
        return (
            f"{metrics.stage} step {metrics.step}/{metrics.steps}, loss {metrics.loss:.3f}, {photos:.1f} photos/s, "
            f"{tokens:,.0f} tokens/s{mfu}{f', waiting for {waited}' if waited else ''}, {metrics.memory_gib:.1f} GiB"
            f"{rejected}, {seconds_left:.0f} s left"
        )


def external_logger(name: str, run: str, system: str) -> Callable[[dict[str, float], int], None]:
    """A function that sends scalars of a step to `mlflow` or `wandb`, which are set up by their environment variables.

    Raises:
        InputError: it is not installed or can't be started.
    """
    if importlib.util.find_spec(name) is None:
        raise InputError(f"train.loggers names {name}, which is not installed: pip install {name}, or remove it.")
    client: Any = importlib.import_module(name)
    title = f"{run}: {system}"
    try:
        if name == "mlflow":
            client.set_experiment("addressvlm")
            client.start_run(run_name=title)

            def log(values: dict[str, float], step: int) -> None:  # MLflow allows no brackets, commas or the like in names
                client.log_metrics(
                    {"".join(c if c.isalnum() or c in "_-./ " else "_" for c in k): v for k, v in values.items()}, step=step
                )

            return log
        session = client.init(project="addressvlm", name=title)
    except Exception as error:  # each has its own
        raise InputError(
            f"{name} can't be started ({' '.join(str(error).split())[:200]}): set it up, or remove it from train.loggers."
        ) from error
    return lambda values, step: session.log(values, step=step)


# Dense bfloat16 with float32 accumulation, TFLOP/s, by a part of the GPU's name (vendors' data sheets).
PEAKS = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "A10G": 70.0, "A40": 150.0, "A6000": 155.0, "RTX 5090": 210.0, "RTX 4090": 165.0, "RTX 3090": 71.0,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype, configured_tflops: float | None = None) -> float | None:
    """Peak floating-point operations a second; None if it is not configured and the device is unknown."""
    if configured_tflops:
        return configured_tflops * 1e12
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_of_gpu(torch.cuda.get_device_name(device))


def peak_of_gpu(name: str, peaks: Iterable[tuple[str, float]] = tuple(PEAKS.items())) -> float | None:
    """The peak of a GPU by name; None if it is not in the table."""
    return next((tflops * 1e12 for part, tflops in peaks if part in name), None)


def memory_gib(device: torch.device) -> float:
    """Peak memory: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def total_memory_gib() -> float | None:
    """Memory of this machine's smallest GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())) / 2**30
