"""python -m pytest -q tests/test_locatability.py: shares of a photo times what they tell (paper 003), and thresholds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SegformerConfig, SegformerForSemanticSegmentation

from addressvlm import InputError, tables
from addressvlm.baselines import locatability
from addressvlm.baselines.locatability import Locatability, curve
from addressvlm.run import Run
from ray_jobs import locatability as job
from tests.dual_encoders import photo_run, tiny_clip
from tests.families import picture

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a segmentation model and a CLIP."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
    SegformerForSemanticSegmentation(SegformerConfig(**sizes, decoder_hidden_size=8, num_labels=3)).save_pretrained(
        folder / "seg"
    )
    CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder / "seg")
    return str(folder / "seg"), str(tiny_clip(folder / "clip"))


def test_a_photo_is_scored_between_0_and_1_by_its_own_classes(models: tuple[str, str]) -> None:
    scorer, photos = Locatability(*models), [picture(1), picture(2, (64, 48))]
    assert [found.shape for found in scorer.classes(photos)] == [(30, 40), (48, 64)]
    scores = scorer.scores(photos)
    assert all(0 < score < 1 for score in scores)
    assert scores == pytest.approx([scorer.scores([photo])[0] for photo in photos], abs=1e-5)


def test_shares_count_by_what_their_part_tells(models: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Locatability(*models)
    photo, classes = Image.new("RGB", (10, 10), "red"), np.zeros((10, 10), int)
    classes[:3] = 1  # this part is red, the rest of what the encoder then sees grey
    scorer._texts_TD = torch.eye(2)
    scorer.clues = 1

    def told(parts: list[Image.Image]) -> torch.Tensor:
        red = [float((np.asarray(part)[..., 1] == 0).mean()) for part in parts]
        return torch.tensor([[1.0, 0.0] if share < 0.5 else [0.0, 1.0] for share in red])  # the small part is the clue

    monkeypatch.setattr(scorer.clip, "encode_images", told)
    monkeypatch.setattr(scorer.clip, "largest", 1e9)
    scorer.clip.log_scale.data.fill_(5.0)
    assert scorer._score(photo, classes) == pytest.approx(0.3)


def test_the_curve_says_what_thresholds_keep(tmp_path: Path) -> None:
    found = curve([0.2, 0.4, 0.6, 0.65])
    at = dict(zip(found.thresholds, zip(found.kept, found.mean, strict=True), strict=True))
    assert at[0.1] == (1.0, pytest.approx(0.4625))
    assert at[0.4] == (0.75, pytest.approx(0.55))
    assert at[0.7] == (0.0, None)
    locatability.draw(found, tmp_path / "curve.svg")
    assert "<svg" in (tmp_path / "curve.svg").read_text()
    with pytest.raises(InputError, match="there are no photos"):
        curve([])


def test_models_that_are_not_there_or_of_another_kind_say_so(models: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="no model folder"):
        Locatability("./nowhere", models[1])
    with pytest.raises(InputError, match="segmentation model"):
        Locatability(models[1], models[1])
    with pytest.raises(InputError, match="encodes no texts"):
        Locatability(models[0], models[0])
    with pytest.raises(InputError, match="texts that name clues"):
        Locatability(*models, clues=())


def test_the_job_scores_every_training_photo_and_sets_the_low_ones_aside(
    models: tuple[str, str], ray_local: None, tmp_path: Path
) -> None:
    config = photo_run(tmp_path, tmp_path, rows=6)
    config.city.manifest, config.evaluate.workers = "none.csv", 1
    run = Run(config)
    assert job.run_step(config, *models, threshold=1.0) == 6
    scores = {row["id"]: row["locatability"] for row in tables.rows(run.folder / "locatability", "train")}
    assert scores.keys() == {f"train{number}" for number in range(6)}
    assert "below 1" in tables.read_file(run.rejects / "locatability.parquet")["reason"][0].as_py()
    assert (run.folder / "locatability" / "curve.svg").is_file()
    assert job.run_step(config, *models, threshold=0.0) == 0  # the scores are kept
    with pytest.raises(InputError, match="no model folder"):
        job.run_step(config, "./nowhere", models[1], redo=True)
    with pytest.raises(InputError, match="between 0 and 1"):
        job.run_step(config, *models, threshold=4)
