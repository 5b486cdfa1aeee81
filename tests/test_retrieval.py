"""Vectors, indexes and what coordinates are worth: python -m pytest tests/test_retrieval.py"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
)

from addressvlm import InputError
from addressvlm.addresses import Address, Gazetteer
from addressvlm.baselines.encoder import Encoder
from addressvlm.baselines.geography import Geocoder, address_scores, chosen, distance_m, within
from addressvlm.baselines.index import Found, Index, drawn, merged, typical
from addressvlm.baselines.rag_prompt import prompt
from addressvlm.cities.streets import StreetMap
from addressvlm.config_compare import RagConfig
from tests.families import picture, tiny_fastvlm
from tests.rivals import DINO

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION, TEXT = {**TOWER, "image_size": 32, "patch_size": 8}, {**TOWER, "vocab_size": 64}
MODELS: dict[str, Any] = {
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=12)),
    "siglip": lambda: SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**DINO)),
    "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
}


# Encoders


@pytest.mark.parametrize(("kind", "dimension"), [("clip", 12), ("siglip", 16), ("dinov2", 16), ("resnet", 16), ("fastvlm", 16)])
def test_every_kind_of_encoder_gives_a_unit_vector_a_photo(kind: str, dimension: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if kind == "fastvlm":
        folder = tiny_fastvlm(tmp_path)
    else:
        folder = tmp_path / kind
        MODELS[kind]().save_pretrained(folder)
        CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    encoder, photos = Encoder(str(folder)), [picture(seed) for seed in range(3)]
    vectors = encoder.encode(photos)
    assert (vectors.shape, vectors.dtype) == ((3, dimension), np.float32)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-6)
    assert encoder.encode(photos[1:2])[0] == pytest.approx(vectors[1], abs=1e-6)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-4


def test_what_is_no_image_encoder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model folder"):
        Encoder(str(tmp_path / "none"))
    LlamaModel(LlamaConfig(**TOWER, vocab_size=50)).save_pretrained(tmp_path / "text")
    with pytest.raises(InputError, match="can't be loaded as an image encoder"):
        Encoder(str(tmp_path / "text"))


# Indexes


def unit(rng: np.random.Generator, n: int, d: int = 6) -> np.ndarray:
    made = rng.normal(size=(n, d)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 20), st.booleans(), st.integers(0, 1000))
def test_shards_find_what_the_whole_finds(photos: int, shards: int, k: int, farthest: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gallery, queries = unit(rng, photos), unit(rng, 5)
    cuts = [part for part in np.array_split(np.arange(photos), shards) if len(part)]
    parts = [Index(gallery[part], "e").search(queries, k, farthest) for part in cuts]
    found = merged([Found(p.similarity, p.position + c[0]) for p, c in zip(parts, cuts, strict=True)], k, farthest)
    like = queries @ gallery.T
    expected = np.sort(like if farthest else -like, axis=1)[:, :k]
    assert found.similarity == pytest.approx(expected if farthest else -expected, abs=1e-5)
    assert np.take_along_axis(like, found.position, 1) == pytest.approx(found.similarity, abs=1e-5)
    assert all(len(set(row)) == len(row) == min(k, photos) for row in found.position.tolist())


def test_best_photo_of_each_group() -> None:
    rng = np.random.default_rng(0)
    gallery, queries, group = unit(rng, 40), unit(rng, 3), rng.integers(-1, 4, 40)
    found = Index(gallery, "e").best(queries, group, 5)
    assert found[:, :4] == pytest.approx(np.stack([(queries @ gallery[group == g].T).max(1) for g in range(4)], 1), abs=1e-6)
    assert np.isneginf(found[:, 4]).all()


def test_an_index_of_another_encoder_is_refused(tmp_path: Path) -> None:
    made = Index(unit(np.random.default_rng(0), 9), "clip a1")
    made.save(tmp_path / "0.faiss")
    assert np.array_equal(Index.load(tmp_path / "0.faiss", "clip a1", 6).vectors, made.vectors)
    for encoder, dimension in (("dino b2", 6), ("clip a1", 7)):
        with pytest.raises(InputError, match="made by the encoder clip a1 with 6 numbers"):
            Index.load(tmp_path / "0.faiss", encoder, dimension)
    with pytest.raises(InputError, match="don't fit an index of 6"):
        made.search(np.zeros((1, 7), np.float32), 1)
    (tmp_path / "0.faiss").write_bytes(b"no index")
    with pytest.raises(InputError, match="can't be read as an index"):
        Index.load(tmp_path / "0.faiss", "clip a1", 6)


def test_other_ways_to_be_dissimilar() -> None:
    gallery = unit(np.random.default_rng(0), 200)
    assert np.array_equal(drawn(["a", "b"], 200, 5, 0)[1], drawn(["b"], 200, 5, 0)[0])
    ordinary = typical(gallery, 4, 0)
    assert len(ordinary) > 4
    assert np.array_equal(ordinary, typical(gallery, 4, 0))
    assert len(typical(gallery[:3], 4, 0)) <= 3


# Coordinates and addresses

SQUARE = shapely.box(0.0, 52.0, 0.02, 52.02)
MAP = StreetMap(
    ["Mill Street", "King Street"],
    [shapely.LineString([(0, 52.005), (0.02, 52.005)]), shapely.LineString([(0, 52.015), (0.02, 52.015)])],
    [("Harbour", SQUARE)],
)
MILL, KING, OAK = (Address(street, "Harbour") for street in ("Mill Street", "King Street", "Oak Avenue"))
GAZETTEER = Gazetteer([MILL, KING, OAK])
PHOTOS = [
    {"lat": 52.0051, "lon": 0.01, "street": "King Street", "district": "Harbour"},  # by the map it is on Mill Street
    {"lat": 52.0149, "lon": 0.01, "street": "King Street", "district": "Harbour"},
    {"lat": 52.0100, "lon": 0.01, "street": "Oak Avenue", "district": "Harbour"},  # far from all streets of the map
]


def test_geocoder_asks_the_map_and_else_the_nearest_photo() -> None:
    geocoder = Geocoder(MAP, 40, PHOTOS)
    assert geocoder.addresses([52.0051, 52.0101, -33.0], [0.012, 0.01, 151.0]) == [MILL, OAK, KING]
    assert [GAZETTEER.addresses[i] for i in geocoder.of_photos(GAZETTEER)] == [MILL, KING, OAK]
    without = Geocoder(StreetMap([], []), 40, PHOTOS)
    assert without.addresses([52.0051], [0.01]) == [KING]
    assert Geocoder(MAP, 40, PHOTOS).of_photos(Gazetteer([KING])).tolist() == [0, 0, -1]


@settings(max_examples=50)
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_the_first_address_is_that_of_the_vote(neighbours: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gallery, queries, address = unit(rng, 30, 3), unit(rng, 8, 3), rng.integers(-1, 5, 30)
    index = Index(gallery, "e")
    nearest, best = index.search(queries, neighbours), index.best(queries, address, 7)
    scores = address_scores(nearest, address, best)
    assert np.isfinite(scores).all()
    for row, like, positions in zip(scores, nearest.similarity, nearest.position, strict=True):
        votes = {a: ((1 + like[address[positions] == a]) / 2).sum() for a in set(address[positions].tolist()) - {-1}}
        order = np.argsort(-row, kind="stable").tolist()
        assert set(order[: len(votes)]) == set(votes)
        assert not votes or votes[order[0]] == pytest.approx(max(votes.values()))
        assert {5, 6} <= set(order[-(7 - len(set(address.tolist()) - {-1})) :])  # no photo was taken there
    winners = np.argmax(scores, axis=1)
    known = (address[nearest.position] >= 0).any(axis=1)
    assert (address[chosen(nearest, address, winners)] == winners)[known].all()


def test_distances_and_shares() -> None:
    assert distance_m(52.2053, 0.1218, 51.5074, -0.1278) == pytest.approx(79_500, rel=0.01)  # Cambridge to London
    assert distance_m(0, 0, 0, 180) == pytest.approx(np.pi * 6_371_008.8)
    photos = [{"id": str(i), "place": str(i), "lat": 52.0, "lon": 0.0} for i in range(4)]
    unknown = {"id": "x", "place": "x", "lat": None, "lon": None}
    found = within([*photos, unknown], {"0": (52.0, 0.0), "1": (52.0004, 0.0), "2": (53.0, 0.0), "x": (1.0, 1.0)}, 100)
    assert {name: found[name]["value"] for name in ("25 m", "50 m", "1 km", "200 km", "2500 km")} == {
        "25 m": 0.25, "50 m": 0.5, "1 km": 0.5, "200 km": 0.75, "2500 km": 0.75,
    }  # fmt: skip
    assert found["25 m"]["n"] == 4


# Prompts


def test_prompts_say_what_they_are_told_to() -> None:
    near, far = PHOTOS[:2], PHOTOS[2:]

    def said(**settings: Any) -> str:
        return prompt(RagConfig(name="rag", kind="rag", **settings), near, far)

    assert '{"similar": [{"lat": 52.0051, "lon": 0.01}, {"lat": 52.0149, "lon": 0.01}], "dissimilar": [{"lat"' in said()
    assert '"lat": "52°00\'18.4\\"N"' in said(degrees="dms")
    backwards = said(form="sentences", order="dissimilar first")
    assert backwards.index("unlike this one were taken at 52.01000, 0.01000.") < backwards.index("52.00510, 0.01000; 52.01490")
    assert "taken at King Street, Harbour; King Street, Harbour." in said(ask="addresses", form="sentences")
    assert "52." not in said(ask="addresses")
    assert prompt(RagConfig(name="rag", kind="rag"), [], []).startswith("Where was this photo taken?")
