import itertools
import multiprocessing
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm.storage import http_client
from tests.support.clock import Clock


def _take(file: Path, turns: int, times: "multiprocessing.Queue[float]") -> None:
    ours = http_client.SharedRateLimiter(file, per_second=50)
    for _ in range(turns):
        ours.wait()
        times.put(time.time())


def test_processes_share_the_rate_limit(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    times: multiprocessing.Queue[float] = context.Queue()
    workers = [context.Process(target=_take, args=(tmp_path / "pace", 5, times)) for _ in range(3)]
    for worker in workers:
        worker.start()
    taken = sorted(times.get() for _ in range(15))
    for worker in workers:
        worker.join()
    assert taken[-1] - taken[0] >= 14 / 50 - 0.02


@settings(max_examples=30)
@given(pauses=st.lists(st.floats(0, 5), max_size=8), per_second=st.floats(0.5, 100))
def test_slots_are_an_interval_apart(tmp_path_factory: pytest.TempPathFactory, pauses: list[float], per_second: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(http_client, "time", clock)
        ours, slots = http_client.SharedRateLimiter(tmp_path_factory.mktemp("pace") / "pace", per_second), []
        for pause in [*pauses, 0.0]:
            paused_at = clock.now
            ours.pause(pause)
            ours.wait()
            assert clock.now >= paused_at + pause
            slots.append(clock.now)
    assert all(b - a >= 1 / per_second - 1e-9 for a, b in itertools.pairwise(slots))


def test_a_clock_set_back_does_not_block_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(http_client, "time", clock)
    (tmp_path / "pace").write_text(repr(clock.now + 1e6))
    http_client.SharedRateLimiter(tmp_path / "pace", 10).wait()
    assert clock.now == 1000.0
