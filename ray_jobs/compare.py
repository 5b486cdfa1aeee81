#!/usr/bin/env python
"""Compare all systems on the same photos: a table with confidence intervals, tests and costs, and an HTML report.

    ray job submit -- python ray_jobs/compare.py --config demo-compare
    python ray_jobs/compare.py --config my_city.yaml --system AddressVLM --system AddressCLIP
    python ray_jobs/compare.py --config demo-ablation

Systems are those of `train.systems`, trained if they are not yet, then `compare.systems` and `compare.variants`. Rerun it to
resume; a system that fails says why in the table, and the others go on. Writes below <storage>/<name>:
comparison/comparison.json, .md, .csv and report.html, answers/<system>, scores/<system>/<split>, costs/<system>.json, and
cards/<system>/README.md for systems without a model folder. Cards of models get their metrics.
"""

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.config.compare import AddressClipConfig
from addressvlm.evaluation import comparison
from addressvlm.evaluation.comparison import Answers, StoredAnswers
from addressvlm.evaluation.likelihood import ScoreTables
from addressvlm.evaluation.metrics import compute_metrics
from addressvlm.evaluation.report import ReportSources, main_system, write_report
from addressvlm.evaluation.result_tables import comparison_text, write_comparison
from addressvlm.evaluation.system_cards import system_card
from addressvlm.gazetteer.gazetteer import Address
from addressvlm.models.cards import set_metrics
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run, fresh_dir, slug
from ray_jobs import evaluation, prepare
from ray_jobs.baselines import SystemSettings, load_system, system_settings
from ray_jobs.baselines.system import ComparisonContext, SystemOutcome
from ray_jobs.common import connect, job_parser, load_config, require_evaluation_workers, run_main
from ray_jobs.evaluation import TEST, VALIDATION
from ray_jobs.progress import display


@dataclass
class SystemResult:
    """One system of the comparison: its judged answers and the rest of its outcome, or why there are none."""

    kind: str
    settings: SystemSettings
    outcome: SystemOutcome = field(default_factory=SystemOutcome)
    answers: StoredAnswers | None = None
    failed: str = ""


def run_step(config: Config, redo: bool = False, only: Sequence[str] = ()) -> dict[str, Any]:
    """Run every system, or those named, then write table and report; returns what comparison.json holds.

    Raises:
        InputError: a name is unknown or stands for two systems, the cluster is too small, or the city can't be prepared.
    """
    check_names(config, only)
    require_evaluation_workers(config, "compare")
    run = Run(config)
    prepare.run_step(config)
    task = evaluation.open_task(config, run.photos, TEST, run.folder)
    ids = {TEST: task.ids}
    if held_out := evaluation.calibration_photos(config, run.photos):
        ids[VALIDATION] = held_out[VALIDATION]
    context = ComparisonContext(run, task, ids)
    results = []
    for kind, settings in system_settings(config):
        if not only or settings.name in only:
            print(f"compare: {settings.name}", flush=True)
            results.append(run_system(context, kind, settings, redo))
            context.outcomes[settings.name] = results[-1].outcome
    return report(context, results)


def check_names(config: Config, only: Sequence[str]) -> None:
    """Refuse systems that would share a folder or need photos and would see grafts, and flags that name no system."""
    if config.evaluate.images == "grafts" and config.compare.systems:
        raise InputError("evaluate.images is grafts, but compare.systems need photos: set it in compare.variants instead.")
    names = [settings.name for _, settings in system_settings(config)]
    slugs = [slug(name) for name in names]
    if same := [name for name, folder in zip(names, slugs, strict=True) if slugs.count(folder) > 1]:
        raise InputError(f"systems {' and '.join(same[:2])} would share a folder: give each of train and compare another name.")
    if unknown := [name for name in only if name not in names]:
        raise InputError(f"--system {unknown[0]}: systems are {', '.join(names)}.")


def run_system(context: ComparisonContext, kind: str, settings: SystemSettings, redo: bool) -> SystemResult:
    """Run one system; an error is its result and stops no other system.

    Scores from which its answers follow are stored in <run>/scores/<system>, wherever they were made.
    """
    task, name = context.task, settings.name
    try:
        outcome = load_system(kind, settings).run(context, redo)
        if not outcome.answered and outcome.scores is not None:
            scores, stored = outcome.scores, task.scores(name, outcome.scores.folders)
            depends_on = {"system": settings.model_dump()}
            if scores != stored:
                evaluation.write_scores(task, name, {split: scores.rows(split) for split in scores.folders}, depends_on)
            evaluation.answers_by_scores(task, name, stored, context.gazetteer, depends_on)
        return SystemResult(kind, settings, outcome, task.answers(name))
    except InputError as error:
        failed = str(error)
    except Exception as error:
        traceback.print_exc()
        failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(f"compare: {settings.name} failed: {failed}", file=sys.stderr, flush=True)
    return SystemResult(kind, settings, failed=failed)


