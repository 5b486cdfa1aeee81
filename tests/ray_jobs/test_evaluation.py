"""The steps of an evaluation and what each depends on, without Ray"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from addressvlm import InputError
from addressvlm.answers import calibration
from addressvlm.answers.calibration import Calibration
from addressvlm.config import Config, validate
from addressvlm.evaluation import report, run_questions
from addressvlm.evaluation.likelihood import scored_photos
from addressvlm.evaluation.parsing import Judge
from addressvlm.evaluation.run_questions import questions_of
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run, mark_done
from ray_jobs import evaluate, evaluation, graft
from ray_jobs.evaluation import Answers, EvaluationTask
from tests.support.baselines import GAZETTEER, photo

IDS = pa.schema([("id", pa.string())])
Row = dict[str, Any]


def run_in(folder: Path, **evaluate: Any) -> Config:
    """A run of coloured photos: 30 to learn from, 12 held out, 9 to test on."""
    config = validate({"name": "r", "storage": str(folder), "seed": 3, "evaluate": evaluate}, "test")
    for split, count in (("train", 30), ("val", 12), ("test", 9)):
        tables.write_table(Run(config).photos, split, [photo(split, number) for number in range(count)], tables.PHOTOS)
    GAZETTEER.save(Run(config).gazetteer)
    return config


def task_of(config: Config, **changes: Any) -> EvaluationTask:
    run = Run(config)
    values = {"config": config, "data": run.photos, "split": "test", "out": run.folder, "ids": [f"test{n}" for n in range(9)]}
    return EvaluationTask(**{**values, "gazetteer": GAZETTEER, "judge": Judge([], []), **changes})


def scores_of(config: Config, split: str, wrong: float = 0.2, seed: int = 0) -> list[Row]:
    """Scores that are mostly right."""
    rng, rows = np.random.default_rng(seed), []
    for row in tables.iter_rows(Run(config).photos, split, ["id", "place", "lat", "lon", "street", "district"]):
        at = GAZETTEER.addresses.index(Address(row["street"], row["district"]))
        result = rng.normal(size=3) + (np.arange(3) == (at + (rng.random() < wrong)) % 3)
        rows.append({**row, "scores": result.tolist()})
    return rows


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


class Echo(evaluation.ModelWorker):
    """A worker that gives back what it reads, two photos at a time."""

    columns, schema = ("id",), IDS

    def work(self, photos: list[Row]) -> Any:
        return (photos[start : start + 2] for start in range(0, len(photos), 2))


@pytest.mark.parametrize("photos", [1, 2, 5])
def test_units_have_every_photo_that_is_asked_about_once_and_in_order(tmp_path: Path, photos: int) -> None:
    files = write_groups(tmp_path, {"a.parquet": 7, "b.parquet": 4})
    target = [f"p{number}" for number in (0, 1, 2, 4, 6, 7, 10)]
    units = list(evaluation.work_units(files, set(target), photos))
    assert [name for unit in units for name in unit["ids"].to_pylist()[0]] == target
    assert all(len(unit["ids"].to_pylist()[0]) <= photos for unit in units)
    worker = Echo("m", Gazetteer([]), Config())
    for given_together in (units, [pa.concat_tables(units)]):
        result = [batch for unit in given_together for batch in worker(unit)]
        assert [row["id"] for batch in result for row in batch.to_pylist()] == target
        assert all(len(batch) <= 2 for batch in result)


def test_only_questions_of_the_kinds_about_the_photos_are_counted(tmp_path: Path) -> None:
    config = run_in(tmp_path)
    files, ids = tables.table_files(Run(config).photos, "test"), {"test1", "test4"}
    rounds = [r["kind"] for row in tables.iter_rows(Run(config).photos, "test") if row["id"] in ids for r in row["rounds"]]
    assert evaluation.count_questions(files, ids, ["generation", "choice", "judgment"]) == len(rounds)
    assert evaluation.count_questions(files, ids, ["judgment"]) == rounds.count("judgment") < len(rounds)


# Scores


def test_scores_of_a_split_are_made_once_whoever_wants_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, scored = run_in(tmp_path), []
    task = task_of(config, out=tmp_path / "out")

    def score_photos(_: EvaluationTask, name: str, model: str, ids: dict[str, list[str]], worker: None) -> list[Row]:
        scored.append({split: list(of_split) for split, of_split in ids.items()})
        rows = {row["id"]: row for split in ("train", "val", "test") for row in scores_of(config, split)}
        return [rows[photo] for of_split in ids.values() for photo in reversed(of_split)]  # as they come

    def score(ids: dict[str, list[str]], redo: bool = False, **settings: str) -> dict[str, list[str]]:
        scores = evaluation.score(task, "A system", "m", ids, {"model": "a1", **settings}, redo=redo)
        expected = {row["id"]: row["scores"] for split in scores for row in scores_of(config, split)}
        assert all(row["scores"] == expected[row["id"]] for rows in scores.values() for row in rows)
        return {split: [row["id"] for row in rows] for split, rows in scores.items()}

    monkeypatch.setattr(evaluation, "score_photos", score_photos)
    held, ours = {"val": ["val1", "val4"], "train": ["train7"]}, {"test": ["test0", "test2", "test8"]}
    of_held, of_ours = {"val": "v1", "train": "t1"}, {"test": "x1"}  # what tells the photos of a split apart
    assert score(held, **of_held) == held
    assert score(held | ours, **of_held, **of_ours) == held | ours
    assert score(ours, **of_ours) == ours
    assert score(held, **of_held) == held
    assert scored == [held, ours]
    for changes in ({"model": "a2"}, {"test": "x2"}):
        with pytest.raises(InputError, match="made with other settings"):
            score(ours, **of_ours | changes)
    with pytest.raises(InputError, match="made with other settings"):
        score(held | ours, **of_held | {"val": "v2"}, **of_ours)
    with pytest.raises(InputError, match=r"photos\.test: 3 -> 2"):
        score({"test": ["test0", "test2"]}, **of_ours)
    assert score(ours, redo=True) == ours
    assert len(scored) == 3
    with pytest.raises(InputError, match="addresses can't be scored without their names"):
        evaluation.score(task_of(config, out=tmp_path / "new", gazetteer=Gazetteer([])), "A", "m", ours, {"model": "a1"})


def test_scores_of_images_are_read_from_the_files_of_their_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, units = run_in(tmp_path), []
    monkeypatch.setattr(evaluation, "run_workers", lambda config, work, *more: units.extend(work) or [])
    evaluation.score_photos(task_of(config), "A", "m", {"test": ["test0", "test2"], "val": ["val1"]})
    files = {Path(file).name for unit in units for file in unit["file"].to_pylist()}
    assert files == {"test-00000.parquet", "val-00000.parquet"}
    assert sorted(photo for unit in units for ids in unit["ids"].to_pylist() for photo in ids) == ["test0", "test2", "val1"]


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
    tasks = [task_of(config), task_of(config, images=other), task_of(seeded), task_of(half)]
    settings = [evaluation._score_settings(task, str(model), ["test", "val"]) for task in tasks]
    assert all(each.keys() == {"test", "val", "model", "dtype", "seed"} for each in settings)
    (model / "config.json").write_text("{1}")
    settings.append(evaluation._score_settings(task_of(config), str(model), ["test", "val"]))
    assert len({json.dumps(each) for each in settings}) == 5


def test_a_calibration_is_fitted_on_held_out_photos_and_kept_beside_the_model(tmp_path: Path) -> None:
    config = run_in(tmp_path, target_precision=0.7)
    (tmp_path / "m").mkdir()
    rows = {"val": scores_of(config, "val", 0.4), "train": scores_of(config, "train", 0.0, seed=1)}
    result = evaluation.calibrate(task_of(config), "A", str(tmp_path / "m"), rows)
    expected = calibration.fit_calibration(
        scored_photos(rows["val"], GAZETTEER), 0.7, scored_photos(rows["train"], GAZETTEER).scores
    )
    assert result == expected
    assert Calibration.load(tmp_path / "m").temperature == result.temperature
    assert result.measured["photos"] == 12


def test_modes_are_compared_on_photos_that_have_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, calls = run_in(tmp_path), []
    monkeypatch.setattr(evaluate, "compare_decoding", lambda *arguments: calls.append(arguments) or {"x": 1})
    Calibration(2.5).save(tmp_path)
    answers = [{"id": name} for name in ("test1", "other", "test0")]
    task = task_of(config, out=tmp_path)
    result = evaluate.compare_modes(task, "A", str(tmp_path), scores_of(config, "test"), {"free": answers})
    assert result == json.loads((tmp_path / "modes.json").read_text()) == {"system": "A", "x": 1}
    assert calls[0][3] == {"free": [{"id": "test1"}, {"id": "test0"}]}
    assert (calls[0][2].temperature, calls[0][4][1]) == (2.5, 3)


@pytest.mark.parametrize(
    ("calibrate", "answers", "priors", "main", "other"),
    [
        (True, "free", False, {"val", "train", "test"}, {"val", "train"}),
        (True, "likelihood", False, {"val", "train", "test"}, {"val", "train", "test"}),
        (False, "free", False, set(), set()),
        (False, "free", True, {"test"}, set()),
        (False, "likelihood", False, {"test"}, {"test"}),
    ],
)
def test_a_system_is_scored_on_the_splits_that_are_needed(
    calibrate: bool,
    answers: str,
    priors: bool,
    main: set[str],
    other: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = run_in(tmp_path, answers=answers)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    GAZETTEER.save(tmp_path / "m" / "gazetteer.geojson")
    scored: dict[str, dict[str, list[str]]] = {}
    calibrated: dict[str, set[str]] = {}
    requests: list[tuple[str, list[str], set[str]]] = []

    def score(task: EvaluationTask, name: str, model: str, ids: dict[str, list[str]], redo: bool) -> dict[str, list[str]]:
        scored[name] = dict(ids)
        return scored[name]

    def ask(
        task: EvaluationTask, name: str, model: str, scores: dict[str, list[str]], kinds: Any = None, redo: bool = False
    ) -> Answers:
        requests.append((name, kinds, set(scores)))
        return Answers(name, [{"id": name}])

    monkeypatch.setattr(evaluation, "score", score)
    monkeypatch.setattr(evaluation, "calibrate", lambda task, name, model, scores: calibrated.update({name: set(scores)}))
    monkeypatch.setattr(evaluation, "ask", ask)
    monkeypatch.setattr(evaluate, "compare_modes", lambda task, name, model, scores, answers: {"of": name, **answers})
    monkeypatch.setattr(evaluation, "report", lambda task, answers, sources, decoding: [answers, decoding])
    task, models = task_of(config, ids=["test3"]), {"AddressVLM": str(tmp_path / "m"), "B": str(tmp_path / "m")}
    judged, decoding = evaluate.evaluate(task, models, report.ReportSources(), calibrate, priors, False)
    assert [set(scored.get(name, {})) for name in models] == [main, other]
    assert all(ids.get("test", ["test3"]) == ["test3"] for ids in scored.values())
    assert set(calibrated) == (set(models) if calibrate else set())
    assert judged == {name: [{"id": name}] for name in models}
    assert requests[:2] == [("AddressVLM", None, main), ("B", None, other)]
    assert requests[2:] == ([("AddressVLM constrained", ["generation"], set())] if priors else [])
    modes = {} if answers == "likelihood" else {"free": judged["AddressVLM"]}
    modes |= {"constrained": [{"id": "AddressVLM constrained"}]} if priors else {}
    assert decoding == ({"of": "AddressVLM", **modes} if "test" in main else None)


def test_answers_by_scores_are_those_of_the_calibrated_model(tmp_path: Path) -> None:
    config, model = run_in(tmp_path, answers="likelihood"), tmp_path / "m"
    model.mkdir()
    Calibration(2.0, own_prior=[5.0, 0.0, 0.0]).save(model)
    rows = [{**row, "scores": [4.0, 1.0, 0.0]} for row in scores_of(config, "test")]  # less the prior it is the second
    ids = ["test5", "test2"]
    scores = {"test": [row for row in rows if row["id"] in ids]}
    judge, city = evaluation.make_judge(Run(config).photos, "test")
    task = task_of(config, ids=ids, judge=judge, gazetteer=city)
    answers = evaluation.ask(task, "A", str(model), scores)
    assert answers.settings is not None
    assert not any("correct" in row for row in answers.rows)
    judged = evaluation.judge(task, answers)
    photos = {row["id"]: row for row in tables.iter_rows(task.data, "test")}
    assert [row["id"] for row in judged] == [name for name in ids for _ in questions_of(photos[name])]
    for row in judged:
        if row["level"] == "street" and row["kind"] == "generation":
            assert row["answer"] == GAZETTEER.addresses[1].street
            assert row["correct"] == (photos[row["id"]]["street"] == row["answer"])
    assert evaluation.ask(task, "A", str(model), scores) == Answers("A", judged)  # as they were stored
    assert evaluation.judge(task, Answers("A", judged)) == judged
    Calibration(2.0, own_prior=[5.0, 0.0, 1.0]).save(model)
    with pytest.raises(InputError, match="calibration: "):
        evaluation.ask(task, "A", str(model), scores)


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
    answer = {**questions_of(photo("test", 0))[0], "answer": "Mill Street"}
    monkeypatch.setattr(evaluation, "answer_questions", lambda *_: [answer])
    task = task_of(config)
    evaluation.judge(task, evaluation.ask(task, "A", "owner/model", {}))
    workers = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"workers": 7, "batch_size": 3})})
    assert evaluation.ask(task_of(workers), "A", "owner/model", {}).settings is None
    changed = config.model_dump()
    for section, value in change.items():
        changed[section] = {**changed[section], **value} if isinstance(value, dict) else value
    others = [(task_of(validate(changed, "t")), "owner/model", kinds)]
    others += [(task, "owner/other", kinds), (task, "owner/model", ["judgment"])]
    for other, model, of_kinds in others:
        with pytest.raises(InputError, match="made with other settings"):
            evaluation.ask(other, "A", model, {}, of_kinds)
    assert evaluation.ask(others[0][0], "A", "owner/model", {}, redo=True).settings is not None
    rows = list(tables.iter_rows(task.data, "test"))
    tables.write_table(task.data, "test", rows[:-1], tables.PHOTOS)
    with pytest.raises(InputError, match="made with other settings \\(data: "):
        evaluation.ask(task, "A", "owner/model", {})


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


# Flags


def test_models_are_named_by_flags_or_are_systems_of_the_run(tmp_path: Path) -> None:
    assert evaluate.named_models(["a=x/merged", "runs/b/models/c/merged"]) == {
        "a": "x/merged",
        "c": "runs/b/models/c/merged",
    }
    with pytest.raises(InputError, match="two models are called 'A'"):
        evaluate.named_models(["a=x", "A=y"])
    config = run_in(tmp_path)
    config.train.systems = validate(
        {"train": {"systems": [{"name": "zero-shot"}, {"name": "S", "stages": ["localization"]}]}}, "t"
    ).train.systems
    assert evaluate.run_models(config, ["zero-shot"]) == {"zero-shot": config.model.base}
    with pytest.raises(InputError, match="'S' is not trained yet"):
        evaluate.run_models(config)
    merged = Run(config).model_dir("S") / "merged"
    merged.mkdir(parents=True)
    (merged / "config.json").write_text("{}")
    assert evaluate.run_models(config) == {"zero-shot": config.model.base, "S": str(merged)}


def test_where_photos_are_and_where_their_result_goes(tmp_path: Path) -> None:
    config = run_in(tmp_path)
    run = Run(config)
    assert evaluate.photos_folder(config, str(run.folder), None, {}, tmp_path, False) == run.photos
    assert evaluate.photos_folder(config, str(run.photos), None, {}, tmp_path, False) == run.photos
    with pytest.raises(InputError, match="does not exist"):
        evaluate.photos_folder(config, str(tmp_path / "nothing"), None, {}, tmp_path, False)
    results = run.folder / "evaluations"
    assert evaluate.output_folder(run, "some/photos.csv") == results / "photos"
    assert evaluate.output_folder(run, "other/run/photos") == evaluate.output_folder(run, "other/run") == results / "run"
    assert graft.graft_photos(config, run, "test") is None
    config.evaluate.images = "grafts"
    assert evaluate.output_folder(Run(config), None) == results / "grafts"


def test_a_manifest_is_prepared_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    config, result = run_in(tmp_path), []
    manifest = tmp_path / "new.csv"
    manifest.write_text("file\n")
    os.utime(manifest, (1000, 1000))

    def prepare_test(config: Config, folder: Path, gazetteer: Gazetteer | None) -> None:
        result.append((config.city.manifest, config.city.photos, gazetteer and gazetteer.addresses))
        folder.mkdir(parents=True, exist_ok=True)
        mark_done(folder, evaluate.prepare.settings(config))
        os.utime(folder / "_done.json", (2000, 2000))

    monkeypatch.setattr(evaluate.prepare, "prepare_test", prepare_test)
    (tmp_path / "m").mkdir()
    GAZETTEER.save(tmp_path / "m" / "gazetteer.geojson")
    models = {"hub": "owner/model", "mine": str(tmp_path / "m")}

    def dataset(redo: bool = False) -> Path:
        return evaluate.photos_folder(config, str(manifest), "here", models, tmp_path / "out", redo)

    assert dataset() == dataset() == tmp_path / "out" / "photos"
    assert result == [(str(manifest), "here", GAZETTEER.addresses)]
    os.utime(manifest, (3000, 3000))
    dataset()
    assert len(result) == 2
    os.utime(manifest, (1000, 1000))
    dataset(redo=True)
    assert len(result) == 3
