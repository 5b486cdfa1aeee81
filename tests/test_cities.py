"""The table of photos and the photos themselves: python -m pytest tests/test_cities.py"""

import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from addressvlm import InputError
from addressvlm.cities import manifest
from addressvlm.cities.photos import check_photo


def test_manifest_reads_the_same_from_every_format(tmp_path: Path) -> None:
    rows = [
        {"photo": "a.jpg", "place": 7, "lat": 52.5, "lon": -0.25, "heading_deg": 450, "street": None},
        {"photo": "b.jpg", "place": None, "lat": 52.123456, "lon": 1.0, "heading_deg": None, "street": " Mill Street "},
    ]
    (tmp_path / "m.csv").write_text(
        "photo;place;lat;lon;heading_deg;street\na.jpg;7;52.5;-0.25;450;\nb.jpg;;52.123456;1;; Mill Street \n", "utf-8-sig"
    )
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    expected = [
        manifest.Photo(1, "a.jpg", "a.jpg", "7", 52.5, -0.25, 90.0),
        manifest.Photo(2, "b.jpg", "b.jpg", "52.12346,1.00000", 52.123456, 1.0, None, "Mill Street"),
    ]
    for name in ("m.csv", "m.jsonl", "m.parquet"):
        assert manifest.read(tmp_path / name) == (expected, [])


def test_manifest_tells_bad_rows_apart(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text(
        "file,lat,lon,id\na.jpg,52,0,one\nb.jpg,91,0,two\nc.jpg,52,181,three\nd.jpg,nan,0,four\ne.jpg,,0,five\n"
        "f.jpg,52,0,one\n,52,0,seven\nh.jpg,north,0,eight\ni.jpg,52\nj.jpg,52,0,ten\n"
    )
    good, rejects = manifest.read(path)
    assert [p.row for p in good] == [1, 10]
    assert {r["row"]: r["reason"] for r in rejects} == {
        2: "latitude out of range: 91 is not in -90..90",
        3: "longitude out of range: 181 is not in -180..180",
        4: "not a number: lat is 'nan'",
        5: "empty cell: lat",
        6: "duplicate id: 'one' is already the id of row 1",
        7: "empty cell: file",
        8: "not a number: lat is 'north'",
        9: "empty cell: lon",
    }
    assert rejects[0] == {"file": "b.jpg", "row": 2, "id": "two", "reason": rejects[0]["reason"]}


def test_manifest_rejects_lines_and_values_of_other_types(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"file": "a.jpg", "lat": 1, "lon": 2}\n{"file": \n{"file": "c.jpg", "lat": [1], "lon": true}\n')
    good, rejects = manifest.read(path)
    assert [p.id for p in good] == ["a.jpg"]
    assert [(r["row"], r["reason"]) for r in rejects] == [
        (2, "not a JSON object: the line"),
        (3, "not a number: lat is '[1]'"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", b"file,lat\na.jpg,1\n", r"m\.csv lacks the column lon \(it has file, lat\)"),
        ("m.jsonl", b'{"lat": 1, "lon": 2}', "lacks the column file"),
        ("m.csv", b"file,lat,lon\n", "has no rows"),
        ("m.csv", b"", "has no rows"),
        ("m.csv", "file,lat,lon\nß.jpg,1,2".encode("latin-1"), "not UTF-8"),
        ("m.parquet", b"PAR1 and nothing", "can't be read"),
        ("m.xlsx", b"PK", r"save it as one"),
        ("m.csv", None, "no manifest at"),
    ],
)
def test_manifest_that_is_none(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        manifest.read(tmp_path / name)


# photos


def encoded(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 20), **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_good_photo_keeps_its_bytes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo"
    path.write_bytes(encoded(kind))
    assert check_photo(path, 1) == path.read_bytes()


@pytest.mark.parametrize(("kind", "mode"), [("BMP", "RGB"), ("TIFF", "RGB"), ("GIF", "P"), ("JPEG", "CMYK"), ("PNG", "RGBA")])
def test_other_formats_become_rgb_jpeg(tmp_path: Path, kind: str, mode: str) -> None:
    path = tmp_path / "photo"
    path.write_bytes(encoded(kind, mode))
    data = check_photo(path, 1)
    assert isinstance(data, bytes)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 20))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(exif=exif))
    data = check_photo(path, 1)
    assert isinstance(data, bytes)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (20, 40)
        assert image.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "photo missing"),
        (b"", "photo empty"),
        (b"GIF89a, or so it says", "not a photo"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", "not a photo"),
        (encoded(size=(200, 100))[:5000], "photo damaged"),
        (encoded("PNG")[:500], "photo damaged"),
        (encoded(size=(2000, 1000)), "photo too large"),
        (encoded(size=(900, 1)), "photo too small"),
    ],
)
def test_a_bad_photo_has_a_reason(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "photo.jpg"
    if content is not None:
        path.write_bytes(content)
    answer = check_photo(path, 1)
    assert isinstance(answer, str)
    assert answer.startswith(f"{reason}: ")
    assert "photo.jpg" in answer


@pytest.mark.parametrize("side", [14_143, 30_000])  # 200 megapixels, and more than Pillow opens
def test_a_huge_photo_is_refused_unread(tmp_path: Path, side: int) -> None:
    path = tmp_path / "photo.png"
    header = encoded("PNG")
    path.write_bytes(
        header[:16] + side.to_bytes(4, "big") * 2 + header[24:29] + _crc(header[12:16], side, header[24:29]) + header[33:]
    )
    answer = check_photo(path, 100)
    assert isinstance(answer, str)
    assert answer.startswith("photo too large: ")


def _crc(kind: bytes, side: int, rest: bytes) -> bytes:
    return zlib.crc32(kind + side.to_bytes(4, "big") * 2 + rest).to_bytes(4, "big")
