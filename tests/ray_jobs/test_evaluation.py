"""The steps of an evaluation and what each depends on, without Ray"""

import json
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from addressvlm import InputError
from addressvlm.answers import calibration
from addressvlm.answers.calibration import Calibration
from addressvlm.config import Config, validate
from addressvlm.evaluation import report, run_questions
from addressvlm.evaluation.likelihood import scored_photos
from addressvlm.evaluation.run_questions import judge_answers, questions_of
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.storage.shards import process_shard, remove_stale_files
from ray_jobs import evaluation
from ray_jobs.evaluation import EvaluationTask, ModelOutput, PhotoModel
from ray_jobs.ray_data import ShardJob
from tests.support.baselines import GAZETTEER, photo, run_in, scores_of, task_of

IDS = pa.schema([("id", pa.string())])
Row = dict[str, Any]


# Photos


def test_photos_are_drawn_by_seed_and_asked_about_in_the_order_of_the_table(tmp_path: Path) -> None:
    config = run_in(tmp_path)

    def chosen(most: int | None, seed: int = 0) -> list[str]:
        need = config.evaluate.model_copy(update={"max_photos": most})
        changed = config.model_copy(update={"evaluate": need, "seed": seed})
        return evaluation.open_task(changed, Run(config).photos, "test", tmp_path).ids

    everyone = [f"test{number}" for number in range(9)]
    assert chosen(None) == chosen(9) == chosen(10) == everyone
    assert len(chosen(8)) == 8
    assert chosen(4) == sorted(random.Random(0).sample(everyone, 4))
    assert len({tuple(chosen(4, seed)) for seed in range(5)}) > 1
    tables.write_table(tmp_path / "none", "test", [{"id": "a"}], IDS)
    pq.write_table(IDS.empty_table(), tmp_path / "none" / "test-00000.parquet")
    with pytest.raises(InputError, match="has no photos in its split"):
        evaluation.open_task(config, tmp_path / "none", "test", tmp_path)


def test_the_judge_knows_the_names_of_all_cities_and_the_gazetteer_is_the_datas(tmp_path: Path) -> None:
    config = run_in(tmp_path)
    for name, street in (("a", "Rue du Port"), ("b", "Calle Mayor")):
        (tmp_path / name).mkdir()
        Gazetteer([Address(street, "Centre")], city=name).save(tmp_path / name / "gazetteer.geojson")
    judge, city = evaluation.make_judge(Run(config).photos, "test", [str(tmp_path / "a"), str(tmp_path / "b")])
    assert city.addresses == GAZETTEER.addresses
    for street in ("Rue du Port", "Calle Mayor", "Mill Street"):
        assert judge.correct("street", "generation", street, f"It is {street}.", [], street=street)
        assert not judge.correct("street", "generation", "Lake Road", street, [], street="Lake Road")


def test_photos_to_calibrate_on_are_held_out_and_their_prior_is_of_training(tmp_path: Path) -> None:
    config = run_in(tmp_path, calibration_photos=10)
    drawn = evaluation.calibration_photos(config, Run(config).photos)
    assert {split: len(ids) for split, ids in drawn.items()} == {"val": 10, "train": 10}
    assert all(photo.startswith(split) for split, ids in drawn.items() for photo in ids)
    table = [row["id"] for row in tables.iter_rows(Run(config).photos, "train", ["id"])]
    assert drawn["train"] == sorted(drawn["train"], key=table.index)
    assert set(drawn["train"]) == set(random.Random(3).sample(table, 10))
    assert evaluation.calibration_photos(run_in(tmp_path / "off", calibration_photos=0), Run(config).photos) == {}
    assert len(evaluation.calibration_photos(run_in(tmp_path / "all"), Run(config).photos)["val"]) == 12  # as many as there are
    for file in Run(config).photos.glob("val-*"):
        file.unlink()
    assert evaluation.calibration_photos(config, Run(config).photos) == {}


# Units of work


def write_groups(folder: Path, sizes: dict[str, int]) -> list[Path]:
    """Files with so many rows, three rows a group."""
    files, number = [], 0
    for name, count in sizes.items():
        rows = [{"id": f"p{number + at}"} for at in range(count)]
        number += count
        pq.write_table(pa.Table.from_pylist(rows, schema=IDS), folder / name, row_group_size=3)
        files.append(folder / name)
    return files


