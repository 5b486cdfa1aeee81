"""A file of many cities: its table, what each city's configuration is, and mistakes in it"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from addressvlm import InputError
from addressvlm.config import load, validate
from addressvlm.config.world import World, load_world, require_files


def world_of(folder: Path, cities: Any, **tree: Any) -> World:
    file = folder / "earth.yaml"
    extra = tree.pop("world", {})
    file.write_text(yaml.safe_dump({"extends": "demo", "storage": "s", **tree, "world": {"cities": cities, **extra}}))
    world = load_world(file, environment={})
    assert world is not None
    return world


def test_a_city_has_the_settings_of_all_and_its_own(tmp_path: Path) -> None:
    graz = {"name": "graz", "manifest": "graz.csv", "streets": "graz.geojson", "imagery": "graz.tif"}
    linz = {"name": "linz", "toy": "brinemouth", "weight": 2, "set": {"labels.language": "de", "train.workers": 3}}
    world = world_of(tmp_path, [graz, linz], name="earth", city={"rounds": 5})
    assert list(world.cities) == ["graz", "linz"]
    one, two = world.cities.values()
    assert (one.name, one.storage, one.city.name) == ("graz", "s/earth", "graz")
    assert (one.city.manifest, one.city.streets, one.city.toy, one.tiles.imagery) == (
        "graz.csv",
        "graz.geojson",
        None,
        "graz.tif",
    )
    assert (two.city.manifest, two.city.streets, two.tiles.imagery) == (None, None, None)
    assert (two.city.toy, two.labels.language, two.train.workers) == ("brinemouth", "de", 3)
    assert [c.city.rounds for c in (one, two)] == [5, 5]
    assert (one.labels.language, one.train.workers) == ("en", 2)
    assert world.joint.name == "joint"
    assert world.joint.train.cities == {"graz": 1.0, "linz": 2.0}


def test_a_city_takes_the_common_files_but_no_photos_of_others(tmp_path: Path) -> None:
    common = {"name": "earth", "manifest": "all.csv", "photos": "all", "streets": "all.geojson", "districts": "all.gpkg"}
    rows = [{"name": "graz", "photos": "graz"}, {"name": "linz", "manifest": "linz.csv", "districts": "linz.gpkg"}]
    result = world_of(tmp_path, rows, name="earth", city=common)
    assert [(c.city.name, c.city.toy, c.city.manifest, c.city.photos) for c in result.cities.values()] == [
        ("graz", None, None, "graz"), ("linz", None, "linz.csv", None)
    ]  # fmt: skip
    assert [(c.city.streets, c.city.districts) for c in result.cities.values()] == [
        ("all.geojson", "all.gpkg"), ("all.geojson", "linz.gpkg")
    ]  # fmt: skip


def test_the_settings_of_one_city_are_not_those_of_the_next(tmp_path: Path) -> None:
    own = {"tiles.pixels": 320, "city.rounds": 7, "train.stages.localization.epochs": 3}
    rows = [{"name": "graz", "manifest": "g.csv", "imagery": "g.tif", "set": own}, {"name": "linz", "manifest": "l.csv"}]
    one, two = world_of(tmp_path, rows, tiles={"imagery": "all.tif"}).cities.values()
    alone = world_of(tmp_path, rows[1:], tiles={"imagery": "all.tif"}).cities["linz"]
    assert two.model_dump(exclude={"storage"}) == alone.model_dump(exclude={"storage"})
    assert (one.tiles.imagery, two.tiles.imagery) == ("g.tif", "all.tif")
    assert (one.tiles.pixels, one.city.rounds, one.train.stages["localization"].epochs) == (320, 7, 3)


def test_by_default_each_city_has_an_adapter_and_two_are_prepared_at_a_time(tmp_path: Path) -> None:
    chosen = world_of(tmp_path, [{"name": "graz"}]).settings
    assert (chosen.adapter, chosen.preparing, chosen.training, chosen.cities[0].weight) == ("per city", 2, None, 1.0)


def test_the_world_is_called_as_its_file_is(tmp_path: Path) -> None:
    file = tmp_path / "earth.yaml"
    file.write_text("storage: s\nworld: {cities: [{name: graz, manifest: a.csv}]}\n")
    world = load_world(file, ["train.workers=7"], {})
    assert world is not None
    assert (world.name, world.base.train.workers, world.cities["graz"].train.workers) == ("earth", 7, 7)
    assert world.folder.name == "earth"


def test_a_file_without_a_table_is_of_one_city() -> None:
    assert load_world("demo", environment={}) is None


def test_a_job_of_one_city_takes_no_file_of_many(tmp_path: Path) -> None:
    world_of(tmp_path, [{"name": "graz"}])
    with pytest.raises(InputError, match=r"earth.yaml names many cities .*: only ray_jobs/train.py takes such a file"):
        load(tmp_path / "earth.yaml")


def test_the_table_may_be_a_file(tmp_path: Path) -> None:
    rows = [
        {"name": "graz", "manifest": "g.csv", "weight": "1.5", "labels.language": "de"},
        {"name": "linz", "manifest": "l.csv", "weight": "", "labels.language": ""},
    ]
    table = tmp_path / "cities.csv"
    table.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "cities.parquet")
    for file in (table, tmp_path / "cities.parquet"):
        world = world_of(tmp_path, str(file))
        assert [city.weight for city in world.settings.cities] == [1.5, 1.0]
        assert [config.labels.language for config in world.cities.values()] == ["de", "en"]
        assert [config.city.manifest for config in world.cities.values()] == ["g.csv", "l.csv"]


@pytest.mark.parametrize(
    ("cities", "message"),
    [
        ([{"name": "graz"}, {"name": "graz"}], r"earth.yaml, world.cities: 'graz' stands there twice: give each city a name"),
        ([{"name": "joint"}], "'joint' is the run of the model of all: give each city a name of its own"),
        ([{"name": "../x"}], r"'cities.0.name' is '../x'"),
        ([], "'cities' is"),
        ([{"name": "graz", "street": "x"}], "unknown key 'cities.0.street'"),
        ([{"name": "graz", "set": {"label.language": "de"}}], "city 'graz': unknown key 'label', did you mean 'labels'"),
        ("nowhere.csv", "the table of cities nowhere.csv can't be read"),
    ],
)
def test_mistakes_in_the_table_are_sentences(tmp_path: Path, cities: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        world_of(tmp_path, cities)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,manifest\ngraz,g.csv,more\n", "row 1: more cells than columns"),
        ('name,manifest\ngraz,"g.csv\nlinz,l.csv\n', "has a quote in line 2 that is not closed"),
        ("name,manifest,name\ngraz,g.csv,linz\n", "has the column name twice"),
    ],
)
def test_a_table_of_cities_is_read_like_one_of_photos(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cities.csv").write_text(text)
    with pytest.raises(InputError, match=rf"the table of cities .*cities\.csv.* {message}"):
        world_of(tmp_path, str(tmp_path / "cities.csv"))


def test_a_table_needs_names(tmp_path: Path) -> None:
    table = tmp_path / "cities.csv"
    table.write_text("city,manifest\ngraz,g.csv\n")
    with pytest.raises(InputError, match="has no rows with a column `name`"):
        world_of(tmp_path, str(table))


def test_a_missing_file_is_named_with_its_city(tmp_path: Path) -> None:
    (tmp_path / "there.csv").touch()
    rows = [
        {"name": "graz", "manifest": str(tmp_path / "there.csv"), "photos": "s3://bucket/graz"},
        {"name": "linz", "manifest": str(tmp_path / "there.csv"), "streets": str(tmp_path / "gone.geojson")},
    ]
    graz, linz = world_of(tmp_path, rows).cities.values()
    require_files(graz)
    with pytest.raises(InputError, match=r"city 'linz': there is no streets .*gone.geojson: fix its path in the table"):
        require_files(linz)


@pytest.mark.parametrize("key", ["manifest", "photos", "streets", "districts"])
def test_each_local_file_of_a_city_must_be_there(tmp_path: Path, key: str) -> None:
    require_files(validate({"city": {key: f"s3://bucket/{key}"}}, "test"))
    with pytest.raises(InputError, match=f"there is no {key} {tmp_path}/gone"):
        require_files(validate({"city": {key: str(tmp_path / "gone")}}, "test"))
