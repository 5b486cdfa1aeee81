"""The pipeline of many cities with steps that only leave marks, without Ray"""

import json
import threading
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from addressvlm import InputError
from addressvlm.config import Config, validate
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run, is_done, mark_done
from ray_jobs import cities, city_estimate, evaluate, graft, label, prepare, train
from ray_jobs.cities import Pipeline, Slots, label_costs, mean_metrics, status_table, write_results
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
            target.mkdir(parents=True, exist_ok=True)
            if step == "label":
                self.budgets[config.name] = (config.labels.budget_tokens, config.labels.budget_usd)
                run = {"tokens": self.cost[0], "usd": self.cost[1]}
                (target / "labels.json").write_text(json.dumps({"run": run}))
            mark_done(target, settings(config))

        return run_step

    def train(self, config: Config, systems: list[Any], redo: bool = False) -> None:
        for system in train.untrained_systems(config, systems, redo):
            self.begin("train", config)
            Run(config).model_dir(system.name).mkdir(parents=True, exist_ok=True)
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


def pipeline(folder: Path, evaluating: bool = True, redo: bool = False, only: Any = None, **tree: Any) -> Pipeline:
    systems = [{"name": "AddressVLM", "stages": ["alignment", "localization"]}, {"name": "photos", "stages": ["localization"]}]
    settings = {"systems": systems[: 2 if only else 1]}
    world = world_of(folder, tree.pop("cities", TABLE), name="earth", train=settings, **tree)
    return Pipeline(world, only, evaluating, redo)


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
    out = capsys.readouterr().out
    assert [f"{name}: already done" in out for name in ("graz", "linz", "wien")] == [True] * 3
    assert out.count("cities: 3 cities, ") == 2


def test_only_what_is_missing_or_asked_for_again_is_done(steps: Steps, tmp_path: Path) -> None:
    def done(**given: Any) -> list[str]:
        steps.done.clear()
        pipeline(tmp_path, **given).run(["graz"])
        return [step for step, _ in steps.done]

    assert done(evaluating=False) == ["prepare", "graft", "label", "train"]
    assert done() == ["evaluate"]
    assert done() == []
    assert done(evaluate={"max_photos": 7}) == ["evaluate"]
    assert done(evaluate={"max_photos": 7}, redo=True) == list(cities.STEPS)


def test_a_system_that_learns_from_photos_alone_needs_no_labels(steps: Steps, tmp_path: Path) -> None:
    pipeline(tmp_path, only=["photos"]).run(["graz"])
    assert steps.done == [("prepare", "graz"), ("train", "graz"), ("evaluate", "graz")]


