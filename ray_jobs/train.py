"""The main job: whatever is missing of prepare, and of graft and label if labels are learnt from, then every system's stages.

    ray job submit ray_jobs/train.py
    python ray_jobs/train.py --config my_city.yaml --system AddressVLM
    python ray_jobs/train.py --config demo --evaluate          # and the table and report at the end
    python ray_jobs/train.py --config paper-pitts --dry-run    # what it will take, nothing is begun

A killed run goes on from its last checkpoint when the same command is given again. Writes below <storage>/<name>:
models/<system>/adapter (PEFT), models/<system>/merged (an ordinary Hugging Face folder), training/<system> (checkpoints,
loss.jsonl, TensorBoard).
"""

import sys
from pathlib import Path
from typing import Any

import torch

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.config.train import Data, StageConfig, SystemConfig
from addressvlm.models.loading import resolve_model
from addressvlm.storage import tables
from addressvlm.storage.run_dir import LAST_MODEL_FILE, Run, begin_or_resume, is_done, mark_done
from addressvlm.training.device_stats import peak_flops, total_memory_gib
from addressvlm.training.loss import autocast
from addressvlm.training.memory_estimate import GIB, ModelShape, StageEstimate, estimate_stages, model_shape
from addressvlm.training.skipped_rows import locatability_scored_by
from addressvlm.training.stages import train_system, training_runs
from ray_jobs import graft, label, prepare
from ray_jobs.common import connect, job_parser, load_config, run_main

FORMULA = (
    "memory a worker = 1.05 x (weights as stored + adapter in float32 + 4 bytes of gradient and 8 of AdamW for each trained "
    "parameter + what the forward pass of one batch keeps), of what train.strategy cuts a worker's share"
)


def print_estimate(config: Config, systems: list[SystemConfig], photos: int | None) -> None:
    """Print the plan of systems.

    Args:
        photos: how many photos there will be, where the tables are not written yet.

    Raises:
        InputError: the base model's configuration is not at hand, or a stage needs more memory than a worker has.
    """
    base = model_shape(config)
    train = config.train
    print("parameters: " + ", ".join(f"{part} {count:,}" for part, count in base.totals.items()), flush=True)
    have = train.gpu_memory_gib or total_memory_gib()
    peak = _peak(config)
    for system in systems:
        for stage in estimate_stages(config, system, base, photos, cpu=not train.gpus_per_worker):
            _show(config, system, base, stage, peak)
            if train.gpus_per_worker and have and stage.memory / GIB > have:
                raise InputError(
                    f"{system.name}, {stage.name} needs about {stage.memory / GIB:.1f} GiB a GPU, which has {have:g}: lower "
                    f"batch_size of train.stages.{stage.name} ({config.train.stages[stage.name].batch_size}) and raise "
                    "gradient_accumulation_steps by as much, or set model.dtype to bfloat16, train.checkpoint_activations to true or "
                    "train.strategy to fsdp2."
                )
    print(FORMULA, flush=True)


def _show(config: Config, system: SystemConfig, base: ModelShape, stage: StageEstimate, peak: float | None) -> None:
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


try:
    import torch

    import addressvlm  # noqa: F401
    from ray_jobs.ray_train import CheckpointReporter, require_workers, run_training, run_worker
except ImportError as missing:
    sys.exit(
        f"error: {missing.name} is not installed for {sys.executable}: activate the environment of `make install` "
        "(. .venv/bin/activate) before `ray start` and before this command."
    )


def settings(config: Config, system: SystemConfig) -> dict[str, Any]:
    """What a trained system depends on.

    Raises:
        InputError: it depends on the locatability of photos that have not been scored.
    """
    kept = {"workers", "strategy", "precision", "packing", "cities", "checkpoint_to_merge", "seed"}
    if config.train.checkpoint_to_merge == "best":
        kept |= {"validate_every", "validate_photos"}
    train = config.train.model_dump(include=kept, exclude_none=True)
    stages = {name: _stage(config.train.stages[name]) for name in system.stages}
    equal = next((s for s in config.train.systems if s.name == system.match_steps_of), None)
    others = {name: _stage(config.train.stages[name]) for name in equal.stages} if equal else {}
    choosy = any("locatability" in stage for stage in [*stages.values(), *others.values()])
    kinds = tables_of(config, system)
    reasons = [_reasoning(config)] if "reasoning" in kinds else []
    return {
        **(label if "alignment" in kinds else prepare).settings(config),
        **({"reasoning": label.settings(reasons[0])["labels"]} if reasons else {}),
        **(
            {"locatability": {run.folder.name: locatability_scored_by(run) for run, _ in training_runs(config)}}
            if choosy
            else {}
        ),
        "model": config.model.model_dump(),
        "train": {**train, "system": system.model_dump(), "stages": stages, "equal_to": others},
    }


