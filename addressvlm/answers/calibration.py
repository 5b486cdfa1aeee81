"""Calibrate a model's address probabilities on photos that it was not trained on.

A generative model's p(address | photo) reflects how often training named each address. Where that makes validation photos
likelier, it is divided by this prior, the mean of its probabilities over training photos, so that all addresses are equally
likely beforehand (logit adjustment, Menon et al. 2021; what a contrastive loss learns by itself). One temperature then makes
probabilities match how often they are right (Guo et al. 2017), without changing their order. For each target precision a
threshold is chosen above which, with 95 % confidence, at least that share of answers is right; below it the answer is
*don't know*. Photos of one place look alike, so the places count, not the photos.

Whether the prior is used, the thresholds and the errors reported come from probabilities that were fitted on other photos: the
validation places are halved, and each half is calibrated with what the other half says. What is saved is fitted on all of them.
"""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from addressvlm.errors import InputError
from addressvlm.storage.remote_path import AnyPath

CALIBRATION_FILE = "calibration.json"
TARGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TEMPERATURES = (0.05, 50.0)  # least and greatest
BINS = 10
ALWAYS, NEVER = 0.0, 1.0  # thresholds: a confidence must be above them
ALPHA = 0.05  # probability that answers above a threshold miss their target precision
COVERAGES = 10  # shares of the photos at which a threshold is tried


@dataclass(frozen=True)
class ScoredPhotos:
    """A model's scores of photos whose address is known.

    Attributes:
        scores: ln p of each address, up to a constant a photo, float64 (photos, addresses); -inf where it is ruled out.
        truth: index of the true address, int64 (photos,); -1 where it is none of them.
        places: the place of each photo.
    """

    scores: np.ndarray
    truth: np.ndarray
    places: Sequence[str]

    @property
    def reachable(self) -> np.ndarray:
        """Whether the true address has a finite score, bool (photos,)."""
        reachable = self.truth >= 0
        reachable[reachable] = np.isfinite(self.scores[reachable, self.truth[reachable]])
        return reachable

    def confidences(self, temperature: float) -> tuple[np.ndarray, np.ndarray]:
        """Probability of the best address and whether it is right, both (photos,)."""
        probabilities = softmax(self.scores / temperature)
        best = probabilities.argmax(axis=1)
        return probabilities.max(axis=1), best == self.truth


@dataclass(frozen=True)
class Calibration:
    """The content of `calibration.json` in a model's folder; the default leaves probabilities as they are.

    Attributes:
        temperature: scores, less the model's own prior, are divided by it.
        target: precision that answers should have by default.
        thresholds: target precision, as text, -> confidence above which answers reach it; 1 where none does.
        measured: photos, places, and errors before and after, for the reader.
        own_prior: ln p of each address of the gazetteer over all photos, subtracted from scores; empty: nothing is.
    """

    temperature: float = 1.0
    target: float = 0.0
    thresholds: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    own_prior: Sequence[float] = ()

    @property
    def threshold(self) -> float:
        """The confidence above which an answer counts as known."""
        return self.thresholds.get(f"{self.target:g}", ALWAYS)

    def apply(self, scores: np.ndarray) -> np.ndarray:
        """Calibrated scores, whose softmax are the probabilities; float64 (photos, addresses) or (addresses,)."""
        if not self.own_prior:
            return scores / self.temperature
        if len(self.own_prior) != scores.shape[-1]:
            raise InputError(
                f"{CALIBRATION_FILE} is of {len(self.own_prior):,} addresses and the gazetteer beside it has "
                f"{scores.shape[-1]:,}: delete it, or run evaluate again."
            )
        return (scores - np.asarray(self.own_prior)) / self.temperature

    def save(self, folder: AnyPath) -> None:
        """Write `calibration.json` into a model's folder."""
        (folder / CALIBRATION_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: AnyPath) -> "Calibration":
        """Read it; the default where there is none, InputError where it is something else."""
        file = folder / CALIBRATION_FILE
        if not file.is_file():
            return cls()
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            thresholds = {str(key): float(value) for key, value in tree["thresholds"].items()}
            prior = tuple(float(value) for value in tree.get("own_prior", ()))
            calibration = cls(
                float(tree["temperature"]), float(tree["target"]), thresholds, dict(tree.get("measured", {})), prior
            )
            if not (calibration.temperature > 0 and math.isfinite(calibration.temperature)):
                raise ValueError(f"temperature {calibration.temperature}")
            if not all(map(math.isfinite, prior)):
                raise ValueError("own_prior is not finite")
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise InputError(
                f"{file} is not a calibration ({type(error).__name__}: {error}): delete it, or run evaluate again."
            ) from None
        return calibration


