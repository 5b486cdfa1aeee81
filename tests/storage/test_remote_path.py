"""Remote paths, and a run in an object store over HTTP"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from addressvlm import InputError
from addressvlm.config import validate
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.labels.response_cache import CachedAnswer, RequestKey, ResponseCache, open_for_writing
from addressvlm.models.loading import resolve_model
from addressvlm.storage import remote_path, tables
from addressvlm.storage.files import (
    CACHE_VARIABLE,
    atomic_replace_dir,
    local_model_copy,
)
from addressvlm.storage.remote_path import RemotePath, is_remote, path_of
from addressvlm.storage.run_dir import (
    BEGUN_FILE,
    DONE_FILE,
    Run,
    is_done,
    is_unfinished,
    resumable_dir,
)
from addressvlm.storage.shards import (
    Rows,
    ShardResult,
    ShardWork,
    plan_shards,
    process_shard,
    remove_stale_files,
)
from addressvlm.training.dataset import TableRows as TrainingRows
from addressvlm.training.metrics_logger import MetricsLogger, StepMetrics
from serve.cities import City, model_folder
from serve.settings import ServiceSettings
from tests.support.object_store import store

SCHEMA = pa.schema([("n", pa.int64())])
ASKED = RequestKey("row", "prompt", "model", "settings", "image", "digest", 1)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that is `s3://bucket` in this process."""
    folder = tmp_path_factory.mktemp("bucket")
    with store(folder) as url, pytest.MonkeyPatch.context() as patch:
        settings = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hidden"}
        for name, value in {
            **settings,
            "AWS_REGION": "us-east-1",
            CACHE_VARIABLE: str(tmp_path_factory.mktemp("cache")),
        }.items():
            patch.setenv(name, value)
        remote_path._filesystem.cache_clear()
        yield folder
        remote_path._filesystem.cache_clear()


def progress_of(step: int) -> StepMetrics:
    return StepMetrics("stage", step, 4, 1.0 / step, 0.1, 1.0, 1.0, 10, 10.0, None, 0.1)


def file_names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def odd(rows: Rows) -> ShardResult:
    return ShardResult({"odd": [row for row in rows if row["n"] % 2]}, counts={"seen": len(rows)})


def step(out: RemotePath, made: int | None = None, redo: bool = False, settings: Any = None) -> list[dict[str, Any]]:
    """A step of three shards that is killed after `made` of them."""
    shards = plan_shards(out.parent / "in", "all", 64)
    with resumable_dir(out, settings or {"seed": 1}, redo) as folder:
        remove_stale_files(folder, len(shards))
        summaries = []
        for shard in shards:
            if shard.number == made:
                raise ZeroDivisionError
            summaries.append(process_shard(shard, folder, ShardWork(odd, SCHEMA)))
        remove_stale_files(folder, len(shards), summaries)
    return summaries


def test_a_remote_step_resumes_by_shard_and_partial_output_does_not_count(bucket: Path) -> None:
    run = path_of("s3://bucket/steps")
    assert isinstance(run, RemotePath)
    out, here = run / "out", bucket / "steps" / "out"
    assert tables.write_table(run / "in", "all", ({"n": n} for n in range(192)), SCHEMA) == 192
    with suppress(ZeroDivisionError):
        step(out, made=2)
    assert is_unfinished(out)
    assert not is_done(out, {"seed": 1})
    with pytest.raises(InputError, match=r"no table s3://bucket/steps/out/odd-\*.parquet: run the step"):
        tables.read_table(out, "odd")
    before = (here / "odd-00000.parquet").stat().st_mtime_ns
    (here / "odd-00009.parquet").write_bytes(b"of another plan")
    (here / "even-00000.parquet").write_bytes(b"of a worker that was stopped")
    assert [made["counts"] for made in step(out)] == [{"seen": 64}] * 3
    assert (here / "odd-00000.parquet").stat().st_mtime_ns == before  # not made again
    tables_and_index = ["odd-00000.parquet", "odd-00001.parquet", "odd-00002.parquet", "odd-index.json"]
    assert file_names(here) == [DONE_FILE, *tables_and_index]
    assert is_done(out, {"seed": 1})
    assert tables.count_rows(out, "odd") == 96
    assert [row["n"] for row in tables.iter_rows(out, "odd")] == list(range(1, 192, 2))
    assert TrainingRows(out, "odd", ("n",))[95] == {"n": 191}
    with pytest.raises(InputError, match=r"s3://bucket/steps/out was made with other settings \(seed: 1 -> 2\)"):
        is_done(out, {"seed": 2})
    with suppress(ZeroDivisionError):
        step(out, made=0, redo=True, settings={"seed": 2})
    assert file_names(here) == [BEGUN_FILE]  # what was made before is gone, and the mark says that nothing is there
    assert is_unfinished(out)


