"""Image -> GPS -> address (paper 002, Sec. 6.5): where the most similar training photo was taken, reverse geocoded.

Writes <run>/retrieval/<system>/<split>-*.parquet: rows of `tables.SCORES` with the most similar photo and its similarity.
Below the system: the photos' embeddings, and the search in the gallery of training photos, which RAG shares.
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
from addressvlm.config.compare import EncoderConfig, RetrievalConfig
from addressvlm.dataset.build import resolve_city_files
from addressvlm.evaluation.likelihood import ScoreTables
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.models.cards import base_licence
from addressvlm.models.loading import resolve_model
from addressvlm.storage import tables
from addressvlm.storage.files import digest, write_parquet
from addressvlm.storage.remote_path import AnyPath, list_files, path_of
from addressvlm.storage.run_dir import fresh_dir, is_done, parse_model_flag, resumable_dir, slug
from addressvlm.storage.shards import ShardWork, plan_shards
from ray_jobs.baselines.system import ComparisonContext, System, SystemOutcome, worker_resources
from ray_jobs.common import absolute_path, require_evaluation_workers
from ray_jobs.evaluation import TEST, TRAINING, Row, files_digest, model_digest
from ray_jobs.progress import display
from ray_jobs.ray_data import run_shards

SHARD = 2048  # photos, at most
PART = 250_000  # photos of an index file, which one actor searches
QUERIES = 4096  # at a time; FAISS goes through the gallery once for so many, and their scores are in memory
COST_FILE = "took.json"
PHOTO_COLUMNS = ("id", "place", "lat", "lon", "street", "district")
EMBEDDINGS = tables.with_features(
    pa.schema([*(tables.PHOTOS.field(name) for name in PHOTO_COLUMNS), ("vector", pa.list_(pa.float32()))])
)
MATCHES = tables.with_features(
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


class RetrievalSystem(System[RetrievalConfig]):
    """Scores of all addresses, and coordinates, from the most similar training photos."""

    def run(self, context: ComparisonContext, redo: bool = False) -> SystemOutcome:
        encoder, city = self.settings.encoder, context.gazetteer
        gallery, files = open_gallery(context, encoder, self.name, redo)
        folder = context.run.folder / "retrieval" / slug(self.name)
        settings = {**search_settings(context, gallery), "neighbours": self.settings.neighbours}
        if not is_done(folder, settings, redo):
            queries = {split: embed_split(context, encoder, split, redo) for split in context.ids}
            start = time.monotonic()
            address = open_geocoder(context, gallery).photo_addresses(city)
            with GallerySearch(index_loaders(files, gallery)) as search, fresh_dir(folder, settings) as temporary:
                for split, ids in context.ids.items():
                    rows = match_rows(queries[split].select(ids), gallery, search, address, city, self.settings.neighbours)
                    with display.show(f"compare: {self.name}: searching for photos of the split {split}"):
                        tables.write_table(temporary, split, rows, MATCHES)
            context.save_cost(self.name, "answering", query_cost(list(queries.values()), time.monotonic() - start))
        matches = tables.iter_rows(folder, TEST, ["id", "found_lat", "found_lon"])
        return SystemOutcome(
            scores=ScoreTables(dict.fromkeys(context.ids, folder)),
            coordinates={row["id"]: (row["found_lat"], row["found_lon"]) for row in matches},
            stored_bytes=stored_bytes(context, encoder, files),
            licences=encoder_licence(context, encoder),
            notes={"gallery": len(gallery.photos), "set_aside": gallery.set_aside},
        )


def match_rows(
    queries: "Embeddings", gallery: "Embeddings", search: "GallerySearch", address: np.ndarray, city: Gazetteer, neighbours: int
) -> Iterator[Row]:
    """Rows of MATCHES for the queries, in their order; `address`: number of the address of each photo of the gallery."""
    for start in range(0, len(queries.photos), QUERIES):
        vectors = queries.vectors[start : start + QUERIES]
        nearest = search.nearest(vectors, neighbours)
        scores = nearest_address_scores(nearest, address, search.best(vectors, address, len(city.addresses)))
        positions = vote_address(nearest, address, np.argmax(scores, axis=1))
        photos = queries.photos[start : start + QUERIES]
        for photo, row, position, similarity in zip(photos, scores, positions.tolist(), nearest.similarity, strict=True):
            match = gallery.photos[position]
            yield {
                **photo, "scores": row, "found": match["id"], "found_lat": match["lat"], "found_lon": match["lon"],
                "similarity": float(similarity[0]),
            }  # fmt: skip


def search_settings(context: ComparisonContext, gallery: "Embeddings") -> Row:
    """What the matches, and their addresses, depend on."""
    keys = {"streets", "districts", "answer", "max_distance_m", "unit", "language"}
    return {
        "encoder": gallery.encoder,
        "gallery": gallery.data,
        "photos": {split: digest(ids) for split, ids in context.ids.items()},
        "city": context.config.city.model_dump(include=keys),
        "addresses": digest([address.text() for address in context.gazetteer.addresses]),
    }


def query_cost(queries: Sequence["Embeddings"], search_s: float) -> Row:
    """The cost of embedding the queries of some splits and of searching for them, for `ComparisonContext.save_cost`."""
    costs = [split.cost for split in queries]
    seconds = sum(cost["seconds"] for cost in costs) + search_s
    return {**costs[0], "photos": sum(cost["photos"] for cost in costs), "seconds": seconds}


def open_geocoder(context: ComparisonContext, gallery: "Embeddings") -> Geocoder:
    """The city's reverse geocoder."""
    city = resolve_city_files(context.config, context.run).city
    return Geocoder(street_map(city, context.gazetteer), city.max_distance_m, gallery.photos)