def fit_calibration(scored: ScoredPhotos, target: float, training: np.ndarray | None = None) -> Calibration:
    """Fit a model's calibration to its scores of validation photos; the temperature to those whose address is reachable.

    Args:
        target: precision that answers should have.
        training: scores of training photos, (photos, addresses), from which the model's own prior is computed. It is used if
            it makes the true addresses of validation photos likelier, with and without it at the temperature of other photos.

    Raises:
        InputError: no photo has its true address among those scored.
    """
    reachable = scored.reachable
    if not reachable.any():
        raise InputError("no validation photo has an address of the gazetteer: calibrate on photos of the model's own city.")
    fold = _folds(scored.places, reachable)
    priors: list[np.ndarray | None] = [None]
    if training is not None and len(training):
        priors.append(own_prior(training))
    crossed = [_cross_calibrated(scored, fold, prior) for prior in priors]
    losses = [nll(scores[reachable], scored.truth[reachable]) for scores in crossed]
    prior, held_out = priors[int(np.argmin(losses))], crossed[int(np.argmin(losses))]
    adjusted = scored.scores if prior is None else scored.scores - prior
    temperature = _fit_temperature(adjusted[reachable], scored.truth[reachable])
    raw_confidence, raw_right = scored.confidences(1.0)
    confidence, right = replace(scored, scores=held_out).confidences(1.0)
    thresholds = {f"{t:g}": threshold(confidence, right, scored.places, t) for t in sorted({*TARGETS, target})}
    measured = {
        "photos": len(confidence), "places": len(set(scored.places)), "right": float(right.mean()),
        "nll": {"before": nll(scored.scores[reachable], scored.truth[reachable]), "after": min(losses)},
        "ece": {"before": ece(raw_confidence, raw_right), "after": ece(confidence, right)},
    }  # fmt: skip
    return Calibration(temperature, target, thresholds, measured, () if prior is None else tuple(prior.tolist()))


def _folds(places: Sequence[str], reachable: np.ndarray) -> np.ndarray:
    """Two halves of the places, 0 or 1 a photo; all 0 where one of them would have no photo to fit a temperature on."""
    number = {place: i for i, place in enumerate(sorted(set(places), key=lambda place: zlib.crc32(place.encode())))}
    fold = np.array([number[place] % 2 for place in places], dtype=int)
    return fold if all(reachable[fold == half].any() for half in (0, 1)) else np.zeros_like(fold)


def _cross_calibrated(scored: ScoredPhotos, fold: np.ndarray, prior: np.ndarray | None) -> np.ndarray:
    """Scores (photos, addresses) less the prior, each half divided by the temperature of the other one."""
    scores = scored.scores if prior is None else scored.scores - prior
    crossed = np.empty_like(scores)
    for half in np.unique(fold):
        fitted = scored.reachable & ((fold != half) | (fold.max() == 0))
        crossed[fold == half] = scores[fold == half] / _fit_temperature(scores[fitted], scored.truth[fitted])
    return crossed


def own_prior(training: np.ndarray) -> np.ndarray:
    """ln of the mean probability of each address over scored photos (photos, addresses) and a uniform one, (addresses,)."""
    addresses = training.shape[1]
    return np.log((softmax(training).sum(axis=0) + 1 / addresses) / (len(training) + 1))


def threshold(confidence: np.ndarray, right: np.ndarray, places: Sequence[str], target: float) -> float:
    """The lowest confidence tried above which answers are right with at least `target` precision, in 95 of 100 cities.

    Thresholds that keep a tenth, two tenths, … of the photos are tried. The lower bound on the precision must reach the
    target, with as many trials as the answers have places and, as there are ten tries, a tenth of `ALPHA`. 1 (never sure
    enough) if none does.
    """
    order = np.argsort(-confidence, kind="stable")
    confidence, right = confidence[order], right[order]
    sorted_places = [places[i] for i in order.tolist()]
    best = NEVER
    for part in range(1, COVERAGES + 1):
        lowest = confidence[math.ceil(len(confidence) * part / COVERAGES) - 1]
        n = int((confidence >= lowest).sum())
        trials = len(set(sorted_places[:n]))
        if lower_bound(math.floor(right[:n].mean() * trials + 1e-9), trials, ALPHA / COVERAGES) >= target:
            best = ALWAYS if n == len(confidence) else float(lowest + confidence[n]) / 2
    return best


def lower_bound(successes: int, trials: int, alpha: float = ALPHA) -> float:
    """Clopper-Pearson: the smallest share under which so many successes have at least the probability `alpha`."""
    from scipy.stats import beta  # takes a second to load, and most programs only need `softmax`

    return float(beta.ppf(alpha, successes, trials - successes + 1)) if successes else 0.0


def ece(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over bins of equal width, weighted by photos."""
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


def _fit_temperature(scores: np.ndarray, truth: np.ndarray) -> float:
    """The temperature of the least `nll`, which falls, then rises with it."""
    from scipy.optimize import minimize_scalar

    low, high = map(math.log, TEMPERATURES)
    best = minimize_scalar(
        lambda log_t: nll(scores / math.exp(log_t), truth), bounds=(low, high), method="bounded", options={"xatol": 1e-8}
    )
    return math.exp(best.x)
