"""Train one system, that is, a row of the table: its stages one after the other on one adapter, then save and merge."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from addressvlm.config import Config
from addressvlm.config.train import Data, Part, SystemConfig
from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import Gazetteer, merge_gazetteers
from addressvlm.models import load_model
from addressvlm.models.cards import write_cards
from addressvlm.models.loading import context_length, enable_packing, has_1d_positions, to_device
from addressvlm.models.lora import attach_lora, export_merged, load_adapter_state
from addressvlm.storage.files import atomic_replace_dir
from addressvlm.storage.remote_path import AnyPath
from addressvlm.storage.run_dir import Run, slug
from addressvlm.training import trainer
from addressvlm.training.checkpoint import BestAdapter, TrainingCheckpoint, better_adapter
from addressvlm.training.collator import Collator
from addressvlm.training.dataset import MixedRows, RowSource, Schedule, TableRows, count_steps
from addressvlm.training.metrics_logger import MetricsLogger
from addressvlm.training.skipped_rows import LocatableRows, SkippedRows, filtered_rows
from addressvlm.training.strategy import SHARDS_WEIGHTS, Strategy, is_distributed
from addressvlm.training.validation import Validation

Report = Callable[[dict[str, Any], TrainingCheckpoint | None], None]


def build_stages(config: Config, system: SystemConfig) -> list[trainer.Stage]:
    """The system's stages with their data and number of steps, which are those of `train.workers`, however many there are.

    Raises:
        InputError: see `training_rows`; or match_steps_of leaves no step for the last stage.
    """
    stages = []
    for number, name in enumerate(system.stages):
        stage = config.train.stages[name]
        rows = training_rows(config, stage.tables, stage.locatability)
        per_step = stage.batch_size * stage.gradient_accumulation_steps * config.train.workers
        steps = count_steps(len(rows), per_step, stage.epochs, stage.max_steps)
        seed = config.training_seed * 101 + number
        stages.append(trainer.Stage(name, stage, Schedule(rows, per_step, seed, stage.augment), steps, seed))
    if system.match_steps_of and stages:
        model = next(s for s in config.train.systems if s.name == system.match_steps_of)
        whole = sum(s.steps for s in build_stages(config, model))
        stages[-1].steps = remaining_steps(system, whole, sum(s.steps for s in stages[:-1]))
    return stages


def remaining_steps(system: SystemConfig, whole: int, before: int) -> int:
    """Steps of the last stage of a system that shall make `whole` steps and has made `before`.

    Raises:
        InputError: none are left.
    """
    if whole <= before:
        raise InputError(
            f"system '{system.name}' shall make the {whole} steps of '{system.match_steps_of}', but makes {before} before its "
            f"last stage: lower epochs or max_steps of {', '.join(system.stages[:-1]) or 'that system'}, or take out its "
            "match_steps_of."
        )
    return whole - before


def training_runs(config: Config) -> list[tuple[Run, float]]:
    """The runs whose tables are learnt from, and how many epochs of each are in one."""
    names = config.train.cities or {config.name: 1.0}
    return [(Run(config.model_copy(update={"name": name})), weight) for name, weight in names.items()]


def training_rows(config: Config, kinds: Sequence[Data], locatability: float | None = None) -> RowSource:
    """The training rows of some kinds in all cities, of photos with at least such a score if one is given.

    Raises:
        InputError: one of the tables is missing or empty, or its photos have no scores.
    """
    found: list[tuple[RowSource, float]] = []
    for run, weight in training_runs(config):
        for kind in kinds:
            folder: AnyPath = getattr(run, kind)
            rows: RowSource = TableRows(folder, "train") if locatability is None else LocatableRows(run, folder, locatability)
            if not len(rows):
                raise InputError(f"{folder} has no training rows: prepare a city with more places.")
            found.append((rows, weight))
    return found[0][0] if len(found) == 1 and found[0][1] == 1 else MixedRows(found)


def train_system(
    config: Config, name: str, checkpoint: Path | None, report: Report, device: str | torch.device = "cpu"
) -> None:
    """Train from the beginning or from a checkpoint; every worker of the process group calls it.

    Args:
        checkpoint: folder into which an earlier run's snapshot was written.
        report: called by all workers together, by the first with a snapshot, which others may read when it is written.

    Raises:
        InputError: see `trainer.run_stage`.
    """
    run, train, device = Run(config), config.train, torch.device(device)
    system = next(s for s in train.systems if s.name == name)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    stages = build_stages(config, system)
    model, parts, processor, packed = _loaded(config, stages, device)
    validation = Validation(config, processor, alike=_cut(config)) if train.validate_every else None
    resumed = TrainingCheckpoint.read(checkpoint) if checkpoint else None
    best = resumed.best if resumed else None
    if resumed:
        load_adapter_state(model, resumed.adapter)
    first, begun = (resumed.stage, resumed.step) if resumed else (0, 0)
    done, total = sum(s.steps for s in stages[:first]) + begun, sum(s.steps for s in stages)
    rejects = SkippedRows(run.rejects / f"train-{slug(name)}.parquet", resumed=done > 0)
    journal = MetricsLogger(run.training_dir(name), name, done, total, train.loggers, config.name) if rank == 0 else None
    if journal and (told := _beginning(stages, world, done, total)):
        print(f"train: {name}: {told}", flush=True)

    trained: Strategy | None = None
    for number, stage in enumerate(stages[first:], start=first):
        if trained and train.strategy != "ddp" and world > 1:  # what was cut can't be cut again
            adapter = trained.weights()
            if not _cut(config):
                model.to("cpu")  # which makes room for the next
            model, parts, processor, packed = _loaded(config, stages, device)
            load_adapter_state(model, adapter)

        def after(progress: trainer.StepMetrics, strategy: Strategy, number: int = number, model: Any = model) -> None:
            nonlocal best
            if journal:
                journal.note(progress)
            every, last = train.validate_every, progress.step == progress.steps
            if validation and every and (progress.step % every == 0 or last):
                found, now = validation(model), strategy.weights()
                if journal:
                    journal.validated(progress.stage, progress.step, found)
                    best = better_adapter(best, progress.step, found, now) if number == len(stages) - 1 else None
            if progress.step % train.checkpoint_every and not last:
                return
            rejects.write(stages)
            if journal:
                journal.keep()
            held = strategy.weights(), strategy.moments()
            report(progress.as_dict(), TrainingCheckpoint(number, progress.step, *held, best) if rank == 0 else None)

        goes_on = resumed if number == first else None
        collate = Collator(processor, stage.config.isolate_questions, packed, context_length(model.get_base_model()))
        trained = trainer.run_stage(
            model, parts, collate, stage, train.strategy, train.precision, goes_on.step if goes_on else 0,
            goes_on.moments if goes_on else None, after, train.peak_tflops, device, train.checkpoint_activations,
        )  # fmt: skip
    unused = rejects.write(stages)
    assert trained
    adapter = trained.weights()
    if rank == 0:
        if unused:
            print(f"train: {name}: {unused:,} rows were left out: see {rejects.file}", flush=True)
        save_system(config, model, name, adapter, best)


def _cut(config: Config) -> bool:
    """Whether no worker holds all weights."""
    return config.train.strategy in SHARDS_WEIGHTS and is_distributed()


def _beginning(stages: list[trainer.Stage], world: int, done: int, total: int) -> str:
    """What there is to say before the first step."""
    told = [f"going on after step {done} of {total}"] if done else []
    uneven = next((s for s in stages if s.schedule.per_step % world), None)
    if uneven:
        told.append(f"{uneven.schedule.per_step} rows of a step are dealt to {world} workers, so that some have one more")
    for stage in stages:
        if low := filtered_rows(stage.schedule.rows):
            told.append(f"{stage.name} leaves out {len(low):,} photos of a locatability below {stage.config.locatability:g}")
    return "; ".join(told)


def _loaded(config: Config, stages: list[trainer.Stage], device: torch.device) -> tuple[Any, dict[Part, str], Any, bool]:
    """The base with its adapter as it was at the beginning, its parts and processor, and whether rows are to be packed.

    Raises:
        InputError: it can't be loaded, or can't be trained as the stages say.
    """
    base, processor = load_model(config.model.base, config.model.dtype, config.model.trust_remote_code)
    crowded = next((stage.name for stage in stages if stage.config.isolate_questions), None)
    if crowded and not has_1d_positions(base):
        raise InputError(
            f"train.stages.{crowded}.isolate_questions is true, which {config.model.base}'s positions by image row and column do not "
            "allow: set it to false."
        )
    model, parts, packed = attach_adapter(base, config, device)
    return model, parts, processor, packed


def attach_adapter(base: Any, config: Config, device: torch.device) -> tuple[Any, dict[Part, str], bool]:
    """The base with its adapter on a device, laid out for training there; its parts; whether rows are to be packed.

    Raises:
        InputError: the base's parts can't be named, or it can't be packed and shall be.
    """
    packed = enable_packing(base, config.train.packing, device, config.model.base)
    torch.manual_seed(config.training_seed)  # of LoRA's random halves
    model, parts = attach_lora(base, config.model)
    return model if _cut(config) else to_device(model, device), parts, packed


def save_system(config: Config, model: Any, system: str, adapter: dict[str, torch.Tensor], best: BestAdapter | None) -> None:
    """Write `adapter`, `merged` and, if it is another, the `best` adapter, each with its card; put them in place at once.

    Args:
        model: gives the adapter's form; its weights may be cut.
        adapter: the last weights.
    """
    folder = Run(config).model_dir(system)
    with atomic_replace_dir(folder) as partial:
        if best:
            other = "adapter" if config.train.checkpoint_to_merge == "best" else "best"
            _save_adapter(model, best.adapter, partial / other)
            told = f"step {best.step} validated best ({best.metric} {100 * best.value:.1f} %)"
            print(f"train: {system}: {told}: its adapter is {folder / other}", flush=True)
        if not best or config.train.checkpoint_to_merge == "last":
            _save_adapter(model, adapter, partial / "adapter")
        export_merged(partial / "adapter", config.model, partial / "merged")
        merge_gazetteers([Gazetteer.load(run.gazetteer) for run, _ in training_runs(config)]).save(
            partial / "merged" / "gazetteer.geojson"
        )
        write_cards(config, system, partial)


def _save_adapter(model: Any, adapter: dict[str, torch.Tensor], folder: Path) -> None:
    statistics = {name: buffer.contiguous() for name, buffer in model.named_buffers()}
    model.save_pretrained(folder, state_dict={**statistics, **adapter})
