"""Settings: where they come from, and the errors when they are wrong."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from addressvlm import InputError
from addressvlm.config import PRESETS, Config, load, provenance, validate
from addressvlm.config.city import GeocoderConfig
from addressvlm.config.compare import AddressClipConfig


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
        ("train: {systems: [{name: x, match_steps_of: y}]}", "equals 'y'"),
        ("train: {systems: [{name: x, match_steps_of: x}]}", "equals 'x', which has match_steps_of itself"),
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


def test_extends_merges_at_any_depth_but_replaces_stages(tmp_path: Path) -> None:
    stages = "{stages: {a: {data: photos}}, systems: [{name: x, stages: [a]}]}"
    (tmp_path / "below.yaml").write_text(f"model: {{llm: {{rank: 8, alpha: 9}}}}\ntrain: {stages}\n")
    above = "extends: below.yaml\nmodel: {llm: {rank: 4}}\ntrain: {stages: {b: {data: photos}}, systems: []}\n"
    (tmp_path / "above.yaml").write_text(above)
    config = load(tmp_path / "above.yaml", environment={})
    assert (config.model.llm.rank, config.model.llm.alpha) == (4, 9)
    assert list(config.train.stages) == ["b"]
    assert config.train.systems == []


def test_setting_one_key_of_a_part_keeps_its_other_defaults() -> None:
    config = load("demo", ["model.vision={dropout: 0.2}", "model.adapter={dropout: 0.1}", "model.llm={alpha: 8}"], {})
    assert (config.model.vision.rank, config.model.vision.alpha, config.model.vision.dropout) == (64, 16.0, 0.2)
    assert config.model.adapter.full
    assert (config.model.llm.rank, config.model.llm.alpha) == (128, 8.0)


def test_invalid_extends_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(InputError, match=r"a\.yaml extends itself"):
        load(tmp_path / "a.yaml", environment={})
    (tmp_path / "c.yaml").write_text("extends: nothing\n")
    with pytest.raises(InputError, match="no configuration 'nothing'"):
        load(tmp_path / "c.yaml", environment={})


def test_extends_replaces_cities_and_fills_empty_sections(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("train: {cities: {a: 1, b: 2}, workers: 3}\ncity: {geocoder: null}\n")
    (tmp_path / "above.yaml").write_text("extends: below.yaml\ntrain: {cities: {c: 1}}\n")
    config = load(tmp_path / "above.yaml", ["city.geocoder.share=0.5"], {})
    assert (config.train.cities, config.train.workers) == ({"c": 1}, 3)
    assert config.city.geocoder is not None
    assert config.city.geocoder.share == 0.5


def test_command_line_values_are_parsed_as_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\n")
    sets = ["labels.words=[5, 9]", "labels.extra_body={top_p: 0.5}", "name=a=b", "labels.base_url=null", "seed=1", "seed=2"]
    config = load(tmp_path / "a.yaml", sets, {})
    assert (config.labels.words, config.labels.extra_body, config.name, config.labels.base_url, config.seed) == (
        (5, 9), {"top_p": 0.5}, "a=b", None, 2,
    )  # fmt: skip
    environment = {"ADDRESSVLM_LABELS__MODEL": "x", "ADDRESSVLM_NAME": "from the environment"}
    config = load(tmp_path / "a.yaml", environment=environment)
    assert (config.labels.model, config.name) == ("x", "from the environment")
    with pytest.raises(InputError, match=r"labels\.words=\[5: the value is not YAML"):
        load(tmp_path / "a.yaml", ["labels.words=[5"], {})


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"city": {"answer": "sub_street"}}, "answer is sub_street, so set city.partition"),
        ({"compare": {"variants": [{"name": "x"}, {"name": "x"}]}}, "two systems are called 'x'"),
        ({"train": {"cities": {"a": 0}}}, "cities must have weights above 0"),
        ({"train": {"stages": {"s": {"data": "alignment", "augment": {"crop": 0.9}}}}}, r"augment\.crop is 0\.9"),
        ({"train": {"stages": {"s": {"data": "photos", "parts": []}}}}, "name at least one part"),
        ({"train": {"workers": 2, "min_workers": 3}}, "min_workers is 3, above workers, which is 2"),
        ({"labels": {"base_url": "http://me@host/v1"}}, "keys come from OPENAI_API_KEY alone"),
        ({"labels": {"labeler": "vllm", "tensor_parallel": 2, "gpus_per_worker": 1}}, "set gpus_per_worker to tensor_parallel"),
    ],
)
def test_settings_that_do_not_fit_together(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=rf"^here: .*{sentence}"):
        validate(tree, "here")


def test_limits_of_settings_that_fit_together() -> None:
    assert validate({"city": {"answer": "sub_street", "partition": {}}}, "x").city.partition is not None
    assert validate({"train": {"workers": 2, "min_workers": 2}}, "x").train.min_workers == 2
    assert validate(
        {
            "train": {
                "stages": {"alignment": {"data": "alignment"}, "localization": {"data": "photos", "augment": {"crop": 0.9}}}
            }
        },
        "x",
    )
    assert (
        validate({"labels": {"labeler": "vllm", "tensor_parallel": 2, "gpus_per_worker": 2}}, "x").labels.tensor_parallel == 2
    )


def test_defaults_are_those_of_the_papers() -> None:
    config = validate({}, "x")
    assert config.city.split.model_dump() == {"train": 0.7, "val": 0.2, "test": 0.1}  # paper 001, Sec. 3.3
    weights = AddressClipConfig(name="a", kind="addressclip").weights
    assert weights.model_dump() == {"address": 1.0, "caption": 0.2, "geography": 0.8}  # paper 002, Sec. 6.1
    assert (config.model.llm.rank, config.model.vision.rank, config.model.adapter.full) == (128, 64, True)
    assert [(s.name, s.stages, s.match_steps_of) for s in config.train.systems] == [
        ("zero-shot", [], None),
        ("stage 2 only", ["localization"], None),
        ("stage 2 only, equal steps", ["localization"], "AddressVLM"),
        ("AddressVLM", ["alignment", "localization"], None),
    ]
    assert (config.tiles.delta, config.tiles.covered) == (0.5, 0.5)
    assert {layout: config.tiles.model_copy(update={"layout": layout}).covered for layout in ("beside", "two")} == {
        "beside": 0.0, "two": 0.0,
    }  # fmt: skip


def test_a_run_stops_by_itself_where_much_is_bad_or_dear() -> None:
    config = validate({}, "x")
    assert (config.city.max_reject_share, config.city.max_megapixels) == (0.1, 100.0)
    assert (config.city.max_distance_m, config.city.split_buffer_m) == (40.0, 25.0)
    assert (config.city.geocoder, GeocoderConfig().per_second, config.tiles.per_second) == (None, 1.0, 4.0)


@pytest.mark.parametrize(("run", "train", "used"), [(3, None, 3), (3, 7, 7), (3, 0, 0)])
def test_training_has_the_seed_of_the_run_unless_it_has_its_own(run: int, train: int | None, used: int) -> None:
    assert validate({"seed": run, "train": {"seed": train}}, "x").training_seed == used


def test_missing_configuration_and_broken_set() -> None:
    with pytest.raises(InputError, match=r"no configuration 'nothing'.*presets demo"):
        load("nothing", environment={})
    with pytest.raises(InputError, match="write it as key=value"):
        load("demo", ["train.workers"], environment={})


@pytest.mark.parametrize(
    ("sets", "environment", "sentence"),
    [
        (["train.workers=two"], {}, "--set train.workers=two: 'train.workers' is 'two'"),
        ([], {"ADDRESSVLM_TRAIN__WORKERS": "two"}, "ADDRESSVLM_TRAIN__WORKERS=two: 'train.workers' is 'two'"),
        (["train.workers=2"], {"ADDRESSVLM_TRAIN__WORKERS": "two"}, ""),
        (["train.lr=1"], {}, "--set train.lr=1: unknown key 'train.lr', did you mean 'train.stages.<name>.learning_rate'?"),
        (["train.workers=0", "seed=x"], {}, "--set seed=x: 'seed' is 'x': .*; --set train.workers=0: 'train.workers' is 0"),
        (["train.min_workers=9", "train.mfu=0.3"], {}, "--set train.min_workers=9: 'train': min_workers is 9, above workers"),
        (["city.streeets=a"], {}, "--set city.streeets=a: unknown key 'city.streeets', did you mean 'streets'?"),
        (
            ["train.stages.localization.lr=1"],
            {},
            r"unknown key 'train\.stages\.localization\.lr', did you mean 'learning_rate'?",
        ),
    ],
)
def test_an_error_names_the_argument_or_variable_it_came_from(
    sets: list[str], environment: dict[str, str], sentence: str
) -> None:
    if not sentence:
        assert load("demo", sets, environment).train.workers == 2
        return
    with pytest.raises(InputError, match=sentence) as caught:
        load("demo", sets, environment)
    assert "demo.yaml" not in str(caught.value)


def test_an_error_names_the_file_it_came_from(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("train: {workers: none}\nseed: 3\n")
    (tmp_path / "above.yaml").write_text(
        "extends: below.yaml\nseed: three\ncompare: {systems: [{name: a, kind: rag, modle: x}]}\n"
    )
    with pytest.raises(InputError) as caught:
        load(tmp_path / "above.yaml", ["train.mfu=0.3"], {})
    first, second, third = str(caught.value).split("; ")
    assert (
        first
        == f"{tmp_path}/above.yaml: 'seed' is 'three': Input should be a valid integer, unable to parse string as an integer"
    )
    assert second.startswith(f"{tmp_path}/below.yaml: 'train.workers' is 'none'")
    assert third == f"{tmp_path}/above.yaml: unknown key 'compare.systems.0.rag.modle', did you mean 'model'?"
    (tmp_path / "apart.yaml").write_text("train: {workers: 2, min_workers: 3}\n")
    with pytest.raises(InputError, match=r"apart\.yaml: 'train': min_workers is 3"):
        load(tmp_path / "apart.yaml", ["train.mfu=0.3"], {})


KEYS = sorted({keys[-1] for keys in provenance._all_keys(Config)})


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("lr", "learning_rate"), ("bs", "batch_size"), ("wd", "weight_decay"), ("batch", "batch_size"), ("epoch", "epochs"),
        ("grad_accum", "gradient_accumulation_steps"), ("num_gpus", "gpus_per_worker"), ("output_dir", "storage"),
        ("report_to", "loggers"), ("lora_r", "rank"), ("Seed", "seed"), ("learning-rate", "learning_rate"), ("xyzzy", None),
    ],
)  # fmt: skip
def test_the_key_that_a_word_means(word: str, key: str | None) -> None:
    assert provenance.nearest(word, KEYS) == key


@given(st.sampled_from(KEYS), st.data())
def test_a_key_with_one_letter_too_few_is_recognized(key: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(key) - 1))
    others = [other for other in KEYS if abs(len(other) - len(key)) > 3]
    if len(key) > 4:
        assert provenance.nearest(key[:at] + key[at + 1 :], [key, *others]) == key


def test_words_of_other_tools_stand_for_keys_that_there_are() -> None:
    assert set(provenance.OTHER_WORDS.values()) <= set(KEYS)
    assert not set(provenance.OTHER_WORDS) & set(KEYS)
