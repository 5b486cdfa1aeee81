"""What a training will take, before it is begun: parameters, tokens, memory, operations, time. Needs no GPU and no weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_layers import GradientCheckpointingLayer

from addressvlm.config import Config
from addressvlm.config_training import Part, StageConfig, SystemConfig
from addressvlm.errors import InputError
from addressvlm.models.base import context_of, local
from addressvlm.models.lora import attach, train_only
from addressvlm.models.parts import part_of
from addressvlm.questions import templates
from addressvlm.training.collate import IGNORE, Collator, Row, Sample, UnusableError, sample_of
from addressvlm.training.outline import Cost, cost_of
from addressvlm.training.rows import Table, steps_of
from addressvlm.training.strategy import CUT
from addressvlm.training.system import steps_left, table_of

LOOKED_AT = 64  # rows of a table whose tokens are counted
GIB = 2**30
ZERO3_LIVE = 1e9  # DeepSpeed's default
SPARE = 1.05  # fragmentation, buffers of the libraries


@dataclass
class StagePlan:
    """One stage on one worker; bytes, operations and steps."""

    name: str
    trained: dict[Part, int]
    rows: int | None  # of an epoch, None if the data is not there yet
    steps: int | None
    tokens: float  # of a mean row
    longest: int
    rows_per_step: int  # of all workers
    flops: float  # of a mean row, both passes
    weights: float
    gradients: float
    optimizer: float
    activations: float  # of one batch
    guessed: bool  # operations and activations of the encoder, by its number of weights

    @property
    def memory(self) -> float:
        """Bytes that a worker needs."""
        return SPARE * (self.weights + self.gradients + self.optimizer + self.activations)

    def seconds(self, peak: float, workers: int, mfu: float) -> float | None:
        """At a share `mfu` of the workers' peak operations a second."""
        return None if self.steps is None else self.steps * self.rows_per_step * self.flops / (mfu * peak * workers)


@dataclass
class Outline:
    """A base model without weights, with its adapter and its processor."""

    model: Any
    parts: dict[Part, str]
    processor: Any
    totals: dict[Part, int]  # parameters of each part of the base


def outline(config: Config) -> Outline:
    """Read the base model's config.json and processor files, and nothing of its weights.

    Raises:
        InputError: they are not in the folder, or not at hand offline.
    """
    where = local(config.model.base)
    options = {"trust_remote_code": config.model.trust_remote_code}
    try:
        described = AutoConfig.from_pretrained(where, **options)
        processor = AutoProcessor.from_pretrained(where, backend="pil", **options)
        with torch.device("meta"):
            base = AutoModelForImageTextToText.from_config(described, dtype=getattr(torch, config.model.dtype), **options)
            model, parts = attach(base, config.model)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise InputError(
            f"a plan for '{config.model.base}' needs its config.json and processor files, not its weights "
            f"({' '.join(str(error).split())[:200]}): fetch those, or unset HF_HUB_OFFLINE."
        ) from error
    totals: dict[Part, int] = dict.fromkeys(parts, 0)
    for name, weights in model.get_base_model().named_parameters():
        if "lora_" not in name and ".modules_to_save." not in name:
            totals[part_of(name, parts) or "llm"] += weights.numel()  # the head, wherever it is, is the language model's
    return Outline(model, parts, processor, totals)


def plan(config: Config, system: SystemConfig, base: Outline, photos: int | None = None, cpu: bool = False) -> list[StagePlan]:
    """The stages of a system.

    Args:
        photos: rows of a table that is not there yet.
        cpu: activations as on a CPU, where plain attention keeps a number for each pair of tokens.
    """
    stages = [_stage(config, name, base, photos, cpu) for name in system.stages]
    if system.equal_steps_to and stages:
        model = next(s for s in config.train.systems if s.name == system.equal_steps_to)
        whole = [_steps(config, name, _table(config, name), photos) for name in model.stages]
        before = [stage.steps for stage in stages[:-1]]
        known = [steps for steps in (*whole, *before) if steps is not None]
        complete = len(known) == len(whole) + len(before)
        stages[-1].steps = steps_left(system, sum(known[: len(whole)]), sum(known[len(whole) :])) if complete else None
    return stages


def _table(config: Config, stage: str) -> Table | None:
    try:
        return table_of(config, config.train.stages[stage].tables, config.train.stages[stage].locatability)
    except InputError:
        return None


