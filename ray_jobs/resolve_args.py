"""What the flags --model and --data and the images of evaluate mean: models by name, the folder of a photos table."""

from collections.abc import Sequence

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.config.train import SystemConfig
from addressvlm.dataset.build import resolve_city_files
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE, Gazetteer
from addressvlm.storage.remote_path import AnyPath, path_of
from addressvlm.storage.run_dir import DONE_FILE, Run, is_done, parse_model_flag, slug
from ray_jobs import graft, prepare


def systems_of(config: Config, run: Run, only: Sequence[str] | None = None) -> dict[str, str]:
    """Name -> model of every system of the run, or of those of these names.

    Raises:
        InputError: one is not trained yet.
    """
    systems = [system for system in config.train.systems if not only or system.name in only]
    return {system.name: model_of(config, run, system) for system in systems}


def model_of(config: Config, run: Run, system: SystemConfig) -> str:
    """The merged model of a system of the run, or the base model of one without stages.

    Raises:
        InputError: it is not trained yet.
    """
    if not system.stages:
        return config.model.base
    merged = run.model_dir(system.name) / "merged"
    if not (merged / "config.json").is_file():
        raise InputError(f"'{system.name}' is not trained yet (no {merged}): run ray_jobs/train.py first.")
    return str(merged)


def named_models(given: list[str]) -> dict[str, str]:
    """`name=folder` or `folder` flags as name -> folder.

    Raises:
        InputError: two models have one name.
    """
    systems: dict[str, str] = {}
    for flag in given:
        name, folder = parse_model_flag(flag)
        if slug(name) in map(slug, systems):
            raise InputError(f"two models are called '{name}': give each a name, --model name=folder.")
        systems[name] = folder
    return systems


def dataset(config: Config, given: str, photos: str | None, models: dict[str, str], out: AnyPath, redo: bool) -> AnyPath:
    """The folder of the photos table that --data means; a manifest is prepared first.

    Raises:
        InputError: there is nothing at the path.
    """
    path = path_of(given)
    if path.is_dir():
        return path / "photos" if (path / "photos").is_dir() else path
    if not path.is_file():
        raise InputError(f"--data {given} does not exist: give a run, a folder with test-*.parquet, or a manifest file.")
    if config.city.toy:
        config = resolve_city_files(config, Run(config))
    city = config.city.model_copy(update={"toy": None, "reader": "auto", "manifest": str(path), "photos": photos})
    config = config.model_copy(update={"city": city})
    folder = out / "photos"
    mark = folder / DONE_FILE
    changed = mark.is_file() and mark.stat().st_mtime < path.stat().st_mtime
    if not is_done(folder, prepare.settings(config), redo or changed):
        known = [path_of(m) / GAZETTEER_FILE for m in models.values() if (path_of(m) / GAZETTEER_FILE).is_file()]
        prepare.prepare_test(config, folder, Gazetteer.load(known[0]) if known else None)
    return folder


def shown_images(config: Config, of: Run, split: str, redo: bool = False) -> AnyPath | None:
    """The table with what models are shown instead of the photos of the run `of`; None: the photos.

    Raises:
        InputError: see `graft.photos_on_tiles`.
    """
    return graft.photos_on_tiles(config, of, split, redo) if config.evaluate.images == "grafts" else None


def output_folder(run: Run, data: str | None) -> AnyPath:
    """<run>/evaluations/<name of the data>; of the run's photos on their tiles, <run>/evaluations/grafts."""
    if not data and run.config.evaluate.images == "grafts":
        return run.folder / "evaluations" / "grafts"
    path = path_of(data).resolve() if data else run.folder
    return run.folder / "evaluations" / (path.parent.name if path.name == "photos" else path.stem)
