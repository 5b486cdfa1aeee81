"""Photos found by the names that tables from elsewhere give them, and folders as people have them"""

import json
import os
import unicodedata
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm.dataset.readers.base import PhotoFiles
from addressvlm.storage import remote_path, tables
from tests.support.sources import ALMADA, photo, read

COMPOSED = "Caf\u00e9 Zo\u00eb.jpg"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


@pytest.mark.parametrize(("on_disk", "in_table"), [(DECOMPOSED, COMPOSED), (COMPOSED, DECOMPOSED), (COMPOSED, COMPOSED)])
def test_accents_may_be_composed_in_another_way(tmp_path: Path, on_disk: str, in_table: str) -> None:
    photo(tmp_path / "img" / "Stra\u00dfe" / on_disk)
    (tmp_path / "photos.csv").write_text(f"file,lat,lon\nStra\u00dfe/{in_table},52.1,0.1\n", "utf-8")
    photos, _ = read(manifest=str(tmp_path / "photos.csv"), photos=str(tmp_path / "img"))
    assert [(p.file, p.id) for p in photos] == [(f"Stra\u00dfe/{on_disk}", f"Stra\u00dfe/{in_table}")]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("sub\\one.jpg", "sub/one.jpg"),
        (r"D:\drive\2024\sub\one.jpg", "sub/one.jpg"),
        (r"D:\drive\2024\two.jpg", "two.jpg"),
        (r"D:\drive\2024\three.jpg", "deep/down/three.jpg"),  # anywhere, if there is one of the name
        (r"D:\drive\2024\one.jpg", "one.jpg"),
        ("/home/anna/photos/two.jpg", "two.jpg"),
        (r"D:\drive\none.jpg", r"D:\drive\none.jpg"),
        (r"D:\drive\twin.jpg", r"D:\drive\twin.jpg"),  # nobody knows which
        ("two.jpg", "two.jpg"),
        ("three.jpg", "three.jpg"),
        ("s3://bucket/two.jpg", "s3://bucket/two.jpg"),
    ],
)
def test_paths_of_other_machines_are_found_by_their_last_parts(tmp_path: Path, name: str, found: str) -> None:
    for file in ("one.jpg", "two.jpg", "sub/one.jpg", "deep/down/three.jpg", "a/twin.jpg", "b/twin.jpg"):
        photo(tmp_path / file)
    assert PhotoFiles(str(tmp_path)).find(name) == found
    absolute = str(tmp_path / "two.jpg")
    assert PhotoFiles(str(tmp_path)).find(absolute) == absolute


def test_two_names_of_one_file_are_not_two_photos(tmp_path: Path) -> None:
    photo(tmp_path / "one.jpg")
    (tmp_path / "m.csv").write_text("file,lat,lon\nC:\\a\\one.jpg,1,2\nC:\\b\\one.jpg,3,4\n")
    photos, rejects = read(manifest=str(tmp_path / "m.csv"))
    assert [p.file for p in photos] == ["one.jpg"]
    assert rejects[0]["reason"] == r"one photo for two names: one.jpg is C:\a\one.jpg and C:\b\one.jpg"


def test_mapillary_tools_on_windows(tmp_path: Path) -> None:
    photo(tmp_path / "one.jpg")
    photo(tmp_path / "cam 2" / "two.jpg")
    description = [
        {"filename": rf"D:\drive\{name}.jpg", "filetype": "image", "MAPLatitude": 52.1, "MAPLongitude": 0.1}
        for name in ("one", "two")
    ]
    (tmp_path / "mapillary_image_description.json").write_text(json.dumps(description), "utf-8-sig")
    photos, rejects = read(photos=str(tmp_path))
    assert [p.file for p in photos] == ["one.jpg", "cam 2/two.jpg"]
    assert rejects == []


def test_linked_folders_are_folders_and_loops_end(tmp_path: Path) -> None:
    top, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for file in (top / "a.jpg", top / "real" / "b.jpg", elsewhere / "c.jpg", elsewhere / "deep" / "d.jpg"):
        photo(file, ALMADA)
    for link, target in {
        top / "linked": elsewhere,
        top / "again": top / "real",  # the photos of a folder count once
        top / "loop": top,
        top / "real" / "up": tmp_path,
        elsewhere / "deep" / "back": elsewhere,
        top / "gone": tmp_path / "nowhere",
        top / ".hidden": elsewhere,
    }.items():
        link.symlink_to(target)
    expected = ["a.jpg", "linked/c.jpg", "linked/deep/d.jpg", "real/b.jpg"]
    assert [file for file in remote_path.walk_files(str(top)) if file != "gone"] == expected
    assert [p.file for p in read(photos=str(top))[0]] == expected


def test_a_name_that_is_not_utf_8_is_a_reject(tmp_path: Path) -> None:
    photo(tmp_path / "good.jpg", ALMADA)
    try:
        os.rename(tmp_path / "good.jpg", os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg"))
    except OSError:
        return  # a file system that has no such names
    photo(tmp_path / "good.jpg", ALMADA)
    photos, rejects = read(photos=str(tmp_path))
    assert [p.file for p in photos] == ["good.jpg"]
    assert [(r["file"], r["reason"].partition(":")[0]) for r in rejects] == [("caf\\udce9.jpg", "file not in UTF-8")]
    pa.Table.from_pylist(rejects, schema=tables.REJECTS)


@given(st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_name_is_found_or_stays(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    if not folder.exists():
        photo(folder / "a.jpg")
    assert PhotoFiles(str(folder)).find(name) in (name, "a.jpg")
