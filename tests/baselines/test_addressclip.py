"""Losses, dual encoders, captions, training alone and in two processes."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from safetensors.torch import load_file

from addressvlm import InputError
from addressvlm.baselines import addressclip
from addressvlm.baselines.addressclip import (
    all_gather_features,
    contrastive_loss,
    geography_loss,
    pairwise_distances,
    total_loss,
)
from addressvlm.baselines.addressclip_data import COLUMNS, Captions, ClipData, caption_texts, text_number
from addressvlm.baselines.dual_encoder import AddressIndex, DualEncoder, build_dual_encoder, open_encoder
from addressvlm.config import Config
from addressvlm.config.compare import LossWeights
from addressvlm.evaluation.likelihood import score_photos
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.models.loading import load_model
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.training.dataset import TableRows
from addressvlm.training.metrics_logger import StepClock
from addressvlm.training.optim import learning_rate
from tests.support.dual_encoders import addressclip_config, photo_run, tiny_clip
from tests.support.families import picture, tiny_fastvlm
from tests.support.tiny import tiny_llava
from tests.support.training_tables import keeping

pytestmark = pytest.mark.xdist_group("strategies")  # two processes at a time, as there

HERE = torch.tensor([[0.0, 0.0], [0.0, 1.0], [90.0, 40.0], [100.0, 40.0]])  # two near places, and two at the other end


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=-1)


def ignored(metrics: dict, snapshot: object) -> None:
    """A report that keeps nothing."""


def losses(config: Config) -> list[float]:
    lines = (Run(config).training_dir("AddressCLIP") / "loss.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(config: Config) -> dict[str, torch.Tensor]:
    folder = Run(config).model_dir("AddressCLIP")
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "projections.safetensors")}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("tiny"))


def test_contrastive_loss_is_the_papers_where_texts_differ() -> None:
    images, texts, scale = unit(5, 8), unit(10, 8)[5:], torch.tensor(10.0, dtype=torch.float64)
    logits = (10 * images @ texts.T).exp()
    paper = -(logits.diag() / logits.sum(dim=1)).log() - (logits.diag() / logits.sum(dim=0)).log()  # eq. 1
    assert contrastive_loss(images, texts, scale, torch.arange(5)) == pytest.approx(float(paper.sum() / 10))


def test_photos_of_one_address_are_no_negatives_of_each_other() -> None:
    texts = torch.eye(2, dtype=torch.float64)[[0, 0, 1]].requires_grad_()
    images, scale = torch.eye(2, dtype=torch.float64)[[0, 0, 1]].requires_grad_(), torch.tensor(30.0, dtype=torch.float64)
    right = contrastive_loss(images, texts, scale, torch.tensor([7, 7, 9]))
    (pull,) = torch.autograd.grad(right, images)
    assert pull.abs().max() < 1e-6  # nothing left to learn, while as negatives the two are pushed apart for ever
    (push,) = torch.autograd.grad(contrastive_loss(images, texts, scale, torch.arange(3)), texts)
    assert push.abs().max() < 1e-6  # their texts are equal, so that the paper's loss can't tell them apart either
    assert right.item() == pytest.approx(2 / 3 * np.log(2))


def test_near_photos_are_pulled_together_and_far_ones_apart() -> None:
    vectors = F.normalize(torch.ones(4, 6) + 0.3 * unit(4, 6).float(), dim=-1)
    images = vectors.clone().requires_grad_()
    optimizer = torch.optim.SGD([images], lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        geography_loss(F.normalize(images, dim=-1), HERE).backward()
        optimizer.step()
    after = F.normalize(images.detach(), dim=-1)
    similarity = after @ after.T
    assert similarity[0, 1] > 0.97
    assert similarity[0, 3] < 0.1 < 0.9 < similarity[2, 3]
    assert float(geography_loss(after, HERE)) < 1e-3  # vectors with the target similarities exist


def test_distances_know_no_unit_and_photos_without_coordinates_are_left_out() -> None:
    assert torch.allclose(pairwise_distances(HERE), pairwise_distances(HERE * torch.tensor([7.0, 0.001]) + 5), atol=1e-4)
    assert float(pairwise_distances(HERE).max()) == 2
    unknown = torch.cat([HERE, torch.tensor([[float("nan"), 1.0]])])
    vectors = unit(5, 6).float()
    assert geography_loss(vectors, unknown) == geography_loss(vectors[:4], HERE)
    assert geography_loss(vectors[:1], unknown[4:]) == 0
    assert geography_loss(vectors, torch.zeros(5, 2)).isfinite()  # all photos at one place


def features_of(count: int = 4) -> dict[str, torch.Tensor]:
    """What `total_loss` takes; the first two photos have one address, the last two one caption."""
    vectors = unit(3 * count, 6)
    return {
        "images": vectors[:count], "addresses": vectors[count : 2 * count][[0, 0, 2, 3]],
        "captions": vectors[2 * count :][[0, 1, 2, 2]],
        "scale": torch.tensor(5.0, dtype=torch.float64), "positions": HERE.double(),
        "address_names": torch.tensor([7, 7, 8, 9]), "caption_names": torch.tensor([1, 2, 3, 3]),
    }  # fmt: skip


def test_geography_draws_similarity_to_one_less_half_the_distance() -> None:
    vectors, positions = unit(3, 5), torch.tensor([[0.0, 60.0], [1.0, 60.0], [0.25, 64.0]])
    apart = np.array([[0, 1, 1.25], [1, 0, 1.75], [1.25, 1.75, 0]])  # east and north, each as a share of the whole
    assert pairwise_distances(positions).numpy() == pytest.approx(apart)
    expected = ((vectors @ vectors.T).numpy() - (1 - apart / 2)) ** 2
    assert float(geography_loss(vectors, positions.double())) == pytest.approx(expected.mean())


def test_the_total_is_each_loss_times_its_weight() -> None:
    features = features_of()
    features["images"].requires_grad_()
    features["scale"].requires_grad_()
    images, scale = features["images"], features["scale"]
    alone = {
        "address": contrastive_loss(images, features["addresses"], scale, features["address_names"]),
        "caption": contrastive_loss(images, features["captions"], scale, features["caption_names"]),
        "geography": geography_loss(images, features["positions"]),
    }
    weights = {"address": 2.0, "caption": 0.25, "geography": 3.0}
    total, parts = total_loss(features, LossWeights(**weights))
    assert {name: part.item() for name, part in parts.items()} == {name: part.item() for name, part in alone.items()}
    assert float(total) == pytest.approx(sum(weights[name] * float(part) for name, part in alone.items()))
    for of in (images, scale):
        (gradient,) = torch.autograd.grad(total, of, retain_graph=True)
        each = {n: torch.autograd.grad(p, of, retain_graph=True, allow_unused=True)[0] for n, p in alone.items()}
        expected = sum(weights[name] * pull for name, pull in each.items() if pull is not None)
        assert torch.allclose(gradient, expected)
    some, parts = total_loss(features, LossWeights(address=0, caption=0.5, geography=0))
    assert list(parts) == ["caption"]
    assert float(some) == pytest.approx(0.5 * float(alone["caption"]))


def test_all_workers_gradients_add_up_to_those_of_the_joint_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    joint, weights, world = features_of(), LossWeights(), 2
    leaves = {name: joint[name].clone().requires_grad_() for name in ("images", "addresses", "captions")}
    total_loss(joint | leaves, weights)[0].backward()
    shares = [
        {name: value if name == "scale" else value[2 * rank : 2 * rank + 2] for name, value in joint.items()} for rank in (0, 1)
    ]

    def exchange(gathered: list[torch.Tensor], mine: torch.Tensor) -> None:
        at = next(name for name in joint if name != "scale" and torch.equal(shares[rank][name], mine.to(joint[name].dtype)))
        gathered[:] = [share[at] for share in shares]

    monkeypatch.setattr(addressclip.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(addressclip.dist, "get_world_size", lambda: world)
    monkeypatch.setattr(addressclip.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(addressclip.dist, "all_gather", exchange)
    for rank in range(world):
        own = {name: shares[rank][name].clone().requires_grad_() for name in leaves}
        loss, _ = total_loss(all_gather_features(shares[rank] | own), weights)
        assert float(loss) == pytest.approx(float(total_loss(joint, weights)[0]))
        loss.backward()
        for name, value in own.items():  # the gradients of weights are averaged over workers afterwards
            assert torch.allclose(value.grad / world, leaves[name].grad[2 * rank : 2 * rank + 2]), name


@pytest.mark.parametrize("kind", ["clip", "siglip", "llava", "fastvlm"])
def test_a_dual_encoder_is_the_same_after_saving(kind: str, tmp_path: Path) -> None:
    made = {"llava": tiny_llava, "fastvlm": tiny_fastvlm}.get(kind, lambda folder: tiny_clip(folder, kind))(tmp_path / "base")
    encoder = build_dual_encoder(str(made) if kind in ("clip", "siglip") else None, str(made), "float32", seed=3)
    encoder.log_scale.data.fill_(1.5)
    photos, texts = [picture(1), picture(2)], ["Mill Street, Harbour", "Oak Avenue " * 60]
    images, words = encoder.encode_images(photos), encoder.encode_texts(texts, batch_size=1)
    assert images.norm(dim=-1) == pytest.approx([1, 1], abs=1e-5)
    assert images.shape[1] == words.shape[1]
    assert torch.allclose(words, encoder.encode_texts(texts), atol=1e-5)  # whatever it is padded with
    (tmp_path / "saved").mkdir()
    encoder.save(tmp_path / "saved")
    again = open_encoder(tmp_path / "saved")
    assert torch.equal(again.encode_images(photos), images)
    assert torch.equal(again.encode_texts(texts, batch_size=1), words)
    assert again.scale == encoder.scale


def test_image_and_text_encoder_learn_each_by_its_own_switch(base: Path, tmp_path: Path) -> None:
    clip, halves = (
        build_dual_encoder(str(tiny_clip(tmp_path)), "", "float32", 0),
        build_dual_encoder(None, str(base), "float32", 0),
    )
    for encoder, reads in ((clip, "text_"), (halves, "model.language_model.")):
        name_of = {id(weights): name for name, weights in encoder.model.named_parameters()}

        def names(image: bool, text: bool, encoder: DualEncoder = encoder, name_of: dict = name_of) -> set[str]:
            return {name_of[id(weights)] for weights in encoder.trainable(image, text)[0]}

        ours = {name for name in name_of.values() if name not in ("logit_scale", "lm_head.weight")}
        assert names(image=False, text=True) == {name for name in ours if name.startswith(reads)}
        assert names(image=True, text=False) == {name for name in ours if not name.startswith(reads)}
        assert names(image=True, text=True) == ours
        assert names(image=False, text=False) == set()
        inside = [
            {name_of[id(w)] for part in of for w in part.parameters()} for of in map(encoder.encoder_modules, ("image", "text"))
        ]
        assert [{name.startswith(reads) for name in of} for of in inside] == [{False}, {True}]
    assert [id(weights) for weights in clip.trainable(image=True, text=False)[1]] == [id(clip.log_scale)]
    assert clip.trainable(image=False, text=False)[1] == []
    assert len(halves.trainable(image=False, text=False)[1]) == 3  # both projections and the temperature


def test_the_temperature_has_a_floor_and_projections_are_drawn_by_seed(base: Path) -> None:
    one, same, other = (build_dual_encoder(None, str(base), "float32", seed) for seed in (1, 1, 2))
    assert torch.equal(one.of_images[1].weight, same.of_images[1].weight)
    assert not torch.equal(one.of_images[1].weight, other.of_images[1].weight)
    assert not torch.equal(one.of_images[1].weight, one.of_texts[1].weight)
    assert float(one.scale) == pytest.approx(1 / 0.07)
    one.log_scale.data.fill_(9.0)
    assert float(one.scale) == pytest.approx(100.0)


def clip_data(config: Config, encoder: DualEncoder, per_step: int = 4, seed: int = 5) -> ClipData:
    return ClipData(TableRows(Run(config).photos, "train", COLUMNS), per_step, seed, Captions("template"), encoder)


def test_batches_depend_on_seed_and_step_alone_and_workers_share_them(base: Path, tmp_path: Path) -> None:
    config, encoder = photo_run(tmp_path, base), build_dual_encoder(None, str(base), "float32", 0)
    data = clip_data(config, encoder)
    steps = [[sample.index for sample in data.batch(number).samples] for number in range(6)]
    assert sorted(index for step in steps for index in step) == list(range(24))  # an epoch has each photo once
    afresh = clip_data(config, encoder)
    later = list(afresh.batches(start=2, steps=6, rank=0, world=1))
    assert [number for number, _ in later] == [2, 3, 4, 5]
    assert [[sample.index for sample in batch.samples] for _, batch in later] == steps[2:]
    assert list(afresh.batches(start=6, steps=6, rank=0, world=1)) == []
    other = clip_data(config, encoder, seed=6)
    assert [[sample.index for sample in other.batch(number).samples] for number in range(6)] != steps
    shares = [[sample.index for sample in data.batch(3, rank, 2).samples] for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == sorted(steps[3])
    assert [len(share) for share in shares] == [2, 2]
    assert [sample.index for sample in data.batch(3, most=2).samples] == steps[3][:2]


def test_a_lesson_is_what_its_own_row_says(base: Path, tmp_path: Path) -> None:
    config, encoder = photo_run(tmp_path, base), build_dual_encoder(None, str(base), "float32", 0)
    photos = Run(config).photos
    rows = list(tables.iter_rows(photos, "train"))
    rows[3]["lat"] = None
    tables.write_table(photos, "train", rows, tables.read_table_file(next(photos.glob("train-*"))).schema)
    data = clip_data(config, encoder, per_step=24)
    batch = data.batch(0)
    for sample, position, pixels in zip(batch.samples, batch.positions.tolist(), batch.pixels["pixel_values"], strict=True):
        row = rows[sample.index]
        assert sample.address == f"{row['street']}, {row['district']}"
        assert sample.caption.startswith(f"{sample.address}. ")
        lon, lat = position
        assert lon == row["lon"]
        assert lat == row["lat"] or (row["lat"] is None and np.isnan(lat))
        assert torch.equal(pixels, encoder.pixels([sample.image])["pixel_values"][0])
    data.drop_image(batch.samples[1])
    again = data.batch(0)
    assert [sample.image is None for sample in again.samples[:3]] == [False, True, False]
    assert len(again.pixels["pixel_values"]) == 23  # of those that are not known yet, in order
    assert torch.equal(again.pixels["pixel_values"][1], batch.pixels["pixel_values"][2])
    assert text_number("Mill Street, Harbour") == 8159133416030511998  # on every worker, whatever its hash seed
    assert text_number("Mill Street") != text_number("Oak Avenue")


@pytest.mark.parametrize("learns", [True, False])
def test_a_step_has_the_features_of_its_own_photos_and_texts(learns: bool, base: Path, tmp_path: Path) -> None:
    config, encoder = photo_run(tmp_path, base), build_dual_encoder(None, str(base), "float32", 0)
    data = clip_data(config, encoder)
    towers = addressclip.DualEncoderTowers(encoder, addressclip_config(train_image=learns, train_text=learns), data)
    with torch.no_grad():
        for number in (0, 1, 0, 7):  # the third time from what is kept; the epoch after that mixes known and new photos
            batch = data.batch(number)
            result = towers(batch)
            for at, sample in enumerate(batch.samples):
                data = clip_data(config, encoder)
                image = sample.image or data.sample(sample.index, data.rows[sample.index]).image
                alone = encoder.encode_images([image])[0], *encoder.encode_texts([sample.address, sample.caption])
                for name, vector in zip(("images", "addresses", "captions"), alone, strict=True):
                    assert torch.allclose(result[name][at], vector, atol=1e-5), (name, number, at)
                assert result["address_names"][at] == text_number(sample.address)
                assert result["caption_names"][at] == text_number(sample.caption)
            assert torch.equal(result["positions"], batch.positions)
            assert float(result["scale"]) == pytest.approx(float(encoder.scale))


def test_new_projections_have_a_rate_of_their_own_and_no_decay(base: Path, tmp_path: Path) -> None:
    config, encoder = photo_run(tmp_path, base), build_dual_encoder(None, str(base), "float32", 0)
    data = clip_data(config, encoder)
    settings = addressclip_config(
        learning_rate=1e-3, projection_learning_rate=4e-3, weight_decay=0.1, warmup_ratio=0.5, epochs=3, max_steps=None
    )
    learner = addressclip.ClipLearner(
        addressclip.DualEncoderTowers(encoder, settings, data), data.batch(0, most=2), 1.0, nullcontext()
    )
    old, new = learner.optimizer.param_groups
    assert {id(weights) for weights in new["params"]} == {id(weights) for weights in encoder.trainable(True, True)[1]}
    assert {id(weights) for weights in old["params"]} <= {id(weights) for weights in encoder.trainable(True, True)[0]}
    assert (old["weight_decay"], new["weight_decay"]) == (0.1, 0.0)
    assert old["betas"] == new["betas"] == (0.9, 0.98)  # paper 002, App. B
    assert all(weights.grad is None for weights in encoder.parameters())
    stage = addressclip.clip_stage(config, settings, data)
    assert (stage.steps, stage.config.learning_rate, stage.config.warmup_ratio) == (18, 1e-3, 0.5)
    seeds = []
    with pytest.MonkeyPatch.context() as patch:
        seed = torch.manual_seed
        patch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
        for number, rank in ((8, 0), (9, 0), (8, 1)):
            addressclip.clip_step(
                learner, stage, number, data.batch(number), (rank, 2), nullcontext(), StepClock(torch.device("cpu"))
            )
            assert [group["lr"] for group in learner.optimizer.param_groups] == pytest.approx(
                [learning_rate(number, 18, 1e-3, 0.5), learning_rate(number, 18, 4e-3, 0.5)]
            )
    assert len(set(seeds)) == 3  # dropout differs by step and by worker


def test_what_is_no_dual_encoder_says_so(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model folder"):
        build_dual_encoder("./not/there", str(base), "float32", 0)
    with pytest.raises(InputError, match="encodes no texts"):
        build_dual_encoder(str(base), str(base), "float32", 0)
    pickled = tiny_clip(tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(InputError, match="can't be loaded"):
        build_dual_encoder(str(pickled), str(base), "float32", 0)
    with pytest.raises(InputError, match="holds no dual encoder"):
        open_encoder(base)


def test_captions_begin_with_the_address_and_tell_only_what_the_photo_shows(base: Path, tmp_path: Path) -> None:
    run = Run(photo_run(tmp_path, base))
    row, red = {"id": "train1", "street": "Mill Street", "district": "Harbour"}, Image.new("RGB", (32, 32), "red")
    template = caption_texts(run, "template").caption(row, "Mill Street, Harbour", red)
    assert template is not None
    assert template.startswith("Mill Street, Harbour. ")
    assert "red" in template
    assert template.count("Mill Street") == 1
    explained = caption_texts(run, "alignment")
    assert explained.missing == 1
    assert explained.caption(row, "A, B", red) == "A, B. Yes"
    assert explained.caption(row | {"id": "train0"}, "A, B", red) == "A, B"
    assert caption_texts(run, "none").caption(row, "A, B", red) is None
    for file in run.alignment.glob("*.parquet"):
        file.unlink()
    with pytest.raises(InputError, match="which are not there"):
        caption_texts(run, "alignment")


def test_a_listed_twice_address_is_encoded_once_and_scored_alike(base: Path) -> None:
    encoder = build_dual_encoder(None, str(base), "float32", 0)
    street = [Address("Mill Street", "Harbour"), Address("Oak Avenue", "Harbour"), Address("Mill Street", "Harbour")]
    candidates = AddressIndex(encoder, [*street, Address("Mill", "Street, Harbour"), Address("Mill Street", "Harbour")])
    assert candidates.texts == ["Mill Street, Harbour", "Oak Avenue, Harbour", "Mill, Street, Harbour"]
    scores = candidates.scores([picture(1), picture(2)])
    assert scores.dtype == np.float64
    assert scores.shape == (2, 5)
    assert (scores[:, 0] == scores[:, 2]).all()
    assert (scores[:, 0] != scores[:, 1]).all()
    alone = torch.stack([encoder.encode_texts([text])[0] for text in ("Mill Street, Harbour", "Oak Avenue, Harbour")])
    for number, photo in enumerate((picture(1), picture(2))):
        like = (encoder.encode_images([photo]) @ alone.T)[0] / 0.07  # by the temperature that it begins with
        assert scores[number, :2] == pytest.approx(like.numpy(), abs=1e-4)
    with pytest.raises(InputError, match="no address to compare"):
        AddressIndex(encoder, [])


def test_it_learns_the_colours_and_says_what_it_is(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = photo_run(tmp_path, base)
    photos = Run(config).photos
    rows = list(tables.iter_rows(photos, "train"))
    rows[5]["image"] = {"bytes": b"no picture", "path": None}
    tables.write_table(photos, "train", rows, tables.read_table_file(next(photos.glob("train-*"))).schema)
    addressclip.train_addressclip(config, addressclip_config(epochs=20.0, max_steps=80, captions="alignment"), None, ignored)
    run = Run(config)
    result = losses(config)
    assert len(result) == 80
    assert result[-1] < 0.7 * result[0]
    (bad,) = tables.read_table_file(run.rejects / "train-addressclip.parquet").to_pylist()
    assert (bad["id"], bad["stage"]) == ("train5", "contrast")
    folder = run.model_dir("AddressCLIP")
    city = Gazetteer.load(folder / "gazetteer.geojson")
    (scored,) = score_photos(
        AddressIndex(open_encoder(folder), city.addresses).scores, list(tables.iter_rows(run.photos, "test")), 8
    )
    assert [city.addresses[int(np.argmax(row["scores"]))].street for row in scored] == [row["street"] for row in scored]
    assert addressclip.trained_parameters(folder)["without_caption"] == 1
    assert "# Toytown: a photo and its address" in (folder / "README.md").read_text()
    (tmp_path / "photo.png").write_bytes(rows[0]["image"]["bytes"])
    snippet = addressclip.USE.replace("<this folder>", str(folder)).replace("photo.jpg", str(tmp_path / "photo.png"))
    exec(snippet, {})
    assert rows[0]["street"] in capsys.readouterr().out.split("district=")[0]
    assert load_model(str(folder))  # also an ordinary model


def test_going_on_from_a_checkpoint_ends_in_equal_weights(base: Path, tmp_path: Path) -> None:
    config, kept = photo_run(tmp_path, base), []
    addressclip.train_addressclip(config, addressclip_config(), None, keeping(kept, tmp_path))
    whole, curve = weights(config), losses(config)
    addressclip.train_addressclip(config, addressclip_config(), kept[0], ignored)
    assert losses(config) == curve
    again = weights(config)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_frozen_encoders_stay_as_they_are_and_see_each_photo_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = tiny_fastvlm(tmp_path)
    config, seen = photo_run(tmp_path, fast, rows=6), []
    encode = addressclip.DualEncoder.pixels
    monkeypatch.setattr(addressclip.DualEncoder, "pixels", lambda self, images: seen.extend(images) or encode(self, images))
    addressclip.train_addressclip(config, addressclip_config(train_image=False, train_text=False, max_steps=6), None, ignored)
    assert len(seen) <= 6 + 4 + 2  # those of the first look, and those being made ready meanwhile, twice
    before, after = load_file(fast / "model.safetensors"), weights(config)
    assert all(torch.equal(after[name], before[name]) for name in before)
    addressclip.train_addressclip(config, addressclip_config(max_steps=2), None, ignored)
    statistics = [name for name in before if "running_mean" in name]
    assert statistics
    assert all(torch.equal(weights(config)[name], before[name]) for name in statistics)  # batch statistics are frozen


def test_nothing_to_learn_is_an_error(base: Path, tmp_path: Path) -> None:
    clip = addressclip_config(base=str(tiny_clip(tmp_path / "clip")), train_image=False, train_text=False)
    with pytest.raises(InputError, match="AddressCLIP: nothing learns"):
        addressclip.train_addressclip(photo_run(tmp_path, base), clip, None, ignored)


def pair(rank: int, folder: Path, config: Config) -> None:
    """What each of two workers does."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    addressclip.train_addressclip(config, addressclip_config(batch_size=2), None, ignored)
    dist.destroy_process_group()


def test_two_workers_learn_what_one_does_from_the_joint_batch(base: Path, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    one, two = photo_run(tmp_path / "one", base, workers=1), photo_run(tmp_path / "two", base, workers=2)
    addressclip.train_addressclip(one, addressclip_config(batch_size=4), None, ignored)
    mp.spawn(pair, (tmp_path / "two", two), nprocs=2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    alone, shared = weights(one), weights(two)
    assert all(torch.allclose(shared[name], alone[name], atol=2e-3) for name in alone)
