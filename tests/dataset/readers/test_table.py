"""Tables of photos, here and in stores"""

import csv
import json
import time
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm import InputError
from addressvlm.config.city import CityConfig
from addressvlm.dataset import readers
from addressvlm.dataset.photos import Photo, check_photo, looks_swapped
from addressvlm.dataset.readers.rows import to_photos
from addressvlm.dataset.readers.table import open_table
from addressvlm.storage import remote_path, tables
from tests.support.object_store import store


def read(manifest: Path | str, **settings: Any) -> tuple[list[Photo], list[dict[str, Any]]]:
    return readers.read(CityConfig(manifest=str(manifest), **settings))


def test_a_manifest_reads_the_same_from_every_format(tmp_path: Path) -> None:
    rows = [
        {"photo": "a.jpg", "place": 7, "lat": 52.5, "lon": -0.25, "heading_deg": -270, "street": None, "fov_deg": 60},
        {"photo": "b.jpg", "place": None, "lat": 52.123456, "lon": 1.0, "heading_deg": None, "street": " Mill Street "},
    ]
    (tmp_path / "m.csv").write_text(
        "photo;place;lat;lon;heading_deg;street;fov_deg\na.jpg;7;52.5;-0.25;-270;;60\nb.jpg;;52.123456;1;; Mill Street ;\n",
        "utf-8-sig",
    )
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "m.json").write_text(json.dumps({"photos": rows}))
    pq.write_table(pa.Table.from_pylist([row | {"image": {"bytes": b"x"}} for row in rows]), tmp_path / "m.parquet")
    expected = [
        Photo(1, "a.jpg", "a.jpg", "7", 52.5, -0.25, 90.0, fov_deg=60.0),
        Photo(2, "b.jpg", "b.jpg", "52.12346,1.00000", 52.123456, 1.0, None, "Mill Street"),
    ]
    for name in ("m.csv", "m.jsonl", "m.json", "m.parquet"):
        assert read(tmp_path / name) == (expected, [])


def test_bad_rows_of_a_manifest_have_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text(
        "file,lat,lon,id,fov_deg,panorama\na.jpg,52,0,one,,\nb.jpg,99,100,two,,\nc.jpg,52,181,three,,\nd.jpg,nan,0,four,,\n"
        "e.jpg,,0,five,,\nf.jpg,52,0,one,,\n,52,0,seven,,\nh.jpg,north,0,eight,,\ni.jpg,52,N/A,,,\nj.jpg,52,0,ten,,\n"
        "k.jpg,114.17,22.3,eleven,,\nl.jpg,0,0.0,twelve,,\nm.jpg,52,0,m,500,\nn.jpg,52,0,n,,yes\no.jpg,52,0,o,,round\n"
    )
    good, rejects = read(path)
    assert [p.row for p in good] == [1, 10]
    assert {r["row"]: r["reason"] for r in rejects} == {
        2: "latitude out of range: 99 is not in -90..90",
        3: "longitude out of range: 181 is not in -180..180",
        4: "empty cell: lat",
        5: "empty cell: lat",
        6: "duplicate id: 'one' is already the id of row 1",
        7: "empty cell: file",
        8: "not a number: lat is 'north'",
        9: "empty cell: lon",
        11: "latitude out of range: 114.17 is not in -90..90; latitude and longitude look swapped",
        12: "position is 0, 0: the camera had no fix",
        13: "field of view out of range: 500 is not in 0..360",
        14: "panorama: set city.panorama to cut it into views",
        15: "not yes or no: panorama is 'round'",
    }
    assert rejects[0] == {"file": "b.jpg", "row": 2, "id": "two", "reason": rejects[0]["reason"]}


