"""Annotations, others' exports, and telling sources apart"""

import json
from pathlib import Path
from typing import Any

import pytest

from addressvlm import InputError
from addressvlm.config.city import CityConfig
from addressvlm.dataset import readers
from addressvlm.dataset.readers.exports import sub_street
from tests.dataset.readers.test_file_names import SF
from tests.support.sources import photo, read, write_file

IAL_ROW = {"image": "000/1.jpg", "neighborhood": "Oakland", "street": "Forbes Avenue"}
SUB_STREET = "Forbes Avenue between Atwood Street and Meyran Avenue"


@pytest.mark.parametrize(
    ("record", "sub_street"),
    [
        ({"lat": 40.4, "lon": -79.9, "cross_streets": ["Meyran Avenue", "Atwood Street"]}, SUB_STREET),
        ({"gps": [40.4, -79.9], "cross_street": "Atwood Street & Meyran Avenue"}, SUB_STREET),
        ({"coordinates": "40.4, -79.9", "intersections": "Atwood Street and Meyran Avenue"}, SUB_STREET),
        ({"location": {"lat": 40.4, "lng": -79.9}, "cross": "Atwood Street"}, "Forbes Avenue from Atwood Street on"),
        ({"geometry": {"type": "Point", "coordinates": [-79.9, 40.4]}, "sub_street": "Forbes East"}, "Forbes East"),
        ({"gps": [40.4, -79.9], "cross_streets": []}, ""),
    ],
)
def test_annotations_of_paper_002(tmp_path: Path, record: dict[str, Any], sub_street: str) -> None:
    expected = ("000/1.jpg", 40.4, -79.9, "Forbes Avenue", "Oakland", sub_street)
    named = {key: value for key, value in (IAL_ROW | record).items() if key != "image"}
    for content in ([IAL_ROW | record], {"annotations": [IAL_ROW | record]}, {"000/1.jpg": named}):
        photos, rejects = read(manifest=write_file(tmp_path, content))
        assert rejects == []
        assert [(p.file, p.lat, p.lon, p.street, p.district, p.sub_street) for p in photos] == [expected]


def test_an_annotation_whose_position_is_in_the_name(tmp_path: Path) -> None:
    path = write_file(tmp_path, [IAL_ROW | {"image": SF}, {"image": "x.jpg", "neighborhood": "Oakland"}, 7])
    photos, rejects = read(manifest=path)
    assert (photos[0].street, photos[0].heading, round(photos[0].lat, 4)) == ("Forbes Avenue", 210.0, 37.701)
    assert [r["reason"] for r in rejects] == ["empty cell: lat", "not a JSON object: the line"]
    assert sub_street("A", []) == ""


def test_an_annotation_keeps_the_columns_of_the_photo(tmp_path: Path) -> None:
    known = {"id": "one", "place": 7, "lat": 40.4, "lon": -79.9, "heading": 90, "fov_deg": 60, "panorama": False}
    photos, rejects = read(manifest=write_file(tmp_path, [IAL_ROW | known]))
    assert rejects == []
    assert [(p.id, p.place, p.heading, p.fov_deg, p.view) for p in photos] == [("one", "7", 90.0, 60.0, None)]
    assert read(manifest=write_file(tmp_path, [IAL_ROW | known | {"panorama": True}]))[1][0]["reason"].startswith("panorama: ")


GRAPH = {
    "id": "498763468214164",
    "geometry": {"type": "Point", "coordinates": [16.1, 48.1]},
    "computed_geometry": {"type": "Point", "coordinates": [16.2, 48.2]},
    "compass_angle": 10.0,
    "computed_compass_angle": 0.0,
    "camera_type": "perspective",
    "sequence": "yM68owBapdtxI1DJP4s35l",
}


def test_an_annotation_brings_its_split(tmp_path: Path) -> None:
    records = [
        IAL_ROW | {"image": f"{i}.jpg", "gps": [40.4, -79.9], "split": split} for i, split in enumerate(("train", "Test", None))
    ]
    photos, rejects = read(manifest=write_file(tmp_path, records))
    assert ([p.split for p in photos], rejects) == (["train", "Test", ""], [])


def test_mapillary_graph_api(tmp_path: Path) -> None:
    measured = {key: value for key, value in GRAPH.items() if not key.startswith("computed")} | {"id": "2"}
    records = [
        GRAPH,
        measured,
        GRAPH | {"id": "3", "camera_type": "spherical"},
        GRAPH | {"id": "4", "is_pano": False},
        {"id": "5"},
    ]
    photo(tmp_path / "photos" / "yM68" / "2.jpg")
    path = write_file(tmp_path, {"data": records, "paging": {}})
    features = [{"type": "Feature", "properties": r, "geometry": r.get("geometry")} for r in records]
    lines = "\n".join(json.dumps(record) for record in records)
    for export in (
        path,
        write_file(tmp_path, lines, "export.jsonl"),
        write_file(tmp_path, {"features": features}, "e.geojson"),
    ):
        assert readers.recognize(CityConfig(manifest=export)) == "mapillary"
        photos, rejects = read(manifest=export, photos=str(tmp_path / "photos"))
        assert [(p.id, p.file, p.lat, p.lon, p.heading) for p in photos] == [
            ("498763468214164", "498763468214164.jpg", 48.2, 16.2, 0.0),
            ("2", "yM68/2.jpg", 48.1, 16.1, 10.0),
            ("4", "4.jpg", 48.2, 16.2, 0.0),
        ]
        assert [r["reason"].partition(":")[0] for r in rejects] == ["panorama", "empty cell"]
    photos, _ = read(manifest=path, photos=str(tmp_path / "photos"), panorama={"headings": [0, 180]})
    assert [(p.id, p.view) for p in photos if p.row in (1, 3)] == [("498763468214164", None), ("3@0", 0.0), ("3@180", 180.0)]


