"""A language model that sees the photo and reads where similar and dissimilar photos were taken (paper 004).

Writes <run>/rag/<row>/test-*.parquet: what was asked about each photo, the reply as it came, and what was made of it. Answers
of an endpoint are also kept in <run>/rag/<row>-ledger, where nothing is paid for twice.
"""

import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from addressvlm import InputError
from addressvlm.baselines import rag
from addressvlm.baselines.rag import rag_prompt
from addressvlm.baselines.retrieval import cluster_representatives, random_neighbours
from addressvlm.config import Config
from addressvlm.config.compare import RagConfig
from addressvlm.evaluation.run_questions import COLUMNS, photo_image, questions_of
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.inference import user_turn
from addressvlm.models.cards import base_licence
from addressvlm.models.loading import context_length, resolve_model
from addressvlm.storage import tables
from addressvlm.storage.remote_path import list_files, path_of
from addressvlm.storage.run_dir import fresh_dir, is_done, slug
from ray_jobs import resolve_args
from ray_jobs.baselines.context import TEST, ComparisonContext, Row, SystemOutcome
from ray_jobs.baselines.retrieval import (
    Embeddings,
    Searcher,
    answering,
    embed_split,
    geocoder_of,
    index_parts,
    indexed,
    licences,
    made_from,
    stored,
)
from ray_jobs.common import absolute_path
from ray_jobs.evaluation import ModelWorker, model_digest, run_workers, work_units

PHOTOS = 64  # given to a worker together
AT_ONCE = 8  # prompts through the model together; they are long
REPLY = pa.schema([("id", pa.string()), ("reply", pa.string())])
READ = tables.with_features(
    pa.schema(
        [
            *(field for field in tables.SCORES if field.name != "scores"),
            ("similar", pa.list_(pa.string())),  # ids of training photos, as the prompt lists them
            ("dissimilar", pa.list_(pa.string())),
            ("prompt", pa.string()),
            ("reply", pa.string()),  # as the model wrote it; null if it gave none
            ("found_lat", pa.float64()),  # null if the reply holds no usable coordinates, or addresses were asked for
            ("found_lon", pa.float64()),
            ("found_street", pa.string()),  # the address of those coordinates
            ("found_district", pa.string()),
            ("why", pa.string()),  # refused, out of range, swapped, or empty
        ]
    )
)


def run(work: ComparisonContext, rival: RagConfig, redo: bool = False) -> SystemOutcome:
    """Answers to the questions of the kind generation, and coordinates where they are asked for.

    Raises:
        InputError: the encoder or the model is not there, the prompt is longer than the model can read, the endpoint refuses,
            or no training photo has coordinates.
    """
    gallery, files = indexed(work, rival.encoder, rival.name, redo)
    model = model_of(work, rival)
    folder = work.run.folder / "rag" / slug(rival.name)
    settings = {
        **made_from(work, gallery), "row": rival.model_dump(exclude={"name", "encoder", "model"}), "seed": work.config.seed,
        "model": rival.model if rival.endpoint else model_digest(resolve_model(model)), "dtype": work.config.model.dtype,
    }  # fmt: skip
    if not is_done(folder, settings, redo):
        everyone = embed_split(work, rival.encoder, TEST, redo)
        queries, begun = everyone.of(work.ids[TEST]), time.monotonic()
        with Searcher(index_parts(files, gallery)) as searcher:
            found = list(_found(work, rival, queries, gallery, searcher))
        prompts = {
            query["id"]: rag_prompt(rival, [gallery.photos[i] for i in near], [gallery.photos[i] for i in far])
            for query, (near, far) in zip(queries.photos, found, strict=True)
        }
        replies = _replies(work, rival, model, prompts, redo)
        with fresh_dir(folder, settings) as partial:
            rows = _read(work, rival, queries, gallery, found, prompts, replies)
            tables.write_table(partial, TEST, rows, READ)
        work.note(rival.name, "answering", answering([everyone], time.monotonic() - begun))
    return _outcome(work, rival, model, list(tables.iter_rows(folder, TEST)), gallery, stored(work, rival.encoder, files))


