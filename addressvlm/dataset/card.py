"""The dataset card: the content, split, sources and licences of a city's dataset.

Counts as in paper 001 (Table 6) and paper 002 (Table 8), the long tail before and after the partition (its Fig. 10), the
map of streets in colours (its Fig. 4). `make_card` counts, `write_card` writes card.json for programs, README.md for people and
the Hugging Face hub, and card.html with the figures embedded.
"""

import base64
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jinja2
import numpy as np
import pyarrow.compute as pc
import pyproj
import shapely
import yaml

from addressvlm.config import Config, TilesConfig
from addressvlm.config.city import CityConfig
from addressvlm.dataset.card_figures import CityFigures, long_tail
from addressvlm.dataset.geo_files import OSM_SUFFIXES
from addressvlm.dataset.geocoding import Place
from addressvlm.dataset.photos import Photo
from addressvlm.dataset.split import PlaceSplit
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.storage import tables
from addressvlm.storage.files import open_parquet
from addressvlm.storage.remote_path import AnyPath, list_files

PARTS = ("train", "val", "test", "aside")
HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}  # our names -> those of the Hugging Face hub
HUB_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")
LEVELS = ("district", "street", "address")
KINDS = ("generation", "judgment", "choice")
COUNTS = {"area_km2": "area, km²", "places": "places", "districts": "districts", "streets": "streets",
          "sub_streets": "sub-streets", "photos": "photos", "questions": "questions",
          "ambiguous_photos": "photos with an ambiguous address"}  # fmt: skip
TAIL = {"names": "names", "largest": "most on one", "median": "median", "with_fewer_than_5": "names with fewer than 5",
        "share_of_largest_tenth": "share of the largest tenth"}  # fmt: skip
ADDRESS_SOURCES = {
    "manifest": "from the table of photos",
    "map": "the nearest named street of the map",
    "nominatim": "answers of Nominatim",
    "google": "answers of Google's geocoder",
    "neighbour": "the answer for a neighbouring place",
}
OSM_ATTRIBUTION = "© OpenStreetMap contributors, ODbL 1.0, https://www.openstreetmap.org/copyright"

Questions = Mapping[str, Mapping[str, Mapping[str, int]]]  # split -> level -> kind -> number


