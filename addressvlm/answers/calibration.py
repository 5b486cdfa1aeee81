"""How far a model's probabilities can be believed, learnt from photos it has not been trained on.

A generative model's p(address | photo) holds how often it was told each address. Where validation photos bear it out, it is
divided by that prior of its own, the mean of its probabilities over training photos, so that all addresses are equally
likely beforehand (logit adjustment, Menon et al. 2021; what a contrastive loss learns by itself). One temperature then makes
probabilities match how often they are right (Guo et al. 2017), without changing their order. For each target precision a
threshold is chosen above which, with 95 % confidence, at least that share of answers is right; below it the answer is
*don't know*. Photos of one place look alike, so the places count, not the photos.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from addressvlm.errors import InputError
from addressvlm.storage.remote_path import AnyPath

CALIBRATION_FILE = "calibration.json"
TARGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
RANGE = (0.05, 50.0)  # of temperatures
BINS = 10
ALWAYS, NEVER = 0.0, 1.0  # thresholds: a confidence must be above them
DOUBT = 0.05  # that a threshold keeps less than its target
COVERAGES = 10  # shares of the photos at which a threshold is tried


@dataclass(frozen=True)
class ScoredPhotos:
    """Photos whose address is known, as a model scored them.

    Attributes:
        scores: ln p of each address, up to a constant a photo, float64 (photos, addresses); -inf where it is ruled out.
        truth: number of the true address, int64 (photos,); -1 where it is none of them.
        places: whose photo each is.
    """

    scores: np.ndarray
    truth: np.ndarray
    places: Sequence[str]

    @property
    def reachable(self) -> np.ndarray:
        """Whether the true address is among those scored and not ruled out, bool (photos,)."""
        known = self.truth >= 0
        known[known] = np.isfinite(self.scores[known, self.truth[known]])
        return known

    def confidences(self, temperature: float) -> tuple[np.ndarray, np.ndarray]:
        """Probability of the best address and whether it is right, both (photos,)."""
        probabilities = softmax(self.scores / temperature)
        best = probabilities.argmax(axis=1)
        return probabilities.max(axis=1), best == self.truth


@dataclass(frozen=True)
class Calibration:
    """What `calibration.json` in a model's folder holds; the default is a model that was never calibrated.

    Attributes:
        temperature: scores are divided by it, less the model's own prior.
        target: precision that answers are to have unless asked otherwise.
        thresholds: target precision, as text, -> confidence above which an answer keeps it; 1 where none does.
        measured: photos, places, and errors before and after, for the reader.
        own_prior: ln p of each address of the gazetteer whatever the photo, subtracted from scores; empty: nothing is.
    """

    temperature: float = 1.0
    target: float = 0.0
    thresholds: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    own_prior: Sequence[float] = ()

    @property
    def threshold(self) -> float:
        """The confidence above which the model is said to know."""
        return self.thresholds.get(f"{self.target:g}", ALWAYS)

    def applied(self, scores: np.ndarray) -> np.ndarray:
        """Calibrated scores, of which softmax gives the probabilities; float64 (photos, addresses) or (addresses,).

        Raises:
            InputError: the calibration is of another number of addresses.
        """
        if not self.own_prior:
            return scores / self.temperature
        if len(self.own_prior) != scores.shape[-1]:
            raise InputError(
                f"{CALIBRATION_FILE} is of {len(self.own_prior):,} addresses and the gazetteer beside it has {scores.shape[-1]:,}: "
                "delete it, or make it again with evaluate."
            )
        return (scores - np.asarray(self.own_prior)) / self.temperature

    def save(self, folder: AnyPath) -> None:
        """Write `calibration.json` into a model's folder."""
        (folder / CALIBRATION_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: AnyPath) -> "Calibration":
        """Read it; the default where there is none.

        Raises:
            InputError: the file is no calibration.
        """
        file = folder / CALIBRATION_FILE
        if not file.is_file():
            return cls()
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            thresholds = {str(key): float(value) for key, value in tree["thresholds"].items()}
            prior = tuple(float(value) for value in tree.get("own_prior", ()))
            made = cls(float(tree["temperature"]), float(tree["target"]), thresholds, dict(tree.get("measured", {})), prior)
            if not (made.temperature > 0 and math.isfinite(made.temperature)):
                raise ValueError(f"temperature {made.temperature}")
            if not all(map(math.isfinite, prior)):
                raise ValueError("own_prior is not finite")
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise InputError(
                f"{file} is not a calibration ({type(error).__name__}: {error}): delete it, or make it again with evaluate."
            ) from None
        return made


