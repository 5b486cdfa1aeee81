"""What evaluate and compare ask, of whom, and what is kept, without Ray"""

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
from addressvlm.evaluation import report
from addressvlm.evaluation.likelihood import scored_photos
from addressvlm.evaluation.parsing import Judge
from addressvlm.evaluation.run_questions import questions_of
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run, mark_done
from ray_jobs import evaluate, evaluation, resolve_args
from ray_jobs.evaluation import EvaluationTask
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
    return EvaluationTask(
        **{"systems": {}, "data": run.photos, "split": "test", "out": run.folder, "sources": report.ReportSources(), **changes}
    )


def scores_of(config: Config, split: str, wrong: float = 0.2, seed: int = 0) -> list[Row]:
    """Scores that are mostly right."""
    rng, rows = np.random.default_rng(seed), []
    for row in tables.iter_rows(Run(config).photos, split, ["id", "place", "lat", "lon", "street", "district"]):
        at = GAZETTEER.addresses.index(Address(row["street"], row["district"]))
        made = rng.normal(size=3) + (np.arange(3) == (at + (rng.random() < wrong)) % 3)
        rows.append({**row, "scores": made.tolist()})
    return rows


# Which photos


def test_photos_are_drawn_by_seed_and_asked_about_in_the_order_of_the_table(tmp_path: Path) -> None:
    config = run_in(tmp_path)

    def chosen(most: int | None, seed: int = 0) -> list[str]:
        need = config.evaluate.model_copy(update={"max_photos": most})
        return evaluation.choose_photos(config.model_copy(update={"evaluate": need, "seed": seed}), task_of(config))

    everyone = [f"test{number}" for number in range(9)]
    assert chosen(None) == chosen(9) == chosen(10) == everyone
    assert len(chosen(8)) == 8
    assert chosen(4) == sorted(random.Random(0).sample(everyone, 4))
    assert len({tuple(chosen(4, seed)) for seed in range(5)}) > 1
    tables.write_table(tmp_path / "none", "test", [{"id": "a"}], IDS)
    pq.write_table(IDS.empty_table(), tmp_path / "none" / "test-00000.parquet")
    with pytest.raises(InputError, match="has no photos in its split"):
        evaluation.choose_photos(config, task_of(config, data=tmp_path / "none"))


