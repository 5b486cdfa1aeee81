"""The steps of an evaluation on Ray Data, in their order: score, calibrate, ask, judge, report.

evaluate.py and compare.py are recipes over these steps. A step whose result is on disk reads it. Below the steps: drawing
photos, distributing work to actors that keep a model loaded, and digests of models and files.
"""

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from addressvlm import InputError
from addressvlm.answers import calibration
from addressvlm.answers.calibration import CALIBRATION_FILE, Calibration
from addressvlm.config import Config
from addressvlm.config.train import SystemConfig
from addressvlm.evaluation import likelihood, metrics, run_questions
from addressvlm.evaluation.likelihood import answers_from_scores, calibrated_rows, scored_photos
from addressvlm.evaluation.parsing import Judge
from addressvlm.evaluation.report import ReportSources, write_report
from addressvlm.evaluation.result_tables import decoding_table, metrics_table
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE, Gazetteer
from addressvlm.storage import tables
from addressvlm.storage.files import digest, local_model_copy, open_parquet
from addressvlm.storage.remote_path import AnyPath, RemotePath, path_of
from addressvlm.storage.run_dir import DONE_FILE, Run, fresh_dir, is_done, slug
from addressvlm.storage.shards import sources_fingerprint
from ray_jobs.common import heartbeat, progress
from ray_jobs.ray_data import to_input_error

TRAINING, VALIDATION, TEST = "train", "val", "test"
PHOTO_COLUMNS = [column for column in run_questions.COLUMNS if column != "image"]
QUESTION_BATCHES = 2  # a unit of work of a worker, sorted by length before it is cut into batches
SCORED_PHOTOS = 16  # a unit of work of a worker
UNJUDGED = pa.schema([field for field in tables.ANSWERS if field.name != "correct"])

Row = dict[str, Any]
Scores = dict[str, list[Row]]  # split -> rows of `tables.SCORES`


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


@dataclass(frozen=True)
class Answers:
    """A system's answers, rows of `tables.ANSWERS`.

    Attributes:
        settings: what new answers depend on; they have no `correct` yet. None: they were judged and stored before.
    """

    system: str
    rows: list[Row]
    settings: Row | None = None


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


def score(
    task: EvaluationTask, name: str, model: str, ids: Mapping[str, Sequence[str]], settings: Row | None = None,
    worker: "type[ModelWorker] | None" = None, redo: bool = False,
) -> Scores:  # fmt: skip
    """The score that a model gives every address for each photo, from <out>/scores/<system> or new.

    Args:
        ids: split -> photos. Splits that were scored before stay.
        settings: what scores depend on; default: the model, its dtype, the seed and the images of each split.
        worker: holds a model that is no vision-language model.
    """
    folder = task.out / "scores" / slug(name)
    before = {} if redo or not (folder / DONE_FILE).is_file() else json.loads((folder / DONE_FILE).read_text())
    counts = before.get("photos", {})
    missing = [split for split in ids if split not in counts]
    photos = {**counts, **{split: len(photo_ids) for split, photo_ids in ids.items()}}
    settings = {
        **{split: before[split] for split in counts if split in before},
        **(settings or _score_settings(task, model, ids)),
        "photos": photos,
    }
    stored = {key: value for key, value in settings.items() if key not in missing}
    stored["photos"] = {split: count for split, count in photos.items() if split not in missing}
    if not is_done(folder, stored, redo) or missing:
        if not model_gazetteer(model, task.gazetteer).addresses:
            raise InputError(
                f"neither {model} nor {task.image_table} holds a {GAZETTEER_FILE}: addresses can't be scored without "
                "their names."
            )
        rows = {row["id"]: row for row in score_photos(task, name, model, {s: ids[s] for s in missing}, worker)}
        splits = {split: list(tables.iter_rows(folder, split)) for split in counts}
        splits |= {split: [rows[photo] for photo in ids[split]] for split in missing}
        with fresh_dir(folder, settings) as temporary:
            for split, split_rows in splits.items():
                tables.write_table(temporary, split, split_rows, tables.SCORES)
    return {split: list(tables.iter_rows(folder, split)) for split in ids}


def _score_settings(task: EvaluationTask, model: str, splits: Iterable[str]) -> Row:
    images = {split: files_digest(tables.table_files(task.image_table, split)) for split in splits}
    return {**images, "model": model_digest(model), "dtype": task.config.model.dtype, "seed": task.config.seed}


def calibrate(task: EvaluationTask, name: str, model: str, scores: Scores) -> Calibration:
    """Fit a model's calibration to its scores of the photos of `calibration_photos`, and save it in the model's folder."""
    gazetteer = model_gazetteer(model, task.gazetteer)
    validation, training = (scored_photos(scores[split], gazetteer) for split in (VALIDATION, TRAINING))
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


