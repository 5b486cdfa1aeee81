"""The steps of an evaluation on Ray, in their order: score and ask in one pass, calibrate, report.

evaluate.py and compare.py are recipes over these steps. A model is loaded once a worker for all tables that it makes of a task;
they are written shard by shard, and a step whose result is on disk reads it. Scores are read piece by piece: photos times
addresses never lie in memory. Below the steps: drawing photos, and digests of models and files.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from addressvlm import InputError
from addressvlm.answers import calibration
from addressvlm.answers.calibration import CALIBRATION_FILE, Calibration
from addressvlm.config import Config
from addressvlm.config.compare import EvaluateConfig
from addressvlm.config.train import SystemConfig
from addressvlm.evaluation import likelihood, metrics, run_questions
from addressvlm.evaluation.answer_picture import draw_answers, examples_of
from addressvlm.evaluation.comparison import StoredAnswers
from addressvlm.evaluation.likelihood import ScoreTables, answers_from_scores
from addressvlm.evaluation.parsing import Judge
from addressvlm.evaluation.report import ReportSources, write_report
from addressvlm.evaluation.result_tables import decoding_table, metrics_table
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE, Gazetteer
from addressvlm.storage import tables
from addressvlm.storage.files import digest, local_model_copy, open_parquet
from addressvlm.storage.remote_path import AnyPath, RemotePath, path_of
from addressvlm.storage.run_dir import Run, fresh_dir, is_done, resumable_dir, slug
from addressvlm.storage.shards import Rows, Shard, ShardResult, ShardWork, sources_fingerprint
from ray_jobs.progress import display
from ray_jobs.ray_data import ShardJob, run_on_actors

TRAINING, VALIDATION, TEST = "train", "val", "test"
PHOTO_COLUMNS = [column for column in run_questions.COLUMNS if column != "image"]
SCORED_PHOTOS = 16  # that go through the model together
MAX_SHARD = tables.ROWS_PER_GROUP  # photos; an interruption loses at most so many for each worker

Row = dict[str, Any]


@dataclass(frozen=True)
class EvaluationTask:
    """The photos that systems are evaluated on, and where results go.

    Attributes:
        config: `evaluate` says how a model answers.
        data: folder of the photos table.
        split: the split that is judged.
        out: folder of the results.
        ids: photos of the split to ask about, in the order of the table.
        gazetteer: the data's; empty if it has none.
        judge: knows the names of the data and of every model's city.
        images: folder of the same table with other images, which models see instead of the photos.
    """

    config: Config
    data: AnyPath
    split: str
    out: AnyPath
    ids: list[str]
    gazetteer: Gazetteer
    judge: Judge
    images: AnyPath | None = None

    @property
    def image_table(self) -> AnyPath:
        """The table whose images models see."""
        return self.images or self.data

    def scores(self, name: str, splits: Iterable[str]) -> ScoreTables:
        """Where the scores of a system are."""
        return ScoreTables({split: self.out / "scores" / slug(name) / split for split in splits})

    def answers(self, name: str) -> StoredAnswers:
        """Where the answers of a system are."""
        return StoredAnswers(self.out / "answers" / slug(name), self.split)


def open_task(
    config: Config, data: AnyPath, split: str, out: AnyPath, models: Iterable[str] = (), images: AnyPath | None = None
) -> EvaluationTask:
    """Draw the photos to ask about and make the judge; `models`: folders whose gazetteers it knows too."""
    tables.table_files(data, split)
    ids = draw_photos(images or data, split, config.evaluate.max_photos, config.seed)
    if not ids:
        raise InputError(f"{images or data} has no photos in its split {split}: give another --data or --split.")
    judge, gazetteer = make_judge(data, split, models)
    return EvaluationTask(config, data, split, out, ids, gazetteer, judge, images)


class PhotoModel:
    """A vision-language model that a worker loads with its first photos and keeps.

    The tables of one pass share it. It is not loaded in a constructor, so that an InputError reaches the job as one.
    """

    def __init__(self, model: str, city: Gazetteer, config: Config) -> None:
        """`city`: the gazetteer of a model whose folder has none."""
        self.model, self.city, self.config = model, city, config

    @cached_property
    def loaded(self) -> Any:
        """What `load` returns, loaded once."""
        import torch
        from transformers.utils.logging import disable_progress_bar

        torch.set_num_threads(max(1, int(self.config.evaluate.cpus_per_worker)))
        disable_progress_bar()
        return self.load()

    def load(self) -> Any:
        """The model of the folder."""
        from addressvlm.inference import Localizer

        settings = self.config.model
        localizer = Localizer(self.model, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code, memory_mb=0)
        localizer.gazetteer = localizer.gazetteer or self.city
        return localizer

    def address_scores(self, images: Sequence[Image.Image]) -> np.ndarray:
        """ln p of all addresses up to a constant, float64 (images, addresses)."""
        scores: np.ndarray = self.loaded.address_scores(images)
        return scores

    def __getstate__(self) -> Row:
        """Without what is loaded: every worker loads its own."""
        return {key: value for key, value in self.__dict__.items() if key != "loaded"}


@dataclass(frozen=True)
class ModelOutput:
    """A table that a model makes of some photos.

    Attributes:
        folder: of the table.
        settings: what it depends on.
        split: of the photos, and of the table.
        ids: the photos, in the order of the photos table.
        work: what is done with the rows of the photos table.
    """

    folder: AnyPath
    settings: Row
    split: str
    ids: Sequence[str]
    work: ShardWork


def scores_of(task: EvaluationTask, name: str, model: PhotoModel, ids: Mapping[str, Sequence[str]]) -> list[ModelOutput]:
    """The score that a model gives every address for each photo, a table for each split; `ids`: split -> photos.

    Raises:
        InputError: there is no gazetteer that names the addresses.
    """
    gazetteer = model_gazetteer(model.model, task.gazetteer)
    if ids and not gazetteer.addresses:
        raise InputError(
            f"neither {model.model} nor {task.image_table} holds a {GAZETTEER_FILE}: addresses can't be scored without "
            "their names."
        )
    depends_on = {
        "model": model_digest(model.model),
        "addresses": addresses_digest(gazetteer),
        "dtype": task.config.model.dtype,
        "seed": task.config.seed,
    }
    outputs = []
    for split, photos in ids.items():
        images = files_digest(tables.table_files(task.image_table, split))
        work = ShardWork(partial(score_photos, model, split), tables.SCORES, likelihood.COLUMNS)
        folder = task.scores(name, [split]).folders[split]
        outputs.append(ModelOutput(folder, {**depends_on, "images": images, "photos": len(photos)}, split, photos, work))
    return outputs


def answers_of(task: EvaluationTask, name: str, model: PhotoModel, kinds: Sequence[str] = run_questions.KINDS) -> ModelOutput:
    """A model's own answers, free or constrained, to the questions of some kinds."""
    config = task.config
    function = partial(answer_questions, model, task.split, config.evaluate, config.seed, tuple(kinds), task.judge)
    work = ShardWork(function, tables.ANSWERS, run_questions.COLUMNS)
    return ModelOutput(task.answers(name).folder, answer_settings(task, model.model, kinds), task.split, task.ids, work)