def test_the_judge_knows_the_names_of_all_cities_and_the_gazetteer_is_the_datas(tmp_path: Path) -> None:
    config = run_in(tmp_path)
    for name, street in (("a", "Rue du Port"), ("b", "Calle Mayor")):
        (tmp_path / name).mkdir()
        Gazetteer([Address(street, "Centre")], city=name).save(tmp_path / name / "gazetteer.geojson")
    judge, city = evaluation.make_judge(task_of(config), {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")})
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


# Pieces of work


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
    wanted = [f"p{number}" for number in (0, 1, 2, 4, 6, 7, 10)]
    units = list(evaluation.work_units(files, set(wanted), photos))
    assert [name for unit in units for name in unit["ids"].to_pylist()[0]] == wanted
    assert all(len(unit["ids"].to_pylist()[0]) <= photos for unit in units)
    worker = Echo("m", Gazetteer([]), Config())
    for given_together in (units, [pa.concat_tables(units)]):
        found = [batch for unit in given_together for batch in worker(unit)]
        assert [row["id"] for batch in found for row in batch.to_pylist()] == wanted
        assert all(len(batch) <= 2 for batch in found)


def test_only_questions_of_the_kinds_about_the_photos_are_counted(tmp_path: Path) -> None:
    config = run_in(tmp_path)
    files, ids = tables.table_files(Run(config).photos, "test"), {"test1", "test4"}
    rounds = [r["kind"] for row in tables.iter_rows(Run(config).photos, "test") if row["id"] in ids for r in row["rounds"]]
    assert evaluation._questions(files, ids, ["generation", "choice", "judgment"]) == len(rounds)
    assert evaluation._questions(files, ids, ["judgment"]) == rounds.count("judgment") < len(rounds)


# Scores


def test_scores_of_a_split_are_made_once_whoever_wants_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, asked = run_in(tmp_path), []
    data, out = Run(config).photos, tmp_path / "out"

    def fresh(_: Config, name: str, model: str, files: list[Path], ids: list[str], *more: Any) -> list[Row]:
        asked.append((sorted(file.name for file in files), list(ids)))
        rows = {row["id"]: row for split in ("train", "val", "test") for row in scores_of(config, split)}
        return [rows[name] for name in reversed(ids)]  # as they come

    def score(wanted: dict[str, list[str]], redo: bool = False, **made_from: str) -> dict[str, list[str]]:
        found = evaluation.score_addresses(
            config, out, "A system", "m", data, wanted, {"model": "a1", **made_from}, GAZETTEER, redo
        )
        expected = {row["id"]: row["scores"] for split in found for row in scores_of(config, split)}
        assert all(row["scores"] == expected[row["id"]] for rows in found.values() for row in rows)
        return {split: [row["id"] for row in rows] for split, rows in found.items()}

    monkeypatch.setattr(evaluation, "distributed_scores", fresh)
    held, ours = {"val": ["val1", "val4"], "train": ["train7"]}, {"test": ["test0", "test2", "test8"]}
    of_held, of_ours = {"val": "v1", "train": "t1"}, {"test": "x1"}  # what tells the photos of a split apart
    assert score(held, **of_held) == held
    assert score(held | ours, **of_held, **of_ours) == held | ours
    assert score(ours, **of_ours) == ours
    assert score(held, **of_held) == held
    assert [ids for _, ids in asked] == [["val1", "val4", "train7"], ["test0", "test2", "test8"]]
    assert asked[1][0] == ["test-00000.parquet"]
    for changes in ({"model": "a2"}, {"test": "x2"}):
        with pytest.raises(InputError, match="made with other settings"):
            score(ours, **of_ours | changes)
    with pytest.raises(InputError, match=r"photos\.test: 3 -> 2"):
        score({"test": ["test0", "test2"]}, **of_ours)
    assert score(ours, redo=True) == ours
    assert len(asked) == 3
    with pytest.raises(InputError, match="addresses can't be scored without their names"):
        evaluation.score_addresses(config, tmp_path / "new", "A", "m", data, ours, {}, Gazetteer([]), False)


def test_a_calibration_is_fitted_on_held_out_photos_and_kept_beside_the_model(tmp_path: Path) -> None:
    config = run_in(tmp_path, precision=0.7)
    (tmp_path / "m").mkdir()
    rows = {"val": scores_of(config, "val", 0.4), "train": scores_of(config, "train", 0.0, seed=1)}
    found = evaluation.fit_and_save_calibration(config, "A", str(tmp_path / "m"), rows, GAZETTEER)
    expected = calibration.fit_calibration(
        scored_photos(rows["val"], GAZETTEER), 0.7, scored_photos(rows["train"], GAZETTEER).scores
    )
    assert found == expected
    assert Calibration.load(tmp_path / "m").temperature == found.temperature
    assert found.measured["photos"] == 12


def test_modes_are_compared_on_photos_that_have_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = run_in(tmp_path), []
    monkeypatch.setattr(evaluation.modes, "compare", lambda *given: seen.append(given) or {"x": 1})
    Calibration(2.5).save(tmp_path)
    answers = [{"id": name} for name in ("test1", "other", "test0")]
    found = evaluation.compare_decoding_modes(
        config, tmp_path, "A", str(tmp_path), scores_of(config, "test"), {"free": answers}, GAZETTEER
    )
    assert found == json.loads((tmp_path / "modes.json").read_text()) == {"system": "A", "x": 1}
    assert seen[0][3] == {"free": [{"id": "test1"}, {"id": "test0"}]}
    assert (seen[0][2].temperature, seen[0][4].seed) == (2.5, 3)


@pytest.mark.parametrize(
    ("own", "answers", "priors", "main", "other"),
    [
        (True, "free", False, {"val", "train", "test"}, {"val", "train"}),
        (True, "scored", False, {"val", "train", "test"}, {"val", "train", "test"}),
        (False, "free", False, set(), set()),
        (False, "free", True, {"test"}, set()),
        (False, "scored", False, {"test"}, {"test"}),
    ],
)
def test_a_system_is_scored_on_the_splits_that_are_needed(
    own: bool, answers: str, priors: bool, main: set[str], other: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_in(tmp_path, answers=answers)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    GAZETTEER.save(tmp_path / "m" / "gazetteer.geojson")
    calibrated: list[set[str]] = []
    monkeypatch.setattr(evaluation, "score_addresses", lambda *given: dict(given[5]))
    monkeypatch.setattr(
        evaluation, "fit_and_save_calibration", lambda config, name, model, rows, city: calibrated.append(set(rows))
    )
    task = task_of(config, own=own, priors=priors)
    for name, expected in (("A", main), ("B", other)):
        found = evaluate._scores(config, task, name, str(tmp_path / "m"), ["test3"], "A", GAZETTEER, False)
        assert set(found) == expected
        assert found.get("test", ["test3"]) == ["test3"]
    assert len(calibrated) == 2 * own


def test_answers_by_scores_are_those_of_the_calibrated_model(tmp_path: Path) -> None:
    config, model = run_in(tmp_path, answers="likelihood"), tmp_path / "m"
    model.mkdir()
    Calibration(2.0, own_prior=[5.0, 0.0, 0.0]).save(model)
    rows = [{**row, "scores": [4.0, 1.0, 0.0]} for row in scores_of(config, "test")]  # less the prior it is the second
    ids = ["test5", "test2"]
    given_rows = {"test": [row for row in rows if row["id"] in ids]}
    judge, city = evaluation.make_judge(task_of(config), {})
    task = task_of(config, images=None)
    assert evaluation.answer_questions(config, task, "A", str(model), ids, judge, city, given_rows, False)
    found = evaluation.read_answers(task, "A")
    photos = {row["id"]: row for row in tables.iter_rows(task.data, "test")}
    assert [row["id"] for row in found] == [name for name in ids for _ in questions_of(photos[name])]
    for row in found:
        if row["level"] == "street" and row["kind"] == "generation":
            assert row["answer"] == GAZETTEER.addresses[1].street
            assert row["correct"] == (photos[row["id"]]["street"] == row["answer"])
    assert not evaluation.answer_questions(config, task, "A", str(model), ids, judge, city, given_rows, False)
    Calibration(2.0, own_prior=[5.0, 0.0, 1.0]).save(model)
    with pytest.raises(InputError, match="calibration: "):
        evaluation.answer_questions(config, task, "A", str(model), ids, judge, city, given_rows, False)


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
    config = run_in(tmp_path)
    monkeypatch.setattr(evaluation, "distributed_answers", lambda *_: [])
    judge, task = Judge([], []), task_of(config)
    assert evaluation.answer_questions(config, task, "A", "owner/model", [], judge, GAZETTEER, {}, False)
    workers = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"workers": 7, "batch_size": 3})})
    assert not evaluation.answer_questions(workers, task, "A", "owner/model", [], judge, GAZETTEER, {}, False)
    changed = config.model_dump()
    for section, value in change.items():
        changed[section] = {**changed[section], **value} if isinstance(value, dict) else value
    others = [(validate(changed, "t"), task, "owner/model", evaluation.asking.KINDS)]
    others += [(config, task, "owner/other", evaluation.asking.KINDS), (config, task, "owner/model", ["judgment"])]
    for settings, what, model, kinds in others:
        with pytest.raises(InputError, match="made with other settings"):
            evaluation.answer_questions(settings, what, "A", model, [], judge, GAZETTEER, {}, False, kinds)
    rows = list(tables.iter_rows(task.data, "test"))
    tables.write_table(task.data, "test", rows[:-1], tables.PHOTOS)
    with pytest.raises(InputError, match="made with other settings \\(data: "):
        evaluation.answer_questions(config, task, "A", "owner/model", [], judge, GAZETTEER, {}, False)


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


