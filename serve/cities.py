"""Which models are served: one merged model, or the adapters of several cities on one base."""

import gzip
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import shapely
from shapely.geometry.base import BaseGeometry

from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE, Gazetteer
from addressvlm.storage.remote_path import AnyPath, RemotePath, path_of
from addressvlm.storage.run_dir import LAST_MODEL_FILE, storage_dir
from serve.errors import ApiError
from serve.settings import ServiceSettings, SettingsError

SYSTEM = "addressvlm"  # of a run with several trained systems, the one that is served


@dataclass(frozen=True)
class City:
    """A city that is served.

    Attributes:
        id: what callers name it by.
        name: as its gazetteer has it; empty for a model without gazetteer.
        model: the model's name in chat requests.
        folder: a merged model, or the folder with the gazetteer that belongs to the adapter.
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
    """What `model`, `cities` or else the last training means.

    Raises:
        InputError: there is no such model, or two of the cities have the same name.
    """
    if not settings.cities:
        folder = model_folder(settings)
        return [_city(folder, None)]
    systems = [system for given in settings.cities for system in _systems(_absolute(given))]
    cities = [_city(_gazetteer_folder(system), system / "adapter") for system in dict.fromkeys(systems)]
    for number, city in enumerate(cities):
        for other in cities[:number]:
            if other.id == city.id:
                raise SettingsError(f"{other.adapter} and {city.adapter} are both of the city '{city.id}': give one of them.")
    return cities


def pick_city(cities: Sequence[City], wanted: str | None) -> City:
    """The city that a request means, by id or name; the only one need not be named.

    Raises:
        ApiError: 404 there is no such city, 400 none is named and there are several.
    """
    listed = ", ".join(f"'{city.id}'" for city in cities)
    if not wanted:
        if len(cities) == 1:
            return cities[0]
        raise ApiError(400, f"Say which city: one of {listed}.", param="city")
    for city in cities:
        if wanted.casefold() in (city.id.casefold(), city.name.casefold()):
            return city
    raise ApiError(404, f"No city '{wanted[:100]}' here, this service has {listed}.", param="city", code="city_not_found")


def base_of(cities: Sequence[City], given: str | None) -> str:
    """The base model that all adapters were trained on: a folder or a hub name.

    Raises:
        InputError: an adapter can't be read, they differ in their base, or it is not where it was.
    """
    if given:
        return given
    bases: dict[str, AnyPath] = {}
    for city in cities:
        file = (city.adapter or Path()) / "adapter_config.json"
        try:
            bases.setdefault(json.loads(file.read_text())["base_model_name_or_path"], file)
        except (OSError, ValueError, KeyError) as error:
            raise SettingsError(f"{file} can't be read ({type(error).__name__}): train the city again.") from None
    if len(bases) > 1:
        (one, here), (other, there) = list(bases.items())[:2]
        raise SettingsError(
            f"{here} is on the base {one} and {there} on {other}: serve them apart, or give the one with base=."
        )
    base = next(iter(bases))
    if os.path.isabs(base) and not os.path.isdir(base):
        raise SettingsError(f"the base model {base} of {bases[base].parent} is not there: give its folder with base=.")
    return base


def model_folder(settings: ServiceSettings) -> AnyPath:
    """The folder of the one model to serve, absolute.

    Raises:
        InputError: there is none, or it holds no model.
    """
    if settings.model is None:
        return _model_in(_last_model(settings.storage))
    return _model_in(_absolute(settings.model))


def _absolute(given: str) -> AnyPath:
    place = path_of(given)
    return place if isinstance(place, RemotePath) else Path(os.path.abspath(place))


def model_name(folder: AnyPath) -> str:
    """The name that callers see: `<run>/<system>` for a model of ours, the folder's name for any other."""
    if folder.name in ("merged", "adapter") and folder.parent.parent.name == "models":
        return f"{folder.parents[2].name}/{folder.parent.name}"
    return folder.name


def _city(folder: AnyPath, adapter: AnyPath | None) -> City:
    gazetteer = folder / GAZETTEER_FILE
    name = str(json.loads(gazetteer.read_text(encoding="utf-8")).get("city") or "") if gazetteer.is_file() else ""
    model = model_name(adapter or folder)
    return City(re.sub(r"\W+", "-", name.lower()).strip("-") or model, name, model, folder, adapter)


