"""Which adapters are loaded, how often, and which are evicted; three cities on one tiny base."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import serve as service
from addressvlm.inference import Localizer
from serve.cities import find_cities
from serve.city_models import CityModels
from tests.support.families import picture

pytestmark = pytest.mark.xdist_group("serve")


def models(systems: list[Path], dtype: str = "float32", **settings: object) -> CityModels:
    """Two cities, and a third with the adapter of the first."""
    config = service.ServiceSettings(cities=[str(system) for system in systems], dtype=dtype, **settings)
    first, second = find_cities(config)
    return CityModels(config, [first, second, replace(first, id="third")], lambda change: change())


def use(cities: CityModels, *names: str) -> list[str]:
    """Which cities are loaded after requests for these, one after the other."""
    for name in names:
        cities.acquire(name)
        cities.release(name)
    return list(cities.localizers)


def test_no_city_is_evicted_while_there_is_room(systems: list[Path]) -> None:
    for room in (3, 4):
        cities = models(systems, cities_per_replica=room)
        assert use(cities, "toytown", "st-alder", "third") == ["toytown", "st-alder", "third"]


def test_the_city_that_was_asked_about_least_recently_goes_first(systems: list[Path]) -> None:
    cities = models(systems, cities_per_replica=2)
    assert use(cities, "toytown", "st-alder", "toytown", "third") == ["toytown", "third"]
    cities.acquire("toytown")
    assert use(cities, "st-alder") == ["toytown", "st-alder"]
    assert use(cities, "third") == ["toytown", "third"]
    assert set(cities.adapters.peft_config) == {"city0", "city2"}  # the others' weights are gone


def test_a_city_is_loaded_once_however_many_want_it_at_once(systems: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cities = models(systems)
    wanted, look, load, loaded = threading.Barrier(2), cities.acquire_loaded, cities._load, []

    def both_look(city: str) -> Localizer | None:
        found = look(city)
        if found is None:
            wanted.wait(60)
        return found

    monkeypatch.setattr(cities, "acquire_loaded", both_look)
    monkeypatch.setattr(cities, "_load", lambda city: loaded.append(city) or load(city))
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(cities.acquire, ["toytown", "toytown"])
    assert first is second
    assert (loaded, cities._uses["toytown"]) == (["toytown"], 2)


def test_logits_of_adapters_on_a_bfloat16_base_are_not_rounded(systems: list[Path]) -> None:
    localizer = models(systems, "bfloat16").acquire("toytown")
    assert {weight.dtype for weight in localizer.model.parameters()} == {torch.bfloat16}
    ((_, state),) = localizer.prefill_questions([picture(1)], ["Where?"])
    assert (state.logits - state.logits.bfloat16()).abs().max() > 0
