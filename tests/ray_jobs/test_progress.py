"""What a job shows while it works"""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from ray_jobs import progress, ray_train
from ray_jobs.progress import Display, Progress, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that a test sets."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Display:
    """One that shows something only when it is told to."""
    monkeypatch.setattr(Display, "_watch", lambda self, ended: None)
    return Display()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (75, "75 s"), (99.4, "99 s"), (100, "2 min"), (5900, "98 min"), (12240, "3.4 h"), (900000, "250.0 h")],
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_innermost_activity_is_told_with_the_time_left(
    display: Display, clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with display.show("train"), display.show("graft", 800, "photos") as graft:
        clock.now += 4
        display.tick()
        graft.done, graft.note = 200, "12 photos/s"
        clock.now += 4
        display.tick()
        graft.done = 800
    clock.now += 3
    display.tick()  # nothing is under way
    assert capsys.readouterr().out.splitlines() == [
        "graft: 0 of 800 photos, 4 s",
        "graft: 200 of 800 photos, 12 photos/s, 8 s, about 24 s left",
        "graft: 800 photos, 8 s",
    ]


def test_what_an_earlier_attempt_has_done_does_not_count_for_the_speed(display: Display, clock: SimpleNamespace) -> None:
    activity = display.begin(Progress("graft", 1000, "photos", look=lambda self: setattr(self, "done", next(counts))))
    counts = iter([900, 950])
    activity.refresh()
    clock.now += 10
    activity.refresh()
    assert activity.line() == "graft: 950 of 1,000 photos, 10 s, about 10 s left"


def test_an_activity_that_goes_on_after_an_inner_one_begins_to_count_again(
    display: Display, clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with display.show("train"):
        clock.now += 100
        with display.show("reading"):
            clock.now += 5
            display.tick()
        clock.now += 4
        display.tick()
    assert capsys.readouterr().out == "reading: 5 s\ntrain: 4 s\n"


def test_a_look_that_fails_leaves_the_figures_and_ends_nothing(
    display: Display, clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def look(activity: Progress) -> None:
        activity.done = json.loads(next(lines))

    lines = iter(["3", '{"broken'])
    with display.show("x", 9, "rows", look):
        display.tick()
        clock.now += 4
        display.tick()
    assert capsys.readouterr().out == "x: 3 of 9 rows, 0 s\nx: 3 of 9 rows, 4 s\nx: 3 rows, 4 s\n"


def test_rows_are_counted_as_they_are_taken(
    display: Display, clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = display.count("writing", iter("abc"), 3, "rows")
    assert next(rows) == "a"
    clock.now += 4
    display.tick()
    assert list(rows) == ["b", "c"]
    assert capsys.readouterr().out == "writing: 1 of 3 rows, 4 s\nwriting: 3 rows, 4 s\n"


def test_an_error_ends_all_that_is_inside(display: Display) -> None:
    with pytest.raises(KeyError), display.show("outer"), display.show("inner", 3):
        raise KeyError
    assert display.activities == []
    display.begin(Progress("loading"))
    display.begin(Progress("more"))
    display.clear()
    assert display.activities == []


def test_steps_have_numbers_and_what_is_no_step_has_no_heading(display: Display, capsys: pytest.CaptureFixture[str]) -> None:
    display.heading("graft", "photos onto tiles")
    display.steps = ["prepare", "graft", "label"]
    display.heading("graft", "photos onto tiles")
    assert capsys.readouterr().out == "\n[2/3] graft: photos onto tiles\n"


def test_a_line_comes_every_few_seconds_without_any_help_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.001)
    shown, display = threading.Semaphore(0), Display()
    monkeypatch.setattr(display, "tick", shown.release)
    with display.show("x"):
        thread = display._thread
        assert thread is not None
        assert all(shown.acquire(timeout=60) for _ in range(3))
    thread.join(60)
    assert not thread.is_alive()


def test_on_a_terminal_there_is_a_bar_below_the_lines(tmp_path: Path) -> None:
    script = (
        "from ray_jobs.progress import Display\n"
        "display = Display()\n"
        "with display.show('train: loading'), display.show('graft: a', 8, 'photos') as shown:\n"
        "    shown.done = 4\n"
        "    display.tick()\n"
        "    print('a line')\n"
    )
    leader, follower = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=follower, stderr=follower, env=environment)
    assert process.wait() == 0
    os.close(follower)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(leader, 100_000).decode())
    os.close(leader)
    assert "a ━" in text
    assert "loading" not in text.split("a line")[1]  # only the innermost has a bar
    assert " 4 of 8 photos" in text
    assert "━" in text
    assert "a line" in text
    assert "graft: a: 4 photos, 0 s" in text


# Training


class Lines:
    """Stands for the actor of `make_notice`."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)
        self.take = SimpleNamespace(remote=lambda: self.lines)


def test_the_progress_of_a_training_is_read_from_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "get", lambda lines: lines)
    shown = Progress("train: AddressVLM")
    ray_train.look_at_training(tmp_path, Lines("train: a note"), 0.0, shown)
    assert (shown.note, shown.total) == ("starting the workers", None)
    assert capsys.readouterr().out == "train: a note\n"
    step = {"stage": "alignment", "step": 7, "steps": 9, "loss": 1.25, "samples_per_s": 21.04, "padding": "x" * 70_000}
    log = tmp_path / "loss.jsonl"
    log.write_text(json.dumps(step) + "\n" + json.dumps({**step, "step": 8, "padding": ""}) + "\n")
    ray_train.look_at_training(tmp_path, Lines(), log.stat().st_mtime + 1, shown)
    assert shown.note == "starting the workers"  # it is the log of an earlier attempt
    ray_train.look_at_training(tmp_path, Lines(), 0.0, shown)
    assert (shown.done, shown.total, shown.unit, shown.note) == (8, 9, "steps of alignment", "loss 1.250, 21.0 photos/s")
    shown.first = 8
    log.write_text(json.dumps({**step, "stage": "localization", "step": 1, "steps": 5, "padding": ""}) + "\n")
    ray_train.look_at_training(tmp_path, Lines(), 0.0, shown)
    assert (shown.done, shown.total, shown.unit, shown.first) == (1, 5, "steps of localization", None)
