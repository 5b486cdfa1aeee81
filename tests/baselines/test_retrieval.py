"""Vectors, indexes and what coordinates are worth"""

from pathlib import Path
from typing import Any

import numpy as np
import pyproj
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
from addressvlm.baselines import retrieval as indexes
from addressvlm.baselines.encoders import Encoder, embed_photos
from addressvlm.baselines.rag import rag_prompt
from addressvlm.baselines.retrieval import (
    Geocoder,
    Neighbours,
    VectorIndex,
    cluster_representatives,
    distance_m,
    merge_neighbours,
    nearest_address_scores,
    random_neighbours,
    share_within,
    vote_address,
)
from addressvlm.config.compare import RagConfig
from addressvlm.dataset.streets import StreetMap
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from tests.support.baselines import DINO, photo, tiny_dino
from tests.support.families import picture, tiny_fastvlm

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


def test_photos_are_embedded_each_as_alone(tmp_path: Path) -> None:
    base, rows = str(tiny_dino(tmp_path)), [photo("train", number) for number in range(5)]
    made = embed_photos(base, "float32", False, 1, 2, "val", rows).tables
    assert list(made) == ["val"]
    assert [row["id"] for row in made["val"]] == [row["id"] for row in rows]
    for row, alike in zip(made["val"], rows, strict=True):
        (alone,) = embed_photos(base, "float32", False, 1, 8, "val", [alike]).tables["val"]
        assert "image" not in row
        assert row["street"] == alike["street"]
        assert row["vector"] == pytest.approx(alone["vector"], abs=1e-5)
    assert len({tuple(np.round(row["vector"], 4)) for row in made["val"]}) == 3  # of as many colours


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
    parts = [VectorIndex(gallery[part], "e").search(queries, k, farthest) for part in cuts]
    result = merge_neighbours(
        [Neighbours(p.similarity, p.position + c[0]) for p, c in zip(parts, cuts, strict=True)], k, farthest
    )
    like = queries @ gallery.T
    expected = np.sort(like if farthest else -like, axis=1)[:, :k]
    assert result.similarity == pytest.approx(expected if farthest else -expected, abs=1e-5)
    assert np.take_along_axis(like, result.position, 1) == pytest.approx(result.similarity, abs=1e-5)
    assert all(len(set(row)) == len(row) == min(k, photos) for row in result.position.tolist())


def test_best_photo_of_each_group() -> None:
    rng = np.random.default_rng(0)
    gallery, queries, group = unit(rng, 40), unit(rng, 3), rng.integers(-1, 4, 40)
    result = VectorIndex(gallery, "e").best(queries, group, 5)
    assert result[:, :4] == pytest.approx(np.stack([(queries @ gallery[group == g].T).max(1) for g in range(4)], 1), abs=1e-6)
    assert np.isneginf(result[:, 4]).all()


def test_best_is_the_same_however_many_queries_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    gallery, queries, group = unit(rng, 40), unit(rng, 7), rng.integers(-1, 4, 40)
    at_once = VectorIndex(gallery, "e").best(queries, group, 5)
    monkeypatch.setattr(indexes, "BLOCK", 3 * 40)
    assert VectorIndex(gallery, "e").best(queries, group, 5) == pytest.approx(at_once, abs=1e-6)


def test_of_equally_similar_photos_the_first_comes_first() -> None:
    like = np.array([[0.5, 0.25]], dtype=np.float32)
    parts = [Neighbours(like, np.array([[7, 5]])), Neighbours(like, np.array([[2, 9]]))]
    assert merge_neighbours(parts, 3).position.tolist() == [[2, 7, 5]]
    assert merge_neighbours(parts, 3, farthest=True).position.tolist() == [[5, 9, 2]]


def test_an_index_of_another_encoder_is_refused(tmp_path: Path) -> None:
    made = VectorIndex(unit(np.random.default_rng(0), 9), "clip a1")
    made.save(tmp_path / "0.faiss")
    assert np.array_equal(VectorIndex.load(tmp_path / "0.faiss", "clip a1", 6).vectors, made.vectors)
    for encoder, dimension in (("dino b2", 6), ("clip a1", 7)):
        with pytest.raises(InputError, match="made by the encoder clip a1 with 6 numbers"):
            VectorIndex.load(tmp_path / "0.faiss", encoder, dimension)
    with pytest.raises(InputError, match="don't fit an index of 6"):
        made.search(np.zeros((1, 7), np.float32), 1)
    (tmp_path / "0.faiss").write_bytes(b"no index")
    with pytest.raises(InputError, match="can't be read as an index"):
        VectorIndex.load(tmp_path / "0.faiss", "clip a1", 6)


