"""The comparison on a real Ray: systems of several kinds, some that fail, table and report"""

import dataclasses
import json
import math
from pathlib import Path

import pyproj
import pytest

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.config.compare import VariantConfig
from addressvlm.models import cards as cards_module
from addressvlm.models.families import part_of
from addressvlm.models.loading import load_model
from addressvlm.models.lora import attach_lora, trainable_params
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run, mark_done
from ray_jobs import compare, prepare
from ray_jobs.baselines import system_settings, trained
from ray_jobs.baselines.system import SystemOutcome, model_stats
from tests.support.baselines import comparison_in, photo, tiny_dino, where
from tests.support.tiny import tiny_llava
from tests.support.training_tables import trained_config

pytestmark = pytest.mark.xdist_group("ray-answers")


@pytest.fixture(scope="module")
def config(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("compare")
    dino = str(tiny_dino(folder / "dino"))
    systems = [
        {"name": "Nearest", "kind": "retrieval", "encoder": {"base": dino}},
        {"name": "Nowhere", "kind": "retrieval", "encoder": {"base": str(folder / "nothing")}},
        {"name": "Fused", "kind": "fusion", "of": ["Nearest", "zero-shot"]},
        {"name": "Fused in vain", "kind": "fusion", "of": ["Nearest", "Nowhere"]},
        {"name": "Two streets", "kind": "prior", "of": "Fused", "streets": 2},
        {"name": "One street", "kind": "prior", "of": "zero-shot", "streets": 1},
        {"name": "Too early", "kind": "prior", "of": "Later", "district": True},
        {"name": "Later", "kind": "likelihood", "of": "zero-shot"},
    ]
    context = comparison_in(
        folder, tiny_llava(folder / "base"), [photo("train", number) for number in range(9)],
        evaluate={"workers": 1, "max_new_tokens": 4, "bootstrap": 100},
        train={"systems": [{"name": "zero-shot"}]}, compare={"systems": systems, "main": "zero-shot"},
    )  # fmt: skip
    tables.write_table(context.run.photos, "val", [photo("val", number) for number in range(6)], tables.PHOTOS)
    mark_done(context.run.photos, prepare.settings(context.config))
    return context.config


def test_one_table_of_all_systems_and_why_some_are_missing(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in compare.run_step(config)["systems"]}
    assert list(rows) == [
        "zero-shot", "Nearest", "Nowhere", "Fused", "Fused in vain", "Two streets", "One street", "Too early", "Later",
    ]  # fmt: skip
    assert rows["Nearest"]["metrics"]["A_ds"]["value"] == 1
    assert rows["Nearest"]["against"]["mcnemar"] == {"better": 0, "worse": 6, "p": 2 / 2**6}
    assert rows["Nearest"]["within"]["500 m"]["value"] == 1
    assert rows["Nearest"]["cost"]["answering"]["photos"] > 0
    assert rows["Fused"]["metrics"]["A_ds"]["value"] == 1
    assert rows["Fused"]["notes"]["weight of Nearest"] > rows["Fused"]["notes"]["weight of zero-shot"]
    assert "nothing" in rows["Nowhere"]["failed"]
    assert "fuses 'Nowhere', which has no scores" in rows["Fused in vain"]["failed"]
    assert "'Too early' is of 'Later', which has no scores" in rows["Too early"]["failed"]
    assert rows["One street"]["metrics"]["A_s"]["value"] == 1
    assert rows["Two streets"]["notes"] == {"addresses left": 2, "nothing ruled out": 0, "true address ruled out": 0}
    assert rows["Two streets"]["trust"]["ece"] >= 0
    left = {
        split: tables.read_table(Run(config).folder / "scores" / "two-streets" / split, split)["scores"]
        for split in ("val", "test")
    }
    assert all(sum(map(math.isinf, scores)) == 1 for split in left.values() for scores in split.to_pylist())
    cards = {page.parent.name: page.read_text() for page in (Run(config).folder / "cards").glob("*/README.md")}
    assert set(cards) == {"nearest", "fused", "two-streets", "one-street", "later"}
    assert "9 training photos and 3 addresses" in cards["nearest"]
    assert "| A_ds | 100.0 |" in cards["two-streets"]
    folder = Run(config).folder / "comparison"
    assert json.loads((folder / "comparison.json").read_text())["main"] == "zero-shot"
    assert "Calibration" in (folder / "report.html").read_text()

    capsys.readouterr()
    again = compare.run_step(config, only=["zero-shot", "Nearest"])
    assert [row["name"] for row in again["systems"]] == ["zero-shot", "Nearest"]
    assert "zero-shot: already answered" in capsys.readouterr().out


def test_all_systems_can_answer_by_their_scores(config: Config) -> None:
    scored = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"answers": "likelihood"})})
    (row,) = compare.run_step(scored, redo=True, only=["zero-shot"])["systems"]
    assert not row["failed"]
    assert row["top"]["address-5"]["value"] == 1  # of three addresses
    assert row["metrics"]["A_ds"]["value"] == row["top"]["address-1"]["value"]


