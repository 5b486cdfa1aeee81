#!/usr/bin/env python
"""Photos and their table -> a city dataset: checked photos with addresses, split by place, with conversations.

    python ray_jobs/prepare.py --config demo
    python ray_jobs/prepare.py --config my_city.yaml --set city.split_buffer_m=30

Writes below <storage>/<name>: photos/{train,val,test}-*.parquet, photos/gazetteer.geojson, photos/roads.fgb (the roads on
tiles), the dataset card (photos/card.json, README.md, card.html), rejects/prepare.parquet (rows that can't be used, with the
reason), aside.parquet (places that are in no split, with the reason). Rerun it to resume.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
from shapely.geometry.base import BaseGeometry

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.config.city import CityConfig
from addressvlm.dataset import readers
from addressvlm.dataset.build import (
    CHECKED_SCHEMA,
    LISTING_SCHEMA,
    SPLITS,
    add_conversations,
    answer_places,
    build_gazetteer,
    check_photos,
    listing_rows,
    photos_fingerprint,
    resolve_city_files,
)
from addressvlm.dataset.card import count_questions, make_card, write_card
from addressvlm.dataset.geocoding import Place, assign_addresses, with_sub_streets
from addressvlm.dataset.photos import Photo
from addressvlm.dataset.split import PlaceSplit, split_places, thin_views
from addressvlm.dataset.streets import StreetMap
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.storage import tables
from addressvlm.storage.files import local_folder_for, remove_tree, write_parquet
from addressvlm.storage.remote_path import AnyPath
from addressvlm.storage.run_dir import WORK_DIR, Run, is_done, resumable_dir, storage_dir
from addressvlm.storage.shards import ShardWork, Summary, invalidate_shards, plan_shards, sources_fingerprint
from addressvlm.tiles.imagery import open_imagery
from addressvlm.tiles.roads import write_roads
from ray_jobs.common import connect, job_parser, load_config, run_main
from ray_jobs.progress import display
from ray_jobs.ray_data import run_shards

CHECK_SHARD = 256  # photos
WRITE_SHARD = 2048  # photos of all splits
CHECKED_FOLDER = f"{WORK_DIR}/checked"
ASIDE = pa.schema(
    [("place", pa.string()), ("lat", pa.float64()), ("lon", pa.float64()), ("street", pa.string()),
     ("district", pa.string()), ("reason", pa.string())]
)  # fmt: skip


@dataclass(frozen=True)
class CityData:
    """Photos with an address and their places, before the split.

    Attributes:
        places: by id.
        answers: the same with the addresses that questions are about.
        sub_streets: shapes of streets in `answers` that the map does not have.
        unusable: ids of photos that can't be read.
    """

    streets: StreetMap
    places: dict[str, Place]
    answers: dict[str, Place]
    sub_streets: dict[str, BaseGeometry]
    photos: list[Photo]
    unusable: set[str]
    rejects: list[dict[str, Any]]

    @property
    def usable(self) -> list[Photo]:
        return [photo for photo in self.photos if photo.id not in self.unusable]


def settings(config: Config) -> dict[str, Any]:
    """The settings that the dataset depends on; later steps add theirs to it."""
    return {"seed": config.seed, "city": config.city.model_dump()}


def run_step(config: Config, redo: bool = False) -> None:
    """Write the dataset of the run unless it is there.

    Raises:
        InputError: an input file can't be used, too many rows are bad, or the city is too small to be split.
    """
    run = Run(config)
    display.heading("prepare", "photos get addresses and questions, and are split by place")
    if is_done(run.photos, settings(config), redo):
        print("prepare: already done", flush=True)
        return
    with display.show("prepare: preparing the input files"):
        filled = resolve_city_files(config, run)
    imagery = filled.tiles.imagery and open_imagery(filled.tiles.imagery, "EPSG:3857", filled.tiles).attribution
    with resumable_dir(run.photos, settings(config), redo) as folder:
        data = _load_city(filled, folder, run.rejects / "prepare.parquet")
        split = split_places(
            [data.answers[p] for p in sorted({photo.place for photo in data.usable})], filled.city, config.seed, data.usable
        )
        for part in ("train", "test"):
            if not split.count(part):
                fix = {
                    "blocks": "or lower city.split_block_m and city.split_buffer_m, or set city.split_method to random",
                    "random": "or change city.split",
                    "table": "or name some in the table's column split",
                }[filled.city.split_method]
                raise InputError(
                    f"{len(split.part)} places give no place for the {part} split: add photos of more places, {fix}."
                )
        photos = thin_views(data.usable, split.part, filled.city.density.views, config.seed)
        train = [photo for photo in photos if split.part[photo.place] == "train"]
        gazetteer = build_gazetteer(filled.city, data.streets, data.answers, train, data.sub_streets, split.map_only)
        _write_tables(config, folder, data, photos, split, gazetteer)
        if data.streets.roads:
            lat, lon = np.array([(photo.lat, photo.lon) for photo in photos]).T
            write_roads(folder / run.roads.name, data.streets.roads, lat, lon)
        aside = [
            {"place": place.id, "lat": place.lat, "lon": place.lon, "street": place.address.street,
             "district": place.address.district, "reason": reason}
            for place, reason in ((data.places[i], reason) for i, reason in split.reason.items())
        ]  # fmt: skip
        write_parquet(pa.Table.from_pylist(aside, schema=ASIDE), run.folder / "aside.parquet")
        _write_card(filled, folder, data, photos, split, gazetteer, [imagery] if imagery else [])


def prepare_test(config: Config, folder: AnyPath, gazetteer: Gazetteer | None = None) -> None:
    """Make a dataset with a test split only, of all good rows of any manifest: photos that training never saw.

    The wrong names in its questions come from `gazetteer` (a model's own), or from the dataset's own addresses.

    Raises:
        InputError: an input file can't be used, or too many rows are bad.
    """
    filled = resolve_city_files(config, Run(config))
    with resumable_dir(folder, settings(config)) as work:
        data = _load_city(filled, work, folder.with_name(f"{folder.name}-rejects.parquet"))
        split = PlaceSplit({photo.place: "test" for photo in data.usable}, {}, None)
        gazetteer = gazetteer or build_gazetteer(filled.city, data.streets, data.answers, data.usable, data.sub_streets)
        _write_tables(config, work, data, data.usable, split, gazetteer)
        _write_card(filled, work, data, data.usable, split, gazetteer)


def _load_city(config: Config, folder: AnyPath, rejects_file: AnyPath) -> CityData:
    """Read the photos' table or folder, assign addresses, check the photos; bad rows go to the rejects table."""
    city, source = config.city, readers.source_path(config.city)
    with display.show("prepare: assigning addresses"):
        rows, rejects = readers.read(city)
        total = len(rows) + len(rejects)
        centre = (float(np.mean([p.lat for p in rows])), float(np.mean([p.lon for p in rows]))) if rows else (0.0, 0.0)
        streets = StreetMap.load(
            city.streets, city.districts, centre, district_source=city.district_source, admin_level=city.admin_level,
            language=city.language, unit=city.unit, encoding=city.encoding, with_roads=True,
        )  # fmt: skip
        print(f"prepare: {total:,} rows in {source}, {len(streets.street_names):,} named streets", flush=True)
        cache = local_folder_for(storage_dir(config.storage)) / "geocoder.sqlite"
        places, photos, without_address = assign_addresses(rows, streets, city, config.seed, cache)
        sub_streets = {}
        if city.answer == "sub_street" and city.partition is not None:
            sub_streets = with_sub_streets(places, photos, streets, city.partition)[1].shapes()
    answers = answer_places(places, city)
    summaries = _check_photos(photos, places, answers, city, folder)
    unusable = [reject for summary in summaries for reject in summary["rejects"]]
    rejects = sorted(rejects + without_address + unusable, key=lambda reject: reject["row"])
    write_parquet(pa.Table.from_pylist(rejects, schema=tables.REJECTS), rejects_file)
    data = CityData(streets, places, answers, sub_streets, photos, {reject["id"] for reject in unusable}, rejects)
    if len(rejects) > city.max_reject_share * total or not data.usable:
        invalidate_shards(folder / CHECKED_FOLDER, [summary for summary in summaries if summary["rejects"]])
        kinds = Counter(str(reject["reason"]).partition(":")[0] for reject in rejects)
        top = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(3))
        first = f"row {rejects[0]['row']}, {rejects[0]['reason']}"
        more = ", or raise city.max_reject_share" if data.usable else ""
        raise InputError(
            f"{len(rejects)} of {total} rows of {source} are bad ({top}; the first is {first}): fix the rows listed in "
            f"{rejects_file}{more}."
        )
    return data