def report(context: ComparisonContext, results: Sequence[SystemResult]) -> dict[str, Any]:
    """Write all files of the comparison and print the table; returns what comparison.json holds."""
    config, run, task = context.config, context.run, context.task
    answers = {result.settings.name: result.answers for result in results if result.answers is not None}
    main = config.compare.main if config.compare.main in answers else (main_system(list(answers)) if answers else "")
    columns = ["id", "lat", "lon", "street", "main_street", "district"]
    training, test = (tables.read_table(run.photos, split, columns).to_pylist() for split in ("train", TEST))
    distances = comparison.nearest_training_m(test, training)
    main_streets = {row["street"]: row["main_street"] for row in [*training, *test]}
    addresses = {Address(row["street"], row["district"]) for row in training}
    counted = display.count("compare: statistics", results, len(results), "systems")
    entries = [system_entry(context, result, answers.get(main, []), addresses, distances, main_streets) for result in counted]
    tree = {
        "city": context.gazetteer.city or config.city.name, "split": TEST, "main": main, "photos": len(task.ids),
        "validation_photos": len(context.ids.get(VALIDATION, [])), "systems": entries,
    }  # fmt: skip
    out = task.out / "comparison"
    with fresh_dir(out, {"systems": [result.settings.name for result in results]}) as folder:
        write_comparison(folder, tree)
        if answers:
            answered = {**tree, "systems": [entry for entry in entries if entry["name"] in answers]}
            sources = ReportSources(run.photos, run.alignment, run.training, run.rejects)
            bootstrap = (config.seed, config.evaluate.bootstrap)
            write_report(folder / "report.html", answered, answers, context.gazetteer, sources, *bootstrap, comparison=tree)
    print(f"\n{comparison_text(tree)}\n\n{out}", flush=True)
    for result, entry in zip(results, entries, strict=True):
        write_card(context, result, entry)
    return tree


def system_entry(
    context: ComparisonContext, result: SystemResult, main: Answers, trained_addresses: set[Address],
    distances_m: dict[str, float], main_streets: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """What comparison.json holds of a system.

    Args:
        main: judged answers of the main system.
        trained_addresses: those that training photos show.
        distances_m: photo -> metres to the nearest training photo.
        main_streets: name in the answers -> the whole street.
    """
    bootstrap, city, outcome = (context.config.evaluate.bootstrap, context.config.seed), context.gazetteer, result.outcome
    entry: dict[str, Any] = {"name": result.settings.name, "kind": result.kind, "failed": result.failed}
    if result.failed or result.answers is None:
        return entry
    scores = outcome.scores or ScoreTables({})
    return {
        **entry,
        "metrics": compute_metrics(result.answers, *bootstrap),
        "top": comparison.top_k_accuracy(scores.rows(TEST), city, *bootstrap, main_streets),
        "by_training": comparison.by_training(result.answers, trained_addresses, *bootstrap),
        "by_distance": comparison.by_distance(result.answers, distances_m, *bootstrap),
        "against": comparison.paired_difference(main, result.answers, *bootstrap) if result.answers is not main else None,
        "trust": comparison.confidence_accuracy(list(scores.rows(VALIDATION)), scores.rows(TEST), city),
        "neighbours": comparison.neighbours(result.answers, city),
        "within": accuracy_within(context, outcome, bootstrap),
        "cost": {**context.costs(result.settings.name), "parameters": outcome.parameters, "stored_bytes": outcome.stored_bytes},
        "licences": outcome.licences,
        "notes": outcome.notes,
    }


def accuracy_within(context: ComparisonContext, outcome: SystemOutcome, bootstrap: tuple[int, int]) -> dict[str, Any]:
    """Share of the photos whose coordinates are within some radii of the true ones; nothing without coordinates."""
    if not outcome.coordinates:
        return {}
    from addressvlm.baselines.retrieval import share_within

    ids = set(context.task.ids)
    photos = tables.read_table(context.run.photos, TEST, ["id", "place", "lat", "lon"]).to_pylist()
    return share_within([photo for photo in photos if photo["id"] in ids], outcome.coordinates, *bootstrap)


def write_card(context: ComparisonContext, result: SystemResult, entry: dict[str, Any]) -> None:
    """Write the metrics into the cards of the system's model, or if it has none, a card below <run>/cards."""
    if "metrics" not in entry:
        return
    config, settings = context.config, result.settings
    count = entry["metrics"]["A_ds"]["n"]
    photos = f"{count:,} photos of the split {TEST} of {context.gazetteer.city or config.name}"
    if result.outcome.model:
        set_metrics(result.outcome.model, entry["metrics"], photos)
    elif result.kind not in ("generated", "variant") and not isinstance(settings, AddressClipConfig):
        with fresh_dir(context.run.folder / "cards" / slug(result.settings.name), {"system": settings.model_dump()}) as folder:
            (folder / "README.md").write_text(system_card(config, settings, entry, photos), encoding="utf-8")


def main() -> None:
    parser = job_parser(__doc__ or "")
    parser.add_argument("--system", action="append", default=[], metavar="NAME", help="run only this system (may be repeated)")
    args = parser.parse_args()
    config = load_config(args)
    connect()
    run_step(config, args.redo, args.system)


if __name__ == "__main__":
    run_main(main)
