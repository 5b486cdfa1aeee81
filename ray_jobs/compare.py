#!/usr/bin/env python
"""Every system on the same photos -> one table with intervals, tests and costs, and a report to look at.

    ray job submit -- python ray_jobs/compare.py --config demo-compare
    python ray_jobs/compare.py --config my_city.yaml --row AddressVLM --row AddressCLIP
    python ray_jobs/compare.py --config demo-ablation

Rows are the systems of `train.systems`, trained if they are not, then those of `compare.systems` and `compare.variants`. What
is done is not done again; a row that fails says why in the table, and the others go on. Writes below <storage>/<name>:
comparison.json, .md, .csv and .html, answers/<row> and scores/<row>, costs/<row>.json, cards/<row>/README.md of rows without a
model folder. Cards of models get their metrics.
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from addressvlm import InputError
from addressvlm.config import Config, load, validate
from addressvlm.config.compare import AddressClipConfig, AnyBaseline, VariantConfig
from addressvlm.evaluation import comparison, metrics, report, run_questions, system_cards
from addressvlm.evaluation.likelihood import answers_from_scores as answers_by_scores
from addressvlm.evaluation.parsing import Judge
from addressvlm.evaluation.run_questions import judge_answers
from addressvlm.gazetteer.gazetteer import Address
from addressvlm.models.cards import set_metrics
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run, fresh_dir, slug
from addressvlm.training.stages import training_runs
from ray_jobs import evaluation, prepare
from ray_jobs.baselines import combined, trained
from ray_jobs.baselines.context import TEST, ComparisonContext, Row, SystemOutcome
from ray_jobs.baselines.trained import TrainedSystem
from ray_jobs.common import connect, job_parser, load_config, require_resources, run_main
from ray_jobs.evaluation import EvaluationTask


@dataclass
class SystemResult:
    """A row: what it made of the photos, or why it could not."""

    name: str
    kind: str
    outcome: SystemOutcome = field(default_factory=SystemOutcome)
    answers: list[Row] = field(default_factory=list)
    failed: str = ""


def runner(kind: str) -> Callable[..., SystemOutcome]:
    """What makes a row of a kind of `compare.systems`; its libraries are loaded only where it is wanted."""
    if kind == "retrieval":
        from ray_jobs.baselines import retrieval

        return retrieval.run
    if kind == "rag":
        from ray_jobs.baselines import rag

        return rag.run
    if kind == "addressclip":
        from ray_jobs.baselines import addressclip

        return addressclip.run
    return {"likelihood": trained.run_likelihood, "fusion": combined.run_fusion, "prior": combined.run_prior}[kind]


def run_step(config: Config, redo: bool = False, only: Sequence[str] = ()) -> dict[str, Any]:
    """Make every row, then the table and the report; returns what comparison.json holds.

    Raises:
        InputError: a name is not that of a row or stands for two, the cluster is too small, or the city can't be prepared.
    """
    _check(config, only)
    need, run = config.evaluate, Run(config)
    require_resources("CPU", need.workers * need.cpus_per_worker, "compare", "evaluate.workers or evaluate.cpus_per_worker")
    prepare.run_step(config)
    task = EvaluationTask(
        {}, run.photos, TEST, run.folder, report.ReportSources(run.photos, run.alignment, run.training, run.rejects)
    )
    judge, gazetteer = evaluation.make_judge(task, {})
    ids = {TEST: evaluation.choose_photos(config, task)}
    if held := evaluation.calibration_photos(config, run.photos):
        ids[evaluation.VALIDATION] = held[evaluation.VALIDATION]
    work = ComparisonContext(config, run, ids, gazetteer, run.folder / "costs")
    rows: list[SystemResult] = []
    for name, kind, make in _plan(config, work, task, judge, redo):
        if only and name not in only:
            continue
        print(f"compare: {name}", flush=True)
        rows.append(_attempt(name, kind, make))
        work.outcomes[name] = rows[-1].outcome
    return _write(config, work, task, rows)


def _check(config: Config, only: Sequence[str]) -> None:
    if config.evaluate.images == "grafts" and config.compare.systems:
        raise InputError(
            "evaluate.images is grafts, but rows of compare.systems see photos: set it in compare.variants instead."
        )
    names = [row.name for row in [*config.train.systems, *config.compare.systems, *config.compare.variants]]
    slugs = [slug(name) for name in names]
    if twice := [name for name, of in zip(names, slugs, strict=True) if slugs.count(of) > 1]:
        raise InputError(f"rows {' and '.join(twice[:2])} would share a folder: give each of train and compare another name.")
    if unknown := [name for name in only if name not in names]:
        raise InputError(f"--row {unknown[0]}: rows are {', '.join(names)}.")


def _plan(
    config: Config, work: ComparisonContext, task: EvaluationTask, judge: Judge, redo: bool
) -> list[tuple[str, str, Callable[[], SystemResult]]]:
    """Name, kind and maker of each row, in the order of the table."""
    plan: list[tuple[str, str, Callable[[], SystemResult]]] = []
    for system in config.train.systems:
        of = TrainedSystem(system.name, config, system)
        plan.append((system.name, "generated", partial(_own, work, of, task, judge, redo)))
    for rival in config.compare.systems:
        plan.append((rival.name, rival.kind, partial(_rival, work, rival, task, judge, redo)))
    for variant in config.compare.variants:
        plan.append((variant.name, "variant", partial(_variant, work, variant, task, judge, redo)))
    return plan


def _attempt(name: str, kind: str, make: Callable[[], SystemResult]) -> SystemResult:
    """The row, or why there is none; only what a person asks for stops the others."""
    try:
        return make()
    except InputError as error:
        failed = str(error)
    except Exception as error:
        traceback.print_exc()
        failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(f"compare: {name} failed: {failed}", file=sys.stderr, flush=True)
    return SystemResult(name, kind, failed=failed)


def _own(work: ComparisonContext, of: TrainedSystem, task: EvaluationTask, judge: Judge, redo: bool) -> SystemResult:
    return SystemResult(of.name, "generated", *trained.run_trained(work, of, task, judge, redo))


def _variant(work: ComparisonContext, variant: VariantConfig, task: EvaluationTask, judge: Judge, redo: bool) -> SystemResult:
    """The same system of a run of its own with other settings, asked about the same photos."""
    config = changed(work.config, variant)
    system = next((s for s in config.train.systems if s.name == variant.system), None)
    if system is None:
        known = ", ".join(s.name for s in config.train.systems)
        raise InputError(f"compare.variants: '{variant.name}' is of {variant.system}: systems of train.systems are {known}.")
    if system.stages:
        keep_apart(work, variant.name, config)
    return SystemResult(
        variant.name, "variant", *trained.run_trained(work, TrainedSystem(variant.name, config, system), task, judge, redo)
    )


def keep_apart(work: ComparisonContext, name: str, config: Config) -> None:
    """Make sure that a variant learns from no photo near those that all rows are asked about.

    Raises:
        InputError: its settings draw another split, or the other city is this one.
    """
    guard, columns = config.city.split_buffer_m, ["id", "lat", "lon"]
    asked = tables.read_table(work.run.photos, TEST, columns).to_pylist()
    for run, _ in training_runs(config):
        if run.folder.name == config.name:
            prepare.run_step(config)
        near = comparison.nearest_training_m(asked, tables.read_table(run.photos, "train", columns).to_pylist())
        if near and (least := min(near.values())) < guard - 1e-3:
            raise InputError(
                f"'{name}' would learn from photos of {run.folder.name} that are {least:.0f} m from test photos, less than the "
                f"guard of {guard:g} m: leave seed and city.split, split_buffer_m and split_block_m as they are (train.seed draws other "
                "weights)."
            )


def changed(config: Config, variant: VariantConfig) -> Config:
    """The configuration of a variant's run, `<name>-<variant>`.

    Raises:
        InputError: there is no such configuration, a key is unknown or a value has the wrong type.
    """
    tree = config.model_dump()
    if variant.config is not None:
        other = load(variant.config)
        tree |= {"labels": other.labels.model_dump(), "model": other.model.model_dump(), "train": other.train.model_dump()}
    for key, value in variant.set.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    tree["name"] = f"{config.name}-{slug(variant.name)}"
    return validate(tree, f"compare.variants, '{variant.name}'")


def _rival(work: ComparisonContext, rival: AnyBaseline, task: EvaluationTask, judge: Judge, redo: bool) -> SystemResult:
    outcome = runner(rival.kind)(work, rival, redo)
    found = outcome.answers
    if outcome.scores:
        columns = [column for column in run_questions.COLUMNS if column != "image"]
        photos = {row["id"]: row for row in tables.iter_rows(task.data, TEST, columns)}
        found = list(answers_by_scores(outcome.scores[TEST], photos, work.gazetteer))
        with fresh_dir(task.out / "scores" / slug(rival.name), {"row": rival.model_dump()}) as folder:
            for split, rows in outcome.scores.items():
                tables.write_table(folder, split, rows, tables.SCORES)
    answers = judge_answers(found, judge)
    with fresh_dir(task.out / "answers" / slug(rival.name), {"row": rival.model_dump()}) as folder:
        tables.write_table(folder, TEST, answers, tables.ANSWERS)
    return SystemResult(rival.name, rival.kind, outcome, answers)


def _write(config: Config, work: ComparisonContext, task: EvaluationTask, rows: Sequence[SystemResult]) -> dict[str, Any]:
    """All files of the comparison; prints the table."""
    made = [row for row in rows if not row.failed and row.answers]
    names = [row.name for row in made]
    main = config.compare.main if config.compare.main in names else (report.main_system(names) if names else "")
    columns = ["id", "lat", "lon", "street", "district"]
    learnt = tables.read_table(work.run.photos, "train", columns).to_pylist()
    distances = comparison.nearest_training_m(tables.read_table(work.run.photos, TEST, columns).to_pylist(), learnt)
    known = {Address(row["street"], row["district"]) for row in learnt}
    of_main = next((row.answers for row in made if row.name == main), [])
    told = [_told(config, work, row, of_main, known, distances) for row in rows]
    tree = {
        "city": work.gazetteer.city or config.city.name, "split": TEST, "main": main, "photos": len(work.ids[TEST]),
        "validation_photos": len(work.ids.get(evaluation.VALIDATION, [])), "systems": told,
    }  # fmt: skip
    answers = {row.name: row.answers for row in made}
    scored = {**tree, "systems": [row for row in told if row["name"] in answers]}
    out = task.out / "comparison"
    with fresh_dir(out, {"rows": [row.name for row in rows]}) as folder:
        comparison.write_comparison(folder, tree)
        if made:
            named = (config.seed, config.evaluate.bootstrap)
            report.write_report(folder / "report.html", scored, answers, work.gazetteer, task.sources, *named, comparison=tree)
    print(f"\n{comparison.comparison_text(tree)}\n\n{out}", flush=True)
    for row, of_row in zip(rows, told, strict=True):
        leave_card(config, work, row, of_row)
    return tree


def leave_card(config: Config, work: ComparisonContext, row: SystemResult, told: dict[str, Any]) -> None:
    """Write what was measured into the cards of the row's model, or if it has none, a card below <run>/cards."""
    if "metrics" not in told:
        return
    photos = f"{len({answer['id'] for answer in row.answers}):,} photos of the split {TEST} of "
    photos += work.gazetteer.city or config.name
    rival = next((rival for rival in config.compare.systems if rival.name == row.name), None)
    if row.outcome.model:
        set_metrics(row.outcome.model, told["metrics"], photos)
    elif rival and not isinstance(rival, AddressClipConfig):
        with fresh_dir(work.run.folder / "cards" / slug(row.name), {"row": rival.model_dump()}) as folder:
            (folder / "README.md").write_text(system_cards.system_card(config, rival, told, photos), encoding="utf-8")


