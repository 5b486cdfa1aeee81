"""What a model holds of one photo: a probability for each address, and the answers that follow from it.

The most likely address decides first: it is what is generated, it alone is confirmed when asked for, and it is chosen
where it is offered. So the three kinds of questions, and the three levels, never contradict each other.
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
    """An address of the gazetteer and how likely the model finds it, among all addresses that the prior leaves."""

    street: str
    district: str
    probability: float


@dataclass(frozen=True)
class Localization:
    """Where a photo was taken, as far as the model knows.

    Attributes:
        candidates: best first.
        known: whether the confidence is above the threshold; if not, the honest answer is *don't know*.
        confidence: probability of the first candidate.
        threshold: 0 for a model whose answers were never calibrated, 1 if no confidence was ever found to be enough.
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
        """The most likely addresses, best first; those ruled out by a prior are left out."""
        order = [i for i in np.argsort(-self.scores, kind="stable").tolist() if self.scores[i] > -np.inf][:top_k]
        found = [(self.addresses[i], float(self.probabilities[i])) for i in order]
        return [Candidate(address.street, address.district, p) for address, p in found]

    def localization(self, top_k: int | None, threshold: float) -> Localization:
        """The ranking with what it is worth."""
        confidence = float(self.probabilities.max())
        return Localization(self.ranked(top_k), confidence > threshold, confidence, threshold)

    def name(self, level: Level) -> str:
        """What is generated when asked for a level: that part of the most likely address."""
        return _name(self.best, level)

    def probability(self, name: str, level: Level) -> float:
        """How likely the photo is of this street or district, over all addresses that have it; 0 for an unknown name."""
        return self._marginals(level).get(normalize_name(name), 0.0)

    def judge(self, name: str, level: Level) -> bool:
        """Whether to say Yes when asked for a name: only for the one that would be generated."""
        return normalize_name(name) == normalize_name(self.name(level))

    def choose(self, options: Sequence[str], level: Level) -> str:
        """The option that would be generated, else the most likely one; of equal ones the first."""
        return next((o for o in options if self.judge(o, level)), None) or max(
            options, key=lambda option: self.probability(option, level)
        )

    def _marginals(self, level: Level) -> dict[str, float]:
        sums: dict[str, float] = {}
        for address, p in zip(self.addresses, self.probabilities.tolist(), strict=True):
            name = normalize_name(_name(address, level))
            sums[name] = sums.get(name, 0.0) + p
        return sums


def _name(address: Address, level: Level) -> str:
    return {"street": address.street, "district": address.district, "address": address.text()}[level]
