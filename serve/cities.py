"""The served cities: one merged model, or adapters of several cities on one base; and what the front shows of each."""

import gzip
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import shapely

from addressvlm.answers.calibration import Calibration
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE, Gazetteer
from addressvlm.storage.remote_path import AnyPath, RemotePath, list_files, path_of
from addressvlm.storage.run_dir import LAST_MODEL_FILE, storage_dir
from addressvlm.storage.tables import iter_rows
from serve.errors import ApiError
from serve.schemas import CityAnswer
from serve.settings import ServiceSettings, SettingsError

SERVED_SYSTEM = "addressvlm"  # of a run with several trained systems
MAX_SAMPLES = 6
MAX_SAMPLE_ROWS = 200  # that are searched for samples
MAX_SAMPLE_BYTES = 1_000_000
JPEG = b"\xff\xd8"


@dataclass(frozen=True)
class City:
    """A city of the service.

    Attributes:
        id: its name in requests.
        name: from its gazetteer; empty for a model without gazetteer.
        model: the model's name in chat requests.
        folder: a merged model, or the folder with the gazetteer of the adapter.
        adapter: a PEFT adapter on the common base; None for a merged model.
    """

    id: str
    name: str
    model: str
    folder: AnyPath
    adapter: AnyPath | None = None

    def gazetteer(self) -> Gazetteer | None:
        """The streets that its answers can name."""
        path = self.folder / GAZETTEER_FILE
        return Gazetteer.load(path) if path.is_file() else None


def find_cities(settings: ServiceSettings) -> list[City]:
    """The cities of the settings `model` or `cities`, else of the last training.

    Raises:
        InputError: there is no such model, or two cities have the same id.
    """
    if not settings.cities:
        return [_city(model_folder(settings), None)]
    systems = [system for setting in settings.cities for system in _trained_systems(_absolute(setting))]
    cities: dict[str, City] = {}
    for system in dict.fromkeys(systems):
        folders = [system / "merged", system / "adapter", system.parents[1] / "photos"]
        with_gazetteer = [folder for folder in folders if (folder / GAZETTEER_FILE).is_file()]
        if not with_gazetteer:
            raise SettingsError(
                f"no {GAZETTEER_FILE} for {system} in {' or '.join(map(str, folders))}: run its training again."
            )
        city = _city(with_gazetteer[0], system / "adapter")
        other = cities.setdefault(city.id, city)
        if other is not city:
            raise SettingsError(f"{other.adapter} and {city.adapter} are both of the city '{city.id}': give one of them.")
    return list(cities.values())


def pick_city(cities: Sequence[City], name: str | None) -> City:
    """The city of a request, by id or name. ApiError: 404 there is no such city, 400 no name and several cities."""
    listed = ", ".join(f"'{city.id}'" for city in cities)
    if not name:
        if len(cities) == 1:
            return cities[0]
        raise ApiError(400, f"Say which city: one of {listed}.", param="city")
    for city in cities:
        if name.casefold() in (city.id.casefold(), city.name.casefold()):
            return city
    raise ApiError(404, f"No city '{name[:100]}' here, this service has {listed}.", param="city", code="city_not_found")


def base_model(cities: Sequence[City], base: str | None) -> str:
    """The base model of all adapters, a folder or a hub name: the setting `base`, else the one they were trained on."""
    if base:
        return base
    bases: dict[str, AnyPath] = {}
    for city in cities:
        file = (city.adapter or Path()) / "adapter_config.json"
        try:
            bases.setdefault(json.loads(file.read_text())["base_model_name_or_path"], file)
        except (OSError, ValueError, KeyError) as error:
            raise SettingsError(f"{file} can't be read ({type(error).__name__}): train the city again.") from None
    if len(bases) > 1:
        (first, first_file), (second, second_file) = list(bases.items())[:2]
        raise SettingsError(
            f"{first_file} is on the base {first} and {second_file} on {second}: serve them apart, or give the one with base=."
        )
    base = next(iter(bases))
    if os.path.isabs(base) and not os.path.isdir(base):
        raise SettingsError(f"the base model {base} of {bases[base].parent} is not there: give its folder with base=.")
    return base


def model_folder(settings: ServiceSettings) -> AnyPath:
    """The folder of the one model to serve, absolute: the given one or its subfolder `merged`."""
    folder = _last_model(settings.storage) if settings.model is None else _absolute(settings.model)
    if not folder.is_dir():
        raise SettingsError(f"no model folder {folder}: give model=<folder of a trained model>, for instance …/merged.")
    for candidate in (folder, folder / "merged"):
        if (candidate / "config.json").is_file():
            return candidate
    if (folder / "adapter_config.json").is_file():
        raise SettingsError(f"{folder} is an adapter without its base: give the folder `merged` beside it, or cities=.")
    raise SettingsError(f"{folder} is not a model (it has no config.json): give a folder that transformers loads.")


def _absolute(setting: str) -> AnyPath:
    path = path_of(setting)
    return path if isinstance(path, RemotePath) else Path(os.path.abspath(path))


