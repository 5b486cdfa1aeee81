"""Rank 0's account of a training: `loss.jsonl`, TensorBoard events, loggers that were asked for, a line every few seconds."""

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from addressvlm.errors import InputError
from addressvlm.storage.files import download, upload
from addressvlm.storage.remote_path import AnyPath, RemotePath
from addressvlm.training.trainer import StepMetrics

Track = Callable[[dict[str, float], int], None]
SHOWN = ("loss", "learning_rate", "gradient_norm", "samples_per_s", "tokens_per_s", "mfu", "memory_gib")
EVERY_S = 5.0  # between lines
SENT_EVERY_S = 30.0  # to a store, beside every checkpoint
LOSS_FILE, VALIDATION_FILE = "loss.jsonl", "validation.jsonl"


class MetricsLogger:
    """What a run has learnt so far; a resumed run goes on with it.

    A store's objects can't be appended to: there the account is kept on this machine and sent whole now and then.
    """

    def __init__(self, folder: AnyPath, system: str, done: int, total: int, loggers: Sequence[str] = (), run: str = "") -> None:
        self.remote = folder if isinstance(folder, RemotePath) else None
        self._scratch = tempfile.TemporaryDirectory() if self.remote else None
        folder = self._fetched() if self._scratch else Path(str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOSS_FILE
        lines = self.path.read_text().splitlines()[:done] if self.path.is_file() else []
        self.path.write_text("".join(f"{line}\n" for line in lines))
        self.found = folder / VALIDATION_FILE
        if self.found.is_file():
            lines = [line for line in self.found.read_text().splitlines() if json.loads(line)["done"] <= done]
            self.found.write_text("".join(f"{line}\n" for line in lines))
        self.board = SummaryWriter(str(folder / "tensorboard"))
        self.system, self.done, self.first, self.total = system, done, done, total
        self.tracks = [external_logger(name, run, system) for name in loggers]
        self.began = self.shown = self.sent = time.monotonic()

    def note(self, progress: StepMetrics) -> None:
        """Record one step."""
        self.done += 1
        with self.path.open("a") as out:
            out.write(json.dumps(progress.as_dict()) + "\n")
        values = {key: value for key in SHOWN if (value := getattr(progress, key)) is not None}
        values |= {f"loss of {kind}": loss for kind, loss in progress.by_kind.items()}
        self._write(progress.stage, values, progress.step)
        now = time.monotonic()
        if now - self.shown >= EVERY_S or self.done in (self.first + 1, self.total):
            self.shown = now
            print(f"train: {self.system}: {self._line(progress, now)}", flush=True)
        if now - self.sent >= SENT_EVERY_S:
            self.keep()

    def keep(self) -> None:
        """See that all so far is where the run is; to be called before a checkpoint, which counts on it.

        Raises:
            InputError: the store can't be written.
        """
        if self.remote is None:
            return
        self.board.flush()
        folder = self.path.parent
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            upload(file, self.remote / file.relative_to(folder).as_posix())
        self.sent = time.monotonic()

    def _fetched(self) -> Path:
        """A folder of this machine with what an interrupted run left in the store."""
        assert self.remote is not None
        assert self._scratch is not None
        for name in (LOSS_FILE, VALIDATION_FILE):
            if (self.remote / name).is_file():
                download(self.remote / name, Path(self._scratch.name, name))
        return Path(self._scratch.name)

    def validated(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record what validation found after a step."""
        self._write(f"{stage}/val", dict(metrics), step)
        with self.found.open("a") as out:
            out.write(json.dumps({"stage": stage, "step": step, "done": self.done, **metrics}) + "\n")
        told = ", ".join(
            f"{name} {100 * value:.1f} %" for name, value in metrics.items() if name in ("A_d", "A_s", "A", "A_ds")
        )
        print(f"train: {self.system}: {stage} step {step}, validation {told}", flush=True)

    def _write(self, group: str, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self.board.add_scalar(f"{group}/{key}", value, step)
        for track in self.tracks:
            track({f"{group}/{key}": value for key, value in values.items()}, self.done)

    def _line(self, progress: StepMetrics, now: float) -> str:
        left = (now - self.began) / (self.done - self.first) * (self.total - self.done)
        share = "" if progress.mfu is None else f", {100 * progress.mfu:.1f} % of peak"
        bad = f", {progress.rejected:,} rows left out" if progress.rejected else ""
        return (
            f"{progress.stage} step {progress.step}/{progress.steps}, loss {progress.loss:.3f}, "
            f"{progress.samples_per_s:.1f} photos/s, {progress.tokens_per_s:,.0f} tokens/s{share}, "
            f"{progress.memory_gib:.1f} GiB{bad}, {left:.0f} s left"
        )


def external_logger(name: str, run: str, system: str) -> Track:
    """Where to send metrics beside TensorBoard: `mlflow` or `wandb`, set up by their own environment variables.

    Raises:
        InputError: it is not installed, or can't be begun.
    """
    if importlib.util.find_spec(name) is None:
        raise InputError(f"train.loggers names {name}, which is not installed: pip install {name}, or take it out.")
    client: Any = importlib.import_module(name)
    title = f"{run}: {system}"
    try:
        if name == "mlflow":
            client.set_experiment("addressvlm")
            client.start_run(run_name=title)
            return lambda values, step: client.log_metrics({_plain(k): v for k, v in values.items()}, step=step)
        session = client.init(project="addressvlm", name=title)
    except Exception as error:  # each has its own
        raise InputError(f"{name} can't be begun ({' '.join(str(error).split())[:200]}): set it up, or take it out of "
                         "train.loggers.") from error  # fmt: skip
    return lambda values, step: session.log(values, step=step)


def _plain(name: str) -> str:
    """MLflow takes no brackets, commas or the like in names."""
    return "".join(c if c.isalnum() or c in "_-./ " else "_" for c in name)
