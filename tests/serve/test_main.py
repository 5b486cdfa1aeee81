"""`python -m serve`: Ray, the service and its address by one command"""

import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from addressvlm import InputError
from serve import __main__ as command


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is asked of Ray, which is not there; the user interrupts as soon as all is up."""
    calls: list[tuple[Any, ...]] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    def record(name: str) -> Any:
        return lambda *given, **named: calls.append((name, *given, *named.values()))

    monkeypatch.setattr(command, "config", lambda settings: settings)
    monkeypatch.setattr(command, "connect", record("connect"))
    names = ("start", "run", "shutdown")
    monkeypatch.setattr(command, "ray_serve", SimpleNamespace(**{name: record(name) for name in names}))
    monkeypatch.setattr(command, "free_port", lambda: 8001)
    monkeypatch.setattr(command, "threading", SimpleNamespace(Event=lambda: SimpleNamespace(wait=interrupt)))
    return calls


def test_the_address_is_told_when_the_model_is_there_and_all_ends_with_an_interrupt(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve", "model=runs/x/models/addressvlm", "num_cpus=0.5"])
    command.main()
    assert [name for name, *_ in calls] == ["connect", "start", "run", "shutdown"]
    assert calls[1][1] == {"host": "127.0.0.1", "port": 8001}
    assert (calls[2][1].model, calls[2][1].num_cpus) == ("runs/x/models/addressvlm", 0.5)
    assert capsys.readouterr().out == "\nopen http://127.0.0.1:8001    (Ctrl-C ends it)\n"


def test_an_argument_without_a_value_and_a_service_that_does_not_start_are_sentences(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve", "runs/demo"])
    with pytest.raises(InputError, match="'runs/demo': write arguments as key=value"):
        command.main()
    monkeypatch.setattr(sys, "argv", ["serve"])

    def fail(_: object) -> None:
        raise RuntimeError("Deploying application default failed:\nno memory")

    monkeypatch.setattr(command.ray_serve, "run", fail)
    with pytest.raises(InputError, match=r"did not start \(Deploying application default failed: no memory\)"):
        command.main()


def test_a_port_in_use_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind((command.HOST, 0))
        taken.listen()
        first = taken.getsockname()[1]
        monkeypatch.setattr(command, "PORTS", range(first, first + 20))
        assert command.free_port() > first
        monkeypatch.setattr(command, "PORTS", range(first, first + 1))
        with pytest.raises(InputError, match="are all in use"):
            command.free_port()
