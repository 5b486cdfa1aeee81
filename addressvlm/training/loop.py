"""One tuning stage, from any step to its end. Under torch.distributed each worker runs it on its share of every step."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel

from addressvlm.config_training import Part, StageConfig
from addressvlm.errors import InputError
from addressvlm.models.lora import keep_statistics, train_only, trainable
from addressvlm.models.parts import part_of
from addressvlm.training import strategy as strategies
from addressvlm.training.collate import Collator, sample_of
from addressvlm.training.rows import Schedule
from addressvlm.training.step import answer_loss, autocast, learning_rate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """What a step left behind."""

    stage: str
    step: int  # steps done, from 1
    steps: int
    loss: float  # mean over the answer tokens of all workers
    learning_rate: float
    gradient_norm: float
    samples_per_s: float
    tokens: int  # answer tokens of the step

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Stage:
    """A stage as it will be run: `name` and `config` from the tree, its data cut into steps."""

    name: str
    config: StageConfig
    schedule: Schedule
    steps: int
    seed: int


def run(
    model: PeftModel,
    parts: dict[Part, str],
    collate: Collator,
    stage: Stage,
    strategy: str,
    precision: str = "float32",
    start: int = 0,
    restore: Callable[[strategies.Strategy], None] | None = None,
    after: Callable[[Progress, strategies.Strategy], None] = lambda progress, strategy: None,
) -> None:
    """Train from step `start` (0 unless resumed) to the stage's last one.

    Args:
        precision: of forward and backward pass, see `train.precision`.
        restore: loads the checkpoint of step `start` into the strategy.
        after: called on every worker after every step.

    Raises:
        InputError: the loss is not finite, a chosen part gets no gradient, or no answer token is left to learn.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, dtype = next(model.parameters()).device, model.get_base_model().dtype
    train_only(model, parts, stage.config.parts)
    model.train()
    keep_statistics(model)
    with autocast(device, dtype, precision):
        _freeze_unused(model, parts, collate, stage)
    spread = strategies.make(strategy, model, stage.config)
    if restore:
        restore(spread)
    for step, batches in _prefetched(collate, stage, start, rank, world):
        began = time.perf_counter()
        torch.manual_seed(_seed(stage, step, rank))
        tokens = torch.tensor([sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)], device=device)
        total = _sum(tokens.clone())
        loss = torch.zeros(1, device=device)
        for number, batch in enumerate(batches):
            with autocast(device, dtype, precision):
                part_loss, _ = answer_loss(spread.module, {k: v.to(device) for k, v in batch.items()})
            # Workers' gradients are averaged, so each multiplies by their number: the mean is over all answer tokens.
            spread.backward(part_loss * (world / total.item()), last=number == len(batches) - 1)
            loss += part_loss.detach()
        rate = learning_rate(step, stage.steps, stage.config.learning_rate, stage.config.warmup)
        norm = spread.step(rate)
        mean = (_sum(loss) / total).item()
        if not mean == mean or mean == float("inf"):
            raise InputError(
                f"{stage.name}: the loss is {mean} at step {step + 1}: lower train.stages.{stage.name}.learning_rate "
                f"({stage.config.learning_rate:g}); the last good checkpoint is kept."
            )
        pace = stage.schedule.per_step / (time.perf_counter() - began)
        after(Progress(stage.name, step + 1, stage.steps, mean, rate, norm, pace, int(total)), spread)


def _seed(stage: Stage, step: int, rank: int) -> int:
    """Of the dropout masks of one worker at one step, so that a resumed run draws the same."""
    return ((stage.seed * 1_000_003 + sum(stage.name.encode())) * 1_000_003 + step) * 1_009 + rank


def _sum(value: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def _batches(collate: Collator, stage: Stage, step: int, rank: int, world: int) -> list[dict[str, torch.Tensor]]:
    rows = [sample_of(stage.schedule.rows[i]) for i in stage.schedule.indices(step, rank, world)]
    size = stage.config.batch_size
    return [collate(rows[at : at + size]) for at in range(0, len(rows), size)]


def _prefetched(
    collate: Collator, stage: Stage, start: int, rank: int, world: int
) -> Iterator[tuple[int, list[dict[str, torch.Tensor]]]]:
    """Batches of every step, the next step's being made while this one is computed."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(_batches, collate, stage, start, rank, world) if start < stage.steps else None
        for step in range(start, stage.steps):
            assert pending is not None
            batches = pending.result()
            if step + 1 < stage.steps:
                pending = pool.submit(_batches, collate, stage, step + 1, rank, world)
            yield step, batches


def _freeze_unused(model: PeftModel, parts: dict[Part, str], collate: Collator, stage: Stage) -> None:
    """Freeze weights that the loss doesn't reach (LLaVA skips the vision encoder's last layer), or DDP waits for them.

    Raises:
        InputError: nothing of a chosen part is reached, or the first row has no answer to learn from.
    """
    batch = collate([sample_of(stage.schedule.rows[0])])
    device = next(model.parameters()).device
    loss, tokens = answer_loss(model, {k: v.to(device) for k, v in batch.items()})
    if not int(tokens):
        raise InputError(f"{stage.name}: no answer token is left to learn from: check the base model's chat template.")
    loss.backward()
    reached: set[Part | None] = set()
    for name, parameter in trainable(model).items():
        if parameter.grad is None:
            parameter.requires_grad = False
        else:
            reached.add(part_of(name.replace(".modules_to_save.default", ""), parts))
        parameter.grad = None
    for part in stage.config.parts:
        if part not in reached:
            raise InputError(
                f"{stage.name}: no gradient reaches the {part} part: take it out of train.stages.{stage.name}.parts, or "
                "check addressvlm/models/parts.py for this model."
            )
