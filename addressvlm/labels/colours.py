"""Which named colours make up a picture."""

import colorsys

import numpy as np
from PIL import Image

# Upper hue in degrees of each chromatic word; beyond the last, hues are red again.
HUES = [(14, "red"), (42, "orange"), (70, "yellow"), (165, "green"), (255, "blue"), (335, "purple"), (360, "red")]
THUMBNAIL = (48, 48)


def colour_word(red: int, green: int, blue: int) -> str:
    """The word for one sRGB colour (0 to 255): red, orange, brown, yellow, cream, green, blue, purple, grey, white or dark."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    if value < 0.22:
        return "dark"
    if saturation < 0.16:
        return "white" if value > 0.86 else "grey"
    word = next(name for upper, name in HUES if hue * 360 <= upper)
    if word in ("orange", "yellow") and saturation < 0.38 and value > 0.6:
        return "cream"
    greyish = {"red": 0.5, "orange": 0.75}  # a dark orange is brown, a dark red only if it is dull
    return "brown" if value < 0.62 and saturation < greyish.get(word, 0) else word


# Word of every colour with 4 bits a channel, so that a thumbnail is named by one look-up.
_TABLE = np.array(
    [colour_word(17 * r, 17 * g, 17 * b) for r in range(16) for g in range(16) for b in range(16)]
)  # fmt: skip


def dominant_colours(pixels: np.ndarray, mask: np.ndarray, least: float) -> list[str]:
    """The words that cover at least a share `least` of the pixels that count, the largest share first.

    Args:
        pixels: uint8 (H, W, 3), RGB.
        mask: bool (H, W), the pixels that count.
    """
    fine = pixels[mask].astype(np.uint16) >> 4
    names, counts = np.unique(_TABLE[fine[:, 0] << 8 | fine[:, 1] << 4 | fine[:, 2]], return_counts=True)
    return [str(names[i]) for i in np.argsort(-counts, kind="stable") if counts[i] >= least * counts.sum()]


def photo_colours(photo: Image.Image) -> list[str]:
    """Up to two colours of the middle band of a street-view photo, where the buildings are, less the sky."""
    pixels = _thumbnail(photo)
    row = np.arange(len(pixels))[:, None] / len(pixels)
    return dominant_colours(pixels, (row >= 0.25) & (row < 0.55) & ~_sky(pixels), least=0.12)[:2]


def tile_colours(tile: Image.Image, delta: float) -> list[str]:
    """Up to three colours around the place on its tile, less the corner that the photo covers; roads' don't count."""
    row, column = np.mgrid[0 : THUMBNAIL[1], 0 : THUMBNAIL[0]] / THUMBNAIL[0]
    near = (abs(row - 0.5) < 0.3) & (abs(column - 0.5) < 0.3) & ~((row < delta) & (column >= 1 - delta))
    return [c for c in dominant_colours(_thumbnail(tile), near, least=0.06) if c not in ("grey", "white", "dark")][:3]


def sky_share(photo: Image.Image) -> float:
    """Share of the upper half of a street view that is sky."""
    return float(_sky(_thumbnail(photo))[: THUMBNAIL[1] // 2].mean())


def green_share(photo: Image.Image) -> float:
    """Share of what is not sky that is green."""
    pixels = _thumbnail(photo)
    fine = pixels[~_sky(pixels)].astype(np.uint16) >> 4
    return float((_TABLE[fine[:, 0] << 8 | fine[:, 1] << 4 | fine[:, 2]] == "green").mean()) if len(fine) else 0.0


def _sky(pixels: np.ndarray) -> np.ndarray:
    """Bool (H, W): bright blue or white from the top edge down to the first pixel that is neither."""
    red, blue = pixels[..., 0].astype(int), pixels[..., 2].astype(int)
    brightest, darkest = pixels.max(axis=-1).astype(int), pixels.min(axis=-1).astype(int)
    bright = (brightest > 175) & (((blue == brightest) & (red == darkest)) | (brightest - darkest < 30))
    return np.logical_and.accumulate(bright, axis=0)


def _thumbnail(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize(THUMBNAIL, Image.Resampling.BOX))