@pytest.mark.parametrize("size", [1, 2, 5])
def test_shards_have_every_photo_that_is_wanted_once_and_in_order(tmp_path: Path, size: int) -> None:
    files = write_groups(tmp_path, {"a.parquet": 7, "b.parquet": 4})
    wanted = [f"p{number}" for number in (0, 1, 2, 4, 6, 7, 10)]
    shards = list(evaluation.plan_photos(files, wanted, size))
    assert [row["id"] for shard in shards for batch in shard.batches(["id"]) for row in batch] == wanted
    assert [shard.number for shard in shards] == list(range(len(shards)))
    assert all(shard.rows == sum(map(len, shard.batches())) <= size for shard in shards)
    assert list(evaluation.plan_photos(files, [], size)) == []
    others = evaluation.plan_photos(files, ["p1", "p2", *wanted[2:]], size)
    assert next(others).fingerprint() != shards[0].fingerprint()


# Scores


class Colours(PhotoModel):
    """A model that sees a photo's colour; it counts its loads and calls, and fails at one of them."""

    def __init__(self, config: Config, fails_at: int | None = None) -> None:
        super().__init__("owner/model", GAZETTEER, config)
        self.loads, self.scored, self.asked, self.fails_at = 0, 0, 0, fails_at

    def load(self) -> "Colours":
        self.loads += 1
        return self

    def _see(self, images: Sequence[Image.Image]) -> list[tuple[int, ...]]:
        if self.fails_at is not None and self.scored + self.asked >= self.fails_at:
            raise ConnectionError("the worker was killed")
        return [image.getpixel((0, 0)) for image in images]  # type: ignore[misc]

    def address_scores(self, images: Sequence[Image.Image]) -> np.ndarray:
        assert self.loaded is self
        scores = np.array(self._see(images), dtype=float)
        self.scored += len(images)
        return scores

    def answer(self, images: Sequence[Image.Image], texts: Sequence[str], most: int, temperature: float) -> list[str]:
        answers = [f"{colour} {text}" for colour, text in zip(self._see(images), texts, strict=True)]
        self.asked += len(texts)
        return answers


def run_here(
    step: str, jobs: list[ShardJob], workers: int, resources: dict[str, float], unit: str
) -> list[list[dict[str, Any]]]:
    """What `run_on_actors` does, in this process."""
    for job in jobs:
        remove_stale_files(job.folder, len(job.shards))
    return [[process_shard(shard, job.folder, job.work) for shard in job.shards] for job in jobs]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "run_on_actors", run_here)


