"""Throughput of the labeler as a share of what the endpoint allows: python benchmarks/labelling.py [--tasks 1 2 4]

An OpenAI-compatible server in a separate process answers after 200 ms and refuses (429) more than C requests in flight, so the
upper bound is C / 0.2 s. Rows come from a Parquet table with images and answers go into a response cache, as in the job.
Then 5 % of the requests get a 429 and 2 % a 500, and the server counts its requests. Each round is a separate process, so that
its peak memory can be measured. With `--tasks` the job's labelling tasks send the requests, on a Ray of their own, and the time
is the server's, from its first request to its last answer.
"""

import argparse
import asyncio
import contextlib
import io
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np
from PIL import Image

LATENCY_S = 0.2
TEXT = (
    "A row of red brick houses stands on the left and the camera looks along the road. On the map King Street meets the "
    "street a little to the east. This is Mill Street in Harbour."
)
IMAGES = {336: 84, 1024: 84}  # side in pixels, JPEG quality


# The server does as little as possible, since it shares the processor with the labeler


def answer(status: int, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


MESSAGE = {"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}
USAGE = {"prompt_tokens": 700, "completion_tokens": 45, "total_tokens": 745}
GOOD = answer(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [MESSAGE], "usage": USAGE})
BUSY = answer(429, {"error": {"message": "too many in flight", "code": "rate_limit"}}).replace(
    b"\r\n", b"\r\nRetry-After: 0.1\r\n", 1
)
BROKEN = answer(500, {"error": {"message": "oops"}})


class Server(asyncio.Protocol):
    """One connection."""

    limit, faults = 64, 0.0
    in_flight = max_in_flight = 0
    statuses: ClassVar[Counter[int]] = Counter()
    statuses_of: ClassVar[dict[int, list[int]]] = {}  # checksum of a request -> statuses of its answers
    rng = random.Random(0)
    first = last = 0.0  # when requests began and ended

    def connection_made(self, transport: Any) -> None:
        self.transport, self.head, self.remaining, self.sum = transport, b"", 0, 0

    def data_received(self, data: bytes) -> None:
        if not self.remaining:
            self.head += data
            end = self.head.find(b"\r\n\r\n") + 4
            if end < 4:
                return
            if self.head.startswith(b"GET"):
                self.transport.write(answer(200, self.counts()))
                self.head = b""
                return
            at = self.head.lower().index(b"content-length:") + 15
            self.remaining = int(self.head[at : self.head.index(b"\r", at)])
            data, self.head, self.sum = self.head[end:], b"", 0
        self.remaining -= len(data)
        self.sum = zlib.crc32(data, self.sum)
        if not self.remaining:
            self.reply()

    def reply(self) -> None:
        cls = type(self)
        cls.first = cls.first or time.perf_counter()
        cls.in_flight += 1
        cls.max_in_flight = max(cls.max_in_flight, cls.in_flight)
        draw, status, data = cls.rng.random(), 200, GOOD
        if cls.in_flight > cls.limit or draw < cls.faults * 5 / 7:
            status, data = 429, BUSY
        elif draw < cls.faults:
            status, data = 500, BROKEN
        cls.statuses[status] += 1
        cls.statuses_of.setdefault(self.sum, []).append(status)
        asyncio.get_running_loop().call_later(LATENCY_S if status == 200 else 0.01, self.send, data)

    def send(self, data: bytes) -> None:
        type(self).in_flight, type(self).last = self.in_flight - 1, time.perf_counter()
        self.transport.write(data)

    def counts(self) -> dict[str, Any]:
        requests = self.statuses_of.values()
        needless = sum(len(statuses) - 1 - statuses[:-1].count(429) - statuses[:-1].count(500) for statuses in requests)
        answered = sum(200 in statuses for statuses in requests)
        return {"in_flight": self.max_in_flight, "statuses": self.statuses, "answered": answered, "needless": needless,
                "seconds": self.last - self.first}  # fmt: skip


async def serve(limit: int, faults: float) -> None:
    Server.limit, Server.faults = limit, faults
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# The labeler, as in the job


def write_grafts(folder: Path, side: int, rows: int) -> int:
    """A table of grafts with JPEGs of noise and colour, all different, and the mean size of one."""
    from addressvlm.labels.facts import Facts
    from addressvlm.storage import tables

    facts = Facts(
        "Mill Street", "Harbour", ("Mill Street", "King Street"), "east-west", "along", "east", "King Street", 40, "east"
    )
    pictures = []
    for seed in range(16):
        coarse = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        noise = np.random.default_rng(seed).integers(-12, 13, (side, side, 3))
        pixels = np.asarray(Image.fromarray(coarse).resize((side, side)), dtype=int) + noise
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=IMAGES[side])
        pictures.append(buffer.getvalue())

    def grafts() -> Iterator[dict[str, Any]]:
        for i in range(rows):
            image = pictures[i % 16] + i.to_bytes(4, "big")  # after the end of the picture, so that no two rows are the same
            yield {"id": str(i), "facts": facts.to_json(), "image": {"bytes": image, "path": None}}

    tables.write_table(folder, "train", grafts(), tables.GRAFTS)
    return sum(map(len, pictures)) // 16


