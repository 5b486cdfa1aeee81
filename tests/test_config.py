"""Settings: where they come from, and what is said when they are wrong."""

from pathlib import Path

import pytest

from addressvlm import InputError
from addressvlm.config import PRESETS, load
from addressvlm.run import Run, claim, is_done, slug, storage, writing


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.yaml")))
def test_presets_load(preset: str) -> None:
    assert load(preset, environment={}).name


def test_command_line_beats_environment_beats_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("name: a\ntrain: {workers: 5, checkpoint_every: 7}\nseed: 3\n")
    environment = {"ADDRESSVLM_TRAIN__WORKERS": "6", "ADDRESSVLM_SEED": "4", "ADDRESSVLM_HOME": "x", "PATH": "y"}
    config = load(file, ["train.workers=8", "city.manifest=null"], environment)
    assert (config.train.workers, config.seed, config.train.checkpoint_every, config.city.manifest) == (8, 4, 7, None)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: {worker: 2}", "unknown key 'train.worker', did you mean 'workers'"),
        ("trian: {}", "unknown key 'trian', did you mean 'train'"),
        ("train: {workers: two}", "'train.workers' is 'two'"),
        ("tiles: {delta: 1.2}", "'tiles.delta' is 1.2"),
        ("city: {split: {train: 0.5, val: 0.1, test: 0.1}}", "train [+] val [+] test must be 1"),
        ("train: {systems: [{name: x, stages: [nothing]}]}", "names the stage 'nothing'"),
        ("train: {systems: [{name: x, equal_steps_to: y}]}", "equals 'y'"),
        ("train: {systems: [{name: x, equal_steps_to: x}]}", "equals 'x', which has equal_steps_to itself"),
        ("a: [", "is not YAML"),
        ("- a", "must hold `key: value` lines"),
    ],
)
def test_a_wrong_file_is_one_sentence_with_its_name(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=sentence) as caught:
        load(file, environment={})
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_extends_another_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("name: below\nseed: 3\ntrain: {workers: 5, checkpoint_every: 7}\n")
    (tmp_path / "above.yaml").write_text("extends: below.yaml\nname: above\ntrain: {workers: 6}\n")
    config = load(tmp_path / "above.yaml", ["train.max_failures=0"], {})
    assert (config.name, config.seed, config.train.workers, config.train.checkpoint_every) == ("above", 3, 6, 7)
    (tmp_path / "preset.yaml").write_text("extends: demo\nname: mine\n")
    assert load(tmp_path / "preset.yaml", environment={}).city.toy == "alderbrook"


def test_files_are_laid_over_each_other_at_any_depth_but_stages_as_a_whole(tmp_path: Path) -> None:
    stages = "{stages: {a: {data: photos}}, systems: [{name: x, stages: [a]}]}"
    (tmp_path / "below.yaml").write_text(f"model: {{llm: {{rank: 8, alpha: 9}}}}\ntrain: {stages}\n")
    above = "extends: below.yaml\nmodel: {llm: {rank: 4}}\ntrain: {stages: {b: {data: photos}}, systems: []}\n"
    (tmp_path / "above.yaml").write_text(above)
    config = load(tmp_path / "above.yaml", environment={})
    assert (config.model.llm.rank, config.model.llm.alpha) == (4, 9)
    assert list(config.train.stages) == ["b"]
    assert config.train.systems == []


def test_one_key_of_a_part_leaves_its_others() -> None:
    config = load("demo", ["model.vision={dropout: 0.2}", "model.adapter={dropout: 0.1}", "model.llm={alpha: 8}"], {})
    assert (config.model.vision.rank, config.model.vision.alpha, config.model.vision.dropout) == (64, 16.0, 0.2)
    assert config.model.adapter.full
    assert (config.model.llm.rank, config.model.llm.alpha) == (128, 8.0)


def test_what_cant_be_extended_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(InputError, match=r"a\.yaml extends itself"):
        load(tmp_path / "a.yaml", environment={})
    (tmp_path / "c.yaml").write_text("extends: nothing\n")
    with pytest.raises(InputError, match="no configuration 'nothing'"):
        load(tmp_path / "c.yaml", environment={})


def test_missing_configuration_and_broken_set() -> None:
    with pytest.raises(InputError, match=r"no configuration 'nothing'.*presets demo"):
        load("nothing", environment={})
    with pytest.raises(InputError, match="write it as key=value"):
        load("demo", ["train.workers"], environment={})


def test_slug() -> None:
    assert slug("stage 2 only, equal steps") == "stage-2-only-equal-steps"


def test_storage_outlives_a_packaged_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage("runs") == tmp_path / "runs"
    copy = tmp_path / "working_dir_files" / "pkg"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage("runs") == tmp_path / "home" / "addressvlm" / "runs"
    assert storage("/shared/runs") == Path("/shared/runs")


def test_a_step_is_done_only_with_the_same_settings(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    assert not is_done(folder, {"a": 1})
    with writing(folder, {"a": 1, "b": {"c": 2}}) as partial:
        (partial / "table").write_text("x")
        assert not folder.exists()
    assert is_done(folder, {"a": 1, "b": {"c": 2}})
    assert (folder / "table").is_file()
    with pytest.raises(InputError, match=r"b.c: 2 -> 3.*--redo"):
        is_done(folder, {"a": 1, "b": {"c": 3}})
    assert not is_done(folder, {"a": 2}, redo=True)


def test_a_failed_step_leaves_the_last_good_one(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    with writing(folder, {"a": 1}) as partial:
        (partial / "table").write_text("good")

    def fail() -> None:
        with writing(folder, {"a": 2}) as partial:
            (partial / "table").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (folder / "table").read_text() == "good"


def test_a_place_that_cant_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be written"), writing(tmp_path / "file" / "step", {}):
        pass
    with pytest.raises(InputError, match="can't be written"):
        claim(tmp_path / "file" / "training", {})


def test_run_keeps_everything_below_its_name(tmp_path: Path) -> None:
    run = Run(load("demo", [f"storage={tmp_path}", "name=x"], {}))
    paths = [value for value in vars(run).values() if isinstance(value, Path)]
    assert all(path.is_relative_to(tmp_path / "x") for path in paths)
    assert run.model("stage 2 only").name == "stage-2-only"