def test_a_variant_does_not_learn_from_photos_near_those_asked_about(tmp_path: Path) -> None:
    context = comparison_in(tmp_path, "a/base", [photo("train", number) for number in range(60, 63)])
    near, far = (comparison_in(tmp_path, "a/base", [photo("train", n)], name=name) for name, n in (("near", 4), ("far", 40)))
    variant = context.config.model_copy(update={"train": context.config.train.model_copy(update={"cities": {"far": 1.0}})})
    trained.require_same_split(context, "x", variant)
    variant.train.cities["near"] = 0.5
    with pytest.raises(InputError, match=r"'x' would learn from photos of near that are 0 m from test photos, less"):
        trained.require_same_split(context, "x", variant)
    assert {near.config.name, far.config.name} == set(variant.train.cities)


def test_a_variant_may_learn_from_photos_just_beyond_the_buffer(tmp_path: Path) -> None:
    context = comparison_in(tmp_path, "a/base", [photo("train", 40)], city={"manifest": "none.csv", "split_buffer_m": 25})
    other = comparison_in(tmp_path, "a/base", [photo("train", 40)], name="other")
    geod, rows = pyproj.Geod(ellps="WGS84"), [photo("test", 0)]
    rows[0] |= {"lat": 60.0, "lon": 10.0}
    tables.write_table(context.run.photos, "test", rows, tables.PHOTOS)
    for metres, apart in ((24.5, False), (25.5, True)):
        lon, lat, _ = geod.fwd(10.0, 60.0, 90, metres)
        tables.write_table(other.run.photos, "train", [photo("train", 0) | {"lat": lat, "lon": lon}], tables.PHOTOS)
        variant = context.config.model_copy(
            update={"train": context.config.train.model_copy(update={"cities": {"other": 1.0}})}
        )
        if apart:
            trained.require_same_split(context, "x", variant)
        else:
            with pytest.raises(InputError, match=r"that are 2[45] m from test photos, less than split_buffer_m = 25 m"):
                trained.require_same_split(context, "x", variant)


def test_only_photos_that_were_asked_about_count_within_a_radius(tmp_path: Path) -> None:
    context = comparison_in(tmp_path, "a/base", [photo("train", 0)])
    some = dataclasses.replace(context, task=dataclasses.replace(context.task, ids=["test1", "test3"]))
    result = compare.accuracy_within(some, SystemOutcome(coordinates={"test1": where(1, 1), "test0": where(0, 0)}), (100, 0))
    assert (result["25 m"]["n"], result["25 m"]["value"]) == (2, 0.5)
    assert compare.accuracy_within(some, SystemOutcome(), (100, 0)) == {}


