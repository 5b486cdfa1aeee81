"""The photo and its tile as two images of one conversation (tiles.layout two)"""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.config.labels import LabelsConfig
from addressvlm.config.train import ModelConfig, PartConfig, StageConfig
from addressvlm.grafting import display_image
from addressvlm.labels.labelers import label_batch, label_requests, state_factory
from addressvlm.labels.prompt import configured_prompt
from addressvlm.models import load_model
from addressvlm.models.loading import enable_packing
from addressvlm.models.lora import attach_lora, set_trainable_parts
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.tiles.graft_rows import Grafter
from addressvlm.training.activation_checkpointing import probe_first_row
from addressvlm.training.collator import Collator, Sample, SkipSampleError, sample_from_row
from addressvlm.training.dataset import Schedule, TableRows
from addressvlm.training.loss import answer_loss
from addressvlm.training.memory_estimate import estimate_stages, model_shape, row_cost
from addressvlm.training.stages import Stage
from addressvlm.training.trainer import AdaptedModel
from tests.integration.test_graft import config_of
from tests.integration.test_graft import rows as photos
from tests.support.families import picture as noise
from tests.support.tiny_families import FAMILIES
from tests.support.training_tables import ListTable, picture, table_rows, train_stage, trained_config

ROUNDS = [("Which street is this?", "Mill Street"), ("Is it?", "Yes"), ("Where is it?", "Oak Avenue, Harbour")]
SAMPLES = [  # with and without a tile, as when tables are mixed
    Sample(noise(0), ROUNDS, tile=noise(1, (32, 32))),
    Sample(noise(2), ROUNDS[1:2]),
    Sample(noise(3), ROUNDS[::-1], tile=noise(4, (32, 32))),
]
SMALL = ModelConfig(vision=PartConfig(rank=2, alpha=4), llm=PartConfig(rank=4, alpha=8), lora_dropout=0.0)


@pytest.fixture(scope="module")
def grafts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[dict[str, Any]]]:
    """Settings, and the rows of two places with two views each; of the last the photo is cut off."""
    config = config_of(tmp_path_factory.mktemp("two"), tiles={"pixels": 160, "font_px": 10.0, "layout": "two"})
    given = photos(places=2, views=2)
    given[3]["image"]["bytes"] = given[3]["image"]["bytes"][:300]
    return config, list(Grafter(config.city.streets, None, config.tiles).graft_rows(given))


def opened(image: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(image["bytes"])).convert("RGB")


def test_a_row_holds_the_photo_and_the_whole_tile(grafts: tuple[Config, list[dict[str, Any]]]) -> None:
    config, result = grafts
    assert [row["reason"] is None for row in result] == [True, True, True, False]
    assert "can't be decoded" in result[3]["reason"]
    photo, tile = opened(result[0]["image"]), opened(result[0]["tile"])
    assert (photo.size, tile.size) == ((64, 48), (160, 160))
    assert abs(np.asarray(photo).astype(int) - (200, 30, 30)).max() < 8
    drawn = Grafter(config.city.streets, None, config.tiles).renderer.tile(*[photos()[0][k] for k in ("lat", "lon", "street")])
    assert abs(np.asarray(tile).astype(int) - np.asarray(drawn.image)).mean() < 2
    assert result[0]["names"] == drawn.names

    both = Image.open(io.BytesIO(display_image(result[0])))
    assert both.size == (160 + 64, 160)
    assert abs(np.asarray(both)[60:100, 164:220].astype(int) - (200, 30, 30)).max() < 8


def test_labels_keep_both_images_and_labelers_see_them_side_by_side(
    grafts: tuple[Config, list[dict[str, Any]]], tmp_path: Path
) -> None:
    good = [{k: v for k, v in row.items() if k != "reason"} for row in grafts[1][:3]]
    tables.write_table(tmp_path, "train", good, tables.GRAFTS)
    rows = list(tables.iter_rows(tmp_path, "train"))
    rows[2]["tile"]["bytes"] = b"no picture"
    made = label_batch(LabelsConfig().model_dump_json(), 0, "", "", rows)
    assert [row["tile"]["bytes"] for row in made.tables["train"]] == [row["tile"]["bytes"] for row in good[:2]]
    assert [reject["id"] for reject in made.rejects] == [good[2]["id"]]

    config = LabelsConfig(labeler="openai", model="m", prompt="side_by_side")
    (_, request), *_ = label_requests(rows[:1], configured_prompt(config), "")[0]
    image, text = state_factory(config)(request).messages()[-1]["content"]
    sent = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2])))
    assert sent.size == (160 + 64, 160)
    assert "The left one shows a place from above" in text["text"]
    assert "corner" not in " ".join(configured_prompt(config).questions)

    tables.write_table(tmp_path / "alignment", "train", made.tables["train"], tables.ALIGNMENT)
    learnt = sample_from_row(TableRows(tmp_path / "alignment", "train")[0])
    assert [image.size for image in learnt.images] == [(64, 48), (160, 160)]


def test_a_tile_that_cant_be_decoded_is_not_learnt_from() -> None:
    (row,) = table_rows(1)
    whole = picture("green")
    assert len(sample_from_row({**row, "tile": whole}).images) == 2
    with pytest.raises(SkipSampleError, match="the tile can't be decoded"):
        sample_from_row({**row, "tile": {"bytes": whole["bytes"][:50]}})


