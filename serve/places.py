"""Where the streets of a served city are."""

import gzip
import json
from functools import cached_property
from typing import Any

import shapely
from shapely.geometry.base import BaseGeometry

from addressvlm.addresses import GAZETTEER
from serve.cities import City
from serve.errors import ApiError


class Places:
    """The gazetteer of a city, read when it is first needed."""

    def __init__(self, city: City) -> None:
        self.city = city

    @cached_property
    def geojson(self) -> bytes:
        """The city's map as it is sent.

        Raises:
            ApiError: 404 the model has no gazetteer.
        """
        file = self.city.folder / GAZETTEER
        if not file.is_file():
            raise ApiError(404, "This model has no map: its folder holds no gazetteer.geojson.", code="no_map")
        tree = json.loads(file.read_text(encoding="utf-8"))
        return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()

    @cached_property
    def zipped(self) -> bytes:
        """The map compressed, once for all requests."""
        return gzip.compress(self.geojson, mtime=0)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What `/v1/cities` tells of it."""
        gazetteer = self.city.gazetteer()
        return {
            "id": self.city.id,
            "name": self.city.name,
            "model": self.city.model,
            "streets": len(gazetteer.streets) if gazetteer else 0,
            "districts": len(gazetteer.districts) if gazetteer else 0,
            "addresses": len(gazetteer.addresses) if gazetteer else 0,
        }

    @cached_property
    def streets(self) -> dict[str, dict[str, Any]]:
        """Street -> its GeoJSON geometry, and a point on it."""
        gazetteer = self.city.gazetteer()
        return {name: _placed(shape) for name, shape in gazetteer.geometry.items()} if gazetteer else {}

    def candidate(self, street: str, district: str, probability: float) -> dict[str, Any]:
        """A candidate as it is sent."""
        nowhere = {"lat": None, "lon": None, "geometry": None}
        return {"street": street, "district": district, "probability": probability, **self.streets.get(street, nowhere)}


def _placed(shape: BaseGeometry) -> dict[str, Any]:
    longest = max(shapely.get_parts(shape).tolist(), key=lambda part: part.length)
    line = longest.geom_type in ("LineString", "LinearRing")
    point = longest.interpolate(0.5, normalized=True) if line else shape.representative_point()
    return {"lat": point.y, "lon": point.x, "geometry": shapely.geometry.mapping(shape)}
