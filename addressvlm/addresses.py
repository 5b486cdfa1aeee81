"""Addresses of a city: the pair street and district, and the gazetteer of all that there are.

Names stay as the source writes them, in its script; other spellings (`addressvlm.names`) are for matching only.
"""

import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from addressvlm.errors import InputError
from addressvlm.names import NameIndex

METRES_PER_DEGREE = 111_320.0


@dataclass(frozen=True, order=True)
class Address:
    """A street inside a district, both as the source writes them."""

    street: str
    district: str

    def text(self) -> str:
        """As an answer: `Mill Street, Harbour`."""
        return f"{self.street}, {self.district}"


class Gazetteer:
    """The streets and districts that an answer can name, with their shapes and how often they were photographed.

    Attributes:
        streets, districts: names, sorted.
        addresses: every pair of street and district that occurs, sorted.
        geometry: street name -> its shape in degrees (lon, lat): lines, or the area or point of a square or block;
            streets without a known shape are absent.
        district_geometry: the same for districts.
        variants: name of a street or district -> its other names (languages, old and short forms) where it has any.
    """

    def __init__(
        self,
        addresses: Iterable[Address],
        geometry: Mapping[str, BaseGeometry] | None = None,
        district_geometry: Mapping[str, BaseGeometry] | None = None,
        photos: Mapping[str, int] | None = None,
        places: Mapping[str, int] | None = None,
        city: str = "",
        attribution: Iterable[str] = (),
        variants: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.addresses = sorted(set(addresses))
        self.streets = sorted({a.street for a in self.addresses})
        self.districts = sorted({a.district for a in self.addresses})
        shapes, district_shapes = geometry or {}, district_geometry or {}
        self.geometry = {n: shapes[n] for n in self.streets if n in shapes}
        self.district_geometry = {n: district_shapes[n] for n in self.districts if n in district_shapes}
        self.city = city
        self.attribution = list(attribution)
        self._photos = Counter(photos or {})
        self._places = Counter(places or {})
        self._order: dict[tuple[str, str], list[str]] = {}
        known = {*self.streets, *self.districts}
        self.variants = {name: list(others) for name, others in (variants or {}).items() if others and name in known}
        self._street_index = NameIndex(self.streets, self.variants)
        self._district_index = NameIndex(self.districts, self.variants)

    def photos_of(self, street: str) -> int:
        """Number of training photos taken on the street."""
        return self._photos[street]

    def places_of(self, street: str) -> int:
        """Number of training places on the street."""
        return self._places[street]

    def near(
        self,
        name: str,
        n: int,
        rng: random.Random | None = None,
        level: Literal["street", "district"] = "street",
        near_share: float = 0.5,
    ) -> list[str]:
        """Up to n other names of the level: the nearest first, or with `rng` about `near_share` near, the rest from anywhere.

        Near means among the nearest 2n by distance of the shapes; names without a shape count as far.
        """
        order = self._by_distance(name, level)
        if rng is None:
            return order[:n]
        pool = order[: 2 * n]
        chosen = rng.sample(pool, min(sum(rng.random() < near_share for _ in range(n)), len(pool)))
        taken = set(chosen)
        rest = [other for other in order if other not in taken]
        chosen += rng.sample(rest, min(n - len(chosen), len(rest)))
        rng.shuffle(chosen)
        return chosen

    def find_street(self, text: str) -> str | None:
        """The one street named in free text, under any of its names; None if there is none or if there are several."""
        return self._street_index.find(text)

    def find_district(self, text: str) -> str | None:
        """The one district named in free text, under any of its names; None if there is none or if there are several."""
        return self._district_index.find(text)

    def save(self, path: Path) -> None:
        """Write as GeoJSON: one feature a street, one a district; unknown shapes are null."""
        districts_of = defaultdict(list)
        for address in self.addresses:
            districts_of[address.street].append(address.district)
        features = [
            _feature(self.geometry.get(name), kind="street", name=name, variants=self.variants.get(name, []),
                     districts=districts_of[name], photos=self._photos[name], places=self._places[name])
            for name in self.streets
        ]  # fmt: skip
        features += [
            _feature(self.district_geometry.get(name), kind="district", name=name, variants=self.variants.get(name, []))
            for name in self.districts
        ]
        tree = {"type": "FeatureCollection", "city": self.city, "attribution": self.attribution, "features": []}
        lines = ",\n".join(json.dumps(feature, ensure_ascii=False) for feature in features)
        Path(path).write_text(json.dumps(tree, ensure_ascii=False)[:-2] + f"\n{lines}\n]}}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Gazetteer":
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing or is not a gazetteer.
        """
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
            streets = [f for f in tree["features"] if f["properties"]["kind"] == "street"]
            districts = [f for f in tree["features"] if f["properties"]["kind"] == "district"]
            return cls(
                [Address(f["properties"]["name"], d) for f in streets for d in f["properties"]["districts"]],
                {f["properties"]["name"]: shapely.geometry.shape(f["geometry"]) for f in streets if f["geometry"]},
                {f["properties"]["name"]: shapely.geometry.shape(f["geometry"]) for f in districts if f["geometry"]},
                {f["properties"]["name"]: f["properties"].get("photos", 0) for f in streets},
                {f["properties"]["name"]: f["properties"].get("places", 0) for f in streets},
                tree.get("city", ""),
                tree.get("attribution", []),
                {f["properties"]["name"]: f["properties"].get("variants", []) for f in streets + districts},
            )
        except OSError as error:
            raise InputError(
                f"no gazetteer at {path} ({error.strerror}): run prepare, or give a folder that has one."
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, shapely.errors.ShapelyError) as error:
            raise InputError(
                f"{path} is not a gazetteer ({type(error).__name__}: {error}): make it again with prepare."
            ) from None

    def _by_distance(self, name: str, level: str) -> list[str]:
        """All other names, the nearest first; those without a shape last, in order of the alphabet."""
        key = (level, name)
        if key not in self._order:
            names = self.streets if level == "street" else self.districts
            shapes = self.geometry if level == "street" else self.district_geometry
            others = [other for other in names if other != name]
            distances = np.full(len(others), math.inf)
            if name in shapes:
                squeeze = math.cos(math.radians(shapely.centroid(shapes[name]).y))
                known = [i for i, other in enumerate(others) if other in shapes]
                here = _to_metres(shapes[name], squeeze)
                distances[known] = shapely.distance(here, [_to_metres(shapes[others[i]], squeeze) for i in known])
            self._order[key] = [others[i] for i in np.argsort(distances, kind="stable")]
        return self._order[key]


def _to_metres(shape: BaseGeometry, squeeze: float) -> BaseGeometry:
    """Degrees to metres on a local plane, good enough to order distances."""
    return shapely.transform(shape, lambda c: c * [METRES_PER_DEGREE * squeeze, METRES_PER_DEGREE])


def _feature(shape: BaseGeometry | None, **properties: Any) -> dict[str, Any]:
    return {
        "type": "Feature",
        "properties": properties,
        "geometry": None if shape is None else shapely.geometry.mapping(shape),
    }
