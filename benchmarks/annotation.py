#!/usr/bin/env python
"""Coordinates -> street, second street and district, compared with a loop over the rows.

    python benchmarks/annotation.py streets.geojson districts.geojson

As many coordinates as SF-IAL-Large has photos (paper 002, Table 1) are drawn along the streets of the file by seed. The loop
uses the same library on a sample of the rows, alternating with ours: first the nearest street alone, then all columns, then
all columns where several rows share a place, as the views of a panorama do. Speeds are CPU time.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import psutil
import pyproj
import shapely
from numpy.typing import NDArray

from addressvlm.dataset.geocoding import annotate_coordinates
from addressvlm.dataset.streets import StreetMap

ROWS = 1_960_000
PLACES = 233_820  # of SF-IAL-Large
NOISE_M = 6.0
LIMIT_M = 40.0
Columns = tuple[NDArray, NDArray]  # code of the street, metres


def sample_points(streets: StreetMap, rows: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Latitude and longitude of points along the streets, uniform by length, some metres beside the line."""
    rng = np.random.default_rng(seed)
    lines = np.array([line for line in streets.lines if shapely.get_dimensions(line) == 1], dtype=object)
    length = shapely.length(lines)
    line = np.sort(rng.choice(len(lines), rows, p=length / length.sum()))
    points = shapely.line_interpolate_point(lines[line], rng.uniform(0, 1, rows), normalized=True)
    xy = shapely.get_coordinates(points) + rng.normal(0, NOISE_M, (rows, 2))
    return streets.to_degrees(xy[:, 0], xy[:, 1])


class Row(NamedTuple):
    """The loop's result for one row."""

    street: str | None = None
    metres: float = np.inf
    second: str | None = None
    second_metres: float = np.inf
    district: str | None = None


class RowLoop:
    """Looks up one row after the other."""

    def __init__(self, streets: StreetMap) -> None:
        self.names, self.lines, self.tree = streets.names, streets.lines, shapely.STRtree(streets.lines)
        self.district_names, self.polygons = streets.district_names, streets.district_polygons
        self.district_tree = shapely.STRtree(streets.district_polygons)
        lon, lat = streets.to_degrees([0.0], [0.0])[::-1]
        plane = f"+proj=tmerc +lat_0={lat[0]:.6f} +lon_0={lon[0]:.6f} +datum=WGS84 +units=m +no_defs"
        self.project = pyproj.Transformer.from_crs("EPSG:4326", plane, always_xy=True).transform

    def nearest(self, lat: NDArray[np.float64], lon: NDArray[np.float64]) -> list[Row]:
        """The nearest street."""
        rows = []
        for row_lat, row_lon in zip(lat.tolist(), lon.tolist(), strict=True):
            point = shapely.Point(self.project(row_lon, row_lat))
            line = self.tree.nearest(point)
            metres = self.lines[line].distance(point)
            rows.append(Row(self.names[line], metres) if metres <= LIMIT_M else Row())
        return rows

    def columns(self, lat: NDArray[np.float64], lon: NDArray[np.float64]) -> list[Row]:
        """The nearest street, the nearest of another name, the district."""
        rows = []
        for row_lat, row_lon in zip(lat.tolist(), lon.tolist(), strict=True):
            point = shapely.Point(self.project(row_lon, row_lat))
            best: dict[str, float] = {}
            for line in self.tree.query(point, predicate="dwithin", distance=LIMIT_M):
                name = self.names[line]
                best[name] = min(best.get(name, np.inf), self.lines[line].distance(point))
            two = sorted(best.items(), key=lambda item: item[1])[:2] + [(None, np.inf)] * 2
            inside = self.district_tree.query(point, predicate="intersects")
            smallest = min(inside, key=lambda i: self.polygons[i].area, default=None)
            district = None if smallest is None else self.district_names[smallest]
            rows.append(Row(*two[0], *two[1], district))
        return rows


def agreement(streets: StreetMap, ours: Columns, rows: list[Row]) -> float:
    """Share of rows with the same street, or with another one as near (two streets share a line or a corner)."""
    names = np.array([*streets.street_names, None], dtype=object)
    same = names[ours[0]] == np.array([row.street for row in rows], dtype=object)
    return float(np.mean(same | np.isclose(ours[1], [row.metres for row in rows], atol=0.03)))


def compare(
    name: str, streets: StreetMap, points: tuple[NDArray, NDArray], loop: Callable[..., list[Row]],
    ours: Callable[..., Columns], sample: int, rounds: int,
) -> None:  # fmt: skip
    """Run both alternately, print the time per row and the ratio."""
    lat, lon = points
    subset = np.sort(np.random.default_rng(0).choice(len(lat), min(sample, len(lat)), replace=False))
    ours_us, loop_us = [], []
    for _ in range(rounds):
        started = time.process_time()
        rows = loop(lat[subset], lon[subset])
        loop_us.append((time.process_time() - started) / len(subset) * 1e6)
        started = time.process_time()
        columns = ours(lat, lon)
        ours_us.append((time.process_time() - started) / len(lat) * 1e6)
    ratios = [a / b for a, b in zip(loop_us, ours_us, strict=True)]
    same = agreement(streets, (columns[0][subset], columns[1][subset]), rows)
    print(
        f"{name:33}  loop {min(loop_us):5.1f} us/row  ours {min(ours_us):5.2f} us/row {1e6 / min(ours_us):9,.0f} rows/s   "
        f"ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})   same street {100 * same:.2f} %",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("streets", help="file of named lines, as city.streets")
    parser.add_argument("districts", nargs="?", help="file of named polygons, as city.districts")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"coordinates (default: {ROWS:,})")
    parser.add_argument("--sample", type=int, default=20_000, help="rows of the loop (default: 20,000)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    streets = StreetMap.load(args.streets, args.districts)
    lat, lon = sample_points(streets, args.rows, args.seed)
    before = psutil.Process().memory_info().rss
    print(f"{len(lat):,} coordinates, {len(streets.lines):,} lines, {before / 2**20:,.0f} MiB in use", flush=True)
    loop, repeats = RowLoop(streets), (args.sample, args.rounds)

    def nearest(lat: NDArray, lon: NDArray) -> Columns:
        return streets.nearest_two(lat, lon, LIMIT_M)[:2]

    def columns(lat: NDArray, lon: NDArray) -> Columns:
        annotation = annotate_coordinates(lat, lon, streets, LIMIT_M)
        return annotation.street, annotation.distance_m

    views = -(-ROWS // PLACES)
    same_place = np.repeat(np.arange(0, len(lat), views), views)[: len(lat)]
    compare("nearest street", streets, (lat, lon), loop.nearest, nearest, *repeats)
    compare("street, second street, district", streets, (lat, lon), loop.columns, columns, *repeats)
    compare(f"the same, {views} views a place", streets, (lat[same_place], lon[same_place]), loop.columns, columns, *repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory {peak / 2**20:,.0f} MiB, {(peak - before) / 2**20:,.0f} MiB above what was in use before", flush=True)


if __name__ == "__main__":
    main()
