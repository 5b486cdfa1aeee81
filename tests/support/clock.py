"""A clock for tests of waits: nobody sleeps, and no test depends on speed."""


class Clock:
    """Stands for the module `time`; sleeping moves its hands, and so does each look at `monotonic` by `tick` seconds."""

    def __init__(self) -> None:
        self.now, self.tick = 1000.0, 0.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        self.now += self.tick
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
