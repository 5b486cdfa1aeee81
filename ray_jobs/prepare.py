#!/usr/bin/env python
"""Photos and their table -> a city dataset: checked photos with addresses, split by place, with conversations.

    python ray_jobs/prepare.py --config demo
    python ray_jobs/prepare.py --config my_city.yaml --set city.guard_m=30

Writes below <storage>/<name>: photos/{train,val,test}-*.parquet, photos/gazetteer.geojson, photos/card.json,
rejects/prepare.parquet (rows that can't be used, with the reason), aside.parquet (places the distance guard keeps out).
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from addressvlm import InputError, tables
from addressvlm.addresses import Gazetteer
from addressvlm.cities import manifest
from addressvlm.cities.address import Place, assign
from addressvlm.cities.photos import check_photo
from addressvlm.cities.source import resolve
from addressvlm.cities.split import Split, split
from addressvlm.cities.streets import StreetMap
from addressvlm.config import CityConfig, Config
from addressvlm.questions import test_rounds, training_rounds
from addressvlm.run import Run, is_done, writing
from ray_jobs.common import arguments, configure, connect, job, progress
from ray_jobs.heartbeat import Heartbeat

PHOTOS_AT_A_TIME = 32
SPLITS = ("train", "val", "test")
STAGED = "staged"
CHECKED = pa.schema([("row", pa.int64()), ("bytes", pa.binary()), ("reason", pa.string())])
ASIDE = pa.schema(
    [("place", pa.string()), ("lat", pa.float64()), ("lon", pa.float64()), ("street", pa.string()),
     ("district", pa.string()), ("reason", pa.string())]
)  # fmt: skip


def settings(config: Config) -> dict[str, Any]:
    """What the dataset depends on; later steps add theirs to it."""
    return {"seed": config.seed, "city": config.city.model_dump()}


def run_step(config: Config, redo: bool = False) -> None:
    """Make the dataset of the run unless it is there.

    Raises:
        InputError: an input file can't be used, too many rows are bad, or the city is too small to be split.
    """
    run = Run(config)
    if is_done(run.photos, settings(config), redo):
        print("prepare: already done", flush=True)
        return
    with Heartbeat(lambda: "prepare: drawing, working", 10.0):
        filled = resolve(config, run)
    with writing(run.photos, settings(config)) as folder:
        streets, places, photos = _collect(filled.city, folder, run.rejects / "prepare.parquet")
        divided = split([places[p] for p in sorted({photo.place for photo in photos})], filled.city, config.seed)
        for part in ("train", "test"):
            if not divided.count(part):
                raise InputError(
                    f"{len(divided.part)} places are too few for a {part} split in blocks of {filled.city.block_m:g} m: add "
                    "photos of more places, or lower city.block_m and city.guard_m."
                )
        train = [photo for photo in photos if divided.part[photo.place] == "train"]
        gazetteer = _gazetteer(filled.city, streets, places, train)
        gazetteer.save(folder / run.gazetteer.name)
        for part in SPLITS:
            chosen = [photo for photo in photos if divided.part[photo.place] == part]
            tables.write(folder, part, _rows(config, folder, chosen, places, gazetteer, part), tables.PHOTOS)
        shutil.rmtree(folder / STAGED)
        _write_aside(run.folder / "aside.parquet", places, divided)
        rejects = pq.read_table(run.rejects / "prepare.parquet").to_pylist()
        card = _card(config, places, photos, divided.part, gazetteer, rejects)
        card |= {"aside": dict(Counter(divided.reason.values())), "min_train_to_held_out_m": divided.min_distance_m}
        (folder / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False), encoding="utf-8")
    _print_card(card)


def prepare_test(config: Config, folder: Path, gazetteer: Gazetteer | None = None) -> None:
    """Make a dataset with a test split only, of all good rows of any manifest: photos that training never saw.

    The wrong names in its questions come from `gazetteer` (a model's own), or from the dataset's own addresses.

    Raises:
        InputError: an input file can't be used, or too many rows are bad.
    """
    config = resolve(config, Run(config))
    with writing(folder, settings(config)) as inside:
        rejects_file = Path(folder).with_name(f"{Path(folder).name}-rejects.parquet")
        streets, places, photos = _collect(config.city, inside, rejects_file)
        gazetteer = gazetteer or _gazetteer(config.city, streets, places, photos)
        gazetteer.save(inside / "gazetteer.geojson")
        tables.write(inside, "test", _rows(config, inside, photos, places, gazetteer, "test"), tables.PHOTOS)
        shutil.rmtree(inside / STAGED)
        part = {photo.place: "test" for photo in photos}
        card = _card(config, places, photos, part, gazetteer, pq.read_table(rejects_file).to_pylist())
        (inside / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False), encoding="utf-8")
    _print_card(card)


def _collect(city: CityConfig, folder: Path, rejects_file: Path) -> tuple[StreetMap, dict[str, Place], list[manifest.Photo]]:
    """Read the manifest, give addresses, check the photos (kept in `folder/staged`); bad rows go to the rejects table."""
    rows, rejects = manifest.read(Path(str(city.manifest)).expanduser())
    total = len(rows) + len(rejects)
    centre = (float(np.mean([p.lat for p in rows])), float(np.mean([p.lon for p in rows]))) if rows else (0.0, 0.0)
    streets = StreetMap.load(city.streets, city.districts, centre)
    print(f"prepare: {total:,} rows in {city.manifest}, {len(streets.street_names):,} named streets", flush=True)
    places, photos, without_address = assign(rows, streets, city)
    bad = _stage_photos(photos, city, folder / STAGED)
    rejects += without_address + [photo.reject(bad[photo.row]) for photo in photos if photo.row in bad]
    rejects.sort(key=lambda reject: reject["row"])
    rejects_file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rejects, schema=tables.REJECTS), rejects_file)
    good = [photo for photo in photos if photo.row not in bad]
    if len(rejects) > city.max_reject_share * total or not good:
        top = ", ".join(f"{n} {kind}" for kind, n in Counter(_kind(r) for r in rejects).most_common(3))
        first = f"row {rejects[0]['row']}, {rejects[0]['reason']}"
        raise InputError(
            f"{len(rejects)} of {total} rows of {city.manifest} are bad ({top}; the first is {first}): mend the rows listed in "
            f"{rejects_file}, or raise city.max_reject_share."
        )
    return streets, places, good


def _stage_photos(photos: list[manifest.Photo], city: CityConfig, folder: Path) -> dict[int, str]:
    """Read and check all photos on the cluster; the good ones go to a table of their own, returns row -> reason of the bad."""
    bad: dict[int, str] = {}

    done = 0

    def good() -> Iterator[dict[str, Any]]:
        nonlocal done
        for batch in _checked(photos, city) if photos else ():
            done += len(batch)
            progress("prepare: photos checked", done, len(photos))
            for item in batch.to_pylist():
                if item["reason"] is None:
                    yield item
                else:
                    bad[item["row"]] = item["reason"]

    with Heartbeat(lambda: f"prepare: {done:,} photos checked so far, working"):
        tables.write(folder, "photos", good(), CHECKED)
    return bad


def _checked(photos: list[manifest.Photo], city: CityConfig) -> Iterator[pa.Table]:
    """Tables of CHECKED in the order of the manifest, made by Ray Data."""
    base = Path(city.photos or Path(str(city.manifest)).parent).expanduser().absolute()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    wanted = pa.table({"row": [p.row for p in photos], "file": [p.file for p in photos]})
    blocks = [wanted.slice(start, PHOTOS_AT_A_TIME) for start in range(0, len(photos), PHOTOS_AT_A_TIME)]
    options = {"base": str(base), "max_megapixels": city.max_megapixels}
    checked = ray.data.from_arrow(blocks).map_batches(check_batch, fn_kwargs=options, batch_format="pyarrow", batch_size=None)
    return iter(checked.iter_batches(batch_size=None, batch_format="pyarrow"))


def check_batch(batch: pa.Table, base: str, max_megapixels: float) -> pa.Table:
    """Columns row, file -> row, bytes (null if bad), reason (null if good)."""
    checked = [check_photo(Path(base) / file, max_megapixels) for file in batch["file"].to_pylist()]
    return pa.table(
        {
            "row": batch["row"],
            "bytes": [c if isinstance(c, bytes) else None for c in checked],
            "reason": [c if isinstance(c, str) else None for c in checked],
        },
        schema=CHECKED,
    )


def _rows(
    config: Config, folder: Path, photos: list[manifest.Photo], places: dict[str, Place], gazetteer: Gazetteer, part: str
) -> Iterator[dict[str, Any]]:
    """Rows of `tables.PHOTOS` for the chosen photos, in the order of the manifest."""
    chosen = {photo.row: photo for photo in photos}
    for staged in tables.rows(folder / STAGED, "photos") if chosen else ():
        photo = chosen.get(staged["row"])
        if photo is None:
            continue
        place = places[photo.place]
        rng = random.Random(f"{config.seed}:{photo.id}")
        if part == "train":
            rounds = training_rounds(place.address, gazetteer, rng, config.city.rounds)
        else:
            rounds = test_rounds(place.address, gazetteer, rng)
        yield {
            "id": photo.id,
            "place": photo.place,
            "lat": photo.lat,
            "lon": photo.lon,
            "heading": photo.heading,
            "image": {"bytes": staged["bytes"], "path": photo.file},
            "street": place.address.street,
            "district": place.address.district,
            "cross_street": place.cross_street,
            "distance_m": place.distance_m,
            "ambiguous": place.ambiguous,
            "rounds": rounds,
        }


def _gazetteer(city: CityConfig, streets: StreetMap, places: dict[str, Place], photos: list[manifest.Photo]) -> Gazetteer:
    """The addresses of these photos with the shapes of their streets and districts."""
    addresses = [places[place].address for place in sorted({photo.place for photo in photos})]
    return Gazetteer(
        addresses,
        streets.street_shapes([a.street for a in addresses]),
        streets.district_shapes([a.district for a in addresses]),
        Counter(places[photo.place].address.street for photo in photos),
        Counter(a.street for a in addresses),
        city.name,
        city.attribution,
    )


def _write_aside(path: Path, places: dict[str, Place], divided: Split) -> None:
    """The places that are in no split and why."""
    items = [
        {"place": p, "lat": places[p].lat, "lon": places[p].lon, "street": places[p].address.street,
         "district": places[p].address.district, "reason": reason}
        for p, reason in divided.reason.items()
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(items, schema=ASIDE), path)


def _kind(reject: dict[str, Any]) -> str:
    return str(reject["reason"]).partition(":")[0]


def _card(
    config: Config,
    places: dict[str, Place],
    photos: list[manifest.Photo],
    part: dict[str, Any],
    gazetteer: Gazetteer,
    rejects: list[dict[str, Any]],
) -> dict[str, Any]:
    """What is in the dataset and where it comes from."""

    def counts(chosen: list[manifest.Photo]) -> dict[str, int]:
        addresses = [places[photo.place].address for photo in chosen]
        return {
            "photos": len(chosen),
            "places": len({photo.place for photo in chosen}),
            "streets": len({a.street for a in addresses}),
            "districts": len({a.district for a in addresses}),
            "ambiguous_photos": sum(places[photo.place].ambiguous for photo in chosen),
        }

    parts = [p for p in (*SPLITS, "aside") if p in part.values()]
    return {
        "city": config.city.name,
        "attribution": config.city.attribution,
        "seed": config.seed,
        "guard_m": config.city.guard_m,
        **counts(photos),
        "gazetteer": {"streets": len(gazetteer.streets), "addresses": len(gazetteer.addresses)},
        "splits": {p: counts([photo for photo in photos if part[photo.place] == p]) for p in parts},
        "rejected": dict(Counter(_kind(r) for r in rejects).most_common()),
    }


def _print_card(card: dict[str, Any]) -> None:
    for part, n in card["splits"].items():
        print(f"prepare: {part:5} {n['photos']:,} photos of {n['places']:,} places, {n['streets']:,} streets", flush=True)
    if card.get("min_train_to_held_out_m") is not None:
        print(f"prepare: nearest training place to a held-out one: {card['min_train_to_held_out_m']:.1f} m", flush=True)
    rejected = card["rejected"]
    print(
        f"prepare: {sum(rejected.values()):,} rows rejected" + "".join(f"; {n:,} {k}" for k, n in rejected.items()), flush=True
    )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = arguments(__doc__ or "").parse_args(argv)
    config = configure(args)
    connect()
    run_step(config, args.redo)


if __name__ == "__main__":
    job(main)
