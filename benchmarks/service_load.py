"""Test the service under overload, when a replica dies, and during an update: responses, latency and memory.

    python benchmarks/service_load.py runs/demo/models/addressvlm/merged photos/ --minutes 10

Measures the capacity with a few clients, then sends 1.5 times as many requests per second, whether responses come or not. Half
way through a model replica is killed; after the overload the service is updated at half the capacity. Prints the responses by
status per phase, the memory of all processes over time, and the time from the overload until latency is normal again.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import ray
from ray import serve as ray_serve

import serve as service

PORT = 8123
CLIENTS = 8  # to measure the capacity
PROBE_S = 1.0


@dataclass
class Phase:
    """The responses in one part of the run."""

    name: str
    start: float = field(default_factory=time.monotonic)
    duration_s: float = 0.0  # of sending; responses may come later
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Counts, rate and latencies."""
        cuts = statistics.quantiles(self.seconds, n=20) if len(self.seconds) > 1 else [0.0] * 19
        return {
            "phase": self.name,
            "seconds": round(self.duration_s, 1),
            "responses": dict(sorted(self.statuses.items())),
            "good per second": round(self.statuses["200"] / self.duration_s, 2),
            "p50 s": round(cuts[9], 2),
            "p95 s": round(cuts[18], 2),
        }


class Load:
    """Clients of one service."""

    def __init__(self, photos: list[bytes]) -> None:
        self.photos = itertools.cycle(photos)
        self.client = aiohttp.ClientSession(
            f"http://127.0.0.1:{PORT}", timeout=aiohttp.ClientTimeout(120), connector=aiohttp.TCPConnector(limit=0)
        )
        self.pending: set[asyncio.Task[None]] = set()

    async def ask(self, phase: Phase) -> None:
        """Localize one photo."""
        start = time.monotonic()
        try:
            async with self.client.post("/v1/localize", data=_form(next(self.photos))) as response:
                await response.read()
                is_own = response.status != 503 or "Retry-After" in response.headers
                status = str(response.status) if is_own else "503 of Ray Serve"
        except (aiohttp.ClientError, TimeoutError) as error:
            status = type(error).__name__
        phase.statuses[status] += 1
        if status == "200":
            phase.seconds.append(time.monotonic() - start)

    async def saturate(self, phase: Phase, seconds: float) -> Phase:
        """Clients that send the next request as soon as they have a response."""

        async def client() -> None:
            while time.monotonic() - phase.start < seconds:
                await self.ask(phase)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        phase.duration_s = time.monotonic() - phase.start
        return phase

    async def arrive(self, phase: Phase, rate: float, seconds: float) -> Phase:
        """Send requests at a fixed rate, whether responses come or not."""
        for number in itertools.count():
            due = phase.start + number / rate
            if due - phase.start > seconds:
                break
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self.ask(phase))
            self.pending.add(task)
            task.add_done_callback(self.pending.discard)
        phase.duration_s = time.monotonic() - phase.start
        return phase

    async def settle(self) -> None:
        """Wait for all responses."""
        while self.pending:
            await asyncio.wait(self.pending)


async def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a merged model with a gazetteer")
    parser.add_argument("photos", type=Path, help="a folder of photos")
    parser.add_argument("--minutes", type=float, default=10, help="of overload")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="settings of the service")
    args = parser.parse_args(argv)
    photos = [file.read_bytes() for file in sorted(args.photos.glob("*.jpg"))[:200]]
    if not photos:
        sys.exit(f"error: no *.jpg in {args.photos}")
    settings = {"model": args.model, "min_replicas": 2, "max_replicas": 2, "num_cpus": 0.5}
    settings |= dict(pair.split("=", 1) for pair in args.set)
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False)
    ray_serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    try:
        deploy(settings)
        load = Load(photos)
        async with load.client:
            await run(load, args.minutes * 60, settings)
    finally:
        ray_serve.shutdown()
        ray.shutdown()


async def run(load: Load, seconds: float, settings: dict[str, Any]) -> None:
    """Run all phases."""
    await load.saturate(Phase("warm"), 10)
    capacity = report(await load.saturate(Phase("capacity"), 30))["good per second"]
    before = await latency(load)
    memory: list[tuple[float, float]] = []
    watch = asyncio.create_task(watch_memory(memory))
    first = await load.arrive(Phase("overload"), 1.5 * capacity, seconds / 2)
    ray.kill(replica())
    killed = await load.arrive(Phase("overload, a replica killed at its beginning"), 1.5 * capacity, seconds / 2)
    end = time.monotonic()
    await load.settle()
    report(first)
    report(killed)
    while await latency(load, 1) > 2 * before:
        await asyncio.sleep(PROBE_S)
    print(f"recovered {time.monotonic() - end:.1f} s after the overload (latency of a single request before: {before:.2f} s)")
    updated = Phase("half the capacity, updated meanwhile")
    requests = asyncio.create_task(load.arrive(updated, capacity / 2, 60))
    await asyncio.to_thread(deploy, settings | {"batch_wait_s": 0.02})
    await requests
    await load.settle()
    report(updated)
    watch.cancel()
    print("memory of all processes, MB: " + ", ".join(f"{s:.0f} s {mb:.0f}" for s, mb in memory[:: max(1, len(memory) // 12)]))


def _form(photo: bytes) -> aiohttp.FormData:
    form = aiohttp.FormData()
    form.add_field("file", photo, filename="photo.jpg", content_type="image/jpeg")
    return form


def deploy(settings: dict[str, Any]) -> None:
    """Deploy or update the service."""
    ray_serve.run(service.config(service.ServiceSettings.model_validate(settings)))


def report(phase: Phase) -> dict[str, Any]:
    """Print the results of a phase."""
    row = phase.row()
    print(json.dumps(row), flush=True)
    return row


async def latency(load: Load, times: int = 5) -> float:
    """Median latency of single requests in seconds; infinite if one is rejected."""
    phase = Phase("alone")
    for _ in range(times):
        await load.ask(phase)
    return statistics.median(phase.seconds) if len(phase.seconds) == times else float("inf")


def replica() -> Any:
    """An actor that holds the model."""
    names = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "#Localizer#" in actor["name"]]
    return ray.get_actor(names[0]["name"], namespace=names[0]["namespace"])


async def watch_memory(samples: list[tuple[float, float]]) -> None:
    """Sample the private memory of the service's processes every five seconds."""
    start = time.monotonic()
    while True:
        processes = [p for p in psutil.Process().children(recursive=True) if "ServeReplica" in " ".join(command_line(p))]
        samples.append((time.monotonic() - start, sum(private_bytes(p) for p in processes) / 1e6))
        await asyncio.sleep(5)


def command_line(process: psutil.Process) -> list[str]:
    """Its command line, empty if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def private_bytes(process: psutil.Process) -> float:
    """Memory that it does not share, 0 if it has ended."""
    try:
        return float(process.memory_full_info().uss)
    except psutil.Error:
        return 0.0


if __name__ == "__main__":
    asyncio.run(main())
