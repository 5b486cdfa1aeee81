"""Train one system, that is, a row of the table: its stages one after the other on one adapter, then save and merge."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensorboardX import SummaryWriter

from addressvlm.config import Config
from addressvlm.config_training import SystemConfig
from addressvlm.errors import InputError
from addressvlm.models import load
from addressvlm.models.base import one_dimensional
from addressvlm.models.lora import attach, export
from addressvlm.run import Run
from addressvlm.training import loop
from addressvlm.training.collate import Collator
from addressvlm.training.rows import Rows, Schedule, steps_of
from addressvlm.training.strategy import Strategy

Report = Callable[[dict[str, Any], Path], None]


def stages_of(config: Config, system: SystemConfig, world: int) -> list[loop.Stage]:
    """The system's stages with their data and number of steps.

    Raises:
        InputError: a stage's table is missing or empty.
    """
    run = Run(config)
    folders = {"alignment": run.alignment, "photos": run.photos}
    stages = []
    for number, name in enumerate(system.stages):
        stage = config.train.stages[name]
        rows = Rows(folders[stage.data], "train")
        if not len(rows):
            raise InputError(f"{folders[stage.data]} has no training rows: prepare a city with more places.")
        per_step = stage.batch_size * stage.accumulate * world
        steps = steps_of(len(rows), per_step, stage.epochs, stage.max_steps)
        seed = config.seed * 101 + number
        stages.append(loop.Stage(name, stage, Schedule(rows, per_step, seed), steps, seed))
    if system.equal_steps_to and stages:
        model = next(s for s in config.train.systems if s.name == system.equal_steps_to)
        stages[-1].steps = sum(s.steps for s in stages_of(config, model, world)) - sum(s.steps for s in stages[:-1])
    return stages


class Journal:
    """Rank 0's account of the training: `loss.jsonl`, TensorBoard events and a line every few seconds."""

    def __init__(self, folder: Path, system: str, done: int, total: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "loss.jsonl"
        lines = self.path.read_text().splitlines()[:done] if self.path.is_file() else []
        self.path.write_text("".join(f"{line}\n" for line in lines))
        self.board = SummaryWriter(str(folder / "tensorboard"))
        self.system, self.done, self.first, self.total = system, done, done, total
        self.began = self.shown = time.monotonic()

    def note(self, progress: loop.Progress) -> None:
        """Record one step."""
        self.done += 1
        with self.path.open("a") as out:
            out.write(json.dumps(progress.as_dict()) + "\n")
        for key in ("loss", "learning_rate", "gradient_norm", "samples_per_s"):
            self.board.add_scalar(f"{progress.stage}/{key}", getattr(progress, key), progress.step)
        now = time.monotonic()
        if now - self.shown >= 5 or self.done in (self.first + 1, self.total):
            self.shown = now
            left = (now - self.began) / (self.done - self.first) * (self.total - self.done)
            print(
                f"train: {self.system}: {progress.stage} step {progress.step}/{progress.steps}, loss {progress.loss:.3f}, "
                f"{progress.samples_per_s:.1f} photos/s, {left:.0f} s left",
                flush=True,
            )


def train_system(
    config: Config, name: str, checkpoint: Path | None, report: Report, device: str | torch.device = "cpu"
) -> None:
    """Train from the beginning or from a checkpoint; every worker of the process group calls it.

    Args:
        checkpoint: folder that an earlier run handed to `report`.
        report: called by all workers together with metrics and a folder holding a checkpoint (rank 0's has the weights
            under DDP, every rank's has its share under ZeRO).

    Raises:
        InputError: see `loop.run`.
    """
    run = Run(config)
    system = next(s for s in config.train.systems if s.name == name)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    stages = stages_of(config, system, world)
    base, processor = load(config.model.base, config.model.dtype, config.model.trust_remote_code)
    torch.manual_seed(config.seed)  # of LoRA's random halves
    model, parts = attach(base, config.model)
    crowded = next((stage.name for stage in stages if stage.config.rounds == "apart"), None)
    if crowded and not one_dimensional(base):
        raise InputError(
            f"train.stages.{crowded}.rounds is apart, which {config.model.base}'s positions by image row and column do not "
            "allow: set it to conversation."
        )
    model.to(device)
    at = json.loads((checkpoint / "position.json").read_text()) if checkpoint else {"stage": 0, "step": 0}
    done = sum(s.steps for s in stages[: at["stage"]]) + at["step"]
    total = sum(s.steps for s in stages)
    journal = Journal(run.training / run.model(name).name, name, done, total) if rank == 0 else None
    if journal and done:
        print(f"train: {name}: going on after step {done} of {total}", flush=True)

    for number, stage in enumerate(stages):
        if number < at["stage"]:
            continue
        resumed = checkpoint is not None and number == at["stage"]

        def restore(strategy: Strategy) -> None:
            assert checkpoint is not None
            strategy.load(checkpoint)

        def after(progress: loop.Progress, strategy: Strategy, number: int = number) -> None:
            if journal:
                journal.note(progress)
            if progress.step % config.train.checkpoint_every and progress.step != progress.steps:
                return
            with tempfile.TemporaryDirectory() as folder:
                strategy.save(Path(folder))
                if rank == 0:
                    position = {"stage": number, "step": progress.step}
                    (Path(folder) / "position.json").write_text(json.dumps(position))
                report(progress.as_dict(), Path(folder))

        start = at["step"] if resumed else 0
        how = config.train.strategy, config.train.precision
        collate = Collator(processor, stage.config.rounds == "apart")
        loop.run(model, parts, collate, stage, *how, start, restore if resumed else None, after)
    if rank == 0:
        save(config, model, run.model(name))


def save(config: Config, model: Any, folder: Path) -> None:
    """Write `adapter` and `merged` below a temporary folder, then put it in place at once."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial / "adapter")
    export(partial / "adapter", config.model, partial / "merged")
    shutil.copy(Run(config).gazetteer, partial / "merged" / "gazetteer.geojson")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