@pytest.mark.parametrize(
    ("columns", "twice"),
    [
        (["file", "lat", "lon", "lat"], "the column lat twice"),
        (["file", "Lat", "lon", "lat "], "the columns Lat and lat, both for lat"),
        (["file", "lat", "lon", "latitude"], "the columns lat and latitude, both for lat"),
        (["photo", "image", "lat", "lon"], "the columns photo and image, both for file"),
        (["file", "lat", "lon", "note", "note"], "the column note twice"),
    ],
)
def test_columns_that_mean_the_same_are_refused(tmp_path: Path, columns: list[str], twice: str) -> None:
    cells = ["a.jpg", "1", "2", "5", "6"][: len(columns)]
    (tmp_path / "m.csv").write_text(f"{','.join(columns)}\n{','.join(cells)}\n")
    (tmp_path / "m.jsonl").write_text("{" + ", ".join(f'"{c}": "{v}"' for c, v in zip(columns, cells, strict=True)) + "}")
    pq.write_table(pa.table([pa.array([cell]) for cell in cells], names=columns), tmp_path / "m.parquet")
    for name in ("m.csv", "m.parquet"):
        with pytest.raises(InputError, match=f"has {twice}: remove or rename one"):
            read(tmp_path / name)
    if len(set(columns)) == len(columns):
        with pytest.raises(InputError, match=f"has {twice}: remove or rename one"):
            read(tmp_path / "m.jsonl")
    else:
        assert "twice in one object" in read(tmp_path / "m.jsonl")[1][0]["reason"]


