"""The probabilities of all addresses for one photo, prior knowledge of it, and the answers that follow from them.

At each level the name with the most probability, summed over all addresses with it, decides: it is the generated answer, it
alone is confirmed in a judgment, and it is chosen where it is an option. So the three kinds of questions never contradict each
other; the likeliest district may be another one than that of the likeliest address. A prior is what is
known beforehand: districts, streets, a rough position (paper 002, D.1, Table 12).
"""

import difflib
import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import shapely

from addressvlm.answers.calibration import softmax
from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.gazetteer.name_matcher import normalize_name
from addressvlm.gazetteer.spatial_index import METRES_PER_DEGREE

Level = Literal["street", "district", "address"]


@dataclass(frozen=True)
class Candidate:
    """An address of the gazetteer and its probability among all addresses that the prior allows."""

    street: str
    district: str
    probability: float


@dataclass(frozen=True)
class Localization:
    """The likeliest addresses of a photo.

    Attributes:
        candidates: best first.
        known: whether the confidence is above the threshold; if not, the honest answer is *don't know*.
        confidence: probability of the first candidate.
        threshold: 0 for a model without calibration, 1 if no confidence reaches the target precision.
    """

    candidates: list[Candidate]
    known: bool
    confidence: float
    threshold: float


@dataclass(frozen=True)
class AddressDistribution:
    """Probabilities of all addresses of a gazetteer, in its order.

    Attributes:
        scores: ln of the probabilities up to a constant, float64 (addresses,); -inf where a prior rules an address out.
    """

    addresses: Sequence[Address]
    scores: np.ndarray

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Float64 (addresses,); their sum is 1."""
        return softmax(self.scores)

    @cached_property
    def best(self) -> Address:
        """The most likely address; of equal ones the first in the gazetteer's order."""
        return self.addresses[int(np.argmax(self.scores))]

    def ranked(self, top_k: int | None = None) -> list[Candidate]:
        """The most likely addresses, best first, without those that a prior rules out."""
        order = [i for i in np.argsort(-self.scores, kind="stable").tolist() if self.scores[i] > -np.inf][:top_k]
        return [Candidate(self.addresses[i].street, self.addresses[i].district, float(self.probabilities[i])) for i in order]

    def localization(self, top_k: int | None, threshold: float) -> Localization:
        """The ranking, its confidence and whether that is enough."""
        confidence = float(self.probabilities.max())
        return Localization(self.ranked(top_k), confidence > threshold, confidence, threshold)

    def name(self, level: Level) -> str:
        """The generated answer: the most likely name of the level; of equal ones that of the most likely address."""
        if level not in self._likeliest:
            sums: dict[str, float] = {_name(self.best, level): 0.0}
            for address, p in zip(self.addresses, self.probabilities.tolist(), strict=True):
                name = _name(address, level)
                sums[name] = sums.get(name, 0.0) + p
            self._likeliest[level] = max(sums, key=lambda name: round(sums[name], 12))
        return self._likeliest[level]

    @cached_property
    def _likeliest(self) -> dict[Level, str]:
        """Level -> its most likely name; filled as levels are asked for."""
        return {}

    def probability(self, name: str, level: Level) -> float:
        """The probability of a street, district or address by name, over all addresses with it; 0 for an unknown name."""
        if level not in self._by_name:
            sums = self._by_name.setdefault(level, defaultdict(float))
            for address, p in zip(self.addresses, self.probabilities.tolist(), strict=True):
                sums[normalize_name(_name(address, level))] += p
        return self._by_name[level].get(normalize_name(name), 0.0)

    @cached_property
    def _by_name(self) -> dict[Level, dict[str, float]]:
        """Level -> normal form of a name -> its probability; filled as levels are asked for."""
        return {}

    def judge(self, name: str, level: Level) -> bool:
        """Whether a judgment is Yes: only for the name that would be generated."""
        return normalize_name(name) == normalize_name(self.name(level))

    def choose(self, options: Sequence[str], level: Level) -> str:
        """The chosen option: the name that would be generated, else the most likely one; of equal ones the first."""
        return next((o for o in options if self.judge(o, level)), None) or max(
            options, key=lambda option: self.probability(option, level)
        )


