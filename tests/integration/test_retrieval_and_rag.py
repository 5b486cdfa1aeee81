"""Retrieval and RAG on a real Ray, from photos to answers"""

import numpy as np
import pytest

from addressvlm import InputError
from addressvlm.baselines.retrieval import VectorIndex
from addressvlm.config.compare import EncoderConfig, RagConfig, RetrievalConfig
from addressvlm.gazetteer.gazetteer import Address
from addressvlm.storage import tables
from addressvlm.storage.files import remove_tree
from ray_jobs.baselines import rag, retrieval
from ray_jobs.baselines.rag import RagSystem
from ray_jobs.baselines.retrieval import GallerySearch, RetrievalSystem
from ray_jobs.baselines.system import ComparisonContext
from ray_jobs.evaluation import PhotoModel
from tests.support.baselines import GAZETTEER, comparison_in, photo, tiny_dino, where
from tests.support.label_requests import KEY
from tests.support.openai_endpoint import Endpoint, says
from tests.support.tiny import tiny_llava

pytestmark = pytest.mark.xdist_group("ray-answers")


@pytest.fixture(scope="module")
def context(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> ComparisonContext:
    """A run with nine training photos, one of them without coordinates."""
    folder = tmp_path_factory.mktemp("baselines")
    train = [photo("train", number, known=number != 8) for number in range(9)]
    tiny_dino(folder / "dino")
    return comparison_in(folder, tiny_llava(folder / "base"), train, evaluate={"workers": 1})


def encoder_of(context: ComparisonContext) -> EncoderConfig:
    return EncoderConfig(base=str(context.run.folder.parent / "dino"))


def test_photos_are_found_by_their_colour_and_geocoded(context: ComparisonContext, capsys: pytest.CaptureFixture[str]) -> None:
    system = RetrievalSystem(RetrievalConfig(name="Retrieval", kind="retrieval", encoder=encoder_of(context)))
    outcome = system.run(context)
    assert outcome.scores is not None
    rows = list(outcome.scores.rows("test"))
    assert [row["id"] for row in rows] == context.ids["test"]
    best = [GAZETTEER.addresses[int(np.argmax(row["scores"]))] for row in rows]
    assert best == [Address(row["street"], row["district"]) for row in rows]
    assert np.isfinite([row["scores"] for row in rows]).all()
    assert {outcome.coordinates[f"test{n}"] for n in (0, 3)} <= {where(0, n) for n in (0, 3, 6)}
    assert outcome.notes == {"gallery": 8, "set_aside": 1}
    assert outcome.stored_bytes > 8 * 16 * 4
    assert tables.read_table_file(context.run.rejects / "retrieval.parquet")["id"].to_pylist() == ["train8"]
    costs = context.costs("Retrieval")
    assert (costs["index"]["photos"], costs["answering"]["photos"]) == (9, 6)

    capsys.readouterr()
    assert system.run(context) == outcome
    assert "embed:" not in capsys.readouterr().out
    tiny_dino(context.run.folder.parent / "dino", seed=1)
    with pytest.raises(InputError, match="encoder: "):
        system.run(context)
    tiny_dino(context.run.folder.parent / "dino")


def test_photos_without_coordinates(context: ComparisonContext, monkeypatch: pytest.MonkeyPatch) -> None:
    result = retrieval.embed_split(context, encoder_of(context), "train")
    lost = [{**row, "lat": None} for row in result.photos]
    monkeypatch.setattr(retrieval, "embed_split", lambda *_: retrieval.replace(result, photos=lost))
    with pytest.raises(InputError, match=r"none of the 9 training photos of .* has coordinates: 'GPS' needs them"):
        RetrievalSystem(RetrievalConfig(name="GPS", kind="retrieval", encoder=encoder_of(context))).run(context)


def test_actors_find_what_one_index_finds(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "QUERIES", 1)  # five batches on their way
    rng = np.random.default_rng(0)
    gallery, queries = rng.normal(size=(25, 8)).astype(np.float32), rng.normal(size=(5, 8)).astype(np.float32)
    whole, group = VectorIndex(gallery, "e"), rng.integers(0, 4, 25)
    with GallerySearch(
        [lambda part=part: VectorIndex(part, "e") for part in (gallery[:10], gallery[10:20], gallery[20:])], 10
    ) as parts:
        for farthest in (False, True):
            one, many = whole.search(queries, 6, farthest), parts.nearest(queries, 6, farthest)
            assert many.similarity == pytest.approx(one.similarity, abs=1e-5)
            assert np.array_equal(many.position, one.position)
        assert parts.best(queries, group, 4) == pytest.approx(whole.best(queries, group, 4), abs=1e-5)


def test_a_local_model_reads_where_similar_photos_were_taken(context: ComparisonContext) -> None:
    settings = RagConfig(
        name="Mine", kind="rag", encoder=encoder_of(context), ask="addresses", similar=1, dissimilar=1, strategy="centroid",
        form="sentences", max_new_tokens=4, temperature=0,
    )  # fmt: skip
    outcome = RagSystem(settings).run(context)
    answers = list(context.task.answers("Mine"))
    rows = list(tables.iter_rows(context.run.folder / "rag" / "mine", "test"))
    assert [row["id"] for row in rows] == context.ids["test"]
    assert all(f"taken at {row['street']}, Harbour." in row["prompt"] for row in rows)
    assert all(set(row["similar"]).isdisjoint(row["dissimilar"]) for row in rows)
    texts = {row["id"]: row["reply"] or "" for row in rows}
    assert [(row["level"], row["answer"]) for row in answers[:3]] == [
        (level, texts["test0"]) for level in ("address", "district", "street")
    ]
    assert len(answers) == 3 * len(rows)
    assert not outcome.coordinates


def test_a_prompt_that_is_too_long_is_told(context: ComparisonContext) -> None:
    need = context.config.evaluate.model_copy(update={"max_new_tokens": 5000})
    config = context.config.model_copy(update={"evaluate": need})
    model = PhotoModel(context.config.model.base, GAZETTEER, config)
    with pytest.raises(InputError, match="lower similar and dissimilar"):
        rag.reply_to_photos(model, {"test0": "Where?"}, [photo("test", 0)])


def test_an_endpoint_that_answers_coordinates_prose_and_nothing(
    context: ComparisonContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    lat, lon = where(1, 0)
    replies = [
        f'{{"lat": {lat}, "lon": {lon}}}',
        f"Perhaps {lon}, {lat}?",
        "This is a lovely street in spring.",
        "",
        "95.5, 200.1",
    ]
    values = {"name": "Endpoint", "kind": "rag", "encoder": encoder_of(context), "model": "m", "similar": 2, "dissimilar": 2}
    with Endpoint(lambda number, _: says(replies[(number - 1) % len(replies)])).running() as endpoint:
        settings = RagConfig(**values, endpoint=endpoint.url)
        outcome = RagSystem(settings).run(context)
        assert RagSystem(settings).run(context) == outcome
        assert len(endpoint.requests) == 6
        remove_tree(context.run.folder / "rag" / "endpoint")
        assert RagSystem(settings).run(context) == outcome
        assert len(endpoint.requests) == 6  # every answer is in the response cache
        with pytest.raises(InputError, match="'Nameless' has an endpoint and no model"):
            RagSystem(settings.model_copy(update={"name": "Nameless", "model": None})).run(context)
    content = endpoint.requests[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "text"]
    assert '"similar": [{"lat": 52.' in content[1]["text"]
    assert (endpoint.requests[0]["max_tokens"], endpoint.requests[0]["temperature"]) == (64, 0.1)
    assert set(endpoint.keys) == {f"Bearer {KEY}"}

    rows = list(tables.iter_rows(context.run.folder / "rag" / "endpoint", "test"))
    assert sorted(row["why"] or "" for row in rows) == sorted(["", "", "swapped", "refused", "empty", "out of range"])
    assert {row["reply"] for row in rows} == {*replies[:3], None, replies[4]}
    assert {*outcome.coordinates.values()} == {(lat, lon)}
    assert outcome.notes == {
        "gallery": 8, "set_aside": 1, "replies": 6, "empty": 1, "out of range": 1, "refused": 1, "swapped": 1,
    }  # fmt: skip
    answers = list(context.task.answers("Endpoint"))
    answered = {row["id"]: {a["level"]: a["answer"] for a in answers if a["id"] == row["id"]} for row in rows}
    for row in rows:
        name = GAZETTEER.addresses[0].street if row["found_lat"] is None else row["found_street"]
        expected = ("", "", "") if row["found_lat"] is None else ("Harbour", name, f"{name}, Harbour")
        assert tuple(answered[row["id"]][level] for level in ("district", "street", "address")) == expected
    assert KEY not in "".join(
        path.read_text(errors="replace") for path in (context.run.folder / "rag").rglob("*") if path.is_file()
    )


def test_the_model_may_be_a_system_of_the_run(context: ComparisonContext) -> None:
    with pytest.raises(InputError, match="'AddressVLM' is not trained yet"):
        rag.model_of(context, RagConfig(name="rag", kind="rag", model="AddressVLM"))
    assert rag.model_of(context, RagConfig(name="rag", kind="rag")) == context.config.model.base