def _systems(place: AnyPath) -> Iterator[AnyPath]:
    """Trained systems with an adapter: the folder itself, those of a run, or those of the runs in a folder."""
    if (place / "adapter" / "adapter_config.json").is_file():
        yield place
        return
    found = sorted(place.glob(f"models/{SYSTEM}/adapter/adapter_config.json")) or sorted(
        place.glob(f"*/models/{SYSTEM}/adapter/adapter_config.json")
    )
    if not found:
        raise SettingsError(f"{place} holds no adapter of a city (…/models/{SYSTEM}/adapter): give a run or a folder of runs.")
    yield from (file.parents[1] for file in found)


def _gazetteer_folder(system: AnyPath) -> AnyPath:
    places = [system / "merged", system / "adapter", system.parents[1] / "photos"]
    for place in places:
        if (place / GAZETTEER_FILE).is_file():
            return place
    raise SettingsError(f"no {GAZETTEER_FILE} for {system} in {' or '.join(map(str, places))}: run its training again.")


def _last_model(runs: str) -> AnyPath:
    """Where the newest `last-model` file points, among the runs here and those of submitted jobs."""
    places = dict.fromkeys([storage_dir(runs), Path.home() / "addressvlm" / "runs"])
    pointers = [place / LAST_MODEL_FILE for place in places if (place / LAST_MODEL_FILE).is_file()]
    if not pointers:
        raise SettingsError(
            f"no trained model in {' or '.join(map(str, places))}: run `ray job submit ray_jobs/train.py` first, "
            "or give one with model=<folder>."
        )
    newest = max(pointers, key=lambda pointer: pointer.stat().st_mtime)
    folder = path_of(newest.read_text().strip())
    if not folder.is_dir():
        raise SettingsError(f"{newest} points to {folder}, which is not there: train again, or give model=<folder>.")
    return folder


def _model_in(folder: AnyPath) -> AnyPath:
    """The folder itself, or its `merged`, if it holds a model that transformers loads."""
    if not folder.is_dir():
        raise SettingsError(f"no model folder {folder}: give model=<folder of a trained model>, for instance …/merged.")
    for candidate in (folder, folder / "merged"):
        if (candidate / "config.json").is_file():
            return candidate
    if (folder / "adapter_config.json").is_file():
        raise SettingsError(f"{folder} is an adapter without its base: give the folder `merged` beside it, or cities=.")
    raise SettingsError(f"{folder} is not a model (it has no config.json): give a folder that transformers loads.")


class CityGeometry:
    """The gazetteer of a city, read when it is first needed."""

    def __init__(self, city: City) -> None:
        self.city = city

    @cached_property
    def geojson(self) -> bytes:
        """The city's map as it is sent.

        Raises:
            ApiError: 404 the model has no gazetteer.
        """
        file = self.city.folder / GAZETTEER_FILE
        if not file.is_file():
            raise ApiError(404, "This model has no map: its folder holds no gazetteer.geojson.", code="no_map")
        tree = json.loads(file.read_text(encoding="utf-8"))
        return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()

    @cached_property
    def zipped(self) -> bytes:
        """The map compressed, once for all requests."""
        return gzip.compress(self.geojson, mtime=0)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What `/v1/cities` tells of it."""
        gazetteer = self.city.gazetteer()
        return {
            "id": self.city.id,
            "name": self.city.name,
            "model": self.city.model,
            "streets": len(gazetteer.streets) if gazetteer else 0,
            "districts": len(gazetteer.districts) if gazetteer else 0,
            "addresses": len(gazetteer.addresses) if gazetteer else 0,
        }

    @cached_property
    def streets(self) -> dict[str, dict[str, Any]]:
        """Street -> its GeoJSON geometry, and a point on it."""
        gazetteer = self.city.gazetteer()
        return {name: _placed(shape) for name, shape in gazetteer.geometry.items()} if gazetteer else {}

    def candidate(self, street: str, district: str, probability: float) -> dict[str, Any]:
        """A candidate as it is sent."""
        nowhere = {"lat": None, "lon": None, "geometry": None}
        return {"street": street, "district": district, "probability": probability, **self.streets.get(street, nowhere)}


def _placed(shape: BaseGeometry) -> dict[str, Any]:
    longest = max(shapely.get_parts(shape).tolist(), key=lambda part: part.length)
    line = longest.geom_type in ("LineString", "LinearRing")
    point = longest.interpolate(0.5, normalized=True) if line else shape.representative_point()
    return {"lat": point.y, "lon": point.x, "geometry": shapely.geometry.mapping(shape)}