def test_a_manifest_rejects_lines_and_values_of_other_types(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('[]\n{"file": "a.jpg", "lat": 1, "lon": 2}\n{"file": \n{"file": "c.jpg", "lat": [1], "lon": true}\n')
    good, rejects = read(path)
    assert [p.id for p in good] == ["a.jpg"]
    assert [(r["row"], r["reason"]) for r in rejects] == [
        (1, "not a JSON object: the line"),
        (3, "not a JSON object: the line"),
        (4, "not a number: lat is '[1]'"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", b"file,lat\na.jpg,1\n", r"m\.csv lacks the column lon \(it has file, lat\)"),
        ("m.jsonl", b'{"lat": 1, "lon": 2}', "lacks the column file"),
        ("m.txt", b"a.jpg\n", "lacks the column lat and lon"),
        ("m.csv", b"file,lat,lon\n", "has no rows"),
        ("m.csv", b"", "has no rows"),
        ("m.json", b"[]", "has no rows"),
        ("m.json", b"{", "is not JSON"),
        ("m.json", b'{"file": "a.jpg", "file": "b.jpg"}', "has the key file twice in one object: remove one"),
        ("m.json", b"1" * 5000, "can't be read"),
        ("m.csv", "file,lat,lon\na.jpg,1,2".encode("utf-16-le"), "not UTF-8"),
        ("m.json", b"[" * 100_000, "nested too deeply"),
        ("m.csv", "file,lat,lon\nß.jpg,1,2".encode("latin-1"), "not UTF-8"),
        ("m.csv", b"file,lat,lon\n" + b"a" * 200_000, "field larger than"),
        ("m.parquet", b"PAR1 and nothing", "can't be read"),
        ("m.xlsx", b"PK", r"save it as one"),
        ("m.csv", None, "no manifest at"),
    ],
)
def test_a_file_that_is_no_manifest_is_an_error(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


ROWS = [f"{n}.jpg,52.1,0.1{n},Street {n}" for n in range(8)]


def csv_of(*rows: str, header: str = "file,lat,lon,street") -> str:
    return "\n".join([header, *rows, ""])


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    ("bad", "line"),
    [
        ('3.jpg,52.1,0.13,"Street 3', 5),
        ('"3.jpg,52.1,0.13,Street 3', 5),
        ('3.jpg,"52.1,0.13,Street 3', 5),
        ('3.jpg,52.1,0.13,"Street, 3', 5),
        ('3.jpg,52.1,0.13,"one\n""two"" and more', 5),
    ],
)
@pytest.mark.parametrize("later", ["", ROWS[4], '9.jpg,52.1,0.1,"Street 9"', '9.jpg,52.1,0.1,by the "old gate"'])
def test_a_quote_that_is_never_closed_is_refused_with_its_line(
    tmp_path: Path, bad: str, line: int, delimiter: str, later: str
) -> None:
    """Whether another quote comes later or not, and whatever it would swallow."""
    text = csv_of(*ROWS[:3], bad, *ROWS[4:], *[later] * bool(later)).replace(",", delimiter)
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(InputError, match=rf"m\.csv has a quote in line {line} that is not closed: close it, or write it twice"):
        read(tmp_path / "m.csv")


def test_quotes_as_they_should_be_and_one_inside_a_cell(tmp_path: Path) -> None:
    rows = ['1.jpg,52,1,"King, Street"', '2.jpg,52,1,"Mill\nRow"', '3.jpg,52,1,The "Old" Mill', '4.jpg,52,1,"The ""Old"" Mill"']
    rows += ['5.jpg,52,1,"Old" Mill', '6.jpg,52,1, "Spaced, Street"', '"7.jpg","52","1",""']
    (tmp_path / "m.csv").write_text(csv_of(*rows).replace("\n", "\r\n"))
    good, rejects = read(tmp_path / "m.csv")
    assert {p.row: p.street for p in good} == {
        1: "King, Street",
        2: "Mill",
        3: 'The "Old" Mill',
        4: 'The "Old" Mill',
        6: "Spaced, Street",
        7: "",
    }
    assert [(r["row"], r["file"], r["reason"]) for r in rejects] == [
        (5, "5.jpg", "stray quote: in line 7 a cell goes on after its closing quote")
    ]


def test_rows_of_another_length_are_rejected_and_empty_ones_are_none(tmp_path: Path) -> None:
    rows = ["1.jpg,52,1,Mill,,", "2.jpg,52,1,Church Lane, East Side", "3.jpg,52,1", "", ",,,", " , ,,,,,", "6.jpg,52,1,Quay"]
    (tmp_path / "m.csv").write_text(csv_of(*rows))
    good, rejects = read(tmp_path / "m.csv")
    assert [(p.row, p.street) for p in good] == [(1, "Mill"), (7, "Quay")]
    assert [(r["row"], r["file"], r["reason"]) for r in rejects] == [
        (2, "2.jpg", "more cells than columns: 5 in line 3, and 4 columns"),
        (3, "3.jpg", "fewer cells than columns: 3 in line 4, and 4 columns"),
    ]
    empty = [{"file": None, "lat": float("nan"), "lon": None}, {"file": "a.jpg", "lat": 1.0, "lon": 2.0}, {}]
    pq.write_table(pa.Table.from_pylist(empty), tmp_path / "m.parquet")
    (tmp_path / "m.jsonl").write_text('{"file": "", "lat": null}\n{"file": "a.jpg", "lat": 1, "lon": 2}\n\n{}\n')
    for name in ("m.parquet", "m.jsonl"):
        assert [[p.row for p in read(tmp_path / name)[0]], read(tmp_path / name)[1]] == [[2], []]


@given(
    st.lists(st.tuples(st.text(max_size=6), st.text("\",;\\t|\\n 'a", max_size=8)), max_size=6),
    st.sampled_from(",;\t|"),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
@settings(max_examples=150, deadline=None)
def test_what_a_csv_writer_writes_is_read_as_it_is(
    tmp_path_factory: pytest.TempPathFactory,
    notes: list[tuple[str, str]],
    delimiter: str,
    quoting: Any,
    end: str,
    encoding: str,
) -> None:
    """In every dialect; or the table is refused, as where a note has a line that looks like a row."""
    notes = [(one.replace("\0", "").replace("\r", ""), other) for one, other in notes if one.isprintable()]
    path = tmp_path_factory.getbasetemp() / "any.csv"
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end)
        writer.writerow(["file", "lat", "lon", "note", "other"])
        writer.writerows(["a.jpg", 1.5, 2.5, *cells] for cells in notes)
    rows = list(open_table(str(path)).rows)
    assert [(row["note"].strip(), row["other"].strip()) for row in rows] == [(a.strip(), b.strip()) for a, b in notes]
    assert all("PROBLEM" not in row for row in rows)


@given(st.text('ab1.,;\n"', max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_rows_rejects_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """A quote that is not closed never hides rows: each line is in a row or a problem, or the table is refused."""
    path = tmp_path_factory.getbasetemp() / "noise.csv"
    path.write_text(f"file,lat,lon\n{text}")
    try:
        photos, rejects = read(path)
    except InputError:
        return
    assert len(photos) + len(rejects) <= text.count("\n") + 1
    if '"' not in text:
        assert len(photos) + len(rejects) == sum(any(map(str.isalnum, line)) for line in text.split("\n"))


TABLE = "file,lat,lon,street\na.jpg,52.5,0.25,Mül Straße\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    "text",
    [
        TABLE,
        "\n \n" + TABLE,
        "sep=;\n" + TABLE.replace(",", ";"),
        'SEP=,\r\n"file","lat","lon","street"\r\n"a.jpg","52.5","0.25","Mül Straße"\r\n',
        TABLE.replace(",", "\t").replace("52.5\t0.25", "52,5\t0,25"),
        TABLE.replace(",", ";").replace("52.5;0.25", "52,5;+0,25"),
        TABLE.replace("52.5,0.25", '"52,5","0,25"'),
        TABLE.replace("file,", " FILE ,").replace("a.jpg", "a.jpg "),
        TABLE.replace("street\n", "street,,\n"),
        TABLE.replace("\n", ",,\n"),
        TABLE.replace("\n", "\r"),
    ],
)
def test_a_table_as_spreadsheets_write_it(tmp_path: Path, text: str, encoding: str) -> None:
    (tmp_path / "m.csv").write_bytes(text.encode(encoding))
    (tmp_path / "m.txt").write_bytes(text.encode(encoding))
    assert read(tmp_path / "m.csv") == ([Photo(1, "a.jpg", "a.jpg", "52.50000,0.25000", 52.5, 0.25, None, "Mül Straße")], [])
    assert "=" in text or read(tmp_path / "m.txt") == read(tmp_path / "m.csv")


@pytest.mark.parametrize("title", ["Photos of Harbour, 2024\n", "# made by a script\n\n", "sep=,\nPhotos\n"])
def test_lines_above_the_header_are_told(tmp_path: Path, title: str) -> None:
    for table in (TABLE, TABLE.replace(",", ";"), TABLE.replace("file", '"photo"')):
        (tmp_path / "m.csv").write_text(title + table)
        with pytest.raises(InputError, match=rf"has its header in line {title.count(chr(10)) + 1}: delete the lines above it"):
            read(tmp_path / "m.csv")


def test_words_for_nothing_are_no_values_in_any_column(tmp_path: Path) -> None:
    columns = ("id", "place", "heading", "fov_deg", "street", "district", "sub_street", "panorama")
    for word in ("nan", "NaN", "None", "NULL", "N/A", r"\N", "#N/A", "<NA>", "null", "-", " ", "n/a"):
        (tmp_path / "m.csv").write_text(f"file,lat,lon,{','.join(columns)}\na.jpg,1,2{f',{word}' * len(columns)}\n")
        (tmp_path / "m.jsonl").write_text(json.dumps({"file": "a.jpg", "lat": 1, "lon": 2} | dict.fromkeys(columns, word)))
        for name in ("m.csv", "m.jsonl"):
            assert read(tmp_path / name) == ([Photo(1, "a.jpg", "a.jpg", "1.00000,2.00000", 1, 2)], [])


def test_ids_are_whole_or_refused(tmp_path: Path) -> None:
    """A missing id makes a column of numbers one of floats, which have no more than 15 digits."""
    ids = [1001.0, None, 4.987634682141641e17, 1.5]
    pq.write_table(pa.table({"file": list("abcd"), "lat": [1.0] * 4, "lon": [2.0] * 4, "id": ids}), tmp_path / "m.parquet")
    good, rejects = read(tmp_path / "m.parquet")
    assert [p.id for p in good] == ["1001", "b", "1.5"]
    assert [(r["row"], r["reason"].partition(":")[0]) for r in rejects] == [(3, "id rounded")]
    (tmp_path / "m.csv").write_text("file,lat,lon,id\na,1,2,4.98763E+14\nb,1,2,498763468214164\nc,1,2,007\n")
    good, rejects = read(tmp_path / "m.csv")
    assert [p.id for p in good] == ["498763468214164", "007"]
    assert rejects[0]["reason"] == "id rounded: 4.98763E+14 has lost digits, write ids as text"


def test_numbers_that_could_mean_two_things_are_none(tmp_path: Path) -> None:
    cells = {
        "1_0": None,
        "52,5": 52.5,
        "\u221252.5": -52.5,
        "5,2,5": None,
        "1.234,5": None,
        "52° 30'": None,
        "0x10": None,
        "1e1": 10.0,
    }
    (tmp_path / "m.jsonl").write_text(
        "\n".join(json.dumps({"file": f"{i}.jpg", "lat": c, "lon": 1}) for i, c in enumerate(cells))
    )
    good, rejects = read(tmp_path / "m.jsonl")
    assert [p.lat for p in good] == [lat for lat in cells.values() if lat is not None]
    assert [r["reason"].partition(":")[0] for r in rejects] == ["not a number"] * list(cells.values()).count(None)
    table = 'file,utm_east,utm_north\n000/000829_pitch1_yaw1.jpg,584826,4476945\n000/000829_pitch2_yaw1.jpg,"584,826",4476945\n'
    (tmp_path / "p.csv").write_text(table)
    assert read(tmp_path / "p.csv")[1][0]["reason"] == "not a number: utm_east is '584,826'"


def test_several_names_in_one_cell_are_told_apart(tmp_path: Path) -> None:
    rows = [{"street": ["Mill Street", "Quay Road"]}, {"street": "Mill Street / Quay Road"}, {"street": "['Mill Street']"},
            {"district": "Harbour;Old Town"}]  # fmt: skip
    path = tmp_path / "m.json"
    path.write_text(json.dumps([{"file": f"{i}.jpg", "lat": 1, "lon": 2} | row for i, row in enumerate(rows)]))
    good, rejects = read(path)
    assert [(p.street, p.other_street) for p in good] == [("Mill Street", "Quay Road")] * 2 + [("Mill Street", "")]
    assert rejects[0]["reason"] == "several names in one cell: district is Harbour; Old Town"


def test_text_that_can_t_be_stored_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    rows = [{"file": "\ud83d.jpg"}, {"file": "a.jpg", "street": "x\udc00"}, {"file": "b.jpg", "place": "x\ud800"},
            {"file": "\0.jpg"}, {"file": "c.jpg", "street": "Stra\ufffde"}]  # fmt: skip
    path.write_text("\n".join(json.dumps({"lat": 1, "lon": 2} | row) for row in rows))
    good, rejects = read(path)
    assert good == []
    assert [r["reason"].partition(":")[0] for r in rejects] == [
        "file not in UTF-8", "damaged text", "place not in UTF-8", "control characters", "damaged text",
    ]  # fmt: skip
    pa.Table.from_pylist(rejects, schema=tables.REJECTS)


def test_the_reader_and_the_columns_without_a_meaning_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.csv"
    path.write_text("file,lat,lon,street,district,shot_date,neighbourhood\na.jpg,1,2,Mill Street,Harbour,2024-05-01,Block 7\n")
    assert [(p.street, p.district) for p in read(path)[0]] == [("Mill Street", "Harbour")]
    assert f"{path} is read by manifest; its columns neighbourhood, shot_date are not used\n" in capsys.readouterr().out


def test_hundreds_of_thousands_of_duplicates_are_all_listed(tmp_path: Path) -> None:
    path, count = tmp_path / "m.csv", 200_000
    path.write_text("file,lat,lon\n" + "a.jpg,52,1\n" * count)
    before = time.process_time()
    good, rejects = read(path)
    assert time.process_time() - before < 10  # about 1 s; each against each would take hours
    assert (len(good), len(rejects)) == (1, count - 1)
    assert rejects[-1]["row"] == count


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "file": st.text(max_size=3) | st.none() | st.integers(),
                "id": st.text(max_size=2),
                "lat": st.floats() | st.text(max_size=3) | st.none() | st.lists(st.integers(), max_size=1),
                "lon": st.floats(-200, 200) | st.booleans(),
                "heading": st.floats() | st.none(),
                "panorama": st.booleans() | st.none() | st.just("no"),
            },
        ),
        max_size=8,
    ),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_row_is_a_photo_or_a_reject(rows: list[dict[str, Any]], cut: bool) -> None:
    city = CityConfig.model_validate({"panorama": {"headings": [0, 90, 360]} if cut else None})
    good, rejects = to_photos(rows, city.panorama)
    assert sorted({p.row for p in good} | {r["row"] for r in rejects}) == [i for i, cells in enumerate(rows, 1) if cells]
    assert len({p.id for p in good}) == len(good)
    for photo in good:
        assert photo.file
        assert -90 <= photo.lat <= 90
        assert -180 <= photo.lon <= 180
        assert photo.heading is None or 0 <= photo.heading < 360
    assert all(":" in r["reason"] for r in rejects)


