"""The step from photos to a city dataset, on a real Ray"""

import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from addressvlm import InputError
from addressvlm.config import Config, validate
from addressvlm.dataset.build import resolve_city_files
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.labels.facts import Facts
from addressvlm.storage import tables
from addressvlm.storage.run_dir import WORK_DIR, Run
from ray_jobs import graft, prepare
from tests.dataset.test_split import DEGREE_M, geojson

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.xdist_group("ray")]
STREETS = {f"Street {name}": [[-400, y], [400, y]] for name, y in (("A", 0), ("B", 150), ("C", 300))}


def city(folder: Path, bad: dict[int, dict[str, Any]] | None = None, **settings: Any) -> Config:
    """Sixty photos of thirty places along three streets; `bad` changes cells of single rows of the manifest."""
    (folder / "photos").mkdir()
    rows = []
    for i in range(60):
        street, along = i // 2 % 3, (i // 6) * 70 - 350
        noise = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "photos" / f"{i}.jpg")
        rows.append({"photo": f"{i}.jpg", "place": i // 2, "lat": (150 * street + 5) / DEGREE_M, "lon": along / DEGREE_M})
        rows[-1] |= {"heading": i % 2 * 180}
    for row, cells in (bad or {}).items():
        rows[row - 1] |= cells
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    square = [[[-500, -500], [500, -500], [500, 500], [-500, 500], [-500, -500]]]
    tree = {
        "name": "town",
        "storage": str(folder / "runs"),
        "city": {
            "name": "Town",
            "manifest": str(folder / "manifest.csv"),
            "photos": str(folder / "photos"),
            "streets": str(geojson(folder / "streets.geojson", "LineString", STREETS)),
            "districts": str(geojson(folder / "districts.geojson", "Polygon", {"Centre": square})),
            "attribution": ["drawn for this test"],
            **settings,
        },
    }
    return validate(tree, "the test's settings")


def rejected(config: Config) -> dict[int, str]:
    return {r["row"]: r["reason"] for r in pq.read_table(Run(config).rejects / "prepare.parquet").to_pylist()}


def test_a_dataset_comes_out_that_datasets_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = city(tmp_path)
    prepare.run_step(config)
    folder = Run(config).photos
    files = {split: [str(f) for f in tables.table_files(folder, split)] for split in ("train", "val", "test")}
    opened = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert isinstance(opened["train"][0]["image"], Image.Image)
    assert opened["train"][0]["image"].size == (32, 24)
    row = opened["test"][0]
    assert (row["district"], row["ambiguous"], row["heading"] in (0, 180)) == ("Centre", False, True)
    assert row["distance_m"] == pytest.approx(5, abs=0.1)
    assert row["image"].tobytes() == Image.open(tmp_path / "photos" / row["id"]).tobytes()
    assert [len(r["rounds"]) for r in tables.iter_rows(folder, "train", ["rounds"])] == [7] * len(opened["train"])
    assert {(q["level"], q["kind"]) for q in row["rounds"]} >= {("street", "judgment"), ("address", "generation")}

    card = json.loads((folder / "card.json").read_text())
    assert card["splits"]["train"]["photos"] == len(opened["train"])
    assert sum(part["photos"] for part in card["splits"].values()) == card["photos"] == 60
    assert card["min_train_to_held_out_m"] >= config.city.split_buffer_m
    assert card["attribution"] == ["drawn for this test"]
    assert {p.name for p in folder.iterdir()} >= {"README.md", "card.html", "figures", "gazetteer.geojson"}
    assert (row["address_source"], row["second_street"], row["sub_street"]) == ("map", row["cross_street"], None)
    places = [set(opened[split]["place"]) for split in files]
    assert not places[0] & places[1] | places[0] & places[2] | places[1] & places[2]

    gazetteer = Gazetteer.load(Run(config).gazetteer)
    shapes = [feature["properties"] for feature in json.loads(Run(config).gazetteer.read_text())["features"]]
    assert sum(properties.get("photos", 0) for properties in shapes) == len(opened["train"])
    assert set(opened["test"]["street"]) <= set(gazetteer.streets) == set(gazetteer.geometry)
    aside = pq.read_table(Run(config).folder / "aside.parquet").to_pylist()
    assert len(aside) == card["splits"].get("aside", {"places": 0})["places"]
    assert not (folder / WORK_DIR).exists()

    before = tables.read_table(folder, "test")
    prepare.run_step(config)
    assert "prepare: already done" in capsys.readouterr().out
    prepare.run_step(config, redo=True)
    assert tables.read_table(folder, "test") == before


def test_every_bad_row_is_kept_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    far = {"lat": 5000 / DEGREE_M, "place": "far"}
    between = {"lat": 75 / DEGREE_M, "place": "between"}
    bad = {3: {"lat": 91}, 5: {"photo": "0.jpg"}, 7: between, 8: far, 10: {"photo": "none.jpg"}, 11: {"lon": ""}}
    config = city(tmp_path, bad, max_reject_share=0.2, max_megapixels=1)
    (tmp_path / "photos" / "19.jpg").write_bytes(b"")
    (tmp_path / "photos" / "20.jpg").write_text("this is not a photo")
    whole = tmp_path / "photos" / "21.jpg"
    whole.write_bytes(whole.read_bytes()[:-300])
    large = io.BytesIO()
    Image.new("RGB", (1500, 1000)).save(large, "PNG")
    (tmp_path / "photos" / "22.jpg").write_bytes(large.getvalue())
    prepare.run_step(config)
    reasons = rejected(config)
    assert {row: reason.partition(":")[0] for row, reason in reasons.items()} == {
        3: "latitude out of range",
        5: "duplicate id",
        7: "no street near",
        8: "outside the map",
        10: "photo missing",
        11: "empty cell",
        20: "photo empty",
        21: "not a photo",
        22: "photo damaged",
        23: "photo too large",
    }
    assert "row 1" in reasons[5]
    assert "none.jpg" in reasons[10]
    card = json.loads((Run(config).photos / "card.json").read_text())
    assert card["photos"] == 50
    assert card["rejected"] == dict.fromkeys((r.partition(":")[0] for r in reasons.values()), 1)
    assert "prepare: 10 rows rejected" in capsys.readouterr().out


def test_too_many_bad_rows_stop_the_run_and_are_listed(tmp_path: Path) -> None:
    config = city(tmp_path, {row: {"lat": 91} for row in range(1, 8)})
    with pytest.raises(InputError, match=r"7 of 60 rows of .*manifest\.csv are bad \(7 latitude out of range; .*row 1.*"):
        prepare.run_step(config)
    assert sorted(rejected(config)) == list(range(1, 8))
    assert not Run(config).photos.exists()


def test_repaired_photos_are_checked_again(tmp_path: Path) -> None:
    """Both after a stop and where an interrupted run had seen them bad."""
    config = city(tmp_path)
    for n in range(0, 20):
        (tmp_path / "photos" / f"{n}.jpg").rename(tmp_path / f"{n}.jpg")
    with pytest.raises(InputError, match=r"20 of 60 rows .*20 photo missing"):
        prepare.run_step(config)
    for n in range(0, 20):
        (tmp_path / f"{n}.jpg").rename(tmp_path / "photos" / f"{n}.jpg")
    prepare.run_step(config)
    assert rejected(config) == {}


def test_questions_about_sub_streets(tmp_path: Path) -> None:
    """A cross street cuts the three streets; answers name the part, and test photos only parts that training knows."""
    config = city(tmp_path, partition={"gap_m": 50, "min_places": 1}, answer="sub_street", split_buffer_m=5)
    cross = {**STREETS, "Cross Street": [[5, -400], [5, 700]]}
    geojson(tmp_path / "streets.geojson", "LineString", cross)
    prepare.run_step(config)
    gazetteer = Gazetteer.load(Run(config).gazetteer)
    assert "Street A west of Cross Street" in gazetteer.streets
    assert set(gazetteer.geometry) == set(gazetteer.streets)
    rows = [row for part in ("train", "test") for row in tables.iter_rows(Run(config).photos, part)]
    assert {row["street"] for row in rows} <= set(gazetteer.streets)
    assert all(row["street"] == row["sub_street"] for row in rows)
    assert {row["main_street"] for row in rows} == set(STREETS)
    graft.run_step(config, redo=False)
    grafts = [(row["street"], Facts.from_json(row["facts"])) for row in tables.iter_rows(Run(config).grafts, "train")]
    assert {(facts.street == street, facts.direction) for street, facts in grafts} == {(True, "east-west")}
    assert {facts.cross_street for _, facts in grafts} == {None, "Cross Street"}
    named = {round_["answer"] for row in rows for round_ in row["rounds"] if round_["level"] == "street"} - {"Yes", "No"}
    assert named <= set(gazetteer.streets)
    card = json.loads((Run(config).photos / "card.json").read_text())
    assert card["sub_streets"] > card["streets"] == 3


def test_panoramas_are_cut_into_views(tmp_path: Path) -> None:
    config = city(tmp_path, panorama={"headings": [0, 90], "pixels": 64})
    for n in range(60):
        Image.new("RGB", (256, 128), (4 * n, 0, 0)).save(tmp_path / "photos" / f"{n}.jpg")
    prepare.run_step(config)
    rows = [row for part in ("train", "val", "test") for row in tables.iter_rows(Run(config).photos, part)]
    aside = json.loads((Run(config).photos / "card.json").read_text())["splits"].get("aside", {"photos": 0})["photos"]
    assert len(rows) + aside == 120
    assert len({row["id"] for row in rows}) == len(rows)
    assert Image.open(io.BytesIO(rows[0]["image"]["bytes"])).size == (64, 64)


def test_no_usable_photo_is_an_error_even_if_all_may_be_bad(tmp_path: Path) -> None:
    config = city(tmp_path, {row: {"photo": f"no{row}.jpg"} for row in range(1, 61)}, max_reject_share=1)
    with pytest.raises(InputError, match=r"60 of 60 rows .*prepare\.parquet\.$"):
        prepare.run_step(config)
    assert len(rejected(config)) == 60


def test_a_city_too_small_for_a_split_is_an_error(tmp_path: Path) -> None:
    config = city(tmp_path, split_buffer_m=5000)
    with pytest.raises(InputError, match="30 places give no place for the test split"):
        prepare.run_step(config)


def test_a_test_only_dataset_from_any_manifest(tmp_path: Path) -> None:
    config = city(tmp_path, {4: {"lat": 91}})
    out = tmp_path / "other"
    prepare.prepare_test(config, out)
    assert tables.count_rows(out, "test") == 59
    assert tables.count_rows(out, "train") == 0
    assert Gazetteer.load(out / "gazetteer.geojson").streets == list(STREETS)
    assert pq.read_table(tmp_path / "other-rejects.parquet").num_rows == 1


def test_addresses_of_the_manifest_need_no_maps(tmp_path: Path) -> None:
    config = city(tmp_path)
    rows = list(csv.DictReader((tmp_path / "manifest.csv").open()))
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "street", "district"])
        writer.writeheader()
        writer.writerows({**r, "street": f"Road {int(r['place']) % 3}", "district": "Old Town"} for r in rows)
    bare = config.city.model_copy(update={"streets": None, "districts": None})
    out = tmp_path / "other"
    prepare.prepare_test(config.model_copy(update={"city": bare}), out)
    table = tables.read_table(out, "test", ["street", "district", "distance_m"])
    assert set(table["street"].to_pylist()) == {"Road 0", "Road 1", "Road 2"}
    assert set(table["distance_m"].to_pylist()) == {None}
    assert Gazetteer.load(out / "gazetteer.geojson").geometry == {}