def _told(
    config: Config,
    work: ComparisonContext,
    row: SystemResult,
    of_main: Sequence[Row],
    learnt: set[Address],
    distances: dict[str, float],
) -> dict[str, Any]:
    """What the table and the report say of a row."""
    drawn, city, of = (config.evaluate.bootstrap, config.seed), work.gazetteer, row.outcome
    told: dict[str, Any] = {"name": row.name, "kind": row.kind, "failed": row.failed}
    if row.failed or not row.answers:
        return told
    return {
        **told,
        "metrics": metrics.compute_metrics(row.answers, *drawn),
        "top": comparison.top_k_accuracy(of.scores.get(TEST, []), city, *drawn),
        "by_training": comparison.by_training(row.answers, learnt, *drawn),
        "by_distance": comparison.by_distance(row.answers, distances, *drawn),
        "against": comparison.paired_difference(of_main, row.answers, *drawn) if row.answers is not of_main else None,
        "trust": comparison.confidence_accuracy(of.scores.get(evaluation.VALIDATION, []), of.scores.get(TEST, []), city),
        "neighbours": comparison.neighbours(row.answers, city),
        "within": _within(work, of, drawn),
        "cost": {**work.noted(row.name), "parameters": of.parameters, "stored_bytes": of.stored_bytes},
        "licences": of.licences,
        "notes": of.notes,
    }


def _within(work: ComparisonContext, outcome: SystemOutcome, drawn: tuple[int, int]) -> dict[str, Any]:
    if not outcome.coordinates:
        return {}
    from addressvlm.baselines.retrieval import share_within

    photos = tables.read_table(work.run.photos, TEST, ["id", "place", "lat", "lon"]).to_pylist()
    return share_within([photo for photo in photos if photo["id"] in set(work.ids[TEST])], outcome.coordinates, *drawn)


def main() -> None:
    """Command line."""
    parser = job_parser(__doc__ or "")
    parser.add_argument("--row", action="append", default=[], metavar="NAME", help="only this row (may be repeated)")
    args = parser.parse_args()
    config = load_config(args)
    connect()
    run_step(config, args.redo, args.row)


if __name__ == "__main__":
    run_main(main)
