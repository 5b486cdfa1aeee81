"""Where the city's files are: those of the settings, or those of a toy city that is made first."""

from pathlib import Path

from addressvlm.cities import readers
from addressvlm.config import Config
from addressvlm.errors import InputError
from addressvlm.files import on_disk, upload
from addressvlm.run import Run, storage
from addressvlm.stores import StorePath

NO_IMAGERY = "none"  # of tiles.imagery


def resolve(config: Config, run: Run) -> Config:
    """The settings with the paths filled in; a toy city is drawn into the run's `input` folder if it is not there.

    Tiles of an XYZ server are kept for all runs of the storage.

    Raises:
        InputError: neither manifest nor photos are set, there is no such toy city, or the folder can't be written.
    """
    cache = config.tiles.cache or str(on_disk(storage(config.storage)) / "tile-cache")
    config = config.model_copy(update={"tiles": config.tiles.model_copy(update={"cache": cache})})
    if not config.city.toy:
        readers.where(config.city)
        return _with_imagery(config, config.tiles.imagery)
    from addressvlm.demo.city import write_city

    folder = run.input / config.city.toy
    if not (folder / "manifest.csv").is_file():
        print(f"prepare: drawing the toy city {config.city.toy}", flush=True)
    try:
        paths = write_city(config.city.toy, folder) if isinstance(folder, Path) else _in_store(config.city.toy, folder)
    except OSError as error:
        raise InputError(f"{folder} can't be written ({error.strerror}): set storage to a folder with room.") from None
    city = config.city.model_copy(update={key: paths[key] for key in ("manifest", "photos", "streets", "districts")})
    return _with_imagery(config.model_copy(update={"city": city}), config.tiles.imagery or paths["imagery"])


def _with_imagery(config: Config, imagery: str | None) -> Config:
    tiles = config.tiles.model_copy(update={"imagery": None if imagery == NO_IMAGERY else imagery})
    return config.model_copy(update={"tiles": tiles})


def _in_store(name: str, folder: StorePath) -> dict[str, str]:
    """The paths of a toy city in a store; it is drawn on this machine, and its manifest is sent last."""
    from addressvlm.demo.city import write_city

    drawn = on_disk(folder)
    paths = {key: Path(path) for key, path in write_city(name, drawn).items()}
    if not (folder / paths["manifest"].name).is_file():
        for file in sorted((f for f in drawn.rglob("*") if f.is_file()), key=lambda file: file == paths["manifest"]):
            upload(file, folder / file.relative_to(drawn).as_posix())
    return {key: str(folder / path.name) for key, path in paths.items()}
