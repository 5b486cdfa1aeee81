"""OpenStreetMap files, Overpass answers and tables of a GIS"""

import bz2
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pyogrio
import pyproj
import pytest
import shapely

from addressvlm import InputError
from addressvlm.dataset.geo_files import GeoFeature, is_block, is_district, is_street, read_geo_file
from addressvlm.dataset.streets import StreetMap
from addressvlm.tiles.roads import Roads, write_roads
from tests.support.osm_writer import EDGE, STEP, OsmWriter


def town() -> OsmWriter:
    """Mill Street runs east through (5, 5), Forbes Avenue north; a square, a passage, a trail, two districts by border."""
    city = OsmWriter()
    city.way((0, 5), (5, 5), highway="residential", name="Mill Street", name__fr="Rue du Moulin", alt_name="The Mills;Mill Row")
    city.way((5, 5), (10, 5), highway="residential", name="Mill St", old_name="Miller's Way")
    city.way((10, 5), (10.5, 5), highway="residential", name="Mill Street")
    city.way((5, 0), (5, 10), highway="primary", name="Forbes Avenue")
    city.way((1, 1), (4, 1), highway="footway", name="Senate Passage")
    city.way((1, 2), (4, 2), highway="cycleway", name="Green Trail")
    city.way((1, 3), (4, 3), highway="residential")
    city.way((6, 1), (9, 1), highway="motorway", name="Under Way", tunnel="yes")
    city.box(7, 7, 9, 9, highway="pedestrian", area="yes", name="Market Square")
    west = city.way((5, 0), (0, 0), (0, 10), (5, 10))  # the borders have no tags of their own
    middle = city.way((5, 10), (5, 0))
    east = city.way((5, 10), (10, 10), (10, 0), (5, 0))
    for name, members in {"West": (west, middle), "East": (middle, east)}.items():
        tags = {"type": "boundary", "boundary": "administrative", "admin_level": "9", "name": name}
        city.relation(*((way, "outer") for way in members), **tags)
    city.relation((west, "outer"), (east, "outer"), type="boundary", boundary="administrative", admin_level="8", name="Whole")
    city.places += [(2, 8, {"place": "suburb", "name": "Old Town"}), (8, 2, {"place": "suburb", "name": "New Town"})]
    city.places += [(5, 5, {"highway": "bus_stop", "name": "Mill Street Stop"})]
    return city


