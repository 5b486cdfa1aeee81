"""Locatability (paper 003, Sec. 3.1): how much of a street view shows geographic clues, from 0 to 1.

A segmentation model divides the photo into classes (road, sky, building, …). A CLIP-like model compares each class's part of
the photo, all else greyed out, with texts of geographic clues and with other texts; its weight is the probability of the
clues. Locatability is the sum over classes of their share of the photo times their weight.

The paper's own weights are fixed, one for each of the 150 classes of ADE20K; they were published with its code and are in
`georeasoner_class_weights.csv` (GeoReasoner, L. Li et al., ICML 2024). Its threshold of 0.4 is one of scores by these weights.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import yaml
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    ViTImageProcessorPil,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES

from addressvlm.baselines.dual_encoder import ClipLike, load_clip_like
from addressvlm.errors import InputError
from addressvlm.models.loading import dtype_of, local

THRESHOLD = 0.4  # paper 003
THRESHOLDS = tuple(number / 20 for number in range(20))  # of the sensitivity curve: 0 to 0.95
MIN_SHARE = 0.01  # of the photo; smaller parts have no weight
GREY = 127


@dataclass(frozen=True)
class LocatabilityTexts:
    """Texts of what distinguishes places and what does not. The paper's are not published; the defaults are ours."""

    clues: tuple[str, ...] = (
        "a street sign with a name on it",
        "a shop sign with writing",
        "a landmark",
        "a building with a characteristic facade",
        "a licence plate",
        "a characteristic monument or bridge",
    )
    others: tuple[str, ...] = (
        "the sky",
        "the surface of a road",
        "leaves of a tree",
        "a blank wall",
        "a passing car",
        "nothing",
    )

    @staticmethod
    def read(path: Path) -> "LocatabilityTexts":
        """From a YAML file with the lists `clues` and `others`; InputError if it can't be read or has other content."""
        try:
            texts = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{path} can't be read ({' '.join(str(error).split())[:120]}): give a YAML file.") from error
        lists = list(texts.values()) if isinstance(texts, dict) and texts.keys() == {"clues", "others"} else [None]
        if not all(
            isinstance(part, list) and part and all(isinstance(text, str) and text.strip() for text in part) for part in lists
        ):
            raise InputError(f"{path} does not hold what it should: give two lists of texts, `clues` and `others`.")
        return LocatabilityTexts(tuple(texts["clues"]), tuple(texts["others"]))


DEFAULT_TEXTS = LocatabilityTexts()


PAPER_WEIGHTS = Path(__file__).with_name("georeasoner_class_weights.csv")


@dataclass(frozen=True)
class ClassWeights:
    """A fixed weight, 0 to 1, for each class of a segmentation model, in the order of its classes."""

    weights: tuple[float, ...]

    @staticmethod
    def read(path: Path = PAPER_WEIGHTS) -> "ClassWeights":
        """From a CSV file with a header and the columns number of the class and weight.

        Raises:
            InputError: a class is missing or comes twice, or a weight is no number from 0 to 1; the message names the row.
        """
        try:
            rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))[1:]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path} can't be read ({' '.join(str(error).split())[:120]}): give a CSV of weights.") from error
        weights: dict[int, float] = {}
        for number, row in enumerate(rows, start=2):
            try:
                index, weight = int(row[0]), float(row[1])
                valid = index >= 0 and index not in weights and 0 <= weight <= 1 and len(row) == 2
            except (ValueError, IndexError):
                valid = False
            if not valid:
                raise InputError(
                    f"{path}, row {number}: '{','.join(row)}' is not the number of another class and a weight from 0 to 1."
                )
            weights[index] = weight
        missing = sorted(set(range(max(weights, default=0) + 1)) - set(weights))
        if missing:
            raise InputError(f"{path} has no weight of class {missing[0]}: give one row for each class, numbered from 0.")
        return ClassWeights(tuple(weights[index] for index in sorted(weights)))

    def check(self, model: str, classes: Sequence[str]) -> None:
        """Refuse a segmentation model with other classes than these weights are of."""
        if len(classes) != len(self.weights):
            raise InputError(
                f"segmentation model '{model}' has {len(classes)} classes and the weights are of {len(self.weights)}: give a "
                "model of ADE20K's 150 classes for the paper's weights, or --weights with a row for each of its classes."
            )

    def score(self, classes: np.ndarray) -> float:
        """Locatability of a photo from the class of each pixel, int (H, W)."""
        counts = np.bincount(classes.ravel(), minlength=len(self.weights))
        return float(counts @ np.array(self.weights) / classes.size)


@dataclass(frozen=True)
class Curve:
    """The photos at or above each threshold."""

    thresholds: tuple[float, ...]
    kept: list[float]  # their share of all photos
    mean: list[float | None]  # their mean locatability, None where there are none