def stored_bytes(context: ComparisonContext, encoder: EncoderConfig, files: Sequence[AnyPath]) -> int:
    """Bytes of the encoder's weights and of the index."""
    weights = list_files(path_of(encoder_model(context, encoder)), "*.safetensors")
    return sum(file.stat().st_size for file in [*weights, *files])


def encoder_licence(context: ComparisonContext, encoder: EncoderConfig) -> dict[str, str]:
    """The encoder's licence, as its card names it."""
    model = context.config.model.model_copy(update={"base": encoder_model(context, encoder)})
    return {"encoder": base_licence(context.config.model_copy(update={"model": model})) or "not stated"}


def encoder_model(context: ComparisonContext, encoder: EncoderConfig) -> str:
    """Folder or hub name of the encoder, by a name that means the same in a worker."""
    return resolve_model(absolute_path(encoder.base or context.config.model.base))


@dataclass(frozen=True)
class Embeddings:
    """A split's photos and their vectors.

    Attributes:
        folder: of the table.
        encoder: identifies the encoder.
        data: identifies the photos.
        photos: rows with PHOTO_COLUMNS, in the order of the table.
        vectors: of length 1, float32 (photos, D).
        cost: of making them, as `ComparisonContext.save_cost` takes it.
        set_aside: photos of the split that are left out because their coordinates are unknown.
    """

    folder: AnyPath
    encoder: str
    data: str
    photos: list[Row]
    vectors: np.ndarray
    cost: Row
    set_aside: int = 0

    def select(self, ids: Sequence[str]) -> "Embeddings":
        """Some of the photos, in this order."""
        numbers = {photo["id"]: number for number, photo in enumerate(self.photos)}
        return self._select([numbers[photo] for photo in ids])

    def with_coordinates(self) -> "Embeddings":
        """The photos whose coordinates are known."""
        usable = [number for number, photo in enumerate(self.photos) if has_coordinates(photo)]
        return replace(self._select(usable), set_aside=len(self.photos) - len(usable))

    def _select(self, numbers: list[int]) -> "Embeddings":
        if numbers == list(range(len(self.photos))):
            return self  # no copy of the vectors
        return replace(self, photos=[self.photos[number] for number in numbers], vectors=self.vectors[numbers])


