"""From checked photos with addresses to the rows of a city dataset; every function works on some rows at a time."""

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
from addressvlm.questions import test_rounds, training_rounds
from addressvlm.storage import remote_path, tables
from addressvlm.storage.files import local_folder_for, upload
from addressvlm.storage.remote_path import RemotePath, path_of
from addressvlm.storage.run_dir import Run, storage_dir
from addressvlm.storage.shards import Rows, ShardResult, files_fingerprint

SPLITS = ("train", "val", "test")
LISTED = pa.schema(
    [
        ("index", pa.int64()),  # of the photo among those with an address
        ("row", pa.int64()),
        ("file", pa.string()),
        ("view", pa.float64()),
        *[field for field in tables.PHOTOS if field.name not in ("image", "rounds")],
    ]
)
CHECKED = pa.schema([*LISTED, tables.PHOTOS.field("image")])


def photo_table(photos: Iterable[Photo], places: Mapping[str, Place], answers: Mapping[str, Place]) -> Iterator[dict[str, Any]]:
    """Rows of LISTED: everything about the photos but their pixels; `answers` are the places as `answering` gives them."""
    for index, photo in enumerate(photos):
        place, answer = places[photo.place], answers[photo.place]
        yield {
            "index": index,
            "row": photo.row,
            "file": photo.file,
            "view": photo.view,
            "id": photo.id,
            "place": photo.place,
            "lat": photo.lat,
            "lon": photo.lon,
            "heading": photo.heading,
            "street": answer.address.street,
            "main_street": place.address.street,
            "district": place.address.district,
            "sub_street": place.sub_street,
            "address_source": place.source,
            "cross_street": place.cross_street,
            "distance_m": place.distance_m,
            "margin_m": place.margin_m,
            "second_street": place.second_street,
            "ambiguous": place.ambiguous,
        }


def check_photos(base: str, city: str, rows: Rows) -> ShardResult:
    """Rows of LISTED -> rows of CHECKED in the split `photos`; photos that can't be used are rejects.

    Args:
        base: folder or URI that files are relative to.
        city: a CityConfig as JSON.
    """
    config = _city(city)
    fov_deg, pixels = (config.panorama.fov_deg, config.panorama.pixels) if config.panorama else (None, None)
    good, rejects = [], []
    for row in rows:
        checked = check_photo(remote_path.join(base, row["file"]), config.max_megapixels, row["view"], fov_deg, pixels)
        if isinstance(checked, bytes):
            good.append({**row, "image": {"bytes": checked, "path": row["file"]}})
        else:
            rejects.append({"file": row["file"], "row": row["row"], "id": row["id"], "reason": checked})
    return ShardResult({"photos": good}, rejects)


def files_of(base: str, rows: Iterable[dict[str, Any]]) -> str:
    """Fingerprint of the files that rows of LISTED name."""
    return files_fingerprint(remote_path.join(base, row["file"]) for row in rows)


def finish_rows(part: NDArray[np.int8], gazetteer: tuple[str, str], city: str, seed: int, rows: Rows) -> ShardResult:
    """Rows of CHECKED -> rows of `tables.PHOTOS` in their splits, with conversations.

    The conversation about a photo depends on the seed and the photo's id alone, besides address and gazetteer.

    Args:
        part: (photos,) position of the photo's split in SPLITS by `index`, -1 if it is in none.
        gazetteer: path and fingerprint of where the wrong names come from.
        city: a CityConfig as JSON.
    """
    names, config = _kept_gazetteer(*gazetteer), _city(city)
    made: dict[str, Rows] = {split: [] for split in SPLITS}
    for row in rows:
        if part[row["index"]] < 0:
            continue
        split = SPLITS[part[row["index"]]]
        address, rng = Address(row["street"], row["district"]), random.Random(f"{seed}:{row['id']}")
        doubtful = names.around(row["lat"], row["lon"], config.ambiguous_m)  # as near to the camera as an ambiguous street is
        if row["ambiguous"]:
            doubtful.add(row["second_street"])
        if split == "train":
            rounds = training_rounds(address, names, rng, config.rounds, config.hard_negative_share, doubtful)
        else:
            rounds = test_rounds(address, names, rng, config.hard_negative_share, doubtful)
        made[split].append({**row, "rounds": rounds})
    return ShardResult(made)


def answering(places: Mapping[str, Place], city: CityConfig) -> dict[str, Place]:
    """The places with the address that questions are about: that of the sub-street where the settings say so."""
    if city.answer == "street":
        return dict(places)
    return {i: replace(p, address=Address(p.sub_street or p.address.street, p.address.district)) for i, p in places.items()}


def gazetteer_of(
    city: CityConfig,
    streets: StreetMap,
    places: Mapping[str, Place],
    photos: Iterable[Photo],
    sub_streets: Mapping[str, BaseGeometry] | None = None,
) -> Gazetteer:
    """The addresses of these photos with the shapes of their streets and districts.

    Args:
        places: see `answering`.
        sub_streets: shapes of sub-streets, where the addresses name them.
    """
    photos_at = Counter(photo.place for photo in photos)
    addresses = [places[place].address for place in sorted(photos_at)]
    on_street: Counter[str] = Counter()
    for place, count in photos_at.items():
        on_street[places[place].address.street] += count
    return Gazetteer(
        addresses,
        {**streets.street_shapes([a.street for a in addresses]), **(sub_streets or {})},
        streets.district_shapes([a.district for a in addresses]),
        on_street,
        Counter(a.street for a in addresses),
        city.name,
        city.attribution,
        streets.variants,
    )


@lru_cache(maxsize=2)
def _kept_gazetteer(path: str, fingerprint: str) -> Gazetteer:
    return Gazetteer.load(path_of(path))


@lru_cache(maxsize=2)
def _city(city: str) -> CityConfig:
    return CityConfig.model_validate_json(city)


NO_IMAGERY = "none"  # of tiles.imagery


def resolve_city_files(config: Config, run: Run) -> Config:
    """The settings with the paths filled in; a toy city is drawn into the run's `input` folder if it is not there.

    Tiles of an XYZ server are kept for all runs of the storage.

    Raises:
        InputError: neither manifest nor photos are set, there is no such toy city, or the folder can't be written.
    """
    cache = config.tiles.cache or str(local_folder_for(storage_dir(config.storage)) / "tile-cache")
    config = config.model_copy(update={"tiles": config.tiles.model_copy(update={"cache": cache})})
    if not config.city.toy:
        readers.source_path(config.city)
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


def _in_store(name: str, folder: RemotePath) -> dict[str, str]:
    """The paths of a toy city in a store; it is drawn on this machine, and its manifest is sent last."""
    from addressvlm.demo.city import write_city

    drawn = local_folder_for(folder)
    paths = {key: Path(path) for key, path in write_city(name, drawn).items()}
    if not (folder / paths["manifest"].name).is_file():
        for file in sorted((f for f in drawn.rglob("*") if f.is_file()), key=lambda file: file == paths["manifest"]):
            upload(file, folder / file.relative_to(drawn).as_posix())
    return {key: str(folder / path.name) for key, path in paths.items()}