def test_answers_are_saved_locally_at_once_and_remotely_on_sync(bucket: Path) -> None:
    folder, here = path_of("s3://bucket/run/ledger"), bucket / "run" / "ledger"
    child = os.fork()
    if not child:  # a job that gets kill -9 with one answer sent and one not
        try:
            with open_for_writing(folder) as ledger:
                ledger.add(ASKED, CachedAnswer("one", usd=1.0))
                ledger.sync()
                ledger.add(replace(ASKED, number=2), CachedAnswer("two", usd=1.0))
                os._exit(9)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = ResponseCache(folder)
    assert (left.get(ASKED), left.get(replace(ASKED, number=2))) == (CachedAnswer("one", usd=1.0), None)
    with open_for_writing(folder) as ledger:
        assert ledger.get(replace(ASKED, number=2)) == CachedAnswer("two", usd=1.0)
        assert ledger.usd == 2.0  # what is there twice for a moment counts once
        for number in range(3, 6):
            ledger.add(replace(ASKED, number=number), CachedAnswer(str(number)))
            ledger.sync()
        assert list(here.glob("holder-*.json"))
    assert len(list(here.glob("*.jsonl"))) == 3  # the killed job's, what it had not sent, and one of the second job
    again = ResponseCache(folder)
    assert [again.get(replace(ASKED, number=n)) for n in (2, 5)] == [CachedAnswer("two", usd=1.0), CachedAnswer("5")]
    assert again.usd == 2.0
    assert not list(here.glob("holder-*.json"))
    (here / "holder-1.json").write_text(json.dumps({"host": "another", "process": 7, "at": "2999-01-01T00:00:00+00:00"}))
    with (
        pytest.raises(InputError, match=r"another job labels s3://bucket/run .process 7 on another"),
        open_for_writing(folder),
    ):
        pass


def test_a_remote_model_is_downloaded_once_per_version(bucket: Path) -> None:
    run = Run(validate({"name": "town", "storage": "s3://bucket/models"}, "test"))
    with atomic_replace_dir(run.model_dir("AddressVLM")) as folder:
        (folder / "merged").mkdir()
        for name in ("config.json", "model.safetensors", "evil.py", "pytorch_model.bin"):
            (folder / "merged" / name).write_text("{}")
        Gazetteer([]).save(folder / "merged" / "gazetteer.geojson")
    merged = run.model_dir("AddressVLM") / "merged"
    assert resolve_model(str(merged)) == str(merged)
    (run.folder.parent / "last-model").write_text(f"{merged}\n")
    assert model_folder(ServiceSettings(storage="s3://bucket/models")) == merged
    assert model_folder(ServiceSettings(model=str(run.model_dir("AddressVLM")))) == merged
    assert City("town", "", "m", merged).gazetteer() is not None
    first = local_model_copy(merged)
    assert sorted(p.name for p in first.iterdir()) == ["config.json", "gazetteer.geojson", "model.safetensors"]
    assert local_model_copy(merged) == first
    (bucket / "models/town/models/addressvlm/merged/model.safetensors").write_text("other weights")
    second = local_model_copy(merged)
    assert (second / "model.safetensors").read_text() == "other weights"
    assert (first / "model.safetensors").read_text() == "{}"
    assert (first / "config.json").samefile(second / "config.json")
    with pytest.raises(InputError, match=r"s3://bucket/none holds no model .no config.json"):
        resolve_model("s3://bucket/none")