def test_systems_stand_in_the_order_of_the_settings_and_see_photos(tmp_path: Path) -> None:
    systems = [{"name": "B", "kind": "likelihood", "of": "z"}, {"name": "A", "kind": "prior", "of": "B", "district": True}]
    context = comparison_in(
        tmp_path, "a/base", [photo("train", 0)], train={"systems": [{"name": "z"}]},
        compare={"systems": systems, "variants": [{"name": "V", "system": "z"}]},
    )  # fmt: skip
    assert [(settings.name, kind) for kind, settings in system_settings(context.config)] == [
        ("z", "generated"), ("B", "likelihood"), ("A", "prior"), ("V", "variant"),
    ]  # fmt: skip
    compare.check_names(context.config, ["A", "V"])
    context.config.evaluate.images = "grafts"
    with pytest.raises(InputError, match=r"compare\.systems need photos"):
        compare.check_names(context.config, [])


def test_what_is_measured_goes_into_the_cards_of_a_trained_model(tmp_path: Path) -> None:
    context = comparison_in(tmp_path, "a/base", [photo("train", number) for number in range(3)])
    model = context.run.model_dir("AddressVLM")
    (model / "merged").mkdir(parents=True)
    (model / "merged" / "README.md").write_text(cards_module.no_metrics_section("evaluate"))
    settings = next(system for system in context.config.train.systems if system.name == "AddressVLM")
    result = compare.SystemResult("generated", settings, SystemOutcome(model=model))
    compare.write_card(context, result, {"metrics": {"A_ds": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 2}}})
    text = (model / "merged" / "README.md").read_text()
    assert "2 photos of the split test of r" in text
    assert "| A_ds | 50.0 | 25.0 to 75.0 |" in text
    compare.write_card(context, result, {"failed": "no answers"})
    assert (model / "merged" / "README.md").read_text() == text
    assert not (context.run.folder / "cards").exists()


def test_only_parts_that_learn_count_as_trained(tmp_path: Path) -> None:
    config = trained_config(tmp_path, tiny_llava(tmp_path / "base"))
    config.train.stages["alignment"].parts, config.train.stages["localization"].parts = ["adapter"], ["adapter", "llm"]
    system = config.train.systems[-1]
    assert system.stages == ["alignment", "localization"]
    model, parts = attach_lora(load_model(str(tmp_path / "base"), "float32")[0], config.model)
    tiny_llava(Run(config).model_dir(system.name) / "merged")
    model.save_pretrained(Run(config).model_dir(system.name) / "adapter")
    learning = {name: weights.numel() for name, weights in trainable_params(model).items() if part_of(name, parts) != "vision"}
    assert 0 < sum(learning.values()) < sum(weights.numel() for weights in trainable_params(model).values())
    assert model_stats(config, system).parameters == sum(learning.values())


def test_systems_must_have_different_folders(config: Config) -> None:
    with pytest.raises(InputError, match=r"--system Nobody: systems are zero-shot, Nearest"):
        compare.run_step(config, only=["Nobody"])
    twice = config.model_copy(update={"train": config.train.model_copy(deep=True)})
    twice.train.systems[0].name = "nearest"
    with pytest.raises(InputError, match="would share a folder"):
        compare.run_step(twice)


def test_a_variant_is_a_run_of_its_own() -> None:
    changed = trained.variant_config(
        Config(), VariantConfig(name="delta 0.3", set={"tiles.delta": 0.3, "train.cities": {"a": 1}})
    )
    assert (changed.name, changed.tiles.delta, changed.train.cities) == ("demo-delta-0-3", 0.3, {"a": 1.0})
    base = Config(seed=5)
    trained.variant_config(base, VariantConfig(name="x", set={"tiles.delta": 0.25, "seed": 7}))
    assert (base.tiles.delta, base.seed, base.name) == (Config().tiles.delta, 5, "demo")  # as it was
    other = trained.variant_config(
        Config(seed=3), VariantConfig(name="GeoReasoner", config="demo-georeasoner", set={"tiles.names": False})
    )
    assert (other.name, other.seed, other.tiles.names, list(other.train.stages)) == (
        "demo-georeasoner", 3, False, ["reasoning", "localization"],
    )  # fmt: skip
    with pytest.raises(InputError, match=r"compare\.variants, 'x': unknown key 'tiles\.dleta'"):
        trained.variant_config(Config(), VariantConfig(name="x", set={"tiles.dleta": 0.3}))
