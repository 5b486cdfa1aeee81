#!/usr/bin/env python
"""Damaged tables, map files, photos and names, to find inputs that end a job otherwise than with rejects or one sentence.

    python benchmarks/fuzz_readers.py --seconds 180

Small good inputs are mutated at random: bytes changed, cut out, repeated, exchanged with those of another input, or replaced by
what users' tools write (quotes, byte-order marks, `nan`, half of a surrogate pair, impossible numbers). Prints for each kind
how many inputs gave photos or streets, rejects, and sentences; an input that raises anything else is kept in --out and ends it.
"""

import argparse
import csv
import io
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import shapely
from PIL import ExifTags, Image

from addressvlm import InputError
from addressvlm.answers.batch_localize import PHOTO_LIST_SCHEMA, photo_table
from addressvlm.config.city import CityConfig
from addressvlm.dataset import readers
from addressvlm.dataset.photos import check_photo, decode_photo
from addressvlm.dataset.readers.table import open_table
from addressvlm.dataset.streets import StreetMap
from addressvlm.gazetteer.name_matcher import NameIndex, normalize_name
from addressvlm.gazetteer.names import clean_name, single_names, split_names
from addressvlm.image_decode_worker import decode_image
from addressvlm.storage import tables

Outcome = str  # one of OUTCOMES
Seeds = dict[str, bytes]  # file name -> content