# What flags mean


def test_models_are_named_by_flags_or_are_systems_of_the_run(tmp_path: Path) -> None:
    assert resolve_args.named_models(["a=x/merged", "runs/b/models/c/merged"]) == {
        "a": "x/merged",
        "c": "runs/b/models/c/merged",
    }
    with pytest.raises(InputError, match="two models are called 'A'"):
        resolve_args.named_models(["a=x", "A=y"])
    config = run_in(tmp_path)
    config.train.systems = validate(
        {"train": {"systems": [{"name": "zero-shot"}, {"name": "S", "stages": ["localization"]}]}}, "t"
    ).train.systems
    assert resolve_args.systems_of(config, Run(config), ["zero-shot"]) == {"zero-shot": config.model.base}
    with pytest.raises(InputError, match="'S' is not trained yet"):
        resolve_args.systems_of(config, Run(config))
    merged = Run(config).model_dir("S") / "merged"
    merged.mkdir(parents=True)
    (merged / "config.json").write_text("{}")
    assert resolve_args.systems_of(config, Run(config)) == {"zero-shot": config.model.base, "S": str(merged)}


def test_where_photos_are_and_where_their_result_goes(tmp_path: Path) -> None:
    config = run_in(tmp_path)
    run = Run(config)
    assert resolve_args.dataset(config, str(run.folder), None, {}, tmp_path, False) == run.photos
    assert resolve_args.dataset(config, str(run.photos), None, {}, tmp_path, False) == run.photos
    with pytest.raises(InputError, match="does not exist"):
        resolve_args.dataset(config, str(tmp_path / "nothing"), None, {}, tmp_path, False)
    results = run.folder / "evaluations"
    assert resolve_args.output_folder(run, "some/photos.csv") == results / "photos"
    assert (
        resolve_args.output_folder(run, "other/run/photos") == resolve_args.output_folder(run, "other/run") == results / "run"
    )
    assert resolve_args.shown_images(config, run, "test") is None
    config.evaluate.images = "grafts"
    assert resolve_args.output_folder(Run(config), None) == results / "grafts"


