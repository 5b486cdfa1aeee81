"""A line now and then while a job waits for its workers, so that nobody takes it for dead."""

import threading
from collections.abc import Callable
from types import TracebackType


class Heartbeat:
    """Prints what `say` returns every `every_s` seconds until the block ends; nothing if it returns nothing."""

    def __init__(self, say: Callable[[], str], every_s: float = 30.0) -> None:
        self._say, self._every_s = say, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(self._every_s):
            if said := self._say():
                print(said, flush=True)