def test_a_training_that_can_t_be_is_refused_before_anything_is_done(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(workers: Any) -> None:
        raise InputError("it needs 9 GPUs: add nodes.")

    monkeypatch.setattr(cities, "require_possible", refuse)
    with pytest.raises(InputError, match=r"all cities failed \(graz: it needs 9 GPUs: add nodes\)"):
        pipeline(tmp_path).run(["graz"])
    assert not steps.done


def arguments(**given: Any) -> Namespace:
    plain = {"city": None, "status": False, "dry_run": False, "system": None, "photos": None, "evaluate": True, "redo": False}
    return Namespace(**{**plain, **given})


def test_one_city_may_be_named(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = pipeline(tmp_path).world
    with pytest.raises(InputError, match="--city rome: the table of cities has graz, linz, wien"):
        cities.run(world, arguments(city="rome"))
    cities.run(world, arguments(city="linz", status=True))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["city", "linz", "done"]
    asked: list[Any] = []
    monkeypatch.setattr(city_estimate, "print_world_estimate", lambda *given: asked.append(given))
    cities.run(world, arguments(dry_run=True, system=["AddressVLM"], photos=40))
    cities.run(world, arguments(dry_run=True, city="wien"))
    assert asked == [(world, ["graz", "linz", "wien"], ["AddressVLM"], 40), (world, ["wien"], None, None)]
    monkeypatch.setattr(cities, "connect", lambda: None)
    cities.run(world, arguments(city="graz", evaluate=False))
    assert steps.done == [(step, "graz") for step in ("prepare", "graft", "label", "train")]


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
    assert lines["city"] == ["prepare", "graft", "label", "train", "evaluate"]
    assert " ".join(lines["done"]) == "3 of 3 2 of 3 2 of 3 2 of 3 2 of 3"
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


def test_labels_that_are_done_need_no_budget(steps: Steps, tmp_path: Path) -> None:
    prices = {"usd_per_million_in": 1.0, "usd_per_million_out": 1.0}
    labels = {"labeler": "openai", "budget_usd": 4.5, **prices}
    steps.cost = (125, 1.5)
    steps.failing[("train", "graz")] = InputError("no room: add nodes.")
    with pytest.raises(InputError, match="graz: no room"):
        pipeline(tmp_path, labels=labels).run(["graz", "linz", "wien"])
    assert sorted(steps.budgets.values()) == [(None, 1.5), (None, 3.0), (None, 4.5)]
    steps.failing.clear()
    steps.done.clear()
    pipeline(tmp_path, labels={**labels, "budget_usd": 3.0}).run(["graz", "linz", "wien"])  # all spent by the other two
    assert steps.done == [("train", "graz"), ("evaluate", "graz")]


def test_what_labels_have_cost_is_known_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = world_of(tmp_path, TABLE).cities["graz"]
    assert label_costs(config) == (0, 0.0)
    monkeypatch.setattr(cities, "ResponseCache", lambda folder: SimpleNamespace(tokens=7, usd=0.5))
    assert label_costs(config) == (7, 0.5)
    Run(config).alignment.mkdir(parents=True)
    (Run(config).alignment / "labels.json").write_text('{"run": {"tokens": 9, "usd": 0.75}}')
    assert label_costs(config) == (9, 0.75)


def test_a_slot_is_free_again_after_an_error() -> None:
    slots = Slots(lambda: 1)

    def fail() -> None:
        with slots.one():
            assert slots.used == 1
            raise KeyError

    for _ in range(3):
        with pytest.raises(KeyError):
            fail()
    assert slots.used == 0


def test_cities_begin_in_the_order_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cities, "THREADS", 1)
    monkeypatch.setattr(cities.time, "sleep", lambda seconds: None)
    begun: list[str] = []
    cities._in_threads(begun.append, ["c", "a", "b", "d"])
    assert begun == ["c", "a", "b", "d"]


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


def test_a_joint_model_is_calibrated_on_all_cities_and_evaluated_on_each(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = pipeline(tmp_path, world={"adapter": "joint"})
    asked: list[Any] = []
    monkeypatch.setattr(evaluate, "run_models", lambda config, only: {"AddressVLM": f"{config.name}/model"})
    monkeypatch.setattr(
        cities.evaluation, "open_task", lambda config, data, split, out, models: (config.name, data, split, out, list(models))
    )
    monkeypatch.setattr(cities, "calibrate_jointly", lambda *given: asked.append(given))
    monkeypatch.setattr(evaluate, "evaluate", lambda *given, **options: asked.append((*given, options)))
    one.run(["graz", "wien"])
    runs = {name: Run(one.world.cities[name]) for name in ("graz", "wien")}
    tasks = {name: (name, run.photos, "test", run.folder, ["joint/model"]) for name, run in runs.items()}
    (joint, *calibrated), *evaluated = asked
    assert joint.folder.name == "joint"
    assert calibrated == [tasks, {"AddressVLM": "joint/model"}, False]
    assert [given[0] for given in evaluated] == list(tasks.values())
    for (_, models, sources, options), run in zip(evaluated, runs.values(), strict=True):
        assert models == {"AddressVLM": "joint/model"}
        assert (sources.photos, sources.alignment, sources.rejects) == (run.photos, run.alignment, run.rejects)
        assert options == {"calibrate": False, "priors": False, "redo": False}


class Task:
    """Stands for what is asked about a city; its scores are named after it."""

    def __init__(self, name: str) -> None:
        self.config, self.data, self.gazetteer, self.image_table = (
            f"config of {name}",
            f"data of {name}",
            name,
            f"table of {name}",
        )
        self.name = name

    def scores(self, system: str, splits: list[str]) -> Any:
        return SimpleNamespace(rows=lambda split: [f"{system} {split} {self.name} {number}" for number in range(2)])


def test_a_joint_calibration_is_of_the_scores_of_all_cities_that_have_photos_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in ("known", "other"):
        (tmp_path / model).mkdir()
    (tmp_path / "known" / "gazetteer.geojson").touch()
    ran, written, calibrated = [], [], []
    monkeypatch.setattr(
        cities.evaluation, "calibration_photos", lambda config, data: {} if data.endswith("linz") else {"val": [data]}
    )
    monkeypatch.setattr(cities, "PhotoModel", lambda model, gazetteer, config: (gazetteer, config))
    monkeypatch.setattr(cities.evaluation, "scores_of", lambda task, system, model, ids: [(task.name, system, model, ids)])
    monkeypatch.setattr(
        cities.evaluation,
        "run_model",
        lambda step, config, table, outputs, redo: ran.append((step, config, table, outputs, redo)),
    )
    monkeypatch.setattr(
        cities.evaluation, "write_scores",
        lambda task, system, rows, settings: written.append((task, system, {s: list(r) for s, r in rows.items()}, settings)),
    )  # fmt: skip
    monkeypatch.setattr(cities.evaluation, "model_digest", lambda model: "digest")
    monkeypatch.setattr(cities.evaluation, "calibrate", lambda *given: calibrated.append(given))
    monkeypatch.setattr(cities, "replace", lambda task, out: (task.name, out))
    run = SimpleNamespace(folder=tmp_path / "joint")
    tasks = {name: Task(name) for name in ("graz", "linz", "wien")}
    models = {"ours": str(tmp_path / "known"), "base": str(tmp_path / "other")}
    copy_context().run(cities.calibrate_jointly, run, tasks, models, True)  # it names the city of the lines that are printed
    assert ran == [
        ("evaluate: ours", f"config of {name}", f"table of {name}",
         [(name, "ours", (name, f"config of {name}"), {"val": [f"data of {name}"]})], True)
        for name in ("graz", "wien")
    ]  # fmt: skip
    rows = {split: [f"ours {split} {name} {n}" for name in ("graz", "wien") for n in range(2)] for split in ("val", "train")}
    assert written == [(("graz", tmp_path / "joint"), "ours", rows, {"cities": list(tasks), "model": "digest"})]
    assert calibrated == [(("graz", tmp_path / "joint"), "ours", models["ours"])]


def test_means_of_cities_and_of_photos() -> None:
    means = mean_metrics([({"A": {"value": 0.2}}, 30), ({"A": {"value": 0.6}}, 10), ({"A": {"value": None}}, 5), ({}, 5)])
    zero = mean_metrics([({"A": {"value": 0.0}}, 30), ({"A": {"value": 0.6}}, 10)])
    assert (zero["macro"]["A"], zero["weighted"]["A"]) == pytest.approx((0.3, 0.15))
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
    page = (world.folder / "report.html").read_text()
    assert ('<a href="graz/report.html">graz</a>' in page, "linz/report.html" in page) == (True, False)
    write_results(world, {"linz": "a <b> & c"})
    assert "failed: a &lt;b&gt; &amp; c" in (world.folder / "report.html").read_text()
    assert lines[-2].split()[:4] == ["mean", "of", "cities", "25.0"]


def test_a_step_that_was_begun_is_told_from_one_that_is_done(steps: Steps, tmp_path: Path) -> None:
    world = pipeline(tmp_path).world
    run = Run(world.cities["graz"])
    assert set(cities.city_steps(world, world.cities["graz"]).values()) == {""}
    mark_done_in(run.photos)
    run.grafts.with_name("grafts.partial").mkdir()
    run.training_dir("AddressVLM").mkdir(parents=True)
    expected = {"prepare": "done", "graft": "begun", "label": "", "train": "begun", "evaluate": ""}
    assert cities.city_steps(world, world.cities["graz"]) == expected
    mark_done_in(run.model_dir("AddressVLM"))
    assert cities.city_steps(world, world.cities["graz"])["train"] == "done"
    assert set(cities.city_steps(world, world.cities["linz"]).values()) == {""}
    joint = pipeline(tmp_path, world={"adapter": "joint"}).world
    assert cities.city_steps(joint, joint.cities["graz"])["train"] == ""
    mark_done_in(Run(joint.joint).model_dir("AddressVLM"))
    assert {cities.city_steps(joint, city)["train"] for city in joint.cities.values()} == {"done"}


def mark_done_in(folder: Path) -> None:
    folder.mkdir(parents=True)
    mark_done(folder, {})


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
    for city, text in (("graz", "half "), ("linz", "one\ntw"), ("graz", "line\n"), ("linz", "o\n")):
        token = cities._city.set(city)
        out.write(text)
        cities._city.reset(token)
    assert capsys.readouterr().out == "linz: one\ngraz: half line\nlinz: two\n"
