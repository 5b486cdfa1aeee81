"""What Ray adds to a step: the same training under torchrun without Ray and under Ray Train, in turn.

    python ray_jobs/label.py --config demo
    python benchmarks/ray_share.py --config demo

Printed is the median time of a whole step, and the mean share of it that is waited, by what for; starting and saving are not in
it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

from addressvlm.config import Config, load
from addressvlm.storage.run_dir import Run, storage_dir
from addressvlm.training.trainer import train_system

ROOT = Path(__file__).parents[1]
SYSTEM = "stage 2 only"
WARM = 5  # steps that are not counted


def settings(args: argparse.Namespace, name: str) -> list[str]:
    """A run of its own that learns from the tables of the given one."""
    config = load(args.config, args.sets)
    return [
        *args.sets,
        f"name={name}",
        f"storage={storage_dir(config.storage)}",
        f"train.cities={{{config.name}: 1}}",
        "train.checkpoint_every=100000",
        f"train.workers={args.workers}",
        f"train.stages.localization.max_steps={args.steps}",
    ]


def seconds(config: Config) -> tuple[float, dict[str, float]]:
    """Median time of a step, and the mean share of each wait."""
    lines = (Run(config).training_dir(SYSTEM) / "loss.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines[WARM:]]
    waits = {what: statistics.mean(step["waits"][what] for step in steps) for what in steps[0]["waits"]}
    return statistics.median(step["seconds"] for step in steps), waits


def without_ray(args: argparse.Namespace, sets: list[str]) -> None:
    """Run this file under torchrun."""
    flags = [word for assignment in sets for word in ("--set", assignment)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.workers}", __file__]
    subprocess.run([*command, "--worker", "--config", args.config, *flags], cwd=ROOT, check=True, env=environment())


def with_ray(args: argparse.Namespace, sets: list[str]) -> None:
    """Run the job."""
    flags = [word for assignment in sets for word in ("--set", assignment)]
    command = [sys.executable, "ray_jobs/train.py", "--config", args.config, "--redo", "--system", SYSTEM, *flags]
    subprocess.run(command, cwd=ROOT, check=True, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def worker(config: Config) -> None:
    """What torchrun starts."""
    dist.init_process_group("gloo")
    train_system(config, SYSTEM, None, lambda metrics, folder: None)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="demo", help="a run whose tables are made")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(load(args.config, args.sets))
        return
    ratios = []
    for number in range(args.rounds):
        took, waits = {}, {}
        for way, run in (("torchrun", without_ray), ("ray", with_ray)):
            sets = settings(args, f"share-{way}-{number}")
            run(args, sets)
            took[way], waits[way] = seconds(load(args.config, sets))
        ratios.append(took["ray"] / took["torchrun"])
        waited = "; ".join(
            f"{way} waits {', '.join(f'{what} {100 * share:.1f} %' for what, share in shares.items())}"
            for way, shares in waits.items()
        )
        print(
            f"round {number}: torchrun {took['torchrun']:.4f} s a step, Ray {took['ray']:.4f}, ratio {ratios[-1]:.3f}; "
            f"{waited}",
            flush=True,
        )
    print(f"Ray adds {100 * (statistics.median(ratios) - 1):+.1f} % to a step")


if __name__ == "__main__":
    main()
