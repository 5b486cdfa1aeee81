"""The systems compared, part by part and without Ray"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from addressvlm import InputError
from addressvlm.baselines import addressclip
from addressvlm.baselines import rag as rag_module
from addressvlm.baselines.dual_encoder import build_dual_encoder, open_encoder
from addressvlm.baselines.retrieval import VectorIndex
from addressvlm.config import validate
from addressvlm.config.compare import AddressClipConfig, BlindConfig, GuessConfig, RagConfig
from addressvlm.gazetteer.gazetteer import Gazetteer
from ray_jobs.baselines import addressclip as clip
from ray_jobs.baselines import load_system, rag, retrieval, trained
from ray_jobs.baselines.retrieval import Embeddings, GallerySearch, IndexParts, build_index, index_loaders
from ray_jobs.baselines.system import ComparisonContext, SystemOutcome
from ray_jobs.evaluation import PhotoModel, write_scores
from tests.support.baselines import GAZETTEER, comparison_in, photo
from tests.support.dual_encoders import tiny_clip
from tests.support.families import picture
from tests.support.label_requests import config_of
from tests.support.openai_endpoint import Endpoint, says


def unit(seed: int, n: int, d: int = 6) -> np.ndarray:
    result = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return result / np.linalg.norm(result, axis=1, keepdims=True)


def embedded(folder: Path, split: str, count: int) -> Embeddings:
    """Photos with random vectors."""
    rows = [{key: value for key, value in photo(split, n).items() if key not in ("image", "rounds")} for n in range(count)]
    return Embeddings(
        folder / split, "dino a1", "b2", rows, unit(len(split), count), {"seconds": 2.0, "photos": count, "cpus": 1.0}
    )


@pytest.fixture
def context(tmp_path: Path) -> ComparisonContext:
    return comparison_in(tmp_path, "a/base", [photo("train", number) for number in range(9)])


# Embeddings and search


def test_some_photos_keep_their_own_vectors(tmp_path: Path) -> None:
    everything = embedded(tmp_path, "train", 6)
    some = everything.select(["train4", "train1"])
    assert [row["id"] for row in some.photos] == ["train4", "train1"]
    assert np.array_equal(some.vectors, everything.vectors[[4, 1]])
    everything.photos[2]["lat"], everything.photos[3]["lon"] = None, float("nan")
    known = everything.with_coordinates()
    assert [row["id"] for row in known.photos] == ["train0", "train1", "train4", "train5"]
    assert np.array_equal(known.vectors, everything.vectors[[0, 1, 4, 5]])
    assert known.set_aside == 2


def test_parts_of_an_index_find_what_one_index_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "PART", 4)
    gallery, queries, group = embedded(tmp_path, "train", 10), unit(3, 5), np.array([0, 1, 2, -1, 0, 1, 2, 2, 3, 0])
    files = build_index(gallery)
    assert [len(VectorIndex.load(file, gallery.encoder, 6)) for file in files] == [4, 4, 2]
    whole, pieces = (
        VectorIndex(gallery.vectors, "dino a1"),
        IndexParts([(4 * n, load) for n, load in enumerate(index_loaders(files, gallery))]),
    )
    assert pieces.size() == 10
    for farthest in (False, True):
        one, many = whole.search(queries, 3, farthest), pieces.search(queries, 3, farthest)
        assert np.array_equal(many.position, one.position)
        assert many.similarity == pytest.approx(one.similarity, abs=1e-6)
    assert pieces.best(queries, group, 5) == pytest.approx(whole.best(queries, group, 5), abs=1e-6)
    other = embedded(tmp_path, "train", 9)
    with pytest.raises(InputError, match="photos: 10 -> 9"):
        build_index(other)


def test_many_queries_are_answered_each_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, queries, group = unit(0, 12), unit(1, 5), np.arange(12) % 3
    whole = VectorIndex(gallery, "e")
    monkeypatch.setattr(ray, "get", None)  # one part needs no Ray
    monkeypatch.setattr(retrieval, "QUERIES", 2)
    with GallerySearch([lambda: whole]) as search:
        for farthest in (False, True):
            assert np.array_equal(search.nearest(queries, 4, farthest).position, whole.search(queries, 4, farthest).position)
        assert search.best(queries, group, 3) == pytest.approx(whole.best(queries, group, 3), abs=1e-6)


def test_matches_of_retrieval_are_each_photos_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, queries, address = embedded(tmp_path, "train", 9), embedded(tmp_path, "test", 5), np.arange(9) % 3
    with GallerySearch([lambda: VectorIndex(gallery.vectors, "e")]) as search:
        rows_of = partial(retrieval.match_rows, gallery=gallery, search=search, address=address, city=GAZETTEER, neighbours=3)
        alone = [next(rows_of(queries.select([row["id"]]))) for row in queries.photos]
        monkeypatch.setattr(retrieval, "QUERIES", 2)
        together = list(rows_of(queries))
    like = queries.vectors @ gallery.vectors.T
    for number, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert other["scores"] == pytest.approx(one["scores"])
        assert {**other, "scores": 0, "similarity": 0} == {**one, "scores": 0, "similarity": 0}
        assert (other["id"], other["lat"]) == (f"test{number}", queries.photos[number]["lat"])
        there = next(row for row in gallery.photos if row["id"] == other["found"])
        assert (other["found_lat"], other["found_lon"]) == (there["lat"], there["lon"])
        assert other["similarity"] == pytest.approx(like[number].max(), abs=1e-6)


def test_the_cost_of_queries_is_added_up_over_the_splits(tmp_path: Path) -> None:
    took = retrieval.query_cost([embedded(tmp_path, "val", 3), embedded(tmp_path, "test", 4)], 0.5)
    assert took == {"seconds": 4.5, "photos": 7, "cpus": 1.0}


def test_matches_that_are_there_are_of_the_same_photos_and_addresses(context: ComparisonContext, tmp_path: Path) -> None:
    gallery = embedded(tmp_path, "train", 4)
    elsewhere = validate({"city": {"manifest": "none.csv", "max_distance_m": 7}}, "test")
    result = [
        retrieval.search_settings(of, photos)
        for of, photos in (
            (context, gallery),
            (context, replace(gallery, encoder="clip")),
            (context, replace(gallery, data="b3")),
            (replace(context, ids={"test": context.ids["test"][:5]}), gallery),
            (replace(context, task=replace(context.task, gazetteer=Gazetteer(GAZETTEER.addresses[:2]))), gallery),
            (replace(context, task=replace(context.task, config=elsewhere)), gallery),
        )
    ]
    assert len({json.dumps(each) for each in result}) == 6


# Retrieval-augmented generation


@pytest.mark.parametrize("strategy", ["farthest", "random", "centroid"])
def test_similar_and_dissimilar_photos_of_each_query(context: ComparisonContext, tmp_path: Path, strategy: str) -> None:
    gallery, queries = embedded(tmp_path, "train", 12), embedded(tmp_path, "test", 5)
    settings = RagConfig(name="rag", kind="rag", similar=3, dissimilar=2, strategy=strategy)  # type: ignore[arg-type]
    like, seed = queries.vectors @ gallery.vectors.T, context.config.seed
    with GallerySearch([lambda: VectorIndex(gallery.vectors, "e")]) as search:
        result = list(rag.photo_lists(settings, queries, gallery, search, seed))
        one_by_one = [
            next(iter(rag.photo_lists(settings, queries.select([row["id"]]), gallery, search, seed))) for row in queries.photos
        ]
        none = settings.model_copy(update={"similar": 0, "dissimilar": 0})
        assert list(rag.photo_lists(none, queries, gallery, search, seed)) == [([], [])] * 5
    assert result == one_by_one
    for (near, far), row in zip(result, like, strict=True):
        assert near == np.argsort(-row)[:3].tolist()
        assert len(far) == len(set(far)) == 2
        assert not set(near) & set(far)
        if strategy == "farthest":
            assert far == np.argsort(row)[:2].tolist()
        if strategy == "centroid":
            assert row[far[0]] <= row[far[1]]


def test_each_photo_is_shown_with_its_own_prompt(context: ComparisonContext, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = [photo("test", number) for number in range(6)]
    prompts = {row["id"]: f"{row['street']} {row['id']}" + "?" * (7 * number % 5) for number, row in enumerate(photos)}

    class Model:
        def answer(self, images: list[Image.Image], texts: list[str], most: int, temperature: float) -> list[str]:
            assert (most, temperature) == (9, 0.5)
            return [f"{text} {image.getpixel((0, 0))}" for image, text in zip(images, texts, strict=True)]

    need = context.config.evaluate.model_copy(update={"max_new_tokens": 9, "temperature": 0.5})
    config = context.config.model_copy(update={"evaluate": need})
    seeds: list[int] = []
    monkeypatch.setattr(PhotoModel, "load", lambda model: Model())
    monkeypatch.setattr(rag, "require_context_length", lambda *_: None)
    monkeypatch.setattr(rag, "BATCH", 4)
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    rows = rag.reply_to_photos(PhotoModel("m", GAZETTEER, config), prompts, photos).tables["test"]
    replies = {row["id"]: row["reply"] for row in rows}
    assert [row["id"] for row in rows] == list(prompts)
    colours = {"Mill Street": (255, 0, 0), "Oak Avenue": (0, 0, 255), "Lake Road": (0, 128, 0)}
    assert replies == {row["id"]: f"{prompts[row['id']]} {colours[row['street']]}" for row in photos}
    assert len(set(seeds)) == 2  # each batch draws its own
    rag.reply_to_photos(PhotoModel("m", GAZETTEER, config.model_copy(update={"seed": 1})), prompts, photos)
    assert len(set(seeds)) == 4


def test_replies_of_an_endpoint_are_those_to_the_photos_own_prompts(tmp_path: Path, hurry: None) -> None:
    settings = RagConfig(name="rag", kind="rag", model="m", max_new_tokens=33, temperature=0.7)
    texts = {f"photo{number}": f"Where is number {number}?" for number in range(5)}

    def parts_of(body: dict[str, Any]) -> tuple[str, str]:
        image, text = body["messages"][-1]["content"]
        return text["text"], image["image_url"]["url"]

    with Endpoint(
        lambda number, body: says("" if "2" in parts_of(body)[0] else f"! {parts_of(body)[0]}")
    ).running() as endpoint:
        labels, settings = config_of(endpoint), settings.model_copy(update={"endpoint": endpoint.url})
        images = {name: photo("test", number)["image"]["bytes"] + bytes([number]) for number, name in enumerate(texts)}
        inputs = [(name, images[name], text) for name, text in texts.items()]
        result = rag_module.endpoint_replies(labels, settings, inputs, 5, tmp_path / "cache", show=lambda line: None)
        requests = dict(map(parts_of, endpoint.requests))
    assert result == {name: None if name == "photo2" else f"! {text}" for name, text in texts.items()}
    assert list(result) == list(texts)
    assert len({requests[text] for text in texts.values()}) == 5
    assert {(body["max_tokens"], body["temperature"], body["model"]) for body in endpoint.requests} == {(33, 0.7, "m")}


def test_an_answer_is_the_part_of_the_address_that_was_asked_for() -> None:
    row = {"reply": "Somewhere", "found_street": "Mill Street", "found_district": "Harbour"}
    texts = [rag.answer_text(row, level, "coordinates") for level in ("street", "district", "address")]
    assert texts == ["Mill Street", "Harbour", "Mill Street, Harbour"]
    assert rag.answer_text(row, "street", "addresses") == "Somewhere"
    assert rag.answer_text(row | {"found_street": None}, "address", "coordinates") == ""


# Costs, and systems made of others


def test_the_time_of_a_training_is_that_of_its_steps(context: ComparisonContext) -> None:
    stage = {"data": "photos", "batch_size": 4, "gradient_accumulation_steps": 3}
    train = {
        "workers": 2,
        "cpus_per_worker": 3,
        "gpus_per_worker": 0.5,
        "stages": {"a": stage, "b": {"data": "photos", "batch_size": 5}},
    }
    config = validate(
        {**context.config.model_dump(), "train": {**train, "systems": [{"name": "S", "stages": ["a", "b"]}]}}, "t"
    )
    journal = context.run.training_dir("S")
    journal.mkdir(parents=True)
    lines = [{"stage": "a", "samples_per_s": 8.0}, {"stage": "a", "samples_per_s": 12.0}, {"stage": "b", "samples_per_s": 5.0}]
    (journal / "loss.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    took = trained.training_cost(config, "S")
    assert took == {"seconds": 24 / 8 + 24 / 12 + 10 / 5, "photos": 58, "cpus": 6, "gpus": 1.0}


def test_a_cost_stays_until_it_is_measured_again(context: ComparisonContext) -> None:
    assert context.costs("A system") == {}
    context.save_cost("A system", "index", {"seconds": 1.0})
    context.save_cost("A system", "answering", {"seconds": 2.0})
    context.save_cost("Other", "index", {"seconds": 9.0})
    context.save_cost("A system", "index", {"seconds": 3.0})
    with context.measure_cost("A system", "training", 7, {"cpus": 2.0, "gpus": 1.0}):
        pass
    costs = context.costs("A system")
    assert (costs["index"], costs["answering"]) == ({"seconds": 3.0}, {"seconds": 2.0})
    assert {**costs["training"], "seconds": 0} == {"seconds": 0, "photos": 7, "cpus": 2.0, "gpus": 1.0}


def test_a_system_made_of_others_has_all_that_they_have(context: ComparisonContext) -> None:
    rows = [{**photo("test", int(name[-1])), "scores": [1.0, 2.0, 3.0]} for name in context.ids["test"]]
    scores = write_scores(context.task, "a", {"test": rows}, {})
    context = replace(
        context,
        outcomes={
            "a": SystemOutcome(scores=scores, parameters=3, stored_bytes=10, licences={"model": "mit"}),
            "b": SystemOutcome(parameters=4, stored_bytes=20, licences={"encoder": "apache-2.0"}),
        },
    )
    assert trained.scores_of(context, "a", "'F' fuses") == scores
    fewer = replace(context, ids={"test": context.ids["test"][1:]})
    with pytest.raises(InputError, match="'F' fuses 'a', which was scored on other photos of the split test"):
        trained.scores_of(fewer, "a", "'F' fuses")
    with pytest.raises(InputError, match="'F' fuses 'b', which has no scores"):
        trained.scores_of(context, "b", "'F' fuses")
    result = trained.combined_stats(context, ["a", "b", "a system that did not run"])
    assert (result.parameters, result.stored_bytes) == (7, 30)
    assert result.licences == {"model": "mit", "encoder": "apache-2.0"}


# Systems without a photo, and a dual encoder as it is


@pytest.mark.parametrize("by", ["commonest", "random"])
def test_a_guess_answers_every_question_and_sees_no_photo(context: ComparisonContext, by: str) -> None:
    system = GuessConfig(name="A guess", kind="guess", by=by)
    assert load_system("guess", system).run(context).answered
    answers = list(context.task.answers("A guess"))
    assert len(answers) == sum(len(photo("test", n)["rounds"]) for n in range(6))
    assert all(isinstance(row["correct"], bool) and row["answer"] for row in answers)


def test_a_blind_system_scores_all_photos_alike(context: ComparisonContext, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(PhotoModel):
        def address_scores(self, images: Any) -> np.ndarray:
            assert [image.getextrema() for image in images] == [((128, 128),) * 3]  # grey
            return np.array([[0.0, 2.0, 1.0]])

    def here(function: Any) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=function))

    monkeypatch.setattr(trained, "PhotoModel", Model)
    monkeypatch.setattr(trained, "ray", SimpleNamespace(get=lambda result: result, remote=here))
    monkeypatch.setattr(trained.train, "run_step", lambda *_, **__: None)
    monkeypatch.setattr(trained, "trained_model", lambda *_: "owner/model")
    monkeypatch.setattr(trained, "model_stats", lambda *_: SystemOutcome(stored_bytes=7))
    outcome = load_system("blind", BlindConfig(name="Blind", kind="blind")).run(context)
    assert outcome.stored_bytes == 7
    assert outcome.scores is not None
    rows = list(outcome.scores.rows("test"))
    assert [row["id"] for row in rows] == context.ids["test"]
    assert {tuple(row["scores"]) for row in rows} == {(0.0, 2.0, 1.0)}
    with pytest.raises(InputError, match=r"'Blind' is of nothing: systems of train\.systems are zero-shot"):
        load_system("blind", BlindConfig(name="Blind", kind="blind", of="nothing")).run(context)


def test_a_clip_is_kept_as_it_is_without_epochs(context: ComparisonContext, tmp_path: Path) -> None:
    base = tiny_clip(tmp_path / "clip")
    system = AddressClipConfig(name="zero-shot CLIP", kind="addressclip", base=str(base), epochs=0, captions="none")
    clip.AddressClipSystem(system).keep_untrained(context, clip.settings(context.config, system))
    folder = context.run.model_dir("zero-shot CLIP")
    images = [picture(5), picture(9)]
    kept, original = open_encoder(folder), build_dual_encoder(str(base), "", "float32", 0)
    assert torch.equal(kept.encode_images(images), original.encode_images(images))
    assert addressclip.trained_parameters(folder) == {"parameters": 0, "steps": 0, "without_caption": 0}
    with pytest.raises(InputError, match=r"'x' is not trained .* set base to a CLIP"):
        validate({"compare": {"systems": [{"name": "x", "kind": "addressclip", "epochs": 0}]}}, "test")
