"""A system's stages: steps, seeds, data of several tables and cities, rows that are rejected

python -m pytest -q tests/training/test_stages.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.config.train import AugmentConfig, StageConfig, SystemConfig, TrainConfig
from addressvlm.gazetteer.gazetteer import Address, Gazetteer, merge_gazetteers
from addressvlm.models import load_model
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.training.collator import Collator
from addressvlm.training.dataset import Schedule
from addressvlm.training.stages import Stage, build_stages, training_rows, training_runs
from addressvlm.training.trainer import train_system
from tests.support.training_tables import ListTable, keeping, nothing, table_rows, trained_config


def named(name: str, count: int) -> ListTable:
    return ListTable([row | {"id": f"{name}{row['id']}"} for row in table_rows(count)])


def steps(config: Config, system: str) -> list[dict[str, Any]]:
    path = Run(config).training_dir(system) / "loss.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_joint_stage_learns_from_both_tables(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    config.train.stages["localization"].data = ["alignment", "photos"]
    assert len(training_rows(config, ["alignment", "photos"])) == 48
    train_system(config, "stage 2 only", None, nothing)
    assert len(steps(config, "stage 2 only")) == 24


def test_cities_are_mixed_and_the_model_knows_the_addresses_of_all(tmp_path: Path, base: Path) -> None:
    first, second = trained_config(tmp_path, base, rows=6), trained_config(tmp_path, base, rows=6)
    second.name = "second"
    schema = tables.with_features(tables.pa.schema([tables.PHOTOS.field(c) for c in ("id", "place", "image", "rounds")]))
    tables.write_table(Run(second).photos, "train", table_rows(6), schema)
    Gazetteer([Address("Far Row", "Hill")], city="Second").save(Run(second).gazetteer)
    both = first.model_copy(deep=True)
    both.name, both.train.cities = "both", {"small": 1.0, "second": 2.0}
    assert [(run.folder.name, weight) for run, weight in training_runs(both)] == [("small", 1.0), ("second", 2.0)]
    assert len(training_rows(both, ["photos"])) == 6 + 2 * 6
    train_system(both, "stage 2 only", None, nothing)
    merged = Run(both).model_dir("stage 2 only") / "merged"
    assert "Far Row" in Gazetteer.load(merged / "gazetteer.geojson").streets
    assert "Mill Street" in Gazetteer.load(merged / "gazetteer.geojson").streets
    both.train.cities = {"third": 1.0}
    with pytest.raises(InputError, match=r"no table .*third/photos/train"):
        training_rows(both, ["photos"])


def test_joined_gazetteers_keep_every_address() -> None:
    one = Gazetteer([Address("Mill Street", "Harbour")], city="A", attribution=["x"])
    other = Gazetteer([Address("Mill Street", "Hill"), Address("Oak Row", "Hill")], city="B", attribution=["x", "y"])
    both = merge_gazetteers([one, other])
    assert both.addresses == sorted([*one.addresses, *other.addresses])
    assert (both.city, both.attribution) == ("A + B", ["x", "y"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"data": []}, "name one table or several different ones"),
        ({"data": ["photos", "photos"]}, "name one table or several different ones"),
        ({"parts": []}, "name at least one part"),
        ({"parts": ["llm"], "learning_rates": {"vision": 1e-3}}, "learning_rates names vision, the parts trained are llm"),
        ({"learning_rates": {"llm": 0}}, "learning_rates must be above 0"),
    ],
)
def test_a_stage_that_makes_no_sense_is_an_error(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        StageConfig(**{"data": "photos", **settings})


def test_unusable_rows_are_replaced_counted_and_written_down(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    run = Run(config)
    rows = table_rows(24)
    rows[3]["image"] = {"bytes": rows[3]["image"]["bytes"][:40], "path": None}
    rows[5]["image"] = {"bytes": b"", "path": None}
    rows[7]["rounds"] = []
    rows[9]["rounds"] = [round_ | {"answer": ""} for round_ in rows[9]["rounds"]]
    schema = tables.with_features(tables.pa.schema([tables.PHOTOS.field(c) for c in ("id", "place", "image", "rounds")]))
    tables.write_table(run.photos, "train", rows, schema)
    kept: list[Path] = []
    train_system(config, "stage 2 only", None, keeping(kept, tmp_path))
    assert steps(config, "stage 2 only")[-1]["rejected"] == 4
    rejects = tables.pq.read_table(run.rejects / "train-stage-2-only.parquet").to_pylist()
    assert {(row["id"], row["stage"]) for row in rejects} == {(row, "localization") for row in "3579"}
    reasons = {"the image can't be decoded", "there is no question", "there is no answer"}
    assert {row["reason"].split(" (")[0] for row in rejects} == reasons
    train_system(config, "stage 2 only", kept[-1], nothing)  # the last steps meet few of them
    assert tables.pq.read_table(run.rejects / "train-stage-2-only.parquet").to_pylist() == rejects


def test_match_steps_of_that_leaves_no_step_is_an_error(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    one, two = SystemConfig(name="one", stages=["localization"]), ["alignment", "localization"]
    config.train.systems = [one, SystemConfig(name="two", stages=two, match_steps_of="one")]
    with pytest.raises(InputError, match="'two' shall make the 12 steps of 'one', but makes 12 before its last stage"):
        build_stages(config, config.train.systems[1])


def test_an_empty_split_is_an_error(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    for file in Run(config).photos.glob("train-*.parquet"):
        tables.pq.write_table(tables.pq.read_table(file).slice(0, 0), file)
    with pytest.raises(InputError, match="photos has no training rows: prepare a city with more places"):
        train_system(config, "stage 2 only", None, nothing)


def test_a_step_has_the_same_rows_and_as_many_batches_on_all_workers_whatever_their_number(base: Path) -> None:
    config = StageConfig(data="photos", batch_size=1, gradient_accumulation_steps=2)
    stage = Stage("s", config, Schedule(named("a", 24), 8, 0), 3, 0)
    collate = Collator(load_model(str(base))[1])
    for world in (1, 2, 3, 4, 5, 8):
        steps = [stage.step_batches(collate, 1, rank, world) for rank in range(world)]
        assert sum(step.tokens for step in steps) == stage.step_batches(collate, 1, 0, 1).tokens
        assert len({len(step.batches) for step in steps}) == 1
        sizes = [len(batch["input_ids"]) for step in steps for batch in step.batches]
        assert sum(sizes) == 8
        assert max(sizes) <= (1 if 8 % world == 0 else 2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"workers": 2, "min_workers": 3}, "min_workers is 3, above workers, which is 2"),
        ({"checkpoint_to_merge": "best"}, "checkpoint_to_merge is best, which needs validation: set validate_every too"),
    ],
)
def test_a_training_that_makes_no_sense_is_an_error(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TrainConfig(**settings)


def test_stages_have_seeds_augmentation_and_steps_of_their_own(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base, workers=3)
    config.train.stages["alignment"].gradient_accumulation_steps = 2  # 24 rows, two epochs: 24 a step, then 12
    config.train.stages["localization"].augment = AugmentConfig(colour=0.2)
    systems = {made.name: build_stages(config, made) for made in config.train.systems if made.stages}
    first, second = systems["AddressVLM"]
    assert (first.steps, second.steps) == (2, 4)
    assert [stage.steps for stage in systems["stage 2 only, equal steps"]] == [6]
    assert [stage.steps for stage in systems["stage 2 only"]] == [4]
    assert first.seed != second.seed
    assert (first.schedule.seed, second.schedule.seed) == (first.seed, second.seed)
    assert first.schedule.indices(0)[:12] != second.schedule.indices(0)
    assert [stage.schedule.augment.colour for stage in (first, second)] == [0.0, 0.2]


def test_large_seeds_are_taken(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    config.seed = 10**6
    stage = build_stages(config, config.train.systems[1])[0]
    seeds = {stage.dropout_seed(step, rank) for step in range(3) for rank in range(2)}
    assert len(seeds) == 6
    for seed in seeds:
        torch.manual_seed(seed)


def test_a_seed_of_training_leaves_the_split_alone(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    own = trained_config(tmp_path, base, seed=7)
    before, after = (build_stages(one, one.train.systems[1])[0] for one in (config, own))
    assert (own.seed, own.training_seed, config.training_seed) == (0, 7, 0)
    assert after.schedule.seed != before.schedule.seed
    assert after.schedule.indices(0) != before.schedule.indices(0)