@pytest.mark.parametrize("headings", [None, {"headings": [0, 90]}])
def test_a_heading_just_below_north_is_north(headings: dict[str, Any] | None) -> None:
    city = CityConfig.model_validate({"panorama": headings})
    row = {"file": "a.jpg", "lat": 1.0, "lon": 2.0, "heading": -1e-20}
    good, _ = to_photos([row], city.panorama)
    assert good[0].heading == 0


# swapped latitude and longitude

BOUNDS = (16.0, 48.0, 17.0, 49.0)  # west, south, east, north


@given(st.lists(st.tuples(st.floats(48.01, 48.99), st.floats(16.01, 16.99)), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_swapped_coordinates_are_detected(points: list[tuple[float, float]]) -> None:
    right = [Photo(1, "a", "a", "a", lat, lon) for lat, lon in points]
    swapped = [Photo(1, "a", "a", "a", lon, lat) for lat, lon in points]
    assert looks_swapped(swapped, BOUNDS)
    assert not looks_swapped(right, BOUNDS)
    assert not looks_swapped(right + swapped, BOUNDS)


def test_a_city_elsewhere_is_not_called_swapped() -> None:
    assert not looks_swapped([], BOUNDS)
    assert not looks_swapped([Photo(1, "a", "a", "a", 10.0, 20.0)], BOUNDS)
    assert not looks_swapped([Photo(1, "a", "a", "a", 5.0, 5.0)], (0, 0, 9, 9))  # a city on the diagonal


# stores


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    folder = tmp_path / "bucket"
    (folder / "city" / "photos").mkdir(parents=True)
    (folder / "city" / "m.csv").write_text("file,lat,lon\na b.jpg,1,2\nmissing.jpg,1,2\n")
    (folder / "city" / "photos" / "a b.jpg").write_bytes(b"no picture")
    (folder / "city" / "photos" / ".hidden.jpg").write_bytes(b"")
    return folder


def from_store(scheme: str) -> None:
    city = CityConfig(manifest=f"{scheme}://bucket/city/m.csv", photos=f"{scheme}://bucket/city/photos/")
    photos, rejects = readers.read(city)
    assert [p.file for p in photos] == ["a b.jpg", "missing.jpg"]
    assert rejects == []
    assert remote_path.walk_files(str(city.photos)) == ["a b.jpg"]
    assert remote_path.path_of(str(city.photos)).is_dir()
    assert readers.photos_folder(city.model_copy(update={"photos": None})) == f"{scheme}://bucket/city"
    answers = [check_photo(remote_path.join(readers.photos_folder(city), p.file), 1) for p in photos]
    assert [str(a).partition(":")[0] for a in answers] == ["not a photo", "photo missing"]
    with pytest.raises(InputError, match=rf"no manifest at {scheme}://bucket/none\.csv"):
        readers.read(CityConfig(manifest=f"{scheme}://bucket/none.csv"))


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_manifest_and_photos_in_a_store(bucket: Path, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote_path._filesystem.cache_clear()
    with store(bucket) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        from_store(scheme)
    remote_path._filesystem.cache_clear()


def test_other_stores_of_fsspec_are_read(bucket: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(bucket / "city"), "/bucket/city", recursive=True)
    try:
        from_store("memory")
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_file_uri_is_a_local_path(bucket: Path) -> None:
    folder = (bucket / "city").as_uri()
    city = CityConfig(manifest=f"{folder}/m.csv")
    assert len(readers.read(city)[0]) == 2
    assert readers.photos_folder(city) == str(bucket / "city")
    assert remote_path.join(f"{folder}/photos", "a b.jpg") == str(bucket / "city" / "photos" / "a b.jpg")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("abfs://box/m.csv", r"abfs://box needs a Python package that is missing: pip install adlfs"),
        ("nowhere://box/m.csv", r"nowhere://box can't be read: give a local path, or an s3:// or gs:// address"),
    ],
)
def test_an_address_that_cannot_be_read_is_an_error(tmp_path: Path, address: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(address)
    (tmp_path / "m.csv").write_text("file,lat,lon\na.jpg,1,2\n")
    with pytest.raises(InputError, match=message):  # before any photo is read
        read(tmp_path / "m.csv", photos=address)


def test_an_unreachable_store_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    remote_path._filesystem.cache_clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(
        InputError, match=r"s3://bucket/m\.csv can't be used, the store can't be reached: check the address, the network"
    ):
        read("s3://bucket/m.csv")
    remote_path._filesystem.cache_clear()
