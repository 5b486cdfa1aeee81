"""A folder of photos with GPS in them"""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from tests.support.sources import ALMADA, GPS, photo, read


def test_a_folder_of_photos_with_gps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(tmp_path / "b" / "one.jpg", ALMADA | {GPS.GPSImgDirection: 100.5, GPS.GPSImgDirectionRef: "T"})
    photo(tmp_path / "a.PNG", ALMADA | {GPS.GPSImgDirection: 10.0, GPS.GPSImgDirectionRef: "M"})
    photo(tmp_path / "c.webp", ALMADA | {GPS.GPSLatitudeRef: "S"}, size=(30, 40))
    (tmp_path / "notes.txt").write_text("no photo")
    (tmp_path / "._a.jpg").write_bytes(b"of a Mac")
    photos, rejects = read(photos=str(tmp_path))
    assert rejects == []
    assert [(p.row, p.file, p.heading) for p in photos] == [(1, "a.PNG", 10.0), (2, "b/one.jpg", 100.5), (3, "c.webp", None)]
    assert (photos[0].lat, photos[0].lon) == pytest.approx((38.675, -9.158333), abs=1e-6)
    assert [p.place == photos[0].place for p in photos] == [True, True, False]
    assert photos[2].lat == pytest.approx(-38.675)
    assert photos[0].fov_deg == pytest.approx(65.3, abs=0.1)  # 27 mm on 4:3
    assert photos[2].fov_deg == pytest.approx(51.3, abs=0.1)  # the same upright
    assert "1 directions are from magnetic north" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gps", "reason"),
    [
        (None, "no GPS: EXIF holds no latitude"),
        ({GPS.GPSLatitude: (1.0, 0.0, 0.0), GPS.GPSLatitudeRef: "N"}, "no GPS: EXIF holds no longitude"),
        (ALMADA | {GPS.GPSLatitude: (0.0, 0.0, 0.0), GPS.GPSLongitude: (0.0, 0.0, 0.0)}, "position is 0, 0: "),
        (ALMADA | {GPS.GPSLatitude: (138.0, 0.0, 0.0)}, "latitude out of range: 138 .*look swapped"),
        (ALMADA | {GPS.GPSLongitude: (200.0, 0.0, 0.0)}, "longitude out of range: -200 "),
        (ALMADA | {GPS.GPSLatitudeRef: "X"}, "GPS damaged: EXIF does not say whether the latitude is N or S"),
        (ALMADA | {GPS.GPSLongitudeRef: ""}, "GPS damaged: EXIF does not say whether the longitude is E or W"),
        (ALMADA | {GPS.GPSLatitude: (IFDRational(0, 0), 0.0, 0.0)}, "GPS damaged: the latitude in EXIF is"),
        (ALMADA | {GPS.GPSLatitude: (5.0, 4.0, 3.0, 2.0)}, "GPS damaged: the latitude in EXIF is"),
        (ALMADA | {GPS.GPSLatitude: (38.0, 75.0, 0.0)}, "GPS damaged: the latitude in EXIF has 75 minutes"),
        (ALMADA | {GPS.GPSLongitude: (9.0, 9.0, 60.0)}, "GPS damaged: the longitude in EXIF has 60 seconds"),
        (ALMADA | {GPS.GPSStatus: "V"}, "no GPS: EXIF calls the position void \\(status V\\)"),
        (ALMADA | {GPS.GPSMapDatum: "TOKYO"}, "GPS datum: the position is in TOKYO"),
        (ALMADA | {GPS.GPSImgDirection: 400.0}, "direction out of range: heading is 400"),
    ],
)
def test_photos_without_a_position_have_a_reason(tmp_path: Path, gps: dict[int, Any] | None, reason: str) -> None:
    photo(tmp_path / "good.jpg", ALMADA)
    photo(tmp_path / "bad.jpg", gps)
    photos, rejects = read(photos=str(tmp_path))
    assert [p.file for p in photos] == ["good.jpg"]
    with pytest.raises(ValueError, match=f"^{reason}"):
        raise ValueError(rejects[0]["reason"])


def test_files_that_are_no_photos_have_a_reason(tmp_path: Path) -> None:
    photo(tmp_path / "cut.jpg", ALMADA)
    data = (tmp_path / "cut.jpg").read_bytes()
    for name, content in {
        "cut.jpg": data[:60],
        "empty.jpg": b"",
        "phone.heic": b"\0\0\0\x18ftypheic",
        "text.jpg": b"text",
    }.items():
        (tmp_path / name).write_bytes(content)
    photos, rejects = read(photos=str(tmp_path))
    assert photos == []
    assert [r["file"] for r in rejects] == ["cut.jpg", "empty.jpg", "phone.heic", "text.jpg"]
    assert {r["reason"].partition(":")[0] for r in rejects} <= {"not a photo", "photo unreadable", "no GPS", "EXIF damaged"}
    assert "phone.heic is HEIC, as phones write it: convert it to JPEG" in rejects[2]["reason"]


def test_odd_settings_of_the_camera_do_not_lose_its_position(tmp_path: Path) -> None:
    photo(tmp_path / "odd.jpg", ALMADA | {GPS.GPSStatus: "A", GPS.GPSMapDatum: "WGS-84"})
    data = (tmp_path / "odd.jpg").read_bytes()
    entry = re.search(rb"\x69\x87\x04\0\x01\0\0\0|\x87\x69\0\x04\0\0\0\x01", data)  # where the camera's settings are: nowhere
    assert entry
    (tmp_path / "odd.jpg").write_bytes(data[: entry.end()] + b"\7\7\7\7" + data[entry.end() + 4 :])
    photo(tmp_path / "zoom.jpg", ALMADA, focal_mm=0)
    (odd, zoom), rejects = read(photos=str(tmp_path))
    assert rejects == []
    assert (odd.lat, odd.lon, odd.fov_deg) == (zoom.lat, zoom.lon, zoom.fov_deg) == (pytest.approx(38.675), zoom.lon, None)


def test_the_field_of_view_is_that_of_the_picture_as_it_is_shown(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg", ALMADA, size=(40, 30))
    photo(tmp_path / "b.jpg", ALMADA, size=(40, 30), turned=6)  # stored lying, shown upright
    (lying, upright), _ = read(photos=str(tmp_path))
    assert (lying.fov_deg, upright.fov_deg) == (pytest.approx(65.3, abs=0.1), pytest.approx(51.3, abs=0.1))


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_bytes_as_exif_are_read_or_rejected(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("exif") / "noise.jpg"
    Image.new("RGB", (8, 8)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0" + noise)
    photos, rejects = read(photos=str(path.parent))
    assert len(photos) + len(rejects) == 1


def test_a_panorama_is_recognized_by_its_metadata(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta><rdf:Description GPano:ProjectionType="equirectangular" GPano:PoseHeadingDegrees="350.5"/></x:xmpmeta>'
    photo(tmp_path / "round.jpg", ALMADA, size=(64, 32), xmp=xmp)
    photos, rejects = read(photos=str(tmp_path))
    assert photos == []
    assert rejects[0]["reason"] == "panorama: set city.panorama to cut it into views"
    photos, rejects = read(photos=str(tmp_path), panorama={"headings": [0, 90], "fov_deg": 80})
    assert rejects == []
    assert [(p.id, p.row, p.view, p.heading, p.fov_deg) for p in photos] == [
        ("round.jpg@0", 1, 0.0, 350.5, 80.0),
        ("round.jpg@90", 1, 90.0, 80.5, 80.0),
    ]
    assert len({p.place for p in photos}) == 1
