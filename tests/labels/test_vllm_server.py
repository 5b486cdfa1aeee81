import contextlib
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from addressvlm import InputError
from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.vllm_server import serving

# What starting and stopping sees of vLLM: a module of its name that serves /health, with a child that does not end by itself.
SERVER = """
import http.server, os, signal, subprocess, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "refuse" in options["--model"]:
    sys.exit("ValueError: no such model")
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{os.getpid()} {child.pid} {' '.join(sys.argv[1:])}".encode()
        self.send_response(503 if "never" in options["--model"] else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path of interpreters that holds a module of that name."""
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(SERVER, encoding="utf-8")
    here = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(here)]))
    return tmp_path


def config(**settings: object) -> LabelsConfig:
    return LabelsConfig(labeler="vllm", **{"model": "owner/model", "vllm_start_s": 60.0, **settings})


def server_of(base_url: str) -> tuple[list[psutil.Process], list[str]]:
    """The server's processes and its arguments, in its own words."""
    with urllib.request.urlopen(f"{base_url.removesuffix('/v1')}/health", timeout=10) as answer:
        first, second, *arguments = answer.read().decode().split()
    return [psutil.Process(int(pid)) for pid in (first, second)], arguments


def ended(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=60)[1]


def test_it_serves_in_the_block_and_is_gone_after_it(vllm: Path) -> None:
    with serving(
        config(tensor_parallel=2, gpus_per_worker=2.0, vllm_arguments=["--max-model-len", "512"]), vllm / "log"
    ) as base_url:
        processes, arguments = server_of(base_url)
    assert ended(processes)
    assert arguments == [
        "--model", "owner/model", "--served-model-name", "owner/model", "--host", "127.0.0.1", "--port",
        base_url.split(":")[2].removesuffix("/v1"), "--dtype", "auto", "--tensor-parallel-size", "2", "--max-model-len", "512",
    ]  # fmt: skip
    with pytest.raises(urllib.error.URLError):
        server_of(base_url)


def test_it_is_gone_after_an_error(vllm: Path) -> None:
    processes: list[psutil.Process] = []
    with contextlib.suppress(KeyboardInterrupt), serving(config(), vllm / "log") as base_url:
        processes = server_of(base_url)[0]
        raise KeyboardInterrupt
    assert processes
    assert ended(processes)


def test_it_is_gone_when_its_job_is_killed(vllm: Path) -> None:
    script = (
        "import sys\nfrom addressvlm.config.labels import LabelsConfig\nfrom addressvlm.labels.vllm_server import serving\n"
        "with serving(LabelsConfig(model='m')) as url:\n    print(url, flush=True)\n    sys.stdin.read()\n"
    )
    job = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with job:
        assert job.stdout is not None
        processes, _ = server_of(job.stdout.readline().strip())
        job.kill()
    assert ended(processes)


def test_a_server_that_does_not_come_up(vllm: Path) -> None:
    with (
        pytest.raises(InputError, match=r"ended with code 1 .*ValueError: no such model.*log"),
        serving(config(model="refuse"), vllm / "log"),
    ):
        pytest.fail("it is not there")
    with (
        pytest.raises(InputError, match=r"not ready after 2 s.*labels\.vllm_start_s"),
        serving(config(model="never", vllm_start_s=2.0), vllm / "log"),
    ):
        pytest.fail("it is not well")


def test_a_model_needs_the_gpus_that_share_it() -> None:
    with pytest.raises(ValueError, match=r"gpus_per_worker is 1 and .* 2 GPUs: set gpus_per_worker to tensor_parallel"):
        config(tensor_parallel=2, gpus_per_worker=1.0)


def test_an_interpreter_without_vllm(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vLLM is not installed for .*labels\.vllm_python"), serving(config()):
        pytest.fail("it is not there")
    with (
        pytest.raises(InputError, match=r"labels\.vllm_python: .*nowhere can't be run"),
        serving(config(vllm_python=str(tmp_path / "nowhere"))),
    ):
        pytest.fail("it is not there")
