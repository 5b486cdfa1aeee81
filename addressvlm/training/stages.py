"""The stages of a system with their data: the rows and batches of a worker at each step, and the rows that were rejected."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch.distributed as dist

from addressvlm.config import Config
from addressvlm.config.train import Data, StageConfig, SystemConfig
from addressvlm.errors import InputError
from addressvlm.storage import tables
from addressvlm.storage.files import write_parquet
from addressvlm.storage.remote_path import AnyPath
from addressvlm.storage.run_dir import Run
from addressvlm.training.collator import Collator
from addressvlm.training.dataset import LocatableRows, MixedRows, RowSource, Schedule, TableRows, count_steps, low_locatability
from addressvlm.training.loader import StepBatches


@dataclass
class Stage:
    """A tuning stage: its settings, and its data cut into `steps` optimizer steps."""

    name: str
    config: StageConfig
    schedule: Schedule
    steps: int
    seed: int

    def step_batches(self, collator: Collator, step: int, rank: int, world: int) -> StepBatches:
        """The batches of worker `rank` of `world` at a step."""
        return self.encode_step(collator, step, self.schedule.read(step, rank, world), rank, world)

    def encode_step(
        self, collator: Collator, step: int, rows: list[tuple[int, dict[str, Any]]], rank: int, world: int
    ) -> StepBatches:
        """The batches of the worker's rows of a step.

        Every worker has as many, since they wait for each other in each of them. Where the rows of a step do not divide among
        the workers some have one more, which may make a batch one larger.
        """
        schedule, size = self.schedule, self.config.batch_size
        samples = schedule.encode_rows(collator, step, schedule.numbers(rank, world).start, rows)
        if not collator.packed and len(samples) > size:
            samples.sort(key=lambda sample: len(sample.ids))  # rows of like length share a batch, for less padding
        most, fewest = -(-schedule.per_step // world), schedule.per_step // world
        count = min(-(-most // size), fewest)
        cuts = [len(samples) * number // count for number in range(count + 1)]
        batches = [collator.batch(samples[start:stop]) for start, stop in itertools.pairwise(cuts)]
        return StepBatches(batches, sum(len(sample.ids) for sample in samples), dict(schedule.rejected))

    def dropout_seed(self, step: int, rank: int) -> int:
        """The seed of a worker's dropout masks at a step, so that a resumed run draws the same."""
        seed = ((self.seed * 1_000_003 + sum(self.name.encode())) * 1_000_003 + step) * 1_009 + rank
        return seed % 2**63  # PyTorch's limit


def build_stages(config: Config, system: SystemConfig) -> list[Stage]:
    """The system's stages; their number of steps follows from `train.workers`, whatever the number of workers that run.

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
        stages.append(Stage(name, stage, Schedule(rows, per_step, seed, stage.augment), steps, seed))
    if system.match_steps_of and stages:
        reference = next(s for s in config.train.systems if s.name == system.match_steps_of)
        total = sum(s.steps for s in build_stages(config, reference))
        stages[-1].steps = remaining_steps(system, total, sum(s.steps for s in stages[:-1]))
    return stages


def remaining_steps(system: SystemConfig, total: int, before: int) -> int:
    """Steps of the last stage of a system that shall make `total` steps and makes `before` in the stages before it.

    Raises:
        InputError: none are left.
    """
    if total <= before:
        raise InputError(
            f"system '{system.name}' shall make the {total} steps of '{system.match_steps_of}', but makes {before} before its "
            f"last stage: lower epochs or max_steps of {', '.join(system.stages[:-1]) or 'that system'}, or remove its "
            "match_steps_of."
        )
    return total - before


def training_runs(config: Config) -> list[tuple[Run, float]]:
    """The runs whose tables are trained on, and how many epochs of each make one."""
    names = config.train.cities or {config.name: 1.0}
    return [(Run(config.model_copy(update={"name": name})), weight) for name, weight in names.items()]


def training_rows(config: Config, kinds: Sequence[Data], locatability: float | None = None) -> RowSource:
    """The training rows of some tables of all cities; with a threshold only photos of at least that locatability.

    Raises:
        InputError: one of the tables is missing or empty, or its photos have no locatability.
    """
    sources: list[tuple[RowSource, float]] = []
    for run, weight in training_runs(config):
        for kind in kinds:
            folder = getattr(run, kind)
            rows: RowSource = TableRows(folder, "train") if locatability is None else LocatableRows(run, folder, locatability)
            if not len(rows):
                raise InputError(f"{folder} has no training rows: prepare a city with more places.")
            sources.append((rows, weight))
    return sources[0][0] if len(sources) == 1 and sources[0][1] == 1 else MixedRows(sources)


SCHEMA = tables.REJECTS.append(pa.field("stage", pa.string()))


class RejectedRows:
    """The rows rejected in all stages so far and why, one file a system; a resumed run continues it."""

    def __init__(self, file: AnyPath, resumed: bool) -> None:
        self.file = file
        before = tables.read_table_file(file).to_pylist() if resumed and file.is_file() else []
        self.reasons = {(row["stage"], row["id"]): row["reason"] for row in before}

    def write(self, stages: list[Stage]) -> int:
        """Gather the rejected rows of all workers and write them; every worker calls it. Returns their number."""
        mine = {(s.name, row): why for s in stages for row, why in s.schedule.rejected.copy().items()}
        by_worker: list[Any] = [mine]
        if dist.is_initialized():
            by_worker = [None] * dist.get_world_size()
            dist.all_gather_object(by_worker, mine)
        for stage in stages:
            self.reasons |= {(stage.name, row): why for row, why in low_locatability(stage.schedule.rows).items()}
        for reasons in by_worker:
            self.reasons |= reasons
        if not dist.is_initialized() or dist.get_rank() == 0:
            self.file.unlink(missing_ok=True)
            rows = [
                {"file": None, "row": None, "id": row, "reason": why, "stage": stage}
                for (stage, row), why in sorted(self.reasons.items())
            ]
            if rows:
                write_parquet(pa.Table.from_pylist(rows, schema=SCHEMA), self.file)
        return len(self.reasons)