def test_other_ways_to_be_dissimilar() -> None:
    gallery = unit(np.random.default_rng(0), 200)
    assert np.array_equal(random_neighbours(["a", "b"], 200, 5, 0)[1], random_neighbours(["b"], 200, 5, 0)[0])
    ordinary = cluster_representatives(gallery, 4, 0)
    assert len(ordinary) > 4
    assert np.array_equal(ordinary, cluster_representatives(gallery, 4, 0))
    assert len(cluster_representatives(gallery[:3], 4, 0)) <= 3
    many = random_neighbours([str(number) for number in range(50)], 20, 6, 0)
    assert all(len(set(row)) == 6 for row in many.tolist())
    assert set(many.ravel().tolist()) == set(range(20))
    assert not np.array_equal(many, random_neighbours([str(number) for number in range(50)], 20, 6, 1))
    assert random_neighbours(["a"], 3, 6, 0).shape == (1, 3)


def test_clusters_are_stood_for_by_a_photo_of_their_middle() -> None:
    middles = np.eye(6, dtype=np.float32)[:4]
    around = np.concatenate(
        [middles + 0.2 * np.eye(6, dtype=np.float32)[4 + side] * sign for side in (0, 1) for sign in (1, -1)]
    )
    gallery = np.concatenate([around / np.linalg.norm(around, axis=1, keepdims=True), middles])
    assert cluster_representatives(gallery, 1, 0).tolist() == [16, 17, 18, 19]


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
    assert [GAZETTEER.addresses[i] for i in geocoder.photo_addresses(GAZETTEER)] == [MILL, KING, OAK]
    without = Geocoder(StreetMap([], []), 40, PHOTOS)
    assert without.addresses([52.0051], [0.01]) == [KING]
    assert Geocoder(MAP, 40, PHOTOS).photo_addresses(Gazetteer([KING])).tolist() == [0, 0, -1]


def test_the_nearest_photo_far_north_is_nearest_in_metres() -> None:
    photos = [
        {"lat": 60.0, "lon": 10.0015, "street": "East", "district": "D"},  # 83 m
        {"lat": 60.001, "lon": 10.0, "street": "North", "district": "D"},  # 111 m, in degrees the nearer one
    ]
    assert Geocoder(StreetMap([], []), 40, photos).addresses([60.0], [10.0]) == [Address("East", "D")]


@settings(max_examples=50)
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_the_first_address_is_that_of_the_vote(neighbours: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gallery, queries, address = unit(rng, 30, 3), unit(rng, 8, 3), rng.integers(-1, 5, 30)
    index = VectorIndex(gallery, "e")
    nearest, best = index.search(queries, neighbours), index.best(queries, address, 7)
    scores = nearest_address_scores(nearest, address, best)
    assert np.isfinite(scores).all()
    for row, like, positions in zip(scores, nearest.similarity, nearest.position, strict=True):
        votes = {a: ((1 + like[address[positions] == a]) / 2).sum() for a in set(address[positions].tolist()) - {-1}}
        order = np.argsort(-row, kind="stable").tolist()
        assert set(order[: len(votes)]) == set(votes)
        assert not votes or votes[order[0]] == pytest.approx(max(votes.values()))
        assert {5, 6} <= set(order[-(7 - len(set(address.tolist()) - {-1})) :])  # no photo was taken there
    winners = np.argmax(scores, axis=1)
    known = (address[nearest.position] >= 0).any(axis=1)
    assert (address[vote_address(nearest, address, winners)] == winners)[known].all()


def test_scores_by_hand() -> None:
    address, best = np.array([0, 1, 0, -1, 2]), np.array([[0.5, 0.4, 0.3, -np.inf]], dtype=np.float32)
    three = Neighbours(np.array([[0.5, 0.4, 0.2]], dtype=np.float32), np.array([[0, 1, 2]]))
    scores = nearest_address_scores(three, address, best)[0]
    least = np.log(0.7)
    assert scores[:2] == pytest.approx([np.log(0.75 + 0.6), least])  # each vote is (1 + similarity) / 2
    assert scores[2] == pytest.approx(least - 1e-6)  # likelier than the last that voted: right behind the least vote
    assert scores[3] == pytest.approx(least - (1.01 + 0.2) / 0.01 - 1e-6, rel=1e-5)
    one = nearest_address_scores(Neighbours(three.similarity[:, :1], three.position[:, :1]), address, best)[0]
    assert one[:3] - one[0] == pytest.approx([0, -0.1 / 0.01, -0.2 / 0.01], abs=1e-4)  # the softmax of s / 0.01
    nobody = nearest_address_scores(Neighbours(np.array([[0.6]], dtype=np.float32), np.array([[3]])), address, best)[0]
    assert nobody - nobody[0] == pytest.approx([0, -10, -20, -151], abs=1e-3)


def test_the_photo_that_is_shown_is_the_nearest_that_voted_for_the_winner() -> None:
    address = np.array([0, 1, 1, 2])
    nearest = Neighbours(np.array([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7]]), np.array([[0, 2, 1], [3, 0, 1]]))
    assert vote_address(nearest, address, np.array([1, 5])).tolist() == [2, 3]


