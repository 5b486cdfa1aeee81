"""What evaluate and compare have in common: which photos are asked about, who judges, and a system's answers on disk."""

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
from addressvlm.evaluation import decoding_comparison, likelihood, report, run_questions
from addressvlm.evaluation.likelihood import answers_from_scores as answers_by_scores
from addressvlm.evaluation.likelihood import calibrated_rows, scored_photos
from addressvlm.evaluation.parsing import Judge
from addressvlm.evaluation.run_questions import judge_answers
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE, Gazetteer
from addressvlm.storage import tables
from addressvlm.storage.files import digest, local_model_copy, open_parquet
from addressvlm.storage.remote_path import AnyPath, RemotePath, path_of
from addressvlm.storage.run_dir import DONE_FILE, fresh_dir, is_done, slug
from addressvlm.storage.shards import sources_fingerprint
from ray_jobs.common import Heartbeat, progress
from ray_jobs.ray_data import to_input_error

BATCHES_AT_A_TIME = 2  # of questions, given to a worker together and sorted by length
PHOTOS_SCORED = 16  # given to a worker together
RAW = pa.schema([field for field in tables.ANSWERS if field.name != "correct"])

Row = dict[str, Any]


def distributed_answers(
    config: Config, name: str, model: str, files: Sequence[AnyPath], ids: Sequence[str], city: Gazetteer, kinds: Sequence[str]
) -> list[Row]:
    """What a model answers to the questions of some kinds about the photos `ids` of a table, rows of ANSWERS as they come.

    `city` has the names that constrained answers may say, where the model's folder has no gazetteer.

    Raises:
        InputError: a worker can't load the model.
    """
    need = config.evaluate
    total = _questions(files, set(ids), kinds)
    at_a_time = BATCHES_AT_A_TIME * need.batch_size * len(ids) // max(total, 1)
    units = list(work_units(files, set(ids), max(1, min(at_a_time, -(-len(ids) // need.workers)))))
    return run_workers(config, units, QuestionWorker, (model, city, config, kinds), f"evaluate: {name}, questions", total)


def distributed_scores(
    config: Config, name: str, model: str, files: Sequence[AnyPath], ids: Sequence[str], city: Gazetteer,
    scorer: "type[ModelWorker] | None" = None,
) -> list[Row]:  # fmt: skip
    """The scores that a model gives every address for the photos `ids` of a table, rows of SCORES in the order they come.

    `scorer` holds it where it is no vision-language model.

    Raises:
        InputError: a worker can't load the model, or neither it nor the data has a gazetteer.
    """
    units = list(work_units(files, set(ids), max(1, min(PHOTOS_SCORED, -(-len(ids) // config.evaluate.workers)))))
    return run_workers(
        config, units, scorer or ScoringWorker, (model, city, config), f"evaluate: {name}, photos scored", len(ids)
    )


def run_workers(
    config: Config, units: list[pa.Table], worker: type, given: tuple[Any, ...], step: str, total: int
) -> list[Row]:
    """What workers, each made of what is given, make of the units; with progress."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    need = config.evaluate
    made = ray.data.from_arrow(units).map_batches(
        worker,
        fn_constructor_args=given,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(need.workers, len(units))),
        num_cpus=need.cpus_per_worker,
        num_gpus=need.gpus_per_worker,
    )
    rows: list[Row] = []
    try:
        with Heartbeat(lambda: f"{step}: {len(rows):,}/{total:,}, working"):
            for batch in made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                rows += batch.to_pylist()
                progress(step, len(rows), total)
    except ray.exceptions.RayError as error:
        raise to_input_error(error) or error from None
    return rows


def _questions(files: Sequence[AnyPath], ids: set[str], kinds: Sequence[str]) -> int:
    """How many questions of these kinds there are about the photos."""
    asked = pa.concat_tables([tables.read_table_file(file, ["id", "rounds"]) for file in files])
    chosen = asked.filter(pc.is_in(asked["id"], pa.array(ids)))
    found = pc.struct_field(pc.list_flatten(chosen["rounds"].combine_chunks()), "kind")
    return pc.sum(pc.is_in(found, pa.array(kinds))).as_py() or 0


class ModelWorker(ABC):
    """A worker: a model that stays loaded, and photos that it reads from the table itself.

    It loads the model with the first photos, not when it is made: an error then reaches the job as what it is.
    """

    columns: Sequence[str]
    schema: pa.Schema

    def __init__(self, model: str, city: Gazetteer, config: Config, kinds: Sequence[str] = run_questions.KINDS) -> None:
        import torch
        from transformers.utils.logging import disable_progress_bar

        torch.set_num_threads(max(1, int(config.evaluate.cpus_per_worker)))
        disable_progress_bar()
        self.config, self.kinds = config, kinds
        self.load = lru_cache(partial(self.opened, model, city, config))
        self.read = lru_cache(maxsize=1)(partial(_row_group, list(self.columns)))  # neighbouring units lie in one row group

    def __call__(self, unit: pa.Table) -> Iterator[pa.Table]:
        """A unit of `work_units` -> rows of the schema, some at a time."""
        for file, group, ids in zip(*(unit[name].to_pylist() for name in unit.column_names), strict=True):
            rows = self.read(file, group)
            for batch in self.work(rows.filter(pc.is_in(rows["id"], pa.array(ids))).to_pylist()):
                yield pa.Table.from_pylist(batch, schema=self.schema)

    @staticmethod
    def opened(model: str, city: Gazetteer, config: Config) -> Any:
        """The model in a folder, loaded."""
        return _load(model, city, config)

    @abstractmethod
    def work(self, photos: list[Row]) -> Iterable[list[Row]]:
        """What is made of some photos."""


class QuestionWorker(ModelWorker):
    """Asks all questions about its photos; rows of ANSWERS not judged yet, a batch of questions at a time."""

    columns, schema = run_questions.COLUMNS, RAW

    def work(self, photos: list[Row]) -> Iterable[list[Row]]:
        """The answers."""
        return run_questions.run_questions(self.load(), photos, self.config.evaluate, self.config.seed, self.kinds)


class ScoringWorker(ModelWorker):
    """Scores the addresses for its photos; rows of SCORES."""

    columns, schema = likelihood.COLUMNS, tables.SCORES

    def work(self, photos: list[Row]) -> Iterable[list[Row]]:
        """The scores."""
        return likelihood.score_photos(self.load().address_scores, photos, PHOTOS_SCORED)


def _load(model: str, city: Gazetteer, config: Config) -> Any:
    from addressvlm.inference import Localizer

    made = Localizer(model, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code, memory_mb=0)
    made.gazetteer = made.gazetteer or city
    return made


def _row_group(columns: list[str], file: str, group: int) -> pa.Table:
    with open_parquet(path_of(file)) as opened:
        return opened.read_row_group(group, columns=columns)


def work_units(files: Sequence[AnyPath], ids: set[str], photos: int) -> Iterator[pa.Table]:
    """The work in pieces of up to `photos` photos: columns file, group, ids; one row each.

    Workers read the photos themselves: no read task competes with them for CPUs, and no image goes through Ray.
    """
    for file in files:
        with open_parquet(file) as opened:
            for group in range(opened.num_row_groups):
                found = [i for i in opened.read_row_group(group, columns=["id"])["id"].to_pylist() if i in ids]
                for start in range(0, len(found), photos):
                    yield pa.table({"file": [str(file)], "group": [group], "ids": [found[start : start + photos]]})


VALIDATION, TRAINING = "val", "train"


def gazetteer_of(model: str, city: Gazetteer) -> Gazetteer:
    """The model's own gazetteer, else the city's."""
    own = path_of(model) / GAZETTEER_FILE
    return Gazetteer.load(own) if own.is_file() else city


def calibration_photos(config: Config, data: AnyPath) -> dict[str, list[str]]:
    """Split -> the photos to calibrate on, drawn by seed; nothing if there are no validation photos or none are wanted."""
    if not (config.evaluate.calibration_photos and tables.count_rows(data, VALIDATION)):
        return {}
    return {split: _drawn(config, data, split) for split in (VALIDATION, TRAINING)}


def _drawn(config: Config, data: AnyPath, split: str) -> list[str]:
    ids = tables.read_table(data, split, ["id"])["id"].to_pylist()
    drawn = set(random.Random(config.seed).sample(ids, min(config.evaluate.calibration_photos, len(ids))))
    return [photo for photo in ids if photo in drawn]


def score_addresses(
    config: Config, folder: AnyPath, name: str, model: str, data: AnyPath, wanted: Mapping[str, Sequence[str]], made_from: Row,
    city: Gazetteer, redo: bool, scorer: type[ModelWorker] | None = None,
) -> dict[str, list[Row]]:  # fmt: skip
    """One system's rows of SCORES for each split of `wanted` (split -> ids), from scores/<slug> or new.

    Splits that are there already are kept, whoever wanted them. `scorer` holds the model where it is no vision-language model.

    Raises:
        InputError: neither the model nor the data has a gazetteer, or the folder was made otherwise.
    """
    folder = folder / "scores" / slug(name)
    counts = {split: len(ids) for split, ids in wanted.items()}
    before = {} if redo or not (folder / DONE_FILE).is_file() else json.loads((folder / DONE_FILE).read_text())
    held = before.get("photos", {})
    missing = [split for split in wanted if split not in held]
    kept = {split: before[split] for split in held if split in before}
    settings = {**kept, **made_from, "photos": {**held, **counts}}
    if not is_done(folder, _without(missing, settings), redo) or missing:
        if not gazetteer_of(model, city).addresses:
            raise InputError(
                f"neither {model} nor {data} holds a {GAZETTEER_FILE}: addresses can't be scored without their names."
            )
        files = [file for split in missing for file in tables.table_files(data, split)]
        ids = [photo for split in missing for photo in wanted[split]]
        found = {row["id"]: row for row in distributed_scores(config, name, model, files, ids, city, scorer)}
        rows = {split: list(tables.iter_rows(folder, split)) for split in held}
        rows |= {split: [found[photo] for photo in wanted[split]] for split in missing}
        with fresh_dir(folder, settings) as partial:
            for split, of_split in rows.items():
                tables.write_table(partial, split, of_split, tables.SCORES)
    return {split: list(tables.iter_rows(folder, split)) for split in wanted}


def _without(splits: Collection[str], settings: Row) -> Row:
    """The settings of the other splits alone."""
    photos = {split: count for split, count in settings["photos"].items() if split not in splits}
    return {**{key: value for key, value in settings.items() if key not in splits}, "photos": photos}


def fit_and_save_calibration(
    config: Config, name: str, model: str, rows: Mapping[str, Sequence[Row]], city: Gazetteer
) -> Calibration:
    """Fit a trained model's calibration and leave it in its folder.

    Args:
        rows: of SCORES, of the photos of `calibration_photos`.

    Raises:
        InputError: no photo has an address that the model knows, or the folder can't be written.
    """
    validation, training = (scored_photos(rows[split], gazetteer_of(model, city)) for split in (VALIDATION, TRAINING))
    fitted = calibration.fit_calibration(validation, config.evaluate.target_precision, training.scores)
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


def compare_decoding_modes(
    config: Config, out: AnyPath, name: str, model: str, rows: Sequence[Row], answered: Mapping[str, Sequence[Row]],
    city: Gazetteer,
) -> Row:  # fmt: skip
    """The ways of answering of one model side by side, also written to modes.json."""
    settings = decoding_comparison.BootstrapSettings(config.evaluate.bootstrap, config.seed)
    ids = {row["id"] for row in rows}
    same = {mode: [row for row in given if row["id"] in ids] for mode, given in answered.items()}
    found = decoding_comparison.compare_decoding(
        rows, gazetteer_of(model, city), Calibration.load(path_of(model)), same, settings
    )
    found = {"system": name, **found}
    (out / "modes.json").write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    return found


@dataclass(frozen=True)
class EvaluationTask:
    """What is scored, on what, and where the result goes."""

    systems: dict[str, str]  # name -> model folder or hub name
    data: AnyPath  # folder of the photos table
    split: str
    out: AnyPath
    sources: report.ReportSources
    own: bool = False  # the run's data and systems: these are calibrated
    priors: bool = False  # the table of modes gets constrained answers too
    images: AnyPath | None = None  # folder of the same table with other images, which the model is shown

    @property
    def shown(self) -> AnyPath:
        """The table whose images the model is shown."""
        return self.images or self.data


def answer_questions(
    config: Config, task: EvaluationTask, name: str, model: str, ids: list[str], judge: Judge, city: Gazetteer,
    scores: dict[str, list[dict[str, Any]]], redo: bool, kinds: Sequence[str] = run_questions.KINDS,
) -> bool:  # fmt: skip
    """One system's answers into answers/<slug>; False if they were there. `scores` of the split may decide them."""
    folder = task.out / "answers" / slug(name)
    decisive = {"answers", "max_new_tokens", "temperature", "max_photos", *({"images"} if task.images else ())}
    settings = {
        "evaluate": config.evaluate.model_dump(include=decisive),
        "seed": config.seed,
        "dtype": config.model.dtype,
        "split": task.split,
        "data": files_digest(tables.table_files(task.shown, task.split)),
        "model": model_digest(model),
        "kinds": list(kinds),
    }
    by_scores = config.evaluate.answers == "likelihood"
    calibration = Calibration.load(path_of(model)) if by_scores else Calibration()
    if by_scores:
        settings["calibration"] = digest([calibration.temperature, *calibration.own_prior])
    if is_done(folder, settings, redo):
        print(f"evaluate: {name}: already answered", flush=True)
        return False
    files = tables.table_files(task.shown, task.split)
    with fresh_dir(folder, settings) as partial:
        if by_scores:
            columns = [column for column in run_questions.COLUMNS if column != "image"]
            photos = {row["id"]: row for row in tables.iter_rows(task.data, task.split, columns)}
            believed = calibrated_rows(scores[task.split], calibration)
            found = list(answers_by_scores(believed, photos, gazetteer_of(model, city)))
        else:
            found = distributed_answers(config, name, model, files, ids, city, kinds)
        place = {photo: i for i, photo in enumerate(ids)}
        found.sort(key=lambda row: (place[row["id"]], row["level"], row["kind"], row["question"]))
        tables.write_table(partial, task.split, judge_answers(found, judge), tables.ANSWERS)
    return True


def read_answers(task: EvaluationTask, name: str) -> list[dict[str, Any]]:
    """The answers that `answer_questions` left, rows of `tables.ANSWERS`."""
    return list(tables.iter_rows(task.out / "answers" / slug(name), task.split))


def choose_photos(config: Config, task: EvaluationTask) -> list[str]:
    """The photos to ask about, in the order of the table; all, or as many as wanted, drawn by seed.

    Raises:
        InputError: the split has no rows.
    """
    ids = tables.read_table(task.shown, task.split, ["id"])["id"].to_pylist()
    if not ids:
        raise InputError(f"{task.shown} has no photos in its split {task.split}: give another --data or --split.")
    wanted = config.evaluate.max_photos
    if not wanted or wanted >= len(ids):
        return ids
    drawn = set(random.Random(config.seed).sample(ids, wanted))
    return [photo for photo in ids if photo in drawn]


def make_judge(task: EvaluationTask, folders: dict[str, str]) -> tuple[Judge, Gazetteer]:
    """One judge for all systems, who knows the names of the data and of every model's city, and the data's gazetteer."""
    truth = tables.read_table(task.data, task.split, ["street", "district"])
    streets, districts = set(truth["street"].to_pylist()), set(truth["district"].to_pylist())
    variants: dict[str, list[str]] = {}
    own = Gazetteer([])
    for folder in [task.data, *map(path_of, folders.values())]:
        if (folder / GAZETTEER_FILE).is_file():
            gazetteer = Gazetteer.load(folder / GAZETTEER_FILE)
            own = gazetteer if folder == task.data else own
            streets.update(gazetteer.streets)
            districts.update(gazetteer.districts)
            variants |= gazetteer.variants
    return Judge(sorted(streets), sorted(districts), variants), own


def model_digest(model: str) -> str:
    """What tells two models apart: a hash of a folder's weights and settings; of a hub model its name."""
    folder = local_model_copy(model)
    if not folder.is_dir():
        return model
    files = [file for kind in ("*.safetensors", "*.json", "*.jinja") for file in folder.glob(kind)]
    return files_digest([file for file in files if file.name != CALIBRATION_FILE])


def files_digest(files: Sequence[AnyPath]) -> str:
    """What tells the content of some files apart."""
    if any(isinstance(file, RemotePath) for file in files):  # not fetched for this: the ends of Parquet files tell them apart
        return sources_fingerprint(*map(str, sorted(files)))[:16]
    total = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as content:
            total.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:16]
