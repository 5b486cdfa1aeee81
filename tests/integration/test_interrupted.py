"""Jobs that get kill -9, and workers that do, end as if nothing had been

Each job is a process of its own, in the tests' Ray or with one of its own that dies with it. It is killed when it has finished
some shards and not all.
"""

import csv
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import yaml
from PIL import Image

from addressvlm.config import Config, validate
from addressvlm.storage import tables
from addressvlm.storage.run_dir import WORK_DIR, Run
from addressvlm.storage.shards import MARKS_DIR, Rows, ShardResult, ShardWork, plan_shards
from ray_jobs import graft, label, prepare
from ray_jobs.ray_data import ShardJob, run_on_actors, run_shards
from tests.dataset.test_split import DEGREE_M, geojson
from tests.integration.test_graft import config_of, rows
from tests.support import town
from tests.support.openai_endpoint import Endpoint, says

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.xdist_group("ray")]
REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 120.0


@contextmanager
def killed_when(job: str, config: Config, reached: Callable[[], bool], output: Path, own_ray: bool = False) -> Iterator[None]:
    """Start the job, give it kill -9 as soon as `reached`, and run the block."""
    address = "local" if own_ray else ray.get_runtime_context().gcs_address
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with output.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, f"ray_jobs/{job}.py", "--config", str(file)],
            cwd=REPOSITORY,
            env={**os.environ, "RAY_ADDRESS": address},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        started = threading.Event()  # never set; its wait is the pace of the polling
        for _ in range(int(DEADLINE_S / 0.005)):
            if process.poll() is not None or reached():
                break
            started.wait(0.005)
        assert process.poll() is None, output.read_text()
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
    try:
        yield
    finally:
        for child in children:  # Ray's agents stay for a minute
            with suppress(psutil.NoSuchProcess):
                child.kill()


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The tables of a folder: name -> time of change and contents."""
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.glob("*.parquet"))}


def same(a: Path, b: Path) -> None:
    """The folders hold the same files with the same contents."""
    contents = [{p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} for folder in (a, b)]
    assert contents[0].keys() == contents[1].keys()
    assert all(contents[0][name] == contents[1][name] for name in contents[0])


def elsewhere(config: Config, folder: Path) -> Config:
    return config.model_copy(update={"storage": str(folder)})


def partial_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def shards_done(folder: Path) -> int:
    return len(list((folder / MARKS_DIR).glob("*.json")))


def city(folder: Path, photos: int) -> Config:
    """Photos of a town of three streets, twelve photos of noise used again and again; one in fifty is missing."""
    (folder / "photos").mkdir()
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (120, 160, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "photos" / f"{i}.jpg")
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "file", "place", "lat", "lon", "heading"])
        for i in range(photos):
            place, lat = i // 8, (150 * (i // 8 % 3) + 5) / DEGREE_M
            name = "none.jpg" if i % 50 == 49 else f"{i % 12}.jpg"
            writer.writerow([i, name, place, lat, (place // 3 * 30 - 1500) / DEGREE_M, i % 8 * 45])
    streets = {f"Street {name}": [[-2000, y], [2000, y]] for name, y in (("A", 0), ("B", 150), ("C", 300))}
    square = [[[-2500, -500], [2500, -500], [2500, 500], [-2500, 500], [-2500, -500]]]
    maps = {
        "streets": str(geojson(folder / "streets.geojson", "LineString", streets)),
        "districts": str(geojson(folder / "districts.geojson", "Polygon", {"Centre": square})),
    }
    settings = {"manifest": str(folder / "manifest.csv"), "photos": str(folder / "photos"), **maps}
    return validate({"name": "town", "storage": str(folder / "runs"), "city": settings}, "test")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A dataset that was prepared in one go."""
    config = city(tmp_path_factory.mktemp("undisturbed"), 2400)
    prepare.run_step(config)
    return config


