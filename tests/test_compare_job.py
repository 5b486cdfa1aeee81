"""The comparison on a real Ray: rows of several kinds, one that fails, table and report: pytest tests/test_compare_job.py"""

import json

import pytest

from addressvlm import InputError, tables
from addressvlm.config import Config
from addressvlm.config_compare import VariantConfig
from addressvlm.run import Run, mark_done
from ray_jobs import compare, prepare
from tests.rivals import photo, tiny_dino, work_in
from tests.tiny import tiny_llava

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def config(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("compare")
    dino = str(tiny_dino(folder / "dino"))
    systems = [
        {"name": "Nearest", "kind": "retrieval", "encoder": {"base": dino}},
        {"name": "Nowhere", "kind": "retrieval", "encoder": {"base": str(folder / "nothing")}},
        {"name": "Fused", "kind": "fusion", "of": ["Nearest", "zero-shot"]},
        {"name": "Fused in vain", "kind": "fusion", "of": ["Nearest", "Nowhere"]},
    ]
    work = work_in(
        folder, tiny_llava(folder / "base"), [photo("train", number) for number in range(9)],
        evaluate={"workers": 1, "max_new_tokens": 4, "bootstrap": 100},
        train={"systems": [{"name": "zero-shot"}]}, compare={"systems": systems, "main": "zero-shot"},
    )  # fmt: skip
    tables.write(work.run.photos, "val", [photo("val", number) for number in range(6)], tables.PHOTOS)
    mark_done(work.run.photos, prepare.settings(work.config))
    return work.config


def test_one_table_of_all_rows_and_why_some_are_missing(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in compare.run_step(config)["systems"]}
    assert list(rows) == ["zero-shot", "Nearest", "Nowhere", "Fused", "Fused in vain"]
    assert rows["Nearest"]["metrics"]["A_ds"]["value"] == 1
    assert rows["Nearest"]["against"]["mcnemar"] == {"better": 0, "worse": 6, "p": 2 / 2**6}
    assert rows["Nearest"]["within"]["500 m"]["value"] == 1
    assert rows["Nearest"]["cost"]["answering"]["photos"] > 0
    assert rows["Fused"]["metrics"]["A_ds"]["value"] == 1
    assert rows["Fused"]["notes"]["weight of Nearest"] > rows["Fused"]["notes"]["weight of zero-shot"]
    assert "nothing" in rows["Nowhere"]["failed"]
    assert "fuses 'Nowhere', which has no scores" in rows["Fused in vain"]["failed"]
    folder = Run(config).folder / "comparison"
    assert json.loads((folder / "comparison.json").read_text())["main"] == "zero-shot"
    assert "What confidence is worth" in (folder / "report.html").read_text()

    capsys.readouterr()
    again = compare.run_step(config, only=["zero-shot", "Nearest"])
    assert [row["name"] for row in again["systems"]] == ["zero-shot", "Nearest"]
    assert "zero-shot: already answered" in capsys.readouterr().out


def test_rows_must_be_told_apart(config: Config) -> None:
    with pytest.raises(InputError, match=r"--row Nobody: rows are zero-shot, Nearest"):
        compare.run_step(config, only=["Nobody"])
    twice = config.model_copy(update={"train": config.train.model_copy(deep=True)})
    twice.train.systems[0].name = "nearest"
    with pytest.raises(InputError, match="would share a folder"):
        compare.run_step(twice)
    scored = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"answers": "scored"})})
    with pytest.raises(InputError, match=r"evaluate\.answers is scored"):
        compare.run_step(scored)


def test_a_variant_is_a_run_of_its_own() -> None:
    changed = compare.changed(Config(), VariantConfig(name="delta 0.3", set={"tiles.delta": 0.3, "train.cities": {"a": 1}}))
    assert (changed.name, changed.tiles.delta, changed.train.cities) == ("demo-delta-0-3", 0.3, {"a": 1.0})
    other = compare.changed(
        Config(seed=3), VariantConfig(name="GeoReasoner", config="demo-georeasoner", set={"tiles.names": False})
    )
    assert (other.name, other.seed, other.tiles.names, list(other.train.stages)) == (
        "demo-georeasoner", 3, False, ["reasoning", "localization"],
    )  # fmt: skip
    with pytest.raises(InputError, match=r"compare\.variants, 'x': unknown key 'tiles\.dleta'"):
        compare.changed(Config(), VariantConfig(name="x", set={"tiles.dleta": 0.3}))
