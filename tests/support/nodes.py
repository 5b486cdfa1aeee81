"""Three Ray nodes on this machine, as three machines would be: a head that takes no tasks and two with a CPU each."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from uuid import uuid4

import psutil

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
DEADLINE_S = 1800.0
STARTS = 8  # of a node
WAITS = {  # a node whose process is gone refuses connections and is dead after a second; one that is only slow has minutes
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "120000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_keepalive_timeout_ms": "120000",
    "RAY_gcs_rpc_server_connect_timeout_s": "120",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "300",
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_raylet_start_wait_time_s": "60",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "PYTHONUNBUFFERED": "1",  # or `ray start --block` says nothing
}


class Node:
    """One `ray start`."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self._environment = environment
        self._command = [
            str(PROGRAMS / "ray"),
            "start",
            "--block",
            "--disable-usage-stats",
            "--object-store-memory=80000000",
            *arguments,
        ]
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def up(self) -> "Node":
        """Wait until it belongs to the cluster.

        A raylet whose agents take longer than 15 s to start dies, and no setting gives them more: then once more.
        """
        for _ in range(STARTS):
            text = []
            assert self._process.stdout is not None
            for line in self._process.stdout:
                text.append(line)
                if "Ray runtime started" in line:
                    return self
            self.kill()
            self._process = self._start()
        self.kill()
        raise AssertionError("".join(text))

    def works(self, on: str) -> bool:
        """Whether a worker of this node is called so: `ray::` and the class or function that it runs."""
        return any(on in word for process in self._all() for word in _words(process))

    def kill(self) -> None:
        """kill -9 to the raylet and everything that it started."""
        for process in self._all():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _all(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            return [process, *process.children(recursive=True)]
        return []


class Nodes:
    """The cluster: `environment` makes a process use it."""

    def __init__(self, folder: Path) -> None:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid4().hex}
        here = {"PYTHONPATH": str(REPOSITORY), "RAY_TMPDIR": str(folder), "RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
        self.environment = {**os.environ, **token, **WAITS, **here}
        self._nodes: list[Node] = []  # the head first
        self._replacing = threading.Lock()

    def start(self) -> None:
        """One after the other: nodes that start at the same moment choose the same sockets."""
        ports = [f"--port={self._port()}", f"--ray-client-server-port={free_port()}", f"--dashboard-port={free_port()}"]
        self._nodes.append(self._node("--head", "--num-cpus=0", "--include-dashboard=false", *ports).up())
        for _ in range(2):
            self._nodes.append(self._another().up())

    def _port(self) -> str:
        return self.environment["RAY_ADDRESS"].partition(":")[2]

    def _node(self, *arguments: str) -> Node:
        return Node(self.environment, "--node-ip-address=127.0.0.1", *arguments)

    def _another(self) -> Node:
        return self._node(f"--address={self.environment['RAY_ADDRESS']}", "--num-cpus=1")

    def replace(self, on: str) -> None:
        """Kill -9 the first node that works on this, as soon as one does, and put another into its place; one at a time."""
        with self._replacing:
            number = self.lose(on)
            self._nodes.insert(number, self._another().up())

    def lose(self, on: str) -> int:
        """Kill -9 the first node that works on this, as soon as one does; its number."""
        wait_for(lambda: any(node.works(on) for node in self._nodes[1:]))
        lost = next(node for node in self._nodes[1:] if node.works(on))
        number = self._nodes.index(lost)
        lost.kill()
        del self._nodes[number]
        return number

    def close(self) -> None:
        for node in reversed(self._nodes):
            node.kill()


@contextmanager
def running() -> Iterator[Nodes]:
    """Three nodes with ports, a token and a temporary folder of their own; other Rays on the machine don't see them."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # paths of sockets are short
    nodes = Nodes(folder)
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.close()
        rmtree(folder, ignore_errors=True)


def wait_for(reached: Callable[[], object], alive: subprocess.Popen[str] | None = None) -> None:
    """Look every few milliseconds whether it is so; the process, if one is given, must live until then."""
    pace = threading.Event()  # never set
    for _ in range(int(DEADLINE_S / 0.01)):
        if reached():
            return
        assert alive is None or alive.poll() is None, "the job ended too early"
        pace.wait(0.01)
    raise AssertionError("it never came")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _words(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []
