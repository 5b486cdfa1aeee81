"""Photos that look a little different at every step, so that few places are not learnt by heart."""

import math

import numpy as np
from PIL import Image, ImageEnhance

from addressvlm.config_training import AugmentConfig

ASPECT = 4 / 3  # a crop is at most so much wider or narrower than the photo
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def augmented(photo: Image.Image, config: AugmentConfig, rng: np.random.Generator) -> Image.Image:
    """A random part of a photo in other light; a mirrored one would show another street corner, so none is.

    Args:
        photo: RGB, any size.
        rng: decides all of it; the same numbers are drawn whatever `config` says.
    """
    area = rng.uniform(config.crop, 1.0)
    aspect = math.exp(rng.uniform(-math.log(ASPECT), math.log(ASPECT)))
    left, top = rng.uniform(), rng.uniform()
    factors = 1 + config.colour * rng.uniform(-1, 1, len(ENHANCERS))
    if config.crop < 1:
        photo = photo.crop(_box(photo.size, area, aspect, left, top))
    if config.colour:
        for enhancer, factor in zip(ENHANCERS, factors, strict=True):
            photo = enhancer(photo).enhance(float(factor))
    return photo


def _box(size: tuple[int, int], area: float, aspect: float, left: float, top: float) -> tuple[int, int, int, int]:
    """Left, upper, right, lower of a crop in pixels.

    Args:
        area: share of the photo; less where the aspect leaves no room for as much.
        aspect: of the crop by that of the photo.
        left, top: 0 to 1, where in the room that is left.
    """
    shares = min(1.0, math.sqrt(area * aspect)), min(1.0, math.sqrt(area / aspect))
    width, height = (max(1, round(side * share)) for side, share in zip(size, shares, strict=True))
    x, y = round((size[0] - width) * left), round((size[1] - height) * top)
    return x, y, x + width, y + height
