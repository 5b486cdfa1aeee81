"""Fixtures that many tests share."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A real Ray of this process, four CPUs by its own count so that small test jobs never wait for each other."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="warning")
    yield
    ray.shutdown()
