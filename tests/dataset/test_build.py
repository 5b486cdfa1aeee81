"""Rows of a city dataset, without a cluster"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from addressvlm.config.city import CityConfig, PartitionConfig
from addressvlm.dataset import build
from addressvlm.dataset.geocoding import Place
from addressvlm.dataset.photos import Photo, cut_view
from addressvlm.dataset.streets import StreetMap
from addressvlm.gazetteer.gazetteer import Address

STREETS = ("Mill Street", "High Street", "Low Street", "King Street", "Oak Road")


def place(number: int) -> Place:
    street = STREETS[number % 5]
    return Place(
        f"p{number}", 52 + number / 1000, 13.0, 0, 0, Address(street, "West" if number % 5 < 3 else "East"), 1.0, STREETS[0],
        number == 1, source="map", margin_m=3.0, second_street="Oak Road", sub_street=f"{street} from X on",
    )  # fmt: skip


PLACES = {f"p{number}": place(number) for number in range(10)}
PHOTOS = [
    Photo(row, f"{key}/{view}", f"{key}{view}.png", key, 52 + view, 13 + view, heading=90.0 * view, view=90.0 * view)
    for row, key in enumerate(PLACES, 1)
    for view in range(1 + row % 2)
]


def rows(answers: dict[str, Place] = PLACES) -> list[dict[str, Any]]:
    return list(build.listing_rows(PHOTOS, PLACES, answers))


def test_listing_rows_hold_the_photo_and_its_place() -> None:
    city = CityConfig(answer="sub_street", partition=PartitionConfig())
    answers = build.answer_places(PLACES, city)
    listed = rows(answers)
    assert [row["index"] for row in listed] == list(range(len(PHOTOS)))
    for row, photo in zip(listed, PHOTOS, strict=True):
        place = PLACES[photo.place]
        assert (row["lat"], row["lon"], row["heading"], row["view"]) == (photo.lat, photo.lon, photo.heading, photo.view)
        assert (row["street"], row["main_street"]) == (place.sub_street, place.address.street)
        assert (row["second_street"], row["cross_street"], row["ambiguous"]) == ("Oak Road", "Mill Street", place.id == "p1")
        assert set(row) == set(build.LISTING_SCHEMA.names)
    assert build.answer_places(PLACES, CityConfig()) == PLACES


def test_each_panorama_is_cut_at_the_heading_of_its_row(tmp_path: Path) -> None:
    city = CityConfig.model_validate({"panorama": {"headings": [0, 90], "fov_deg": 70, "pixels": 64}})
    noise = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    panorama = Image.fromarray(noise).resize((256, 128))
    for photo in PHOTOS[:4]:
        panorama.save(tmp_path / photo.file)
    result = build.check_photos(str(tmp_path), city.model_dump_json(), rows()[:5])
    for row in result.tables["photos"]:
        expected = np.asarray(cut_view(panorama, row["view"], 70, 64)).astype(int)
        assert abs(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).astype(int) - expected).mean() < 4
    assert [(r["id"], r["row"]) for r in result.rejects] == [(PHOTOS[4].id, PHOTOS[4].row)]
    alone = [build.check_photos(str(tmp_path), city.model_dump_json(), [row]).tables["photos"] for row in rows()[:4]]
    assert result.tables["photos"] == [row for table in alone for row in table]


def test_conversations_depend_on_the_seed_and_the_photo_alone(tmp_path: Path) -> None:
    city = CityConfig(rounds=3)
    gazetteer = build.build_gazetteer(city, StreetMap([], []), PLACES, PHOTOS)
    gazetteer.save(tmp_path / "gazetteer.geojson")
    part = np.array([index % 4 - 1 for index in range(len(PHOTOS))], dtype=np.int8)

    def finished(some: list[dict[str, Any]], seed: int = 0) -> dict[str, list[dict[str, Any]]]:
        return build.add_conversations(
            part, (str(tmp_path / "gazetteer.geojson"), "x"), city.model_dump_json(), seed, some
        ).tables

    together = finished(rows())
    assert {split: [row["index"] % 4 - 1 for row in result] for split, result in together.items()} == {
        split: [number] * sum(part == number) for number, split in enumerate(build.SPLITS)
    }
    assert {len(row["rounds"]) for row in together["train"]} == {3}
    for split, result in together.items():
        assert result == [row for one in rows() for row in finished([one])[split]]
    assert finished(rows()[::-1])["train"] == together["train"][::-1]
    assert finished(rows(), seed=1)["train"] != together["train"]
    views = [row["rounds"] for row in finished([row | {"index": 1} for row in rows() if row["place"] == "p0"])["train"]]
    assert views[0] != views[1]


def test_the_gazetteer_counts_photos_and_places_of_each_street() -> None:
    gazetteer = build.build_gazetteer(CityConfig(name="Town"), StreetMap([], []), PLACES, PHOTOS)
    assert gazetteer._photos == {s: sum(PLACES[p.place].address.street == s for p in PHOTOS) for s in STREETS}
    assert gazetteer._places == dict.fromkeys(STREETS, 2)