def model_of(work: ComparisonContext, rival: RagConfig) -> str:
    """The model's folder or hub name; at an endpoint, its name there.

    Raises:
        InputError: it is a system of `train.systems` that is not trained yet, or an endpoint's model is not named.
    """
    systems = {system.name: system for system in work.config.train.systems}
    if rival.endpoint:
        if not rival.model:
            raise InputError(f"compare.systems: '{rival.name}' has an endpoint and no model: name the one to ask there.")
        return rival.model
    if rival.model in systems:
        return resolve_args.model_of(work.config, work.run, systems[rival.model])
    return absolute_path(rival.model or work.config.model.base)


def _found(
    work: ComparisonContext, rival: RagConfig, queries: Embeddings, gallery: Embeddings, searcher: Searcher
) -> Iterator[tuple[list[int], list[int]]]:
    """Positions of the similar and of the dissimilar photos for each query; none is both."""
    vectors, ids = queries.vectors, [photo["id"] for photo in queries.photos]
    similar, many = rival.similar, len(gallery.photos)
    near = searcher.search(vectors, max(similar, 1)).position[:, :similar]
    if not rival.dissimilar:
        far = np.zeros((len(ids), 0), dtype=np.int64)
    elif rival.strategy == "random":
        far = random_neighbours(ids, many, min(rival.dissimilar + similar, many), work.config.seed)
    elif rival.strategy == "centroid":
        ordinary = cluster_representatives(gallery.vectors, rival.dissimilar, work.config.seed)
        far = ordinary[np.argsort(vectors @ gallery.vectors[ordinary].T, axis=1, kind="stable")]
    else:
        far = searcher.search(vectors, rival.dissimilar, farthest=True).position
    for close, others in zip(near.tolist(), far.tolist(), strict=True):
        yield close, [i for i in others if i not in close][: rival.dissimilar]