@pytest.mark.usefixtures("without_ray")
def test_one_load_makes_all_tables_of_a_system_and_each_once(tmp_path: Path) -> None:
    config = run_in(tmp_path, workers=2, batch_size=4, max_new_tokens=8)
    task, model = task_of(config, out=tmp_path / "out"), Colours(config)
    held_out, ours = {"val": ["val1", "val4"], "train": ["train7"]}, {"test": ["test0", "test2", "test8"]}

    def run(ids: dict[str, list[str]], asks: bool = False, redo: bool = False) -> bool:
        outputs = evaluation.scores_of(task, "A system", model, ids)
        outputs += [evaluation.answers_of(task, "A system", model)] if asks else []
        return evaluation.run_model("test", config, task.data, outputs, redo)

    assert run(held_out)
    assert run(held_out | ours, asks=True)
    questions = sum(len(row["rounds"]) for row in tables.iter_rows(task.data, "test"))
    assert (model.loads, model.scored, model.asked) == (1, 6, questions)
    assert not run(ours, asks=True)
    assert not run(held_out)
    assert (model.scored, model.asked) == (6, questions)
    colours = {"Mill Street": [255.0, 0.0, 0.0], "Oak Avenue": [0.0, 0.0, 255.0], "Lake Road": [0.0, 128.0, 0.0]}
    for split, ids in (held_out | ours).items():
        rows = list(task.scores("A system", [split]).rows(split))
        assert [row["id"] for row in rows] == ids
        assert all(row["scores"] == colours[row["street"]] for row in rows)
    answers = list(task.answers("A system"))
    assert [row["id"] for row in answers] == [photo for photo in task.ids for _ in range(questions // 9)]
    order = [(task.ids.index(row["id"]), row["level"], row["kind"], row["question"]) for row in answers]
    assert order == sorted(order)
    with pytest.raises(InputError, match=r"photos: 3 -> 2"):
        run({"test": ["test0", "test2"]})
    assert run(ours, redo=True)
    assert model.scored == 9
    with pytest.raises(InputError, match="addresses can't be scored without their names"):
        evaluation.scores_of(task_of(config, gazetteer=Gazetteer([])), "A", model, ours)


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("after", [0, 5, 12, 40])
def test_a_pass_that_was_killed_is_taken_up_and_ends_as_if_nothing_had_been(tmp_path: Path, after: int) -> None:
    config = run_in(tmp_path, workers=9, batch_size=4, max_new_tokens=8)  # shards of one photo

    def run(out: Path, model: Colours) -> EvaluationTask:
        task = task_of(config, out=out)
        ids = {"test": task.ids, "val": ["val1", "val4"]}
        outputs = [*evaluation.scores_of(task, "A", model, ids), evaluation.answers_of(task, "A", model)]
        evaluation.run_model("test", config, task.data, outputs)
        return task

    whole, killed, resumed = Colours(config), Colours(config, fails_at=after), Colours(config)
    undisturbed = run(tmp_path / "undisturbed", whole)
    with pytest.raises(ConnectionError):
        run(tmp_path / "killed", killed)
    assert not (tmp_path / "killed" / "answers" / "a").exists()
    task = run(tmp_path / "killed", resumed)
    for split in ("test", "val"):
        assert list(task.scores("A", [split]).rows(split)) == list(undisturbed.scores("A", [split]).rows(split))
    assert list(task.answers("A")) == list(undisturbed.answers("A"))
    assert killed.scored + resumed.scored == whole.scored
    assert whole.asked <= killed.asked + resumed.asked < whole.asked + 9  # the photo that was interrupted is asked about again


def test_the_tables_of_a_pass_share_one_model_in_a_worker_and_none_travels(tmp_path: Path) -> None:
    config = run_in(tmp_path)
    task, model = task_of(config), Colours(config)
    assert model.loaded is model
    outputs = [*evaluation.scores_of(task, "A", model, {"test": ["test0"]}), evaluation.answers_of(task, "A", model)]
    scoring, asking = pickle.loads(pickle.dumps([output.work for output in outputs]))
    assert scoring.function.args[0] is asking.function.args[0]
    assert "loaded" not in vars(scoring.function.args[0])


def test_scores_depend_on_the_model_and_on_the_images_that_it_sees(tmp_path: Path) -> None:
    config, model = run_in(tmp_path), tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text("{}")
    other = tmp_path / "images"
    for split in ("test", "val"):
        rows = list(tables.iter_rows(Run(config).photos, split))
        tables.write_table(other, split, rows[:-1], tables.PHOTOS)
    seeded = config.model_copy(update={"seed": 4})
    half = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})

    def settings_of(task: EvaluationTask) -> dict[str, Any]:
        (output,) = evaluation.scores_of(task, "A", PhotoModel(str(model), GAZETTEER, task.config), {"test": ["test1"]})
        return output.settings

    fewer = task_of(config, gazetteer=Gazetteer(GAZETTEER.addresses[:2]))
    tasks = [task_of(config), task_of(config, images=other), task_of(seeded), task_of(half), fewer]
    settings = [settings_of(task) for task in tasks]
    (model / "config.json").write_text("{1}")
    settings.append(settings_of(task_of(config)))
    assert len({json.dumps(each) for each in settings}) == 6


def test_a_calibration_is_fitted_on_held_out_photos_and_kept_beside_the_model(tmp_path: Path) -> None:
    config = run_in(tmp_path, target_precision=0.7)
    task = task_of(config)
    (tmp_path / "m").mkdir()
    rows = {"val": scores_of(config, "val", 0.4), "train": scores_of(config, "train", 0.0, seed=1)}
    evaluation.write_scores(task, "A", rows, {})
    result = evaluation.calibrate(task, "A", str(tmp_path / "m"))
    expected = calibration.fit_calibration(
        scored_photos(rows["val"], GAZETTEER), 0.7, scored_photos(rows["train"], GAZETTEER).scores
    )
    assert result == expected
    assert Calibration.load(tmp_path / "m").temperature == result.temperature
    assert result.measured["photos"] == 12