def ask(
    task: EvaluationTask, name: str, model: str, scores: Scores, kinds: Sequence[str] = run_questions.KINDS, redo: bool = False
) -> Answers:
    """A model's answers to the questions of some kinds, from <out>/answers/<system> or new.

    If `evaluate.answers` is likelihood, they follow from `scores`.
    """
    config, folder = task.config, task.out / "answers" / slug(name)
    keys = {"answers", "max_new_tokens", "temperature", "max_photos", *({"images"} if task.images else ())}
    settings = {
        "evaluate": config.evaluate.model_dump(include=keys),
        "seed": config.seed,
        "dtype": config.model.dtype,
        "split": task.split,
        "data": files_digest(tables.table_files(task.image_table, task.split)),
        "model": model_digest(model),
        "kinds": list(kinds),
    }
    by_likelihood = config.evaluate.answers == "likelihood"
    fitted = Calibration.load(path_of(model)) if by_likelihood else Calibration()
    if by_likelihood:
        settings["calibration"] = digest([fitted.temperature, *fitted.own_prior])
    if is_done(folder, settings, redo):
        print(f"evaluate: {name}: already answered", flush=True)
        return Answers(name, list(tables.iter_rows(folder, task.split)))
    if by_likelihood:
        rows = scored_answers(task, calibrated_rows(scores[task.split], fitted), model_gazetteer(model, task.gazetteer))
    else:
        rows = answer_questions(task, name, model, kinds)
    order = {photo: number for number, photo in enumerate(task.ids)}
    rows.sort(key=lambda row: (order[row["id"]], row["level"], row["kind"], row["question"]))
    return Answers(name, rows, settings)


def scored_answers(task: EvaluationTask, rows: Iterable[Row], gazetteer: Gazetteer) -> list[Row]:
    """Answers to all questions about the photos of rows of `tables.SCORES`, as the scores have them."""
    photos = {row["id"]: row for row in tables.iter_rows(task.data, task.split, PHOTO_COLUMNS)}
    return list(answers_from_scores(rows, photos, gazetteer))


def judge(task: EvaluationTask, answers: Answers) -> list[Row]:
    """The answers with `correct`; new ones are stored in <out>/answers/<system>."""
    if answers.settings is None:
        return answers.rows
    rows = run_questions.judge_answers(answers.rows, task.judge)
    with fresh_dir(task.out / "answers" / slug(answers.system), answers.settings) as folder:
        tables.write_table(folder, task.split, rows, tables.ANSWERS)
    return rows


def report(
    task: EvaluationTask, answers: Mapping[str, Sequence[Row]], sources: ReportSources, decoding: Row | None = None
) -> list[Row]:
    """Write metrics.json and report.html, print the tables; returns each system's `name` and `metrics`.

    Args:
        answers: system -> its judged rows.
        decoding: how the main system's ways of answering compare, see `decoding_comparison`.
    """
    resamples, seed = task.config.evaluate.bootstrap, task.config.seed
    systems = [{"name": n, "metrics": metrics.compute_metrics(rows, resamples, seed)} for n, rows in answers.items()]
    result = {"city": task.gazetteer.city or task.config.city.name, "split": task.split, "systems": systems}
    files = task.out / "metrics.json", task.out / "report.html"
    try:
        files[0].write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
        write_report(files[1], result, answers, task.gazetteer, sources, seed, resamples, decoding)
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


