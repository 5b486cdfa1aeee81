"""A language model that sees the photo and reads where similar and dissimilar photos were taken (paper 004).

Writes <run>/rag/<system>/test-*.parquet: the prompt of each photo, the reply as it came, and what was read from it. Replies of
an endpoint are also kept in <run>/rag/<system>-response_cache, so that none is paid for twice.
"""

import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from addressvlm import InputError
from addressvlm.baselines.rag import endpoint_replies, parse_coordinates, rag_prompt
from addressvlm.baselines.retrieval import cluster_representatives, random_neighbours
from addressvlm.config.compare import RagConfig
from addressvlm.evaluation.run_questions import in_order, photo_image, questions_of
from addressvlm.gazetteer.gazetteer import Address
from addressvlm.inference import user_turn
from addressvlm.models.cards import base_licence
from addressvlm.models.loading import context_length, resolve_model
from addressvlm.storage import tables
from addressvlm.storage.files import digest
from addressvlm.storage.remote_path import list_files, path_of
from addressvlm.storage.run_dir import fresh_dir, is_done, slug
from addressvlm.storage.shards import Rows, ShardResult, ShardWork
from ray_jobs import evaluation
from ray_jobs.baselines import retrieval
from ray_jobs.baselines.retrieval import Embeddings, GallerySearch
from ray_jobs.baselines.system import ComparisonContext, System, SystemOutcome
from ray_jobs.common import absolute_path
from ray_jobs.evaluation import PHOTO_COLUMNS, TEST, ModelOutput, PhotoModel, Row, model_digest, trained_model

BATCH = 8  # prompts that go through the model together; they are long
REPLY = pa.schema([("id", pa.string()), ("reply", pa.string())])
REPLIES = tables.with_features(
    pa.schema(
        [
            *(field for field in tables.SCORES if field.name != "scores"),
            ("similar", pa.list_(pa.string())),  # ids of training photos, as the prompt lists them
            ("dissimilar", pa.list_(pa.string())),
            ("prompt", pa.string()),
            ("reply", pa.string()),  # as the model wrote it; null if it gave none
            ("found_lat", pa.float64()),  # null if the reply holds no usable coordinates, or the prompt wants addresses
            ("found_lon", pa.float64()),
            ("found_street", pa.string()),  # the address of those coordinates
            ("found_district", pa.string()),
            ("why", pa.string()),  # refused, out of range, swapped, or empty
        ]
    )
)

PhotoLists = list[tuple[list[int], list[int]]]  # positions of the similar and of the dissimilar photos, a pair for each query


class RagSystem(System[RagConfig]):
    """Answers to the questions of the kind generation, and coordinates if the prompt wants them."""

    def run(self, context: ComparisonContext, redo: bool = False) -> SystemOutcome:
        settings, name = self.settings, self.name
        gallery, files = retrieval.open_gallery(context, settings.encoder, name, redo)
        model = model_of(context, settings)
        folder = context.run.folder / "rag" / slug(name)
        depends_on = {
            **retrieval.search_settings(context, gallery),
            "system": settings.model_dump(exclude={"name", "encoder", "model"}),
            "seed": context.config.seed,
            "model": settings.model if settings.endpoint else model_digest(resolve_model(model)),
            "dtype": context.config.model.dtype,
        }
        if not is_done(folder, depends_on, redo):
            embeddings = retrieval.embed_split(context, settings.encoder, TEST, redo)
            queries, start = embeddings.select(context.ids[TEST]), time.monotonic()
            with GallerySearch(retrieval.index_loaders(files, gallery)) as search:
                lists = list(photo_lists(settings, queries, gallery, search, context.config.seed))
            prompts = {
                query["id"]: rag_prompt(settings, [gallery.photos[i] for i in near], [gallery.photos[i] for i in far])
                for query, (near, far) in zip(queries.photos, lists, strict=True)
            }
            replies = model_replies(context, settings, model, prompts, depends_on, redo)
            with fresh_dir(folder, depends_on) as temporary:
                rows = reply_rows(context, settings, queries, gallery, lists, prompts, replies)
                tables.write_table(temporary, TEST, rows, REPLIES)
            context.save_cost(name, "answering", retrieval.query_cost([embeddings], time.monotonic() - start))

        rows = list(
            tables.iter_rows(folder, TEST, [name for name in REPLIES.names if name not in ("prompt", "similar", "dissimilar")])
        )
        evaluation.write_answers(context.task, name, reply_answers(context, settings, rows), {"system": settings.model_dump()})
        problems = Counter(row["why"] for row in rows if row["why"])
        outcome = SystemOutcome(
            answered=True,
            coordinates={row["id"]: (row["found_lat"], row["found_lon"]) for row in rows if row["found_lat"] is not None},
            stored_bytes=retrieval.stored_bytes(context, settings.encoder, files),
            licences=retrieval.encoder_licence(context, settings.encoder),
            notes={
                "gallery": len(gallery.photos),
                "set_aside": gallery.set_aside,
                "replies": len(rows),
                **dict(sorted(problems.items())),
            },
        )
        if not settings.endpoint:
            base = resolve_model(model)
            outcome.stored_bytes += sum(file.stat().st_size for file in list_files(path_of(base), "*.safetensors"))
            config = context.config.model_copy(update={"model": context.config.model.model_copy(update={"base": base})})
            outcome.licences["model"] = base_licence(config) or "not stated"
        return outcome


