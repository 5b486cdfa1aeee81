"""What a stage learns from and how: mixed tables, several cities, rates by part, rows that can't be used, validation, cards.

python -m pytest -q tests/training/test_stages.py
"""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.config.train import ModelConfig, PartConfig, StageConfig, SystemConfig, TrainConfig
from addressvlm.gazetteer.gazetteer import Address, Gazetteer, merge_gazetteers
from addressvlm.models import cards, load_model
from addressvlm.models.lora import attach_lora
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.training import metrics_logger, trainer
from addressvlm.training.checkpoint import TrainingCheckpoint, better_adapter
from addressvlm.training.collator import Collator
from addressvlm.training.dataset import MixedRows, Schedule
from addressvlm.training.stages import Stage, build_stages, training_rows, training_runs
from addressvlm.training.trainer import train_system
from tests.support.tiny import tiny_llava
from tests.support.training_tables import ListTable, keeping, picture, table_rows, trained_config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("tiny"))


def named(name: str, count: int) -> ListTable:
    return ListTable([row | {"id": f"{name}{row['id']}"} for row in table_rows(count)])


def nothing(metrics: dict[str, Any], folder: Path) -> None:
    """A report that keeps no checkpoint."""


def steps(config: Config, system: str) -> list[dict[str, Any]]:
    path = Run(config).training_dir(system) / "loss.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("weights", "counts"), [((1, 1), (6, 9)), ((2, 1), (12, 9)), ((0.5, 3), (3, 27))])
def test_a_mix_goes_through_its_tables_as_often_as_they_weigh(weights: tuple, counts: tuple) -> None:
    mix = MixedRows([(named("a", 6), weights[0]), (named("b", 9), weights[1])])
    assert len(mix) == sum(counts)
    seen = [mix[row]["id"] for epoch in range(2) for row in mix.epoch(3, epoch)]
    assert sum(name.startswith("a") for name in seen) == 2 * counts[0]
    for name, size, count in (("a", 6, counts[0]), ("b", 9, counts[1])):
        times = np.bincount([int(row[1:]) for row in seen if row.startswith(name)], minlength=size)
        assert times.max() - times.min() <= 1
        assert times.sum() == 2 * count
    first = "".join(row[0] for row in seen[: len(mix)])
    assert "ab" in first
    assert "ba" in first  # mixed, not one after the other


def test_the_order_of_a_mix_is_that_of_seed_and_step_alone() -> None:
    def schedule(seed: int) -> Schedule:
        return Schedule(MixedRows([(named("a", 6), 1), (named("b", 9), 1)]), 4, seed)

    whole, late = schedule(1), schedule(1)
    every = [whole.indices(step) for step in range(12)]
    assert [late.indices(step) for step in (11, 7, 8)] == [every[11], every[7], every[8]]
    assert schedule(2).indices(0) != every[0]
    shares = [sorted(i for rank in range(2) for i in whole.indices(step, rank, 2)) for step in range(12)]
    assert shares == [sorted(rows) for rows in every]


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