def _check_photos(
    photos: list[Photo], places: dict[str, Place], answers: dict[str, Place], city: CityConfig, folder: AnyPath
) -> list[Summary]:
    """Read and check all photos on the cluster; the good ones go to a table of their own, the others become rejects."""
    if not photos:
        return []
    source = readers.photos_folder(city)
    function = partial(check_photos, source, city.model_dump_json())
    work = ShardWork(function, CHECKED_SCHEMA, row_fingerprint=partial(photos_fingerprint, source))
    listing = folder / WORK_DIR / "listed"
    remove_tree(listing)
    tables.write_table(listing, "photos", listing_rows(photos, places, answers), LISTING_SCHEMA, CHECK_SHARD)
    return run_shards("prepare: checking photos", plan_shards(listing, "photos", CHECK_SHARD), folder / CHECKED_FOLDER, work)


def _write_tables(
    config: Config, folder: AnyPath, data: CityData, photos: list[Photo], split: PlaceSplit, gazetteer: Gazetteer
) -> None:
    """Save the gazetteer and write the tables of all splits, conversations included, on the cluster."""
    file = folder / "gazetteer.geojson"
    gazetteer.save(file)
    part_of = {photo.id: split.part[photo.place] for photo in photos}
    position = {part: number for number, part in enumerate(SPLITS)}
    parts = np.array([position.get(part_of.get(photo.id, "none"), -1) for photo in data.photos], dtype=np.int8)
    names = sources_fingerprint(str(file))
    function = partial(add_conversations, parts, (str(file), names), config.city.model_dump_json(), config.seed)
    work = ShardWork(function, tables.PHOTOS, fingerprint=names + sha256(parts).hexdigest())
    run_shards("prepare: writing tables", plan_shards(folder / CHECKED_FOLDER, "photos", WRITE_SHARD), folder, work)


