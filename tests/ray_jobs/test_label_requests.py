"""Labelling tasks share one set of limits; what Ray does between them is tested in tests/integration."""

import asyncio
import io
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from addressvlm.config import Config, validate
from addressvlm.labels.costs import CostEstimate
from addressvlm.labels.limits import Grant, Report, RequestLimits
from addressvlm.labels.response_cache import ResponseCache
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.storage.shards import Shard, plan_shards
from ray_jobs.label_requests import _LabellingTask, estimate_requests, parts_of
from tests.support.label_requests import FACTS, GOOD
from tests.support.openai_endpoint import Endpoint, says

ROWS = 3 * 64


class Actor:
    """In place of the actor that has the limits; the loops of the threads of all tasks call it."""

    def __init__(self, limits: RequestLimits) -> None:
        self.limits, self.lock, self.reports = limits, threading.Lock(), 0
        self.exchange = self

    async def remote(self, report: Report) -> Grant:
        await asyncio.sleep(0)
        with self.lock:
            self.reports += 1
            return self.limits.exchange(report)


def config_of(folder: Path, endpoint: Endpoint, **labels: Any) -> Config:
    settings = {"labeler": "openai", "model": "m", "base_url": endpoint.url, "concurrency": 8, "workers": 3, **labels}
    config = validate({"name": "run", "storage": str(folder), "labels": settings}, "test")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    rows = (
        {"id": f"row{i}", "facts": FACTS.to_json(), "image": {"bytes": buffer.getvalue() + i.to_bytes(2, "big"), "path": None}}
        for i in range(ROWS)
    )
    tables.write_table(Run(config).grafts, "train", rows, tables.GRAFTS)
    return config


def ask(config: Config, actor: Any, redo: bool = False) -> list[str]:
    """The errors of all parts, each in a thread of its own."""
    parts = parts_of(plan_shards(Run(config).grafts, "train", 64), config.labels.workers)
    task = _LabellingTask(config, parts, redo, actor)
    with ThreadPoolExecutor(len(parts)) as threads:
        return [row["error"] for rows in threads.map(task, [{"part": n} for n in range(len(parts))]) for row in rows]


def test_parts_have_about_as_many_rows() -> None:
    shards = [Shard(n, rows, ()) for n, rows in enumerate([256, 256, 256, 100, 50, 10])]
    assert sorted(sum(shard.rows for shard in part) for part in parts_of(shards, 3)) == [266, 306, 356]
    assert sorted(shard.number for part in parts_of(shards, 3) for shard in part) == list(range(6))
    assert len(parts_of(shards[:2], 9)) == 2


def test_tasks_send_each_row_once(endpoint: Endpoint, tmp_path: Path) -> None:
    config = config_of(tmp_path, endpoint)
    actor = Actor(RequestLimits(config.labels))
    assert ask(config, actor) == [""] * 3
    pictures = Counter(str(body["messages"][1]["content"][0]) for body in endpoint.requests)
    assert (len(pictures), set(pictures.values())) == (ROWS, {1})
    assert (actor.limits.stats().rows, actor.limits.stats().asked) == (ROWS, ROWS)
    cache = Run(config).response_cache
    assert len(list(cache.glob("*.jsonl"))) == 3
    assert ResponseCache(cache).answers.total() == ROWS
    assert ask(config, Actor(RequestLimits(config.labels))) == [""] * 3
    assert len(endpoint.requests) == ROWS
    estimate = estimate_requests(config, plan_shards(Run(config).grafts, "train", 64), redo=False)
    assert (estimate.rows, estimate.answered, estimate.tokens_in) == (ROWS, ROWS, 0)


def test_the_budget_of_all_tasks_is_one_and_ends_all_of_them(endpoint: Endpoint, tmp_path: Path) -> None:
    status, headers, body = says(GOOD)
    assert isinstance(body, dict)
    endpoint.reply = lambda n, _: (status, headers, {**body, "usage": {"prompt_tokens": 900, "completion_tokens": 100}})
    config = config_of(tmp_path, endpoint, budget_tokens=50_000, max_tokens=100, image_rule="fixed", image_base=600)
    errors = ask(config, Actor(RequestLimits(config.labels)))
    assert len(set(errors)) == 1
    assert "50,000 of labels.budget_tokens=50,000 tokens spent" in errors[0]
    assert len(endpoint.requests) == 50


def test_an_error_of_one_task_ends_all_and_keeps_their_answers(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda n, _: says(GOOD) if n != 60 else (401, {}, {"error": {"message": "who are you"}})
    config = config_of(tmp_path, endpoint)
    errors = ask(config, Actor(RequestLimits(config.labels)))
    assert any(errors)
    assert all("401: who are you" in error for error in errors if error)  # a task may have done its rows before
    assert ResponseCache(Run(config).response_cache).answers.total() == len(endpoint.requests) - 1 < ROWS


def test_a_task_that_begins_anew_sends_only_what_it_had_not_got(endpoint: Endpoint, tmp_path: Path) -> None:
    """As after kill -9: its segment is neither closed nor renewed, and its reservations are still there."""
    config = config_of(tmp_path, endpoint, budget_tokens=10**9)
    actor = Actor(RequestLimits(config.labels))
    endpoint.reply = lambda n, _: says(GOOD) if n != 60 else (401, {}, {"error": {"message": "who are you"}})
    ask(config, actor)
    sent = len(endpoint.requests)
    endpoint.reply = lambda n, _: says(GOOD)
    again = Actor(RequestLimits(config.labels))
    again.limits.exchange(Report("0", first=True, waiting=8, turns=((9000, 256),) * 8))
    assert ask(config, again) == [""] * 3
    assert len(endpoint.requests) - sent == ROWS - (sent - 1)


def test_an_estimate_reads_few_images(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, endpoint)
    read: list[list[str] | None] = []
    batches = Shard.batches
    monkeypatch.setattr(Shard, "batches", lambda shard, columns=None: read.append(columns) or batches(shard, columns))
    estimate = estimate_requests(config, plan_shards(Run(config).grafts, "train", 64), redo=False)
    assert isinstance(estimate, CostEstimate)
    assert (estimate.rows, estimate.rows_left) == (ROWS, ROWS)
    assert estimate.tokens_in > 8500 * ROWS
    assert read.count(["id"]) == 3
