"""Which cities and models are served, and which city a request means."""

import json
import os
import shutil
from pathlib import Path

import pytest

import serve as service
from addressvlm import InputError
from addressvlm.storage.tables import PHOTOS, write_table
from serve import cities as served
from serve.cities import City, CityData, base_model, find_cities, model_folder, pick_city
from serve.engine import Engine
from serve.errors import ApiError
from tests.support.engine_requests import settings

pytestmark = pytest.mark.xdist_group("serve")


def test_runs_and_folders_of_runs_are_found(systems: list[Path]) -> None:
    root = systems[0].parents[2]
    assert [c.id for c in find_cities(service.ServiceSettings(cities=str(root)))] == ["toytown", "st-alder"]
    assert [c.model for c in find_cities(service.ServiceSettings(cities=f"{root}/run1"))] == ["run1/addressvlm"]
    with pytest.raises(InputError, match="both of the city"):
        find_cities(settings([systems[0], _copy(systems[0])]))
    with pytest.raises(InputError, match="holds no adapter"):
        find_cities(service.ServiceSettings(cities=str(systems[0] / "merged")))


def _copy(system: Path) -> Path:
    other = system.parents[3] / "other" / "models" / "addressvlm"
    shutil.copytree(system, other, dirs_exist_ok=True)
    return other


def test_cities_that_can_not_be_served_are_input_errors(systems: list[Path], tmp_path: Path) -> None:
    cities = find_cities(settings(systems))
    config = systems[0] / "adapter" / "adapter_config.json"
    other = tmp_path / "adapter_config.json"
    other.write_text(config.read_text().replace(str(systems[0].parents[2] / "base"), "/elsewhere"))
    with pytest.raises(InputError, match="give its folder with base="):
        base_model([City("x", "X", "x", tmp_path, tmp_path)], None)
    with pytest.raises(InputError, match="serve them apart"):
        base_model([cities[0], City("x", "X", "x", tmp_path, tmp_path)], None)
    assert base_model([City("x", "X", "x", tmp_path, tmp_path)], "other/base") == "other/base"
    engine = Engine(
        settings(systems, base=str(systems[0].parents[2] / "base")), [*cities, City("x", "X", "x", tmp_path, tmp_path)]
    )
    with pytest.raises(InputError, match="is no adapter that can be read"):
        engine.cities.acquire("x")


def test_the_city_of_a_request(systems: list[Path]) -> None:
    cities = find_cities(settings(systems))
    assert pick_city(cities, "st. alder") is pick_city(cities, "ST-ALDER") is cities[1]
    assert pick_city(cities[:1], None) is cities[0]
    for name, status in (("Atlantis", 404), (None, 400)):
        with pytest.raises(ApiError, match=r"'toytown', 'st-alder'") as caught:
            pick_city(cities, name)
        assert caught.value.status == status


def test_the_newest_of_two_last_models_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    here, jobs = tmp_path / "here", tmp_path / "addressvlm" / "runs"
    for number, runs in enumerate((here, jobs)):
        (runs / "merged").mkdir(parents=True)
        (runs / "merged" / "config.json").write_text("{}")
        (runs / "last-model").write_text(str(runs / "merged"))
        os.utime(runs / "last-model", (number, number))
    settings_of_storage = service.ServiceSettings(storage=str(here))
    assert model_folder(settings_of_storage) == jobs / "merged"
    os.utime(here / "last-model", (2, 2))
    assert model_folder(settings_of_storage) == here / "merged"


def test_the_last_trained_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"ray job submit ray_jobs/train\.py"):
        model_folder(service.ServiceSettings())
    merged = tmp_path / "addressvlm" / "runs" / "demo" / "models" / "addressvlm" / "merged"
    merged.mkdir(parents=True)
    (tmp_path / "addressvlm" / "runs" / "last-model").write_text(f"{merged}\n")
    with pytest.raises(InputError, match=r"no config\.json"):
        model_folder(service.ServiceSettings())
    (merged / "config.json").write_text(json.dumps({}))
    assert model_folder(service.ServiceSettings()) == merged
    assert model_folder(service.ServiceSettings(model=str(merged.parent))) == merged


def test_a_system_that_is_given_twice_is_one_city(systems: list[Path]) -> None:
    run = systems[0].parents[1]
    assert [c.id for c in find_cities(service.ServiceSettings(cities=f"{systems[0]},{run},{run}/../run0"))] == ["toytown"]


def test_the_gazetteer_of_an_adapter_may_be_beside_it_or_with_the_runs_photos(systems: list[Path], tmp_path: Path) -> None:
    system = tmp_path / "run" / "models" / "addressvlm"
    (system / "adapter").mkdir(parents=True)
    shutil.copy(systems[0] / "adapter" / "adapter_config.json", system / "adapter")
    with pytest.raises(InputError, match=r"no gazetteer\.geojson for .*run its training again"):
        find_cities(settings([system]))
    for folder in (tmp_path / "run" / "photos", system / "adapter", system / "merged"):  # what is nearest counts
        folder.mkdir(exist_ok=True)
        shutil.copy(systems[0] / "merged" / "gazetteer.geojson", folder)
        (city,) = find_cities(settings([system]))
        assert (city.id, city.model, city.folder, city.adapter) == ("toytown", "run/addressvlm", folder, system / "adapter")


def test_a_model_without_a_gazetteer_has_the_name_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "My model").mkdir()
    (tmp_path / "My model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    (city,) = find_cities(service.ServiceSettings(model="My model"))  # whatever folder a replica runs in
    assert city == City("My model", "", "My model", tmp_path / "My model")
    assert pick_city([city], "my MODEL") is city


def test_a_base_on_the_hub_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    assert base_model([City("x", "X", "x", tmp_path, tmp_path)] * 2, None) == "someone/base"


def test_samples_are_small_and_among_the_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "MAX_SAMPLE_ROWS", 4)
    monkeypatch.setattr(served, "MAX_SAMPLE_BYTES", 5)
    images = [("One", b"\xff\xd8abcd"), ("One", b"\xff\xd8abc"), ("Two", None), ("Three", b"\xff\xd83"), ("Four", b"\xff\xd84")]
    rows = [
        {"id": str(n), "street": street, "image": data and {"bytes": data, "path": None}}
        for n, (street, data) in enumerate(images)
    ]
    write_table(tmp_path / "photos", "test", rows, PHOTOS)
    deep = City("x", "X", "x", tmp_path / "models" / "addressvlm" / "merged")
    assert CityData(deep).samples == [b"\xff\xd8abc", b"\xff\xd83"]
