"""Shards through tasks, and how errors come back from them, without Ray"""

import errno
import json
from pathlib import Path

import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st

from addressvlm import InputError
from addressvlm.config import Config, validate
from addressvlm.storage import tables
from addressvlm.storage.shards import Rows, ShardResult, ShardWork, plan_shards, remove_stale_files
from ray_jobs import common, graft, label, prepare, ray_data, ray_train
from ray_jobs.baselines import addressclip
from ray_jobs.ray_data import STOP, to_input_error
from tests.support.dual_encoders import addressclip_config

IDS = tables.pa.schema([("id", tables.pa.string())])


@given(st.integers(0, 500), st.integers(1, 64))
def test_every_shard_is_in_one_group_and_the_last_groups_are_short(shards: int, workers: int) -> None:
    groups = ray_data._groups(shards, workers, ray_data.MAX_GROUP)
    assert [number for group in groups for number in range(group["first"], group["last"])] == list(range(shards))
    sizes = [group["last"] - group["first"] for group in groups]
    assert all(1 <= size <= ray_data.MAX_GROUP for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1:] == [1] * bool(shards)
    assert len(groups) >= min(shards, workers)


def test_a_task_processes_its_shards_until_an_error(tmp_path: Path) -> None:
    tables.write_table(tmp_path / "in", "train", [{"id": str(number)} for number in range(10)], IDS, 2)

    def work(rows: Rows) -> ShardResult:
        if rows[0]["id"] == "6":
            raise InputError("photo 6 is bad: mend it.")
        return ShardResult({"out": rows})

    shards = plan_shards(tmp_path / "in", "train", 2)
    remove_stale_files(tmp_path / "out", len(shards))
    worker = ray_data._GroupWorker(shards, tmp_path / "out", ShardWork(work, IDS))
    made = [json.loads(row["summary"]) for row in worker({"first": 1, "last": 3})]
    assert [(summary["number"], summary["rows"]) for summary in made] == [(1, 2), (2, 2)]
    assert sorted(file.name for file in (tmp_path / "out").glob("*.parquet")) == ["out-00001.parquet", "out-00002.parquet"]
    made = [json.loads(row["summary"]) for row in worker({"first": 2, "last": 5})]
    assert [summary.get("number") for summary in made] == [2, None]
    assert made[1] == {STOP: "photo 6 is bad: mend it."}
    assert tables.read_table(tmp_path / "out", "out")["id"].to_pylist() == ["2", "3", "4", "5"]


def test_an_input_error_is_found_inside_rays_errors() -> None:
    ours = InputError("no photos: give some.")
    assert to_input_error(ours) is ours
    outer = RuntimeError("task failed")
    outer.__cause__ = ValueError("between")
    outer.__cause__.__cause__ = ours
    assert to_input_error(outer) is ours
    held = ray.exceptions.RayError("task failed")
    held.cause = ours  # type: ignore[attr-defined]
    assert to_input_error(held) is ours
    trace = "Traceback:\n  File x\naddressvlm.errors.InputError: first: mend it.\n\nInputError: last: mend this.\n"
    assert str(to_input_error(RuntimeError(trace))) == "last: mend this."
    for other in (RuntimeError("OtherInputError: no"), RuntimeError("said InputError: no"), KeyError("x")):
        assert to_input_error(other) is None


def test_errors_of_a_failed_training_are_sentences() -> None:
    config = validate({"storage": "/data"}, "test")
    assert ray_train.user_message(InputError("a: b."), config) == "a: b."
    memory = ray_train.user_message(torch.OutOfMemoryError("x"), config)
    assert memory is not None
    assert "lower batch_size" in memory
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        text = ray_train.user_message(OSError(number, "why"), config)
        assert text == "/data can't be written (why): free space or set storage elsewhere, then rerun."
    assert ray_train.user_message(OSError(errno.ENOENT, "x"), config) is None
    assert ray_train.user_message(KeyError("x"), config) is None


