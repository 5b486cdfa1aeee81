"""The pipeline of many cities with steps that only leave marks, without Ray"""

import json
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from addressvlm import InputError
from addressvlm.config import Config, validate
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run, is_done, mark_done
from ray_jobs import cities, evaluate, graft, label, prepare, train
from ray_jobs.cities import Pipeline, Slots, mean_metrics, status_table, write_results
from tests.config.test_world import world_of

TABLE = [{"name": "graz", "manifest": "m.csv"}, {"name": "linz", "manifest": "m.csv"}, {"name": "wien", "manifest": "m.csv"}]


class Steps:
    """Stand-ins for the steps: what was done, how many at a time, and which fail."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.failing: dict[tuple[str, str], Exception] = {}
        self.budgets: dict[str, tuple[int | None, float | None]] = {}
        self.cost = (0, 0.0)
        self.lock = threading.Lock()

    def begin(self, step: str, config: Config) -> None:
        with self.lock:
            if error := self.failing.get((step, config.name)):
                raise error
            self.done.append((step, config.name))

    def table(self, step: str, settings: Callable[[Config], Any], folder: str) -> Callable[..., None]:
        def run_step(config: Config, redo: bool = False) -> None:
            target = getattr(Run(config), folder)
            if is_done(target, settings(config), redo):
                return
            self.begin(step, config)
            target.mkdir(parents=True)
            if step == "label":
                self.budgets[config.name] = (config.labels.budget_tokens, config.labels.budget_usd)
                run = {"tokens": self.cost[0], "usd": self.cost[1]}
                (target / "labels.json").write_text(json.dumps({"run": run}))
            mark_done(target, settings(config))

        return run_step

    def train(self, config: Config, systems: list[Any], redo: bool = False) -> None:
        for system in train.untrained_systems(config, systems, redo):
            self.begin("train", config)
            Run(config).model_dir(system.name).mkdir(parents=True)
            mark_done(Run(config).model_dir(system.name), train.settings(config, system))

    def evaluate(self, config: Config, redo: bool, only: Any = None) -> None:
        self.begin("evaluate", config)
        write_metrics(config, 0.5, 10)


def write_metrics(config: Config, value: float, n: int) -> None:
    cell = {"value": value, "low": None, "high": None, "n": n}
    Run(config).folder.mkdir(parents=True, exist_ok=True)
    Run(config).metrics.write_text(json.dumps({"systems": [{"name": "AddressVLM", "metrics": {"A_ds": cell, "A": cell}}]}))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Steps:
    steps = Steps()
    monkeypatch.chdir(tmp_path)
    Path("m.csv").touch()
    monkeypatch.setattr(prepare, "run_step", steps.table("prepare", prepare.settings, "photos"))
    monkeypatch.setattr(graft, "run_step", steps.table("graft", graft.settings, "grafts"))
    monkeypatch.setattr(label, "run_step", steps.table("label", label.settings, "alignment"))
    monkeypatch.setattr(train, "train_systems", steps.train)
    monkeypatch.setattr(train, "resolve_model", lambda base: base)
    monkeypatch.setattr(evaluate, "run_step", steps.evaluate)
    monkeypatch.setattr(cities, "room_for", lambda workers: 1)
    monkeypatch.setattr(cities, "require_possible", lambda workers: None)
    return steps


def pipeline(folder: Path, evaluating: bool = True, **tree: Any) -> Pipeline:
    systems = [{"name": "AddressVLM", "stages": ["alignment", "localization"]}]
    world = world_of(folder, tree.pop("cities", TABLE), name="earth", train={"systems": systems}, **tree)
    return Pipeline(world, None, evaluating, False)


def test_every_city_goes_through_all_steps_once(steps: Steps, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline(tmp_path).run(list("graz linz wien".split()))
    assert Counter(steps.done) == Counter({(step, row["name"]): 1 for step in cities.STEPS for row in TABLE})
    result = json.loads((tmp_path / "s" / "earth" / "cities.json").read_text())
    assert result["macro"]["A_ds"] == 0.5
    assert (tmp_path / "s" / "earth" / "report.html").read_text().count('/report.html">') == 3
    before, steps.done = list(steps.done), []
    pipeline(tmp_path).run(["graz", "linz", "wien"])
    assert not steps.done
    assert before
    assert "graz: already done" in capsys.readouterr().out


def test_a_city_that_fails_is_named_and_the_others_go_on(
    steps: Steps, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.failing[("graft", "linz")] = InputError("no streets: give some.")
    with pytest.raises(InputError, match=r"1 of 3 cities failed \(linz: no streets: give some\): fix what each says and rerun"):
        pipeline(tmp_path).run(["graz", "linz", "wien"])
    assert [name for step, name in steps.done if step == "evaluate"] in (["graz", "wien"], ["wien", "graz"])
    assert "failed: no streets: give some." in capsys.readouterr().out
    world = pipeline(tmp_path).world
    lines = {line.split()[0]: line.split()[1:] for line in status_table(world, list(world.cities)).splitlines()}
    assert lines["linz"] == ["done", "no", "streets:", "give", "some."]
    assert lines["wien"] == ["done"] * 5
    steps.failing.clear()
    steps.done.clear()
    pipeline(tmp_path).run(["graz", "linz", "wien"])
    assert sorted(steps.done) == sorted((step, "linz") for step in ("graft", "label", "train", "evaluate"))


def test_a_defect_in_one_city_does_not_stop_the_others(steps: Steps, tmp_path: Path) -> None:
    steps.failing[("train", "graz")] = KeyError("x")
    with pytest.raises(InputError, match=r"1 of 3 cities failed \(graz: KeyError: 'x'\)"):
        pipeline(tmp_path).run(["graz", "linz", "wien"])
    assert ("evaluate", "wien") in steps.done


def test_all_cities_failing_is_told(steps: Steps, tmp_path: Path) -> None:
    Path("m.csv").unlink()
    with pytest.raises(InputError, match=r"all cities failed \(graz, linz, wien; .*there is no manifest m.csv"):
        pipeline(tmp_path).run(["graz", "linz", "wien"])
    assert not steps.done


def test_one_budget_holds_for_the_labels_of_all(steps: Steps, tmp_path: Path) -> None:
    prices = {"usd_per_million_in": 1.0, "usd_per_million_out": 1.0}
    labels = {"labeler": "openai", "budget_tokens": 250, "budget_usd": 9.0, **prices}
    steps.cost = (125, 1.5)
    with pytest.raises(
        InputError, match=r"1 of 3 cities failed .*label budget exhausted by the other cities \(250 tokens, 3 d"
    ):
        pipeline(tmp_path, labels=labels).run(["graz", "linz", "wien"])
    assert sorted(steps.budgets.values()) == [(125, 7.5), (250, 9.0)]
    steps.done.clear()
    pipeline(tmp_path, labels={**labels, "budget_tokens": 300}).run(["graz", "linz", "wien"])
    assert len([step for step, _ in steps.done if step == "label"]) == 1


def test_labels_of_both_kinds_count_for_the_budget(tmp_path: Path) -> None:
    stages = {"alignment": {"data": "alignment"}, "reasons": {"data": "reasoning"}}
    systems = [{"name": "both", "stages": list(stages)}]
    config = validate({"storage": str(tmp_path), "train": {"stages": stages, "systems": systems}}, "test")
    for folder, tokens in ((Run(config).alignment, 10), (Run(config).reasoning, 25)):
        folder.mkdir(parents=True)
        (folder / "labels.json").write_text(json.dumps({"run": {"tokens": tokens, "usd": 0.5}}))
    assert cities.label_costs(config) == (25, 0.5)


def test_cities_wait_for_what_they_share() -> None:
    slots, inside, most = Slots(lambda: 2), [0], [0]
    lock, all_in = threading.Lock(), threading.Barrier(2)

    def work() -> None:
        with slots.one():
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            all_in.wait(30)
            with lock:
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [2]
    assert slots.used == 0


def test_a_joint_model_waits_for_the_data_of_all(steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps.failing[("prepare", "linz")] = InputError("no photos: add some.")
    with pytest.raises(InputError, match="linz: no photos"):
        pipeline(tmp_path, evaluating=False, world={"adapter": "joint"}).run(["graz", "linz", "wien"])
    assert steps.done[-1] == ("train", "joint")
    assert [name for step, name in steps.done if step == "train"] == ["joint"]
    made = json.loads((Run(pipeline(tmp_path).world.joint).model_dir("AddressVLM") / "_done.json").read_text())
    assert made["train"]["cities"] == {"graz": 1.0, "wien": 1.0}


def test_means_of_cities_and_of_photos() -> None:
    means = mean_metrics([({"A": {"value": 0.2}}, 30), ({"A": {"value": 0.6}}, 10), ({"A": {"value": None}}, 5), ({}, 5)])
    assert means["macro"]["A"] == pytest.approx(0.4)
    assert means["weighted"]["A"] == pytest.approx(0.3)
    assert means["macro"]["A_ds"] is None


def test_the_table_says_what_is_missing(steps: Steps, tmp_path: Path) -> None:
    world = pipeline(tmp_path).world
    world.folder.mkdir(parents=True)
    write_metrics(world.cities["graz"], 0.25, 40)
    lines = write_results(world, {"linz": "no photos."}).splitlines()
    assert lines[1].split() == ["graz", "0", "25.0", "–", "–", "25.0", "prepare", "is", "not", "done"]
    assert lines[2].endswith("failed: no photos.")
    assert lines[-2].split()[:4] == ["mean", "of", "cities", "25.0"]


@pytest.mark.parametrize(("limit", "counts"), [(0, ["30", "10", "35.0"]), (20, ["20", "10", "40.0"])])
def test_a_city_weighs_as_many_photos_as_were_asked_about(steps: Steps, tmp_path: Path, limit: int, counts: list[str]) -> None:
    settings = {"evaluate": {"max_photos": limit}} if limit else {}
    world = pipeline(tmp_path, cities=TABLE[:2], **settings).world
    schema = tables.pa.schema([("id", tables.pa.string())])
    for name, value, photos in (("graz", 0.2, 30), ("linz", 0.8, 10)):
        write_metrics(world.cities[name], value, photos)
        tables.write_table(Run(world.cities[name]).photos, "test", [{"id": str(n)} for n in range(photos)], schema)
    lines = [line.split() for line in write_results(world, {}).splitlines()]
    assert [lines[1][1], lines[2][1], lines[-1][3]] == counts


def test_lines_say_of_which_city_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    out = cities._CityPrefix(cities.sys.stdout)
    token = cities._city.set("graz")
    print("label: 1/2", file=out)
    cities._city.reset(token)
    print("a\n\nb", file=out)
    assert capsys.readouterr().out == "graz: label: 1/2\na\n\nb\n"