def test_missing_input_is_an_error_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "city.yaml"
    settings.write_text(f"storage: {tmp_path / 'runs'}\ncity: {{manifest: {tmp_path / 'gone.csv'}}}\n")
    with pytest.raises(InputError, match=r"no manifest at .*gone\.csv"):
        prepare.main(["--config", str(settings)])
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    assert "--redo" in capsys.readouterr().out


def test_paths_of_a_toy_city_are_filled_in(tmp_path: Path) -> None:
    config = validate({"storage": str(tmp_path), "city": {"toy": "brinemouth"}}, "the test's settings")
    folder = Run(config).input / "brinemouth"
    folder.mkdir(parents=True)
    (folder / "manifest.csv").write_text("file,lat,lon\n")  # there already, so nothing is drawn
    filled = resolve_city_files(config, Run(config))
    assert filled.city.manifest == str(folder / "manifest.csv")
    assert {Path(str(p)).parent for p in (filled.city.streets, filled.city.districts, filled.tiles.imagery)} == {folder}
    assert (filled.city.toy, config.city.manifest) == ("brinemouth", None)


@pytest.mark.parametrize(
    ("settings", "message"), [({"toy": "atlantis"}, "no toy city 'atlantis'"), ({}, r"city\.manifest is not set")]
)
def test_a_city_without_a_source_is_an_error(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    config = validate({"storage": str(tmp_path), "city": settings}, "the test's settings")
    with pytest.raises(InputError, match=message):
        resolve_city_files(config, Run(config))