def test_answers_by_scores_are_those_of_the_calibrated_model(tmp_path: Path) -> None:
    config, model = run_in(tmp_path, answers="likelihood"), tmp_path / "m"
    model.mkdir()
    Calibration(2.0, own_prior=[5.0, 0.0, 0.0]).save(model)
    ids = ["test2", "test5"]
    rows = [{**row, "scores": [4.0, 1.0, 0.0]} for row in scores_of(config, "test") if row["id"] in ids]
    judge, city = evaluation.make_judge(Run(config).photos, "test")
    task = task_of(config, ids=ids, judge=judge, gazetteer=city)
    evaluation.write_scores(task, "A", {"test": rows}, {})
    assert evaluation.likelihood_answers(task, "A", str(model))
    judged = list(task.answers("A"))
    photos = {row["id"]: row for row in tables.iter_rows(task.data, "test")}
    assert [row["id"] for row in judged] == [name for name in ids for _ in questions_of(photos[name])]
    for row in judged:
        if row["level"] == "street" and row["kind"] == "generation":
            assert row["answer"] == GAZETTEER.addresses[1].street  # less the prior it is the second
            assert row["correct"] == (photos[row["id"]]["street"] == row["answer"])
    assert not evaluation.likelihood_answers(task, "A", str(model))
    Calibration(2.0, own_prior=[5.0, 0.0, 1.0]).save(model)
    with pytest.raises(InputError, match="calibration: "):
        evaluation.likelihood_answers(task, "A", str(model))


def test_a_report_ends_with_the_path_of_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, model = run_in(tmp_path, answers="likelihood", bootstrap=100), tmp_path / "m"
    model.mkdir()
    task = task_of(config)
    scores = evaluation.write_scores(task, "A", {"test": scores_of(config, "test")}, {})
    evaluation.likelihood_answers(task, "A", str(model))
    (system,) = evaluation.report(task, ["A"], report.ReportSources(), None, (scores, GAZETTEER))
    assert system["metrics"]["A_ds"]["n"] == 9
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [str(task.out / name) for name in ("metrics.json", "report.html", "result.png")]
    assert Image.open(task.out / "result.png").width == 1500


@pytest.mark.parametrize(
    "change",
    [
        {"evaluate": {"max_new_tokens": 7}}, {"evaluate": {"temperature": 0.5}}, {"evaluate": {"max_photos": 4}},
        {"evaluate": {"answers": "constrained"}}, {"seed": 4}, {"model": {"dtype": "bfloat16"}},
    ],
)  # fmt: skip
def test_other_settings_of_an_answer_are_another_answer(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, kinds = run_in(tmp_path), run_questions.KINDS
    task = task_of(config)
    judged = judge_answers([{**questions_of(photo("test", 0))[0], "answer": "Mill Street"}], task.judge)

    def outputs_of(task: EvaluationTask, model: str = "owner/model", kinds: Sequence[str] = kinds) -> list[ModelOutput]:
        return [evaluation.answers_of(task, "A", PhotoModel(model, GAZETTEER, task.config), kinds)]

    def write(step: str, jobs: list[ShardJob], *_: object) -> None:
        for job in jobs:
            tables.write_table(job.folder, "test", judged, tables.ANSWERS)

    monkeypatch.setattr(evaluation, "run_on_actors", write)
    assert evaluation.run_model("test", config, task.data, outputs_of(task))
    workers = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"workers": 7, "batch_size": 3})})
    assert not evaluation.run_model("test", workers, task.data, outputs_of(task_of(workers)))
    changed = config.model_dump()
    for section, value in change.items():
        changed[section] = {**changed[section], **value} if isinstance(value, dict) else value
    other = outputs_of(task_of(validate(changed, "t")))
    for outputs in (other, outputs_of(task, model="owner/other"), outputs_of(task, kinds=["judgment"])):
        with pytest.raises(InputError, match="made with other settings"):
            evaluation.run_model("test", config, task.data, outputs)
    assert evaluation.run_model("test", config, task.data, other, redo=True)
    rows = list(tables.iter_rows(task.data, "test"))
    tables.write_table(task.data, "test", rows[:-1], tables.PHOTOS)
    with pytest.raises(InputError, match="made with other settings \\(data: "):
        evaluation.run_model("test", config, task.data, outputs_of(task))


def test_files_are_told_apart_by_name_and_content_whatever_their_order(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / name for name in "abc")
    assert evaluation.files_digest([a, b]) == evaluation.files_digest([b, a])
    assert len({evaluation.files_digest(files) for files in ([a], [c], [a, b], [b], [a, c])}) == 5
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text("{}")
    before = evaluation.model_digest(str(model))
    (model / "calibration.json").write_text("{}")
    (model / "README.md").write_text("metrics")
    assert evaluation.model_digest(str(model)) == before  # what evaluate itself writes there
    for name in ("model.safetensors", "chat_template.jinja", "config.json"):
        (model / name).write_text(f"other {name}")
        before, last = evaluation.model_digest(str(model)), before
        assert before != last