def _replies(
    work: ComparisonContext, rival: RagConfig, model: str, prompts: Mapping[str, str], redo: bool
) -> dict[str, str | None]:
    """Photo -> what the model wrote, None if it gave nothing."""
    files = tables.table_files(work.run.photos, TEST)
    if rival.endpoint:
        rows = (row for row in tables.iter_rows(work.run.photos, TEST, ["id", "image"]) if row["id"] in prompts)
        return rag.endpoint_replies(
            work.config.labels, rival, ((row["id"], row["image"]["bytes"], prompts[row["id"]]) for row in rows), len(prompts),
            work.run.folder / "rag" / f"{slug(rival.name)}-ledger", again=redo,
        )  # fmt: skip
    need = work.config.evaluate.model_copy(update={"max_new_tokens": rival.max_new_tokens, "temperature": rival.temperature})
    config = work.config.model_copy(update={"evaluate": need})
    units = list(work_units(files, set(prompts), max(1, min(PHOTOS, -(-len(prompts) // need.workers)))))
    rows = run_workers(config, units, Replier, (model, work.gazetteer, config, prompts), f"compare: {rival.name}", len(prompts))
    return {row["id"]: row["reply"] for row in rows}


class Replier(ModelWorker):
    """Shows its photos to a model, each with its own prompt; rows of REPLY."""

    columns, schema = ("id", "image"), REPLY

    def __init__(self, model: str, city: Gazetteer, config: Config, prompts: Mapping[str, str]) -> None:
        super().__init__(model, city, config)
        self.prompts = prompts

    def work(self, photos: list[Row]) -> Iterable[list[Row]]:
        """The replies, a batch at a time; prompts of about the same length go together."""
        import torch

        need, model = self.config.evaluate, self.load()
        photos = sorted(photos, key=lambda photo: (len(self.prompts[photo["id"]]), photo["id"]))
        for start in range(0, len(photos), AT_ONCE):
            batch = photos[start : start + AT_ONCE]
            texts, images = [self.prompts[photo["id"]] for photo in batch], [photo_image(photo) for photo in batch]
            _require_room(model, texts[-1], images[-1], need.max_new_tokens)
            torch.manual_seed(zlib.crc32(repr((self.config.seed, texts)).encode()))
            replies = model.answer(images, texts, need.max_new_tokens, need.temperature)
            yield [{"id": photo["id"], "reply": reply} for photo, reply in zip(batch, replies, strict=True)]


def _require_room(model: Any, text: str, image: Any, more: int) -> None:
    most = context_length(model.model)
    tokens = model.inputs([model.prompt([user_turn(text)])], [[image]])["input_ids"].shape[1]
    if most is not None and tokens + more > most:
        raise InputError(
            f"a prompt of {tokens:,} tokens and {more:,} of answer don't fit into the {most:,} that {model.folder} can read: "
            "lower similar and dissimilar of the row."
        )


def _read(
    work: ComparisonContext, rival: RagConfig, queries: Embeddings, gallery: Embeddings, found: Sequence[tuple[list[int], list[int]]],
    prompts: Mapping[str, str], replies: Mapping[str, str | None],
) -> list[Row]:  # fmt: skip
    """Rows of READ."""
    where = np.array([(photo["lon"], photo["lat"]) for photo in gallery.photos])
    city = (*where.min(0).tolist(), *where.max(0).tolist())
    rows: list[Row] = []
    for photo, (near, far) in zip(queries.photos, found, strict=True):
        reply = replies.get(photo["id"])
        row = {
            **photo, "similar": [gallery.photos[i]["id"] for i in near], "dissimilar": [gallery.photos[i]["id"] for i in far],
            "prompt": prompts[photo["id"]], "reply": reply, "why": None if reply else "empty",
        }  # fmt: skip
        if reply and rival.ask == "coordinates":
            said = rag.parse_coordinates(reply, city)
            row["why"] = said.why or None
            row["found_lat"], row["found_lon"] = said.point or (None, None)
        elif reply and not (work.gazetteer.find_street(reply) or work.gazetteer.find_district(reply)):
            row["why"] = "refused"
        rows.append(row)
    placed = [row for row in rows if row.get("found_lat") is not None]
    if placed:
        addresses = geocoder_of(work, gallery).addresses(*([row[key] for row in placed] for key in ("found_lat", "found_lon")))
        for row, address in zip(placed, addresses, strict=True):
            row["found_street"], row["found_district"] = address.street, address.district
    return rows


def _outcome(
    work: ComparisonContext, rival: RagConfig, model: str, rows: Sequence[Row], gallery: Embeddings, index_bytes: int
) -> SystemOutcome:
    made = SystemOutcome(stored_bytes=index_bytes, licences=licences(work, rival.encoder))
    if not rival.endpoint:
        folder = path_of(resolve_model(model))
        made.stored_bytes += sum(file.stat().st_size for file in list_files(folder, "*.safetensors"))
        its = work.config.model.model_copy(update={"base": resolve_model(model)})
        made.licences["model"] = base_licence(work.config.model_copy(update={"model": its})) or "not said"
    photos = {row["id"]: row for row in tables.iter_rows(work.run.photos, TEST, [c for c in COLUMNS if c != "image"])}
    for row in rows:
        for question in questions_of(photos[row["id"]]):
            if question["kind"] == "generation":
                made.answers.append({**question, "answer": _answer(row, question["level"], rival.ask)})
        if row["found_lat"] is not None:
            made.coordinates[row["id"]] = (row["found_lat"], row["found_lon"])
    why = Counter(row["why"] for row in rows if row["why"])
    made.notes = {
        "gallery": len(gallery.photos),
        "set_aside": gallery.set_aside,
        "replies": len(rows),
        **dict(sorted(why.items())),
    }
    return made


def _answer(row: Row, level: str, asked: str) -> str:
    """The reply itself, or the part of the coordinates' address that a question is about; blank without an answer."""
    if asked == "addresses":
        return row["reply"] or ""
    if row["found_street"] is None:
        return ""
    address = Address(row["found_street"], row["found_district"])
    return {"street": address.street, "district": address.district, "address": address.text()}[level]
