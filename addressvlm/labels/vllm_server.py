"""A vLLM server for the duration of a job, which ends with it whatever happens.

with serving(config) as base_url:
    ...  # OpenAILabeler with labels.base_url = base_url
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from addressvlm.config.labels import LabelsConfig
from addressvlm.errors import InputError

POLL_S = 0.5
STOP_S = 30.0  # then the server is killed
GRACE_S = 15.0  # between SIGTERM and SIGKILL
LOG_LINES = 5  # the last ones, in an error


@contextmanager
def serving(config: LabelsConfig, log: Path | None = None) -> Iterator[str]:
    """The base URL of an OpenAI-compatible server of `labels.model` under that name.

    The server ends with the block, and with this process if that is killed.

    Args:
        log: the server's output; default: a new temporary file.

    Raises:
        InputError: vLLM isn't installed for the interpreter, or the server doesn't come up in `labels.vllm_start_s`.
    """
    python = config.vllm_python or sys.executable
    check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        installed = subprocess.run([python, "-c", check], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise InputError(f"labels.vllm_python: {python} can't be run ({error.strerror}): give a Python interpreter.") from None
    if not installed:
        raise InputError(
            f"vLLM is not installed for {python}: install it there, or set labels.vllm_python to an interpreter that has it."
        )
    if log is None:
        with tempfile.NamedTemporaryFile(prefix="vllm-", suffix=".log", delete=False) as file:
            log = Path(file.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [
        sys.executable, "-c", f"import sys; sys.path = {sys.path}; from {__name__} import guard; guard()",
        python, "-m", "vllm.entrypoints.openai.api_server",
        "--model", config.model, "--served-model-name", config.model,
        "--host", "127.0.0.1", "--port", str(port),
        "--dtype", config.dtype, "--tensor-parallel-size", str(config.tensor_parallel),
        *config.vllm_arguments,
    ]  # fmt: skip
    with (
        log.open("ab") as out,
        # In a session of its own: Ctrl-C reaches only this process, which then ends the server.
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True) as process,
    ):
        try:
            _wait(process, port, config.vllm_start_s, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            if process.stdin is not None:
                process.stdin.close()  # the guard ends the server
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(process: "subprocess.Popen[bytes]", port: int, limit_s: float, log: Path) -> None:
    """Return when the server answers its health check."""
    problem, advice = f"was not ready after {limit_s:g} s", ", or raise labels.vllm_start_s"
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            problem, advice = f"ended with code {process.wait(POLL_S)} before it was ready", ""
            break
        except subprocess.TimeoutExpired:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except OSError:  # not listening yet, or an error status
                continue
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    end = " / ".join(lines[-LOG_LINES:])[-500:] or "its log is empty"
    raise InputError(f"the vLLM server {problem} ({end}): see {log}{advice}.")


def guard() -> None:
    """Run the command in the arguments until standard input closes, as it does when the parent dies; exit with its status.

    Then the command and its children are ended.
    """
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def signal_group(number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)

    def end_with_parent() -> None:
        while os.read(0, 1024):
            pass
        signal_group(signal.SIGTERM)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            signal_group(signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    code = process.wait()
    signal_group(signal.SIGKILL)  # children that outlive the command
    sys.exit(code if code >= 0 else 128 - code)
