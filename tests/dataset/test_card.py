"""The dataset card"""

import io
import json
import random
import re
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyproj
import pytest
import shapely
import yaml
from PIL import Image

from addressvlm.config import Config, TilesConfig
from addressvlm.config.city import CityConfig, DensityConfig, GeocoderConfig
from addressvlm.dataset import card
from addressvlm.dataset.card_figures import HUES, CityFigures, _colours, long_tail
from addressvlm.dataset.geocoding import Place
from addressvlm.dataset.photos import Photo
from addressvlm.dataset.split import PlaceSplit
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.questions import evaluation_rounds, training_rounds
from addressvlm.storage import tables

DEGREE_M = 111_195.0  # of latitude, and of longitude at the equator, about
REJECTS = [{"reason": "no GPS: a.jpg"}, {"reason": "no GPS: b.jpg"}, {"reason": "not a picture"}]
MILL, HIGH = "Mill Street", "High Street"


def place(number: int, x: float, y: float, street: str, **changes: Any) -> Place:
    fields = {"distance_m": 2.0, "cross_street": None, "ambiguous": False, "source": "map", "margin_m": None,
              "second_street": None, "sub_street": None}  # fmt: skip
    at = {"lat": y / DEGREE_M, "lon": x / DEGREE_M, "x": x, "y": y}
    return Place(id=f"p{number}", address=Address(street, "Harbour"), **{**at, **fields, **changes})


class City:
    """Ten places on two crossing streets, two photos each; a square of 200 m."""

    def __init__(self, **city: Any) -> None:
        self.config = Config(seed=3, city=CityConfig(**{"name": "Toytown", "manifest": "/home/me/photos.csv", **city}))
        along = [place(i, 50 * i - 100, 0, MILL, ambiguous=i == 2, sub_street=f"{MILL} {i // 2}") for i in range(5)]
        across = [place(5 + i, 0, 50 * i - 100, HIGH, source="manifest", sub_street=HIGH) for i in range(5)]
        self.places = {p.id: p for p in along + across}
        self.photos = [Photo(2 * i + j, f"{p}-{j}", "", p, 0, 0) for i, p in enumerate(self.places) for j in range(2)]
        part = {p: ("train", "train", "val", "test", "aside")[i % 5] for i, p in enumerate(self.places)}
        self.split = PlaceSplit(part, {"p4": "nearer than 25 m to a test place", "p9": "thinned to 0.5"}, 51.25)
        lines = {MILL: shapely.LineString([(-0.001, 0), (0.001, 0)]), HIGH: shapely.LineString([(0, -0.001), (0, 0.001)])}
        self.gazetteer = Gazetteer(
            [Address(MILL, "Harbour"), Address(HIGH, "Harbour")], lines, {"Harbour": shapely.box(-0.002, -0.002, 0.002, 0.002)}
        )

    def card(self, questions: card.Questions | None = None, **changes: Any) -> dict[str, Any]:
        arguments = (self.config, self.places, self.photos, self.split, self.gazetteer, REJECTS)
        return card.make_card(*arguments, questions or {}, **changes)

    def write(self, folder: Path) -> dict[str, Any]:
        """Tables and card, as prepare does."""
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
        for part in ("train", "val", "test"):
            rows = [self._row(photo, part, buffer.getvalue()) for photo in self.photos if self.split.part[photo.place] == part]
            tables.write_table(folder, part, rows, tables.PHOTOS)
        written = self.card({part: card.count_questions(folder, part) for part in ("train", "val", "test")})
        card.write_card(folder, written, self.places.values(), self.split, self.gazetteer)
        return written

    def _row(self, photo: Photo, part: str, image: bytes) -> dict[str, Any]:
        address, rng = self.places[photo.place].address, random.Random(photo.id)
        rounds = (training_rounds if part == "train" else evaluation_rounds)(address, self.gazetteer, rng)
        columns = dict.fromkeys(tables.PHOTOS.names)
        return columns | {"id": photo.id, "place": photo.place, "image": {"bytes": image, "path": None}, "rounds": rounds}


