"""Where the city's files are: those of the settings, or those of a toy city that is made first."""

from addressvlm.cities import readers
from addressvlm.config import Config
from addressvlm.errors import InputError
from addressvlm.run import Run, storage


def resolve(config: Config, run: Run) -> Config:
    """The settings with the paths filled in; a toy city is drawn into the run's `input` folder if it is not there.

    Tiles of an XYZ server are kept for all runs of the storage.

    Raises:
        InputError: neither manifest nor photos are set, there is no such toy city, or the folder can't be written.
    """
    cache = config.tiles.cache or str(storage(config.storage) / "tile-cache")
    config = config.model_copy(update={"tiles": config.tiles.model_copy(update={"cache": cache})})
    if not config.city.toy:
        readers.where(config.city)
        return config
    from addressvlm.demo.city import write_city

    folder = run.input / config.city.toy
    if not folder.exists():
        print(f"prepare: drawing the toy city {config.city.toy}", flush=True)
    try:
        paths = write_city(config.city.toy, folder)
    except OSError as error:
        raise InputError(f"{folder} can't be written ({error.strerror}): set storage to a folder with room.") from None
    city = config.city.model_copy(update={key: paths[key] for key in ("manifest", "photos", "streets", "districts")})
    tiles = config.tiles.model_copy(update={"imagery": config.tiles.imagery or paths["imagery"]})
    return config.model_copy(update={"city": city, "tiles": tiles})
