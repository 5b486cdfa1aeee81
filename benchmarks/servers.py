"""The servers that benchmarks/service.py compares, each a process on a free port, and the engine alone in a process.

All have the same model folder, dtype setting and number of threads.
"""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 300
MAX_TOKENS = 32  # of an answer
BATCH_SIZE = 16


class Server:
    """An HTTP server; a context manager starts and ends its process.

    Args:
        name: its name in the table.
        command: with `{port}` for the port.
        ready: path that returns 200 when the server is ready.
        model: name of the model in chat requests.
    """

    def __init__(self, name: str, command: Sequence[str], ready: str, model: str, threads: int, log: Path) -> None:
        self.name, self.ready, self.model, self.log = name, ready, model, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.command = [part.replace("{port}", str(port)) for part in command]
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

    def __enter__(self) -> Self:
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                self.command, stdout=out, stderr=out, env=self.environment, cwd=ROOT, start_new_session=True
            )
        for _ in range(START_TIMEOUT_S):
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended with {self.process.returncode}: see {self.log}")
            try:
                if httpx.get(self.url + self.ready, timeout=5).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(1)
        self.__exit__()
        raise SystemExit(f"{self.name} did not answer within {START_TIMEOUT_S} s: see {self.log}")

    def __exit__(self, *_: object) -> None:
        processes = _with_children(self.process.pid)
        self.process.send_signal(signal.SIGINT)
        psutil.wait_procs(processes, timeout=30)
        for process in processes:
            if process.is_running():
                process.kill()
        self.process.wait()

    def cpu_s(self) -> float:
        """CPU seconds of its processes so far."""
        total = 0.0
        for process in _with_children(self.process.pid):
            try:
                used = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += used.user + used.system
        return total

    async def localize(self, client: httpx.AsyncClient, photo: bytes, question: str) -> str:
        """The address of a photo, by a chat request."""
        return await self.chat(client, photo, question)

    async def chat(self, client: httpx.AsyncClient, photo: bytes, question: str) -> str:
        """The answer to one question about one photo."""
        image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(photo).decode()}"}}
        turn = {"role": "user", "content": [image, {"type": "text", "text": question}]}
        body = {"model": self.model, "messages": [turn], "max_tokens": MAX_TOKENS, "temperature": 0}
        response = await client.post(f"{self.url}/v1/chat/completions", json=body)
        return str(_checked(response)["choices"][0]["message"]["content"])


class Ours(Server):
    """The service of this repository, as `serve run` starts it from a YAML file."""

    def __init__(self, folder: Path, threads: int, dtype: str, work: Path, **settings: Any) -> None:
        command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", "local", str(work / "ours.yaml")]
        super().__init__("ours", command, "/healthz", "addressvlm", threads, work / "ours.log")
        args = {
            "model": str(folder),
            "dtype": dtype,
            "num_cpus": threads,
            "max_replicas": 1,
            "max_ongoing_requests": 64,
            **settings,
        }
        deployed = {
            "http_options": {"host": "127.0.0.1", "port": int(self.url.rpartition(":")[2])},
            "applications": [{"name": "addressvlm", "route_prefix": "/", "import_path": "serve:config", "args": args}],
        }
        (work / "ours.yaml").write_text(yaml.safe_dump(deployed))

    async def localize(self, client: httpx.AsyncClient, photo: bytes, question: str) -> str:
        """The address of a photo, from its own route, with probabilities over all addresses."""
        response = await client.post(f"{self.url}/v1/localize", files={"file": ("photo.jpg", photo)})
        best = _checked(response)["candidates"][0]
        return f"{best['street']}, {best['district']}"


def transformers_serve(folder: Path, threads: int, dtype: str, work: Path) -> Server:
    """`transformers serve` with its default settings."""
    cli = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    options = ["--host", "127.0.0.1", "--port", "{port}", "--device", "cpu", "--dtype", dtype]
    return Server(
        "transformers serve", [*cli, "serve", str(folder), *options], "/health", str(folder), threads, work / "transformers.log"
    )


def vllm(folder: Path, threads: int, dtype: str, work: Path, python: str) -> Server:
    """vLLM's OpenAI server from its own environment."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "model"]
    options = ["--host", "127.0.0.1", "--port", "{port}", "--dtype", dtype, "--gpu-memory-utilization", "0.2"]
    limits = ["--max-model-len", "1024", "--max-num-seqs", str(BATCH_SIZE)]
    server = Server("vllm", [*command, *options, *limits], "/health", "model", threads, work / "vllm.log")
    server.environment["PYTHONPATH"] = ""
    return server


class Bare:
    """The engine without a service: photos through `Localizer.localize_many` in batches."""

    name = "bare engine"

    def __init__(self, folder: Path, threads: int, dtype: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, str(folder), dtype]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(self, photos: Sequence[Path]) -> dict[str, float]:
        """Wall and CPU seconds for all photos."""
        self.process.stdin.write(json.dumps([str(photo) for photo in photos]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def _bare(folder: str, dtype: str) -> None:
    """The process of `Bare`: reads lines of paths, writes lines of seconds."""
    from PIL import Image

    from addressvlm.inference import Localizer

    localizer = Localizer(folder, dtype=dtype)
    for line in sys.stdin:
        photos = [Path(photo).read_bytes() for photo in json.loads(line)]
        wall, cpu = time.perf_counter(), time.process_time()
        for start in range(0, len(photos), BATCH_SIZE):
            images = [Image.open(BytesIO(photo)).convert("RGB") for photo in photos[start : start + BATCH_SIZE]]
            localizer.localize_many(images, 5)
        print(json.dumps({"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}), flush=True)


def _with_children(pid: int) -> list[psutil.Process]:
    try:
        head = psutil.Process(pid)
        return [head, *head.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _checked(response: httpx.Response) -> Any:
    if response.status_code != 200:
        raise SystemExit(f"{response.request.url} answered {response.status_code}: {response.text[:500]}")
    return response.json()


if __name__ == "__main__":
    _bare(sys.argv[1], sys.argv[2])
