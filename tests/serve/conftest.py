"""Two cities of one tiny base, and a model's thread that answers about both."""

from pathlib import Path

import pytest

import serve as service
from addressvlm.answers.calibration import Calibration
from serve.cities import find_cities
from serve.engine import Engine
from tests.support.running_service import two_cities


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two trained cities; the first is calibrated, and knows above 0.9 only."""
    systems = two_cities(tmp_path_factory.mktemp("cities"))
    Calibration(2.0, 0.8, {"0.8": 0.9, "0.5": 0.1}).save(systems[0] / "merged")
    return systems


@pytest.fixture(scope="module")
def engine(systems: list[Path]) -> Engine:
    """One that remembers no photo, so that nothing but the question decides."""
    config = service.ServiceSettings(cities=[str(system) for system in systems], dtype="float32", photo_memory_mb=0)
    return Engine(config, find_cities(config))
