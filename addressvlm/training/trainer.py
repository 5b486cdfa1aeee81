"""One tuning stage, from any step to its end. Under torch.distributed each worker runs it on its share of every step."""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel

from addressvlm.config.train import Part, StageConfig
from addressvlm.errors import InputError
from addressvlm.models.lora import freeze_batchnorm, set_trainable_parts
from addressvlm.training import strategy as strategies
from addressvlm.training.activation_checkpointing import checkpoint_activations
from addressvlm.training.collator import IGNORE_INDEX, KINDS, Collator
from addressvlm.training.dataset import Schedule
from addressvlm.training.device_stats import memory_gib, peak_flops
from addressvlm.training.loss import autocast, learning_rate, token_losses
from addressvlm.training.strategy import OptimizerState, Strategy
from addressvlm.training.unused_parameters import probe_first_row


@dataclass(frozen=True)
class StepMetrics:
    """What a step left behind."""

    stage: str
    step: int  # steps done, from 1
    steps: int
    loss: float  # mean over the answer tokens of all workers
    learning_rate: float
    gradient_norm: float
    samples_per_s: float
    tokens: int  # answer tokens of the step
    tokens_per_s: float  # all tokens, padding aside
    mfu: float | None  # share of the workers' peak, None if that is not known
    memory_gib: float  # most that this worker had at a time
    by_kind: dict[str, float] = field(default_factory=dict)  # loss by kind of question
    rejected: int = 0  # rows that this worker could not use, since the stage began

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


@dataclass
class StepBatches:
    """A worker's share of a step: its batches and their tokens, padding aside."""

    batches: list[dict[str, torch.Tensor]]
    tokens: int


def run_stage(
    model: PeftModel,
    parts: dict[Part, str],
    collate: Collator,
    stage: Stage,
    strategy: str,
    precision: str = "float32",
    start: int = 0,
    moments: OptimizerState | None = None,
    after: Callable[[StepMetrics, Strategy], None] = lambda progress, strategy: None,
    peak_tflops: float | None = None,
    device: torch.device | None = None,
    recompute: bool = False,
) -> Strategy:
    """Train from step `start` (0 unless resumed) to the stage's last one.

    Args:
        model: with the weights of step `start`.
        precision: of forward and backward pass, see `train.precision`.
        moments: the optimizer's at step `start`, if the stage is resumed.
        after: called on every worker after every step.
        peak_tflops: of a worker; by default known by the GPU's name.
        device: where to train; by default where the model is.
        recompute: whether activations are computed twice, see `train.checkpoint_activations`.

    Returns:
        What holds the trained weights.

    Raises:
        InputError: the loss is not finite, a chosen part gets no gradient, or no row can be used.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, dtype = device or next(model.parameters()).device, model.get_base_model().dtype
    set_trainable_parts(model, parts, stage.config.parts)
    model.train()
    freeze_batchnorm(model)
    checkpoint_activations(model, recompute)

    def look() -> int:
        with autocast(next(model.parameters()).device, dtype, precision):
            return probe_first_row(model, parts, collate, stage)

    context = autocast(device, dtype, precision)
    peak = peak_flops(device, context.fast_dtype if context._enabled else torch.float32, peak_tflops)
    spread = strategies.make_strategy(strategy, model, stage.config, look, device, context._enabled)
    if moments is not None:
        spread.restore(moments)
    for number, step in _prefetched(collate, stage, start, rank, world):
        began = time.perf_counter()
        torch.manual_seed(_seed(stage, number, rank))
        answers = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in step.batches)
        total, tokens = _sum(torch.tensor([answers, step.tokens], device=device)).tolist()
        sums = torch.zeros(2, len(KINDS) + 1, device=device)  # loss and tokens of each kind
        for at, batch in enumerate(step.batches):
            with autocast(device, dtype, precision):
                losses = token_losses(spread.module, {k: v.to(device) for k, v in batch.items()})
            # Workers' gradients are averaged, so each multiplies by their number: the mean is over all answer tokens.
            spread.backward(losses.sum() * (world / total), last=at == len(step.batches) - 1)
            asked = batch["asked"][:, 1:][batch["labels"][:, 1:] != IGNORE_INDEX].to(device)
            sums.index_add_(1, asked, torch.stack([losses.detach(), torch.ones_like(losses)]))
        rate = learning_rate(number, stage.steps, stage.config.learning_rate, stage.config.warmup_ratio)
        norm = spread.step(rate)
        loss, counted = _sum(sums).tolist()
        mean = sum(loss) / total
        if not (mean - mean == 0 and norm - norm == 0):  # neither is infinite or not a number
            raise InputError(
                f"{stage.name}: the loss is {mean} and the gradient's norm {norm} at step {number + 1}: lower "
                f"train.stages.{stage.name}.learning_rate ({stage.config.learning_rate:g}); the last good checkpoint is kept."
            )
        took = time.perf_counter() - began
        pace = stage.schedule.per_step / took
        kinds = {kind: a / b for kind, a, b in zip((*KINDS, "other"), loss, counted, strict=True) if b}
        mfu = pace * spread.flops / (peak * world) if peak else None
        seen = (tokens / took, mfu, memory_gib(device), kinds, len(stage.schedule.rejected))
        after(StepMetrics(stage.name, number + 1, stage.steps, mean, rate, norm, pace, total, *seen), spread)
    return spread


def _seed(stage: Stage, step: int, rank: int) -> int:
    """Of the dropout masks of one worker at one step, so that a resumed run draws the same."""
    whole = ((stage.seed * 1_000_003 + sum(stage.name.encode())) * 1_000_003 + step) * 1_009 + rank
    return whole % 2**63  # what PyTorch takes


def _sum(value: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def _step(collate: Collator, stage: Stage, number: int, rank: int, world: int) -> StepBatches:
    rows = stage.schedule.encoded(collate, number, rank, world)
    size = stage.config.batch_size
    if not collate.packed and len(rows) > size:  # rows of a batch are padded to the longest: let them be alike
        rows.sort(key=lambda row: len(row.ids))
    cuts = [len(rows) * at // _batches(stage, world) for at in range(_batches(stage, world) + 1)]
    batches = [collate.batch(rows[start:stop]) for start, stop in itertools.pairwise(cuts)]
    return StepBatches(batches, sum(len(row.ids) for row in rows))


def _batches(stage: Stage, world: int) -> int:
    """Batches of a step, as many on every worker, which wait for each other in each of them.

    Where the rows of a step do not divide among the workers some have one more, which may make a batch one larger.
    """
    most, fewest = -(-stage.schedule.per_step // world), stage.schedule.per_step // world
    return min(-(-most // stage.config.batch_size), fewest)


def _prefetched(collate: Collator, stage: Stage, start: int, rank: int, world: int) -> Iterator[tuple[int, StepBatches]]:
    """Every step's number and batches, the next step's being made while this one is computed."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(_step, collate, stage, start, rank, world) if start < stage.steps else None
        for number in range(start, stage.steps):
            assert pending is not None
            step = pending.result()
            if number + 1 < stage.steps:
                pending = pool.submit(_step, collate, stage, number + 1, rank, world)
            yield number, step
