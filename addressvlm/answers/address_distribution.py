"""The probabilities of all addresses for one photo, and the answers that follow from them.

The most likely address decides first: it is the generated answer, it alone is confirmed in a judgment, and it is chosen
where it is an option. So the three kinds of questions, and the three levels, never contradict each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from addressvlm.answers.calibration import softmax
from addressvlm.gazetteer.gazetteer import Address
from addressvlm.gazetteer.name_matcher import normalize_name

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
        """The generated answer: the level of the most likely address."""
        return _name(self.best, level)

    def probability(self, name: str, level: Level) -> float:
        """The probability of a street, district or address by name, over all addresses with it; 0 for an unknown name."""
        name = normalize_name(name)
        pairs = zip(self.addresses, self.probabilities.tolist(), strict=True)
        return sum((p for address, p in pairs if normalize_name(_name(address, level)) == name), 0.0)

    def judge(self, name: str, level: Level) -> bool:
        """Whether a judgment is Yes: only for the name that would be generated."""
        return normalize_name(name) == normalize_name(self.name(level))

    def choose(self, options: Sequence[str], level: Level) -> str:
        """The chosen option: the name that would be generated, else the most likely one; of equal ones the first."""
        return next((o for o in options if self.judge(o, level)), None) or max(
            options, key=lambda option: self.probability(option, level)
        )


def _name(address: Address, level: Level) -> str:
    return {"street": address.street, "district": address.district, "address": address.text()}[level]
