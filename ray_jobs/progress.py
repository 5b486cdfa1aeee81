"""What a job shows while it works: its steps, and how far each is.

On a terminal a bar with the time left, elsewhere a line every few seconds. The driver looks at the numbers itself (its own
counters, files that workers write), since Ray may hold workers' output back for minutes.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any, TypeVar

Item = TypeVar("Item")

LINE_EVERY_S = 3.0  # without a terminal; Python may hold the thread back for a moment
LOOK_EVERY_S = 0.5  # with one


@dataclass(eq=False)
class Progress:
    """How far an activity is.

    Attributes:
        what: the activity, such as `graft`.
        total: how many units there are; None if they can't be counted.
        unit: what is counted, in the plural.
        note: a further figure, such as the loss.
        look: called every few seconds to bring `done`, `total` and `note` up to date.
    """

    what: str
    total: int | None = None
    unit: str = ""
    done: int = 0
    note: str = ""
    look: "Callable[[Progress], None] | None" = None
    began: float = 0.0  # time.monotonic()
    first: int | None = None  # units that were done before, by an earlier attempt
    bar: Any = None  # its number among the bars of a terminal
    context: Context = field(default_factory=copy_context)  # of the thread that does it; enter only copies, threads share it

    def refresh(self) -> None:
        """Bring the figures up to date."""
        if self.look:
            try:
                self.look(self)
            except Exception:  # a file that is being written, a connection that ended: the job itself will tell
                return
        if self.first is None:
            self.first = self.done

    def line(self) -> str:
        """`graft: 256 of 772 photos, 12 s, about 24 s left`."""
        elapsed = time.monotonic() - self.began
        counted = f"{self.done:,} of {self.total:,} {self.unit}".rstrip() if self.total is not None else ""
        made, left = self.done - (self.first or 0), (self.total or 0) - self.done
        remaining = f"about {duration(elapsed / made * left)} left" if counted and made > 0 and left > 0 else ""
        return f"{self.what}: " + ", ".join(part for part in (counted, self.note, duration(elapsed), remaining) if part)


class Display:
    """Shows the innermost activity of each thread that has any."""

    def __init__(self) -> None:
        self.steps: Sequence[str] = ()
        self._of_threads: dict[int, list[Progress]] = {}
        self._lock, self._wake = threading.RLock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._bars: Any = None  # of rich, on a terminal

    @property
    def activities(self) -> list[Progress]:
        """Those of this thread, the outermost first."""
        return self._of_threads.get(threading.get_ident(), [])

    def heading(self, step: str, text: str) -> None:
        """Announce one of `steps` with its number."""
        if step in self.steps:
            print(f"\n[{self.steps.index(step) + 1}/{len(self.steps)}] {step}: {text}", flush=True)

    @contextmanager
    def show(
        self, what: str, total: int | None = None, unit: str = "", look: Callable[[Progress], None] | None = None
    ) -> Iterator[Progress]:
        """Show an activity until the block ends, which may change the figures; see `Progress`."""
        activity = self.begin(Progress(what, total, unit, look=look))
        try:
            yield activity
        finally:
            self.end(activity)
        activity.refresh()
        if activity.total:
            took = duration(time.monotonic() - activity.began)
            print(f"{what}: {activity.done:,} {activity.unit}".rstrip() + f", {took}", flush=True)

    def count(self, what: str, items: Iterable[Item], total: int, unit: str) -> Iterator[Item]:
        """The items, shown as they are taken."""
        with self.show(what, total, unit) as activity:
            for item in items:
                activity.done += 1
                yield item

    def begin(self, activity: Progress) -> Progress:
        """Show an activity until `end`."""
        activity.began, activity.context = time.monotonic(), copy_context()
        with self._lock:
            if not any(self._of_threads.values()) and sys.stdout.isatty():
                self._bars = _terminal_bars()
                self._bars.start()
            if self._bars:
                for outer in self.activities[-1:]:
                    self._bars.update(outer.bar, visible=False)
                activity.bar = self._bars.add_task(activity.what, total=activity.total, figures="")
            self._of_threads.setdefault(threading.get_ident(), []).append(activity)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, args=(self._wake,), daemon=True)
                self._thread.start()
        return activity

    def end(self, activity: Progress) -> None:
        """Stop showing an activity and those that it contains."""
        with self._lock:
            activities = self.activities
            if activity not in activities:
                return
            for inner in activities[activities.index(activity) :]:
                if self._bars:
                    self._bars.remove_task(inner.bar)
            del activities[activities.index(activity) :]
            if activities:
                if activities[-1].total is None:
                    activities[-1].began = time.monotonic()
                if self._bars:
                    self._bars.update(activities[-1].bar, visible=True)
                return
            del self._of_threads[threading.get_ident()]
            if any(self._of_threads.values()):
                return
            self._wake.set()
            self._thread, self._wake = None, threading.Event()
            if self._bars:
                self._bars.stop()
                self._bars = None

    def clear(self) -> None:
        """Stop showing anything."""
        if self.activities:
            self.end(self.activities[0])

    def tick(self) -> None:
        """Update the bars, or print a line."""
        with self._lock:
            innermost = [activities[-1] for activities in self._of_threads.values() if activities]
        for activity in innermost:
            activity.refresh()  # without the lock: it may read a remote file
            with self._lock:
                if not any(activity in activities for activities in self._of_threads.values()):
                    continue
                if not self._bars:
                    activity.context.copy().run(print, activity.line(), flush=True)
                    continue
                figures = activity.line().removeprefix(f"{activity.what}: ")
                self._bars.update(activity.bar, completed=activity.done, total=activity.total, figures=figures, refresh=True)

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(LOOK_EVERY_S if self._bars else LINE_EVERY_S):
            self.tick()


def _terminal_bars() -> Any:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    return Progress(*columns, transient=True, refresh_per_second=4)


def duration(seconds: float) -> str:
    """`75 s`, `12 min`, `3.4 h`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


display = Display()
