"""What the front asks the model for."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from addressvlm.answers.priors import Prior
from addressvlm.answers.texts import Sampling


@dataclass(frozen=True)
class Where:
    """The address of a photo.

    Attributes:
        city: its id.
        pixels: uint8 (height, width, 3).
        threshold: confidence above which the answer counts as known; None takes the model's own.
    """

    city: str
    pixels: np.ndarray
    top_k: int
    prior: Prior
    threshold: float | None


@dataclass(frozen=True)
class Question:
    """A conversation, as the model is to go on with it.

    Attributes:
        city: its id.
        messages: turns whose parts {"type": "image"} stand for the images, in order.
        images: uint8 (height, width, 3) each.
    """

    city: str
    messages: list[dict[str, Any]]
    images: list[np.ndarray]
    sampling: Sampling
