"""What is known of a place before its photo is looked at: districts, streets, a rough position (paper 002, D.1, Table 12)."""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import shapely

from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.gazetteer.name_matcher import normalize_name
from addressvlm.gazetteer.spatial_index import METRES_PER_DEGREE

NAMED = 3  # names proposed for one that is not there


@dataclass(frozen=True)
class Circle:
    """Around a rough position: a street counts if any of its shape comes this near.

    Attributes:
        lat, lon: degrees, WGS84.
        radius_m: metres.
        soft: rule nothing out; a street at distance d weighs exp(-(d / radius)^2 / 2), one through the middle 1.
    """

    lat: float
    lon: float
    radius_m: float
    soft: bool = False


@dataclass(frozen=True)
class Prior:
    """Restrictions that all hold together, and weights; an empty one changes nothing.

    Attributes:
        districts, streets: names of the gazetteer, any of their spellings; nothing else can be the answer.
        circle: no street outside can be the answer.
        weights: street -> how much more likely it is beforehand than a street not named here, which weighs 1; 0 rules out.
    """

    districts: tuple[str, ...] = ()
    streets: tuple[str, ...] = ()
    circle: Circle | None = None
    weights: Mapping[str, float] | None = None

    def log_weights(self, gazetteer: Gazetteer) -> np.ndarray:
        """ln of the weight of each address of the gazetteer, float64 (addresses,); -inf where it is ruled out.

        Raises:
            InputError: a name is unknown, a number is out of its range, or every address is ruled out.
        """
        addresses = gazetteer.addresses
        weights = np.zeros(len(addresses))
        if self.districts:
            chosen = {_known(name, "district", gazetteer) for name in self.districts}
            weights[[a.district not in chosen for a in addresses]] = -math.inf
        if self.streets:
            chosen = {_known(name, "street", gazetteer) for name in self.streets}
            weights[[a.street not in chosen for a in addresses]] = -math.inf
        if self.weights:
            given = _weights(self.weights, gazetteer)
            weights += [given.get(a.street, 0.0) for a in addresses]
        if self.circle:
            near = _near(self.circle, gazetteer)
            weights += [near[a.street] for a in addresses]
        if len(addresses) and not np.isfinite(weights).any():
            raise InputError(f"no address of {gazetteer.city or 'the city'} is left by the prior: widen {self._parts()}.")
        return weights

    def _parts(self) -> str:
        """Its parts that are set, in words."""
        parts = {"districts": self.districts, "streets": self.streets, "weights": self.weights, "circle": self.circle}
        return " or ".join(name for name, value in parts.items() if value)


def _known(name: str, level: str, gazetteer: Gazetteer) -> str:
    """The gazetteer's spelling of a name.

    Raises:
        InputError: it has no such name; the sentence proposes the nearest.
    """
    names, find = (
        (gazetteer.streets, gazetteer.find_street) if level == "street" else (gazetteer.districts, gazetteer.find_district)
    )
    found = name if name in names else find(name)
    if found is not None:
        return found
    raise InputError(
        f"no {level} '{name}' in {gazetteer.city or 'the city'}: give one of its {level}s, {_nearest(name, names)}."
    )


def _nearest(name: str, names: Iterable[str]) -> str:
    """The names most like one, in words."""
    forms = {normalize_name(known): known for known in names}
    near = [forms[form] for form in difflib.get_close_matches(normalize_name(name), forms, n=NAMED, cutoff=0.5)]
    return f"the nearest is {' or '.join(near)}" if near else f"such as {', '.join(list(forms.values())[:NAMED])}"


def _weights(weights: Mapping[str, float], gazetteer: Gazetteer) -> dict[str, float]:
    """Street of the gazetteer -> ln of its weight.

    Raises:
        InputError: a name is unknown, two are one street, or a weight is out of its range.
    """
    found: dict[str, float] = {}
    for name, weight in weights.items():
        street = _known(name, "street", gazetteer)
        if street in found:
            raise InputError(f"the prior's weights name '{street}' twice, once as '{name}': give each street one weight.")
        found[street] = _weight(name, weight)
    return found


def _weight(street: str, weight: float) -> float:
    if not (math.isfinite(weight) and weight >= 0):
        raise InputError(f"the prior's weight of '{street}' is {weight}: give a number from 0 on.")
    return math.log(weight) if weight else -math.inf


def _near(circle: Circle, gazetteer: Gazetteer) -> dict[str, float]:
    """Street -> ln of its weight by distance from the circle's middle; a street without a shape is never inside."""
    if not (-90 <= circle.lat <= 90 and -180 <= circle.lon <= 180):
        raise InputError(f"the circle's middle is {circle.lat}, {circle.lon}: give latitude and longitude in degrees.")
    if not (math.isfinite(circle.radius_m) and circle.radius_m > 0):
        raise InputError(f"the circle's radius_m is {circle.radius_m}: give metres above 0.")
    if not gazetteer.geometry:
        raise InputError(f"no street of {gazetteer.city or 'the city'} has a shape, so no circle can choose: leave it out.")
    scale = np.array([METRES_PER_DEGREE * math.cos(math.radians(circle.lat)), METRES_PER_DEGREE])
    shapes = shapely.transform(list(gazetteer.geometry.values()), lambda lonlat: (lonlat - [circle.lon, circle.lat]) * scale)
    distances = shapely.distance(shapely.Point(0, 0), shapes)
    inside = np.where(distances <= circle.radius_m, 0.0, -math.inf)
    weights = -((distances / circle.radius_m) ** 2) / 2 if circle.soft else inside
    return dict.fromkeys(gazetteer.streets, -math.inf) | dict(zip(gazetteer.geometry, weights.tolist(), strict=True))
