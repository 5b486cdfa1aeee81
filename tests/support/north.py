"""Places around 60 degrees north, where a degree of longitude is half as long; distances on the ellipsoid."""

import pyproj

GEOD = pyproj.Geod(ellps="WGS84")
LAT, LON = 60.0, 10.0


def at(east: float, north: float) -> tuple[float, float]:
    """Latitude and longitude of a place so many metres east and north of the middle."""
    lon, lat, _ = GEOD.fwd(LON, LAT, 90, east)
    lon, lat, _ = GEOD.fwd(lon, lat, 0, north)
    return lat, lon


def metres(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Distance of two places, each as latitude and longitude."""
    return GEOD.inv(*one[::-1], *other[::-1])[2]
