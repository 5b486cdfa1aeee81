"""Photos whose names tell where they are"""

from pathlib import Path

import pyproj
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from addressvlm.config.city import CityConfig
from addressvlm.dataset import readers
from addressvlm.dataset.readers import file_names
from tests.support.sources import photo, read, write_file

SF = "@0544388.51@4172758.25@10@S@037.70098@-122.49646@kPnABhWJ1kA61eMNPLs1vQ@03@210@@@@201606@@.jpg"


def test_a_name_of_sf_xl() -> None:
    cells = file_names.parse_file_name(f"37.70/{SF}")
    assert (cells["lat"], cells["lon"]) == pytest.approx((37.70098, -122.49646), abs=1e-5)
    assert (cells["place"], cells["heading"]) == ("37.70/kPnABhWJ1kA61eMNPLs1vQ", "210")


@given(st.floats(-79.9, 83.9), st.floats(-179.99, 179.99), st.booleans())
@settings(max_examples=80, deadline=None)
def test_utm_names_give_back_their_position(lat: float, lon: float, with_degrees: bool) -> None:
    assume(abs(lat) > 1e-4)  # at the equator the band decides by a rounding error
    zone = int((lon + 180) // 6) + 1
    band = file_names.BANDS[min(int((lat + 80) // 8), 19)]
    to_utm = pyproj.Transformer.from_crs(4326, (32700 if lat < 0 else 32600) + zone, always_xy=True)
    east, north = to_utm.transform(lon, lat)
    degrees = f"@{lat:09.5f}@{lon:010.5f}" if with_degrees else "@@"
    cells = file_names.parse_file_name(f"@{east:010.2f}@{north:010.2f}@{zone:02d}@{band}{degrees}@pano@@@@@@@@.jpg")
    assert "PROBLEM" not in cells
    assert (cells["lat"], cells["lon"]) == pytest.approx((lat, lon), abs=2e-6 if abs(lat) < 80 else 1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("photo.jpg", "name without a position: "),
        ("@.jpg", "name without a position: "),
        (SF.replace("4172758.25", "4273758.25"), "positions differ: UTM is 38.6"),
        (SF.replace("@10@", "@99@"), "UTM zone out of range: 99"),
        (SF.replace("0544388.51", "9944388.51"), "UTM out of range: "),
        (SF.replace("@S@037.70098@-122.49646", "@I@@"), "not a UTM band: 'I'"),
        (
            "@0334388.51@6252266.00@56@S@@@x@@@@@@@@.jpg",
            "UTM band against latitude: band S is from 32 to 40 and the position at 56",
        ),
        (SF.replace("@S@", "@D@"), "UTM band against latitude: band D is from -72 to -64 and the position at 37.70"),
        (SF.replace("0544388.51", "east"), "not a number: east is 'east'"),
        (SF.replace("@210@", "@north@"), "not a number: heading is 'north'"),
        ("@0544388.51@4172758.25@@@@@.jpg", "empty cell: lat"),
        ("@@@@@0@0@.jpg", "position is 0, 0: "),
    ],
)
def test_names_without_a_position(tmp_path: Path, name: str, reason: str) -> None:
    listing = write_file(tmp_path, f"{SF}\n{name}\n", "images_paths.txt")
    photos, rejects = read(manifest=listing, reader="sfxl")
    assert [p.row for p in photos] == [1]
    assert rejects[0]["reason"].startswith(reason)


@pytest.mark.parametrize(("degrees", "problem"), [(0.0003, False), (0.0004, True)])
def test_positions_of_a_name_may_be_20_metres_apart(degrees: float, problem: bool) -> None:
    """Of longitude at 60 degrees north: 17 and 22 m, which would be 33 and 45 m at the equator."""
    east, north = pyproj.Transformer.from_crs(4326, 32633, always_xy=True).transform(15.0, 60.0)
    cells = file_names.parse_file_name(f"@{east:.2f}@{north:.2f}@33@V@{60:.5f}@{15 + degrees:.5f}@@@@@@@@@.jpg")
    assert ("PROBLEM" in cells) is problem


def test_with_a_latitude_in_the_name_s_may_mean_south() -> None:
    cells = file_names.parse_file_name("@0334388.51@6252266.00@56@S@-33.85692@151.20976@x@@@@@@@@.jpg")
    assert (cells["lat"], cells["lon"]) == pytest.approx((-33.85692, 151.20976), abs=1e-4)


def test_sf_xl_as_folder_and_as_list_are_the_same(tmp_path: Path) -> None:
    for heading in ("030", "210"):
        photo(tmp_path / "photos" / "37.70" / SF.replace("@210@", f"@{heading}@"))
    listing = write_file(tmp_path, "".join(f"37.70/{SF.replace('@210@', f'@{h}@')}\n" for h in ("030", "210")), "paths.txt")
    from_folder = read(photos=str(tmp_path / "photos"))
    assert from_folder == read(manifest=listing, photos=str(tmp_path / "photos"))
    assert [p.heading for p in from_folder[0]] == [30.0, 210.0]
    assert {p.place for p in from_folder[0]} == {"37.70/kPnABhWJ1kA61eMNPLs1vQ"}


@pytest.mark.parametrize(
    "header", ["file,utm_east,utm_north,role", "image,easting,northing,role", "dbImageFns,utmDb_1,utmDb_2,role"]
)
def test_pitts250k_with_its_utm_positions(tmp_path: Path, header: str) -> None:
    rows = "000/000829_pitch1_yaw1.jpg,584826.0,4476945.6,database\n000/000829_pitch2_yaw12.jpg,584826.0,4476945.6,database\n"
    listing = write_file(tmp_path, f"{header}\n{rows}000/000829_pitch1_yaw1.jpg,584700,4477100,queries\n", "pitts.csv")
    assert readers.recognize(CityConfig(manifest=listing)) == "pitts"
    photos, rejects = read(manifest=listing)
    assert rejects == []
    assert (photos[0].lat, photos[0].lon) == pytest.approx((40.438834, -79.999829), abs=1e-6)
    assert [p.place for p in photos] == ["000/000829", "000/000829", "queries_real/000/000829"]
    assert photos[2].file == "queries_real/000/000829_pitch1_yaw1.jpg"


def test_pitts250k_after_renaming(tmp_path: Path) -> None:
    name = "@0584826.00@4476945.60@17@T@040.43883@-079.99983@000829@00@@@@@@pitch1_yaw1@.jpg"
    photo(tmp_path / "database" / name)
    assert readers.recognize(CityConfig(photos=str(tmp_path))) == "pitts"
    photos, _ = read(photos=str(tmp_path))
    assert (photos[0].place, photos[0].heading) == ("database/000829", None)