def answer_settings(task: EvaluationTask, model: str, kinds: Sequence[str]) -> Row:
    """What answers depend on."""
    keys = {"answers", "max_new_tokens", "temperature", "max_photos", *({"images"} if task.images else ())}
    return {
        "evaluate": task.config.evaluate.model_dump(include=keys),
        "seed": task.config.seed,
        "dtype": task.config.model.dtype,
        "split": task.split,
        "data": files_digest(tables.table_files(task.image_table, task.split)),
        "model": model_digest(model),
        "addresses": addresses_digest(model_gazetteer(model, task.gazetteer)),
        "kinds": list(kinds),
    }


def score_photos(model: PhotoModel, split: str, photos: Rows) -> ShardResult:
    """Rows of PHOTOS -> rows of SCORES."""
    batches = likelihood.score_photos(model.address_scores, photos, SCORED_PHOTOS)
    return ShardResult({split: [row for batch in batches for row in batch]})


def answer_questions(
    model: PhotoModel, split: str, settings: EvaluateConfig, seed: int, kinds: Sequence[str], judge: Judge, photos: Rows
) -> ShardResult:
    """Rows of PHOTOS -> judged rows of ANSWERS."""
    answers: dict[str, list[Row]] = {photo["id"]: [] for photo in photos}
    for batch in run_questions.run_questions(model.loaded, photos, settings, seed, kinds):
        for row in run_questions.judge_answers(batch, judge):
            answers[row["id"]].append(row)
    return ShardResult({split: [row for rows in answers.values() for row in run_questions.in_order(rows)]})


