"""Image -> GPS -> address (paper 002, Sec. 6.5): where the most similar training photo was taken, reverse geocoded.

Writes <run>/retrieval/<row>/<split>-*.parquet: rows of `tables.SCORES` with the photo that was found and how similar it is.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import ray

from addressvlm import InputError
from addressvlm.baselines.encoders import embed_photos
from addressvlm.baselines.retrieval import (
    Geocoder,
    Neighbours,
    VectorIndex,
    has_coordinates,
    merge_neighbours,
    nearest_address_scores,
    street_map,
    vote_address,
)
from addressvlm.config import Config
from addressvlm.config.compare import EncoderConfig, RetrievalConfig
from addressvlm.dataset.build import resolve_city_files
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.models.cards import base_licence
from addressvlm.models.loading import resolve_model
from addressvlm.storage import tables
from addressvlm.storage.files import digest, write_parquet
from addressvlm.storage.remote_path import AnyPath, list_files, path_of
from addressvlm.storage.run_dir import fresh_dir, is_done, parse_model_flag, resumable_dir, slug
from addressvlm.storage.shards import ShardWork as Making
from addressvlm.storage.shards import plan_shards
from ray_jobs.baselines.context import TEST, ComparisonContext, Row, SystemOutcome
from ray_jobs.common import absolute_path, require_resources
from ray_jobs.evaluation import files_digest, model_digest
from ray_jobs.ray_data import run_shards

GALLERY = "train"
SHARD = 2048  # photos, at most
TOOK = "took.json"
ABOUT = ("id", "place", "lat", "lon", "street", "district")
EMBEDDINGS = tables.with_features(
    pa.schema([*(tables.PHOTOS.field(name) for name in ABOUT), ("vector", pa.list_(pa.float32()))])
)


@dataclass(frozen=True)
class Embeddings:
    """A split's photos and their vectors.

    Attributes:
        folder: of the table.
        encoder: what tells the encoder apart from all others.
        data: what tells the photos apart from others.
        photos: rows with ABOUT, in the order of the table.
        vectors: of length 1, float32 (photos, D).
        took: what making them cost, as `ComparisonContext.note` takes it.
        set_aside: photos of the split that are left out because nobody knows where they are.
    """

    folder: AnyPath
    encoder: str
    data: str
    photos: list[Row]
    vectors: np.ndarray
    took: Row
    set_aside: int = 0

    def of(self, ids: list[str]) -> "Embeddings":
        """Some of the photos, in this order."""
        at = {photo["id"]: i for i, photo in enumerate(self.photos)}
        return self._taken([at[photo] for photo in ids])

    def somewhere(self) -> "Embeddings":
        """Those whose coordinates are known."""
        known = [i for i, photo in enumerate(self.photos) if has_coordinates(photo)]
        return replace(self._taken(known), set_aside=len(self.photos) - len(known))

    def _taken(self, numbers: list[int]) -> "Embeddings":
        if numbers == list(range(len(self.photos))):
            return self
        return replace(self, photos=[self.photos[i] for i in numbers], vectors=self.vectors[numbers])


def held(config: Config) -> dict[str, float]:
    """CPUs and GPUs that the workers hold."""
    need = config.evaluate
    return {"cpus": need.workers * need.cpus_per_worker, "gpus": need.workers * need.gpus_per_worker}


def base_of(config: Config, encoder: EncoderConfig) -> str:
    """Folder or hub name of the encoder, by a name that means the same in a worker.

    Raises:
        InputError: it looks like a folder and there is none.
    """
    return resolve_model(absolute_path(encoder.base or config.model.base))


def embed_split(work: ComparisonContext, encoder: EncoderConfig, split: str, redo: bool = False) -> Embeddings:
    """The photos of a split with their vectors, from <run>/embeddings or new.

    Raises:
        InputError: the encoder is not there or is none, the vectors that are there are another encoder's, the split has no
            photos, or the cluster is too small.
    """
    config, photos = work.config, work.run.photos
    base = base_of(config, encoder)
    data = files_digest(tables.table_files(photos, split))
    settings = {"encoder": model_digest(base), "dtype": config.model.dtype, "data": data}
    folder = work.run.folder / "embeddings" / slug(parse_model_flag(base)[0]) / split
    if not is_done(folder, settings, redo):
        need = config.evaluate
        require_resources(
            "CPU", need.workers * need.cpus_per_worker, "embedding", "evaluate.workers or evaluate.cpus_per_worker"
        )
        each = max(tables.ROWS_PER_GROUP, min(SHARD, tables.count_rows(photos, split) // (4 * need.workers)))
        shards = plan_shards(photos, split, each)
        given = (base, config.model.dtype, config.model.trust_remote_code, need.cpus_per_worker, encoder.batch_size, split)
        making = Making(partial(embed_photos, *given), EMBEDDINGS, [*ABOUT, "image"], settings["encoder"])
        actor = {"num_cpus": need.cpus_per_worker, "num_gpus": need.gpus_per_worker}
        with resumable_dir(folder, settings, redo) as partly:
            begun = time.monotonic()
            made = run_shards(f"embed: {parse_model_flag(base)[0]}, {split}", shards, partly, making, need.workers, actor)
            took = {"seconds": time.monotonic() - begun, "photos": sum(shard["rows"] for shard in made), **held(config)}
            (partly / TOOK).write_text(json.dumps(took), encoding="utf-8")
    table = tables.read_table(folder, split)
    flat = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    rows = table.select(ABOUT).to_pylist()
    took = json.loads((folder / TOOK).read_text(encoding="utf-8"))
    name = f"{parse_model_flag(base)[0]} {settings['encoder']}"
    return Embeddings(folder, name, data, rows, flat.reshape(len(rows), -1), took)


def training_gallery(work: ComparisonContext, encoder: EncoderConfig, name: str, redo: bool = False) -> Embeddings:
    """The training photos that a query may be compared with; those without coordinates are set aside.

    Raises:
        InputError: as `embed_split`, or no training photo has coordinates.
    """
    everything = embed_split(work, encoder, GALLERY, redo)
    usable = everything.somewhere()
    if aside := usable.set_aside:
        rejects = [
            {"file": None, "row": None, "id": photo["id"], "reason": "no coordinates: nothing can be learnt from finding it"}
            for photo in everything.photos
            if not has_coordinates(photo)
        ]
        write_parquet(pa.Table.from_pylist(rejects, schema=tables.REJECTS), work.run.rejects / f"{slug(name)}.parquet")
        print(f"compare: {name}: {aside:,} training photos without coordinates set aside", flush=True)
    if not usable.photos:
        raise InputError(
            f"none of the {aside:,} training photos of {work.run.photos} has coordinates: '{name}' needs them, take it out "
            "of compare.systems."
        )
    return usable


PART = 250_000  # photos
QUERIES = 4096  # at a time; FAISS goes through the gallery once for so many

Load = Callable[[], VectorIndex]


def index_files(gallery: Embeddings, redo: bool = False) -> list[AnyPath]:
    """The index of a gallery, one file a part; made if it is not there.

    Raises:
        InputError: the one that is there is of other vectors.
    """
    folder = gallery.folder.with_name(f"{gallery.folder.name}-index")
    settings = {"encoder": gallery.encoder, "data": gallery.data, "photos": len(gallery.photos)}
    starts = range(0, len(gallery.photos), PART)
    if not is_done(folder, settings, redo):
        with fresh_dir(folder, settings) as partly:
            for number, start in enumerate(starts):
                VectorIndex(gallery.vectors[start : start + PART], gallery.encoder).save(partly / f"{number:05d}.faiss")
    return [folder / f"{number:05d}.faiss" for number in range(len(starts))]


def index_parts(files: Sequence[AnyPath], gallery: Embeddings) -> list[Load]:
    """What loads each part of the index."""
    return [partial(VectorIndex.load, file, gallery.encoder, gallery.vectors.shape[1]) for file in files]


class IndexPart:
    """Some parts of a gallery, in this process or in an actor."""

    def __init__(self, loads: Sequence[tuple[int, Load]], threads: int | None = None) -> None:
        """`index_parts`: position of each part's first photo, and what loads it; `threads`: default: FAISS's own choice."""
        if threads:
            faiss.omp_set_num_threads(threads)
        self.parts = [(first, load()) for first, load in loads]

    def ready(self) -> int:
        """How many photos it holds."""
        return sum(len(index) for _, index in self.parts)

    def search(self, queries: np.ndarray, k: int, farthest: bool) -> Neighbours:
        """Positions are those of the whole gallery."""
        found = [(first, index.search(queries, k, farthest)) for first, index in self.parts]
        return merge_neighbours([Neighbours(part.similarity, part.position + first) for first, part in found], k, farthest)

    def best(self, queries: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
        """Over its photos; `group` is of the whole gallery."""
        found = [index.best(queries, group[first : first + len(index)], groups) for first, index in self.parts]
        return np.max(found, axis=0)


class Searcher:
    """The whole gallery. Close it, or leave the block, to let go of the actors."""

    def __init__(self, loads: Sequence[Load], part: int = PART) -> None:
        """`index_parts`: what loads each part; all but the last hold `part` photos."""
        numbered = [(number * part, load) for number, load in enumerate(loads)]
        self._here = IndexPart(numbered) if len(loads) == 1 else None
        actors = 0 if self._here else min(len(loads), max(1, int(ray.cluster_resources().get("CPU", 1))))
        made = ray.remote(num_cpus=1)(IndexPart)
        self._actors = [made.remote(numbered[number::actors], threads=1) for number in range(actors)]
        if self._actors:  # without them Ray is not needed
            ray.get([actor.ready.remote() for actor in self._actors])

    def __enter__(self) -> "Searcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def search(self, queries: np.ndarray, k: int, farthest: bool = False) -> Neighbours:
        """See `VectorIndex.search`."""
        found = [merge_neighbours(parts, k, farthest) for parts in self._asked("search", queries, k, farthest)]
        return Neighbours(np.concatenate([f.similarity for f in found]), np.concatenate([f.position for f in found]))

    def best(self, queries: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
        """See `VectorIndex.best`."""
        given = group if self._here else ray.put(group)
        return np.concatenate([np.max(parts, axis=0) for parts in self._asked("best", queries, given, groups)])

    def _asked(self, what: str, queries: np.ndarray, *given: Any) -> Iterator[list[Any]]:
        """What all parts say to each batch of queries; the next batch is under way while one is merged."""
        batches = [queries[start : start + QUERIES] for start in range(0, max(len(queries), 1), QUERIES)]
        if self._here:
            yield from ([getattr(self._here, what)(batch, *given)] for batch in batches)
            return
        asked = []
        for batch in batches:
            sent = ray.put(batch)
            asked.append([getattr(actor, what).remote(sent, *given) for actor in self._actors])
            if len(asked) > 2:
                yield ray.get(asked.pop(0))
        for waiting in asked:
            yield ray.get(waiting)


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


def run(work: ComparisonContext, rival: RetrievalConfig, redo: bool = False) -> SystemOutcome:
    """Scores of all addresses and coordinates.

    Raises:
        InputError: the encoder is not there or is none, or no training photo has coordinates.
    """
    gallery, files = indexed(work, rival.encoder, rival.name, redo)
    folder = work.run.folder / "retrieval" / slug(rival.name)
    settings = {**made_from(work, gallery), "neighbours": rival.neighbours}
    if not is_done(folder, settings, redo):
        asked = {split: embed_split(work, rival.encoder, split, redo) for split in work.ids}
        begun = time.monotonic()
        address = geocoder_of(work, gallery).of_photos(work.gazetteer)
        with Searcher(index_parts(files, gallery)) as searcher, fresh_dir(folder, settings) as partial:
            for split, ids in work.ids.items():
                rows = _rows(asked[split].of(ids), gallery, searcher, address, work.gazetteer, rival.neighbours)
                tables.write_table(partial, split, rows, FOUND)
        work.note(rival.name, "answering", answering(list(asked.values()), time.monotonic() - begun))
    outcome = SystemOutcome(stored_bytes=stored(work, rival.encoder, files), licences=licences(work, rival.encoder))
    for split in work.ids:
        found = list(tables.iter_rows(folder, split))
        outcome.scores[split] = [{key: row[key] for key in tables.SCORES.names} for row in found]
        if split == TEST:
            outcome.coordinates = {row["id"]: (row["found_lat"], row["found_lon"]) for row in found}
    outcome.notes = {"gallery": len(gallery.photos), "set_aside": gallery.set_aside}
    return outcome


def _rows(
    queries: Embeddings, gallery: Embeddings, searcher: Searcher, address: np.ndarray, city: Gazetteer, neighbours: int
) -> Iterator[Row]:
    for start in range(0, len(queries.photos), AT_A_TIME):
        vectors = queries.vectors[start : start + AT_A_TIME]
        nearest = searcher.search(vectors, neighbours)
        scores = nearest_address_scores(nearest, address, searcher.best(vectors, address, len(city.addresses)))
        positions = vote_address(nearest, address, np.argmax(scores, axis=1))
        photos = queries.photos[start : start + AT_A_TIME]
        for photo, row, at, like in zip(photos, scores, positions.tolist(), nearest.similarity, strict=True):
            there = gallery.photos[at]
            yield {
                **photo, "scores": row, "found": there["id"], "found_lat": there["lat"], "found_lon": there["lon"],
                "similarity": float(like[0]),
            }  # fmt: skip


def indexed(work: ComparisonContext, encoder: EncoderConfig, name: str, redo: bool = False) -> tuple[Embeddings, list[AnyPath]]:
    """The gallery and the files of its index; what making its vectors cost is noted.

    Raises:
        InputError: see `training_gallery`.
    """
    gallery = training_gallery(work, encoder, name, redo)
    work.note(name, "index", gallery.took)
    return gallery, index_files(gallery, redo)


def made_from(work: ComparisonContext, gallery: Embeddings) -> Row:
    """What the photos that are found, and their addresses, depend on."""
    return {
        "encoder": gallery.encoder, "gallery": gallery.data, "photos": {split: digest(ids) for split, ids in work.ids.items()},
        "city": work.config.city.model_dump(include={"streets", "districts", "answer", "max_distance_m", "unit", "language"}),
        "addresses": digest([address.text() for address in work.gazetteer.addresses]),
    }  # fmt: skip


def answering(queries: Sequence[Embeddings], searching_s: float) -> Row:
    """What embedding the queries and searching for them took, as `ComparisonContext.note` takes it."""
    took = [split.took for split in queries]
    photos = sum(each["photos"] for each in took)
    return {**took[0], "photos": photos, "seconds": sum(each["seconds"] for each in took) + searching_s}


def geocoder_of(work: ComparisonContext, gallery: Embeddings) -> Geocoder:
    """The city's reverse geocoder.

    Raises:
        InputError: a file of its map is missing or damaged.
    """
    city = resolve_city_files(work.config, work.run).city
    return Geocoder(street_map(city, work.gazetteer), city.max_distance_m, gallery.photos)


def stored(work: ComparisonContext, encoder: EncoderConfig, files: list[AnyPath]) -> int:
    """Bytes of the encoder's weights and of the index."""
    weights = list_files(path_of(base_of(work.config, encoder)), "*.safetensors")
    return sum(file.stat().st_size for file in [*weights, *files])


def licences(work: ComparisonContext, encoder: EncoderConfig) -> dict[str, str]:
    """The encoder's licence, as its card names it."""
    base = base_of(work.config, encoder)
    model = work.config.model.model_copy(update={"base": base})
    said: Any = base_licence(work.config.model_copy(update={"model": model}))
    return {"encoder": said or "not said"}