@pytest.mark.parametrize("stage", ["checking", "writing"])
def test_prepare(tmp_path: Path, stage: str, undisturbed: Config) -> None:
    config = elsewhere(undisturbed, tmp_path)
    folder = Run(config).photos
    at_work = partial_of(folder) if stage == "writing" else partial_of(folder) / WORK_DIR / "checked"
    with killed_when("prepare", config, lambda: shards_done(at_work) > 0, tmp_path / "job.log"):
        assert not folder.exists()
        kept = files(partial_of(folder) / WORK_DIR / "checked")
        prepare.run_step(config)
    same(folder, Run(undisturbed).photos)
    same(Run(config).rejects, Run(undisturbed).rejects)
    ids = [row["id"] for split in ("train", "val", "test") for row in tables.iter_rows(folder, split, ["id"])]
    assert len(ids) == len(set(ids))
    assert len(kept) >= 1


def test_graft(tmp_path: Path) -> None:
    config = config_of(tmp_path, tiles={"pixels": 224})
    photos = [{**row, "id": f"{n}/{row['id']}"} for n in range(40) for row in rows(places=12)]
    tables.write_table(Run(config).photos, "train", photos, tables.PHOTOS)
    folder = Run(config).grafts
    with killed_when("graft", config, lambda: shards_done(partial_of(folder)) > 0, tmp_path / "job.log", own_ray=True):
        assert not folder.exists()
        kept = files(partial_of(folder))
        graft.run_step(config, redo=False)
    assert len(kept) < len(plan_shards(Run(config).photos, "train", graft.SHARD_ROWS))
    result = files(folder)
    assert {name: result[name] for name in kept} == kept  # not made again
    assert [row["id"] for row in tables.iter_rows(folder, "train", ["id"])] == [row["id"] for row in photos]
    undisturbed = elsewhere(config, tmp_path / "undisturbed")
    town.write_run_roads(undisturbed)
    tables.write_table(Run(undisturbed).photos, "train", photos, tables.PHOTOS)
    graft.run_step(undisturbed, redo=False)
    same(folder, Run(undisturbed).grafts)


def test_labels_are_paid_once(tmp_path: Path) -> None:
    """The job is killed while the endpoint holds back an answer; those that it had sent are not asked for again."""
    text = (
        "The road leads on between two plain walls here, and the map shows it running straight. This is Mill Street in Harbour."
    )
    held, go_on, at_once = threading.Event(), threading.Event(), 8

    def reply(number: int, body: dict[str, Any]) -> Any:
        if number == 100:
            held.set()
            go_on.wait(DEADLINE_S)
        return says(text)

    with Endpoint(reply).running() as endpoint:
        settings = {"labeler": "openai", "model": "m", "base_url": endpoint.url, "concurrency": at_once}
        config = config_of(tmp_path, labels=settings, tiles={"pixels": 96})
        tables.write_table(Run(config).photos, "train", rows(places=8, views=24), tables.PHOTOS)
        graft.run_step(config, redo=False)
        folder = Run(config).alignment
        with killed_when("label", config, held.is_set, tmp_path / "job.log"):
            go_on.set()
            assert not folder.exists()
            label.run_step(config, redo=False)
    labels = list(tables.iter_rows(folder, "train", ["id", "source"]))
    assert [row["id"] for row in labels] == [row["id"] for row in tables.iter_rows(Run(config).grafts, "train", ["id"])]
    assert Counter(row["source"] for row in labels) == {"openai:m": 8 * 24}
    assert len(endpoint.requests) <= 8 * 24 + at_once  # no more than those that were under way


