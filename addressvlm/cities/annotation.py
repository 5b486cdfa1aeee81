"""Street, second street and district of millions of coordinates, as numpy columns (paper 002, Sec. 5.1, offline)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from addressvlm.cities.streets import StreetMap

ROWS_AT_A_TIME = 1 << 18  # bounds the memory beside the columns themselves


@dataclass(frozen=True)
class Annotation:
    """Columns of N rows.

    Attributes:
        street: positions in `StreetMap.street_names` of the nearest street, -1 where none is within the limit.
        distance_m: metres to it, inf where there is none.
        second, second_distance_m: the same for the nearest street of another name.
        district: positions in `StreetMap.district_names`, -1 outside all of them.
    """

    street: NDArray[np.int32]
    distance_m: NDArray[np.float32]
    second: NDArray[np.int32]
    second_distance_m: NDArray[np.float32]
    district: NDArray[np.int32]


def annotate(lat: ArrayLike, lon: ArrayLike, streets: StreetMap, limit_m: float) -> Annotation:
    """The columns of N rows in degrees, WGS84; a street counts up to `limit_m`.

    Rows that share a coordinate (the views of a panorama) are looked up once if they are near each other in the table.
    """
    lat, lon = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
    rows = len(lat)
    street, second, district = (np.full(rows, -1, dtype=np.int32) for _ in range(3))
    distance, second_distance = (np.full(rows, np.inf, dtype=np.float32) for _ in range(2))
    for start in range(0, rows, ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        points, row = np.unique(lat[part] + 1j * lon[part], return_inverse=True)
        here = np.ascontiguousarray(points.real), np.ascontiguousarray(points.imag)
        first, metres, other, other_metres = streets.nearest_two(*here, limit_m)
        street[part], distance[part] = first[row], metres[row]
        second[part], second_distance[part] = other[row], other_metres[row]
        district[part] = streets.district_codes(*here)[row]
    return Annotation(street, distance, second, second_distance, district)