def test_mapillary_tools_description(tmp_path: Path) -> None:
    description = [
        {"filename": "/elsewhere/a.jpg", "filetype": "image", "MAPLatitude": 42.0, "MAPLongitude": -129.2,
         "MAPCaptureTime": "2019_11_18_15_41_12_354", "MAPCompassHeading": {"TrueHeading": 123.9, "MagneticHeading": 120.0}},
        {"filename": "b.jpg", "error": {"type": "MapillaryGeoTaggingError", "message": "Unable to extract GPS"}},
        {"filename": "c.mp4", "filetype": "video", "MAPGPSTrack": []},
    ]  # fmt: skip
    photo(tmp_path / "drive" / "a.jpg")
    write_file(tmp_path, description, "mapillary_image_description.json")
    photos, rejects = read(photos=str(tmp_path))
    assert [(p.file, p.lat, p.lon, p.heading) for p in photos] == [("drive/a.jpg", 42.0, -129.2, 123.9)]
    assert [r["reason"] for r in rejects] == [
        "mapillary_tools could not use it: Unable to extract GPS",
        "not a photo: mapillary_tools calls it video",
    ]


KARTA = {"id": "9", "lat": "52.5", "lng": "13.4", "heading": "271.5", "sequenceId": "77", "sequenceIndex": "4",
         "shotDate": "2018-07-20", "name": "9_abc.jpg", "projection": "PLANE", "fieldOfView": "0"}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "stored"),
    [
        ({"status": {}, "result": {"data": [KARTA], "hasMoreData": False}}, "9_abc.jpg"),
        ({"status": {}, "result": {"data": KARTA}}, "77/9.jpg"),
        ({"currentPageItems": [KARTA]}, "77_4.jpg"),
        ({"osv": {"photos": [{"id": "9", "lat": "52.5", "lng": "13.4", "heading": "271.5", "sequence_index": "4",
                              "sequence_id": "77", "name": "storage6/files/photo/2018/7/20/proc/9_abc.jpg"}]}}, "9_abc.jpg"),
    ],
)  # fmt: skip
def test_kartaview_answers(tmp_path: Path, content: Any, stored: str) -> None:
    photo(tmp_path / "photos" / stored)
    path = write_file(tmp_path, content)
    assert readers.recognize(CityConfig(manifest=path)) == "kartaview"
    photos, rejects = read(manifest=path, photos=str(tmp_path / "photos"))
    assert rejects == []
    assert [(p.id, p.file, p.lat, p.lon, p.heading, p.fov_deg) for p in photos] == [("9", stored, 52.5, 13.4, 271.5, None)]


def test_kartaview_field_of_view(tmp_path: Path) -> None:
    photos, _ = read(manifest=write_file(tmp_path, [KARTA | {"id": "9", "fieldOfView": "70"}, KARTA | {"id": "10"}]))
    assert [(p.id, p.fov_deg) for p in photos] == [("9", 70.0), ("10", None)]


def test_kartaview_panoramas_need_the_setting(tmp_path: Path) -> None:
    path = write_file(tmp_path, [KARTA | {"projection": "SPHERE"}])
    assert read(manifest=path)[1][0]["reason"].startswith("panorama: set city.panorama")
    assert len(read(manifest=path, panorama={})[0]) == 4


# telling sources apart


def test_a_plain_table_is_a_manifest_and_a_plain_folder_is_exif(tmp_path: Path) -> None:
    table = write_file(tmp_path, "file,lat,lon,street,district\n000_1.jpg,1,2,Mill Street,Harbour\n", "m.csv")
    assert readers.recognize(CityConfig(manifest=table)) == "manifest"
    photo(tmp_path / "photos" / "a.jpg")
    assert readers.recognize(CityConfig(photos=str(tmp_path / "photos"))) == "exif"
    assert readers.photos_folder(CityConfig(manifest=table)) == str(tmp_path)
    assert readers.photos_folder(CityConfig(manifest=str(tmp_path / "photos"))) == str(tmp_path / "photos")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"city\.manifest is not set.*set city\.photos to a folder"),
        ({"photos": "{}/gone"}, "nothing is at .*gone: set city.manifest to a table or city.photos to a folder"),
        ({"photos": "{}/gone", "reader": "exif"}, "no folder at .*gone: set city.photos"),
        ({"photos": "{}/empty"}, "has no photos"),
        ({"manifest": "{}/pitts.mat", "reader": "pitts"}, "MATLAB file: save its dbImageFns and utmDb as a CSV"),
        ({"manifest": "{}/names.csv", "reader": "sfxl"}, "lacks the column file"),
    ],
)
def test_unusable_sources_are_errors(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "names.csv").write_text("name\na\n")
    with pytest.raises(InputError, match=message):
        read(**{key: value.format(tmp_path) for key, value in settings.items()})


def test_every_reader_of_the_settings_is_registered() -> None:
    named = CityConfig.model_fields["reader"].annotation.__args__  # type: ignore[union-attr]
    assert set(named) == {"auto", *readers.READERS}