def _count(config: Config, stage: str, table: Table | None, photos: int | None) -> int | None:
    """Rows of an epoch, None if nobody knows."""
    return len(table) if table is not None else photos and photos * len(config.train.stages[stage].tables)


def _per_step(config: Config, stage: str) -> int:
    made = config.train.stages[stage]
    return made.batch_size * made.accumulate * config.train.workers


def _steps(config: Config, name: str, table: Table | None, photos: int | None) -> int | None:
    stage, count = config.train.stages[name], _count(config, name, table, photos)
    return steps_of(count, _per_step(config, name), stage.epochs, stage.max_steps) if count else stage.max_steps


def _stage(config: Config, name: str, base: Outline, photos: int | None, cpu: bool) -> StagePlan:
    stage, world = config.train.stages[name], config.train.workers
    table = _table(config, name)
    found = _rows(config, stage, base, table)
    mean = sum(len(row.ids) for row in found) / len(found)
    longest = max(found, key=lambda row: len(row.ids))
    answers = sum(label != IGNORE for row in found for label in row.labels) / len(found)
    train_only(base.model, base.parts, stage.parts)
    twice = config.train.checkpoint_activations
    cost = cost_of(base.model, base.parts, longest.image, len(longest.ids), round(answers), twice)
    trained: dict[Part, int] = dict.fromkeys(base.parts, 0)
    adapter = 0
    for path, parameter in base.model.named_parameters():
        if parameter.requires_grad:
            trained[part_of(path, base.parts) or "llm"] += parameter.numel()
            adapter += parameter.numel()
    shared = world if config.train.strategy != "ddp" else 1  # gradients and optimizer state are cut among workers
    return StagePlan(
        name,
        trained,
        _count(config, name, table, photos),
        _steps(config, name, table, photos),
        mean,
        len(longest.ids),
        _per_step(config, name),
        cost.flops * mean / len(longest.ids),
        _weights(base.model, config.train.strategy, world),
        4.0 * adapter / shared,
        8.0 * adapter / shared,
        stage.batch_size * kept_bytes(cost, config, cpu),
        cost.guessed,
    )


def _weights(model: Any, strategy: str, world: int) -> float:
    """Bytes of weights of a worker: its share where they are cut, and what is put together for computing."""
    whole = _bytes(model)
    if strategy not in CUT or world == 1:
        return whole
    layers = sorted(_bytes(module) for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    # FSDP2 keeps what is in no layer whole during a step, and fetches the next layer while it computes one; DeepSpeed keeps
    # up to `stage3_max_live_parameters`.
    if strategy == "fsdp2":
        return whole / world + whole - sum(layers[:-2])
    return whole / world + min(whole, ZERO3_LIVE * whole / _numbers(model))


def _bytes(module: torch.nn.Module) -> float:
    return float(sum(weights.numel() * weights.itemsize for weights in module.parameters()))


def _numbers(module: torch.nn.Module) -> int:
    return sum(weights.numel() for weights in module.parameters())


def kept_bytes(cost: Cost, config: Config, cpu: bool) -> float:
    """Activations of a row."""
    size = 4 if config.model.dtype == "float32" else 2
    return cost.kept + (cost.pairs * size if cpu else 0.0)


def _rows(config: Config, stage: StageConfig, base: Outline, table: Table | None) -> list[Row]:
    """Encoded rows of the table, or a made-up one where it is not there yet."""
    collate = Collator(base.processor, stage.rounds == "apart", context=context_of(base.model.get_base_model()))
    samples: Sequence[Sample]
    if table is None:
        side = config.tiles.pixels
        asked = templates("street", "choice")[0].format(options="; ".join(["Forbes Avenue"] * 4))
        rounds = config.city.rounds if "photos" in stage.tables else 1
        answer = "Forbes Avenue, Oakland" if "photos" in stage.tables else "Forbes Avenue runs there. " * 12
        image = Image.new("RGB", (side, side))
        tile = image if config.tiles.layout == "two" and "alignment" in stage.tables else None
        return [collate.encode(Sample(image, [(asked, answer)] * rounds, tile=tile))]
    last = int(table.starts[-1])
    found = []
    for index in range(0, last, max(1, last // LOOKED_AT)):
        try:
            samples = [sample_of(table[index])]
            found.append(collate.encode(samples[0]))
        except UnusableError:
            continue
    if not found:
        raise InputError("none of the training rows looked at can be used: look at the photos and prepare the data again.")
    return found
