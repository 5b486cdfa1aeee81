"""Compare the service with other servers of the same model and with its engine alone: requests per second, p50 and p95.

    python benchmarks/service.py runs/my-city/models/addressvlm/merged data/photos
    python benchmarks/service.py … --vllm-python ~/vllm/bin/python --vllm-folder /tmp/for-vllm --out service.json

All servers run at the same time and are measured in turn, with 16 clients that wait for each answer. Within a workload no
server sees a photo twice, so caches do not help. Workloads:

    localize   the address of a photo: `/v1/localize` with probabilities of all addresses; others generate it
    chat       a photo and one of the test questions (generation, judgment, choice; street and district)
    dialogue   seven questions about each photo, each a request of its own with the photo in it

The result is the median ratio over the rounds, of throughput and of CPU time, which depends less on other load.
"""

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from servers import Bare, Ours, Server, transformers_serve, vllm

from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.questions import ADDRESS_QUESTION, evaluation_rounds

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
SEED = 0
QUESTIONS = 7  # per photo in a dialogue
WARM_UP = 4  # photos, before the first round


@dataclass(frozen=True)
class Measurement:
    """One round of one workload on one server."""

    server: str
    workload: str
    round: int
    requests: int
    wall_s: float
    cpu_s: float
    p50_s: float
    p95_s: float


Request = tuple[bytes, str]  # encoded photo, question


async def load(server: Server, ask: str, requests: Sequence[Request], clients: int) -> list[float]:
    """Seconds of each request, with concurrent clients."""
    queue, seconds = iter(requests), []

    async def client(http: httpx.AsyncClient) -> None:
        for photo, question in queue:
            start = time.perf_counter()
            await getattr(server, ask)(http, photo, question)
            seconds.append(time.perf_counter() - start)

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return seconds


def measure(server: Server, workload: str, number: int, requests: Sequence[Request], clients: int) -> Measurement:
    """One round on a server."""
    cpu, start = server.cpu_s(), time.perf_counter()
    seconds = asyncio.run(load(server, "localize" if workload == "localize" else "chat", requests, clients))
    wall, cpu = time.perf_counter() - start, server.cpu_s() - cpu
    p50, p95 = np.quantile(seconds, [0.5, 0.95])
    return Measurement(server.name, workload, number, len(seconds), wall, cpu, float(p50), float(p95))


def measure_bare(bare: Bare, number: int, photos: Sequence[Path]) -> Measurement:
    """One round on the engine alone, without latencies."""
    times = bare.run(photos)
    return Measurement(bare.name, "localize", number, len(photos), times["wall_s"], times["cpu_s"], float("nan"), float("nan"))


def requests_of(workload: str, photos: Sequence[Path], gazetteer: Gazetteer, rng: random.Random) -> list[Request]:
    """The requests about the photos: the address, one test question of any kind, or seven."""
    requests: list[Request] = []
    for path in photos:
        photo = path.read_bytes()
        questions = [turn["question"] for turn in evaluation_rounds(rng.choice(gazetteer.addresses), gazetteer, rng)]
        if workload == "localize":
            questions = [ADDRESS_QUESTION]
        elif workload == "chat":
            questions = [rng.choice(questions)]
        requests += [(photo, question) for question in questions[:QUESTIONS]]
    return requests


def portions(photos: Sequence[Path], sizes: dict[str, int], rounds: int) -> Iterator[tuple[str, int, list[Path]]]:
    """(workload, round, photos), no photo twice within a workload; round -1 warms up."""
    for workload, size in sizes.items():
        needed = WARM_UP + size * rounds
        if len(photos) < needed:
            raise SystemExit(
                f"{workload} needs {needed} different photos and there are {len(photos)}: fewer --rounds or --photos."
            )
        order = random.Random(f"{SEED}{workload}").sample(list(photos), needed)
        yield workload, -1, order[:WARM_UP]
        for number in range(rounds):
            yield workload, number, order[WARM_UP + number * size :][:size]


