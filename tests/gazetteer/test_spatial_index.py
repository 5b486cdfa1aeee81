"""The nearest streets of many points at once"""

import math

import numpy as np
import pytest
import shapely
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from addressvlm.gazetteer import spatial_index
from addressvlm.gazetteer.spatial_index import NearestStreets

coordinate = st.integers(-150, 150)
point = st.tuples(coordinate, coordinate)
line = st.lists(point, min_size=2, max_size=4, unique=True).map(shapely.LineString)
area = st.tuples(point, st.integers(1, 80), st.integers(1, 80)).map(
    lambda a: shapely.box(a[0][0], a[0][1], a[0][0] + a[1], a[0][1] + a[2]).difference(shapely.Point(a[0]).buffer(9))
)
shapes = st.lists(st.tuples(st.integers(0, 4), st.one_of(line, line, area, point.map(shapely.Point))), max_size=10)


def by_hand(known: list[tuple[int, shapely.Geometry]], x: float, y: float, limit_m: float) -> list[tuple[int, float]]:
    """Code and distance to the cm of all that is within the limit, the nearest first."""
    result: dict[int, float] = {}
    for code, shape in known:
        result[code] = min(result.get(code, math.inf), shape.distance(shapely.Point(x, y)))
    return sorted(((code, round(d, 2)) for code, d in result.items() if d <= limit_m), key=lambda f: (f[1], f[0]))


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate])  # no shrinking: shapes shrink for minutes
@given(
    shapes,
    st.lists(st.tuples(st.floats(-250, 250), st.floats(-250, 250)), max_size=12),
    st.sampled_from([0.5, 40.0, 90.0, 400.0]),
)
def test_the_nearest_of_every_point_is_what_shapely_measures(
    known: list[tuple[int, shapely.Geometry]], points: list[tuple[float, float]], limit_m: float
) -> None:
    known = [(code, shape) for code, shape in known if not shape.is_empty]
    index = NearestStreets(np.array([s for _, s in known], dtype=object), np.array([c for c, _ in known], dtype=np.int64))
    x, y = (np.array([p[i] for p in points], dtype=float) for i in (0, 1))
    first, metres, second, second_metres = index.nearest_two(x, y, limit_m)
    expected = [by_hand(known, *p, limit_m) for p in points]
    pairs = [(all_of + [(-1, math.inf)] * 2)[:2] for all_of in expected]
    assert metres == pytest.approx([pair[0][1] for pair in pairs], abs=0.0101)
    assert second_metres == pytest.approx([pair[1][1] for pair in pairs], abs=0.0101)
    for i, pair in enumerate(pairs):
        if pair[1][1] - pair[0][1] > 0.02 and (len(expected[i]) < 3 or expected[i][2][1] - pair[1][1] > 0.02):
            assert (first[i], second[i]) == (pair[0][0], pair[1][0])
    of_point, code, away = index.within(x, y, limit_m)
    for i, all_of in enumerate(expected):
        assert sorted(code[of_point == i]) == sorted(c for c, _ in all_of)
        assert away[of_point == i] == pytest.approx([d for _, d in all_of], abs=0.0101)
    for i in range(len(points)):
        mine = [*zip(code[of_point == i], away[of_point == i], strict=True), (-1, math.inf), (-1, math.inf)]
        assert mine[:2] == [(first[i], metres[i]), (second[i], second_metres[i])]


def test_batches_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    starts = rng.uniform(-2000, 2000, (300, 1, 2))
    lines = shapely.linestrings(np.concatenate([starts, starts + rng.normal(0, 80, (300, 1, 2))], axis=1))
    index = NearestStreets(lines, rng.integers(0, 90, 300))
    x, y = rng.uniform(-2500, 2500, (2, 3000))
    whole = index.nearest_two(x, y, 150)
    monkeypatch.setattr(spatial_index, "CELLS_PER_BATCH", 7)
    monkeypatch.setattr(spatial_index, "PAIRS_PER_BATCH", 13)
    assert all((a == b).all() for a, b in zip(whole, index.nearest_two(x, y, 150), strict=True))
    alone = [
        np.concatenate(c) for c in zip(*(index.nearest_two(x[i : i + 1], y[i : i + 1], 150) for i in range(60)), strict=True)
    ]
    assert all((a[:60] == b).all() for a, b in zip(whole, alone, strict=True))
