"""What a language model is told beside a photo: where similar and dissimilar ones were taken (paper 004, Sec. III).

The paper does not print its prompt, so its form, its order and the way of writing degrees are settings of `RagConfig`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from addressvlm.config_compare import RagConfig
from addressvlm.questions import ADDRESS_QUESTION

DECIMALS = 5  # about a metre
NAMES = {"similar": "Photos that look like this one", "dissimilar": "Photos that look unlike this one"}
WANTED = {
    "coordinates": (
        "Where was this photo taken? It is likely near the similar photos and unlikely near the dissimilar ones. Give your "
        'best estimate, even if unsure, and nothing else: {{"lat": {lat}, "lon": {lon}}}'
    ),
    "addresses": 'Answer with "street, district" and nothing else. {question}',
}
PLACEHOLDERS = {"decimal": ("latitude in decimal degrees", "longitude in decimal degrees"), "dms": ("latitude", "longitude")}

Row = Mapping[str, Any]


def prompt(config: RagConfig, similar: Sequence[Row], dissimilar: Sequence[Row]) -> str:
    """The text beside the photo; what was found stands in the order of the search.

    Args:
        similar: rows with lat and lon in degrees, or with street and district, the most similar first.
        dissimilar: the same, the least similar first.
    """
    kinds = [("similar", similar), ("dissimilar", dissimilar)]
    if config.order == "dissimilar first":
        kinds.reverse()
    shown = {kind: [_shown(config, photo) for photo in photos] for kind, photos in kinds if photos}
    parts = []
    if shown and config.form == "json":
        what = "taken at" if config.ask == "coordinates" else "taken on these streets"
        parts = [f"Photos that look like this one (similar) and unlike it (dissimilar) were {what}:", _json(shown)]
    elif shown:
        parts = [f"{NAMES[kind]} were taken at {'; '.join(map(_said, found))}." for kind, found in shown.items()]
    lat, lon = (f"<{name}>" for name in PLACEHOLDERS[config.degrees])
    return "\n".join([*parts, WANTED[config.ask].format(lat=lat, lon=lon, question=ADDRESS_QUESTION)])


def dms(degrees: float, hemispheres: str) -> str:
    """Degrees, minutes and seconds to a tenth, with the letter of the hemisphere (of two: positive, negative)."""
    tenths = round(abs(degrees) * 36000)
    minutes, seconds = divmod(tenths, 600)
    return f"{minutes // 60}°{minutes % 60:02d}'{seconds / 10:04.1f}\"{hemispheres[degrees < 0]}"


def _shown(config: RagConfig, photo: Row) -> dict[str, Any]:
    """What the prompt says of a photo that was found."""
    if config.ask == "addresses":
        return {"street": photo["street"], "district": photo["district"]}
    if config.degrees == "dms":
        return {"lat": dms(photo["lat"], "NS"), "lon": dms(photo["lon"], "EW")}
    return {"lat": round(photo["lat"], DECIMALS), "lon": round(photo["lon"], DECIMALS)}


def _json(shown: Mapping[str, Any]) -> str:
    return json.dumps(shown, ensure_ascii=False)


def _said(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{value:.{DECIMALS}f}" if isinstance(value, float) else value for value in found.values())
