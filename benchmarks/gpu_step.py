"""A training step at full size on a GPU, in under ten minutes: samples/s, MFU with its FLOPs, waits, memory; ours beside TRL.

    python benchmarks/gpu_step.py /data/full                           # writes the base there first, 8 GB, if it is missing
    python benchmarks/gpu_step.py /tmp/small --shrink 16 --steps 2 --rows 2     # to try it on a CPU

Stage 2 as in paper-pitts (all three parts, LoRA 128 and 64, seven questions a photo apart from each other), bfloat16, photos of
640 x 480 as JPEG on disk. Each way is timed after its first steps (compiling is among them); one that fails is reported and the
next one tried. TRL runs if it is installed (`pip install trl`), with one conversation a photo as it has no questions apart.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from full_size import config_of, write_base, write_tables
from training import DEVICE, Bench

from addressvlm.config import Config
from addressvlm.models import load_model
from addressvlm.storage.run_dir import Run
from addressvlm.training.dataset import Schedule
from addressvlm.training.metrics_logger import WAITS, StepMetrics
from addressvlm.training.stages import Stage, training_rows
from addressvlm.training.trainer import Trainer, attach_adapter

WARM = 4  # steps that are not counted
WAYS: dict[str, dict[str, Any]] = {  # settings of `train`, and of the stage
    "padded": {"packing": "off"},
    "packed (flex attention)": {"packing": "on"},
    "packed, compiled": {"packing": "on", "compile": True},
    "packed, activations recomputed": {"packing": "on", "checkpoint_activations": True},
}


class Log:
    """Collects the metrics of every step."""

    def __init__(self) -> None:
        self.steps: list[StepMetrics] = []

    def log_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def sync(self) -> None:
        """There is no storage."""


def measure(config: Config, way: str, rows: int, steps: int, processes: int) -> str:
    """One way's line of the table."""
    settings = config.train.model_copy(
        update={"strategy": "ddp", "precision": "bfloat16", "loader_processes": processes, "checkpoint_activations": False}
        | WAYS[way]
    )
    stage = config.train.stages["localization"].model_copy(
        update={"batch_size": rows, "gradient_accumulation_steps": 1, "isolate_questions": True}
    )
    whole = config.model_copy(update={"train": settings})
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = attach_adapter(*load_model(config.model.base, config.model.dtype), whole, DEVICE)
    table = training_rows(config, stage.tables)
    trainer = Trainer(settings, [Stage("stage 2", stage, Schedule(table, rows, 0), WARM + steps, 0)], lambda: model, DEVICE)
    log = Log()
    trainer.logger = log  # type: ignore[assignment]
    trainer.fit()
    assert trainer.strategy
    flops, timed = trainer.strategy.flops, log.steps[WARM:]
    seconds = sum(step.seconds for step in timed)
    waits = ", ".join(
        f"{what} {100 * sum(step.waits[what] * step.seconds for step in timed) / seconds:.1f} %" for what in WAITS[:3]
    )
    mfu = "-" if timed[0].mfu is None else f"{100 * statistics.mean(step.mfu or 0.0 for step in timed):.1f} %"
    trainer.release()
    return (
        f"| {way} | {rows * len(timed) / seconds:.2f} | {flops / 1e12:.2f} | {mfu} | {waits} | "
        f"{max(step.memory_gib for step in timed):.1f} | {timed[-1].loss:.3f} |"
    )


def trl(config: Config, rows: int, steps: int) -> str:
    """TRL's line: the clock of its steps, with its own loading of rows."""
    clock = Bench(config, "localization", WARM + steps, rows, frozen=False).trl(0)
    seconds = statistics.median(clock.seconds[WARM:])
    return f"| TRL | {rows / seconds:.2f} | | | | {clock.memory:.1f} | {clock.losses[-1]:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shrink", type=int, default=1, help="divide layers and widths")
    parser.add_argument("--rows", type=int, default=16, help="photos a step")
    parser.add_argument("--steps", type=int, default=12, help="that are timed, of each way")
    parser.add_argument("--processes", type=int, default=8, help="that encode rows")
    parser.add_argument("--minutes", type=float, default=9.0, help="no further way is begun after so long")
    args = parser.parse_args()
    began, folder = time.monotonic(), args.folder.absolute()
    if not (folder / "base" / "config.json").is_file():
        print(f"base: {write_base(folder / 'base', args.shrink):,} parameters", flush=True)
    config = config_of(folder, args.steps)
    if not Run(config).photos.is_dir():
        write_tables(config, 64)
    print("| way | samples/s | TFLOP a row | MFU | waits | GiB | loss |\n|---|---:|---:|---:|---|---:|---:|", flush=True)
    for way in [*WAYS, "TRL"]:
        if time.monotonic() - began > 60 * args.minutes:
            print(f"| {way} | no time left | | | | | |")
            continue
        try:
            sizes = args.rows, args.steps
            line = trl(config, *sizes) if way == "TRL" else measure(config, way, *sizes, args.processes)
        except Exception as error:  # the other ways are still worth the time of the machine
            line = f"| {way} | {type(error).__name__}: {' '.join(str(error).split())[:160]} | | | | | |"
        print(line, flush=True)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