def run(args: argparse.Namespace) -> list[Measurement]:
    """All rounds, in each the servers one after the other."""
    gazetteer = Gazetteer.load(args.folder / "gazetteer.geojson")
    photos = sorted(path for path in args.photos_folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    sizes = {"localize": args.photos, "chat": args.photos, "dialogue": max(args.photos // QUESTIONS, 1)}
    sizes = {workload: sizes[workload] for workload in args.workloads}
    measurements = []
    with ExitStack() as stack:
        work = Path(
            stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)) if not args.logs else args.logs
        )
        work.mkdir(exist_ok=True, parents=True)
        makers: list[Callable[[], Server]] = [
            lambda: Ours(args.folder, args.threads, args.dtype, work, **json.loads(args.settings))
        ]
        if not args.without_transformers:
            makers.append(lambda: transformers_serve(args.folder, args.threads, args.dtype, work))
        if args.vllm_python:
            makers.append(lambda: vllm(args.vllm_folder or args.folder, args.threads, args.dtype, work, args.vllm_python))
        servers = [stack.enter_context(make()) for make in makers]
        bare = stack.enter_context(Bare(args.folder, args.threads, args.dtype))
        for workload, number, chosen in portions(photos, sizes, args.rounds):
            requests = requests_of(workload, chosen, gazetteer, random.Random(f"{SEED}{workload}{number}"))
            for server in servers:
                measurements.append(measure(server, workload, number, requests, args.clients))
                print(_line(measurements[-1]), flush=True)
            if workload == "localize":
                measurements.append(measure_bare(bare, number, chosen))
                print(_line(measurements[-1]), flush=True)
    return [m for m in measurements if m.round >= 0]


def ratios(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Our service over each other server: median over rounds of throughput and of CPU time per request."""
    by = {(m.workload, m.server, m.round): m for m in measurements}
    rows = []
    for workload, name in sorted({(m.workload, m.server) for m in measurements if m.server != "ours"}):
        pairs = [(by[workload, "ours", n], m) for (w, c, n), m in by.items() if (w, c) == (workload, name)]
        speed = [(ours.requests / ours.wall_s) / (other.requests / other.wall_s) for ours, other in pairs]
        cpu = [(other.cpu_s / other.requests) / (ours.cpu_s / ours.requests) for ours, other in pairs]
        row = {
            "workload": workload,
            "against": name,
            "throughput": statistics.median(speed),
            "cpu": statistics.median(cpu),
        }
        rows.append({**row, "least": min(speed), "most": max(speed)})
    return rows


def _line(m: Measurement) -> str:
    when = "warm-up" if m.round < 0 else f"round {m.round + 1}"
    speed = f"{m.requests / m.wall_s:7.2f} requests/s  p50 {m.p50_s:6.2f} s  p95 {m.p95_s:6.2f} s"
    return f"{m.workload:9} {when:8} {m.server:18} {speed}  {m.cpu_s / m.requests:6.3f} CPU s per request"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="merged model with a gazetteer")
    parser.add_argument("photos_folder", type=Path, help="folder of photos, searched recursively")
    parser.add_argument("--photos", type=int, default=48, help="requests per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="of each server's model")
    parser.add_argument("--dtype", default="auto", help="of all servers; auto: each one's default")
    parser.add_argument("--workloads", nargs="+", default=["localize", "chat", "dialogue"])
    parser.add_argument("--settings", default="{}", help="further settings of our service, as JSON")
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--vllm-python", help="a Python with vllm; without it vllm is not measured")
    parser.add_argument("--vllm-folder", type=Path, help="the same model, written by addressvlm.tools.export_vllm")
    parser.add_argument("--logs", type=Path, help="folder of the servers' output")
    parser.add_argument("--out", type=Path, help="all measurements, as JSON")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # leaves no server behind
    measurements = run(args)
    table = ratios(measurements)
    for row in table:
        spread = f"{row['throughput']:5.2f} x throughput ({row['least']:.2f} to {row['most']:.2f})"
        print(f"{row['workload']:9} ours / {row['against']:18} {spread}, {row['cpu']:5.2f} x by CPU time")
    if args.out:
        args.out.write_text(json.dumps({"ratios": table, "measured": [asdict(m) for m in measurements]}, indent=1))


if __name__ == "__main__":
    main()