def test_the_question_comes_after_both_images(base: Path) -> None:
    processor = load_model(str(base))[1]
    one, two = (Collator(processor, isolate_questions=True).encode(s) for s in (Sample(SAMPLES[0].image, ROUNDS), SAMPLES[0]))
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (one.ids.count(image), two.ids.count(image)) == (16, 32)
    assert [token for token in two.ids if token != image] == [token for token in one.ids if token != image]
    assert two.rounds.count(0) == one.rounds.count(0) + 16  # all rounds share both
    assert two.pixels["pixel_values"].shape[0] == 2
    torch.testing.assert_close(two.pixels["pixel_values"][:1], one.pixels["pixel_values"])


@pytest.mark.parametrize(
    ("family", "apart"),
    [
        ("llava", False),
        ("llava", True),
        ("smolvlm", False),
        ("smolvlm", True),
        ("qwen2.5-vl", False),
        ("qwen2.5-vl", True),
        ("qwen3-vl", True),
    ],
)
def test_rows_of_two_images_have_the_loss_of_each_alone(base: Path, family: str, apart: bool) -> None:
    model, processor = load_model(str(base)) if family == "llava" else FAMILIES[family]()
    alone = [answer_loss(model, Collator(processor, apart)([sample])) for sample in SAMPLES]
    swapped = Sample(SAMPLES[0].tile, ROUNDS, tile=SAMPLES[0].image)
    assert answer_loss(model, Collator(processor, apart)([swapped]))[0].item() != alone[0][0].item()
    ways = [Collator(processor, apart)(SAMPLES)]
    if enable_packing(model, "auto", torch.device("cpu"), family):
        ways.append(Collator(processor, apart, packed=True)(SAMPLES))
    assert len(ways) == 2
    for batch in ways:
        together, count = answer_loss(model, batch)
        assert count == sum(n for _, n in alone)
        torch.testing.assert_close(together, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-5)


def with_tiles(count: int) -> ListTable:
    """Rows whose answer can be told from the tile alone."""
    rows = table_rows(count)
    return ListTable([{**row, "image": picture("grey"), "tile": row["image"]} for row in rows])


@pytest.mark.parametrize("family", ["llava", *FAMILIES])
def test_training_reads_the_second_image(base: Path, family: str) -> None:
    model, processor = load_model(str(base)) if family == "llava" else FAMILIES[family]()
    packed = enable_packing(model, "auto", torch.device("cpu"), family)
    model, parts = attach_lora(model, SMALL)
    settings = StageConfig(data="alignment", batch_size=3, learning_rate=0.02)
    stage = Stage("s", settings, Schedule(with_tiles(6), 3, 0), 4, 0)
    losses = [metrics.loss for metrics in train_stage(AdaptedModel(model, parts, processor, packed), stage)]
    assert losses[-1] < losses[0]


def test_an_estimate_counts_both_images(base: Path, tmp_path: Path) -> None:
    config = trained_config(tmp_path, base)
    config.model.lora_dropout = 0.0
    stage = Stage("s", config.train.stages["alignment"], Schedule(with_tiles(1), 1, 0), 1, 0)
    model, processor = load_model(str(base))
    tuned, where = attach_lora(model, config.model)
    set_trainable_parts(tuned, where, ["vision", "adapter", "llm"])
    real = probe_first_row(tuned, where, Collator(processor), stage)
    made = model_shape(config)
    set_trainable_parts(made.model, made.parts, ["vision", "adapter", "llm"])
    row = Collator(processor).encode(sample_from_row(with_tiles(1)[0]))
    answers = sum(label != -100 for label in row.labels)
    assert row_cost(made.model, made.parts, row.pixels, len(row.ids), answers).flops == pytest.approx(real, rel=0.15)

    nothing = config.model_copy(update={"name": "nothing"})  # whose tables are not there yet
    for table in (Run(nothing).photos, Run(nothing).alignment):
        assert not table.exists()
    two = nothing.model_copy(update={"tiles": nothing.tiles.model_copy(update={"layout": "two"})})
    tokens = [[s.longest for s in estimate_stages(c, c.train.systems[-1], model_shape(c), photos=8)] for c in (nothing, two)]
    assert [b - a for a, b in zip(*tokens, strict=True)] == [16, 0]  # of stage 1 and stage 2


def _first_only(processor: Any) -> None:
    processor.chat_template = processor.chat_template.replace(
        "{{ '<image>' }}", "{% if loop.first %}{{ '<image>' }}{% endif %}"
    )


def _refusing(processor: Any) -> None:
    plain = type(processor.image_processor).__call__

    class One(type(processor.image_processor)):
        def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
            if len(images[0]) > 1:
                raise ValueError("one image at a time")
            return plain(self, images, *args, **kwargs)

    processor.image_processor.__class__ = One


@pytest.mark.parametrize(("spoil", "why"), [(_first_only, "template shows 1"), (_refusing, "one image at a time")])
def test_a_family_that_takes_one_image_is_told(base: Path, spoil: Callable[[Any], None], why: str) -> None:
    processor = load_model(str(base))[1]
    spoil(processor)
    assert Collator(processor).encode(SAMPLES[1]).ids
    with pytest.raises(InputError, match=rf"can't take 2 images in a conversation \(.*{why}.*\): set tiles.layout to"):
        Collator(processor).encode(SAMPLES[0])