@pytest.fixture(scope="module", params=["pbf", "osm", "nodes last", "out geom", "overpass nodes"])
def extract(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One town in each form of an OpenStreetMap file."""
    folder = tmp_path_factory.mktemp("osm")
    if request.param in ("out geom", "overpass nodes"):
        return town().overpass(folder / "town.json", geom=request.param == "out geom")
    return town().save(
        folder / ("town.osm.pbf" if request.param == "pbf" else "town.osm"), nodes_last=request.param == "nodes last"
    )


def at(*points: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Latitudes and longitudes of grid points."""
    return np.array([y * STEP for _, y in points]), np.array([x * STEP for x, _ in points])


def test_streets_squares_and_districts_of_an_extract(extract: Path) -> None:
    streets = StreetMap.load(extract, extract)
    assert streets.street_names == ["Forbes Avenue", "Market Square", "Mill Street", "Senate Passage"]
    lat, lon = at((2, 5.1), (8, 8), (8, 6.9), (2, 1.05), (8, 1.05))
    street, metres, _, _ = streets.nearest(lat, lon, 40)
    assert street.tolist() == ["Mill Street", "Market Square", "Market Square", "Senate Passage", None]
    assert metres[:4] == pytest.approx([11.1, 0, 11.1, 5.6], abs=0.2)
    assert streets.district(lat, lon) == ["West", "East", "East", "West", "East"]
    assert streets.variants["Mill Street"] == ["The Mills", "Mill Row", "Rue du Moulin", "Mill St", "Miller's Way"]
    assert streets.bounds == pytest.approx((0, 0, 0.0105, 0.01))
    assert streets.street_shapes(["Market Square"])["Market Square"].geom_type == "Polygon"
    assert set(streets.names) == {"Forbes Avenue", "Mill Street", "Senate Passage"}  # lines only


def test_roads_include_trails_and_nameless_streets(extract: Path) -> None:
    roads = Roads(extract)
    assert [road.name for road in roads.roads].count("") == 1
    assert {"Green Trail", "Under Way", "Market Square", "Mill St"} <= {road.name for road in roads.roads}
    assert {road.line.geom_type for road in roads.roads} == {"LineString"}
    assert {road.name for road in Roads(extract, language="fr").roads} >= {"Rue du Moulin", "Forbes Avenue"}


def test_roads_are_written_under_the_names_of_the_streets(extract: Path, tmp_path: Path) -> None:
    """One spelling a street, in the language of the settings, and the others still lead to it."""
    whole, streets = Roads(extract), StreetMap.load(extract, extract, language="fr", with_roads=True)
    assert StreetMap.load(extract, extract).street_names == StreetMap.load(extract, extract, with_roads=True).street_names
    write_roads(tmp_path / "roads.fgb", streets.roads, *at((5, 5)))
    roads = Roads(tmp_path / "roads.fgb")
    assert [road.width_m for road in roads.roads] == [road.width_m for road in whole.roads]
    assert [road.line.wkb for road in roads.roads] == [road.line.wkb for road in whole.roads]
    names = {road.name for road in roads.roads}
    assert names == {"Rue du Moulin", "Forbes Avenue", "Senate Passage", "Green Trail", "", "Under Way", "Market Square"}
    names = ("Mill Street", "mill st.", "Millers Way", "RUE DU MOULIN", "Market Sq", "Oak Road")
    assert [roads.resolve_name(name) for name in names] == [*["Rue du Moulin"] * 4, "Market Square", None]


def test_only_roads_that_a_tile_can_show_are_written(tmp_path: Path) -> None:
    metre = STEP / 111.2
    lines = {x: shapely.LineString([(x * metre, 0), (x * metre, 90 * metre)]) for x in (-9000, -2000, 0, 2000, 5000, 50_000)}
    roads = [GeoFeature({"name": f"Street {x}"}, line) for x, line in lines.items()]
    write_roads(tmp_path / "roads.fgb", roads, np.array([0.0, 0.0]), np.array([0.0, 4000 * metre]))
    assert {"Street -2000", "Street 0", "Street 2000", "Street 5000"} == {r.name for r in Roads(tmp_path / "roads.fgb").roads}
    write_roads(tmp_path / "roads.fgb", roads, np.array([40.0]), np.array([0.0]))
    assert len(Roads(tmp_path / "roads.fgb").roads) == len(roads)


@pytest.mark.parametrize("lat", [60.0, -60.0])
def test_roads_of_tiles_far_from_the_equator_are_written(tmp_path: Path, lat: float) -> None:
    """2 km of the globe to each side of photos that lie anywhere in the grid's squares."""
    globe, photos = pyproj.Geod(ellps="WGS84"), [(lat + i / 300, 25 + i / 70) for i in range(8)]
    roads = {}
    for number, (y, x) in enumerate(photos):
        for azimuth in (0, 90, 180, 270):
            here, there = globe.fwd(x, y, azimuth, 2000)[:2], globe.fwd(x, y, azimuth, 2001)[:2]
            roads[f"{number} {azimuth}"] = shapely.LineString([here, there])
    far = {"far": shapely.LineString([globe.fwd(25, lat, 270, d)[:2] for d in (9000, 9001)])}
    write_roads(
        tmp_path / "roads.fgb", [GeoFeature({"name": n}, line) for n, line in (roads | far).items()], *np.array(photos).T
    )
    assert {road.name for road in Roads(tmp_path / "roads.fgb").roads} == set(roads)


def test_names_in_a_language(extract: Path) -> None:
    streets = StreetMap.load(extract, language="fr")
    assert "Rue du Moulin" in streets.street_names
    assert "Mill Street" not in streets.street_names  # nameless in French, but one street with the other way
    assert "Mill Street" in streets.variants["Rue du Moulin"]


@pytest.mark.parametrize(
    ("settings", "districts"),
    [
        ({}, ["East", "West"]),
        ({"district_source": "admin"}, ["East", "West"]),
        ({"admin_level": 8}, ["Whole"]),
        ({"district_source": "place"}, ["New Town", "Old Town"]),
    ],
)
def test_districts_by_the_setting(extract: Path, settings: dict, districts: list[str]) -> None:
    streets = StreetMap.load(extract, extract, **settings)
    assert streets.district_names == districts
    if districts == ["New Town", "Old Town"]:
        assert streets.district(*at((1, 6), (6, 1))) == ["Old Town", "New Town"]
        assert shapely.union_all(streets.district_polygons).area == pytest.approx((EDGE * 111_195) ** 2, rel=0.15)


def test_a_border_that_is_cut_off_is_no_district(tmp_path: Path) -> None:
    city = town()
    city.relations = [([(10, "outer")], tags) for _, tags in city.relations[:1]]
    path = city.save(tmp_path / "town.osm.pbf")
    assert StreetMap.load(path, path).district_names == ["New Town", "Old Town"]
    with pytest.raises(InputError, match=r"town.osm.pbf has no complete administrative area.*district_source to place"):
        StreetMap.load(path, path, district_source="admin")
    city.places.clear()
    path = city.save(tmp_path / "town.osm.pbf")
    with pytest.raises(InputError, match=r"no named district \(1 areas are cut off at its edge\)"):
        StreetMap.load(path, path)


def test_holes_and_islands_of_an_area(tmp_path: Path) -> None:
    city = OsmWriter()
    outer, inner, island = city.box(0, 0, 6, 6), city.box(2, 2, 4, 4), city.box(8, 8, 9, 9)
    tags = {"type": "multipolygon", "place": "quarter", "name": "Ring"}
    city.relation((outer, "outer"), (inner, "inner"), (island, ""), **tags)
    city.way((0, 1), (6, 1), highway="residential", name="Mill Street")
    path = city.save(tmp_path / "ring.osm.pbf")
    ring = StreetMap.load(path, path)
    far = ring.district(*at((1, 1), (3, 3), (8.5, 8.5)))
    assert far == ["Ring", None, "Ring"]


def test_nodes_outside_the_file_shorten_their_way(tmp_path: Path) -> None:
    city = town()
    kept = {point: i for point, i in city.nodes.items() if point != (10, 5)}
    city.nodes = kept
    streets = StreetMap.load(city.save(tmp_path / "town.osm.pbf"))
    assert streets.bounds is not None
    assert streets.bounds[2] == pytest.approx(0.009)


def blocks(named_streets: bool) -> OsmWriter:
    """Two quarters of two blocks each; streets have names or not."""
    city = OsmWriter()
    for i in range(10):
        city.way((0, i), (10, i), highway="residential", **({"name": f"Street {i}"} if named_streets else {}))
    city.way((0, 5), (10, 5), highway="primary", name="明治通り")
    for quarter, west in (("神南", 0), ("宇田川町", 5)):
        city.box(west, 0, west + 5, 10, place="quarter", name=quarter)
    city.box(0, 0, 5, 5, place="neighbourhood", name="神南一丁目", name__en="Jinnan 1")
    city.box(0, 5, 5, 10, place="neighbourhood", name="神南二丁目")
    city.box(1, 1, 2, 2, place="city_block", name="7")
    city.places += [(7, 2, {"place": "neighbourhood", "name": "宇田川町一丁目"})]
    return city


def test_where_streets_have_no_names_blocks_are_the_streets(tmp_path: Path) -> None:
    path = blocks(named_streets=False).save(tmp_path / "japan.osm.pbf")
    streets = StreetMap.load(path)
    assert streets.street_names == sorted(["神南一丁目", "神南二丁目", "宇田川町"])
    street, metres, second, away = streets.nearest(*at((1, 1), (1, 9), (8, 8), (1, 4.9)), 40)
    assert street.tolist() == ["神南一丁目", "神南二丁目", "宇田川町", "神南一丁目"]
    assert metres.tolist() == [0, 0, 0, 0]
    assert (second[3], away[3]) == ("神南二丁目", pytest.approx(11.1, abs=0.2))
    assert streets.variants == {"神南一丁目": ["Jinnan 1"]}
    assert StreetMap.load(path, unit="streets").street_names == ["明治通り"]
    named = blocks(named_streets=True).save(tmp_path / "named.osm.pbf")
    assert "Street 3" in StreetMap.load(named).street_names
    assert StreetMap.load(named, unit="blocks").street_names == streets.street_names


def test_blocks_of_which_only_the_middle_is_known(tmp_path: Path) -> None:
    city = OsmWriter()
    city.way((0, 0), (10, 0), highway="residential")
    city.places += [(x, y, {"place": "neighbourhood", "name": f"{x}-{y}"}) for x in (2, 8) for y in (2, 8)]
    city.places += [(5, 5, {"place": "quarter", "name": "all of it"})]
    streets = StreetMap.load(city.save(tmp_path / "cells.osm.pbf"))
    assert streets.nearest(*at((1, 1), (9, 1), (4.9, 9)), 40)[0].tolist() == ["2-2", "8-2", "2-8"]


@pytest.mark.parametrize("name", ["town.osm.pbf", "town.osm"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_extract_is_an_error(tmp_path: Path, name: str, share: float) -> None:
    whole = town().save(tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=rf"{name} is cut short or damaged \(.*\): download it again\."):
        StreetMap.load(tmp_path / name)


def test_a_file_that_is_no_extract_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "page.osm.pbf").write_text("<html>404 Not Found</html> " * 20)
    with pytest.raises(InputError, match=r"page.osm.pbf is cut short or damaged .*download it again"):
        StreetMap.load(tmp_path / "page.osm.pbf")
    with pytest.raises(InputError, match=r"none.osm.pbf can't be read .*set city.streets"):
        StreetMap.load(tmp_path / "none.osm.pbf")
    (tmp_path / "folder.osm").mkdir()
    with pytest.raises(InputError, match=r"folder.osm can't be read \(Is a directory\)"):
        StreetMap.load(tmp_path / "folder.osm")
    (tmp_path / "odd.json").write_text('{"elements": [{"type": "way"}]}')
    with pytest.raises(InputError, match=r"odd.json is not GeoJSON or Overpass JSON"):
        StreetMap.load(tmp_path / "odd.json")


def test_an_extract_without_named_streets_is_an_error(tmp_path: Path) -> None:
    city = OsmWriter()
    city.way((0, 5), (5, 5), highway="residential")
    city.way((0, 4), (5, 4), waterway="river", name="Granta")
    with pytest.raises(InputError, match=r"wild.osm.pbf has no named street"):
        StreetMap.load(city.save(tmp_path / "wild.osm.pbf"))


@pytest.mark.parametrize(
    ("tags", "street"),
    [
        ({"highway": "residential"}, True),
        ({"highway": "pedestrian", "area": "yes"}, True),
        ({"highway": "living_street"}, True),
        ({"highway": "steps"}, True),
        ({"highway": "footway", "tunnel": "building_passage"}, True),
        ({"place": "square"}, True),
        ({"highway": "footway", "indoor": "yes"}, False),
        ({"highway": "cycleway"}, False),
        ({"highway": "construction"}, False),
        ({"place": "suburb"}, False),
    ],
)
def test_what_counts_as_a_street(tags: dict[str, str], street: bool) -> None:
    assert is_street(tags) == street


def test_what_counts_as_a_block_or_a_district() -> None:
    assert is_block({"place": "neighbourhood", "name": "一丁目"})
    assert is_block({"boundary": "administrative", "admin_level": "10", "name": "桜丘町"})
    assert not is_block({"place": "city_block", "name": "12"})
    assert is_district({"boundary": "administrative"})
    assert not is_district({"boundary": "protected_area"})


@pytest.mark.parametrize("suffix", [".shp", ".gpkg"])
@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32631"])
def test_tables_of_a_gis_come_in_degrees(tmp_path: Path, suffix: str, crs: str) -> None:
    path = tmp_path / f"streets{suffix}"
    line = shapely.LineString([(3.0, 50.0), (3.01, 50.0)])
    to = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform
    moved = shapely.transform(line, lambda c: np.column_stack(to(c[:, 0], c[:, 1])))
    names = np.array(["Große Straße", None], dtype=object)
    pyogrio.raw.write(path, shapely.to_wkb([moved, moved]), [names], fields=["NAME"], geometry_type="LineString", crs=crs)
    result = read_geo_file(path, "city.streets", is_street)
    assert [f.tags for f in result.features] == [{"NAME": "Große Straße", "name": "Große Straße"}, {}]
    assert shapely.equals_exact(result.features[0].shape, line, 1e-7)
    assert StreetMap.load(path).street_names == ["Große Straße"]


def test_a_damaged_table_of_a_gis_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "streets.gpkg").write_bytes(b"SQLite format 3\0 and no more")
    with pytest.raises(InputError, match=r"streets.gpkg can't be read by GDAL .*export it again"):
        StreetMap.load(tmp_path / "streets.gpkg")


# cut short, or in another encoding


@pytest.mark.parametrize("kind", ["osm.pbf", "osm", "out geom", "overpass nodes"])
@pytest.mark.parametrize("missing", ["way", "node"])
def test_a_border_of_which_a_part_is_missing_is_told(
    tmp_path: Path, kind: str, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two islands, of the second only a part is in the file; the first is a district all the same."""
    city = OsmWriter()
    city.way((1, 1), (9, 1), highway="residential", name="Mill Street")
    first, second = city.box(0, 0, 3, 3), city.box(5, 0, 9, 3)
    tags = {"type": "boundary", "boundary": "administrative", "admin_level": "9"}
    city.relation((city.box(0, 5, 9, 9), "outer"), name="Old Town", **tags)
    city.relation((first, "outer"), (second, "outer"), name="Harbour", **tags)
    if kind.startswith("osm"):
        if missing == "way":
            city.relations[1][0].append((99, "outer"))
        else:
            city.nodes.pop((9, 3))
        path = city.save(tmp_path / f"city.{kind}")
    else:
        path = city.overpass(tmp_path / "city.json", geom=kind == "out geom")
        tree = json.loads(path.read_text())
        if kind == "out geom":
            for element in tree["elements"]:
                for member in element.get("members", ()):
                    if member["ref"] == second and missing == "way":
                        del member["geometry"]
                    elif member["ref"] == second:
                        member["geometry"][2] = None
        tree["elements"] = [e for e in tree["elements"] if e["type"] != "way" or e["id"] != second or missing == "node"]
        tree["elements"] = [
            e for e in tree["elements"] if e["type"] != "node" or (round(e["lon"], 6), round(e["lat"], 6)) != (0.009, 0.003)
        ]
        path.write_text(json.dumps(tree))
    streets = StreetMap.load(path, path, district_source="admin")
    assert streets.district(*at((1, 1), (1, 7))) == ["Harbour", "Old Town"]
    assert f"{path} lacks parts of the border of Harbour (1 in all): take a larger extract" in capsys.readouterr().out


def test_an_answer_of_overpass_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    remark = 'runtime error: Query timed out in "query" at line 3 after 26 seconds.'
    path = town().overpass(tmp_path / "town.json", geom=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"remark": remark}))
    xml = town().save(tmp_path / "town.osm")
    xml.write_text(xml.read_text().replace("</osm>", f"<remark> {remark} </remark>\n</osm>"))
    packed = [tmp_path / "town.osm.gz", tmp_path / "town.osm.bz2"]
    for file, pack in zip(packed, (gzip.compress, bz2.compress), strict=True):
        file.write_bytes(pack(xml.read_bytes()))
    for file in (path, xml, *packed):
        with pytest.raises(
            InputError, match=r"is cut short, Overpass says 'runtime error: Query timed out .*: ask again for a smaller"
        ):
            StreetMap.load(file)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_map_files_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    overpass = town().overpass(tmp_path / "town.json", geom=True)
    line = {"type": "LineString", "coordinates": [[0, 0], [0, 0.01]]}
    feature = {"type": "Feature", "properties": {"name": "Straße"}, "geometry": line}
    for path, text in (
        (overpass, overpass.read_text()),
        (tmp_path / "streets.geojson", json.dumps({"type": "FeatureCollection", "features": [feature]}, ensure_ascii=False)),
    ):
        path.write_bytes(text.encode(encoding))
        assert StreetMap.load(path).street_names in (
            ["Straße"],
            ["Forbes Avenue", "Market Square", "Mill Street", "Senate Passage"],
        )


def shapefile(folder: Path, encoding: str, cpg: str | None, dbf: int = 0) -> Path:
    """One street called Große Straße, its name written in an encoding that the files may tell or not."""
    path = folder / "streets.shp"
    names = np.array(["Große Straße"], dtype=object)
    line = shapely.to_wkb([shapely.LineString([(3, 50), (3.01, 50)])])
    pyogrio.raw.write(path, line, [names], fields=["name"], geometry_type="LineString", crs="EPSG:4326", encoding=encoding)
    path.with_suffix(".cpg").unlink(missing_ok=True)
    if cpg:
        path.with_suffix(".cpg").write_text(cpg)
    table = bytearray(path.with_suffix(".dbf").read_bytes())
    table[29] = dbf
    path.with_suffix(".dbf").write_bytes(table)
    return path


@pytest.mark.parametrize(
    ("encoding", "cpg", "dbf", "setting"),
    [
        ("utf-8", None, 0, None),
        ("utf-8", None, 0x57, None),
        ("utf-8", "UTF-8", 0, None),
        ("cp1252", "CP1252", 0, None),
        ("cp1252", "ANSI 1252\n", 0, None),
        ("cp1252", "88591", 0, None),
        ("utf-8", "65001", 0, None),
        ("cp1252", None, 0x03, None),  # the table tells
        ("cp1252", None, 0, "cp1252"),
        ("cp1252", "UTF-8", 0, "cp1252"),
    ],
)
def test_the_names_of_a_shapefile_in_its_encoding(
    tmp_path: Path, encoding: str, cpg: str | None, dbf: int, setting: str | None
) -> None:
    path = shapefile(tmp_path, encoding, cpg, dbf)
    assert StreetMap.load(path, encoding=setting).street_names == ["Große Straße"]
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path)
    if dbf != 0x03:
        assert StreetMap.load(archive, encoding=setting).street_names == ["Große Straße"]


@pytest.mark.parametrize(
    ("cpg", "dbf", "setting", "message"),
    [
        (None, 0, None, "names that are not in UTF-8, .*: set city.encoding, to cp1252 for example"),
        (None, 0x57, None, "names that are not in UTF-8, .*: set city.encoding, to cp1252 for example"),
        ("UTF-8", 0, None, "names that are not in UTF-8"),
        ("ascii", 0, None, "names that are not in UTF-8, or as its .cpg file says"),
        (None, 0, "ascii", "names that are not in ascii"),
        (None, 0, "klingon", "city.encoding is klingon, which is no encoding"),
    ],
)
def test_names_in_an_unknown_encoding_are_refused(
    tmp_path: Path, cpg: str | None, dbf: int, setting: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        StreetMap.load(shapefile(tmp_path, "cp1252", cpg, dbf), encoding=setting)


def test_names_that_were_damaged_before_are_refused_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"type": "LineString", "coordinates": [[0, 0], [0, 0.01]]}
    for name in ("Stra\ufffde", "half \ud83d"):
        feature = {"type": "Feature", "properties": {"name": name}, "geometry": line}
        (tmp_path / "streets.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
        with pytest.raises(
            InputError, match=r"has 1 names with damaged text: .*export it again as UTF-8, or set city\.encoding"
        ):
            StreetMap.load(tmp_path / "streets.geojson")
    city = town()
    city.way((0, 8), (5, 8), highway="residential", name="Stra\ufffde")
    assert "Mill Street" in StreetMap.load(city.save(tmp_path / "town.osm.pbf")).street_names
    assert "1 names in" in capsys.readouterr().out
