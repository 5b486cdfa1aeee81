"""Shares of a photo times what they tell (paper 003), and thresholds."""

import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
)

from addressvlm import InputError
from addressvlm.baselines import locatability
from addressvlm.baselines.locatability import Locatability, LocatabilityTexts, curve
from addressvlm.config import Config
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run, mark_done
from addressvlm.training.dataset import Schedule, locatability_scored_by
from addressvlm.training.stages import build_stages, training_rows
from addressvlm.training.trainer import train_system
from ray_jobs import locatability as job
from ray_jobs import train
from tests.support.dual_encoders import photo_run, tiny_clip
from tests.support.families import picture
from tests.support.tiny import tiny_llava
from tests.support.training_tables import trained_config

pytestmark = pytest.mark.xdist_group("ray")

SCORED_BY = {"models": ["seg", "clip"], "clues": ["a church"], "others": ["the sky"]}
SEGFORMER = {"image_processor_type": "SegformerImageProcessor", "size": {"height": 32, "width": 32}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a segmentation model and a CLIP."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
    SegformerForSemanticSegmentation(SegformerConfig(**sizes, decoder_hidden_size=8, num_labels=3)).save_pretrained(
        folder / "seg"
    )
    (folder / "seg" / "preprocessor_config.json").write_text(json.dumps(SEGFORMER))
    return str(folder / "seg"), str(tiny_clip(folder / "clip"))


def test_a_photo_is_scored_between_0_and_1_by_its_own_classes(models: tuple[str, str]) -> None:
    scorer, photos = Locatability(*models), [picture(1), picture(2, (64, 48))]
    assert [classes.shape for classes in scorer.classes(photos)] == [(30, 40), (48, 64)]
    scores = scorer.scores(photos)
    assert all(0 < score < 1 for score in scores)
    assert scores == pytest.approx([scorer.scores([photo])[0] for photo in photos], abs=1e-5)


def test_a_segformer_sees_photos_as_its_folder_says(models: tuple[str, str], tmp_path: Path) -> None:
    photos, default = [picture(1), picture(2, (64, 48))], Locatability(*models)
    assert default.processor.image_mean == pytest.approx([0.485, 0.456, 0.406])  # SegFormer's own where the file says nothing
    pixels = default.processor(images=photos, return_tensors="pt")["pixel_values"]
    small = np.asarray(photos[1].resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float64) / 255
    expected = (small - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    assert pixels[1].numpy() == pytest.approx(expected.transpose(2, 0, 1), abs=1e-5)
    shutil.copytree(models[0], tmp_path / "old")
    old = {"feature_extractor_type": "SegformerFeatureExtractor", "size": 64, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "old" / "preprocessor_config.json").write_text(json.dumps(old))
    pixels = Locatability(str(tmp_path / "old"), models[1]).processor(images=photos, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 64, 64)
    assert pixels.min() >= -1 <= pixels.max() <= 1


def test_photos_of_other_sizes_beside_it_change_nothing_of_a_photo(models: tuple[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "mask2former"
    torch.manual_seed(0)
    stages = {"out_features": [f"stage{number}" for number in range(1, 5)]}
    eyes = SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, **stages
    )  # fmt: skip
    sizes = dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size"), 32)
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2}
    config = Mask2FormerConfig(backbone_config=eyes, num_queries=8, num_labels=3, **sizes, **layers)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    seen = {"image_processor_type": "Mask2FormerImageProcessor", "size": {"shortest_edge": 64, "longest_edge": 128}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**seen, "size_divisor": 32, "ignore_index": 255}))
    scorer = Locatability(str(folder), models[1])
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((30, 40), (40, 90), (60, 40))]
    alone = [scorer.classes([photo])[0] for photo in photos]
    together = scorer.classes(photos)
    assert [classes.shape for classes in together] == [(30, 40), (40, 90), (60, 40)]
    assert len({number for classes in alone for number in np.unique(classes)}) > 1
    assert all((a == b).mean() > 0.99 for a, b in zip(alone, together, strict=True))


