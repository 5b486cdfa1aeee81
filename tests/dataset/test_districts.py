"""Which areas of a map file become districts"""

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from addressvlm.dataset.districts import choose_districts, district_cells
from addressvlm.dataset.geo_files import GeoExtract, GeoFeature


def layer(level: str, columns: int, rows: int = 1, right: float = 10, **tags: str) -> list[GeoFeature]:
    """Areas side by side over the ground from (0, 0) to (right, 10)."""
    tags = tags or {"boundary": "administrative", "admin_level": level}
    width, height = right / columns, 10 / rows
    boxes = [shapely.box(width * i, height * j, width * (i + 1), height * (j + 1)) for i in range(columns) for j in range(rows)]
    return [GeoFeature({**tags, "name": f"{level}-{i}"}, box) for i, box in enumerate(boxes)]


PLACES = [GeoFeature({"place": "suburb", "name": f"place-{i}"}, shapely.Point(2.5 + 5 * i, 5)) for i in range(2)]
QUARTERS = layer("quarter", 2, place="quarter")


@pytest.mark.parametrize(
    ("features", "settings", "chosen"),
    [
        (layer("8", 2) + layer("9", 2, 2) + layer("10", 3, 2), {}, "10"),  # of those that cover all, the finest
        (layer("8", 2) + layer("10", 5, 4), {}, "8"),  # 20 for 40 streets are no districts, but blocks
        (layer("8", 2) + layer("10", 5, 4)[:19], {}, "10"),
        (layer("8", 1) + layer("10", 2, right=9), {}, "10"),  # nine tenths are enough, and one is no district
        (layer("8", 2) + layer("10", 2, right=8.8), {}, "8"),
        (layer("8", 2) + QUARTERS, {}, "8"),
        (layer("8", 1) + QUARTERS + PLACES, {}, "quarter"),
        (layer("8", 1) + layer("suburb", 2, place="suburb") + QUARTERS, {}, "quarter"),
        (layer("8", 1) + PLACES, {}, "place"),
        (layer("8", 2) + QUARTERS + PLACES, {"source": "polygons"}, "quarter"),
        (layer("8", 2) + QUARTERS + PLACES, {"source": "place"}, "place"),
        (layer("8", 2) + layer("9", 2, 2) + QUARTERS, {"admin_level": 8}, "8"),
        (layer("8", 1, right=3) + layer("9", 1, right=5), {}, "9"),  # where none will do, that which covers most
        (layer("8", 1, right=5) + layer("9", 1, right=3), {}, "8"),
    ],
)
def test_the_layer_of_districts_that_is_chosen(features: list[GeoFeature], settings: dict, chosen: str) -> None:
    streets = np.array([shapely.Point(0.125 + 0.25 * i, 5.1) for i in range(40)], dtype=object)
    result = choose_districts(GeoExtract.from_features(features, (0, 0, 10, 10), osm=True), streets, "town.osm", **settings)
    assert {f.tags["name"].partition("-")[0] for f in result} == {chosen}


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12), st.integers(-70, 70))
def test_cells_are_where_the_middle_is_nearest(middles: list[tuple[int, int]], lat: int) -> None:
    points = [GeoFeature({"name": str(i)}, shapely.Point(x / 1000, lat + y / 1000)) for i, (x, y) in enumerate(middles)]
    within = shapely.box(-0.001, lat - 0.001, 0.021, lat + 0.021)
    result = district_cells(points, within)
    assert sum(cell.shape.area for cell in result) == pytest.approx(within.area)
    assert len(result) == len(set(middles))
    squeeze = np.cos(np.radians(lat))
    for cell in result:
        inside = cell.shape.representative_point()
        away = [np.hypot((p.shape.x - inside.x) * squeeze, p.shape.y - inside.y) for p in points]
        assert away[int(cell.tags["name"])] == pytest.approx(min(away), abs=1e-6)