TEXTS = (
    '"', '""', ",", ";", "\t", "|", "\n", "\r\n", "\r", "sep=;\n", "nan", "None", r"\N", "-", "1e999", "−1", "52,1", "\u00a0",
    "\u200b", "\ufffd", "e\u0301", "ı", "[", "]", "{", "}", "'", " / ", ",,,,", "0", "9" * 20, "NaN", "Infinity", "\\ud83d",
    "\0", "<remark>late</remark>", '"remark": "late",', '"geometry": null,', "D:\\\\a\\\\1.jpg",
    "@0544388.51@4172758.25@10@S@@@x@@@@@@@@.jpg",
)  # fmt: skip
TOKENS = [*(text.encode() for text in TEXTS), b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9", b"\xff\xff\xff\xff"]
OUTCOMES = ("good", "rejects", "sentence")
ROW = {
    "file": "1.jpg",
    "lat": 52.1,
    "lon": 0.1,
    "id": 7.0,
    "heading": 12.5,
    "street": "Mill St",
    "district": "Harbour",
    "note": 'a "b"',
}
LINE, AREA = shapely.LineString([(0.1, 52.1), (0.11, 52.1)]), shapely.box(0.09, 52.09, 0.12, 52.12)


def mutate(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A few random changes."""
    data = bytearray(content)
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        at, length = rng.randrange(len(data) + 1), rng.choice((0, 1, 2, 4, 20))
        change = rng.randrange(6)
        if change == 0:
            data[at : at + length] = rng.choice(TOKENS)
        elif change == 1:
            data[at:at] = data[at : at + 10 * length] * rng.choice((1, 2))
        elif change == 2:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif change == 3:
            del data[at : at + length]
        elif change == 4 and rng.random() < 0.3:
            del data[at:]
        elif others:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            data[at : at + length] = other[start : start + 5 * length]
    return bytes(data)


def table_seeds() -> Seeds:
    """The same photos in all formats, and exports that other readers know."""
    rows = [
        ROW,
        ROW | {"file": "sub/Café.jpg", "id": None, "street": "Mill Street;Quay Road"},
        ROW | {"file": "3.jpg", "id": 9.0, "street": None},
    ]
    text = io.StringIO()
    csv.DictWriter(text, ROW).writerows([dict(zip(ROW, ROW, strict=True)), *rows])
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    graph = {"id": "1", "geometry": {"type": "Point", "coordinates": [0.1, 52.1]}, "captured_at": 5, "compass_angle": 3.0}
    karta = {
        "id": "9",
        "lat": "52.5",
        "lng": "13.4",
        "sequenceId": "77",
        "sequenceIndex": "4",
        "name": "9_abc.jpg",
        "projection": "PLANE",
    }
    ial = {"image": "1.jpg", "neighborhood": "Oakland", "street": "Forbes", "gps": [40.4, -79.9], "cross_streets": ["A", "B"]}
    described = {"filename": r"D:\a\1.jpg", "filetype": "image", "MAPLatitude": 1, "MAPLongitude": 2}
    name = "@0544388.51@4172758.25@10@S@037.70098@-122.49646@kPnABhWJ1kA61eMNPLs1vQ@03@210@@@@201606@@.jpg"
    return {
        "a.csv": text.getvalue().encode(),
        "b.csv": text.getvalue().replace(",", ";").encode("utf-16"),
        "c.tsv": text.getvalue().replace(",", "\t").encode("utf-8-sig"),
        "d.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "e.json": json.dumps({"data": rows}).encode(),
        "f.parquet": parquet.getvalue(),
        "g.json": json.dumps([graph, graph | {"id": "2"}]).encode(),
        "h.json": json.dumps([karta, karta | {"id": "10"}]).encode(),
        "i.json": json.dumps([ial]).encode(),
        "j.txt": f"{name}\n{name.replace('210', '30')}\n".encode(),
        "k.csv": b"image,easting,northing,role\n000/000829_pitch1_yaw1.jpg,584826.0,4476945.6,database\n",
        "mapillary_image_description.json": json.dumps([described]).encode(),
    }


def map_seeds(folder: Path) -> Seeds:
    """Streets and a district in each format."""
    line = shapely.geometry.mapping(LINE)
    names = ("Mill Street", ["Quay Road", "Old Way"], "Rue A / Straat B")
    features = [{"type": "Feature", "properties": {"name": name, "highway": "residential"}, "geometry": line} for name in names]
    features.append({"type": "Feature", "properties": {"name": "Harbour"}, "geometry": shapely.geometry.mapping(AREA)})
    nodes = [{"type": "node", "id": i, "lat": y, "lon": x} for i, (x, y) in enumerate(AREA.exterior.coords, 1)]
    ways = [{"type": "way", "id": 1, "nodes": [1, 2], "tags": {"highway": "residential", "name": "Mill Street;Quay Road"}},
            {"type": "way", "id": 2, "nodes": [1, 2, 3, 4, 1]}]  # fmt: skip
    tags = {"type": "boundary", "boundary": "administrative", "admin_level": "9", "name": "Harbour"}
    relation = {"type": "relation", "id": 1, "tags": tags, "members": [{"type": "way", "ref": 2, "role": "outer"}]}
    xml = "".join(f'<node id="{n["id"]}" lat="{n["lat"]}" lon="{n["lon"]}"/>' for n in nodes)
    xml += '<way id="1"><nd ref="1"/><nd ref="2"/><tag k="highway" v="service"/><tag k="name" v="Mill Street;Quay Road"/></way>'
    xml += '<way id="2">' + "".join(f'<nd ref="{ref}"/>' for ref in (1, 2, 3, 4, 1)) + "</way>"
    xml += '<relation id="1"><member type="way" ref="2" role="outer"/>'
    xml += "".join(f'<tag k="{key}" v="{value}"/>' for key, value in tags.items()) + "</relation>"
    written, wkb = np.array(["Mill Street", "Größe"], dtype=object), shapely.to_wkb([LINE, LINE])
    for suffix in ("shp", "gpkg", "fgb"):
        pyogrio.raw.write(folder / f"s.{suffix}", wkb, [written], fields=["name"], geometry_type="LineString", crs="EPSG:4326")
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".shp", ".gpkg", ".fgb")}
    return files | {
        "s.dbf": (folder / "s.dbf").read_bytes(),
        "a.geojson": json.dumps({"type": "FeatureCollection", "features": features}).encode(),
        "b.json": json.dumps({"version": 0.6, "elements": [*nodes, *ways, relation]}).encode(),
        "c.osm": f'<?xml version="1.0"?><osm version="0.6">{xml}</osm>'.encode(),
    }


def photo_seeds() -> Seeds:
    """Pictures of several kinds with EXIF."""
    gps = ExifTags.GPS
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = 6, "Camera"
    exif.get_ifd(ExifTags.IFD.GPSInfo).update(
        {
            gps.GPSLatitudeRef: "N",
            gps.GPSLatitude: (52.0, 6.0, 0.0),
            gps.GPSLongitudeRef: "E",
            gps.GPSLongitude: (0.0, 6.0, 0.0),
        }
        | {gps.GPSImgDirection: 90.0, gps.GPSStatus: "A"}
    )
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = 27
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    colour, grey = Image.fromarray(pixels), pixels[..., 0]
    pictures = {"a.jpg": colour, "c.webp": colour, "e.gif": Image.fromarray(grey), "f.png": colour.convert("RGBA")}
    pictures |= {"b.png": Image.fromarray(grey.astype(np.uint16) * 256), "d.tif": Image.fromarray(grey.astype(np.float32))}
    seeds = {}
    for name, picture in pictures.items():
        out = io.BytesIO()
        picture.save(out, Image.registered_extensions()[Path(name).suffix], **({} if name == "e.gif" else {"exif": exif}))
        seeds[name] = out.getvalue()
    return seeds | {"g.heic": b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(40)}


def read_table(path: Path, rng: random.Random) -> Outcome:
    """`prepare`'s and `localize`'s reading of a table, and that what they found can be stored."""
    city = CityConfig(
        manifest=str(path), reader=rng.choice(["auto", "auto", *readers.READERS]), panorama=rng.choice([None, {}])
    )  # type: ignore[arg-type]
    if path.suffix == ".txt" or rng.random() < 0.2:
        with suppress(InputError):
            rows, rejects = photo_table(open_table(str(path)).rows)
            pa.Table.from_pylist(rows, schema=PHOTO_LIST_SCHEMA)
    photos, rejects = readers.read(city)
    pa.Table.from_pylist(rejects, schema=tables.REJECTS)
    assert all(reject["reason"].isprintable() and ":" in reject["reason"] for reject in rejects)
    for photo in photos:
        assert -90 <= photo.lat <= 90
        " ".join((photo.id, photo.file, photo.place, photo.street, photo.district)).encode()
    return "rejects" if rejects else "good"


def read_map(path: Path, rng: random.Random) -> Outcome:
    """Streets, and districts from the same file."""
    if path.suffix == ".dbf":
        path = path.with_suffix(".shp")
    streets = StreetMap.load(path, rng.choice([None, path]), encoding=rng.choice([None, None, "cp1252"]), with_roads=True)
    " ".join((*streets.street_names, *streets.district_names)).encode()
    return "good"


def read_photo(path: Path, rng: random.Random) -> Outcome:
    """EXIF, the check of `prepare`, and the decoding of `localize` and of the service."""
    _, rejects = readers.read(CityConfig(photos=str(path.parent)))
    with suppress(InputError):
        decode_image(path.read_bytes(), 1)
    view = rng.choice([(None, None, None), (30.0, 90.0, 32)])
    answers = [check_photo(path, 1, *view), decode_photo(path, 1, 64)]
    return "rejects" if rejects or any(isinstance(answer, str) for answer in answers) else "good"


def read_names(path: Path, rng: random.Random) -> Outcome:
    """A text as a name, as a list of names and among other names."""
    encoding, errors = rng.choice(
        [("utf-8", "replace"), ("utf-8", "surrogateescape"), ("utf-16", "ignore"), ("latin-1", "strict")]
    )
    text = path.read_bytes().decode(encoding, errors)[:200]
    try:
        names = split_names(text)
        single_names({"name": text, "name:left": text[:9], "name:en": text[::-1]})
        assert clean_name(clean_name(text)) == clean_name(text)
    except ValueError:
        return "rejects"
    NameIndex([*names, "Mill Street"]).find(text)
    assert normalize_name(normalize_name(text)) == normalize_name(text)
    return "good"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-failure"), help="folder for an input that fails")
    args = parser.parse_args()
    counts: Counter[tuple[str, Outcome]] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "maps").mkdir()
        maps = map_seeds(folder / "maps")
        spelled = "İstiklal Οδός 三丁目 ʻĀina شَارِع ".encode() * 3
        kinds: dict[str, tuple[Callable[[Path, random.Random], Outcome], Seeds]] = {
            "tables": (read_table, table_seeds()),
            "maps": (read_map, maps),
            "photos": (read_photo, photo_seeds()),
            "names": (read_names, {"short.txt": spelled} | table_seeds()),
        }
        end, number = time.monotonic() + args.seconds, 0
        while time.monotonic() < end:
            number += 1
            rng = random.Random(f"{args.seed}:{number}")
            kind = rng.choice(list(kinds))
            read, seeds = kinds[kind]
            path = folder / "maps" / rng.choice(list(seeds)) if kind == "maps" else folder / kind / rng.choice(list(seeds))
            for old in () if kind == "maps" else path.parent.glob("*"):
                old.unlink()
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(mutate(seeds[path.name], list(seeds.values()), rng))
            try:
                with redirect_stdout(io.StringIO()):
                    outcome = read(path, rng)
            except InputError:
                outcome = "sentence"
            except BaseException:
                args.out.mkdir(exist_ok=True)
                (args.out / path.name).write_bytes(path.read_bytes())
                print(f"input {number} of seed {args.seed} fails: {args.out / path.name}", file=sys.stderr)
                raise
            counts[kind, outcome] += 1
            if kind == "maps":
                path.write_bytes(seeds[path.name])
    for kind in kinds:
        numbers = {outcome: counts[kind, outcome] for outcome in OUTCOMES}
        print(f"{kind}: {sum(numbers.values()):,} inputs; " + ", ".join(f"{n:,} {outcome}" for outcome, n in numbers.items()))


if __name__ == "__main__":
    main()
