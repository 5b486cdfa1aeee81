"""Encoders in other formats than transformers'

The numbers expected here are those of the original code with the same weights: open_clip (commit 89fb801, before 4.2) with timm
1.0.31, MegaLoc (1af071c), SALAD (e593005) with DINOv2 (b8931f7).
"""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from addressvlm import InputError
from addressvlm.baselines import addressclip
from addressvlm.baselines.dual_encoder import build_dual_encoder, open_encoder
from addressvlm.baselines.encoders import Encoder
from addressvlm.baselines.place_recognition import Aggregation, interpolate_positions, sinkhorn
from addressvlm.models.loading import resolve_model
from addressvlm.storage.run_dir import Run
from tests.support.baselines import tiny_dino
from tests.support.dual_encoders import addressclip_config, photo_run
from tests.support.encoder_formats import (
    PLAIN_CFG,
    SHORTEST,
    SIGLIP_CFG,
    SQUASH,
    megaloc_weights,
    photo,
    salad_weights,
    write_open_clip,
    write_places,
)
from tests.support.tiny import tiny_llava

PHOTOS = [photo(1), photo(2)]
IDS = torch.tensor([[7, 40, 90, 3, *[0] * 20], [300, 12, 5, 80, 200, 3, *[0] * 18]])
OPEN_CLIP: dict[str, Any] = {
    "plain": (
        PLAIN_CFG, SHORTEST,
        [[0.32414, -0.3271, -0.14883, -0.1165, -0.44079, -0.23522], [0.31216, -0.28216, -0.1226, -0.12654, -0.46914, -0.28696]],
        [[0.05782, -0.16344, -0.45513, 0.40223, 0.15157, -0.31405], [0.10771, -0.17538, -0.35237, 0.38699, 0.13804, -0.223]],
    ),
    "siglip": (
        SIGLIP_CFG, SQUASH,
        [[-0.04941, 0.16608, 0.16769, 0.09058, 0.3933, 0.00839], [-0.00417, 0.20433, 0.21533, -0.01262, 0.40671, 0.05814]],
        [[0.13002, 0.18994, 0.30528, 0.32813, -0.10385, 0.23447], [0.14489, 0.2288, 0.30362, 0.32837, -0.09623, 0.21995]],
    ),
}  # fmt: skip
PLACES: dict[str, Any] = {
    "salad": (salad_weights, [
        [0.17941, -0.23349, 0.19678, 0.30944, -0.16975, -0.05769, -0.08455, -0.10008, -0.17465, -0.1049, -0.11422, -0.41595,
         -0.40047, -0.38156, -0.20774, -0.26734, -0.28523],
        [0.18942, -0.24955, 0.11598, 0.36279, -0.08232, -0.0863, -0.10541, -0.0137, -0.15211, -0.28099, -0.17825, -0.46006,
         -0.37469, -0.46392, -0.0881, -0.13978, -0.05305],
    ]),
    "megaloc": (megaloc_weights, [
        [0.25485, 0.08796, 0.3523, 0.05742, 0.26131, 0.19811, 0.72216, 0.41335],
        [0.29596, 0.09131, 0.36638, 0.05178, 0.27805, 0.11961, 0.71549, 0.40449],
    ]),
}  # fmt: skip


# open_clip


@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_open_clip_gives_its_own_vectors(kind: str, tmp_path: Path) -> None:
    cfg, preprocessing, images, texts = OPEN_CLIP[kind]
    folder = write_open_clip(tmp_path / kind, cfg, preprocessing)
    assert resolve_model(str(folder)) == str(folder)
    vectors = Encoder(str(folder)).encode(PHOTOS)
    assert vectors[:, :6] == pytest.approx(np.array(images), abs=2e-5)
    dual = build_dual_encoder(str(folder), "toy", "float32", 0)
    assert dual.encode_images(PHOTOS).numpy() == pytest.approx(vectors, abs=1e-6)
    with torch.no_grad():
        result = dual.project_texts(dual.text_states({"input_ids": IDS}))
    assert result[:, :6].numpy() == pytest.approx(np.array(texts), abs=2e-5)


@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_it_is_saved_as_a_model_of_transformers(kind: str, tmp_path: Path) -> None:
    cfg, preprocessing, *_ = OPEN_CLIP[kind]
    encoder = build_dual_encoder(str(write_open_clip(tmp_path / kind, cfg, preprocessing)), "toy", "float32", 0)
    texts = ["Mill Street", "Oak Avenue, Harbour " * 20]
    (tmp_path / "saved").mkdir()
    encoder.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").is_file()
    again = open_encoder(tmp_path / "saved")
    assert torch.equal(again.encode_images(PHOTOS), encoder.encode_images(PHOTOS))
    assert torch.equal(again.encode_texts(texts), encoder.encode_texts(texts))
    assert Encoder(str(tmp_path / "saved")).encode(PHOTOS) == pytest.approx(encoder.encode_images(PHOTOS).numpy(), abs=1e-6)