def label(grafts: str, rows: int, url: str, concurrency: int) -> None:
    """One round; prints wall time and processor time in seconds, and peak memory in MB."""
    from addressvlm.config.labels import LabelsConfig
    from addressvlm.labels.facts import Facts
    from addressvlm.labels.labelers import Request, state_factory
    from addressvlm.labels.request_scheduler import OpenAILabeler
    from addressvlm.labels.response_cache import open_for_writing
    from addressvlm.storage.shards import plan_shards

    config = LabelsConfig(labeler="openai", model="m", base_url=url, concurrency=concurrency)
    new_state = state_factory(config)

    def requests() -> Iterator[Request]:
        batches = (shard.batches(["id", "image", "facts"]) for shard in plan_shards(Path(grafts), "train", 2048))
        for row in islice(chain.from_iterable(chain.from_iterable(batches)), rows):
            yield Request(row["id"], row["image"]["bytes"], Facts.from_json(row["facts"]))

    assert new_state(next(requests())).add_answer(TEXT) is not None  # the validator has loaded its models
    with tempfile.TemporaryDirectory() as folder, open_for_writing(Path(folder) / "cache") as cache:
        start, cpu = time.perf_counter(), time.process_time()
        stats = OpenAILabeler(config, new_state, cache).run(requests(), rows)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        answers = cache.answers.total()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_mb": peak, "answers": answers, **stats.to_dict()}))


