"""Tables of a GIS, and what of any file counts as a street"""

from pathlib import Path

import numpy as np
import pyogrio
import pyproj
import pytest
import shapely

from addressvlm import InputError
from addressvlm.dataset import geo_files
from addressvlm.dataset import streets as streets_module
from addressvlm.dataset.geo_files import GeoExtract, GeoFeature, is_street
from addressvlm.dataset.streets import StreetMap
from tests.support.osm_writer import STEP


@pytest.mark.parametrize("suffix", [".shp", ".gpkg"])
@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32631"])
def test_tables_of_a_gis_come_in_degrees(tmp_path: Path, suffix: str, crs: str) -> None:
    path = tmp_path / f"streets{suffix}"
    line = shapely.LineString([(3.0, 50.0), (3.01, 50.0)])
    to = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform
    moved = shapely.transform(line, lambda c: np.column_stack(to(c[:, 0], c[:, 1])))
    names = np.array(["Große Straße", None], dtype=object)
    pyogrio.raw.write(path, shapely.to_wkb([moved, moved]), [names], fields=["NAME"], geometry_type="LineString", crs=crs)
    found = geo_files.read_geo_file(path, "city.streets", is_street)
    assert [f.tags for f in found.features] == [{"NAME": "Große Straße", "name": "Große Straße"}, {}]
    assert shapely.equals_exact(found.features[0].shape, line, 1e-7)
    assert StreetMap.load(path).street_names == ["Große Straße"]


def test_a_damaged_table_of_a_gis_is_said(tmp_path: Path) -> None:
    (tmp_path / "streets.gpkg").write_bytes(b"SQLite format 3\0 and no more")
    with pytest.raises(InputError, match=r"streets.gpkg can't be read by GDAL .*export it again"):
        StreetMap.load(tmp_path / "streets.gpkg")


def line(name: str, *points: tuple[float, float]) -> GeoFeature:
    return GeoFeature({"name": name}, shapely.LineString(np.array(points) * STEP))


def test_spellings_of_one_street_are_one_and_of_two_streets_two() -> None:
    found = streets_module.street_names(
        GeoExtract.of(
            [
                line("Forbes Ave", (0, 0), (1, 0)),
                line("Forbes Avenue", (1, 0), (2, 0)),
                line("Forbes Avenue", (2, 0), (3, 0)),
                line("FORBES AVE", (3, 0), (4, 0)),
                line("Forbes Ave", (50, 0), (51, 0)),  # elsewhere, and part of it all the same: it has the spelling
                line("Mill Road", (0, 3), (1, 3)),
                line("Mill Rd", (90, 3), (91, 3)),
                line("E Street", (0, 5), (5, 5)),
                line("East Street", (2, 4), (2, 6)),
            ]
        ),
        "streets.geojson",
    )
    assert sorted(set(found.names)) == ["E Street", "East Street", "Forbes Avenue", "Mill Rd", "Mill Road"]
    assert found.variants == {"Forbes Avenue": ["Forbes Ave", "FORBES AVE"]}


def test_areas_and_points_of_a_table_count_unless_openstreetmap_says_otherwise() -> None:
    square, stop = (
        GeoFeature({"name": "Plaza"}, shapely.box(0, 0, STEP, STEP)),
        GeoFeature({"name": "Stop"}, shapely.Point(0, 0)),
    )
    street = line("Mill Road", (0, 3), (1, 3))
    assert streets_module.street_names(GeoExtract.of([square, stop, street]), "t").names == ["Plaza", "Stop", "Mill Road"]
    tagged = GeoFeature({"name": "Plaza", "highway": "pedestrian"}, square.shape)
    assert streets_module.street_names(GeoExtract.of([tagged, stop, street]), "t").names == ["Plaza", "Mill Road"]


@pytest.mark.parametrize(("azimuth", "metres", "streets"), [(90, 45, 1), (90, 55, 2), (0, 45, 1), (0, 55, 2)])
@pytest.mark.parametrize("lat", [0.0, 60.0, -60.0])
def test_spellings_belong_together_up_to_50_m_of_the_globe(lat: float, azimuth: float, metres: float, streets: int) -> None:
    """The gap between two ways of one name, to the east or the north."""
    globe = pyproj.Geod(ellps="WGS84")
    at = [globe.fwd(25.0, lat, azimuth, d)[:2] for d in (0, 100, 100 + metres, 200 + metres)]
    ways = [GeoFeature({"name": name}, shapely.LineString(at[i : i + 2])) for i, name in ((0, "Mill Rd"), (2, "Mill Road"))]
    assert len(set(streets_module.street_names(GeoExtract.of(ways), "t").names)) == streets