def test_texts_are_cleaned_as_open_clip_does(tmp_path: Path) -> None:
    siglip = build_dual_encoder(str(write_open_clip(tmp_path / "siglip", SIGLIP_CFG, SQUASH)), "toy", "float32", 0)
    tokens = siglip.tokens(["  Mill_Street,\n (HARBOUR)!"])
    assert tokens.keys() == {"input_ids"}  # its padding is looked at
    assert torch.equal(tokens["input_ids"], siglip.tokens(["mill street harbour"])["input_ids"])
    plain = build_dual_encoder(str(write_open_clip(tmp_path / "plain")), "toy", "float32", 0)
    spaced, tight, lower = (plain.tokens([text])["input_ids"] for text in (" Mill  Street ", "Mill Street", "mill street"))
    assert torch.equal(spaced, tight)
    assert not torch.equal(tight, lower)  # that is left to the tokenizer


def test_addressclip_learns_from_open_clip(tmp_path: Path) -> None:
    config = photo_run(tmp_path, tiny_llava(tmp_path / "llava"))
    clip = write_open_clip(tmp_path / "clip")
    addressclip.train_addressclip(config, addressclip_config(base=str(clip), max_steps=2), None, lambda metrics, snapshot: None)
    folder = Run(config).model_dir("AddressCLIP")
    trained = load_file(folder / "model.safetensors")["visual_projection.weight"]
    assert (trained - load_file(clip / "open_clip_model.safetensors")["visual.proj"].T).abs().max() > 0
    assert open_encoder(folder).encode_texts(["Mill Street"]).shape == (1, 16)


