"""Train one system, that is, a row of the table: its stages one after the other on one adapter, then save and merge."""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from addressvlm.addresses import Gazetteer, joined
from addressvlm.config import Config
from addressvlm.config_training import Data, Part, SystemConfig
from addressvlm.errors import InputError
from addressvlm.models import load
from addressvlm.models.base import context_of, one_dimensional, packs, placed
from addressvlm.models.card import write_cards
from addressvlm.models.lora import attach, export
from addressvlm.run import Run, slug
from addressvlm.training import loop
from addressvlm.training.collate import Collator
from addressvlm.training.journal import Journal
from addressvlm.training.rejects import Rejects
from addressvlm.training.rows import Mix, Rows, Schedule, Table, steps_of
from addressvlm.training.strategy import Strategy
from addressvlm.training.validation import Validation

Report = Callable[[dict[str, Any], Path], None]


def stages_of(config: Config, system: SystemConfig, world: int) -> list[loop.Stage]:
    """The system's stages with their data and number of steps.

    Raises:
        InputError: a stage's table is missing or empty, or equal_steps_to leaves no step for the last stage.
    """
    stages = []
    for number, name in enumerate(system.stages):
        stage = config.train.stages[name]
        rows = table_of(config, stage.tables)
        per_step = stage.batch_size * stage.accumulate * world
        steps = steps_of(len(rows), per_step, stage.epochs, stage.max_steps)
        seed = config.seed * 101 + number
        stages.append(loop.Stage(name, stage, Schedule(rows, per_step, seed), steps, seed))
    if system.equal_steps_to and stages:
        model = next(s for s in config.train.systems if s.name == system.equal_steps_to)
        whole = sum(s.steps for s in stages_of(config, model, world))
        stages[-1].steps = steps_left(system, whole, sum(s.steps for s in stages[:-1]))
    return stages


def steps_left(system: SystemConfig, whole: int, before: int) -> int:
    """Steps of the last stage of a system that shall make `whole` steps and has made `before`.

    Raises:
        InputError: none are left.
    """
    if whole <= before:
        raise InputError(
            f"system '{system.name}' shall make the {whole} steps of '{system.equal_steps_to}', but makes {before} before its "
            f"last stage: lower epochs or max_steps of {', '.join(system.stages[:-1]) or 'that system'}, or take out its "
            "equal_steps_to."
        )
    return whole - before


def cities_of(config: Config) -> list[tuple[Run, float]]:
    """The runs whose tables are learnt from, and how many epochs of each are in one."""
    names = config.train.cities or {config.name: 1.0}
    return [(Run(config.model_copy(update={"name": name})), weight) for name, weight in names.items()]


def table_of(config: Config, kinds: Sequence[Data]) -> Table:
    """The training rows of some kinds in all cities.

    Raises:
        InputError: one of the tables is missing or empty.
    """
    found: list[tuple[Table, float]] = []
    for run, weight in cities_of(config):
        for kind in kinds:
            folder: Path = getattr(run, kind)
            rows = Rows(folder, "train")
            if not len(rows):
                raise InputError(f"{folder} has no training rows: prepare a city with more places.")
            found.append((rows, weight))
    return found[0][0] if len(found) == 1 and found[0][1] == 1 else Mix(found)


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
    model, parts, packed = equip(base, config, torch.device(device))
    crowded = next((stage.name for stage in stages if stage.config.rounds == "apart"), None)
    if crowded and not one_dimensional(base):
        raise InputError(
            f"train.stages.{crowded}.rounds is apart, which {config.model.base}'s positions by image row and column do not "
            "allow: set it to conversation."
        )
    validation = Validation(config, processor) if config.train.validate_every else None
    at = json.loads((checkpoint / "position.json").read_text()) if checkpoint else {"stage": 0, "step": 0}
    done = sum(s.steps for s in stages[: at["stage"]]) + at["step"]
    total = sum(s.steps for s in stages)
    rejects = Rejects(run.rejects / f"train-{slug(name)}.parquet", resumed=done > 0)
    journal = Journal(run.journal(name), name, done, total, config.train.trackers, config.name) if rank == 0 else None
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
            every, last = config.train.validate_every, progress.step == progress.steps
            if validation and every and (progress.step % every == 0 or last):
                found = validation(model)
                if journal:
                    journal.validated(progress.stage, progress.step, found)
            if progress.step % config.train.checkpoint_every and not last:
                return
            rejects.write(stages)
            with tempfile.TemporaryDirectory() as folder:
                strategy.save(Path(folder))
                if rank == 0:
                    position = {"stage": number, "step": progress.step}
                    (Path(folder) / "position.json").write_text(json.dumps(position))
                report(progress.as_dict(), Path(folder))

        start = at["step"] if resumed else 0
        how = config.train.strategy, config.train.precision
        collate = Collator(processor, stage.config.rounds == "apart", packed, context_of(base))
        peak = config.train.peak_tflops
        loop.run(model, parts, collate, stage, *how, start, restore if resumed else None, after, peak)
    left_out = rejects.write(stages)
    if rank == 0:
        if left_out:
            print(f"train: {name}: {left_out:,} rows were left out: see {rejects.file}", flush=True)
        save(config, model, name)


def equip(base: Any, config: Config, device: torch.device) -> tuple[Any, dict[Part, str], bool]:
    """The base with its adapter on a device, laid out for training there; its parts; whether rows are to be packed.

    Raises:
        InputError: the base's parts can't be named, or it can't be packed and shall be.
    """
    packed = packs(base, config.train.packing, device, config.model.base)
    torch.manual_seed(config.seed)  # of LoRA's random halves
    model, parts = attach(base, config.model)
    return placed(model, device), parts, packed


def save(config: Config, model: Any, system: str) -> None:
    """Write `adapter` and `merged`, each with its card, below a temporary folder, then put it in place at once."""
    folder = Run(config).model(system)
    partial = folder.with_name(folder.name + ".partial")
    model.to(memory_format=torch.contiguous_format)
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial / "adapter")
    export(partial / "adapter", config.model, partial / "merged")
    joined([Gazetteer.load(run.gazetteer) for run, _ in cities_of(config)]).save(partial / "merged" / "gazetteer.geojson")
    write_cards(config, system, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
