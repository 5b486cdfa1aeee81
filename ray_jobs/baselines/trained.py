"""Systems that are vision-language models of the project (trained ones, variants, likelihoods) or made of others' scores."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from PIL import Image

from addressvlm import InputError
from addressvlm.baselines.fusion import fit_fusion, fuse_scores
from addressvlm.config import Config, load, validate
from addressvlm.config.compare import BlindConfig, FusionConfig, LikelihoodConfig, PriorConfig, VariantConfig
from addressvlm.config.train import SystemConfig
from addressvlm.evaluation.comparison import nearest_training_m
from addressvlm.evaluation.likelihood import COLUMNS, ScoreTables, chunks, restrict_scores, restriction_stats
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE
from addressvlm.models.loading import resolve_model
from addressvlm.storage import tables
from addressvlm.storage.remote_path import path_of
from addressvlm.storage.run_dir import Run, slug
from addressvlm.training.stages import training_runs
from ray_jobs import evaluation, graft, prepare, train
from ray_jobs.baselines.system import ComparisonContext, System, SystemOutcome, model_stats, worker_resources
from ray_jobs.evaluation import TEST, VALIDATION, EvaluationTask, PhotoModel, Row, trained_model

GREY_SIZE = (160, 160)  # pixels; every processor resizes it


class TrainedSystem(System[SystemConfig]):
    """A system of `train.systems`: trained if it is not, then evaluated as `evaluate.answers` says."""

    def run(self, context: ComparisonContext, redo: bool = False) -> SystemOutcome:
        return run_trained(context, self.name, context.config, self.settings, redo)


class VariantSystem(System[VariantConfig]):
    """A system of `train.systems` in a run of its own with other settings, evaluated on the same photos."""

    def run(self, context: ComparisonContext, redo: bool = False) -> SystemOutcome:
        config, name = variant_config(context.config, self.settings), self.settings.system
        system = next((system for system in config.train.systems if system.name == name), None)
        if system is None:
            names = ", ".join(system.name for system in config.train.systems)
            raise InputError(f"compare.variants: '{self.name}' is of {name}: systems of train.systems are {names}.")
        if system.stages:
            require_same_split(context, self.name, config)
        return run_trained(context, self.name, config, system, redo)


class LikelihoodSystem(System[LikelihoodConfig]):
    """A system of `train.systems` that answers by its scores of all addresses, calibrated as the model's folder says."""

    def run(self, context: ComparisonContext, redo: bool = False) -> SystemOutcome:
        start = time.monotonic()
        scores, made = system_scores(context, self.settings.of, redo)
        if made:
            cost = {"seconds": time.monotonic() - start, "photos": sum(map(len, context.ids.values()))}
            context.save_cost(self.name, "answering", {**cost, **worker_resources(context.config)})
        system = next(system for system in context.config.train.systems if system.name == self.settings.of)
        return replace(model_stats(context.config, system), scores=scores)


class BlindSystem(System[BlindConfig]):
    """A system of `train.systems` that sees a grey picture: what it knows of the city without the photo."""

    def run(self, context: ComparisonContext, redo: bool = False) -> SystemOutcome:
        config, task = context.config, context.task
        system = next((system for system in config.train.systems if system.name == self.settings.of), None)
        if system is None:
            names = ", ".join(system.name for system in config.train.systems)
            raise InputError(f"'{self.name}' is of {self.settings.of}: systems of train.systems are {names}.")
        if system.stages:
            train.run_step(config, only=[system.name])
        model = resolve_model(trained_model(config, system))
        need = config.evaluate
        options = {"num_cpus": need.cpus_per_worker, "num_gpus": need.gpus_per_worker}
        seen = ray.get(ray.remote(score_grey).options(**options).remote(PhotoModel(model, context.gazetteer, config)))

        def rows(split: str) -> Iterator[Row]:
            wanted = set(context.ids[split])
            for row in tables.iter_rows(task.data, split, [column for column in COLUMNS if column != "image"]):
                if row["id"] in wanted:
                    yield {**row, "scores": seen}

        settings = {"of": evaluation.model_digest(model)}
        written = evaluation.write_scores(task, self.name, {split: rows(split) for split in context.ids}, settings)
        return replace(model_stats(config, system), scores=written)


def score_grey(model: PhotoModel) -> list[float]:
    """A model's scores of all addresses for a grey picture."""
    return model.address_scores([Image.new("RGB", GREY_SIZE, "grey")])[0].tolist()