@pytest.mark.parametrize(("lat", "lon"), [(60.0, 10.0), (-60.0, -170.0), (0.0, 0.0)])
def test_distances_are_those_on_the_sphere(lat: float, lon: float) -> None:
    geod = pyproj.Geod(a=6_371_008.8, b=6_371_008.8)
    north, east = np.array([0.01, 0.0, -0.02, 30.0]), np.array([0.0, 0.01, 0.05, -60.0])
    expected = geod.inv(np.full(4, lon), np.full(4, lat), lon + east, lat + north)[2]
    assert distance_m(lat, lon, lat + north, lon + east) == pytest.approx(expected)


def test_shares_within_a_radius_are_in_metres_far_north() -> None:
    geod, photos = pyproj.Geod(ellps="sphere"), []
    coordinates = {}
    for number, metres in enumerate((24.8, 25.2, 49, 99, 101, 900, 24_000)):
        photos.append({"id": str(number), "place": str(number), "lat": 60.0, "lon": 10.0 + number})
        lon, lat, _ = geod.fwd(10.0 + number, 60.0, 90, metres)
        coordinates[str(number)] = (lat, lon)
    shares = share_within(photos, coordinates, 100)
    assert [round(7 * share["value"]) for share in shares.values()] == [1, 3, 4, 5, 6, 7, 7, 7, 7]
    assert list(shares) == ["25 m", "50 m", "100 m", "500 m", "1 km", "25 km", "200 km", "750 km", "2500 km"]


def test_distances_and_shares() -> None:
    assert distance_m(52.2053, 0.1218, 51.5074, -0.1278) == pytest.approx(79_500, rel=0.01)  # Cambridge to London
    assert distance_m(0, 0, 0, 180) == pytest.approx(np.pi * 6_371_008.8)
    photos = [{"id": str(i), "place": str(i), "lat": 52.0, "lon": 0.0} for i in range(4)]
    unknown = {"id": "x", "place": "x", "lat": None, "lon": None}
    result = share_within([*photos, unknown], {"0": (52.0, 0.0), "1": (52.0004, 0.0), "2": (53.0, 0.0), "x": (1.0, 1.0)}, 100)
    assert {name: result[name]["value"] for name in ("25 m", "50 m", "1 km", "200 km", "2500 km")} == {
        "25 m": 0.25, "50 m": 0.5, "1 km": 0.5, "200 km": 0.75, "2500 km": 0.75,
    }  # fmt: skip
    assert result["25 m"]["n"] == 4


# Prompts


def test_prompts_say_what_they_are_told_to() -> None:
    near, far = PHOTOS[:2], PHOTOS[2:]

    def prompt(**settings: Any) -> str:
        return rag_prompt(RagConfig(name="rag", kind="rag", **settings), near, far)

    assert '{"similar": [{"lat": 52.0051, "lon": 0.01}, {"lat": 52.0149, "lon": 0.01}], "dissimilar": [{"lat"' in prompt()
    assert '"lat": "52°00\'18.4\\"N"' in prompt(degrees="dms")
    backwards = prompt(form="sentences", order="dissimilar first")
    assert backwards.index("unlike this one were taken at 52.01000, 0.01000.") < backwards.index("52.00510, 0.01000; 52.01490")
    assert "taken at King Street, Harbour; King Street, Harbour." in prompt(ask="addresses", form="sentences")
    assert "52." not in prompt(ask="addresses")
    turned = prompt(order="dissimilar first")
    assert turned.index('"dissimilar": [{"lat": 52.01,') < turned.index('"similar": [{"lat": 52.0051')
    assert "the similar photos and unlikely near the dissimilar ones" in prompt()
    assert prompt().endswith('{"lat": <latitude in decimal degrees>, "lon": <longitude in decimal degrees>}')
    west = [{"lat": -33.99999, "lon": -70.5}]
    assert '"lat": "33°59\'60.0' not in rag_prompt(RagConfig(name="rag", kind="rag", degrees="dms"), west, [])
    assert '{"lat": "34°00\'00.0\\"S", "lon": "70°30\'00.0\\"W"}' in rag_prompt(
        RagConfig(name="rag", kind="rag", degrees="dms"), west, []
    )
    alone = rag_prompt(RagConfig(name="rag", kind="rag", form="sentences"), [], far)
    assert alone.startswith("Photos that look unlike this one were taken at 52.01000, 0.01000.\n")
    assert rag_prompt(RagConfig(name="rag", kind="rag"), [], []).startswith("Where was this photo taken?")
