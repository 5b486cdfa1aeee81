"""Fixtures that many tests share."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.support.openai_endpoint import Endpoint

settings.register_profile("same everywhere", deadline=None, derandomize=True)  # neither speed nor chance decides a test
settings.load_profile("same everywhere")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on Ray come first, being the longest: what makes models and data, and what asks models, a Ray for each."""

    def order(item: pytest.Item) -> int:
        group = item.get_closest_marker("xdist_group")
        return {"ray": 0, "ray-answers": 1}.get(group.args[0], 2) if group else 2

    items.sort(key=order)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A real Ray of this process, four CPUs by its own count so that small test jobs never wait for each other."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="warning")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def toy_city(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The paths of the toy city alderbrook, with few photos."""
    from addressvlm.demo import city

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(city, "SPACING", 160.0)
        return city.write_city("alderbrook", tmp_path_factory.mktemp("toy"))


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key to an endpoint, and next to no waits between retries."""
    from addressvlm.labels import request_scheduler
    from tests.support.label_requests import KEY

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(request_scheduler, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(request_scheduler, "MAX_WAIT_S", 0.001)


@pytest.fixture
def endpoint(hurry: None) -> "Iterator[Endpoint]":
    """A server that gives every row the same good label, and a key to it."""
    from tests.support.label_texts import GOOD
    from tests.support.openai_endpoint import Endpoint, says

    with Endpoint(lambda n, body: says(GOOD)).running() as endpoint:
        yield endpoint