def test_a_manifest_is_prepared_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    config, made = run_in(tmp_path), []
    manifest = tmp_path / "new.csv"
    manifest.write_text("file\n")
    os.utime(manifest, (1000, 1000))

    def prepare_test(config: Config, folder: Path, gazetteer: Gazetteer | None) -> None:
        made.append((config.city.manifest, config.city.photos, gazetteer and gazetteer.addresses))
        folder.mkdir(parents=True, exist_ok=True)
        mark_done(folder, resolve_args.prepare.settings(config))
        os.utime(folder / "_done.json", (2000, 2000))

    monkeypatch.setattr(resolve_args.prepare, "prepare_test", prepare_test)
    (tmp_path / "m").mkdir()
    GAZETTEER.save(tmp_path / "m" / "gazetteer.geojson")
    models = {"hub": "owner/model", "mine": str(tmp_path / "m")}

    def dataset(redo: bool = False) -> Path:
        return resolve_args.dataset(config, str(manifest), "here", models, tmp_path / "out", redo)

    assert dataset() == dataset() == tmp_path / "out" / "photos"
    assert made == [(str(manifest), "here", GAZETTEER.addresses)]
    os.utime(manifest, (3000, 3000))
    dataset()
    assert len(made) == 2
    os.utime(manifest, (1000, 1000))
    dataset(redo=True)
    assert len(made) == 3
