"""The recipe of an evaluation: what of each system is scored and asked, and what the flags mean, without Ray"""

import json
from pathlib import Path
from typing import Any

import pytest

from addressvlm import InputError
from addressvlm.answers.calibration import Calibration
from addressvlm.config import Config, validate
from addressvlm.evaluation import report
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.storage.run_dir import Run, mark_done
from ray_jobs import evaluate, evaluation, graft
from ray_jobs.evaluation import EvaluationTask, PhotoModel
from tests.support.baselines import GAZETTEER, run_in, scores_of, task_of


def test_modes_are_compared_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, calls = run_in(tmp_path), []

    def compare_decoding(rows: Any, *arguments: Any) -> dict[str, int]:
        calls.append((list(rows), *arguments))
        return {"x": 1}

    monkeypatch.setattr(evaluate, "compare_decoding", compare_decoding)
    Calibration(2.5).save(tmp_path)
    task = task_of(config, out=tmp_path)
    evaluation.write_scores(task, "A", {"test": scores_of(config, "test")}, {})
    result = evaluate.compare_modes(task, "A", str(tmp_path), {"free": []})
    assert result == json.loads((tmp_path / "modes.json").read_text()) == {"system": "A", "x": 1}
    assert calls[0][0] == scores_of(config, "test")
    assert (calls[0][2].temperature, calls[0][3], calls[0][4][1]) == (2.5, {"free": []}, 3)


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
    calibrated: list[str] = []
    asked: list[tuple[str, str, Any]] = []

    def record_scores(task: EvaluationTask, name: str, model: PhotoModel, ids: dict[str, list[str]]) -> list[str]:
        scored[name] = dict(ids)
        return [name]

    def record_answers(task: EvaluationTask, name: str, model: PhotoModel, kinds: Any = None) -> str:
        asked.append((name, task.config.evaluate.answers, kinds))
        return name

    monkeypatch.setattr(evaluation, "scores_of", record_scores)
    monkeypatch.setattr(evaluation, "answers_of", record_answers)
    monkeypatch.setattr(evaluation, "run_model", lambda *_: True)
    monkeypatch.setattr(evaluation, "calibrate", lambda task, name, model: calibrated.append(name))
    monkeypatch.setattr(
        evaluation, "likelihood_answers", lambda task, name, model, redo: not asked.append((name, "likelihood", None))
    )
    monkeypatch.setattr(evaluate, "compare_modes", lambda task, name, model, answers: {"of": name, **answers})
    monkeypatch.setattr(evaluation, "report", lambda task, names, sources, decoding, pictured: [list(names), decoding])
    task, models = task_of(config, ids=["test3"]), {"AddressVLM": str(tmp_path / "m"), "B": str(tmp_path / "m")}
    reported, decoding = evaluate.evaluate(task, models, report.ReportSources(), calibrate, priors, False)
    assert [set(scored[name]) for name in models] == [main, other]
    assert all(ids.get("test", ["test3"]) == ["test3"] for ids in scored.values())
    assert set(calibrated) == (set(models) if calibrate else set())
    assert reported == list(models)
    constrained = [("AddressVLM constrained", "constrained", ["generation"])] if priors else []
    assert asked == [("AddressVLM", answers, None), *constrained, ("B", answers, None)]
    modes: Any = {} if answers == "likelihood" else {"free": task.answers("AddressVLM")}
    modes |= {"constrained": task.answers("AddressVLM constrained")} if priors else {}
    assert decoding == ({"of": "AddressVLM", **modes} if "test" in main else None)


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