class Locatability:
    """Segmentation and CLIP-like model, loaded."""

    def __init__(
        self,
        segmentation: str,
        clip: str | None,
        texts: LocatabilityTexts | ClassWeights = DEFAULT_TEXTS,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
    ) -> None:
        """`segmentation` and `clip` are folders or Hub names with safetensors; InputError for another kind of model.

        With fixed weights instead of texts no `clip` is needed.
        """
        self.device = torch.device(device)
        self.model, self.processor = _load_segmentation(segmentation, dtype)
        self.model.to(self.device)
        self.weights = texts if isinstance(texts, ClassWeights) else None
        if isinstance(texts, ClassWeights):
            texts.check(segmentation, list(self.model.config.id2label.values()))
            return
        if clip is None:
            raise InputError("without fixed weights a CLIP-like model compares parts of photos with texts: give --clip.")
        self.clues = len(texts.clues)
        self.clip = ClipLike(*load_clip_like(clip, dtype)).eval().to(self.device)
        self._texts_TD = self.clip.encode_texts([*texts.clues, *texts.others])

    def scores(self, photos: Sequence[Image.Image]) -> list[float]:
        """Locatability of each photo."""
        return [self._score(photo.convert("RGB"), classes) for photo, classes in zip(photos, self.classes(photos), strict=True)]

    @torch.inference_mode()
    def classes(self, photos: Sequence[Image.Image]) -> list[np.ndarray]:
        """The class of each pixel, int (H, W); batches are neighbours of equal size, so that none is padded."""
        classes: list[np.ndarray] = []
        for (width, height), batch in groupby(photos, key=lambda photo: photo.size):
            inputs = self.processor(images=[photo.convert("RGB") for photo in batch], return_tensors="pt").to(self.device)
            output = self.model(pixel_values=inputs["pixel_values"].to(self.model.dtype))
            if hasattr(output, "logits"):
                logits = output.logits
            else:  # queries that each have a mask and a class, the last of which is none
                p = output.class_queries_logits.softmax(dim=-1)[..., :-1]
                logits = torch.einsum("nqc,nqhw->nchw", p, output.masks_queries_logits.sigmoid())
            resized = F.interpolate(logits.float(), size=(height, width), mode="bilinear")
            classes += list(resized.argmax(dim=1).cpu().numpy())
        return classes

    @torch.inference_mode()
    def _score(self, photo: Image.Image, classes: np.ndarray) -> float:
        if self.weights:
            return self.weights.score(classes)
        values, counts = np.unique(classes, return_counts=True)
        shares = counts / classes.size
        large = shares >= MIN_SHARE
        parts = [masked_part(photo, classes == c) for c in values[large]]
        if not parts:
            return 0.0
        logits = self.clip.scale.float() * self.clip.encode_images(parts) @ self._texts_TD.T
        weights = logits.softmax(dim=-1)[:, : self.clues].sum(dim=-1).double().cpu().numpy()
        return float(np.clip(shares[large] @ weights, 0.0, 1.0))


@cache
def cached_locatability(segmentation: str, clip: str | None, texts: LocatabilityTexts | ClassWeights) -> Locatability:
    """The models on the process's GPU where it has one, loaded once."""
    return Locatability(segmentation, clip, texts, device="cuda" if torch.cuda.is_available() else "cpu")


def masked_part(photo: Image.Image, part: np.ndarray) -> Image.Image:
    """The photo with all but the part, bool (H, W), greyed out: a class as the CLIP-like model sees it."""
    return Image.fromarray(np.where(part[..., None], np.asarray(photo), GREY).astype(np.uint8))


def curve(scores: Sequence[float], thresholds: Sequence[float] = THRESHOLDS) -> Curve:
    """The share of photos that each threshold keeps, and their mean locatability; InputError without photos."""
    if not len(scores):
        raise InputError("there are no photos whose locatability a threshold could be chosen for: score some first.")
    array = np.asarray(scores, dtype=float)
    kept = [array[array >= threshold] for threshold in thresholds]
    means = [float(part.mean()) if len(part) else None for part in kept]
    return Curve(tuple(thresholds), [len(part) / len(array) for part in kept], means)


def draw_curve(curve: Curve, path: Any, threshold: float = THRESHOLD) -> None:
    """Write the curve as SVG into a path or an open file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
    axis.plot(curve.thresholds, curve.kept, "o-", label="share of the photos kept")
    points = [(t, m) for t, m in zip(curve.thresholds, curve.mean, strict=True) if m is not None]
    axis.plot(*zip(*points, strict=True), "s--", label="their mean locatability") if points else None
    axis.axvline(threshold, color="grey", linewidth=1)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("threshold of locatability")
    axis.legend(loc="lower left")
    figure.savefig(path, format="svg")
    plt.close(figure)


class _SegformerPixels(ViTImageProcessorPil):
    """SegFormer's image processor; that of transformers needs torchvision for label maps."""

    resample = PILImageResampling.BILINEAR
    image_mean, image_std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    size: ClassVar = {"height": 512, "width": 512}


def _load_segmentation(name: str, dtype: str) -> tuple[Any, Any]:
    where = local(name)
    try:
        config = AutoConfig.from_pretrained(where)
        universal = config.model_type in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
        kind = AutoModelForUniversalSegmentation if universal else AutoModelForSemanticSegmentation
        model = kind.from_pretrained(where, dtype=dtype_of(dtype), use_safetensors=True)
        if config.model_type == "segformer":
            processor = _SegformerPixels.from_pretrained(where)
        else:
            processor = AutoImageProcessor.from_pretrained(where, backend="pil")
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise InputError(
            f"segmentation model '{name}' can't be loaded ({' '.join(str(error).split())[:200]}): give the folder of a "
            "SegFormer, Mask2Former or the like."
        ) from error
    return model.eval(), processor
