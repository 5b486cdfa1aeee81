"""`train.py --dry-run`: what the training will take, and whether it fits; nothing is begun and no weights are read."""

import torch

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.config_training import SystemConfig
from addressvlm.training.hardware import peak_flops, total_memory_gib
from addressvlm.training.plan import GIB, Outline, StagePlan, outline, plan
from addressvlm.training.step import autocast

FORMULA = (
    "memory a worker = 1.05 x (weights as stored + adapter in float32 + 4 bytes of gradient and 8 of AdamW for each trained "
    "parameter + what the forward pass of one batch keeps), of what train.strategy cuts a worker's share"
)


def show(config: Config, systems: list[SystemConfig], photos: int | None) -> None:
    """Print the plan of systems.

    Args:
        photos: how many photos there will be, where the tables are not written yet.

    Raises:
        InputError: the base model's configuration is not at hand, or a stage needs more memory than a worker has.
    """
    base = outline(config)
    train = config.train
    print("parameters: " + ", ".join(f"{part} {count:,}" for part, count in base.totals.items()), flush=True)
    have = train.gpu_memory_gib or total_memory_gib()
    peak = _peak(config)
    for system in systems:
        for stage in plan(config, system, base, photos, cpu=not train.gpus_per_worker):
            _show(config, system, base, stage, peak)
            if train.gpus_per_worker and have and stage.memory / GIB > have:
                raise InputError(
                    f"{system.name}, {stage.name} needs about {stage.memory / GIB:.1f} GiB a GPU, which has {have:g}: lower "
                    f"batch_size of train.stages.{stage.name} ({config.train.stages[stage.name].batch_size}) and raise "
                    "accumulate by as much, or set model.dtype to bfloat16, train.checkpoint_activations to true or "
                    "train.strategy to fsdp2."
                )
    print(FORMULA, flush=True)


def _show(config: Config, system: SystemConfig, base: Outline, stage: StagePlan, peak: float | None) -> None:
    learns = ", ".join(f"{part} {stage.trained[part]:,}" for part in base.parts if stage.trained[part])
    steps = "unknown (give --photos)" if stage.steps is None else f"{stage.steps:,}"
    lines = [
        f"{system.name}: {stage.name}",
        f"  trained: {learns} ({100 * sum(stage.trained.values()) / sum(base.totals.values()):.2f} % of the base)",
        f"  a row: {stage.tokens:.0f} tokens (longest {stage.longest:,}), {stage.flops / 1e12:.3f} TFLOP for both passes",
        f"  a step: {stage.rows_per_step:,} rows, {stage.rows_per_step * stage.tokens:,.0f} tokens; steps: {steps}",
        f"  memory a worker: {stage.memory / GIB:.2f} GiB: weights {stage.weights / GIB:.2f}, gradients "
        f"{stage.gradients / GIB:.2f}, optimizer {stage.optimizer / GIB:.2f}, activations {stage.activations / GIB:.2f}",
    ]
    if stage.guessed:
        lines.append("  the encoder's share of operations and activations is a guess by its number of weights")
    workers = config.train.workers
    if stage.steps is not None:
        lines.append(f"  operations: {stage.steps * stage.rows_per_step * stage.flops / 1e15:,.2f} PFLOP")
    if peak and (seconds := stage.seconds(peak, workers, config.train.mfu)):
        share = f"{100 * config.train.mfu:.0f} % of {peak / 1e12:g} TFLOP/s"
        lines.append(f"  time: {seconds / 3600:.2f} h on {workers} workers at {share} each")
    elif stage.steps is not None:
        lines.append("  time: unknown, set train.peak_tflops to what a worker can do")
    print("\n".join(lines), flush=True)


def _peak(config: Config) -> float | None:
    """Of a worker, at the precision that it will multiply in."""
    device = torch.device("cuda" if config.train.gpus_per_worker and torch.cuda.is_available() else "cpu")
    context = autocast(device, getattr(torch, config.model.dtype), config.train.precision)
    return peak_flops(device, context.fast_dtype if context._enabled else torch.float32, config.train.peak_tflops)