def test_shares_count_by_what_their_part_tells(models: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Locatability(*models)
    photo, classes = Image.new("RGB", (10, 10), "red"), np.zeros((10, 10), int)
    classes[:3] = 1  # this part is red, the rest of what the encoder then sees grey
    scorer._texts_TD = torch.eye(2)
    scorer.clues = 1

    def encode(parts: list[Image.Image]) -> torch.Tensor:
        red = [float((np.asarray(part)[..., 1] == 0).mean()) for part in parts]
        return torch.tensor([[1.0, 0.0] if share < 0.5 else [0.0, 1.0] for share in red])  # the small part is the clue

    monkeypatch.setattr(scorer.clip, "encode_images", encode)
    monkeypatch.setattr(scorer.clip, "max_scale", 1e9)
    scorer.clip.log_scale.data.fill_(5.0)
    assert scorer._score(photo, classes) == pytest.approx(0.3)


def test_parts_below_a_hundredth_of_the_photo_weigh_nothing(models: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, classes = Locatability(*models), np.zeros((20, 20), int)
    classes[0, :3], classes[1, :4] = 1, 2  # 0.75 % and 1 %
    scorer._texts_TD, scorer.clues = torch.eye(2), 1
    seen: list[int] = []

    def encode(parts: list[Image.Image]) -> torch.Tensor:
        seen.extend(int((np.asarray(part)[..., 0] == 255).sum()) for part in parts)
        return torch.tensor([[1.0, 0.0]] * len(parts))

    monkeypatch.setattr(scorer.clip, "encode_images", encode)
    monkeypatch.setattr(scorer.clip, "max_scale", 1e9)
    scorer.clip.log_scale.data.fill_(5.0)
    assert scorer._score(Image.new("RGB", (20, 20), "red"), classes) == pytest.approx(397 / 400)
    assert seen == [393, 4]


def test_a_batch_of_photos_is_scored_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reds:
        def scores(self, photos: list[Image.Image]) -> list[float]:
            assert len(photos) <= job.BATCH
            return [photo.getpixel((0, 0))[0] / 255 for photo in photos]

    monkeypatch.setattr(job, "cached_locatability", lambda *models: Reds())
    photos = []
    for number in range(19):
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (10 * number, 0, 0)).save(file, "PNG")
        photos.append({"id": f"p{number}", "place": f"at{number}", "image": {"bytes": file.getvalue(), "path": None}})
    made = job.score_batch("seg", "clip", LocatabilityTexts(), photos).tables
    assert made == {
        "train": [{"id": f"p{n}", "place": f"at{n}", "locatability": pytest.approx(10 * n / 255)} for n in range(19)]
    }


def test_the_curve_says_what_thresholds_keep(tmp_path: Path) -> None:
    result = curve([0.2, 0.4, 0.6, 0.65])
    at = dict(zip(result.thresholds, zip(result.kept, result.mean, strict=True), strict=True))
    assert at[0.1] == (1.0, pytest.approx(0.4625))
    assert at[0.4] == (0.75, pytest.approx(0.55))
    assert at[0.7] == (0.0, None)
    locatability.draw_curve(result, tmp_path / "curve.svg")
    assert "<svg" in (tmp_path / "curve.svg").read_text()
    with pytest.raises(InputError, match="there are no photos"):
        curve([])


def test_models_that_are_not_there_or_of_another_kind_say_so(models: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model folder"):
        Locatability("./nowhere", models[1])
    with pytest.raises(InputError, match="segmentation model"):
        Locatability(models[1], models[1])
    shutil.copytree(models[0], tmp_path / "eyes")
    CLIPImageProcessorPil().save_pretrained(tmp_path / "eyes")
    with pytest.raises(InputError, match="encodes no texts"):
        Locatability(models[0], str(tmp_path / "eyes"))


def test_texts_are_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "clues.yaml"
    file.write_text("clues: [a church, 'the *Pub*']\nothers: [the sky]\n")
    assert LocatabilityTexts.read(file) == LocatabilityTexts(("a church", "the *Pub*"), ("the sky",))
    for wrong in (
        "clues: [a church]",
        "clues: []\nothers: [the sky]",
        "clues: a church\nothers: [the sky]",
        "- 1",
        "clues: [1]\nothers: [2]",
    ):
        file.write_text(wrong)
        with pytest.raises(InputError, match="give two lists of texts, `clues` and `others`"):
            LocatabilityTexts.read(file)
    for missing in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match="can't be read"):
            LocatabilityTexts.read(missing)
    file.write_text("clues: [")
    with pytest.raises(InputError, match="can't be read"):
        LocatabilityTexts.read(file)


def scored(config: Config, scores: list[float | None]) -> None:
    """Write scores of the first photos, None for one that was forgotten."""
    run, ids = Run(config), tables.read_table(Run(config).photos, "train", ["id"])["id"].to_pylist()
    rows = [
        {"id": name, "place": name, "locatability": score}
        for name, score in zip(ids, scores, strict=False)
        if score is not None
    ]
    tables.write_table(run.locatability, "train", rows, job.SCHEMA)
    mark_done(run.locatability, {"locatability": SCORED_BY})


def test_a_stage_learns_from_photos_above_its_threshold_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "addressvlm")
    config = trained_config(tmp_path, tiny_llava(tmp_path / "base"), rows=24)
    system = next(s for s in config.train.systems if s.name == "AddressVLM")
    scored(config, [0.1, 0.4, 0.8] * 8)
    config.train.stages["localization"].locatability = 0.4
    before, stage = build_stages(config, system)
    assert (before.steps, stage.steps) == (12, 8)  # of 24 and of 16 rows, twice
    low = {f"{number}" for number in range(0, 24, 3)}
    every = [row for step in range(stage.steps) for row in stage.schedule.indices(step)]
    rows = stage.schedule.rows
    assert sorted(rows[row]["id"] for row in every) == sorted(2 * [f"{n}" for n in range(24) if n % 3])
    assert Schedule(training_rows(config, ["photos"], 0.4), 4, stage.seed).indices(5) == every[20:24]
    mixed = training_rows(config, ["alignment", "photos"], 0.4)
    assert len(mixed) == 32
    assert not {mixed[row]["id"] for row in mixed.epoch(0, 0)} & low
    config.train.stages["localization"].max_steps = 1
    train_system(config, "stage 2 only", None, lambda metrics, snapshot: None)
    assert "localization skips 8 photos with a locatability below 0.4" in caplog.text
    rejects = tables.read_table_file(Run(config).rejects / "train-stage-2-only.parquet").to_pylist()
    assert {row["id"] for row in rejects} == low
    assert rejects[0]["reason"] == "its locatability is 0.10, below 0.4"


