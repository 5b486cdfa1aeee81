"""Image -> GPS -> address (paper 002, Sec. 6.5): where the most similar training photo was taken, reverse geocoded.

Writes <run>/retrieval/<row>/<split>-*.parquet: rows of `tables.SCORES` with the photo that was found and how similar it is.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from addressvlm import tables
from addressvlm.addresses import Gazetteer
from addressvlm.baselines.geography import Geocoder, address_scores, chosen, street_map
from addressvlm.cities.source import resolve
from addressvlm.config_compare import EncoderConfig, RetrievalConfig
from addressvlm.files import digest
from addressvlm.models.card import base_licence
from addressvlm.run import is_done, slug, writing
from addressvlm.stores import AnyPath, files_in, path_of
from ray_jobs.rivals.embed import Embedded, base_of, embedded, gallery_of
from ray_jobs.rivals.search import Searcher, index_files, loads
from ray_jobs.rivals.work import TEST, Outcome, Row, Work

FOUND = tables.with_features(
    pa.schema(
        [
            *tables.SCORES,
            ("found", pa.string()),  # id of the training photo whose coordinates are the answer
            ("found_lat", pa.float64()),
            ("found_lon", pa.float64()),
            ("similarity", pa.float32()),  # cosine, of the most similar photo
        ]
    )
)
AT_A_TIME = 4096  # queries whose scores are in memory


def run(work: Work, rival: RetrievalConfig, redo: bool = False) -> Outcome:
    """Scores of all addresses and coordinates.

    Raises:
        InputError: the encoder is not there or is none, or no training photo has coordinates.
    """
    gallery, files = indexed(work, rival.encoder, rival.name, redo)
    folder = work.run.folder / "retrieval" / slug(rival.name)
    settings = {**made_from(work, gallery), "neighbours": rival.neighbours}
    if not is_done(folder, settings, redo):
        asked = {split: embedded(work, rival.encoder, split, redo) for split in work.ids}
        begun = time.monotonic()
        address = geocoder_of(work, gallery).of_photos(work.gazetteer)
        with Searcher(loads(files, gallery)) as searcher, writing(folder, settings) as partial:
            for split, ids in work.ids.items():
                rows = _rows(asked[split].of(ids), gallery, searcher, address, work.gazetteer, rival.neighbours)
                tables.write(partial, split, rows, FOUND)
        work.note(rival.name, "answering", answering(list(asked.values()), time.monotonic() - begun))
    outcome = Outcome(stored_bytes=stored(work, rival.encoder, files), licences=licences(work, rival.encoder))
    for split in work.ids:
        found = list(tables.rows(folder, split))
        outcome.scores[split] = [{key: row[key] for key in tables.SCORES.names} for row in found]
        if split == TEST:
            outcome.coordinates = {row["id"]: (row["found_lat"], row["found_lon"]) for row in found}
    outcome.notes = {"gallery": len(gallery.photos), "set_aside": gallery.set_aside}
    return outcome


def _rows(
    queries: Embedded, gallery: Embedded, searcher: Searcher, address: np.ndarray, city: Gazetteer, neighbours: int
) -> Iterator[Row]:
    for start in range(0, len(queries.photos), AT_A_TIME):
        vectors = queries.vectors[start : start + AT_A_TIME]
        nearest = searcher.search(vectors, neighbours)
        scores = address_scores(nearest, address, searcher.best(vectors, address, len(city.addresses)))
        positions = chosen(nearest, address, np.argmax(scores, axis=1))
        photos = queries.photos[start : start + AT_A_TIME]
        for photo, row, at, like in zip(photos, scores, positions.tolist(), nearest.similarity, strict=True):
            there = gallery.photos[at]
            yield {
                **photo, "scores": row, "found": there["id"], "found_lat": there["lat"], "found_lon": there["lon"],
                "similarity": float(like[0]),
            }  # fmt: skip


def indexed(work: Work, encoder: EncoderConfig, name: str, redo: bool = False) -> tuple[Embedded, list[AnyPath]]:
    """The gallery and the files of its index; what making its vectors cost is noted.

    Raises:
        InputError: see `gallery_of`.
    """
    gallery = gallery_of(work, encoder, name, redo)
    work.note(name, "index", gallery.took)
    return gallery, index_files(gallery, redo)


def made_from(work: Work, gallery: Embedded) -> Row:
    """What the photos that are found, and their addresses, depend on."""
    return {
        "encoder": gallery.encoder, "gallery": gallery.data, "photos": {split: digest(ids) for split, ids in work.ids.items()},
        "city": work.config.city.model_dump(include={"streets", "districts", "answer", "max_distance_m", "unit", "language"}),
        "addresses": digest([address.text() for address in work.gazetteer.addresses]),
    }  # fmt: skip


def answering(queries: Sequence[Embedded], searching_s: float) -> Row:
    """What embedding the queries and searching for them took, as `Work.note` takes it."""
    took = [split.took for split in queries]
    photos = sum(each["photos"] for each in took)
    return {**took[0], "photos": photos, "seconds": sum(each["seconds"] for each in took) + searching_s}


def geocoder_of(work: Work, gallery: Embedded) -> Geocoder:
    """The city's reverse geocoder.

    Raises:
        InputError: a file of its map is missing or damaged.
    """
    city = resolve(work.config, work.run).city
    return Geocoder(street_map(city, work.gazetteer), city.max_distance_m, gallery.photos)


def stored(work: Work, encoder: EncoderConfig, files: list[AnyPath]) -> int:
    """Bytes of the encoder's weights and of the index."""
    weights = files_in(path_of(base_of(work.config, encoder)), "*.safetensors")
    return sum(file.stat().st_size for file in [*weights, *files])


def licences(work: Work, encoder: EncoderConfig) -> dict[str, str]:
    """The encoder's licence, as its card names it."""
    base = base_of(work.config, encoder)
    model = work.config.model.model_copy(update={"base": base})
    said: Any = base_licence(work.config.model_copy(update={"model": model}))
    return {"encoder": said or "not said"}
