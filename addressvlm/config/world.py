"""Many cities in one file: a table of cities beside the settings that hold for all of them.

    extends: demo
    name: world
    world:
      cities:
        - {name: graz, manifest: graz/photos.csv, streets: graz/streets.osm.pbf, districts: graz/streets.osm.pbf}
        - {name: linz, photos: s3://photos/linz, streets: linz.geojson, set: {labels.language: de}}
      adapter: per city

The table may be a file of its own, CSV or Parquet: `cities: cities.csv`, with the same columns; other columns are settings of
the city, such as `labels.language`. Everything else in the file is a setting of every city.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from addressvlm.config import Config, read_sources, set_key, validate
from addressvlm.config.base import Section
from addressvlm.config.provenance import error_sentences
from addressvlm.dataset.readers.rows import clean_text
from addressvlm.dataset.readers.table import open_table
from addressvlm.errors import InputError
from addressvlm.storage.remote_path import AnyPath, is_remote, path_of
from addressvlm.storage.run_dir import storage_dir

JOINT = "joint"  # the run of one model of all cities
SOURCES = ("manifest", "photos", "streets", "districts", "toy")  # of a city, as in the section `city`


class WorldCity(Section):
    """A row of the table: a city's files, and settings that differ from those of the others."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")  # of its run
    manifest: str | None = None
    photos: str | None = None
    streets: str | None = None
    districts: str | None = None
    imagery: str | None = None
    toy: str | None = None
    weight: float = Field(1.0, gt=0)  # for a joint model: epochs of this city in one epoch
    set: dict[str, Any] = {}  # key -> value, as --set


class WorldConfig(Section):
    """The section `world`. Limits of `labels` (budget, rates, concurrency) are those of all cities together."""

    cities: list[WorldCity] = Field(min_length=1)
    adapter: Literal["per city", "joint"] = "per city"
    preparing: int = Field(2, ge=1)  # cities that are prepared and grafted at a time
    training: int | None = Field(None, ge=1)  # cities trained or evaluated at a time; default: as many as the cluster holds

    @field_validator("cities", mode="before")
    @classmethod
    def _read_table(cls, value: Any) -> Any:
        return read_cities(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class World:
    """All cities with their own configurations, and the folder of their runs."""

    name: str
    settings: WorldConfig
    base: Config
    cities: dict[str, Config]

    @property
    def folder(self) -> AnyPath:
        """`<storage>/<name>`; the run of a city is `<storage>/<name>/<city>`."""
        return storage_dir(self.base.storage)

    @property
    def joint(self) -> Config:
        """The configuration of a model of all cities."""
        weights = {city.name: city.weight for city in self.settings.cities}
        config = self.base.model_copy(update={"name": JOINT})
        return config.model_copy(update={"train": config.train.model_copy(update={"cities": weights})})


def load_world(source: str | Path, sets: Iterable[str] = (), environment: Mapping[str, str] | None = None) -> World | None:
    """Read a file with a section `world`; None if it has none.

    Raises:
        InputError: the table can't be read, two cities have the same name, or a setting is wrong.
    """
    path = Path(source)
    tree, sources = read_sources(source, sets, *([environment] if environment is not None else []))
    if "world" not in tree:
        return None
    try:
        settings = WorldConfig.model_validate(tree.pop("world"))
    except ValidationError as error:
        raise InputError(error_sentences(error.errors(), WorldConfig, f"{path}, world", [])) from None
    names = Counter(city.name for city in settings.cities)
    if same := [name for name, count in names.items() if count > 1 or name == JOINT]:
        what = "is the run of the model of all" if same[0] == JOINT else "stands there twice"
        raise InputError(f"{path}, world.cities: '{same[0]}' {what}: give each city a name of its own.")
    name = str(tree.get("name") or path.stem)
    tree |= {"name": name, "storage": f"{tree.get('storage', Config().storage)}/{name}"}
    base = validate(copy.deepcopy(tree), str(path), sources)
    cities = {city.name: _city_config(tree, city, str(path)) for city in settings.cities}
    return World(name, settings, base, cities)


def _city_config(tree: dict[str, Any], city: WorldCity, where: str) -> Config:
    own, files = copy.deepcopy(tree), {key: value for key in SOURCES if (value := getattr(city, key)) is not None}
    shared = {key: value for key, value in (own.get("city") or {}).items() if key not in ("name", "toy", "manifest", "photos")}
    own |= {"name": city.name, "city": {**shared, "name": city.name, **files}}
    if city.imagery is not None:
        own["tiles"] = {**(own.get("tiles") or {}), "imagery": city.imagery}
    for key, value in city.set.items():
        set_key(own, key.split("."), value)
    return validate(own, f"{where}, city '{city.name}'")


def require_files(config: Config) -> None:
    """Stop with an InputError if a local file of a city is not there."""
    for key in ("manifest", "photos", "streets", "districts"):
        file = getattr(config.city, key)
        if file and not is_remote(file) and not path_of(file).exists():
            raise InputError(f"city '{config.name}': there is no {key} {file}: fix its path in the table of cities.")


def read_cities(file: str) -> list[dict[str, Any]]:
    """The rows of a table of cities; columns without a meaning of their own become settings of the city.

    Raises:
        InputError: it can't be read.
    """
    if not path_of(file).exists():
        raise InputError(f"the table of cities {file} can't be read (no such file): give a CSV or Parquet file.")
    rows = [(number, row) for number, row in enumerate(open_table(file, "the table of cities").rows, 1) if row]
    for number, row in rows:
        if "PROBLEM" in row:
            raise InputError(f"the table of cities {file}, row {number}: {row['PROBLEM']}.")
    if not rows or "name" not in rows[0][1]:
        raise InputError(f"the table of cities {file} has no rows with a column `name`: add it.")
    own = set(WorldCity.model_fields) - {"set"}
    kept = [{key: value for key, value in row.items() if key and clean_text(value)} for _, row in rows]
    return [{**{key: row[key] for key in own & row.keys()}, "set": {key: row[key] for key in row.keys() - own}} for row in kept]