def test_a_remote_loss_curve_resumes_from_its_last_upload(bucket: Path) -> None:
    folder = path_of("s3://bucket/journal")
    journal = MetricsLogger(folder, "s", 0, 4)
    for number in (1, 2):
        journal.log_step(progress_of(number))
    journal.sync()
    journal.log_step(progress_of(3))  # lost with the job
    lines = (bucket / "journal" / "loss.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    resumed = MetricsLogger(folder, "s", 1, 4)
    resumed.log_step(progress_of(2))
    resumed.sync()
    assert (bucket / "journal" / "loss.jsonl").read_text().splitlines()[0] == lines[0]
    assert len((bucket / "journal" / "loss.jsonl").read_text().splitlines()) == 2
    assert any(p.startswith("tensorboard/") for p in file_names(bucket / "journal"))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("s3://absent/runs", "there is no such bucket: create it, or fix `storage`"),
        ("s3://secret/runs", "access is denied: set credentials in the environment"),
        ("s4://bucket/runs", "give a local path, or an s3:// or gs:// address"),
        ("adl://bucket/runs", "needs a Python package that is missing: pip install adlfs"),
        ("s3://key:hidden@bucket/runs", "contains credentials: remove them"),
    ],
)
def test_errors_of_a_store_are_one_sentence(bucket: Path, where: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused, resumable_dir(path_of(where) / "step", {}):
        pass
    assert "hidden" not in str(refused.value)
    assert str(refused.value).count("\n") == 0


def test_a_remote_path_behaves_like_a_path(tmp_path: Path, memory_store: RemotePath) -> None:
    here = tmp_path / "tree"
    for name in ("a.txt", "b.json", "sub/a.txt", "sub/c.parquet", "sub/deep/a.txt", "x-00001.parquet"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
        (memory_store / name).write_text(name)
    for pattern in ("*", "*.txt", "x-*.parquet", "?.*", "[ab].*", "sub/*", "sub/a.txt", "sub/none", "sub/deep/*.txt", "none/*"):
        assert sorted(str(p.relative_to(memory_store)) for p in memory_store.glob(pattern)) == sorted(
            str(p.relative_to(here)) for p in here.glob(pattern)
        ), pattern
    assert [(str(p.relative_to(memory_store)), stat.st_size) for p, stat in memory_store.walk_files()] == sorted(
        (str(p.relative_to(here)), p.stat().st_size) for p in here.rglob("*") if p.is_file()
    )
    for name in ("a.txt", "sub", "sub/deep/a.txt", "none"):
        local, remote = here / name, memory_store / name
        assert (remote.name, remote.stem, remote.suffix) == (local.name, local.stem, local.suffix)
        assert (remote.exists(), remote.is_file(), remote.is_dir()) == (local.exists(), local.is_file(), local.is_dir())
        assert remote.with_suffix(".md").relative_to(memory_store) == local.with_suffix(".md").relative_to(here)
        assert remote.parent.relative_to(memory_store) == local.parent.relative_to(here)
    assert RemotePath("s3://bucket/a/b").parents == (RemotePath("s3://bucket/a"), RemotePath("s3://bucket"))
    assert RemotePath("s3://bucket/a/") == RemotePath("s3://bucket/a")
    assert RemotePath("s3://bucket/a") < RemotePath("s3://bucket/b")
    with (memory_store / "a.txt").open() as file:
        file.seek(2)
        assert file.read() == b"txt"
    (memory_store / "sub").remove_tree()
    assert [p.name for p, _ in memory_store.walk_files()] == ["a.txt", "b.json", "x-00001.parquet"]
    (memory_store / "sub").remove_tree()
    (memory_store / "a.txt").unlink()
    (memory_store / "a.txt").unlink(missing_ok=True)
    for gone in ((memory_store / "a.txt").unlink, (memory_store / "a.txt").stat, (memory_store / "a.txt").read_bytes):
        with pytest.raises(FileNotFoundError):
            gone()
    with pytest.raises(ValueError, match="is a bucket"):
        RemotePath("memory://bucket").remove_tree()


def test_path_of_resolves_home_file_uris_and_remote_uris(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert path_of("~/a b") == path_of("file:///home/ann/a%20b") == Path("/home/ann/a b")
    assert path_of("a%20b") == Path("a%20b")
    assert [is_remote(where) for where in ("s3://b/a", "file:///a", "a", "c:/a")] == [True, False, False, False]
    remote = path_of("s3://bucket/a")
    assert path_of(remote) is remote
