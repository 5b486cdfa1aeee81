"""What evaluate and compare have in common: which photos are asked about, who judges, and a system's answers on disk."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from addressvlm import InputError, tables
from addressvlm.addresses import GAZETTEER, Gazetteer
from addressvlm.answers.calibration import CALIBRATION, Calibration
from addressvlm.config import Config
from addressvlm.evaluation import asking, report
from addressvlm.evaluation.asking import judged
from addressvlm.evaluation.parsing import Judge
from addressvlm.evaluation.scores import answers_of as answers_by_scores
from addressvlm.evaluation.scores import calibrated
from addressvlm.files import digest, fetched_model
from addressvlm.run import is_done, slug, writing
from addressvlm.shards import sources_fingerprint
from addressvlm.stores import AnyPath, StorePath, path_of
from ray_jobs import scoring
from ray_jobs.asking import answers_of


@dataclass(frozen=True)
class Task:
    """What is scored, on what, and where the result goes."""

    systems: dict[str, str]  # name -> model folder or hub name
    data: AnyPath  # folder of the photos table
    split: str
    out: AnyPath
    sources: report.Sources
    own: bool = False  # the run's data and systems: these are calibrated
    priors: bool = False  # the table of modes gets constrained answers too
    images: AnyPath | None = None  # folder of the same table with other images, which the model is shown

    @property
    def shown(self) -> AnyPath:
        """The table whose images the model is shown."""
        return self.images or self.data


def answer(
    config: Config, task: Task, name: str, model: str, ids: list[str], judge: Judge, city: Gazetteer,
    scores: dict[str, list[dict[str, Any]]], redo: bool, kinds: Sequence[str] = asking.KINDS,
) -> bool:  # fmt: skip
    """One system's answers into answers/<slug>; False if they were there. `scores` of the split may decide them."""
    folder = task.out / "answers" / slug(name)
    decisive = {"answers", "max_new_tokens", "temperature", "max_photos", *({"images"} if task.images else ())}
    settings = {
        "evaluate": config.evaluate.model_dump(include=decisive),
        "seed": config.seed,
        "dtype": config.model.dtype,
        "split": task.split,
        "data": files_digest(tables.files(task.shown, task.split)),
        "model": model_digest(model),
        "kinds": list(kinds),
    }
    by_scores = config.evaluate.answers == "scored"
    calibration = Calibration.load(path_of(model)) if by_scores else Calibration()
    if by_scores:
        settings["calibration"] = digest([calibration.temperature, *calibration.own_prior])
    if is_done(folder, settings, redo):
        print(f"evaluate: {name}: already answered", flush=True)
        return False
    files = tables.files(task.shown, task.split)
    with writing(folder, settings) as partial:
        if by_scores:
            columns = [column for column in asking.COLUMNS if column != "image"]
            photos = {row["id"]: row for row in tables.rows(task.data, task.split, columns)}
            believed = calibrated(scores[task.split], calibration)
            found = list(answers_by_scores(believed, photos, scoring.gazetteer_of(model, city)))
        else:
            found = answers_of(config, name, model, files, ids, city, kinds)
        place = {photo: i for i, photo in enumerate(ids)}
        found.sort(key=lambda row: (place[row["id"]], row["level"], row["kind"], row["question"]))
        tables.write(partial, task.split, judged(found, judge), tables.ANSWERS)
    return True


def read(task: Task, name: str) -> list[dict[str, Any]]:
    """The answers that `answer` left, rows of `tables.ANSWERS`."""
    return list(tables.rows(task.out / "answers" / slug(name), task.split))


def chosen_ids(config: Config, task: Task) -> list[str]:
    """The photos to ask about, in the order of the table; all, or as many as wanted, drawn by seed.

    Raises:
        InputError: the split has no rows.
    """
    ids = tables.read(task.shown, task.split, ["id"])["id"].to_pylist()
    if not ids:
        raise InputError(f"{task.shown} has no photos in its split {task.split}: give another --data or --split.")
    wanted = config.evaluate.max_photos
    if not wanted or wanted >= len(ids):
        return ids
    drawn = set(random.Random(config.seed).sample(ids, wanted))
    return [photo for photo in ids if photo in drawn]


def judge_of(task: Task, folders: dict[str, str]) -> tuple[Judge, Gazetteer]:
    """One judge for all systems, who knows the names of the data and of every model's city, and the data's gazetteer."""
    truth = tables.read(task.data, task.split, ["street", "district"])
    streets, districts = set(truth["street"].to_pylist()), set(truth["district"].to_pylist())
    variants: dict[str, list[str]] = {}
    own = Gazetteer([])
    for folder in [task.data, *map(path_of, folders.values())]:
        if (folder / GAZETTEER).is_file():
            gazetteer = Gazetteer.load(folder / GAZETTEER)
            own = gazetteer if folder == task.data else own
            streets.update(gazetteer.streets)
            districts.update(gazetteer.districts)
            variants |= gazetteer.variants
    return Judge(sorted(streets), sorted(districts), variants), own


def model_digest(model: str) -> str:
    """What tells two models apart: a hash of a folder's weights and settings; of a hub model its name."""
    folder = fetched_model(model)
    if not folder.is_dir():
        return model
    files = [file for kind in ("*.safetensors", "*.json", "*.jinja") for file in folder.glob(kind)]
    return files_digest([file for file in files if file.name != CALIBRATION])


def files_digest(files: Sequence[AnyPath]) -> str:
    """What tells the content of some files apart."""
    if any(isinstance(file, StorePath) for file in files):  # not fetched for this: the ends of Parquet files tell them apart
        return sources_fingerprint(*map(str, sorted(files)))[:16]
    total = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as content:
            total.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:16]
