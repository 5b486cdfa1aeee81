"""The rows of a city dataset: list photos with their addresses, check the files, add split and conversation."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from addressvlm.config import Config
from addressvlm.config.city import CityConfig
from addressvlm.dataset import readers
from addressvlm.dataset.geocoding import Place
from addressvlm.dataset.photos import Photo, check_photo
from addressvlm.dataset.streets import StreetMap
from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.questions import evaluation_rounds, training_rounds
from addressvlm.storage import remote_path, tables
from addressvlm.storage.files import local_folder_for, upload
from addressvlm.storage.remote_path import path_of
from addressvlm.storage.run_dir import Run, storage_dir
from addressvlm.storage.shards import Rows, ShardResult, files_fingerprint

SPLITS = ("train", "val", "test")
LISTING_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),  # of the photo among those with an address
        ("row", pa.int64()),
        ("file", pa.string()),
        ("view", pa.float64()),
        *[field for field in tables.PHOTOS if field.name not in ("image", "rounds")],
    ]
)
PLACE_COLUMNS = ("sub_street", "cross_street", "distance_m", "margin_m", "second_street", "ambiguous")
CHECKED_SCHEMA = pa.schema([*LISTING_SCHEMA, tables.PHOTOS.field("image")])


def listing_rows(
    photos: Iterable[Photo], places: Mapping[str, Place], answers: Mapping[str, Place]
) -> Iterator[dict[str, Any]]:
    """Rows of LISTING_SCHEMA: all of the photos but their pixels; `answers` are the places from `answer_places`."""
    for index, photo in enumerate(photos):
        place, answer = places[photo.place], answers[photo.place]
        yield {
            "index": index,
            **{field: getattr(photo, field) for field in ("row", "file", "view", "id", "place", "lat", "lon", "heading")},
            "street": answer.address.street,
            "main_street": place.address.street,
            "district": place.address.district,
            "address_source": place.source,
            **{field: getattr(place, field) for field in PLACE_COLUMNS},
        }


def check_photos(folder: str, city: str, rows: Rows) -> ShardResult:
    """Rows of LISTING_SCHEMA -> rows of CHECKED_SCHEMA in the split `photos`; photos that can't be used become rejects.

    Args:
        folder: path or URI that files are relative to.
        city: a CityConfig as JSON.
    """
    config = _parse_city(city)
    fov_deg, pixels = (config.panorama.fov_deg, config.panorama.pixels) if config.panorama else (None, None)
    good, rejects = [], []
    for row in rows:
        checked = check_photo(remote_path.join(folder, row["file"]), config.max_megapixels, row["view"], fov_deg, pixels)
        if isinstance(checked, bytes):
            good.append({**row, "image": {"bytes": checked, "path": row["file"]}})
        else:
            rejects.append({"file": row["file"], "row": row["row"], "id": row["id"], "reason": checked})
    return ShardResult({"photos": good}, rejects)


def photos_fingerprint(folder: str, rows: Iterable[dict[str, Any]]) -> str:
    """Fingerprint of the files of rows of LISTING_SCHEMA."""
    return files_fingerprint(remote_path.join(folder, row["file"]) for row in rows)


def add_conversations(part: NDArray[np.int8], gazetteer: tuple[str, str], city: str, seed: int, rows: Rows) -> ShardResult:
    """Rows of CHECKED_SCHEMA -> rows of `tables.PHOTOS` in their splits, with conversations.

    The conversation about a photo depends on the seed and the photo's id alone, besides address and gazetteer.

    Args:
        part: (photos,) position of the photo's split in SPLITS by `index`, -1 if it is in none.
        gazetteer: path and fingerprint of the gazetteer that wrong names are drawn from.
        city: a CityConfig as JSON.
    """
    names, config = _load_gazetteer(*gazetteer), _parse_city(city)
    splits: dict[str, Rows] = {split: [] for split in SPLITS}
    for row in rows:
        if part[row["index"]] < 0:
            continue
        split = SPLITS[part[row["index"]]]
        address, rng = Address(row["street"], row["district"]), random.Random(f"{seed}:{row['id']}")
        # may be right as well across a corner or a border, so no wrong answers
        uncertain = {
            *names.within(row["lat"], row["lon"], config.ambiguous_m),
            *names.within(row["lat"], row["lon"], config.ambiguous_m, "district"),
        }
        if row["ambiguous"]:
            uncertain.add(row["second_street"])
        if split == "train":
            rounds = training_rounds(address, names, rng, config.rounds, config.hard_negative_share, uncertain)
        else:
            rounds = evaluation_rounds(address, names, rng, config.hard_negative_share, uncertain)
        splits[split].append({**row, "rounds": rounds})
    return ShardResult(splits)


def answer_places(places: Mapping[str, Place], city: CityConfig) -> dict[str, Place]:
    """The places with the address that questions are about: with city.answer sub_street its street is the sub-street."""
    if city.answer == "street":
        return dict(places)
    return {i: replace(p, address=Address(p.sub_street or p.address.street, p.address.district)) for i, p in places.items()}


def build_gazetteer(
    city: CityConfig,
    streets: StreetMap,
    places: Mapping[str, Place],
    photos: Iterable[Photo],
    sub_streets: Mapping[str, BaseGeometry] | None = None,
    map_only: Iterable[Address] = (),
) -> Gazetteer:
    """The addresses of these photos, and those known from the map alone, with the shapes of their streets and districts.

    Args:
        places: from `answer_places`.
        sub_streets: shapes of sub-streets, where the addresses name them.
    """
    photo_places = [photo.place for photo in photos]
    trained = [places[place].address for place in sorted(set(photo_places))]
    addresses = [*trained, *map_only]
    return Gazetteer(
        addresses,
        {**streets.street_shapes([a.street for a in addresses]), **(sub_streets or {})},
        streets.district_shapes([a.district for a in addresses]),
        Counter(places[place].address.street for place in photo_places),
        Counter(a.street for a in trained),
        city.name,
        city.attribution,
        streets.variants,
    )


@lru_cache(maxsize=2)
def _load_gazetteer(path: str, fingerprint: str) -> Gazetteer:
    return Gazetteer.load(path_of(path))


@lru_cache(maxsize=2)
def _parse_city(city: str) -> CityConfig:
    return CityConfig.model_validate_json(city)


def resolve_city_files(config: Config, run: Run) -> Config:
    """The settings with all paths set; a toy city is drawn into the run's `input` folder unless it is there.

    Tiles of an XYZ server are shared by all runs of the storage.

    Raises:
        InputError: neither manifest nor photos are set, there is no such toy city, or the folder can't be written.
    """
    city, imagery = config.city, config.tiles.imagery
    if not city.toy:
        readers.source_path(city)
    else:
        paths = _draw_toy_city(city.toy, run)
        city = city.model_copy(update={key: paths[key] for key in ("manifest", "photos", "streets", "districts")})
        imagery = imagery or paths["imagery"]
    cache = config.tiles.cache or str(local_folder_for(storage_dir(config.storage)) / "tile-cache")
    tiles = config.tiles.model_copy(update={"cache": cache, "imagery": None if imagery == "none" else imagery})
    return config.model_copy(update={"city": city, "tiles": tiles})


def _draw_toy_city(name: str, run: Run) -> dict[str, str]:
    """The paths of a toy city's files; in a store they are drawn on this machine, and the manifest is uploaded last."""
    from addressvlm.demo.city import write_city

    folder = run.input / name
    if not (folder / "manifest.csv").is_file():
        print(f"prepare: drawing the toy city {name}", flush=True)
    try:
        if isinstance(folder, Path):
            return write_city(name, folder)
        local = local_folder_for(folder)
        paths = {key: Path(path) for key, path in write_city(name, local).items()}
        manifest = paths["manifest"]
        if not (folder / manifest.name).is_file():
            for file in sorted((f for f in local.rglob("*") if f.is_file()), key=lambda file: file == manifest):
                upload(file, folder / file.relative_to(local).as_posix())
        return {key: str(folder / path.name) for key, path in paths.items()}
    except OSError as error:
        raise InputError(f"{folder} can't be written ({error.strerror}): set storage to a folder with room.") from None
