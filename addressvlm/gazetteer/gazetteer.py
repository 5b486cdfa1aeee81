"""Addresses of a city: the pair street and district, and the gazetteer of all that there are.

Names stay as the source writes them, in its script; other spellings (`addressvlm.gazetteer.name_matcher`) are for matching only.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import shapely
from shapely.geometry.base import BaseGeometry

from addressvlm.errors import InputError
from addressvlm.gazetteer.name_matcher import NameIndex
from addressvlm.gazetteer.spatial_index import NearestNames
from addressvlm.storage.remote_path import AnyPath

GAZETTEER_FILE = "gazetteer.geojson"  # in the folder of a dataset or a model


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
        self._known = {"street": frozenset(self.streets), "district": frozenset(self.districts)}
        self._near = {
            "street": NearestNames(self.streets, self.geometry),
            "district": NearestNames(self.districts, self.district_geometry),
        }
        known = {*self.streets, *self.districts}
        self.variants = {name: list(others) for name, others in (variants or {}).items() if others and name in known}
        self._street_index = NameIndex(self.streets, self.variants)
        self._district_index = NameIndex(self.districts, self.variants)

    def near(
        self,
        name: str,
        n: int,
        rng: random.Random | None = None,
        level: Literal["street", "district"] = "street",
        hard_negative_share: float = 0.5,
        without: Collection[str] = (),
    ) -> list[str]:
        """Up to n other names of the level: the nearest first, or with `rng` about `hard_negative_share` near, the rest from anywhere.

        Near means among the nearest 2n by distance of the shapes; names without a shape count as far. Those in `without`
        are left out.
        """
        listed = self.streets if level == "street" else self.districts
        spared = self._known[level] & {name, *without}
        found = self._near[level].nearest(name, (n if rng is None else 2 * n) + len(spared))
        pool = [other for other in found if other not in spared][: n if rng is None else 2 * n]
        if rng is None:
            return pool
        chosen = rng.sample(pool, min(sum(rng.random() < hard_negative_share for _ in range(n)), len(pool)))
        taken = {*spared, *chosen}
        while len(chosen) < n and len(taken) < len(listed):
            other = listed[rng.randrange(len(listed))]
            if other not in taken:
                taken.add(other)
                chosen.append(other)
        rng.shuffle(chosen)
        return chosen

    def around(self, lat: float, lon: float, metres: float) -> set[str]:
        """The streets whose shape is that near to a point in degrees."""
        return self._near["street"].around(lat, lon, metres)

    def find_street(self, text: str) -> str | None:
        """The one street named in free text, under any of its names; None if there is none or if there are several."""
        return self._street_index.find(text)

    def find_district(self, text: str) -> str | None:
        """The one district named in free text, under any of its names; None if there is none or if there are several."""
        return self._district_index.find(text)

    def save(self, path: AnyPath) -> None:
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
        path.write_text(json.dumps(tree, ensure_ascii=False)[:-2] + f"\n{lines}\n]}}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: AnyPath) -> "Gazetteer":
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing or is not a gazetteer.
        """
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
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


def _feature(shape: BaseGeometry | None, **properties: Any) -> dict[str, Any]:
    return {
        "type": "Feature",
        "properties": properties,
        "geometry": None if shape is None else shapely.geometry.mapping(shape),
    }


def merge_gazetteers(gazetteers: Sequence[Gazetteer]) -> Gazetteer:
    """One gazetteer of several cities; a name that two of them have keeps the first one's shape."""
    if len(gazetteers) == 1:
        return gazetteers[0]
    shapes: dict[str, BaseGeometry] = {}
    districts: dict[str, BaseGeometry] = {}
    variants: dict[str, Sequence[str]] = {}
    for one in reversed(gazetteers):
        shapes, districts, variants = shapes | one.geometry, districts | one.district_geometry, variants | one.variants
    return Gazetteer(
        [address for one in gazetteers for address in one.addresses],
        shapes,
        districts,
        sum((one._photos for one in gazetteers), Counter()),
        sum((one._places for one in gazetteers), Counter()),
        " + ".join(one.city for one in gazetteers if one.city),
        list(dict.fromkeys(source for one in gazetteers for source in one.attribution)),
        variants,
    )
