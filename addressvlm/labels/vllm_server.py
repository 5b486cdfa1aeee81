"""A vLLM server of our own for the time of a job: started, waited for, and stopped whatever happens.

with serving(config) as base_url:
    …  # the openai engine, with labels.base_url = base_url
"""

import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from addressvlm.config.labels import LabelsConfig
from addressvlm.errors import InputError

POLL_S = 0.5
STOP_S = 30.0  # for the server to end, then it is killed
LAST_LINES = 5  # of its log, in an error


@contextmanager
def serving(config: LabelsConfig, log: Path | None = None) -> Iterator[str]:
    """The base URL of an OpenAI-compatible server of `labels.model` under that name.

    The server ends with the block, and with this process if that is killed.

    Args:
        log: what the server writes; default: a new file in the folder for temporary files.

    Raises:
        InputError: vLLM isn't installed for the interpreter, or the server doesn't come up in `labels.vllm_start_s`.
    """
    python = config.vllm_python or sys.executable
    _check_installed(python)
    if log is None:
        with tempfile.NamedTemporaryFile(prefix="vllm-", suffix=".log", delete=False) as file:
            log = Path(file.name)
    port = _free_port()
    leash = [sys.executable, str(Path(__file__).with_name("process_guard.py"))]
    command = [*leash, *_command(config, python, port)]
    with (
        log.open("ab") as out,
        # A session of its own: Ctrl-C is for this process, which then closes the leash.
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True) as process,
    ):
        try:
            _wait(process, port, config.vllm_start_s, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            if process.stdin is not None:
                process.stdin.close()  # the leash ends the server
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _command(config: LabelsConfig, python: str, port: int) -> list[str]:
    return [
        python, "-m", "vllm.entrypoints.openai.api_server",
        "--model", config.model, "--served-model-name", config.model,
        "--host", "127.0.0.1", "--port", str(port),
        "--dtype", config.dtype, "--tensor-parallel-size", str(config.tensor_parallel),
        *config.vllm_arguments,
    ]  # fmt: skip


def _check_installed(python: str) -> None:
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([python, "-c", look], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise InputError(f"labels.vllm_python: {python} can't be run ({error.strerror}): give a Python interpreter.") from None
    if not found:
        raise InputError(
            f"vLLM is not installed for {python}: install it there, or set labels.vllm_python to an interpreter that has it."
        )


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def _wait(process: "subprocess.Popen[bytes]", port: int, limit_s: float, log: Path) -> None:
    """Until the server says that it is well."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            code = process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            if _well(port):
                return
        else:
            raise InputError(f"the vLLM server ended with code {code} before it was ready ({_last(log)}): see {log}.")
    raise InputError(
        f"the vLLM server was not ready after {limit_s:g} s ({_last(log)}): see {log}, or raise labels.vllm_start_s."
    )


def _well(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _last(log: Path) -> str:
    """The last lines of a log, on one."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-LAST_LINES:])[-500:] or "it said nothing"
