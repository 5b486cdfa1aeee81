"""An address (street and district) and the gazetteer of all addresses of a city.

Names keep the spelling and script of their source; normal forms (addressvlm/gazetteer/name_matcher.py) are for matching only.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import shapely
from shapely.geometry.base import BaseGeometry

from addressvlm.errors import InputError
from addressvlm.gazetteer.name_matcher import NameIndex, normalize_name
from addressvlm.gazetteer.spatial_index import NearestNames
from addressvlm.storage.remote_path import AnyPath

GAZETTEER_FILE = "gazetteer.geojson"  # in the folder of a dataset or a model
Level = Literal["street", "district"]


@dataclass(frozen=True, order=True)
class Address:
    """A street in a district, both as the source spells them."""

    street: str
    district: str

    def text(self) -> str:
        """The answer text: `Mill Street, Harbour`."""
        return f"{self.street}, {self.district}"


class Gazetteer:
    """The streets and districts that an answer can name, with their geometries and numbers of photos.

    Attributes:
        streets, districts: names, sorted.
        addresses: every pair of street and district that occurs, sorted.
        geometry: street name -> geometry in degrees (lon, lat): lines, or the area or point of a square or block; streets
            without a geometry are absent.
        district_geometry: the same for districts.
        variants: name of a street or district -> its other names (languages, old and short forms), if it has any.
    """

    def __init__(
        self, addresses: Iterable[Address], geometry: Mapping[str, BaseGeometry] | None = None,
        district_geometry: Mapping[str, BaseGeometry] | None = None, photos: Mapping[str, int] | None = None,
        places: Mapping[str, int] | None = None, city: str = "", attribution: Iterable[str] = (),
        variants: Mapping[str, Sequence[str]] | None = None,
    ) -> None:  # fmt: skip
        self.addresses = sorted(set(addresses))
        self.streets = sorted({a.street for a in self.addresses})
        self.districts = sorted({a.district for a in self.addresses})
        geometry, district_geometry = geometry or {}, district_geometry or {}
        self.geometry = {name: geometry[name] for name in self.streets if name in geometry}
        self.district_geometry = {name: district_geometry[name] for name in self.districts if name in district_geometry}
        self.city = city
        self.attribution = list(attribution)
        self._photos = Counter(photos or {})
        self._places = Counter(places or {})
        self._names: dict[Level, frozenset[str]] = {"street": frozenset(self.streets), "district": frozenset(self.districts)}
        forms = defaultdict(set)
        for spelled in (*self.streets, *self.districts):
            forms[normalize_name(spelled)].add(spelled)
        self._alike = {spelled: group for group in forms.values() if len(group) > 1 for spelled in group}
        self._nearest = {
            "street": NearestNames(self.streets, self.geometry),
            "district": NearestNames(self.districts, self.district_geometry),
        }
        names = {*self.streets, *self.districts}
        self.variants = {name: list(others) for name, others in (variants or {}).items() if others and name in names}
        self._street_index = NameIndex(self.streets, self.variants)
        self._district_index = NameIndex(self.districts, self.variants)

    def nearest(self, name: str, n: int, level: Level = "street", exclude: Collection[str] = ()) -> list[str]:
        """Up to n other names of the level that are not in `exclude`, nearest first; names without a geometry come last.

        Names that are spelled like one of these (`Mill Rd` and `Mill Road` in two parts of the city) are left out as well.
        """
        excluded = self._excluded(name, level, exclude)
        candidates = self._nearest[level].nearest(name, n + len(excluded))
        return [other for other in candidates if other not in excluded][:n]

    def sample_negatives(
        self, name: str, n: int, rng: random.Random, level: Level = "street", hard_negative_share: float = 0.5,
        exclude: Collection[str] = (),
    ) -> list[str]:  # fmt: skip
        """Up to n other names of the level that are not in `exclude`, in random order.

        About `hard_negative_share` of them are among the 2n nearest, the others from anywhere.
        """
        names = self.streets if level == "street" else self.districts
        pool = self.nearest(name, 2 * n, level, exclude)
        negatives = rng.sample(pool, min(sum(rng.random() < hard_negative_share for _ in range(n)), len(pool)))
        used = {*negatives, *self._excluded(name, level, exclude)}
        while len(negatives) < n and len(used) < len(names):
            other = names[rng.randrange(len(names))]
            if other not in used:
                used.add(other)
                negatives.append(other)
        rng.shuffle(negatives)
        return negatives

    def _excluded(self, name: str, level: Level, exclude: Collection[str]) -> frozenset[str]:
        names = {name, *exclude}
        return self._names[level] & names.union(*(self._alike[other] for other in names if other in self._alike))

    def within(self, lat: float, lon: float, metres: float, level: Level = "street") -> set[str]:
        """The streets or districts whose geometry is at most that far from a point in degrees."""
        return self._nearest[level].within(lat, lon, metres)

    @cached_property
    def normal_names(self) -> dict[Level, frozenset[str]]:
        """The normal forms of all names of a level."""
        return {level: frozenset(map(normalize_name, names)) for level, names in self._names.items()}

    def find_street(self, text: str) -> str | None:
        """The one street that a free text mentions, by any of its names; None if there is none or several."""
        return self._street_index.find(text)

    def find_district(self, text: str) -> str | None:
        """The one district that a free text mentions, by any of its names; None if there is none or several."""
        return self._district_index.find(text)

    def save(self, path: AnyPath) -> None:
        """Write as GeoJSON: one feature per street and one per district; unknown geometries are null."""
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
        """Read a file that `save` wrote.

        Raises:
            InputError: the file is missing or is not a gazetteer.
        """
        try:
            tree = json.loads(path.read_text(encoding="utf-8-sig"))
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
            cause = error.strerror
            raise InputError(f"no gazetteer at {path} ({cause}): run prepare, or give a folder that has one.") from None
        except (ValueError, KeyError, TypeError, AttributeError, shapely.errors.ShapelyError) as error:
            raise InputError(f"{path} is not a gazetteer ({type(error).__name__}: {error}): rerun prepare.") from None


def _feature(geometry: BaseGeometry | None, **properties: Any) -> dict[str, Any]:
    mapping = None if geometry is None else shapely.geometry.mapping(geometry)
    return {"type": "Feature", "properties": properties, "geometry": mapping}


def merge_gazetteers(gazetteers: Sequence[Gazetteer]) -> Gazetteer:
    """One gazetteer of several cities; a name in two of them keeps the first one's geometry."""
    if len(gazetteers) == 1:
        return gazetteers[0]
    return Gazetteer(
        [address for city in gazetteers for address in city.addresses],
        {name: shape for city in reversed(gazetteers) for name, shape in city.geometry.items()},
        {name: shape for city in reversed(gazetteers) for name, shape in city.district_geometry.items()},
        sum((city._photos for city in gazetteers), Counter()),
        sum((city._places for city in gazetteers), Counter()),
        " + ".join(city.city for city in gazetteers if city.city),
        list(dict.fromkeys(source for city in gazetteers for source in city.attribution)),
        {name: others for city in reversed(gazetteers) for name, others in city.variants.items()},
    )