class FusionSystem(System[FusionConfig]):
    """Several systems as one, with weights fitted on the split `val`; it costs what they cost together."""

    def run(self, context: ComparisonContext, redo: bool = False) -> SystemOutcome:
        names = self.settings.of
        if VALIDATION not in context.ids:
            raise InputError(
                f"{context.run.photos} has no split {VALIDATION}, on which the weights of '{self.name}' are fitted."
            )
        scores = {name: scores_of(context, name, f"'{self.name}' fuses") for name in names}
        held_out = {name: of_system.photos(VALIDATION, context.gazetteer) for name, of_system in scores.items()}
        weights = fit_fusion({name: photos.scores for name, photos in held_out.items()}, held_out[names[0]].truth)

        def fused(split: str) -> Iterator[Row]:
            for rows in zip(*(scores[name].rows(split) for name in names), strict=True):
                arrays = {name: np.array([row["scores"]]) for name, row in zip(names, rows, strict=True)}
                yield {**rows[0], "scores": fuse_scores(arrays, weights)[0].tolist()}

        written = evaluation.write_scores(
            context.task, self.name, {split: fused(split) for split in context.ids}, {"weights": weights}
        )
        notes = {f"weight of {name}": weight for name, weight in weights.items()}
        return replace(combined_stats(context, names), scores=written, notes=notes)


class PriorSystem(System[PriorConfig]):
    """Another system with prior information about each photo: addresses that it rules out score -inf. Costs are the other's."""

    def run(self, context: ComparisonContext, redo: bool = False) -> SystemOutcome:
        other, seed = self.settings.of, context.config.seed
        scores = scores_of(context, other, f"'{self.name}' is of")
        restricted = {
            split: (
                row
                for chunk in chunks(scores.rows(split))
                for row in restrict_scores(chunk, self.settings, context.gazetteer, seed)
            )
            for split in context.ids
        }
        written = evaluation.write_scores(context.task, self.name, restricted, {"system": self.settings.model_dump()})
        if other in context.outcomes and context.outcomes[other].scores:
            for part, cost in context.costs(other).items():
                context.save_cost(self.name, part, cost)
        notes = restriction_stats(written.rows(TEST), context.gazetteer)
        return replace(combined_stats(context, [other]), scores=written, notes=notes)


def system_scores(context: ComparisonContext, name: str, redo: bool = False) -> tuple[ScoreTables, bool]:
    """The scores of a system of `train.systems`, calibrated if it was trained, and whether they were made now."""
    config, systems = context.config, {system.name: system for system in context.config.train.systems}
    if name not in systems:
        raise InputError(f"compare.systems names {name}: systems of train.systems are {', '.join(systems)}.")
    model = trained_model(config, systems[name])
    made = score_and_ask(context.task, name, model, context.ids, asks=False, redo=redo)
    if not systems[name].stages:
        return context.task.scores(name, context.ids), made
    return evaluation.calibrated_scores(context.task, name, model, context.ids), made


def score_and_ask(
    task: EvaluationTask, name: str, model: str, ids: Mapping[str, Sequence[str]], asks: bool, redo: bool = False
) -> bool:
    """Score photos and, if it `asks`, answer questions with one load of a model; whether anything was made now.

    A trained model that is scored on photos gets its calibration.
    """
    loader, outputs, held_out = PhotoModel(model, task.gazetteer, task.config), [], {}
    if ids:
        if evaluation.model_gazetteer(model, task.gazetteer).addresses != task.gazetteer.addresses:
            raise InputError(
                f"{name} knows other addresses than {task.data / GAZETTEER_FILE}: it can't be scored on them; train it anew."
            )
        trained = (path_of(model) / GAZETTEER_FILE).is_file()
        held_out = evaluation.calibration_photos(task.config, task.data) if trained and not task.images else {}
        outputs += evaluation.scores_of(task, name, loader, {**ids, **held_out})
    if asks:
        outputs.append(evaluation.answers_of(task, name, loader))
    made = evaluation.run_model(f"compare: {name}", task.config, task.image_table, outputs, redo)
    if held_out:
        evaluation.calibrate(task, name, model)
    return made