def _name(address: Address, level: Level) -> str:
    if level == "address":
        return address.text()
    return address.street if level == "street" else address.district


PROPOSALS = 3  # names proposed for an unknown one
ALIKE = 50  # names that have most pairs of letters in common with it, among which they are chosen


@dataclass(frozen=True)
class Circle:
    """A rough position: a street is inside if any part of its shape is.

    Attributes:
        lat, lon: degrees, WGS84.
        radius_m: metres.
        soft: rule nothing out; a street at distance d has the weight exp(-(d / radius)^2 / 2), one through the centre 1.
    """

    lat: float
    lon: float
    radius_m: float
    soft: bool = False


@dataclass(frozen=True)
class Prior:
    """Restrictions, which hold together, and weights; an empty prior changes nothing.

    Attributes:
        districts, streets: names of the gazetteer, in any of their spellings; nothing else can be the answer.
        circle: no street outside can be the answer.
        weights: street -> its weight; a street not named here has 1, and 0 rules a street out.
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
        for level, names in (("district", self.districts), ("street", self.streets)):
            if names:
                allowed = {_gazetteer_name(name, level, gazetteer) for name in names}
                weights[[getattr(a, level) not in allowed for a in addresses]] = -math.inf
        if self.weights:
            by_name = _log_street_weights(self.weights, gazetteer)
            weights += [by_name.get(a.street, 0.0) for a in addresses]
        if self.circle:
            by_distance = _log_circle_weights(self.circle, gazetteer)
            weights += [by_distance[a.street] for a in addresses]
        if len(addresses) and not np.isfinite(weights).any():
            parts = {"districts": self.districts, "streets": self.streets, "weights": self.weights, "circle": self.circle}
            used = " or ".join(name for name, value in parts.items() if value)
            raise InputError(f"no address of {gazetteer.city or 'the city'} is left by the prior: widen {used}.")
        return weights


def _gazetteer_name(name: str, level: str, gazetteer: Gazetteer) -> str:
    """The gazetteer's spelling of a name."""
    names, find = (
        (gazetteer.streets, gazetteer.find_street) if level == "street" else (gazetteer.districts, gazetteer.find_district)
    )
    match = name if name in names else find(name)
    if match is not None:
        return match
    forms = {normalize_name(known): known for known in names}
    pairs = set(itertools.pairwise(normalize_name(name)))
    alike = heapq.nlargest(ALIKE, forms, key=lambda form: len(pairs.intersection(itertools.pairwise(form))))
    near = [forms[form] for form in difflib.get_close_matches(normalize_name(name), alike, n=PROPOSALS, cutoff=0.5)]
    proposal = f"the nearest is {' or '.join(near)}" if near else f"such as {', '.join(list(forms.values())[:PROPOSALS])}"
    raise InputError(f"no {level} '{name}' in {gazetteer.city or 'the city'}: give one of its {level}s, {proposal}.")


def _log_street_weights(weights: Mapping[str, float], gazetteer: Gazetteer) -> dict[str, float]:
    """Street of the gazetteer -> ln of its weight."""
    log_weights: dict[str, float] = {}
    for name, weight in weights.items():
        street = _gazetteer_name(name, "street", gazetteer)
        if street in log_weights:
            raise InputError(f"the prior's weights name '{street}' twice, once as '{name}': give each street one weight.")
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"the prior's weight of '{name}' is {weight}: give a number from 0 on.")
        log_weights[street] = math.log(weight) if weight else -math.inf
    return log_weights


def _log_circle_weights(circle: Circle, gazetteer: Gazetteer) -> dict[str, float]:
    """Street -> ln of its weight by distance from the circle's centre; a street without a shape is never inside."""
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