def label_by_tasks(grafts: str, rows: int, url: str, concurrency: int, tasks: int) -> None:
    """One round of the job's labelling tasks; prints its statistics."""
    import ray

    from addressvlm.config import validate
    from addressvlm.storage.files import remove_tree
    from addressvlm.storage.run_dir import Run
    from addressvlm.storage.shards import plan_shards
    from ray_jobs.label_requests import fill_response_cache

    folder = Path(grafts).parent
    labels = {"labeler": "openai", "model": "m", "base_url": url, "concurrency": concurrency, "workers": tasks}
    config = validate({"name": folder.name, "storage": str(folder.parent), "labels": labels}, "benchmark")
    remove_tree(Run(config).response_cache)
    shards = plan_shards(Path(grafts), "train", 64)[: rows // 64]
    ray.init(address="local", num_cpus=max(tasks, 2), include_dashboard=False, logging_level="warning")
    print(json.dumps(fill_response_cache(config, shards, redo=False)))


# Rounds


@contextlib.contextmanager
def running_server(concurrency: int, faults: float) -> Iterator[str]:
    command = [sys.executable, __file__, "--serve", "--concurrency", str(concurrency), "--fault-share", str(faults)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def run_round(grafts: Path, rows: int, concurrency: int, faults: float = 0.0, tasks: int = 0) -> dict[str, Any]:
    """A round against a new server; the results of both."""
    with running_server(concurrency, faults) as url:
        command = [sys.executable, __file__, "--label", str(grafts), "--rows", str(rows), "--url", f"{url}/v1"]
        command += ["--concurrency", str(concurrency), *(["--tasks", str(tasks)] if tasks else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={"OPENAI_API_KEY": "none", **os.environ})
        with urllib.request.urlopen(url) as response:
            return {**json.loads(done.stdout.splitlines()[-1]), "server": json.load(response)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--tasks", type=int, nargs="+", help="labelling tasks on Ray, some numbers of them in turn")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--fault-share", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--label", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.concurrency, args.fault_share))
    elif args.label and args.tasks:
        label_by_tasks(args.label, args.rows, args.url, args.concurrency, args.tasks[0])
    elif args.label:
        label(args.label, args.rows, args.url, args.concurrency)
    elif args.tasks:
        compare_tasks(args.rows // 64 * 64, args.tasks, args.concurrency)
    else:
        compare(args.rows, args.rounds, args.concurrency)


def compare_tasks(rows: int, numbers: list[int], concurrency: int) -> None:
    ideal = math.ceil(rows / concurrency) * LATENCY_S
    print(f"{rows:,} rows, {concurrency} in flight, {LATENCY_S:g} s an answer: at best {ideal:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        grafts = Path(folder) / "run" / "grafts"
        write_grafts(grafts, 336, rows)
        for tasks, faults in [*((tasks, 0.0) for tasks in numbers), (numbers[-1], 0.07)]:
            result = run_round(grafts, rows, concurrency, faults, tasks)
            server = result["server"]
            print(
                f"{tasks} tasks{', with faults' if faults else ''}: {ideal / server['seconds']:.1%} of the ideal, at most "
                f"{server['in_flight']} in flight, {server['answered']:,} rows answered, {server['needless']} needless "
                "requests",
                flush=True,
            )


def compare(rows: int, rounds: int, concurrency: int) -> None:
    bound = concurrency / LATENCY_S
    print(f"{rows:,} rows, {concurrency} in flight, {LATENCY_S:g} s an answer: at most {bound:g} rows/s")
    with tempfile.TemporaryDirectory() as folder:
        for side in IMAGES:
            size = write_grafts(Path(folder) / str(side), side, max(2 * rows, 4000) if side == 336 else rows)
            results = [run_round(Path(folder) / str(side), rows, concurrency) for _ in range(rounds)]
            assert all(r["answers"] == rows and r["server"]["in_flight"] <= concurrency for r in results), results
            ratios = sorted(rows / result["seconds"] / bound for result in results)
            cpu, peak = (median(result[key] for result in results) for key in ("cpu", "peak_mb"))
            each = ", ".join(f"{ratio:.1%}" for ratio in ratios)
            print(
                f"{side} px, {size / 1000:.0f} KB: {median(ratios):.1%} of the bound ({each}), {cpu / rows * 1000:.2f} ms of "
                f"processor a row, peak {peak:.0f} MB"
            )
        few, many = (run_round(Path(folder) / "336", n, concurrency)["peak_mb"] for n in (1000, 4000))
        print(f"peak memory at 1,000 rows {few:.0f} MB, at 4,000 rows {many:.0f} MB: ratio {many / few:.2f}")
        faulty = run_round(Path(folder) / "336", rows, concurrency, faults=0.07)
        server, statuses = faulty["server"], {int(status): n for status, n in faulty["server"]["statuses"].items()}
        print(
            f"with faults: {faulty['answers']:,} of {rows:,} rows answered, {server['answered']:,} by the server's count, "
            f"{statuses.get(429, 0)} times 429, {statuses.get(500, 0)} times 500, {server['needless']} needless retries, "
            f"{rows / faulty['seconds'] / bound:.1%} of the bound"
        )


if __name__ == "__main__":
    main()
