"""One street-view photo of a city, as every reader gives it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Photo:
    """A good row; `id` is its key, since the views of one panorama share its row. "" stands for not given."""

    row: int  # of the table, 1 is the first below the header; of a folder, the place in its sorted list
    id: str
    file: str  # a URI, or a path relative to city.photos
    place: str  # photos with the same place were taken at the same spot
    lat: float  # degrees, WGS84
    lon: float
    heading: float | None = None  # degrees clockwise from north, in [0, 360)
    street: str = ""
    district: str = ""
    sub_street: str = ""
    fov_deg: float | None = None  # horizontal field of view
    view: float | None = None  # cut `file`, a panorama, this many degrees clockwise of its centre; None: `file` is the photo

    def reject(self, reason: str) -> dict[str, Any]:
        """This photo as a row of `tables.REJECTS`; what stands before the colon in the reason is what gets counted."""
        return {"file": self.file, "row": self.row, "id": self.id, "reason": reason}


def looks_swapped(photos: Sequence[Photo], bounds: tuple[float, float, float, float]) -> bool:
    """Whether the whole table has latitude and longitude the wrong way round.

    `bounds` is what the street map covers, (west, south, east, north) in degrees as shapely gives it. True when more than
    half of the photos lie outside of it and more than half lie inside once swapped. Single rows whose latitude is out of
    range are found by the reader; this is for cities where both numbers pass as a latitude.
    """
    if not photos:
        return False
    west, south, east, north = bounds
    lat, lon = np.array([(photo.lat, photo.lon) for photo in photos]).T

    def inside(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean((x >= west) & (x <= east) & (y >= south) & (y <= north)))

    return inside(lon, lat) < 0.5 < inside(lat, lon)