def _stage(stage: StageConfig) -> dict[str, Any]:
    """Its settings; what is not set was no setting when runs of earlier versions finished."""
    later = {"locatability", "augment"}
    return stage.model_dump(exclude=later) | stage.model_dump(include=later, exclude_defaults=True)


def tables_of(config: Config, system: SystemConfig) -> set[Data]:
    """What a system learns from, and what its number of steps depends on."""
    with_steps = [s for s in config.train.systems if s.name in (system.name, system.match_steps_of)]
    return {kind for s in with_steps for stage in s.stages for kind in config.train.stages[stage].tables}


def chosen(config: Config, only: list[str] | None) -> list[SystemConfig]:
    """The systems to train, in the order of the configuration.

    Raises:
        InputError: one of the names is not that of a system with stages.
    """
    wanted = [s for s in config.train.systems if s.stages and (not only or s.name in only)]
    if only and len(wanted) != len(only):
        names = ", ".join(s.name for s in config.train.systems if s.stages)
        raise InputError(f"--system {', '.join(only)}: systems that can be trained are {names}.")
    return wanted


def _make_data(config: Config, redo: bool, kinds: set[Data]) -> None:
    """Whatever is missing of the run's own tables; those of other cities are made by their own configurations.

    Raises:
        InputError: another city's table is missing.
    """
    for run, _ in training_runs(config):
        if run.folder.name == config.name:
            continue
        for kind in sorted(kinds):
            if not tables.count_rows(getattr(run, kind), "train"):
                raise InputError(
                    f"train.cities names {run.folder.name}, which has no {kind} in {run.folder}: run ray_jobs/prepare.py, "
                    "graft.py and label.py with its own configuration first."
                )
    if config.name not in (config.train.cities or {config.name: 1.0}):
        return
    prepare.run_step(config, redo)
    if "alignment" in kinds:
        graft.run_step(config, redo)
        label.run_step(config, redo)
    if "reasoning" in kinds:
        label.run_step(_reasoning(config), redo)


def _reasoning(config: Config) -> Config:
    """The same run whose labels are reasons read off the photo alone."""
    return config.model_copy(update={"labels": config.labels.model_copy(update={"prompt": "reasoning"})})


def run_step(config: Config, redo: bool = False, only: list[str] | None = None) -> None:
    """Train the systems that are missing, in the order of the configuration.

    Raises:
        InputError: a setting or the data can't be trained with, or the cluster has fewer CPUs or GPUs than asked for.
    """
    run = Run(config)
    resolve_model(config.model.base)
    wanted = chosen(config, only)
    missing = [s for s in wanted if not is_done(run.model_dir(s.name), settings(config, s), redo)]
    if missing:
        _make_data(config, redo, {kind for system in missing for kind in tables_of(config, system)})
    for system in wanted:
        if system in missing:
            _train(config, system, redo)
        else:
            print(f"train: {system.name}: already done", flush=True)
    if wanted:
        last = next((s for s in wanted if s.name == "AddressVLM"), wanted[-1])
        (run.folder.parent / LAST_MODEL_FILE).write_text(f"{run.model_dir(last.name) / 'merged'}\n")


def _train(config: Config, system: SystemConfig, redo: bool) -> None:
    """Train a system, or go on where it stopped."""
    run, made_from = Run(config), settings(config, system)
    require_workers(config, system.name, config.train.min_workers)
    begin_or_resume(run.training_dir(system.name), made_from, redo)
    run_training(config, system.name, train_worker, {"system": system.name}, config.train.min_workers)
    mark_done(run.model_dir(system.name), made_from)
    print(f"train: {system.name}: saved in {run.model_dir(system.name)}", flush=True)


def train_worker(given: dict[str, Any]) -> None:
    """What each worker of the group runs."""

    def work(config: Config, checkpoint: Path | None, device: torch.device) -> None:
        train_system(config, given["system"], checkpoint, CheckpointReporter(), device)

    run_worker(given, work)


def main() -> None:
    """Command line."""
    parser = job_parser(__doc__ or "")
    parser.add_argument("--system", action="append", metavar="NAME", help="train only this system (may be repeated)")
    parser.add_argument("--evaluate", action="store_true", help="then answer the test questions and write table and report")
    parser.add_argument(
        "--dry-run", action="store_true", help="only print parameters, memory, steps and time, and what can't fit"
    )
    parser.add_argument("--photos", type=int, metavar="N", help="with --dry-run: how many there will be, if none are prepared")
    args = parser.parse_args()
    config = load_config(args)
    if args.dry_run:
        print_estimate(config, chosen(config, args.system), args.photos)
        return
    connect()
    run_step(config, args.redo, args.system)
    if args.evaluate:
        from ray_jobs import evaluate

        evaluate.run_step(config, args.redo, only=args.system)


if __name__ == "__main__":
    run_main(main)
