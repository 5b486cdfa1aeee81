"""Several cities on one base, without Ray: each answers as its own merged model would."""

import asyncio
import shutil
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import serve as service
from addressvlm import InputError
from addressvlm.answers.calibration import Calibration
from addressvlm.answers.priors import Prior
from addressvlm.answers.types import Sampling
from addressvlm.inference import Localizer
from serve.cities import City, base_model, find_cities, pick_city
from serve.engine import Engine, input_size
from serve.errors import ApiError
from serve.images import decode_base64
from serve.metrics import ServiceMetrics
from serve.requests import ChatQuery, LocalizeQuery
from serve.vllm_engine import VllmModel, unique_prefix_lengths
from tests.support.running_service import two_cities

pytestmark = pytest.mark.xdist_group("serve")
PIXELS = np.random.default_rng(1).integers(0, 255, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return two_cities(tmp_path_factory.mktemp("cities"))


def settings(systems: list[Path], **more: object) -> service.ServiceSettings:
    return service.ServiceSettings(cities=[str(system) for system in systems], dtype="float32", **more)


def test_each_city_answers_as_its_merged_model(systems: list[Path]) -> None:
    given = settings(systems)
    engine = Engine(given, find_cities(given))
    words = ChatQuery(
        "", [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Tell."}]}], [PIXELS], Sampling(6)
    )
    for city in ("toytown", "st-alder", "toytown"):
        merged = Localizer(systems[0 if city == "toytown" else 1] / "merged")
        expected = merged.localize(Image.fromarray(PIXELS), top_k=None)
        (found,) = engine.localize([LocalizeQuery(city, PIXELS, 9, Prior(), None)])
        assert [c.street for c in found.candidates] == [c.street for c in expected.candidates]
        assert found.confidence == pytest.approx(expected.confidence, rel=1e-3)
        (told,) = merged.chat(words.messages, [Image.fromarray(PIXELS)], words.sampling)
        (answer,) = engine.chat([ChatQuery(city, words.messages, words.images, words.sampling)])
        assert answer[0].text == told.text


def test_cities_in_one_batch_do_not_mix(systems: list[Path]) -> None:
    given = settings(systems)
    engine = Engine(given, find_cities(given))
    cities = ["toytown", "st-alder", "toytown", "st-alder"]
    photos = np.random.default_rng(2).integers(0, 255, (4, 40, 60, 3), dtype=np.uint8)
    asked = [LocalizeQuery(city, pixels, 9, Prior(), None) for city, pixels in zip(cities, photos, strict=True)]
    apart = [engine.localize([where])[0] for where in asked]
    engine = Engine(given, find_cities(given))  # that remembers no photo
    together = engine.localize(asked)
    assert [t.confidence for t in together] == pytest.approx([a.confidence for a in apart], rel=1e-4)
    assert len({round(a.confidence, 4) for a in apart}) == 4
    bad = LocalizeQuery("toytown", PIXELS, 9, Prior(streets=("Elm Row",)), None)
    refused, fine = engine.localize([bad, asked[0]])
    assert isinstance(refused, InputError)
    assert fine.confidence == pytest.approx(apart[0].confidence, rel=1e-4)


class Scored(VllmModel):
    """The vLLM engine with a merged model of transformers in vLLM's place, which tests don't have."""

    def __init__(self, merged: Path) -> None:
        self.localizer = Localizer(merged)
        self.gazetteer, self.calibration, self.metrics = (
            self.localizer.gazetteer,
            Calibration(temperature=2.0),
            ServiceMetrics(),
        )

    async def _address_scores(self, photo: str, answers: Sequence[str]) -> np.ndarray:
        scores = self.localizer.address_scores([Image.open(BytesIO(decode_base64(photo)))])[0]
        of_text = dict(zip([address.text() for address in self.localizer.require_gazetteer().addresses], scores, strict=True))
        return np.array([of_text[answer] for answer in answers])


def test_vllm_reads_addresses_as_far_as_transformers_does(systems: list[Path]) -> None:
    localizer = Localizer(systems[0] / "merged")
    texts = [address.text() for address in localizer.require_gazetteer().addresses]
    trie = localizer.trie(texts).unique_prefixes()
    assert list(unique_prefix_lengths(systems[0] / "merged", texts).values()) == trie.depths[trie.ends].tolist()


def test_vllms_scores_make_the_same_ranking(systems: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Scored(systems[0] / "merged")
    model.localizer.calibration = model.calibration
    for prior in (Prior(), Prior(streets=("Mill Street", "Quay Lane"), weights={"Quay Lane": 3})):
        expected = model.localizer.localize(Image.fromarray(PIXELS), top_k=9, prior=prior)
        found = asyncio.run(model.localize(LocalizeQuery("toytown", PIXELS, 9, prior, None)))
        assert [c.street for c in found.candidates] == [c.street for c in expected.candidates]
        assert found.confidence == pytest.approx(expected.confidence, rel=1e-4)
    model.calibration = Calibration(2.0, 0.8, {"0.8": 0.9999})
    for threshold, known in ((None, False), (0.0, True), (1.0, False)):
        found = asyncio.run(model.localize(LocalizeQuery("toytown", PIXELS, 2, Prior(), threshold)))
        least = 0.9999 if threshold is None else threshold
        assert (found.known, found.threshold, len(found.candidates)) == (known, least, 2)
    monkeypatch.setattr("serve.vllm_engine.MAX_ADDRESSES", 2)
    two = Prior(streets=("Mill Street", "Quay Lane"))
    assert len(asyncio.run(model.localize(LocalizeQuery("toytown", PIXELS, 9, two, None))).candidates) == 2
    refused = asyncio.run(model.localize(LocalizeQuery("toytown", PIXELS, 9, Prior(), None)))
    assert (refused.status, refused.code) == (501, "not_implemented")


def test_a_city_makes_room_and_comes_back(systems: list[Path]) -> None:
    given = settings(systems)
    engine = Engine(given, find_cities(given))
    where = LocalizeQuery("toytown", PIXELS, 9, Prior(), None)
    before = engine.localize([where])[0]
    engine.remove_city("toytown")
    engine.remove_city("toytown")
    engine.add_city("st-alder")
    assert list(engine.localizers) == ["st-alder"]
    assert engine.localize([where])[0].confidence == pytest.approx(before.confidence, rel=1e-5)
    assert set(engine.localizers) == {"toytown", "st-alder"}
    engine.settings = settings(systems, cities_per_replica=1)
    assert engine.localize([where])[0].confidence == pytest.approx(before.confidence, rel=1e-5)
    assert list(engine.localizers) == ["toytown"]
    engine.localize([LocalizeQuery("st-alder", PIXELS, 1, Prior(), None)])
    assert list(engine.localizers) == ["st-alder"]


def test_a_question_that_is_too_long_fails_alone(systems: list[Path]) -> None:
    given = settings(systems)
    engine = Engine(given, find_cities(given))

    def question(text: str, most: int) -> ChatQuery:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return ChatQuery("toytown", [turn], [PIXELS], Sampling(most))

    short = question("Tell.", 6)
    alone = engine.chat([short])[0]
    engine.context_length = engine._prompt_length(short) + 6
    (told,), refused, (cut,) = engine.chat([short, question("Tell. " * 50, 6), question("Tell me.", 6)])
    assert told.text == alone[0].text
    assert isinstance(refused, InputError)
    assert cut.tokens < 6


def test_a_stream_goes_on_while_another_city_answers(systems: list[Path]) -> None:
    given = settings(systems)
    engine = Engine(given, find_cities(given))
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Tell."}]}]
    question = ChatQuery("toytown", turn, [PIXELS], Sampling(8))
    alone = "".join(piece.text for piece in engine.stream_chat(question))
    pieces, between = engine.stream_chat(question), []
    while (piece := next(pieces, None)) is not None:
        between.append(piece.text)
        engine.localize([LocalizeQuery("st-alder", PIXELS, 1, Prior(), None)])
    assert "".join(between) == alone


def test_runs_and_folders_of_runs_are_found(systems: list[Path]) -> None:
    root = systems[0].parents[2]
    assert [c.id for c in find_cities(service.ServiceSettings(cities=str(root)))] == ["toytown", "st-alder"]
    assert [c.model for c in find_cities(service.ServiceSettings(cities=f"{root}/run1"))] == ["run1/addressvlm"]
    with pytest.raises(InputError, match="both of the city"):
        find_cities(settings([systems[0], _copy(systems[0])]))
    with pytest.raises(InputError, match="holds no adapter"):
        find_cities(service.ServiceSettings(cities=str(systems[0] / "merged")))


def _copy(system: Path) -> Path:
    other = system.parents[3] / "other" / "models" / "addressvlm"
    shutil.copytree(system, other, dirs_exist_ok=True)
    return other


def test_cities_that_can_not_be_served_are_refused_in_words(systems: list[Path], tmp_path: Path) -> None:
    cities = find_cities(settings(systems))
    config = systems[0] / "adapter" / "adapter_config.json"
    other = tmp_path / "adapter_config.json"
    other.write_text(config.read_text().replace(str(systems[0].parents[2] / "base"), "/elsewhere"))
    with pytest.raises(InputError, match="give its folder with base="):
        base_model([City("x", "X", "x", tmp_path, tmp_path)], None)
    with pytest.raises(InputError, match="serve them apart"):
        base_model([cities[0], City("x", "X", "x", tmp_path, tmp_path)], None)
    assert base_model([City("x", "X", "x", tmp_path, tmp_path)], "given") == "given"
    engine = Engine(
        settings(systems, base=str(systems[0].parents[2] / "base")), [*cities, City("x", "X", "x", tmp_path, tmp_path)]
    )
    with pytest.raises(InputError, match="can't be put on the base model"):
        engine.add_city("x")


def test_the_city_of_a_request(systems: list[Path]) -> None:
    cities = find_cities(settings(systems))
    assert pick_city(cities, "st. alder") is pick_city(cities, "ST-ALDER") is cities[1]
    assert pick_city(cities[:1], None) is cities[0]
    for wanted, status in (("Atlantis", 404), (None, 400)):
        with pytest.raises(ApiError, match=r"'toytown', 'st-alder'") as caught:
            pick_city(cities, wanted)
        assert caught.value.status == status


@pytest.mark.parametrize(
    ("size", "side"),
    [({"height": 32, "width": 48}, 48), ({"shortest_edge": 3136, "longest_edge": 12_845_056}, 2048), ({}, 2048)],
)
def test_the_side_of_a_models_input(size: dict[str, int], side: int) -> None:
    assert input_size(type("Processor", (), {"size": size, "crop_size": None})) == side