def run_trained(
    context: ComparisonContext, name: str, config: Config, system: SystemConfig, redo: bool = False
) -> SystemOutcome:
    """Train a system as `config` says, and ask it about the photos of the comparison."""
    run = Run(config)
    if system.stages:
        train.run_step(config, redo, [system.name])
        context.save_cost(name, "training", training_cost(config, system.name))
    model = resolve_model(trained_model(config, system))
    images = graft.graft_photos(config, context.run, TEST, redo)
    task = replace(context.task, config=config, images=images)
    with_image = set(tables.read_table(task.image_table, TEST, ["id"])["id"].to_pylist())
    task = replace(task, ids=[photo for photo in task.ids if photo in with_image])
    missing = len(set(context.task.ids) - with_image)
    outcome = replace(
        model_stats(config, system),
        notes={"photos without a tile": missing} if missing else {},
        model=run.model_dir(system.name) if system.stages and not images else None,
    )

    start, by_likelihood = time.monotonic(), config.evaluate.answers == "likelihood"
    ids = ({TEST: task.ids} if images else context.ids) if by_likelihood else {}
    made = score_and_ask(task, name, model, ids, not by_likelihood, redo)
    if by_likelihood:
        made |= evaluation.likelihood_answers(task, name, model, redo)
        outcome = replace(outcome, scores=evaluation.calibrated_scores(task, name, model, ids))
    if made:
        cost = {"seconds": time.monotonic() - start, "photos": len(task.ids)}
        context.save_cost(name, "answering", {**cost, **worker_resources(config)})
    else:
        print(f"compare: {name}: already answered", flush=True)
    return replace(outcome, answered=True)


def training_cost(config: Config, system: str) -> dict[str, Any]:
    """Cost of the steps of a training, from its loss.jsonl; without the start of the workers."""
    file, settings = Run(config).training_dir(system) / "loss.jsonl", config.train
    seconds, photos = 0.0, 0
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        step = json.loads(line)
        stage = settings.stages[step["stage"]]
        batch = stage.batch_size * stage.gradient_accumulation_steps * settings.workers
        seconds, photos = seconds + batch / step["samples_per_s"], photos + batch
    cpus, gpus = settings.workers * settings.cpus_per_worker, settings.workers * settings.gpus_per_worker
    return {"seconds": seconds, "photos": photos, "cpus": cpus, "gpus": gpus}


def variant_config(config: Config, variant: VariantConfig) -> Config:
    """The configuration of a variant's run, `<name>-<variant>`."""
    tree = config.model_dump()
    if variant.config is not None:
        other = load(variant.config)
        tree |= {section: getattr(other, section).model_dump() for section in ("labels", "model", "train")}
    for key, value in variant.set.items():
        *sections, last = key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[last] = value
    tree["name"] = f"{config.name}-{slug(variant.name)}"
    return validate(tree, f"compare.variants, '{variant.name}'")


def require_same_split(context: ComparisonContext, name: str, config: Config) -> None:
    """Refuse a variant that would be trained on photos near the test photos: of another split, or of the same city twice."""
    buffer_m, columns = config.city.split_buffer_m, ["id", "lat", "lon"]
    test = tables.read_table(context.run.photos, TEST, columns).to_pylist()
    for run, _ in training_runs(config):
        if run.folder.name == config.name:
            prepare.run_step(config)
        distances = nearest_training_m(test, tables.read_table(run.photos, "train", columns).to_pylist())
        if distances and (least := min(distances.values())) < buffer_m - 1e-3:
            raise InputError(
                f"'{name}' would learn from photos of {run.folder.name} that are {least:.0f} m from test photos, less than "
                f"split_buffer_m = {buffer_m:g} m: leave seed and city.split, split_buffer_m and split_block_m as they are "
                "(train.seed draws other weights)."
            )


def scores_of(context: ComparisonContext, name: str, use: str) -> ScoreTables:
    """The scores of a system before this one, or of a system of `train.systems`, of the comparison's photos.

    `use` begins the error sentence, such as `'Fusion' fuses`.
    """
    outcome = context.outcomes.get(name)
    scores = outcome.scores if outcome else None
    if scores is None:
        if name not in {system.name for system in context.config.train.systems}:
            raise InputError(
                f"{use} '{name}', which has no scores: name systems of train.systems, or systems of the kinds likelihood, "
                "retrieval, addressclip, fusion and prior that stand before it and did not fail."
            )
        scores, _ = system_scores(context, name)
    for split, ids in context.ids.items():
        if split not in scores.folders or tables.read_table(scores.folders[split], split, ["id"])["id"].to_pylist() != ids:
            raise InputError(f"{use} '{name}', which was scored on other photos of the split {split}: name another system.")
    return scores


def combined_stats(context: ComparisonContext, names: Iterable[str]) -> SystemOutcome:
    """Trained parameters, stored bytes and licences of some systems together."""
    outcomes = [context.outcomes[name] for name in names if name in context.outcomes]
    return SystemOutcome(
        parameters=sum(outcome.parameters for outcome in outcomes),
        stored_bytes=sum(outcome.stored_bytes for outcome in outcomes),
        licences={part: licence for outcome in outcomes for part, licence in outcome.licences.items()},
    )