def test_parts_learn_at_their_own_rates(tmp_path: Path, base: Path) -> None:
    moved = {}
    for rates in ({}, {"adapter": 1e-9}):
        config = trained_config(tmp_path / str(len(rates)), base)
        stage = config.train.stages["localization"]
        stage.max_steps, stage.learning_rates, stage.weight_decay = 2, rates, 0.0
        train_system(config, "stage 2 only", None, nothing)
        folder = Run(config).model_dir("stage 2 only")
        weights = load_file(folder / "merged" / "model.safetensors")
        before = load_file(base / "model.safetensors")
        moved[len(rates)] = {
            part: max(float((weights[n] - before[n]).abs().max()) for n in before if word in n)
            for part, word in (("adapter", "multi_modal_projector"), ("llm", "language_model"))
        }
    assert moved[0]["adapter"] > 1e-3
    assert moved[1]["adapter"] < 1e-7
    assert moved[1]["llm"] > 1e-4


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
def test_a_stage_that_makes_no_sense_is_told(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        StageConfig(**{"data": "photos", **settings})


def test_parts_have_their_own_dropout(base: Path) -> None:
    settings = ModelConfig(vision=PartConfig(rank=2, dropout=0.0), llm=PartConfig(rank=2, dropout=0.4), lora_dropout=0.1)
    model, _ = attach_lora(load_model(str(base))[0], settings)
    found = {
        part: {
            getattr(m.lora_dropout["default"], "p", 0.0) for n, m in model.named_modules() if hasattr(m, "lora_A") and part in n
        }
        for part in ("vision_tower", "language_model")
    }
    assert found == {"vision_tower": {0.0}, "language_model": {0.4}}


def test_rows_that_cant_be_used_are_replaced_counted_and_written_down(tmp_path: Path, base: Path) -> None:
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


def test_images_that_are_all_corrupt_are_one_sentence(tmp_path: Path, base: Path) -> None:
    broken = ListTable([row | {"image": {"bytes": b"not a picture", "path": None}} for row in table_rows(9)])
    with pytest.raises(InputError, match=r"none of 17 training rows .* can be used \(row \d: the image can't be decoded"):
        Schedule(broken, 3, 0).encoded(Collator(load_model(str(base))[1]), 0)


def test_replacing_a_row_is_the_same_after_a_resume(base: Path) -> None:
    table = named("a", 12)
    for row in (2, 5, 9):
        table.rows[row]["image"] = picture("red") | {"bytes": b"?"}

    class Kept:
        def encode(self, sample: Any) -> Any:
            return sample.image.tobytes()

    once = [Schedule(table, 4, 1).encoded(Kept(), step) for step in range(6)]
    late = Schedule(table, 4, 1)
    assert [late.encoded(Kept(), step) for step in (5, 4)] == [once[5], once[4]]
    assert all(len(rows) == 4 for rows in once)


def test_a_step_of_no_length_is_told(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    one, two = SystemConfig(name="one", stages=["localization"]), ["alignment", "localization"]
    config.train.systems = [one, SystemConfig(name="two", stages=two, match_steps_of="one")]
    with pytest.raises(InputError, match="'two' shall make the 12 steps of 'one', but makes 12 before its last stage"):
        build_stages(config, config.train.systems[1])


def test_an_empty_split_is_told(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    for file in Run(config).photos.glob("train-*.parquet"):
        tables.pq.write_table(tables.pq.read_table(file).slice(0, 0), file)
    with pytest.raises(InputError, match="photos has no training rows: prepare a city with more places"):
        train_system(config, "stage 2 only", None, nothing)


def test_validation_goes_into_the_journal_and_changes_nothing(tmp_path: Path, base: Path) -> None:
    weights = []
    for every in (None, 4):
        config = trained_config(tmp_path / str(every), base)
        config.evaluate.max_new_tokens = 4
        config.train.validate_every, config.train.validate_photos = every, 2
        rows = [
            row | {"lat": 0.0, "lon": 0.0, "street": "Mill Street", "district": "Harbour", "heading": None}
            for row in table_rows(4)
        ]
        columns = ("id", "place", "lat", "lon", "street", "district", "image", "rounds")
        schema = tables.with_features(tables.pa.schema([tables.PHOTOS.field(c) for c in columns]))
        tables.write_table(Run(config).photos, "val", rows, schema)
        train_system(config, "stage 2 only", None, nothing)
        weights.append(load_file(Run(config).model_dir("stage 2 only") / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    lines = (Run(config).training_dir("stage 2 only") / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12]
    assert 0 <= json.loads(lines[-1])["A_s_G"] <= 1


def test_the_adapter_that_validated_best_is_kept_and_can_be_merged(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for merge in ("last", "best"):
        config = trained_config(tmp_path / merge, base, checkpoint_to_merge=merge, validate_every=2)
        config.train.stages["localization"].max_steps = 8
        turns = [0.5, 0.75, 0.75, 0.25]
        monkeypatch.setattr(trainer, "Validation", lambda *_, turns=turns, **__: lambda *_: {"A_ds": turns.pop(0)})
        kept: list[Path] = []
        train_system(config, "stage 2 only", None, keeping(kept, tmp_path / merge))
        folder = Run(config).model_dir("stage 2 only")
        found[merge] = load_file(folder / "adapter" / "adapter_model.safetensors")
        if merge == "last":
            found["kept"] = load_file(folder / "best" / "adapter_model.safetensors")
        held = TrainingCheckpoint.read(kept[-1]).best
        assert held is not None
        assert (held.step, held.metric, held.value) == (6, "A_ds", 0.75)  # of equal ones the later
        turns.append(0.5)
        train_system(config, "stage 2 only", kept[-2], nothing)  # goes on after the best
        again = load_file(Run(config).model_dir("stage 2 only") / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(again[name], found[merge][name]) for name in again)
    assert all(torch.equal(found["best"][name], found["kept"][name]) for name in found["best"])
    assert any(not torch.equal(found["best"][name], found["last"][name]) for name in found["best"])


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
def test_a_training_that_makes_no_sense_is_told(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TrainConfig(**settings)


def test_the_loss_of_each_kind_of_question_is_seen(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base, peak_tflops=1e-3)
    train_system(config, "stage 2 only", None, nothing)
    last = steps(config, "stage 2 only")[-1]
    assert set(last["by_kind"]) == {"generation", "judgment"}
    assert last["tokens_per_s"] > last["samples_per_s"]
    assert last["mfu"] > 0
    assert last["memory_gib"] > 0.05


def test_what_validates_best_is_of_the_last_stage_and_by_the_first_metric_there_is(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained_config(tmp_path, base, validate_every=2)
    for stage in config.train.stages.values():
        stage.max_steps = 3
    turns = [{"A_ds": 0.9, "A": 0.9}, {"A_ds": 0.8, "A": 0.9}, {"A_ds": 0.5, "A": 0.1}, {"A_ds": 0.25, "A": 0.9}]
    monkeypatch.setattr(trainer, "Validation", lambda *_, **__: lambda *_: turns.pop(0))
    kept: list[Path] = []
    train_system(config, "AddressVLM", None, keeping(kept, tmp_path))
    assert not turns  # after the second and the last step of each stage
    held = [TrainingCheckpoint.read(folder) for folder in kept]
    assert [(one.stage, one.step, one.best and (one.best.step, one.best.metric, one.best.value)) for one in held] == [
        (0, 2, None), (0, 3, None), (1, 2, (2, "A_ds", 0.5)), (1, 3, (2, "A_ds", 0.5)),
    ]  # fmt: skip
    last = held[-1].best
    assert last is not None
    assert all(torch.equal(last.adapter[name], weights) for name, weights in held[2].adapter.items())
    assert better_adapter(last, 9, {}, {}) is last
    assert better_adapter(None, 9, {}, {}) is None
    names = [
        (found := better_adapter(None, 1, dict.fromkeys(given, 0.5), {})) and found.metric
        for given in (["A_s_G", "A_s"], ["A_s", "A"])
    ]
    assert names == ["A_s", "A"]


def test_replacing_a_row_is_the_same_whatever_the_workers() -> None:
    table = named("a", 12)
    for row in (2, 5, 9):
        table.rows[row]["image"] = picture("red") | {"bytes": b"?"}

    class Kept:
        def encode(self, sample: Any) -> Any:
            return sample.rounds, sample.image.tobytes()

    for step in range(6):
        whole = Schedule(table, 4, 1).encoded(Kept(), step)
        shares = [Schedule(table, 4, 1).encoded(Kept(), step, rank, 2) for rank in range(2)]
        assert [row for pair in zip(*shares, strict=True) for row in pair] == whole


def progress_of(step: int, **given: Any) -> metrics_logger.StepMetrics:
    seen = {"loss": 2.0, "learning_rate": 0.1, "gradient_norm": 3.0, "samples_per_s": 4.0, "tokens": 5, "tokens_per_s": 60.0}
    return metrics_logger.StepMetrics("localization", step, 9, **{**seen, "mfu": None, "memory_gib": 0.5, **given})


def test_time_left_is_that_of_the_steps_since_the_start_of_this_run(tmp_path: Path) -> None:
    account = metrics_logger.MetricsLogger(tmp_path, "system", 4, 10)
    account.began, account.done = 0.0, 6
    told = account._progress_line(progress_of(2, mfu=0.25, rejected=3), now=10.0)
    assert told == (
        "localization step 2/9, loss 2.000, 4.0 photos/s, 60 tokens/s, 25.0 % of peak, 0.5 GiB, 3 rows skipped, 20 s left"
    )


def test_a_tracker_gets_what_the_journal_has_by_the_system_s_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    client = ModuleType("mlflow")
    client.__spec__ = ModuleSpec("mlflow", None)
    client.set_experiment = lambda name: sent.append(name)  # type: ignore[attr-defined]
    client.start_run = lambda run_name: sent.append(run_name)  # type: ignore[attr-defined]
    client.log_metrics = lambda values, step: sent.append((values, step))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", client)
    account = metrics_logger.MetricsLogger(tmp_path, "AddressVLM", 4, 10, ["mlflow"], "small")
    account.log_step(progress_of(1, by_kind={"choice": 1.5}))
    account.log_validation("localization", 1, {"A_ds": 0.5})
    assert sent[:2] == ["addressvlm", "small: AddressVLM"]
    values, step = sent[2]
    assert (step, values["localization/loss"], values["localization/loss of choice"]) == (5, 2.0, 1.5)
    assert "localization/mfu" not in values
    assert sent[3] == ({"localization/val/A_ds": 0.5}, 5)


def test_validation_after_the_step_resumed_from_is_forgotten(tmp_path: Path) -> None:
    def journal_of(done: int) -> metrics_logger.MetricsLogger:
        return metrics_logger.MetricsLogger(tmp_path, "system", done, 9)

    before = journal_of(0)
    for before.done in (2, 4, 6):
        before.log_validation("localization", before.done, {"A": 0.5})
    journal_of(4)
    found = (tmp_path / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["done"] for line in found] == [2, 4]


def test_a_tracker_that_is_not_there_is_told() -> None:
    with pytest.raises(InputError, match=r"train\.loggers names no_such_tracker, which is not installed"):
        metrics_logger.external_logger("no_such_tracker", "run", "system")


def test_the_card_tells_base_data_and_licence_and_takes_metrics(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    Gazetteer([Address("Mill Street", "Harbour")], city="Smallville", attribution=["Streets: somebody"]).save(
        Run(config).gazetteer
    )
    train_system(config, "stage 2 only", None, nothing)
    folder = Run(config).model_dir("stage 2 only")
    for name in ("adapter", "merged"):
        text = (folder / name / "README.md").read_text()
        assert "license: mit" in text
        assert f"base_model: {base}" in text
        assert "Smallville: 24 photos" in text
        assert "Streets: somebody" in text
        assert cards.no_metrics_section("evaluate") in text
    measured = {"A_ds": {"value": 0.5, "low": 0.25, "high": 0.75}, "A": {"value": None, "low": None, "high": None}}
    cards.set_metrics(folder, measured, "4 test photos")
    cards.set_metrics(folder, measured, "4 test photos")
    text = (folder / "merged" / "README.md").read_text()
    assert text.count("| A_ds | 50.0 | 25.0 to 75.0 |") == 1
    assert "Not measured yet" not in text