def _write_card(
    config: Config,
    folder: AnyPath,
    data: CityData,
    photos: list[Photo],
    split: PlaceSplit,
    gazetteer: Gazetteer,
    attribution: Sequence[str] = (),
) -> None:
    """Count the rows of the tables, write the card into their folder and print its main figures."""
    with display.show("prepare: drawing the dataset card"):
        questions = {part: count_questions(folder, part) for part in SPLITS}
        questions = {part: counts for part, counts in questions.items() if counts}
        card = make_card(config, data.places, photos, split, gazetteer, data.rejects, questions, attribution)
        used = {photo.place for photo in photos}
        write_card(folder, card, [place for place in data.places.values() if place.id in used], split, gazetteer)
    for part, n in card["splits"].items():
        print(f"prepare: {part:5} {n['photos']:,} photos of {n['places']:,} places, {n['streets']:,} streets", flush=True)
    if card.get("min_train_to_held_out_m") is not None:
        print(f"prepare: nearest training place to a held-out one: {card['min_train_to_held_out_m']:.1f} m", flush=True)
    rejected = card["rejected"]
    print(
        f"prepare: {sum(rejected.values()):,} rows rejected" + "".join(f"; {n:,} {k}" for k, n in rejected.items()), flush=True
    )


def main(argv: list[str] | None = None) -> None:
    args = job_parser(__doc__ or "").parse_args(argv)
    config = load_config(args)
    connect()
    run_step(config, args.redo)


if __name__ == "__main__":
    run_main(main)