def _city(folder: AnyPath, adapter: AnyPath | None) -> City:
    gazetteer = folder / GAZETTEER_FILE
    name = str(json.loads(gazetteer.read_text(encoding="utf-8")).get("city") or "") if gazetteer.is_file() else ""
    model_path = adapter or folder
    model = model_path.name  # the name that callers see; `<run>/<system>` for a model of a run
    if model in ("merged", "adapter") and model_path.parent.parent.name == "models":
        model = f"{model_path.parents[2].name}/{model_path.parent.name}"
    return City(re.sub(r"\W+", "-", name.lower()).strip("-") or model, name, model, folder, adapter)


def _trained_systems(path: AnyPath) -> list[AnyPath]:
    """Trained systems with an adapter: the folder itself, those of a run, or those of the runs in a folder."""
    if (path / "adapter" / "adapter_config.json").is_file():
        return [path]
    pattern = f"models/{SERVED_SYSTEM}/adapter/adapter_config.json"
    files = sorted(path.glob(pattern)) or sorted(path.glob(f"*/{pattern}"))
    if not files:
        raise SettingsError(
            f"{path} holds no adapter of a city (…/models/{SERVED_SYSTEM}/adapter): give a run or a folder of runs."
        )
    return [file.parents[1] for file in files]


def _last_model(storage: str) -> AnyPath:
    """The model that the newest `last-model` file points to, among the runs here and those of submitted jobs."""
    folders = dict.fromkeys([storage_dir(storage), Path.home() / "addressvlm" / "runs"])
    pointers = [folder / LAST_MODEL_FILE for folder in folders if (folder / LAST_MODEL_FILE).is_file()]
    if not pointers:
        raise SettingsError(
            f"no trained model in {' or '.join(map(str, folders))}: run `ray job submit ray_jobs/train.py` first, "
            "or give one with model=<folder>."
        )
    newest = max(pointers, key=lambda pointer: pointer.stat().st_mtime)
    model = path_of(newest.read_text().strip())
    if not model.is_dir():
        raise SettingsError(f"{newest} points to {model}, which is not there: train again, or give model=<folder>.")
    return model


class CityData:
    """A city's gazetteer and map, the calibration of its model, and photos of it; each loaded on first use."""

    def __init__(self, city: City) -> None:
        self.city = city

    @cached_property
    def gazetteer(self) -> Gazetteer | None:
        """The streets that answers can name."""
        return self.city.gazetteer()

    @cached_property
    def calibration(self) -> Calibration:
        """What the model's confidence was checked on."""
        return Calibration.load(self.city.folder)

    @cached_property
    def samples(self) -> list[bytes]:
        """Photos to try, as JPEG: one of each street, of the test split of the run that the model is from, if that is there."""
        folders = [self.city.folder, *(parent / "photos" for parent in list(self.city.folder.parents)[:3])]
        with_photos = [folder for folder in folders if list_files(folder, "test-*.parquet")]
        photos: dict[str, bytes] = {}
        rows = iter_rows(with_photos[0], "test", ["street", "image"]) if with_photos else ()
        for row in itertools.islice(rows, MAX_SAMPLE_ROWS):
            data = (row["image"] or {}).get("bytes") or b""
            if data.startswith(JPEG) and len(data) <= MAX_SAMPLE_BYTES:
                photos.setdefault(row["street"], data)
            if len(photos) == MAX_SAMPLES:
                break
        return list(photos.values())

    @cached_property
    def geojson(self) -> bytes:
        """The city's map. ApiError: 404 the model has no gazetteer."""
        file = self.city.folder / GAZETTEER_FILE
        if not file.is_file():
            raise ApiError(404, "This model has no map: its folder holds no gazetteer.geojson.", code="no_map")
        tree = json.loads(file.read_text(encoding="utf-8"))
        return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()

    @cached_property
    def geojson_gzip(self) -> bytes:
        """The map compressed, once for all requests."""
        return gzip.compress(self.geojson, mtime=0)

    @cached_property
    def summary(self) -> CityAnswer:
        """The city's entry in `/v1/cities`."""
        gazetteer, city = self.gazetteer or Gazetteer([]), self.city
        counts = {kind: len(getattr(gazetteer, kind)) for kind in ("streets", "districts", "addresses")}
        return CityAnswer(id=city.id, name=city.name, model=city.model, **counts)

    @cached_property
    def streets(self) -> dict[str, dict[str, Any]]:
        """Street -> {lat, lon, geometry}: a point on it in degrees, and its shape as GeoJSON geometry."""
        streets = {}
        for name, shape in self.gazetteer.geometry.items() if self.gazetteer else ():
            longest = max(shapely.get_parts(shape).tolist(), key=lambda part: part.length)
            line = longest.geom_type in ("LineString", "LinearRing")
            point = longest.interpolate(0.5, normalized=True) if line else shape.representative_point()
            streets[name] = {"lat": point.y, "lon": point.x, "geometry": shapely.geometry.mapping(shape)}
        return streets

    def candidate(self, street: str, district: str, probability: float) -> dict[str, Any]:
        """A `serve.schemas.CandidateAnswer` as a dict."""
        unknown = {"lat": None, "lon": None, "geometry": None}
        return {"street": street, "district": district, "probability": probability, **self.streets.get(street, unknown)}
