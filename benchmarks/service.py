"""The service against other servers of the same model, and against its own bare engine: requests a second, p50 and p95.

    python benchmarks/service.py runs/my-city/models/addressvlm/merged data/photos
    python benchmarks/service.py … --vllm-python ~/vllm/bin/python --vllm-folder /tmp/for-vllm --out service.json

All servers are up at once and take turns, with 16 clients that each wait for an answer before they ask again. No photo is
given twice to a server within a workload, so that nothing is gained by remembering answers. Workloads:

    localize   a photo's address: `/v1/localize` with probabilities of all addresses, others generate it
    chat       a photo and one of the test questions (generation, judgment, choice; street and district)
    dialogue   seven questions about each photo, each a request of its own with the photo in it

The median of the rounds' ratios counts; that of CPU time is shown beside it, which a busy machine disturbs less.
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
QUESTIONS = 7  # about a photo in a dialogue
WARM_UP = 4  # photos, before the first round


@dataclass(frozen=True)
class Measured:
    """One round of one workload on one contestant."""

    contestant: str
    workload: str
    round: int
    requests: int
    wall_s: float
    cpu_s: float
    p50_s: float
    p95_s: float


Request = tuple[bytes, str]  # encoded photo, question


async def load(server: Server, ask: str, requests: Sequence[Request], clients: int) -> list[float]:
    """Seconds of each request, with so many clients at a time."""
    waiting, seconds = iter(requests), []

    async def client(http: httpx.AsyncClient) -> None:
        for photo, question in waiting:
            begun = time.perf_counter()
            await getattr(server, ask)(http, photo, question)
            seconds.append(time.perf_counter() - begun)

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return seconds


def measure(server: Server, workload: str, number: int, requests: Sequence[Request], clients: int) -> Measured:
    """One round on a server."""
    cpu, begun = server.cpu_s(), time.perf_counter()
    seconds = asyncio.run(load(server, "localize" if workload == "localize" else "chat", requests, clients))
    wall, cpu = time.perf_counter() - begun, server.cpu_s() - cpu
    p50, p95 = np.quantile(seconds, [0.5, 0.95])
    return Measured(server.name, workload, number, len(seconds), wall, cpu, float(p50), float(p95))


def measure_bare(bare: Bare, number: int, photos: Sequence[Path]) -> Measured:
    """One round on the engine alone; its batches have no latency to speak of."""
    took = bare.run(photos)
    return Measured(bare.name, "localize", number, len(photos), took["wall_s"], took["cpu_s"], float("nan"), float("nan"))


def requests_of(workload: str, photos: Sequence[Path], gazetteer: Gazetteer, rng: random.Random) -> list[Request]:
    """What is asked about the photos: the address, one test question of any kind, or seven."""
    made: list[Request] = []
    for path in photos:
        photo = path.read_bytes()
        asked = [turn["question"] for turn in evaluation_rounds(rng.choice(gazetteer.addresses), gazetteer, rng)]
        if workload == "localize":
            asked = [ADDRESS_QUESTION]
        elif workload == "chat":
            asked = [rng.choice(asked)]
        made += [(photo, question) for question in asked[:QUESTIONS]]
    return made


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


def run(args: argparse.Namespace) -> list[Measured]:
    """All rounds, the contestants one after the other in each."""
    gazetteer = Gazetteer.load(args.folder / "gazetteer.geojson")
    photos = sorted(path for path in args.photos_folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    sizes = {"localize": args.photos, "chat": args.photos, "dialogue": max(args.photos // QUESTIONS, 1)}
    sizes = {workload: sizes[workload] for workload in args.workloads}
    measured = []
    with ExitStack() as open_now:
        work = Path(
            open_now.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)) if not args.logs else args.logs
        )
        work.mkdir(exist_ok=True, parents=True)
        makers: list[Callable[[], Server]] = [
            lambda: Ours(args.folder, args.threads, args.dtype, work, **json.loads(args.settings))
        ]
        if not args.without_transformers:
            makers.append(lambda: transformers_serve(args.folder, args.threads, args.dtype, work))
        if args.vllm_python:
            makers.append(lambda: vllm(args.vllm_folder or args.folder, args.threads, args.dtype, work, args.vllm_python))
        servers = [open_now.enter_context(make()) for make in makers]
        bare = open_now.enter_context(Bare(args.folder, args.threads, args.dtype))
        for workload, number, chosen in portions(photos, sizes, args.rounds):
            requests = requests_of(workload, chosen, gazetteer, random.Random(f"{SEED}{workload}{number}"))
            for server in servers:
                measured.append(measure(server, workload, number, requests, args.clients))
                print(_line(measured[-1]), flush=True)
            if workload == "localize":
                measured.append(measure_bare(bare, number, chosen))
                print(_line(measured[-1]), flush=True)
    return [m for m in measured if m.round >= 0]


def ratios(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Ours against each other contestant: the median over rounds of throughput and of CPU time a request."""
    by = {(m.workload, m.contestant, m.round): m for m in measured}
    made = []
    for workload, contestant in sorted({(m.workload, m.contestant) for m in measured if m.contestant != "ours"}):
        pairs = [(by[workload, "ours", n], m) for (w, c, n), m in by.items() if (w, c) == (workload, contestant)]
        speed = [(ours.requests / ours.wall_s) / (other.requests / other.wall_s) for ours, other in pairs]
        cpu = [(other.cpu_s / other.requests) / (ours.cpu_s / ours.requests) for ours, other in pairs]
        row = {
            "workload": workload,
            "against": contestant,
            "throughput": statistics.median(speed),
            "cpu": statistics.median(cpu),
        }
        made.append({**row, "least": min(speed), "most": max(speed)})
    return made


def _line(m: Measured) -> str:
    when = "warm-up" if m.round < 0 else f"round {m.round + 1}"
    speed = f"{m.requests / m.wall_s:7.2f} requests/s  p50 {m.p50_s:6.2f} s  p95 {m.p95_s:6.2f} s"
    return f"{m.workload:9} {when:8} {m.contestant:18} {speed}  {m.cpu_s / m.requests:6.3f} CPU s a request"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="merged model with a gazetteer")
    parser.add_argument("photos_folder", type=Path, help="photos to ask about, anywhere below it")
    parser.add_argument("--photos", type=int, default=48, help="requests of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="of each contestant's model")
    parser.add_argument("--dtype", default="auto", help="of all contestants; auto: what each takes by itself")
    parser.add_argument("--workloads", nargs="+", default=["localize", "chat", "dialogue"])
    parser.add_argument("--settings", default="{}", help="further settings of our service, as JSON")
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--vllm-python", help="a Python with vllm; without it vllm is left out")
    parser.add_argument("--vllm-folder", type=Path, help="the same model in the names that vllm reads")
    parser.add_argument("--logs", type=Path, help="where the servers' output goes")
    parser.add_argument("--out", type=Path, help="everything measured, as JSON")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # leaves no server behind
    measured = run(args)
    table = ratios(measured)
    for row in table:
        spread = f"{row['throughput']:5.2f} x throughput ({row['least']:.2f} to {row['most']:.2f})"
        print(f"{row['workload']:9} ours / {row['against']:18} {spread}, {row['cpu']:5.2f} x by CPU time")
    if args.out:
        args.out.write_text(json.dumps({"ratios": table, "measured": [asdict(m) for m in measured]}, indent=1))


if __name__ == "__main__":
    main()
