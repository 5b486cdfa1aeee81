"""Accuracy against the density of photos, with and without stage 1, from the answers of `demo-alignment`.

    python ray_jobs/compare.py --config demo-alignment
    python -m addressvlm.tools.alignment_curves runs/demo-alignment --out docs/alignment.png

Prints a table and draws a curve for each system: A_ds on blocks without any photo, mean over seeds. Intervals (95 %) resample
places and seeds together; differences to stage 2 alone are of the same places and seeds.
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from addressvlm.errors import InputError
from addressvlm.evaluation.metrics import TAIL
from addressvlm.storage import tables
from addressvlm.storage.run_dir import slug

VARIANT = re.compile(r"(?P<system>.+), (?P<share>\d+)% of blocks, seed (?P<seed>\d+)")
BASELINE = "stage 2 only"
RESAMPLES = 2000


def read_answers(run: Path, names: list[str]) -> dict[tuple[str, int], dict[int, dict[str, tuple[int, int]]]]:
    """(system, percent of blocks) -> seed -> place -> right and all answers to the question for the whole address.

    Names without a density are those of all blocks and seed 0.

    Raises:
        InputError: none of them has answers.
    """
    found: dict[tuple[str, int], dict[int, dict[str, tuple[int, int]]]] = defaultdict(dict)
    for name in names:
        match = VARIANT.fullmatch(name)
        system, share, seed = (match["system"], int(match["share"]), int(match["seed"])) if match else (name, 100, 0)
        counts: dict[str, tuple[int, int]] = {}
        for row in tables.iter_rows(run / "answers" / slug(name), "test", ["place", "level", "correct"]):
            if row["level"] == "address":
                right, total = counts.get(row["place"], (0, 0))
                counts[row["place"]] = (right + bool(row["correct"]), total + 1)
        if counts:
            found[system, share][seed] = counts
    if not found:
        raise InputError(f"{run}/answers has no answers of these systems: run ray_jobs/compare.py first.")
    return dict(found)


def curves(answers: dict[tuple[str, int], dict[int, dict[str, tuple[int, int]]]], seed: int = 0) -> list[dict[str, Any]]:
    """A row for each system and density: `value`, `low`, `high`, and the same of its difference to the baseline, `against`.

    Only places and seeds that the system and the baseline share are compared.
    """
    rows = []
    for (system, share), by_seed in sorted(answers.items(), key=lambda item: (item[0][1], item[0][0])):
        row = {"system": system, "share": share, "seeds": len(by_seed), **_interval([by_seed], seed)}
        baseline = answers.get((BASELINE, share))
        row["against"] = _interval([by_seed, baseline], seed) if baseline and system != BASELINE else None
        rows.append(row)
    return rows


def _interval(systems: list[dict[int, dict[str, tuple[int, int]]]], seed: int) -> dict[str, float]:
    """A share, or the difference of two, with its interval."""
    seeds = sorted(set.intersection(*(set(system) for system in systems)))
    places = sorted(set.intersection(*(set(system[s]) for system in systems for s in seeds))) if seeds else []
    if not places:
        return {"value": float("nan"), "low": float("nan"), "high": float("nan")}
    counts = np.array([[[system[s][place] for place in places] for s in seeds] for system in systems], float)  # S, seeds, P, 2
    rng = np.random.default_rng(seed)
    by_seed = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=RESAMPLES)
    by_place = rng.multinomial(len(places), np.full(len(places), 1 / len(places)), size=RESAMPLES)
    drawn = np.einsum("sepk,re,rp->rsk", counts, by_seed, by_place)
    whole = counts.sum((1, 2))
    shares, samples = whole[:, 0] / whole[:, 1], drawn[..., 0] / drawn[..., 1]
    sign = np.array([1, -1])[: len(systems)]
    low, high = np.percentile(samples @ sign, [100 * TAIL, 100 * (1 - TAIL)])
    return {"value": float(shares @ sign), "low": float(low), "high": float(high)}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, percent and points."""
    lines = ["| blocks photographed | system | seeds | A_ds | minus stage 2 only |", "|---:|---|---:|---:|---:|"]
    for row in rows:
        cells = [f"{100 * row['value']:.1f} ({100 * row['low']:.0f}–{100 * row['high']:.0f})", ""]
        if row["against"]:
            value, low, high = (100 * row["against"][end] for end in ("value", "low", "high"))
            cells[1] = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(f"| {row['share']} % | {row['system']} | {row['seeds']} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """A curve with intervals for each system that has several densities."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for number, system in enumerate(sorted({row["system"] for row in rows})):
        points = [row for row in rows if row["system"] == system]
        if len(points) > 1:
            x = np.array([row["share"] for row in points]) + number - 1  # side by side, so that intervals can be told apart
            y, low, high = (100 * np.array([row[end] for row in points]) for end in ("value", "low", "high"))
            axis.errorbar(x, y, [np.maximum(y - low, 0), np.maximum(high - y, 0)], fmt="o-", capsize=3, label=system)
    axis.set_xlabel("blocks photographed, percent")
    axis.set_ylabel("A_ds on other blocks, percent")
    axis.set_ylim(0)
    axis.legend(fontsize=8)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the comparison's run")
    parser.add_argument("--config", default="demo-alignment", help="its preset or YAML file (default: demo-alignment)")
    parser.add_argument("--out", type=Path, help="picture to write")
    args = parser.parse_args(argv)
    from addressvlm.config import load

    try:
        config = load(args.config)
        names = [s.name for s in [*config.train.systems, *config.compare.systems, *config.compare.variants]]
        done = [name for name in names if (args.run / "answers" / slug(name)).is_dir()]
        rows = curves(read_answers(args.run, done))
    except InputError as error:
        sys.exit(f"error: {error}")
    print(table(rows))
    if args.out:
        draw(rows, args.out)


if __name__ == "__main__":
    main()