def test_scores_that_a_stage_needs_and_that_are_missing_are_told(tmp_path: Path) -> None:
    config = trained_config(tmp_path, tmp_path, rows=6)
    system, stage = config.train.systems[1], config.train.stages["localization"]
    assert "locatability" not in train.settings(config, system)  # needs no scores
    stage.locatability = 0.4
    for missing in (lambda: training_rows(config, ["photos"], 0.4), lambda: train.settings(config, system)):
        with pytest.raises(InputError, match=r"has no scores: run `.*ray_jobs/locatability\.py"):
            missing()
    scored(config, [0.5, 0.5, None, 0.5, 0.5, 0.5])
    with pytest.raises(InputError, match="has the photo 2, which has no score"):
        build_stages(config, system)
    scored(config, [0.5] * 6)
    assert train.settings(config, system)["locatability"] == {"small": SCORED_BY}
    with pytest.raises(InputError, match=r"none of the 6 rows .* reaches the locatability 0\.6"):
        training_rows(config, ["photos"], 0.6)


def test_the_job_scores_every_training_photo_and_sets_the_low_ones_aside(
    models: tuple[str, str], ray_local: None, tmp_path: Path
) -> None:
    config = photo_run(tmp_path, tmp_path, rows=6)
    config.city.manifest, config.evaluate.workers = "none.csv", 1
    run = Run(config)
    assert job.run_step(config, *models, threshold=1.0) == 6
    scores = {row["id"]: row["locatability"] for row in tables.iter_rows(run.folder / "locatability", "train")}
    assert scores.keys() == {f"train{number}" for number in range(6)}
    assert "below 1" in tables.read_table_file(run.rejects / "locatability.parquet")["reason"][0].as_py()
    assert (run.folder / "locatability" / "curve.svg").is_file()
    assert job.run_step(config, *models, threshold=0.0) == 0  # the scores are kept
    with pytest.raises(InputError, match="no model folder"):
        job.run_step(config, "./nowhere", models[1], redo=True)
    with pytest.raises(InputError, match="between 0 and 1"):
        job.run_step(config, *models, threshold=4)