def make_card(
    config: Config,
    places: Mapping[str, Place],
    photos: Sequence[Photo],
    split: PlaceSplit,
    gazetteer: Gazetteer,
    rejects: Iterable[Mapping[str, Any]],
    questions: Questions,
    attribution: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of card.json.

    Args:
        config: with all paths of the city set.
        photos: those in the dataset or aside, all of places in `places`.
        rejects: rows of `tables.REJECTS`.
        questions: `count_questions` of each split.
        attribution: of sources that are not in the settings, such as the imagery's own.
    """
    by_part = {p: [photo for photo in photos if split.part[photo.place] == p] for p in PARTS}
    used = {photo.place: places[photo.place] for photo in photos}
    counts = _counts(photos, places, questions.values())
    return {
        "city": config.city.name,
        "license": config.city.license,
        "attribution": _attribution(config, attribution),
        "sources": _sources(config.city, config.tiles),
        "seed": config.seed,
        "split_method": config.city.split_method,
        "split_buffer_m": config.city.split_buffer_m,
        "ambiguous_m": config.city.ambiguous_m,
        "density": config.city.density.model_dump(),
        **counts,
        "ambiguous_share": round(counts["ambiguous_photos"] / max(counts["photos"], 1), 4),
        "gazetteer": {"streets": len(gazetteer.streets), "addresses": len(gazetteer.addresses)},
        "splits": {p: _counts(group, places, [questions.get(p, {})]) for p, group in by_part.items() if group},
        "questions_by_kind": {p: {level: dict(kinds) for level, kinds in levels.items()} for p, levels in questions.items()},
        "places_per": {unit: _tail(counts) for unit, counts in places_per(used.values()).items() if counts},
        "address_sources": dict(Counter(place.source for place in used.values()).most_common()),
        "rejected": dict(Counter(str(r["reason"]).partition(":")[0] for r in rejects).most_common()),
        "aside": dict(Counter(split.reason.values()).most_common()),
        "min_train_to_held_out_m": split.min_distance_m,
        "map_only": [address.text() for address in split.map_only],
    }  # fmt: skip


def count_questions(folder: AnyPath, split: str) -> dict[str, dict[str, int]]:
    """Level -> kind -> number of questions in a split of `tables.PHOTOS`; reads no images."""
    counts: Counter[tuple[str, str]] = Counter()
    for file in list_files(folder, f"{split}-*.parquet"):
        with open_parquet(file) as opened:
            for batch in opened.iter_batches(columns=["rounds.list.element.level", "rounds.list.element.kind"]):
                rounds = batch["rounds"].flatten()
                levels, kinds = (pc.struct_field(rounds, field).to_pylist() for field in ("level", "kind"))
                counts.update(zip(levels, kinds, strict=True))
    by_level = {level: {kind: counts[level, kind] for kind in KINDS if counts[level, kind]} for level in LEVELS}
    return {level: kinds for level, kinds in by_level.items() if kinds}


def places_per(places: Iterable[Place]) -> dict[str, dict[str, int]]:
    """Number of places of each street and of each sub-street; the second is empty without a partition."""
    places = list(places)
    return {
        "street": dict(Counter(p.address.street for p in places)),
        "sub_street": dict(Counter(p.sub_street for p in places if p.sub_street)),
    }


def write_card(
    folder: AnyPath, card: Mapping[str, Any], places: Iterable[Place], split: PlaceSplit, gazetteer: Gazetteer
) -> None:
    """Write card.json, README.md, card.html and figures/*.png into the folder of the tables.

    Args:
        card: from `make_card`.
        places: those to draw, all in `split`.
    """
    places = list(places)
    (folder / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    city, counts = CityFigures(places, gazetteer), places_per(places)
    figures = {
        "streets": city.street_map(),
        "splits": city.split_map(split.part),
        "long-tail": long_tail(counts["street"], counts["sub_street"]),
    }
    (folder / "figures").mkdir(exist_ok=True)
    for name, png in figures.items():
        (folder / "figures" / f"{name}.png").write_bytes(png)
    questions = {part: levels for part, levels in card["questions_by_kind"].items() if levels}
    kinds = [(level, kind) for level in LEVELS for kind in KINDS if any(kind in q.get(level, {}) for q in questions.values())]
    values = {
        "card": card,
        "parts": [part for part in PARTS if part in card["splits"]],
        "rows": [(key, label) for key, label in COUNTS.items() if key in card],
        "tail_rows": list(TAIL.items()),
        "questions": questions,
        "question_rows": kinds,
        "address_sources": ADDRESS_SOURCES,
    }
    header = _header(card, [part for part in HUB_SPLITS if tables.count_rows(folder, part)])
    (folder / "README.md").write_text(_render("card.md", header=header, **values), encoding="utf-8")
    embedded = {name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in figures.items()}
    (folder / "card.html").write_text(_render("card.html", figures=embedded, **values), encoding="utf-8")


def _counts(photos: Sequence[Photo], places: Mapping[str, Place], questions: Iterable[Mapping[str, Mapping[str, int]]]) -> Any:
    photo_places = [places[photo.place] for photo in photos]
    distinct = list({place.id: place for place in photo_places}.values())
    sub_streets = {place.sub_street for place in distinct if place.sub_street}
    return {
        "area_km2": _area_km2(distinct),
        "places": len(distinct),
        "districts": len({place.address.district for place in distinct}),
        "streets": len({place.address.street for place in distinct}),
        **({"sub_streets": len(sub_streets)} if sub_streets else {}),
        "photos": len(photos),
        "questions": sum(n for levels in questions for kinds in levels.values() for n in kinds.values()),
        "ambiguous_photos": sum(place.ambiguous for place in photo_places),
    }


def _area_km2(places: Sequence[Place]) -> float:
    """Of the convex hull, on the ellipsoid."""
    hull = shapely.MultiPoint([(place.lon, place.lat) for place in places]).convex_hull
    return round(abs(pyproj.Geod(ellps="WGS84").geometry_area_perimeter(hull)[0]) / 1e6, 3)


def _tail(places_per_name: Mapping[str, int]) -> dict[str, float]:
    counts = np.sort(np.array(list(places_per_name.values())))[::-1]
    top = counts[: max(1, round(0.1 * len(counts)))]
    return {
        "names": len(counts),
        "largest": int(counts[0]),
        "median": float(np.median(counts)),
        "share_of_largest_tenth": round(float(top.sum() / counts.sum()), 4),
        "with_fewer_than_5": int((counts < 5).sum()),  # those that paper 002 merges (A.2)
    }


def _attribution(config: Config, more: Sequence[str]) -> list[str]:
    """That of the settings and sources, and OpenStreetMap's where its data is used and the settings lack it; each once."""
    city = config.city
    lines = [*city.attribution, *filter(None, [config.tiles.attribution]), *more]
    uses_osm = any(str(path or "").lower().endswith(OSM_SUFFIXES) for path in (city.streets, city.districts))
    uses_osm |= city.geocoder is not None and city.geocoder.service == "nominatim"
    if uses_osm and not any("openstreetmap" in line.lower() for line in lines):
        lines.append(OSM_ATTRIBUTION)
    return list(dict.fromkeys(lines))


def _sources(city: CityConfig, tiles: TilesConfig) -> dict[str, str]:
    """The sources by file name or host only: addresses may contain keys, paths may contain names."""
    paths = {
        "photos": city.manifest or city.photos,
        "streets": city.streets,
        "districts": city.districts,
        "imagery": tiles.imagery,
    }
    sources = {}
    for name, path in paths.items():
        if path:
            url = urlsplit(path)
            sources[name] = str(url.hostname) if url.scheme in ("http", "https") else path.rstrip("/").rpartition("/")[2]
    if city.geocoder:
        sources["geocoder"] = city.geocoder.service
    return sources


def _header(card: Mapping[str, Any], parts: Iterable[str]) -> str:
    """The YAML that the Hugging Face hub and `datasets.load_dataset` read."""
    digits = len(str(card["photos"]))
    size = "n<1K" if digits < 4 else f"{HUB_SIZES[digits - 4]}<n<{HUB_SIZES[digits - 3]}"
    header = {
        "pretty_name": card["city"],
        "license": card["license"],
        **({"license_name": "see-attributions"} if card["license"] == "other" else {}),
        "language": ["en"],
        "task_categories": ["visual-question-answering", "image-to-text"],
        "tags": ["street-view", "geolocation", "image-address-localization"],
        "size_categories": [size],
        "configs": [
            {"config_name": "default", "data_files": [{"split": HUB_SPLITS[p], "path": f"{p}-*.parquet"} for p in parts]}
        ],
    }  # fmt: skip
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()


def _render(name: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["n"] = lambda number: "–" if number is None else f"{number:,.9g}"
    environment.filters["of"] = lambda number, noun: f"{number:,} {noun}{'' if number == 1 else 's'}"
    environment.filters["cell"] = lambda text: " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split())
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    return environment.get_template(name).render(**values)