def test_a_killed_labelling_task_pays_for_no_row_twice(tmp_path: Path) -> None:
    """One of two tasks gets kill -9 while answers are under way; it begins anew, and only those are asked for again."""
    text = (
        "The road leads on between two plain walls here, and the map shows it running straight. This is Mill Street in Harbour."
    )
    at_once, killed = 8, []

    def reply(number: int, body: dict[str, Any]) -> Any:
        if number >= 100 and not killed:
            segment = next(Run(config).response_cache.glob("*.jsonl"))
            killed.append(int(segment.stem.split("-")[-2]))  # its writer
            os.kill(killed[0], signal.SIGKILL)
        return says(text)

    with Endpoint(reply).running() as endpoint:
        settings = {"labeler": "openai", "model": "m", "base_url": endpoint.url, "concurrency": at_once, "workers": 2}
        config = config_of(tmp_path, labels=settings, tiles={"pixels": 96})
        tables.write_table(Run(config).photos, "train", rows(places=16, views=36), tables.PHOTOS)
        graft.run_step(config, redo=False)
        label.run_step(config, redo=False)
    labels = list(tables.iter_rows(Run(config).alignment, "train", ["id", "source"]))
    assert Counter(row["source"] for row in labels) == {"openai:m": 16 * 36}
    assert killed
    assert len(endpoint.requests) <= 16 * 36 + at_once


def die_once(flag: Path, function: Callable[[Rows], ShardResult], batch: Rows) -> ShardResult:
    """The function, in a worker that gets kill -9 at its second batch."""
    made = function(batch)
    if batch[0]["id"] == "64" and not flag.exists():
        flag.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return made


def same_rows(batch: Rows) -> ShardResult:
    return ShardResult({"train": batch}, counts={"rows": len(batch)})


def test_a_worker_that_is_killed_in_the_middle_of_a_shard(tmp_path: Path) -> None:
    photos = [{"id": str(n), "image": {"bytes": bytes([n % 256]) * 100, "path": None}} for n in range(600)]
    schema = tables.pa.schema([tables.PHOTOS.field("id"), tables.PHOTOS.field("image")])
    tables.write_table(tmp_path / "in", "train", photos, schema)
    function = partial(die_once, tmp_path / "died", same_rows)
    made = run_shards("copy", plan_shards(tmp_path / "in", "train", 256), tmp_path / "out", ShardWork(function, schema))
    assert (tmp_path / "died").exists()
    assert list(tables.iter_rows(tmp_path / "out", "train")) == photos
    assert [summary["counts"] for summary in made] == [{"rows": 256}, {"rows": 256}, {"rows": 88}]


class LoadedOnce:
    """Work of several tables that share what a worker loads; it writes down each load and each batch."""

    def __init__(self, log: Path) -> None:
        self.log = log

    @cached_property
    def loaded(self) -> str:
        self.note("load")
        return "model"

    def note(self, line: str) -> None:
        with self.log.open("a") as file:
            file.write(f"{line}\n")

    def copy(self, table: str, batch: Rows) -> ShardResult:
        assert self.loaded
        self.note(f"{table} {batch[0]['id']}")
        if table == "b" and batch[0]["id"] == "128" and self.log.read_text().count("b 128") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return ShardResult({"train": batch})


def test_tables_of_one_model_are_made_with_one_load_and_a_killed_worker_costs_one_shard(tmp_path: Path) -> None:
    schema = tables.pa.schema([tables.PHOTOS.field("id")])
    tables.write_table(tmp_path / "in", "train", [{"id": str(n)} for n in range(300)], schema)
    shards, work = plan_shards(tmp_path / "in", "train", 64), LoadedOnce(tmp_path / "log")
    jobs = [ShardJob(shards, tmp_path / name, ShardWork(partial(work.copy, name), schema)) for name in ("a", "b")]
    first, second = run_on_actors("copy", jobs, 1, {"num_cpus": 1})
    for name in ("a", "b"):
        assert [row["id"] for row in tables.iter_rows(tmp_path / name, "train")] == [str(n) for n in range(300)]
    assert [summary["rows"] for summary in first] == [summary["rows"] for summary in second] == [64, 64, 64, 64, 44]
    counts = Counter((tmp_path / "log").read_text().splitlines())
    assert counts.pop("load") == 2  # of the worker that was killed, and of the one in its place
    assert counts.pop("b 128") == 2
    assert len(counts) == 9
    assert set(counts.values()) == {1}