def model_of(context: ComparisonContext, settings: RagConfig) -> str:
    """The model's folder or hub name; at an endpoint, its name there."""
    systems = {system.name: system for system in context.config.train.systems}
    if settings.endpoint:
        if not settings.model:
            raise InputError(f"compare.systems: '{settings.name}' has an endpoint and no model: name the one to ask there.")
        return settings.model
    if settings.model in systems:
        return trained_model(context.config, systems[settings.model])
    return absolute_path(settings.model or context.config.model.base)


def photo_lists(
    settings: RagConfig, queries: Embeddings, gallery: Embeddings, search: GallerySearch, seed: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Positions of the similar and of the dissimilar photos of each query; no photo is in both."""
    vectors, ids = queries.vectors, [photo["id"] for photo in queries.photos]
    similar, dissimilar, count = settings.similar, settings.dissimilar, len(gallery.photos)
    nearest = search.nearest(vectors, max(similar, 1)).position[:, :similar]
    if not dissimilar:
        farthest = np.zeros((len(ids), 0), dtype=np.int64)
    elif settings.strategy == "random":
        farthest = random_neighbours(ids, count, min(dissimilar + similar, count), seed)
    elif settings.strategy == "centroid":
        representatives = cluster_representatives(gallery.vectors, dissimilar, seed)
        farthest = representatives[np.argsort(vectors @ gallery.vectors[representatives].T, axis=1, kind="stable")]
    else:
        farthest = search.nearest(vectors, dissimilar, farthest=True).position
    for near, far in zip(nearest.tolist(), farthest.tolist(), strict=True):
        yield near, [position for position in far if position not in near][:dissimilar]


def model_replies(
    context: ComparisonContext, settings: RagConfig, model: str, prompts: Mapping[str, str], depends_on: Row, redo: bool
) -> dict[str, str | None]:
    """Photo -> the reply of the model or of the endpoint, None if it gave none."""
    photos, need = context.run.photos, context.config.evaluate
    if settings.endpoint:
        rows = (row for row in tables.iter_rows(photos, TEST, ["id", "image"]) if row["id"] in prompts)
        requests = ((row["id"], row["image"]["bytes"], prompts[row["id"]]) for row in rows)
        cache = context.run.folder / "rag" / f"{slug(settings.name)}-response_cache"
        return endpoint_replies(context.config.labels, settings, requests, len(prompts), cache, redo_failed=redo)
    need = need.model_copy(update={"max_new_tokens": settings.max_new_tokens, "temperature": settings.temperature})
    config = context.config.model_copy(update={"evaluate": need})
    work = ShardWork(
        partial(reply_to_photos, PhotoModel(model, context.gazetteer, config), prompts), REPLY, ["id", "image"], digest(prompts)
    )
    folder = context.run.folder / "rag" / f"{slug(settings.name)}-replies"
    output = ModelOutput(folder, depends_on, TEST, list(prompts), work)
    evaluation.run_model(f"compare: {settings.name}", config, photos, [output], redo)
    return {row["id"]: row["reply"] for row in tables.iter_rows(folder, TEST)}


def reply_to_photos(model: PhotoModel, prompts: Mapping[str, str], photos: Rows) -> ShardResult:
    """Rows of REPLY: a model's answer to each photo and its prompt; prompts of about the same length go together."""
    import torch

    need, localizer = model.config.evaluate, model.loaded
    replies: dict[str, str] = {}
    by_length = sorted(photos, key=lambda photo: (len(prompts[photo["id"]]), photo["id"]))
    for start in range(0, len(by_length), BATCH):
        batch = by_length[start : start + BATCH]
        texts, images = [prompts[photo["id"]] for photo in batch], [photo_image(photo) for photo in batch]
        require_context_length(localizer, texts[-1], images[-1], need.max_new_tokens)
        torch.manual_seed(zlib.crc32(repr((model.config.seed, texts)).encode()))
        answers = localizer.answer(images, texts, need.max_new_tokens, need.temperature)
        replies |= {photo["id"]: reply for photo, reply in zip(batch, answers, strict=True)}
    return ShardResult({TEST: [{"id": photo["id"], "reply": replies[photo["id"]]} for photo in photos]})


def require_context_length(model: Any, text: str, image: Any, new_tokens: int) -> None:
    """Refuse a prompt that does not fit into the model's context with its reply."""
    longest = context_length(model.model)
    tokens = model.inputs([model.prompt([user_turn(text)])], [[image]])["input_ids"].shape[1]
    if longest is not None and tokens + new_tokens > longest:
        raise InputError(
            f"a prompt of {tokens:,} tokens and {new_tokens:,} of answer don't fit into the {longest:,} that {model.folder} "
            "can read: lower similar and dissimilar of the system."
        )


def reply_rows(
    context: ComparisonContext, settings: RagConfig, queries: Embeddings, gallery: Embeddings, lists: PhotoLists,
    prompts: Mapping[str, str], replies: Mapping[str, str | None],
) -> list[Row]:  # fmt: skip
    """Rows of REPLIES: what each reply says, and the address of its coordinates."""
    lonlat = np.array([(photo["lon"], photo["lat"]) for photo in gallery.photos])
    bounds = (*lonlat.min(0).tolist(), *lonlat.max(0).tolist())
    rows: list[Row] = []
    for photo, (near, far) in zip(queries.photos, lists, strict=True):
        reply = replies.get(photo["id"])
        row = {
            **photo, "similar": [gallery.photos[i]["id"] for i in near], "dissimilar": [gallery.photos[i]["id"] for i in far],
            "prompt": prompts[photo["id"]], "reply": reply, "why": None if reply else "empty",
        }  # fmt: skip
        if reply and settings.ask == "coordinates":
            parsed = parse_coordinates(reply, bounds)
            row["why"] = parsed.why or None
            row["found_lat"], row["found_lon"] = parsed.point or (None, None)
        elif reply and not (context.gazetteer.find_street(reply) or context.gazetteer.find_district(reply)):
            row["why"] = "refused"
        rows.append(row)
    located = [row for row in rows if row.get("found_lat") is not None]
    if located:
        coordinates = ([row[key] for row in located] for key in ("found_lat", "found_lon"))
        addresses = retrieval.open_geocoder(context, gallery).addresses(*coordinates)
        for row, address in zip(located, addresses, strict=True):
            row["found_street"], row["found_district"] = address.street, address.district
    return rows


def reply_answers(context: ComparisonContext, settings: RagConfig, rows: Sequence[Row]) -> Iterator[Row]:
    """Unjudged rows of ANSWERS of the kind generation, from rows of REPLIES in the order of the photos."""
    replies = {row["id"]: row for row in rows}
    for photo in tables.iter_rows(context.run.photos, TEST, PHOTO_COLUMNS):
        for question in in_order(questions_of(photo)) if photo["id"] in replies else ():
            if question["kind"] == "generation":
                yield {**question, "answer": answer_text(replies[photo["id"]], question["level"], settings.ask)}


def answer_text(row: Row, level: str, reply_kind: str) -> str:
    """The reply itself, or the part of the coordinates' address that a question is about; blank without an answer.

    Args:
        row: of REPLIES.
        level: street, district or address.
        reply_kind: coordinates or addresses, as in the prompt.
    """
    if reply_kind == "addresses":
        return row["reply"] or ""
    if row["found_street"] is None:
        return ""
    address = Address(row["found_street"], row["found_district"])
    return {"street": address.street, "district": address.district, "address": address.text()}[level]