def test_counts_of_the_papers_tables(tmp_path: Path) -> None:
    written = City().write(tmp_path)
    assert json.loads((tmp_path / "card.json").read_text()) == written
    assert {key: written[key] for key in ("places", "photos", "streets", "sub_streets", "districts", "ambiguous_share")} == {
        "places": 10, "photos": 20, "streets": 2, "sub_streets": 4, "districts": 1, "ambiguous_share": 0.1,
    }  # fmt: skip
    assert written["area_km2"] == pytest.approx(0.02, rel=0.02)  # a square on its tip, 200 m from tip to tip
    assert {p: (c["places"], c["photos"], c["questions"]) for p, c in written["splits"].items()} == {
        "train": (4, 8, 56), "val": (2, 4, 28), "test": (2, 4, 28), "aside": (2, 4, 0),
    }  # fmt: skip
    assert written["questions"] == 112
    assert written["questions_by_kind"]["test"] == {
        "district": {"generation": 4, "judgment": 4},
        "street": {"generation": 4, "judgment": 8, "choice": 4},
        "address": {"generation": 4},
    }
    assert written["address_sources"] == {"map": 5, "manifest": 5}
    assert written["rejected"] == {"no GPS": 2, "not a picture": 1}
    assert (written["min_train_to_held_out_m"], written["split_buffer_m"]) == (51.25, 25.0)


@pytest.mark.parametrize("lat", [0.0, 60.0])
def test_areas_are_those_on_the_globe(lat: float) -> None:
    """A square of 2 km whose sides run north and east, also where a degree of longitude is short."""
    globe = pyproj.Geod(ellps="WGS84")
    at = [globe.fwd(25, lat, azimuth, 2000**0.5 * 1000**0.5)[:2] for azimuth in (45, 135, 225, 315)]
    corners = [place(i, 0, 0, MILL, lat=y, lon=x) for i, (x, y) in enumerate(at)]
    assert card._area_km2(corners) == pytest.approx(4, abs=0.002)
    picture = CityFigures(corners, Gazetteer([Address(MILL, "Harbour")]))
    assert np.abs(picture.xy) == pytest.approx(np.full((4, 2), 1000), abs=1)
    assert np.sign(picture.xy).tolist() == [[1, 1], [1, -1], [-1, -1], [-1, 1]]


@pytest.mark.parametrize(
    ("photos", "words"), [(999, "n<1K"), (1000, "1K<n<10K"), (9999, "1K<n<10K"), (10_000, "10K<n<100K"), (10**6, "1M<n<10M")]
)
def test_size_in_the_words_of_the_hub(photos: int, words: str) -> None:
    header = yaml.safe_load(card._header({**City().card(), "photos": photos}, ["train", "val"]))
    assert header["size_categories"] == [words]
    assert [files["split"] for files in header["configs"][0]["data_files"]] == ["train", "validation"]
    assert [files["path"] for files in header["configs"][0]["data_files"]] == ["train-*.parquet", "val-*.parquet"]


def test_long_tail_before_and_after_the_partition() -> None:
    per = City().card()["places_per"]
    assert per["street"] == {
        "names": 2, "largest": 5, "median": 5.0, "share_of_largest_tenth": 0.5, "with_fewer_than_5": 0,
    }  # fmt: skip
    assert (per["sub_street"]["names"], per["sub_street"]["largest"], per["sub_street"]["with_fewer_than_5"]) == (4, 5, 3)


def test_questions_are_counted_as_written(tmp_path: Path) -> None:
    City().write(tmp_path)
    rounds = [r for row in tables.iter_rows(tmp_path, "train") for r in row["rounds"]]
    counted = card.count_questions(tmp_path, "train")
    assert sum(n for kinds in counted.values() for n in kinds.values()) == len(rounds)
    for level, kinds in counted.items():
        for kind, n in kinds.items():
            assert n == sum((r["level"], r["kind"]) == (level, kind) for r in rounds)
    assert card.count_questions(tmp_path, "absent") == {}


def test_the_hub_library_opens_the_folder(tmp_path: Path) -> None:
    City(license="cc-by-4.0").write(tmp_path / "city")
    opened = datasets.load_dataset(str(tmp_path / "city"), cache_dir=str(tmp_path / "cache"))
    assert {split: table.num_rows for split, table in opened.items()} == {"train": 8, "validation": 4, "test": 4}
    assert opened["train"][0]["image"].size == (8, 8)
    header = yaml.safe_load((tmp_path / "city" / "README.md").read_text().split("---")[1])
    assert header["license"] == "cc-by-4.0"
    assert header["size_categories"] == ["n<1K"]
    for picture in re.findall(r"\]\((figures/.*?)\)", (tmp_path / "city" / "README.md").read_text()):
        Image.open(tmp_path / "city" / picture).verify()