def run_model(step: str, config: Config, photos: AnyPath, outputs: Sequence[ModelOutput], redo: bool = False) -> bool:
    """Make the tables that are not there yet, with one model in each of `evaluate.workers` workers; False if all are there.

    Args:
        photos: folder of the photos table.

    Raises:
        InputError: a table was made with other settings, or the model can't be used.
    """
    missing = [output for output in outputs if not is_done(output.folder, output.settings, redo)]
    if not missing:
        return False
    need, jobs = config.evaluate, []
    with ExitStack() as folders:
        for output in missing:
            folder = folders.enter_context(resumable_dir(output.folder, output.settings, redo))
            size = max(1, min(MAX_SHARD, -(-len(output.ids) // need.workers)))
            shards = plan_photos(tables.table_files(photos, output.split), output.ids, size)
            jobs.append(ShardJob(list(shards), folder, output.work))
        # a photo that is scored and asked about is in two tables
        unit = f"photos in {len(jobs)} tables" if len(jobs) > 1 else "photos"
        run_on_actors(step, jobs, need.workers, {"num_cpus": need.cpus_per_worker, "num_gpus": need.gpus_per_worker}, unit)
    return True


def plan_photos(files: Sequence[AnyPath], ids: Iterable[str], size: int) -> Iterator[Shard]:
    """Shards of up to `size` of these photos, each of one row group; workers read the photos themselves."""
    wanted, number = set(ids), 0
    for file in files:
        with open_parquet(file) as table:
            for group in range(table.num_row_groups):
                group_ids = table.read_row_group(group, columns=["id"])["id"].to_pylist()
                picked = [index for index, photo in enumerate(group_ids) if photo in wanted]
                for start in range(0, len(picked), size):
                    some = tuple(picked[start : start + size])
                    yield Shard(number, len(some), ((str(file), group, group + 1),), some)
                    number += 1


def calibrate(task: EvaluationTask, name: str, model: str) -> Calibration:
    """Fit a model's calibration to its scores of the photos of `calibration_photos`, and save it in the model's folder."""
    gazetteer, scores = model_gazetteer(model, task.gazetteer), task.scores(name, (VALIDATION, TRAINING))
    validation, training = (scores.photos(split, gazetteer) for split in (VALIDATION, TRAINING))
    fitted = calibration.fit_calibration(validation, task.config.evaluate.target_precision, training.scores)
    try:
        fitted.save(path_of(model))
    except OSError as error:
        raise InputError(
            f"{model} can't be written ({error.strerror}): set evaluate.calibration_photos=0 to go without."
        ) from error
    before, after = (fitted.measured["ece"][when] for when in ("before", "after"))
    sure = f"sure above {fitted.threshold:.2f}" if fitted.threshold < calibration.NEVER else "never sure enough"
    prior = "divided by the model's own prior, " if fitted.own_prior else ""
    print(
        f"evaluate: {name}: calibrated on {fitted.measured['photos']:,} photos, {prior}temperature {fitted.temperature:.2f}, "
        f"calibration error {before:.2f} -> {after:.2f}; for {fitted.target:.0%} right answers {sure}",
        flush=True,
    )
    return fitted


def calibrated_scores(task: EvaluationTask, name: str, model: str, splits: Iterable[str]) -> ScoreTables:
    """A model's stored scores, calibrated as its folder says."""
    return ScoreTables(task.scores(name, splits).folders, Calibration.load(path_of(model)))


def likelihood_answers(task: EvaluationTask, name: str, model: str, redo: bool = False) -> bool:
    """The answers that follow from a model's stored scores, in its answers' table; False if it is there."""
    scores = calibrated_scores(task, name, model, [task.split])
    depends_on = answer_settings(task, model, run_questions.KINDS)
    depends_on["calibration"] = digest([scores.calibration.temperature, *scores.calibration.own_prior])
    if is_done(task.answers(name).folder, depends_on, redo):
        return False
    answers_by_scores(task, name, scores, model_gazetteer(model, task.gazetteer), depends_on)
    return True


def answers_by_scores(task: EvaluationTask, name: str, scores: ScoreTables, gazetteer: Gazetteer, settings: Row) -> None:
    """Write the answers to all questions about the photos that have scores, as the scores have them."""
    total = tables.count_rows(scores.folders[task.split], task.split)
    rows = display.count(f"{name}: answers by scores", scores.rows(task.split), total, "photos")
    photos = tables.iter_rows(task.data, task.split, PHOTO_COLUMNS)
    write_answers(task, name, answers_from_scores(rows, photos, gazetteer), settings)


def write_answers(task: EvaluationTask, name: str, answers: Iterable[Row], settings: Row) -> None:
    """Judge answers and write them into the table of a system."""
    judged = (row for answer in answers for row in run_questions.judge_answers([answer], task.judge))
    with fresh_dir(task.answers(name).folder, settings) as folder:
        tables.write_table(folder, task.split, judged, tables.ANSWERS)


def write_scores(task: EvaluationTask, name: str, scores: Mapping[str, Iterable[Row]], settings: Row) -> ScoreTables:
    """Write the scores of a system, split by split; what they are made from is read meanwhile."""
    written = task.scores(name, scores)
    for split, rows in scores.items():
        with display.show(f"{name}: writing scores"), fresh_dir(written.folders[split], settings) as folder:
            tables.write_table(folder, split, rows, tables.SCORES)
    return written


def report(
    task: EvaluationTask,
    names: Iterable[str],
    sources: ReportSources,
    decoding: Row | None = None,
    pictured: tuple[ScoreTables, Gazetteer] | None = None,
) -> list[Row]:
    """Write metrics.json and report.html, print the tables; returns each system's `name` and `metrics`.

    Args:
        names: systems whose answers are there.
        decoding: how the main system's ways of answering compare, see `comparison.compare_decoding`.
        pictured: scores of the split for result.png, and the gazetteer they are of.
    """
    resamples, seed = task.config.evaluate.bootstrap, task.config.seed
    answers = {name: task.answers(name) for name in names}
    files = [task.out / "metrics.json", task.out / "report.html"]
    display.heading("report", "accuracy with confidence intervals, maps and examples")
    with display.show("evaluate: writing the report"):
        systems = [{"name": n, "metrics": metrics.compute_metrics(rows, resamples, seed)} for n, rows in answers.items()]
        result = {"city": task.gazetteer.city or task.config.city.name, "split": task.split, "systems": systems}
        try:
            files[0].write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
            write_report(files[1], result, answers, task.gazetteer, sources, seed, resamples, decoding)
            if pictured:
                files.append(task.out / "result.png")
                with files[-1].open("wb") as file:
                    draw_answers(examples_of(task.image_table, task.split, *pictured, seed)).save(file, "PNG", optimize=True)
        except OSError as error:
            raise InputError(f"{task.out} can't be written ({error.strerror}): free room or give another --out.") from error
    print(f"\n{metrics_table(systems)}\n", flush=True)
    if decoding:
        print(f"{decoding_table(decoding)}\n", flush=True)
    print(*files, sep="\n", flush=True)
    return systems


def draw_photos(photos: AnyPath, split: str, count: int | None, seed: int) -> list[str]:
    """Ids of a split in the order of the table: all, or `count` drawn by seed."""
    ids = tables.read_table(photos, split, ["id"])["id"].to_pylist()
    drawn = set(random.Random(seed).sample(ids, min(count or len(ids), len(ids))))
    return [photo for photo in ids if photo in drawn]


def calibration_photos(config: Config, photos: AnyPath) -> dict[str, list[str]]:
    """Split -> photos to calibrate on: some for validation, and as many for the model's own prior; none without validation."""
    count = config.evaluate.calibration_photos
    if not (count and tables.count_rows(photos, VALIDATION)):
        return {}
    return {split: draw_photos(photos, split, count, config.seed) for split in (VALIDATION, TRAINING)}


def make_judge(data: AnyPath, split: str, models: Iterable[str] = ()) -> tuple[Judge, Gazetteer]:
    """A judge that knows the names of the data and of every model's city, and the data's gazetteer."""
    truth = tables.read_table(data, split, ["street", "district"])
    streets, districts = set(truth["street"].to_pylist()), set(truth["district"].to_pylist())
    variants: dict[str, list[str]] = {}
    city = Gazetteer([])
    for folder in [data, *map(path_of, models)]:
        if (folder / GAZETTEER_FILE).is_file():
            gazetteer = Gazetteer.load(folder / GAZETTEER_FILE)
            city = gazetteer if folder == data else city
            streets.update(gazetteer.streets)
            districts.update(gazetteer.districts)
            variants |= gazetteer.variants
    return Judge(sorted(streets), sorted(districts), variants), city


def trained_model(config: Config, system: SystemConfig) -> str:
    """The merged model of a system of the run, or the base model of one without stages."""
    if not system.stages:
        return config.model.base
    merged = Run(config).model_dir(system.name) / "merged"
    if not (merged / "config.json").is_file():
        raise InputError(f"'{system.name}' is not trained yet (no {merged}): run ray_jobs/train.py first.")
    return str(merged)


def model_gazetteer(model: str, city: Gazetteer) -> Gazetteer:
    """The gazetteer in a model's folder, else the city's."""
    file = path_of(model) / GAZETTEER_FILE
    return Gazetteer.load(file) if file.is_file() else city


def addresses_digest(gazetteer: Gazetteer) -> str:
    """Identifies the addresses of a gazetteer and their order."""
    return digest([address.text() for address in gazetteer.addresses])


def model_digest(model: str) -> str:
    """Identifies a model: a hash of a folder's weights and settings; of a hub model its name."""
    folder = local_model_copy(model)
    if not folder.is_dir():
        return model
    files = [file for kind in ("*.safetensors", "*.json", "*.jinja") for file in sorted(folder.glob(kind))]
    stats = ((file, file.stat()) for file in files if file.name != CALIBRATION_FILE)
    return _unchanged_files_digest(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))


@lru_cache(maxsize=32)
def _unchanged_files_digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """`files_digest` of files with their sizes and times of change: several tables depend on one model of gigabytes."""
    return files_digest([file for file, _, _ in files])


def files_digest(files: Sequence[AnyPath]) -> str:
    """Identifies some files by names and content."""
    if any(isinstance(file, RemotePath) for file in files):  # the footers of Parquet files identify them, without a download
        return sources_fingerprint(*map(str, sorted(files)))[:16]
    total = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as content:
            total.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:16]
