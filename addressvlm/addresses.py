"""Addresses of a city: the pair street and district, a normal form to compare names in, and the gazetteer.

Names stay as the source writes them. The normal form is for matching only and is never shown.
"""

import json
import math
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from addressvlm.errors import InputError

# The short form stands for all of them. "Saint" and "Street" share "st": which one is meant follows from the rest.
_SHORT = {
    "st": ["street", "saint", "str"],
    "ave": ["avenue", "av"],
    "rd": ["road"],
    "ln": ["lane"],
    "dr": ["drive"],
    "blvd": ["boulevard", "boul"],
    "pl": ["place"],
    "sq": ["square"],
    "ct": ["court"],
    "ter": ["terrace", "terr"],
    "cl": ["close"],
    "cres": ["crescent"],
    "gdns": ["gardens"],
    "hwy": ["highway"],
    "pkwy": ["parkway"],
    "mt": ["mount"],
    "and": ["&"],
    "n": ["north"],
    "s": ["south"],
    "e": ["east"],
    "w": ["west"],
    "ne": ["northeast"],
    "nw": ["northwest"],
    "se": ["southeast"],
    "sw": ["southwest"],
}
_FORM = {long: short for short, longs in _SHORT.items() for long in longs}
_APOSTROPHES = "'’‘ʼ`´"
METRES_PER_DEGREE = 111_320.0


@dataclass(frozen=True, order=True)
class Address:
    """A street inside a district, both as the source writes them."""

    street: str
    district: str

    def text(self) -> str:
        """As an answer: `Mill Street, Harbour`."""
        return f"{self.street}, {self.district}"


@lru_cache(maxsize=65536)
def normal(name: str) -> str:
    """The form in which two spellings of one name are equal: `St. Mary's Rd` and `saint marys road`.

    Case, width, punctuation and common abbreviations vanish; scripts written without spaces are split into characters.
    """
    characters = []
    for character in unicodedata.normalize("NFKC", name).casefold():
        if character in _APOSTROPHES:
            continue
        if character != "&" and unicodedata.category(character)[0] in "PSZC":
            characters.append(" ")
        else:
            characters.append(f" {character} " if _unspaced(character) or character == "&" else character)
    words = "".join(characters).split()
    words = [w[:-3] + "strasse" if len(w) > 5 and w.endswith("str") else w for w in words]
    return " ".join(_FORM.get(w, w) for w in words)


def _unspaced(character: str) -> bool:
    """Whether it belongs to Chinese or Japanese script."""
    return "\u3040" <= character <= "\u30ff" or "\u3400" <= character <= "\u9fff"


class Gazetteer:
    """The streets and districts that an answer can name, with their shapes and how often they were photographed.

    Attributes:
        streets, districts: names, sorted.
        addresses: every pair of street and district that occurs, sorted.
        geometry: street name -> its lines in degrees (lon, lat); streets without known lines are absent.
        district_geometry: the same for districts.
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
        self._street_index = _Index(self.streets)
        self._district_index = _Index(self.districts)

    def photos_of(self, street: str) -> int:
        """Number of training photos taken on the street."""
        return self._photos[street]

    def places_of(self, street: str) -> int:
        """Number of training places on the street."""
        return self._places[street]

    def near(
        self, name: str, n: int, rng: random.Random | None = None, level: Literal["street", "district"] = "street"
    ) -> list[str]:
        """Up to n other names of the level: the nearest first, or with `rng` about half near and half from anywhere.

        Near means among the nearest 2n by distance of the shapes; names without a shape count as far.
        """
        order = self._by_distance(name, level)
        if rng is None:
            return order[:n]
        pool = order[: 2 * n]
        chosen = rng.sample(pool, min(sum(rng.random() < 0.5 for _ in range(n)), len(pool)))
        taken = set(chosen)
        rest = [other for other in order if other not in taken]
        chosen += rng.sample(rest, min(n - len(chosen), len(rest)))
        rng.shuffle(chosen)
        return chosen

    def find_street(self, text: str) -> str | None:
        """The one street named in free text, None if there is none or if there are several."""
        return self._street_index.find(text)

    def find_district(self, text: str) -> str | None:
        """The one district named in free text, None if there is none or if there are several."""
        return self._district_index.find(text)

    def save(self, path: Path) -> None:
        """Write as GeoJSON: one feature a street, one a district; unknown shapes are null."""
        districts_of = defaultdict(list)
        for address in self.addresses:
            districts_of[address.street].append(address.district)
        features = [
            _feature(self.geometry.get(name), kind="street", name=name, districts=districts_of[name],
                     photos=self._photos[name], places=self._places[name])
            for name in self.streets
        ]  # fmt: skip
        features += [_feature(self.district_geometry.get(name), kind="district", name=name) for name in self.districts]
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


class _Index:
    """Finds which of the names a free text holds."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name in names:
            self.names[tuple(normal(name).split())].append(name)
        self.longest = max((len(words) for words in self.names), default=0)

    def find(self, text: str) -> str | None:
        words = normal(text).split()
        spans = [
            (start, start + length)
            for length in range(min(self.longest, len(words)), 0, -1)
            for start in range(len(words) - length + 1)
            if tuple(words[start : start + length]) in self.names
        ]
        whole = [s for s in spans if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in spans)]
        forms = {tuple(words[start:end]) for start, end in whole}
        if len(forms) != 1:
            return None
        names = self.names[forms.pop()]
        if len(names) == 1:
            return names[0]
        as_written = [n for n in names if n.casefold() in text.casefold()]  # one form, several spellings in the city
        return max(as_written, key=len) if as_written else None


def _to_metres(shape: BaseGeometry, squeeze: float) -> BaseGeometry:
    """Degrees to metres on a local plane, good enough to order distances."""
    return shapely.transform(shape, lambda c: c * [METRES_PER_DEGREE * squeeze, METRES_PER_DEGREE])


def _feature(shape: BaseGeometry | None, **properties: Any) -> dict[str, Any]:
    return {
        "type": "Feature",
        "properties": properties,
        "geometry": None if shape is None else shapely.geometry.mapping(shape),
    }