def fit_calibration(scored: ScoredPhotos, target: float, training: np.ndarray | None = None) -> Calibration:
    """The calibration of a model from its scores of validation photos; the temperature from those it could get right.

    Args:
        training: scores of some training photos, (photos, addresses), which the model's own prior is read off. It is divided
            by if that makes the true addresses of validation photos likelier, each at its best temperature.

    Raises:
        InputError: no photo has its true address among those scored.
    """
    known = scored.reachable
    if not known.any():
        raise InputError("no validation photo has an address of the gazetteer: calibrate on photos of the model's own city.")
    scores, truth = scored.scores[known], scored.truth[known]
    temperature = _temperature(scores, truth)
    prior: Sequence[float] = ()
    raw, raw_right = scored.confidences(1.0)
    before = nll(scores, truth)
    if training is not None and len(training):
        own = own_prior(training)
        other = _temperature(scores - own, truth)
        if nll((scores - own) / other, truth) < nll(scores / temperature, truth):
            prior, temperature, scores = tuple(own.tolist()), other, scores - own
            scored = replace(scored, scores=scored.scores - own)
    confidence, right = scored.confidences(temperature)
    targets = sorted({*TARGETS, target})
    chosen = {f"{wanted:g}": threshold(confidence, right, scored.places, wanted) for wanted in targets}
    measured = {
        "photos": len(confidence), "places": len(set(scored.places)), "right": float(right.mean()),
        "nll": {"before": before, "after": nll(scores / temperature, truth)},
        "ece": {"before": ece(raw, raw_right), "after": ece(confidence, right)},
    }  # fmt: skip
    return Calibration(temperature, target, chosen, measured, prior)


def own_prior(training: np.ndarray) -> np.ndarray:
    """ln of the mean probability of each address over photos (photos, addresses) and one that says nothing, (addresses,)."""
    addresses = training.shape[1]
    return np.log((softmax(training).sum(axis=0) + 1 / addresses) / (len(training) + 1))


def threshold(confidence: np.ndarray, right: np.ndarray, places: Sequence[str], target: float) -> float:
    """A confidence above which answers are right with at least `target` precision, in 95 of 100 cities; the lowest tried.

    Tried are those that leave a tenth, two tenths, … of the photos. The exact binomial (Clopper-Pearson) lower bound must
    reach the target, for as many draws as the answers have places, at a tenth of the doubt, as it is tried ten times. 1
    (never sure enough) if none does.
    """
    order = np.argsort(-confidence, kind="stable")
    confidence, right = confidence[order], right[order]
    names = [places[i] for i in order.tolist()]
    best = NEVER
    for part in range(1, COVERAGES + 1):
        lowest = confidence[math.ceil(len(confidence) * part / COVERAGES) - 1]
        n = int((confidence >= lowest).sum())
        draws = len(set(names[:n]))
        if lower_bound(math.floor(right[:n].mean() * draws + 1e-9), draws, DOUBT / COVERAGES) >= target:
            best = ALWAYS if n == len(confidence) else float(lowest + confidence[n]) / 2
    return best


def lower_bound(successes: int, trials: int, doubt: float = DOUBT) -> float:
    """Clopper-Pearson: the smallest share under which so many successes come with at least the probability `doubt`."""
    if successes == 0:
        return 0.0
    counts = np.arange(successes)  # fewer successes than these
    factorials = np.concatenate([[0.0], np.log(np.arange(1, trials + 1)).cumsum()])
    ways = factorials[trials] - factorials[counts] - factorials[trials - counts]
    low, high = 0.0, successes / trials
    for _ in range(50):
        middle = (low + high) / 2
        fewer = np.exp(ways + counts * math.log(middle) + (trials - counts) * math.log1p(-middle)).sum()
        low, high = (low, middle) if 1 - fewer >= doubt else (middle, high)
    return low


def ece(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over bins of equal width, weighed by photos."""
    return sum(b["photos"] * abs(b["confidence"] - b["right"]) for b in reliability(confidence, right)) / max(len(right), 1)


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[dict[str, float]]:
    """Bins of equal width that hold photos: low, high, photos, mean confidence, share right."""
    numbers = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        {
            "low": b / bins, "high": (b + 1) / bins, "photos": int(inside.sum()),
            "confidence": float(confidence[inside].mean()), "right": float(right[inside].mean()),
        }
        for b in range(bins) if (inside := numbers == b).any()
    ]  # fmt: skip


def nll(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean -ln p of the true addresses under softmax of the scores (photos, addresses)."""
    log_total = np.logaddexp.reduce(scores, axis=1)
    return float((log_total - scores[np.arange(len(truth)), truth]).mean())


def softmax(scores: np.ndarray) -> np.ndarray:
    """Along the last axis; -inf gives 0."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _temperature(scores: np.ndarray, truth: np.ndarray) -> float:
    return _golden_section(lambda t: nll(scores / t, truth))


def _golden_section(loss: Any) -> float:
    """Where a loss of the temperature is least, by golden section on its logarithm; it falls, then rises."""
    golden = (math.sqrt(5) - 1) / 2
    low, high = map(math.log, RANGE)
    while high - low > 1e-4:
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(math.exp(left)) <= loss(math.exp(right)) else (left, high)
    return math.exp((low + high) / 2)