def test_the_command_s_own_functions_reach_its_workers(
    models: tuple[str, str], ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = photo_run(tmp_path, tmp_path, rows=6)
    config.city.manifest, config.evaluate.workers = "none.csv", 1
    (tmp_path / "city.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (tmp_path / "clues.yaml").write_text("clues: [a church]\nothers: [the sky]\n")
    command = ["--config", "city.yaml", "--segmentation", models[0], "--clip", models[1], "--clues", "clues.yaml"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["locatability.py", *command])
    monkeypatch.setattr("ray.shutdown", lambda: None)  # it would end the Ray of other tests
    runpy.run_path(job.__file__, run_name="__main__")
    assert tables.count_rows(Run(config).locatability, "train") == 6
    assert locatability_scored_by(Run(config))["clues"] == ["a church"]


def test_the_papers_weights_are_those_published() -> None:
    """Numbers of ADE20K's classes: road 6, signboard 43, sidewalk 11, building 1, sky 2."""
    weights = locatability.ClassWeights.read()
    assert len(weights.weights) == 150
    assert [round(weights.weights[i], 2) for i in (6, 43, 11, 1, 2)] == [1.0, 0.49, 0.45, 0.23, 0.17]
    street = np.repeat([6, 1, 2, 11], [40, 30, 20, 10]).reshape(10, 10)
    assert weights.score(street) == pytest.approx(0.4 * 1.0 + 0.3 * 0.22782 + 0.2 * 0.16823 + 0.1 * 0.45304)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class,weight\n0,0.5\n2,0.5\n", "has no weight of class 1"),
        ("class,weight\n0,0.5\n0,0.4\n", "row 3: '0,0.4' is not the number of another class"),
        ("class,weight\n0,1.5\n", r"row 2: '0,1.5' .* a weight from 0 to 1"),
        ("class,weight\nroad,1\n", "row 2: 'road,1'"),
        ("class,weight\n0,nan\n", "row 2"),
        ("class,weight\n0\n", "row 2"),
    ],
)
def test_a_bad_file_of_class_weights_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "weights.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        locatability.ClassWeights.read(file)


def test_fixed_weights_need_no_clip_but_a_model_of_the_same_classes(models: tuple[str, str]) -> None:
    with pytest.raises(InputError, match=r"and the weights are of 150: give a model of ADE20K's"):
        Locatability(models[0], None, locatability.ClassWeights.read())
    with pytest.raises(InputError, match="give --clip"):
        Locatability(models[0], None)
    count = len(Locatability(*models).model.config.id2label)
    ones = Locatability(models[0], None, locatability.ClassWeights((1.0,) * count))
    assert ones.scores([picture(1), picture(2)]) == [1.0, 1.0]
    first = Locatability(models[0], None, locatability.ClassWeights((1.0, *(0.0,) * (count - 1))))
    assert first.scores([picture(1)]) == pytest.approx([(first.classes([picture(1)])[0] == 0).mean()])
