"""Rows of tables as photos: what a cell may hold, and why a row is no photo"""

from typing import Any

import pytest

from addressvlm.config.city import PanoramaConfig
from addressvlm.dataset.photos import Photo
from addressvlm.dataset.readers.rows import to_photos


def read(*rows: dict[str, Any], panorama: PanoramaConfig | None = None) -> tuple[list[Photo], list[str]]:
    """The photos, and why other rows are none."""
    good, rejects = to_photos([{"file": f"{n}.jpg", "lat": 52, "lon": 1, **row} for n, row in enumerate(rows)], panorama)
    return good, [reject["reason"] for reject in rejects]


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        *(({"lat": lat, "lon": lon}, None) for lat, lon in ((90, 0), (-90, 0), (5, 180), (5, -180), (0, 5), (0.00001, 0))),
        ({"lat": 90.001}, "latitude out of range: 90.001 is not in -90..90; latitude and longitude look swapped"),
        ({"lat": -180, "lon": 90}, "latitude out of range: -180 is not in -90..90; latitude and longitude look swapped"),
        ({"lat": 180.5, "lon": 5}, "latitude out of range: 180.5 is not in -90..90"),
        ({"lat": 100, "lon": 90.5}, "latitude out of range: 100 is not in -90..90"),
        ({"lon": 180.5}, "longitude out of range: 180.5 is not in -180..180"),
        ({"lat": 1e-7, "lon": -1e-7}, "position is 0, 0: the camera had no fix"),
        ({"lat": None, "lon": None}, "empty cell: lat"),
        *(({"heading": heading}, None) for heading in (360, -360, 0)),
        ({"heading": 360.5}, "direction out of range: heading is 360.5, not in -360..360"),
        ({"heading": -361}, "direction out of range: heading is -361, not in -360..360"),
        *(({"fov_deg": fov}, None) for fov in (360, 0.5)),
        ({"fov_deg": 0}, "field of view out of range: 0 is not in 0..360"),
        ({"fov_deg": 360.5}, "field of view out of range: 360.5 is not in 0..360"),
        ({"id": float(2**53 - 1)}, None),
        ({"id": float(2**53)}, "id rounded: 9007199254740992 has lost digits, write ids as text"),
        ({"id": "1.23E+15"}, "id rounded: 1.23E+15 has lost digits, write ids as text"),
        ({"district": "Harbour; Old Town"}, "several names in one cell: district is Harbour; Old Town"),
        ({"panorama": "no"}, None),
    ],
)
def test_the_bounds_of_a_cell_are_themselves_allowed(cells: dict[str, Any], reason: str | None) -> None:
    good, reasons = read(cells)
    assert (len(good), reasons) == ((0, [reason]) if reason else (1, []))


@pytest.mark.parametrize(("given", "heading"), [(360, 0), (-90, 270), (-360, 0), (-1e-20, 0), (359.5, 359.5), ("12,5", 12.5)])
def test_directions_are_counted_from_north(given: Any, heading: float) -> None:
    assert read({"heading": given})[0][0].heading == heading


def test_the_columns_of_a_row_are_those_of_the_photo() -> None:
    cells = {"id": 7.0, "place": 8, "heading": 9, "fov_deg": 60, "street": "Mill St;Quay Rd", "district": "Harbour",
             "sub_street": "Mill St 1", "block": 3, "split": "Val"}  # fmt: skip
    expected = Photo(
        row=1, id="7", file="0.jpg", place="8", lat=52, lon=1, heading=9, street="Mill St", other_street="Quay Rd",
        district="Harbour", sub_street="Mill St 1", block="3", split="Val", fov_deg=60,
    )  # fmt: skip
    assert read(cells) == ([expected], [])
    plain = read({"lat": 52.1234567})[0][0]
    assert (plain.id, plain.place, plain.street, plain.block, plain.heading) == ("0.jpg", "52.12346,1.00000", "", "", None)


def test_an_id_is_taken_by_a_row_that_is_a_photo() -> None:
    good, reasons = read({"id": "x", "lat": 99, "lon": 99}, {"id": "x"}, {}, {"id": "x"}, {"id": "2.jpg"})
    assert [(photo.id, photo.row) for photo in good] == [("x", 2), ("2.jpg", 3)]
    assert [why.partition(":")[2] for why in reasons[1:]] == [
        " 'x' is already the id of row 2", " '2.jpg' is already the id of row 3"
    ]  # fmt: skip


def test_a_panorama_is_cut_into_views_to_all_sides() -> None:
    cut = PanoramaConfig(headings=(0, 90, 360, -90), fov_deg=80)
    rows = ({"heading": 300}, {"panorama": "yes"}, {"panorama": "no", "heading": 300, "fov_deg": 70})
    views, reasons = read(*rows, panorama=cut)
    assert reasons == []
    assert [(v.id, v.heading, v.view, v.fov_deg) for v in views] == [
        ("0.jpg@0", 300, 0, 80), ("0.jpg@90", 30, 90, 80), ("0.jpg@270", 210, 270, 80),
        ("1.jpg@0", None, 0, 80), ("1.jpg@90", None, 90, 80), ("1.jpg@270", None, 270, 80),
        ("2.jpg", 300, None, 70),
    ]  # fmt: skip
    assert read({"panorama": "yes"}) == ([], ["panorama: set city.panorama to cut it into views"])