def test_exit_status_and_message_of_a_job(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # other tests may use it

    def fails(error: BaseException) -> int:
        def main() -> None:
            raise error

        with pytest.raises(SystemExit) as ended:
            common.run_main(main)
        return int(ended.value.code or 0)

    assert fails(InputError("no: do.")) == 1
    assert capsys.readouterr().err == "error: no: do.\n"
    assert fails(KeyboardInterrupt()) == 130
    with pytest.raises(KeyError):
        fails(KeyError("ours"))
    common.run_main(lambda: None)


# What each step depends on


ASKED = validate({"labels": {"labeler": "openai"}}, "test")


def changed(key: str, value: object) -> Config:
    tree = ASKED.model_dump()
    *sections, last = key.split(".")
    place = tree
    for section in sections:
        place = place[section]
    assert place[last] != value
    place[last] = value
    return validate(tree, "test")


MAKES = {
    "seed": (1, "pgla"), "city.split_buffer_m": (31.0, "pgla"), "city.streets": ("s.osm.pbf", "pgla"),
    "city.split_block_m": (77.0, "pgla"),
    "tiles.side_m": (300.0, "gl"), "tiles.delta": (0.3, "gl"), "tiles.names": (False, "gl"), "tiles.layout": ("beside", "gl"),
    "tiles.jpeg_quality": (50, "gl"), "tiles.zoom": (15, "gl"), "tiles.pixels": (64, "gl"), "tiles.font_px": (9.0, "gl"),
    "tiles.per_second": (9.0, ""), "tiles.cache": ("c", ""), "tiles.user_agent": ("me", ""), "tiles.attribution": ("us", ""),
    "labels.labeler": ("local", "l"), "labels.model": ("other", "l"), "labels.base_url": ("http://x", "l"),
    "labels.temperature": (0.5, "l"), "labels.max_tokens": (99, "l"), "labels.image_detail": ("low", "l"),
    "labels.image_pixels": (99, "l"), "labels.image_quality": (50, "l"),
    "labels.language": ("de", "l"), "labels.words": ((3, 9), "l"), "labels.max_attempts": (9, "l"),
    "labels.ask_address": (True, "l"),
    "labels.extra_body": ({"top_p": 0.5}, "l"), "labels.distance_tolerance": (0.5, "l"), "labels.prompt": ("grounded", "l"),
    "labels.concurrency": (3, ""), "labels.retries": (9, ""), "labels.timeout_s": (9.0, ""), "labels.budget_tokens": (9, ""),
    "labels.workers": (3, ""), "labels.usd_per_million_in": (3.0, ""),
    "model.base": ("other", "a"), "model.dtype": ("bfloat16", "a"), "train.workers": (7, "a"), "train.seed": (5, "a"),
    "train.precision": ("float32", "a"), "train.checkpoint_every": (3, ""), "evaluate.workers": (7, ""), "name": ("x", ""),
    "storage": ("elsewhere", ""),
}  # fmt: skip


@pytest.mark.parametrize("key", MAKES)
def test_steps_are_repeated_only_for_settings_that_they_depend_on(key: str) -> None:
    value, made_again = MAKES[key]
    steps = {
        "p": prepare.settings, "g": graft.settings, "l": label.settings,
        "a": lambda config: addressclip.settings(config, addressclip_config(captions="template")),
    }  # fmt: skip
    before, after = ASKED, changed(key, value)
    assert "".join(name for name, settings in steps.items() if settings(before) != settings(after)) == made_again


def test_labels_depend_on_send_image() -> None:
    assert label.settings(validate({"labels": {"send_image": False}}, "test")) != label.settings(Config())


def test_a_dual_encoder_depends_on_its_settings_and_captions() -> None:
    def settings(config: Config | None = None, **changes: object) -> dict[str, object]:
        return addressclip.settings(config or ASKED, addressclip_config(**changes))

    weights = {"address": 1.0, "caption": 0.5, "geography": 0.8}
    for changes in ({"weights": weights}, {"batch_size": 9}, {"train_text": False}, {"captions": "none"}, {"epochs": 3.0}):
        assert settings(**changes) != settings(), changes
    labelled = changed("labels.model", "other")
    assert settings(labelled, captions="alignment") != settings(captions="alignment")
    assert settings(labelled, captions="template") == settings(captions="template")