def score_photos(
    task: EvaluationTask, name: str, model: str, ids: Mapping[str, Sequence[str]], worker: "type[ModelWorker] | None" = None
) -> list[Row]:
    """Rows of `tables.SCORES` of the photos of some splits, in the order in which they come."""
    workers, photos = task.config.evaluate.workers, {photo for photo_ids in ids.values() for photo in photo_ids}
    files = [file for split in ids for file in tables.table_files(task.image_table, split)]
    units = list(work_units(files, photos, max(1, min(SCORED_PHOTOS, -(-len(photos) // workers)))))
    arguments = (model, task.gazetteer, task.config)
    return run_workers(task.config, units, worker or ScoringWorker, arguments, f"evaluate: {name}, photos scored", len(photos))


def answer_questions(task: EvaluationTask, name: str, model: str, kinds: Sequence[str]) -> list[Row]:
    """Rows of `tables.ANSWERS` without `correct`, in the order in which they come."""
    need, photos, files = task.config.evaluate, len(task.ids), tables.table_files(task.image_table, task.split)
    total = count_questions(files, set(task.ids), kinds)
    per_unit = QUESTION_BATCHES * need.batch_size * photos // max(total, 1)
    units = list(work_units(files, set(task.ids), max(1, min(per_unit, -(-photos // need.workers)))))
    arguments = (model, task.gazetteer, task.config, kinds)
    return run_workers(task.config, units, QuestionWorker, arguments, f"evaluate: {name}, questions", total)


def count_questions(files: Sequence[AnyPath], ids: set[str], kinds: Sequence[str]) -> int:
    """How many questions of some kinds there are about some photos."""
    table = pa.concat_tables([tables.read_table_file(file, ["id", "rounds"]) for file in files])
    rounds = table.filter(pc.is_in(table["id"], pa.array(ids)))["rounds"].combine_chunks()
    return pc.sum(pc.is_in(pc.struct_field(pc.list_flatten(rounds), "kind"), pa.array(kinds))).as_py() or 0


def work_units(files: Sequence[AnyPath], ids: set[str], photos: int) -> Iterator[pa.Table]:
    """The work in units of up to `photos` photos: one row each with the columns file, group and ids.

    Workers read the photos themselves: no read task competes with them for CPUs, and no image goes through Ray.
    """
    for file in files:
        with open_parquet(file) as opened:
            for group in range(opened.num_row_groups):
                group_ids = [i for i in opened.read_row_group(group, columns=["id"])["id"].to_pylist() if i in ids]
                for start in range(0, len(group_ids), photos):
                    yield pa.table({"file": [str(file)], "group": [group], "ids": [group_ids[start : start + photos]]})


def run_workers(
    config: Config, units: list[pa.Table], worker: type, arguments: tuple[Any, ...], step: str, total: int
) -> list[Row]:
    """Send units of work through `evaluate.workers` actors of class `worker(*arguments)`; prints progress."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    need = config.evaluate
    dataset = ray.data.from_arrow(units).map_batches(
        worker,
        fn_constructor_args=arguments,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(need.workers, len(units))),
        num_cpus=need.cpus_per_worker,
        num_gpus=need.gpus_per_worker,
    )
    rows: list[Row] = []
    try:
        with heartbeat(lambda: f"{step}: {len(rows):,}/{total:,}, working"):
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                rows += batch.to_pylist()
                progress(step, len(rows), total)
    except ray.exceptions.RayError as error:
        raise to_input_error(error) or error from None
    return rows


class ModelWorker(ABC):
    """An actor that keeps a model loaded and reads its photos from the table itself.

    It loads the model with the first photos, not in its constructor, so that an InputError reaches the job as one.
    """

    columns: Sequence[str]  # of the photos
    schema: pa.Schema  # of the rows it makes

    def __init__(self, model: str, city: Gazetteer, config: Config, kinds: Sequence[str] = run_questions.KINDS) -> None:
        """`city`: the gazetteer of a model whose folder has none."""
        import torch
        from transformers.utils.logging import disable_progress_bar

        torch.set_num_threads(max(1, int(config.evaluate.cpus_per_worker)))
        disable_progress_bar()
        self.config, self.kinds = config, kinds
        self.load = lru_cache(partial(self.load_model, model, city, config))
        self.read = lru_cache(maxsize=1)(self._read)  # neighbouring units lie in one row group

    def __call__(self, unit: pa.Table) -> Iterator[pa.Table]:
        """A unit of `work_units` -> rows of the schema, some at a time."""
        for file, group, ids in zip(*(unit[name].to_pylist() for name in unit.column_names), strict=True):
            rows = self.read(file, group)
            for batch in self.work(rows.filter(pc.is_in(rows["id"], pa.array(ids))).to_pylist()):
                yield pa.Table.from_pylist(batch, schema=self.schema)

    def _read(self, file: str, group: int) -> pa.Table:
        with open_parquet(path_of(file)) as opened:
            return opened.read_row_group(group, columns=list(self.columns))

    @staticmethod
    def load_model(model: str, city: Gazetteer, config: Config) -> Any:
        """The vision-language model of a folder."""
        from addressvlm.inference import Localizer

        settings = config.model
        localizer = Localizer(model, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code, memory_mb=0)
        localizer.gazetteer = localizer.gazetteer or city
        return localizer

    @abstractmethod
    def work(self, photos: list[Row]) -> Iterable[list[Row]]:
        """Rows of the schema for some photos."""


class QuestionWorker(ModelWorker):
    """Asks all questions about its photos; unjudged rows of ANSWERS, a batch of questions at a time."""

    columns, schema = run_questions.COLUMNS, UNJUDGED

    def work(self, photos: list[Row]) -> Iterable[list[Row]]:
        return run_questions.run_questions(self.load(), photos, self.config.evaluate, self.config.seed, self.kinds)


class ScoringWorker(ModelWorker):
    """Scores the addresses for its photos; rows of SCORES."""

    columns, schema = likelihood.COLUMNS, tables.SCORES

    def work(self, photos: list[Row]) -> Iterable[list[Row]]:
        return likelihood.score_photos(self.load().address_scores, photos, SCORED_PHOTOS)


def model_digest(model: str) -> str:
    """Identifies a model: a hash of a folder's weights and settings; of a hub model its name."""
    folder = local_model_copy(model)
    if not folder.is_dir():
        return model
    files = [file for kind in ("*.safetensors", "*.json", "*.jinja") for file in folder.glob(kind)]
    return files_digest([file for file in files if file.name != CALIBRATION_FILE])


def files_digest(files: Sequence[AnyPath]) -> str:
    """Identifies some files by names and content."""
    if any(isinstance(file, RemotePath) for file in files):  # the footers of Parquet files identify them, without a download
        return sources_fingerprint(*map(str, sorted(files)))[:16]
    total = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as content:
            total.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:16]
