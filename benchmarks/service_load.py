"""More than the service can take, a replica that dies, an update: what callers get, and what the service keeps.

    python benchmarks/service_load.py runs/demo/models/addressvlm/merged photos/ --minutes 10

Measures the capacity with few callers, then asks at 1.5 times of it for the given time, at fixed moments whether answers come
or not. In the middle of it a model replica is killed; after it the load goes on at half the capacity and the service is
updated. Prints counts by status a phase, the memory of all its processes over time, and how long after the end of the
overload an answer is as quick as before.
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
CALLERS = 8  # that measure the capacity
PROBE_S = 1.0


@dataclass
class Phase:
    """What callers got in one part of the run."""

    name: str
    begun: float = field(default_factory=time.monotonic)
    asked_s: float = 0.0  # how long it asked; answers may come later
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Counts, rate and latencies."""
        cuts = statistics.quantiles(self.seconds, n=20) if len(self.seconds) > 1 else [0.0] * 19
        return {
            "phase": self.name,
            "seconds": round(self.asked_s, 1),
            "answers": dict(sorted(self.statuses.items())),
            "good a second": round(self.statuses["200"] / self.asked_s, 2),
            "p50 s": round(cuts[9], 2),
            "p95 s": round(cuts[18], 2),
        }


class Load:
    """Callers of one service."""

    def __init__(self, photos: list[bytes]) -> None:
        self.photos = itertools.cycle(photos)
        self.client = aiohttp.ClientSession(
            f"http://127.0.0.1:{PORT}", timeout=aiohttp.ClientTimeout(120), connector=aiohttp.TCPConnector(limit=0)
        )
        self.under_way: set[asyncio.Task[None]] = set()

    async def ask(self, phase: Phase) -> None:
        """One photo."""
        begun = time.monotonic()
        try:
            async with self.client.post("/v1/localize", data=_form(next(self.photos))) as response:
                await response.read()
                ours = response.status != 503 or "Retry-After" in response.headers
                status = str(response.status) if ours else "503 of Ray Serve"
        except (aiohttp.ClientError, TimeoutError) as error:
            status = type(error).__name__
        phase.statuses[status] += 1
        if status == "200":
            phase.seconds.append(time.monotonic() - begun)

    async def saturate(self, phase: Phase, seconds: float) -> Phase:
        """Callers that ask again as soon as they are answered."""

        async def caller() -> None:
            while time.monotonic() - phase.begun < seconds:
                await self.ask(phase)

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        phase.asked_s = time.monotonic() - phase.begun
        return phase

    async def arrive(self, phase: Phase, rate: float, seconds: float) -> Phase:
        """So many requests a second, whatever becomes of them."""
        for number in itertools.count():
            at = phase.begun + number / rate
            if at - phase.begun > seconds:
                break
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            task = asyncio.create_task(self.ask(phase))
            self.under_way.add(task)
            task.add_done_callback(self.under_way.discard)
        phase.asked_s = time.monotonic() - phase.begun
        return phase

    async def settle(self) -> None:
        """Until all that was asked is answered."""
        while self.under_way:
            await asyncio.wait(self.under_way)


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
    """All phases, one after the other."""
    await load.saturate(Phase("warm"), 10)
    capacity = tell(await load.saturate(Phase("capacity"), 30))["good a second"]
    before = await quickness(load)
    memory: list[tuple[float, float]] = []
    watch = asyncio.create_task(watch_memory(memory))
    first = await load.arrive(Phase("overload"), 1.5 * capacity, seconds / 2)
    ray.kill(replica())
    killed = await load.arrive(Phase("overload, a replica killed at its beginning"), 1.5 * capacity, seconds / 2)
    over = time.monotonic()
    await load.settle()
    tell(first)
    tell(killed)
    while await quickness(load, 1) > 2 * before:
        await asyncio.sleep(PROBE_S)
    print(f"recovered {time.monotonic() - over:.1f} s after the overload (one photo alone took {before:.2f} s before)")
    updated = Phase("half the capacity, updated meanwhile")
    asking = asyncio.create_task(load.arrive(updated, capacity / 2, 60))
    await asyncio.to_thread(deploy, settings | {"batch_wait_s": 0.02})
    await asking
    await load.settle()
    tell(updated)
    watch.cancel()
    print("memory of all processes, MB: " + ", ".join(f"{s:.0f} s {mb:.0f}" for s, mb in memory[:: max(1, len(memory) // 12)]))


def _form(photo: bytes) -> aiohttp.FormData:
    form = aiohttp.FormData()
    form.add_field("file", photo, filename="photo.jpg", content_type="image/jpeg")
    return form


def deploy(settings: dict[str, Any]) -> None:
    """Begin to serve, or update what is served."""
    ray_serve.run(service.config(service.ServiceSettings.model_validate(settings)))


def tell(phase: Phase) -> dict[str, Any]:
    """Print a phase."""
    row = phase.row()
    print(json.dumps(row), flush=True)
    return row


async def quickness(load: Load, times: int = 5) -> float:
    """Median seconds of one photo alone; endless if one is refused."""
    phase = Phase("alone")
    for _ in range(times):
        await load.ask(phase)
    return statistics.median(phase.seconds) if len(phase.seconds) == times else float("inf")


def replica() -> Any:
    """An actor that holds the model."""
    names = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "#Localizer#" in actor["name"]]
    return ray.get_actor(names[0]["name"], namespace=names[0]["namespace"])


async def watch_memory(found: list[tuple[float, float]]) -> None:
    """Note memory that the service's processes have for themselves, every five seconds."""
    begun = time.monotonic()
    while True:
        processes = [p for p in psutil.Process().children(recursive=True) if "ServeReplica" in " ".join(safe(p))]
        found.append((time.monotonic() - begun, sum(own(p) for p in processes) / 1e6))
        await asyncio.sleep(5)


def safe(process: psutil.Process) -> list[str]:
    """Its command line, empty if it has gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def own(process: psutil.Process) -> float:
    """Bytes that are its own, 0 if it has gone."""
    try:
        return float(process.memory_full_info().uss)
    except psutil.Error:
        return 0.0


if __name__ == "__main__":
    asyncio.run(main())
