"""Models asked about photos on the tile of their true place (evaluate.images: grafts), on a real Ray.

python -m pytest tests/integration/test_evaluate_grafts.py
"""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.inference import Localizer
from addressvlm.questions import evaluation_rounds
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run, mark_done
from ray_jobs import compare, evaluate, prepare
from tests.integration.test_graft import config_of
from tests.integration.test_graft import rows as photos
from tests.support.tiny import tiny_llava

pytestmark = pytest.mark.xdist_group("ray-answers")

CITY = Gazetteer([Address("Mill Street", "Harbour"), Address("King Street", "Harbour")])


@pytest.fixture(scope="module")
def config(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A town whose test photos are red; one of them is far from any street of the map."""
    folder = tmp_path_factory.mktemp("town")
    base = tiny_llava(folder / "base")
    systems = [{"name": "zero-shot"}, {"name": "AddressVLM", "stages": ["localization"]}]
    config = config_of(
        folder, model={"base": str(base)}, train={"systems": systems},
        city={"manifest": "unused.csv", "streets": str(folder / "streets.geojson"), "max_reject_share": 0.2},
        evaluate={"workers": 1, "batch_size": 8, "max_new_tokens": 4, "bootstrap": 100},
        compare={"main": "zero-shot", "variants": [
            {"name": "with the map", "system": "zero-shot", "set": {"evaluate.images": "grafts", "tiles.delta": 0.3}},
        ]},
    )  # fmt: skip
    run, test = Run(config), photos(places=3, views=2)
    for number, row in enumerate(test):
        row["rounds"] = evaluation_rounds(CITY.addresses[0], CITY, random.Random(number))
    for split in ("train", "val"):
        tables.write_table(run.photos, split, [{**row, "id": f"{split}{row['id']}"} for row in test], tables.PHOTOS)
    test[5] |= {"place": "far", "lat": test[5]["lat"] + 0.1}
    tables.write_table(run.photos, "test", test, tables.PHOTOS)
    CITY.save(run.gazetteer)
    mark_done(run.photos, prepare.settings(config))
    tiny_llava(run.model_dir("AddressVLM") / "merged", seed=1)
    CITY.save(run.model_dir("AddressVLM") / "merged" / "gazetteer.geojson")
    return config


def shown(config: Config, **changes: Any) -> Config:
    """The settings with photos on their tiles."""
    tiles = config.tiles.model_copy(update=changes)
    return config.model_copy(update={"tiles": tiles, "evaluate": config.evaluate.model_copy(update={"images": "grafts"})})


def written(config: Config, tmp_path: Path) -> list[str]:
    path = tmp_path / "c.yaml"
    path.write_text(config.model_dump_json())  # JSON is YAML
    return ["--config", str(path)]


def test_models_of_the_run_are_asked_about_grafts_beside_what_they_said_of_photos(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    run, with_grafts = Run(config), shown(config)
    evaluate.run_step(with_grafts, redo=False)
    assert "5 photos of the split test grafted" in capsys.readouterr().out
    out = run.folder / "evaluations" / "grafts"
    result = json.loads((out / "metrics.json").read_text())
    assert [(s["name"], s["metrics"]["A_ds"]["n"]) for s in result["systems"]] == [("zero-shot", 5), ("AddressVLM", 5)]
    assert json.loads((out / "answers" / "zero-shot" / "_done.json").read_text())["evaluate"]["images"] == "grafts"
    for name in (run.answers, run.metrics, run.model_dir("AddressVLM") / "merged" / "calibration.json"):
        assert not name.exists()  # what is said of photos has no part in it
    (reject,) = pq.read_table(run.rejects / "graft-town-test.parquet").to_pylist()
    assert reject["id"] == "2_1"

    grafts = list(tables.iter_rows(run.grafted_photos / "test", "test"))
    before = [row for row in tables.iter_rows(run.photos, "test") if row["id"] != "2_1"]
    assert [{**row, "image": None} for row in grafts] == [{**row, "image": None} for row in before]
    image = Image.open(io.BytesIO(grafts[0]["image"]["bytes"])).convert("RGB")
    assert image.size == (160, 160)
    assert abs(np.asarray(image)[4:56, 84:156].astype(int) - (200, 30, 30)).max() < 30
    answers = {(r["id"], r["question"]): r["answer"] for r in tables.iter_rows(out / "answers" / "zero-shot", "test")}
    question = grafts[0]["rounds"][0]["question"]
    assert answers[grafts[0]["id"], question] == Localizer(config.model.base).answer([image], [question], 4)[0]

    evaluate.run_step(with_grafts, redo=False)
    assert "zero-shot: already answered" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"grafted_photos/test was made with other settings \(tiles\.delta"):
        evaluate.run_step(shown(config, delta=0.3), redo=False)


def test_a_variant_with_the_map_stands_beside_rows_of_photos(config: Config) -> None:
    baselines = {"systems": [{"name": "Nearest", "kind": "retrieval"}]}
    with_baselines = Config.model_validate({**shown(config).model_dump(), "compare": baselines})
    with pytest.raises(InputError, match=r"compare\.systems need photos"):
        compare.run_step(with_baselines)
    one = config.model_copy(update={"train": config.train.model_copy(update={"systems": config.train.systems[:1]})})
    rows = {row["name"]: row for row in compare.run_step(one)["systems"]}
    assert list(rows) == ["zero-shot", "with the map"]
    assert not any(row["failed"] for row in rows.values())
    assert [row["metrics"]["A_ds"]["n"] for row in rows.values()] == [6, 5]
    assert rows["with the map"]["notes"] == {"photos without a tile": 1}
    answers = {name: {(r["id"], r["question"]): r["answer"] for r in tables.iter_rows(Run(config).answers / name, "test")}
            for name in ("zero-shot", "with-the-map")}  # fmt: skip
    assert answers["with-the-map"].keys() == {key for key in answers["zero-shot"] if key[0] != "2_1"}
    assert any(answers["zero-shot"][key] != answer for key, answer in answers["with-the-map"].items())
    folders = [Run(config.model_copy(update={"name": name})).grafted_photos / "test" for name in ("town", "town-with-the-map")]
    small, large = ({row["id"]: row["image"]["bytes"] for row in tables.iter_rows(folder, "test")} for folder in folders)
    assert small.keys() == large.keys()
    assert small != large  # each has the tiles of its own settings

    mixed = shown(one).model_copy(update={"compare": one.compare.model_copy(update={"variants": []})})
    (row,) = compare.run_step(mixed)["systems"]
    assert "made with other settings" in row["failed"]  # what was said of photos is not taken for it


@pytest.mark.parametrize(
    ("changes", "flags", "sentence"),
    [
        ({"layout": "two"}, [], "tiles.layout is two, but questions are about one image"),
        ({}, ["--data", "runs/other"], "--data and evaluate.images=grafts don't go together"),
        ({}, ["--split", "none"], r"no table .*none-\*\.parquet"),
    ],
)
def test_a_user_error_is_one_sentence(
    config: Config, tmp_path: Path, changes: dict[str, Any], flags: list[str], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        evaluate.main([*written(shown(config, **changes), tmp_path), *flags])
