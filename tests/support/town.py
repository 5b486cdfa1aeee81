"""A town of three streets, drawn by hand: what tests of tiles, facts and grafts are about."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import rasterio
from rasterio.transform import from_origin

from addressvlm.config import Config
from addressvlm.dataset.streets import StreetMap
from addressvlm.storage.run_dir import Run
from addressvlm.tiles.roads import write_roads

LAT, LON = 52.2, 0.12
_METRES = pyproj.Transformer.from_crs(
    "EPSG:4326", f"+proj=tmerc +lat_0={LAT} +lon_0={LON} +k=1 +datum=WGS84 +units=m", always_xy=True
)

# In metres from the middle of the town. Mill Street runs east-west through it, King Street crosses 40 m to the east.
STREETS: dict[str, list[tuple[float, float]]] = {
    "Mill Street": [(-300, 0), (300, 0)],
    "King Street": [(40, -300), (40, 300)],
    "A Very Long Name For Such A Short Alley": [(-60, -40), (-50, -40)],
}


def degrees(x: float, y: float) -> tuple[float, float]:
    """Latitude and longitude of a point in metres from the middle."""
    lon, lat = _METRES.transform(x, y, direction="INVERSE")
    return lat, lon


def write_streets(path: Path, streets: dict[str, list[tuple[float, float]]] | None = None, **properties: Any) -> Path:
    """The streets as GeoJSON in degrees."""
    features = [
        {
            "type": "Feature",
            "properties": {"name": name, **properties},
            "geometry": {"type": "LineString", "coordinates": [degrees(*point)[::-1] for point in line]},
        }
        for name, line in (streets or STREETS).items()
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
    return path


def write_run_roads(config: Config) -> None:
    """What prepare leaves for the tiles of a run."""
    run, streets = Run(config), StreetMap.load(config.city.streets, with_roads=True)
    run.photos.mkdir(parents=True)
    write_roads(run.roads, streets.roads, np.array([LAT]), np.array([LON]))


def write_imagery(path: Path, half_m: float = 250, **profile: Any) -> Path:
    """A GeoTIFF with 1 m pixels around the middle: red to the west, blue to the east, green in the north-west."""
    side = int(2 * half_m)
    pixels = np.zeros((3, side, side), np.uint8)
    pixels[0, :, : side // 2] = 200
    pixels[2, :, side // 2 :] = 200
    pixels[:, : side // 4, : side // 4] = np.array([0, 180, 0], np.uint8)[:, None, None]
    utm = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:32631", always_xy=True)
    x, y = utm.transform(LON, LAT)
    options = {"crs": "EPSG:32631", "transform": from_origin(x - half_m, y + half_m, 1, 1), "dtype": "uint8", **profile}
    with rasterio.open(path, "w", driver="GTiff", width=side, height=side, count=3, **options) as out:
        out.write(pixels.astype(options["dtype"]))
    return path