def changed(cfg: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(cfg)
    for name, values in sections.items():
        made[name].update(values)
    return made


@pytest.mark.parametrize(
    ("cfg", "photos", "message"),
    [
        (changed(PLAIN_CFG, vision_cfg={"layers": [3, 4, 6, 3]}), {}, r"vision_cfg.layers \[3, 4, 6, 3\] .*no model of transf"),
        (changed(SIGLIP_CFG, vision_cfg={"timm_model_name": "convnext_base"}), {}, "timm_model_name 'convnext_base'"),
        (changed(PLAIN_CFG, vision_cfg={"attentional_pool": True}), {}, "vision_cfg.attentional_pool True"),
        (changed(PLAIN_CFG, vision_cfg={"pool_type": "avg"}), {}, "vision_cfg.pool_type 'avg'"),
        (changed(PLAIN_CFG, text_cfg={"hf_model_name": "roberta-base"}), {}, "text_cfg.hf_model_name 'roberta-base'"),
        (changed(SIGLIP_CFG, text_cfg={"no_causal_mask": False}), {}, "text_cfg.no_causal_mask False"),
        (changed(SIGLIP_CFG, text_cfg={"norm_kwargs": {"bias": 1}}), {}, "norm_kwargs {'bias': 1}"),
        (PLAIN_CFG, {"resize_mode": "longest"}, "preprocess_cfg.resize_mode 'longest'"),
        (changed(PLAIN_CFG, vision_cfg={"width": 32, "head_width": 8}), {}, r"class_embedding' makes 24 numbers .* for 32"),
        (changed(PLAIN_CFG, text_cfg={"heads": 5}), {}, "makes no model .*number of attention heads"),
        (changed(PLAIN_CFG, vision_cfg={"layers": 1}), {}, r"has 'visual.transformer.resblocks.1.attn.in_proj_bias', which"),
        (changed(PLAIN_CFG, vision_cfg={"layers": 3}), {}, r"has no 'visual.transformer.resblocks.2\.[a-z_0-9.]+': get"),
        ({"embed_dim": 16}, {}, "no model_cfg with vision_cfg and text_cfg"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_from_open_clip_says_why(cfg: dict, photos: dict, message: str, tmp_path: Path) -> None:
    write_open_clip(tmp_path / "clip", cfg if "vision_cfg" in cfg else PLAIN_CFG)
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": photos}))
    with pytest.raises(InputError, match=message) as error:
        Encoder(str(tmp_path / "clip"))
    assert str(tmp_path / "clip") in str(error.value)


def test_files_of_open_clip_that_are_missing(tmp_path: Path) -> None:
    folder = write_open_clip(tmp_path)
    (folder / "tokenizer.json").unlink()
    assert Encoder(str(folder)).encode(PHOTOS).shape == (2, 16)  # photos need none
    with pytest.raises(InputError, match=r"has no tokenizer.json: copy .* of openai/clip-vit-base-patch32 into it"):
        build_dual_encoder(str(folder), "toy", "float32", 0)
    torch.save(load_file(folder / "open_clip_model.safetensors"), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has only pickled weights \(open_clip_pytorch_model.bin\).*save them as safetensors"):
        Encoder(str(folder))
    (folder / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"has no open_clip_model.safetensors: get the file"):
        Encoder(str(folder))
    (folder / "open_clip_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="is no safetensors file"):
        Encoder(str(folder))
    (folder / "open_clip_config.json").write_text("{")
    with pytest.raises(InputError, match=r"open_clip_config.json of .* is no JSON"):
        Encoder(str(folder))


def test_a_folder_in_both_formats_is_one_of_transformers(tmp_path: Path) -> None:
    write_open_clip(tiny_dino(tmp_path))
    assert Encoder(str(tmp_path))._model.config.model_type == "dinov2"


# Place recognition


@pytest.mark.parametrize("kind", PLACES)
def test_place_recognition_gives_the_originals_vectors(kind: str, tmp_path: Path) -> None:
    weights, expected = PLACES[kind]
    folder = write_places(tmp_path, weights(), image_size=[42, 70], feat_dim=8)
    vectors = Encoder(str(folder)).encode(PHOTOS)
    assert vectors == pytest.approx(np.array(expected), abs=2e-5)
    assert Encoder(str(folder), "bfloat16").encode(PHOTOS) == pytest.approx(vectors, abs=0.02)


def test_without_a_size_photos_are_322_pixels_wide(tmp_path: Path) -> None:
    encoder = Encoder(str(write_places(tmp_path, salad_weights())))
    assert encoder._inputs(PHOTOS)["pixel_values"].shape == (2, 3, 322, 322)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.floats(-3, 3), st.integers(0, 10_000))
def test_mass_is_kept(clusters: int, more: int, dustbin: float, seed: int) -> None:
    patches, generator = clusters + more, torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(2, patches, clusters, generator=generator)
    shares = sinkhorn(scores, torch.tensor(dustbin), rounds=500)
    assert shares.shape == scores.shape
    assert shares.sum(dim=1) == pytest.approx(torch.ones(2, clusters), abs=1e-2)  # each cluster takes 1
    early = sinkhorn(scores, torch.tensor(dustbin))
    assert (early >= 0).all()
    assert (early.sum(dim=2) <= 1 + 1e-5).all()  # of each patch, less what goes to the dustbin


def test_the_order_of_patches_does_not_matter() -> None:
    torch.manual_seed(0)
    aggregation, tokens = Aggregation(12, 8, clusters=3, cluster=4, scene=5), torch.randn(2, 21, 12)
    shuffled = torch.cat([tokens[:, :1], tokens[:, 1:][:, torch.randperm(20)]], dim=1)
    assert aggregation(tokens).shape == (2, aggregation.width)
    assert torch.allclose(aggregation(shuffled), aggregation(tokens), atol=1e-6)


def test_positions_stay_where_the_grid_is_the_learnt_one() -> None:
    embeddings = torch.randn(1, 1 + 16, 3)
    assert interpolate_positions(embeddings, 4, 4) is embeddings
    assert interpolate_positions(embeddings, 2, 7).shape == (1, 15, 3)
    assert torch.equal(interpolate_positions(embeddings, 2, 7)[:, 0], embeddings[:, 0])
    flat = interpolate_positions(torch.ones_like(embeddings), 3, 9)
    assert torch.allclose(flat, torch.ones_like(flat), atol=1e-5)


def dropped(name: str) -> Callable[[dict], None]:
    return lambda weights: weights.pop(name)


def put(name: str, *shape: int) -> Callable[[dict], None]:
    return lambda weights: weights.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        (dropped("backbone.model.blocks.1.ls2.gamma"), 42, r"has no 'backbone.model.blocks.1.ls2.gamma': get the whole file"),
        (dropped("aggregator.dust_bin"), 42, r"has no 'aggregator.dust_bin'"),
        (put("backbone.model.register_tokens", 1, 4, 64), 42, "has 'backbone.model.register_tokens', which"),
        (put("aggregator.score.0.weight", 512, 32, 1, 1), 42, r"score.0.weight' makes 512 x 32 numbers where .* 512 x 64"),
        (put("backbone.model.patch_embed.proj.weight", 70, 3, 14, 14), 42, "a DINOv2 70 wide has no heads of 64"),
        (lambda weights: None, 320, r"image_size of .* is 320: give multiples of 14, such as 322"),
        (lambda weights: None, [14, 42], "no more patches than the 3 clusters"),
        (lambda weights: None, "large", "is large: give a side in pixels"),
    ],
)
def test_what_is_no_place_recognition_says_why(change: Callable[[dict], None], size: Any, message: str, tmp_path: Path) -> None:
    folder = write_places(tmp_path, salad_weights(), image_size=size)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match=message) as error:
        Encoder(str(folder))
    assert str(folder) in str(error.value)


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"aggregator.score.0.weight": torch.zeros(1)}, tmp_path / "dino_salad.ckpt")
    with pytest.raises(InputError, match=r"has only pickled weights \(dino_salad.ckpt\).*save them as safetensors"):
        Encoder(str(tmp_path))


def test_a_model_of_places_encodes_no_texts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dual encoder .* can't be loaded"):
        build_dual_encoder(str(write_places(tmp_path, salad_weights())), "toy", "float32", 0)
    assert math.isclose(np.linalg.norm(Encoder(str(tmp_path)).encode(PHOTOS[:1])), 1, abs_tol=1e-6)