def embed_split(context: ComparisonContext, encoder: EncoderConfig, split: str, redo: bool = False) -> Embeddings:
    """The photos of a split with their vectors, from <run>/embeddings or new."""
    config, photos = context.config, context.run.photos
    base = encoder_model(context, encoder)
    name, data = parse_model_flag(base)[0], files_digest(tables.table_files(photos, split))
    settings = {"encoder": model_digest(base), "dtype": config.model.dtype, "data": data}
    folder = context.run.folder / "embeddings" / slug(name) / split
    if not is_done(folder, settings, redo):
        need = config.evaluate
        require_evaluation_workers(config, "embedding")
        per_shard = max(tables.ROWS_PER_GROUP, min(SHARD, tables.count_rows(photos, split) // (4 * need.workers)))
        shards = plan_shards(photos, split, per_shard)
        arguments = (base, config.model.dtype, config.model.trust_remote_code, need.cpus_per_worker, encoder.batch_size, split)
        work = ShardWork(partial(embed_photos, *arguments), EMBEDDINGS, [*PHOTO_COLUMNS, "image"], settings["encoder"])
        actor = {"num_cpus": need.cpus_per_worker, "num_gpus": need.gpus_per_worker}
        with resumable_dir(folder, settings, redo) as temporary:
            start = time.monotonic()
            summaries = run_shards(f"embed: {name}, {split}", shards, temporary, work, need.workers, actor)
            cost = {"seconds": time.monotonic() - start, "photos": sum(summary["rows"] for summary in summaries)}
            (temporary / COST_FILE).write_text(json.dumps({**cost, **worker_resources(config)}), encoding="utf-8")
    table = tables.read_table(folder, split)
    rows = table.select(PHOTO_COLUMNS).to_pylist()
    vectors = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1)
    cost = json.loads((folder / COST_FILE).read_text(encoding="utf-8"))
    return Embeddings(folder, f"{name} {settings['encoder']}", data, rows, vectors, cost)


def open_gallery(
    context: ComparisonContext, encoder: EncoderConfig, name: str, redo: bool = False
) -> tuple[Embeddings, list[AnyPath]]:
    """The training photos that queries are compared with, and the files of their index; their cost is saved."""
    everything = embed_split(context, encoder, TRAINING, redo)
    gallery = everything.with_coordinates()
    if gallery.set_aside:
        rejects = [
            {"file": None, "row": None, "id": photo["id"], "reason": "no coordinates, so it can't locate a query"}
            for photo in everything.photos
            if not has_coordinates(photo)
        ]
        write_parquet(pa.Table.from_pylist(rejects, schema=tables.REJECTS), context.run.rejects / f"{slug(name)}.parquet")
        print(f"compare: {name}: {gallery.set_aside:,} training photos without coordinates set aside", flush=True)
    if not gallery.photos:
        raise InputError(
            f"none of the {gallery.set_aside:,} training photos of {context.run.photos} has coordinates: '{name}' needs them, "
            "take it out of compare.systems."
        )
    context.save_cost(name, "index", gallery.cost)
    return gallery, build_index(gallery, redo)


def build_index(gallery: Embeddings, redo: bool = False) -> list[AnyPath]:
    """The index of a gallery, a file for every PART photos, from disk or new."""
    folder = gallery.folder.with_name(f"{gallery.folder.name}-index")
    settings = {"encoder": gallery.encoder, "data": gallery.data, "photos": len(gallery.photos)}
    starts = range(0, len(gallery.photos), PART)
    if not is_done(folder, settings, redo):
        with fresh_dir(folder, settings) as temporary:
            for number, start in enumerate(starts):
                VectorIndex(gallery.vectors[start : start + PART], gallery.encoder).save(temporary / f"{number:05d}.faiss")
    return [folder / f"{number:05d}.faiss" for number in range(len(starts))]


LoadIndex = Callable[[], VectorIndex]


def index_loaders(files: Sequence[AnyPath], gallery: Embeddings) -> list[LoadIndex]:
    """What loads each file of the index, here or in an actor."""
    return [partial(VectorIndex.load, file, gallery.encoder, gallery.vectors.shape[1]) for file in files]


class IndexParts:
    """Some parts of the index of a gallery, in this process or in an actor."""

    def __init__(self, loaders: Sequence[tuple[int, LoadIndex]], threads: int | None = None) -> None:
        """`loaders`: position of each part's first photo, and what loads it; `threads`: default: FAISS's own choice."""
        if threads:
            faiss.omp_set_num_threads(threads)
        self.parts = [(first, load()) for first, load in loaders]

    def size(self) -> int:
        """How many photos it holds."""
        return sum(len(index) for _, index in self.parts)

    def search(self, queries: np.ndarray, k: int, farthest: bool) -> Neighbours:
        """See `VectorIndex.search`; positions are those of the whole gallery."""
        parts = [(first, index.search(queries, k, farthest)) for first, index in self.parts]
        return merge_neighbours([Neighbours(part.similarity, part.position + first) for first, part in parts], k, farthest)

    def best(self, queries: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
        """See `VectorIndex.best`; `group` is of the whole gallery."""
        parts = [index.best(queries, group[first : first + len(index)], groups) for first, index in self.parts]
        return np.max(parts, axis=0)


class GallerySearch:
    """Search in a whole gallery: in this process if its index is one file, else in actors that the `with` block ends."""

    def __init__(self, loaders: Sequence[LoadIndex], part: int = PART) -> None:
        """`loaders`: of `index_loaders`; all parts but the last hold `part` photos."""
        numbered = [(number * part, load) for number, load in enumerate(loaders)]
        self._local = IndexParts(numbered) if len(loaders) == 1 else None
        self._actors: list[Any] = []
        if not self._local:
            count = min(len(loaders), max(1, int(ray.cluster_resources().get("CPU", 1))))
            actor = ray.remote(num_cpus=1)(IndexParts)
            self._actors = [actor.remote(numbered[number::count], threads=1) for number in range(count)]
            ray.get([actor.size.remote() for actor in self._actors])  # an error of loading comes here

    def __enter__(self) -> "GallerySearch":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def nearest(self, queries: np.ndarray, k: int, farthest: bool = False) -> Neighbours:
        """See `VectorIndex.search`."""
        batches = [merge_neighbours(parts, k, farthest) for parts in self._batches("search", queries, k, farthest)]
        return Neighbours(np.concatenate([b.similarity for b in batches]), np.concatenate([b.position for b in batches]))

    def best(self, queries: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
        """See `VectorIndex.best`."""
        shared = group if self._local else ray.put(group)
        return np.concatenate([np.max(parts, axis=0) for parts in self._batches("best", queries, shared, groups)])

    def _batches(self, method: str, queries: np.ndarray, *arguments: Any) -> Iterator[list[Any]]:
        """The results of all parts for each batch of queries; two more batches are under way while one is merged."""
        batches = [queries[start : start + QUERIES] for start in range(0, max(len(queries), 1), QUERIES)]
        if self._local:
            yield from ([getattr(self._local, method)(batch, *arguments)] for batch in batches)
            return
        pending = []
        for batch in batches:
            shared = ray.put(batch)
            pending.append([getattr(actor, method).remote(shared, *arguments) for actor in self._actors])
            if len(pending) > 2:
                yield ray.get(pending.pop(0))
        for results in pending:
            yield ray.get(results)