def test_the_page_needs_nothing_else_and_escapes_names(tmp_path: Path) -> None:
    City(name="<b>Toy|town</b>", attribution=["© <i>me</i> | you"]).write(tmp_path)
    page, text = (tmp_path / "card.html").read_text(), (tmp_path / "README.md").read_text()
    assert "<b>Toy|town</b>" not in page
    assert "# <b>" not in text
    assert "<i>me</i>" not in page + text
    assert "© &lt;i>me&lt;/i> \\| you" in text
    loaded = re.findall(r"""(?:src|href)=["'](.{10})""", page)
    assert len(loaded) == 3
    assert set(loaded) == {"data:image"}
    assert "51.2 m" in page
    assert "51.2 m" in text


@pytest.mark.parametrize(
    ("city", "tiles", "expected"),
    [
        ({"streets": "/data/town.osm.pbf"}, {}, [card.OSM_ATTRIBUTION]),
        ({"streets": "town.osm.pbf", "attribution": ["Map: OpenStreetMap, ODbL"]}, {}, ["Map: OpenStreetMap, ODbL"]),
        ({"streets": "roads.geojson", "geocoder": GeocoderConfig()}, {}, [card.OSM_ATTRIBUTION]),
        ({"streets": "roads.geojson", "geocoder": GeocoderConfig(service="google")}, {}, []),
        ({"attribution": ["a", "a"]}, {"attribution": "© tiles"}, ["a", "© tiles", "© imagery"]),
    ],
)
def test_attributions_of_the_settings_and_of_openstreetmap(
    city: dict[str, Any], tiles: dict[str, Any], expected: list[str]
) -> None:
    town = City(**city)
    town.config.tiles = TilesConfig(**tiles)
    assert town.card(attribution=["© imagery"] if tiles else [])["attribution"] == expected


def test_sources_show_no_keys_and_no_folders() -> None:
    town = City(streets="/home/me/secret-project/roads.geojson", districts="s3://bucket/wards.geojson")
    town.config.tiles = TilesConfig(imagery="https://user:pass@tiles.example.org/{z}/{x}/{y}.png?key=abc123")
    assert town.card()["sources"] == {
        "photos": "photos.csv",
        "streets": "roads.geojson",
        "districts": "wards.geojson",
        "imagery": "tiles.example.org",
    }


def test_a_dataset_of_one_split_and_one_place(tmp_path: Path) -> None:
    town = City(density=DensityConfig(views=0.5))
    town.places = {"p0": place(0, 0, 0, MILL)}
    town.photos = town.photos[:1]
    town.split = PlaceSplit({"p0": "test"}, {}, None)
    town.gazetteer = Gazetteer([Address(MILL, "Harbour")])
    written = town.write(tmp_path)
    assert list(written["splits"]) == ["test"]
    assert written["area_km2"] == 0
    assert "sub_streets" not in written
    assert "clarify them before you publish this dataset" in (tmp_path / "README.md").read_text()


def test_neighbouring_streets_differ_in_colour() -> None:
    grid = {f"{d}{i}": shapely.LineString([(100 * i, 0), (100 * i, 900)] if d == "n" else [(0, 100 * i), (900, 100 * i)])
            for d in "ne" for i in range(10)}  # fmt: skip
    hues = _colours(grid)
    assert set(hues.values()) <= set(HUES)
    assert all(hues[f"n{i}"] != hues[f"e{j}"] for i in range(10) for j in range(10))


def test_figures_are_the_same_every_time_and_have_no_missing_glyphs() -> None:
    town = City()
    street = "銀座通り"
    places = [place(i, 40 * i, 0, street if i % 2 else MILL) for i in range(6)]
    part = {p.id: "train" for p in places}
    shapes = {street: shapely.LineString([(0, 0), (0.002, 0)])}
    gazetteer = Gazetteer([Address(street, "中央区"), Address(MILL, "Harbour")], shapes, town.gazetteer.district_geometry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = [CityFigures(places, gazetteer).street_map() for _ in range(2)]
        CityFigures(places, gazetteer).split_map(part)
        long_tail({street: 3, MILL: 1}, {})
    assert drawn[0] == drawn[1]
    assert Image.open(io.BytesIO(drawn[0])).width > 1000
