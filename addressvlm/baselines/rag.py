"""Retrieval-augmented generation (paper 004): the prompt, the coordinates in a reply, and replies of an endpoint.

Requests to an OpenAI-compatible endpoint are sent as for labels (addressvlm/labels/request_scheduler.py): with retries, rate
limits, a budget and a response cache, so that no answer is paid for twice. Limits, budget, image size and time-outs are the
settings `labels.*`; endpoint, model, length and temperature are those of the system.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from addressvlm.config.compare import RagConfig
from addressvlm.config.labels import LabelsConfig
from addressvlm.errors import InputError
from addressvlm.labels.facts import Facts
from addressvlm.labels.labelers import Label, Request, RetryState, label_source
from addressvlm.labels.request_scheduler import OpenAILabeler
from addressvlm.labels.response_cache import open_for_writing
from addressvlm.questions import ADDRESS_QUESTION
from addressvlm.storage.remote_path import AnyPath

DECIMALS = 5  # about a metre
HEADINGS = {"similar": "Photos that look like this one", "dissimilar": "Photos that look unlike this one"}
INSTRUCTIONS = {
    "coordinates": (
        "Where was this photo taken? It is likely near the similar photos and unlikely near the dissimilar ones. Give your "
        'best estimate, even if unsure, and nothing else: {{"lat": {lat}, "lon": {lon}}}'
    ),
    "addresses": 'Answer with "street, district" and nothing else. {question}',
}
PLACEHOLDERS = {"decimal": ("latitude in decimal degrees", "longitude in decimal degrees"), "dms": ("latitude", "longitude")}

Row = Mapping[str, Any]


def rag_prompt(config: RagConfig, similar: Sequence[Row], dissimilar: Sequence[Row]) -> str:
    """The text of the prompt, with the retrieved photos in the order of the search.

    Args:
        similar: rows with lat and lon in degrees, or with street and district, the most similar first.
        dissimilar: the same, the least similar first.
    """
    kinds = [("similar", similar), ("dissimilar", dissimilar)]
    if config.order == "dissimilar first":
        kinds.reverse()
    places = {kind: [_place(config, photo) for photo in photos] for kind, photos in kinds if photos}
    parts = []
    if places and config.form == "json":
        where = "taken at" if config.ask == "coordinates" else "taken on these streets"
        parts = [f"Photos that look like this one (similar) and unlike it (dissimilar) were {where}:"]
        parts.append(json.dumps(places, ensure_ascii=False))
    elif places:
        for kind, rows in places.items():
            texts = (", ".join(v if isinstance(v, str) else f"{v:.{DECIMALS}f}" for v in place.values()) for place in rows)
            parts.append(f"{HEADINGS[kind]} were taken at {'; '.join(texts)}.")
    lat, lon = (f"<{name}>" for name in PLACEHOLDERS[config.degrees])
    return "\n".join([*parts, INSTRUCTIONS[config.ask].format(lat=lat, lon=lon, question=ADDRESS_QUESTION)])


def dms(degrees: float, hemispheres: str) -> str:
    """Degrees, minutes and seconds to a tenth, with the letter of the hemisphere (of two: positive, negative)."""
    tenths = round(abs(degrees) * 36000)
    minutes, seconds = divmod(tenths, 600)
    return f"{minutes // 60}°{minutes % 60:02d}'{seconds / 10:04.1f}\"{hemispheres[degrees < 0]}"


def _place(config: RagConfig, photo: Row) -> dict[str, Any]:
    """The place of a retrieved photo, as the prompt states it."""
    if config.ask == "addresses":
        return {"street": photo["street"], "district": photo["district"]}
    if config.degrees == "dms":
        return {"lat": dms(photo["lat"], "NS"), "lon": dms(photo["lon"], "EW")}
    return {"lat": round(photo["lat"], DECIMALS), "lon": round(photo["lon"], DECIMALS)}


Point = tuple[float, float]  # latitude and longitude in degrees
Bounds = tuple[float, float, float, float]  # west, south, east, north in degrees

NEAR_DEG = 1.0  # around the city

_SAME = str.maketrans({"−": "-", "–": "-", "º": "°", "˚": "°", "′": "'", "’": "'", "‘": "'", "″": '"', "”": '"', "“": '"'})
_ANGLE = (  # with groups numbered as the angle is
    r"(?P<sign{0}>[-+]?)(?P<deg{0}>\d{{1,3}}(?:\.\d+)?)(?![\d.]*\d)"
    r"(?:\s*(?P<mark{0}>°|deg(?:rees?)?\b))?"
    r"(?:\s*(?P<min{0}>\d{{1,2}}(?:\.\d+)?)\s*(?:'(?!')|min(?:utes?)?\b))?"
    r"(?:\s*(?P<sec{0}>\d{{1,2}}(?:\.\d+)?)\s*(?:\"|''|sec(?:onds?)?\b))?"
)
_FIRST = r"(?<![\w.])" + _ANGLE.format(1)
_SECOND = r"(?<![\w.])" + _ANGLE.format(2)
_HALF = r"(?P<half1>[NSEW]|[nsew](?=orth\b|outh\b|ast\b|est\b))(?:orth|outh|ast|est)?\b"
_LABELLED = r"(?i:\b(?:{})\b)[\"'*]*\s*(?:is|[:=])?[^\w+\-]{{0,8}}"  # brackets, quotes, colons after the name
_LAT = re.compile(_LABELLED.format("lat(?:itude)?") + _FIRST + r"(?:\s*\"?" + _HALF + ")?")
_LON = re.compile(_LABELLED.format("lon|long|longitude|lng") + _FIRST + r"(?:\s*\"?" + _HALF + ")?")
_AFTER = re.compile(_FIRST + r"\s*" + _HALF)
_BEFORE = re.compile(r"\b" + _HALF + r":?\s*" + _ANGLE.format(1))
_PAIR = re.compile(_FIRST + r"\s*(?:[,;/|]|\band\b|\s)\s*" + _SECOND)


@dataclass(frozen=True)
class Reply:
    """The coordinates of a reply."""

    point: Point | None  # None if there are none that can be used
    why: str = ""  # `refused` or `out of range` without a point, `swapped` where the two were exchanged


def parse_coordinates(text: str, city: Bounds | None = None) -> Reply:
    """Parse a reply; `city` are the bounds of the photos, by which exchanged coordinates are detected."""
    text = text.translate(_SAME).replace('\\"', '"').replace("\\u00b0", "°")  # as JSON in JSON writes them
    point = _find_point(text)
    if point is None:
        return Reply(None, "refused")
    lat, lon = point
    if abs(lat) > 90 or (city and not _inside(point, city)):
        swapped = (lon, lat)
        if abs(lat) <= 180 and abs(lon) <= 90 and (abs(lat) > 90 or (city and _inside(swapped, city))):
            return Reply(swapped, "swapped")
    return Reply(point) if abs(lat) <= 90 and abs(lon) <= 180 else Reply(None, "out of range")


def _find_point(text: str) -> Point | None:
    """The last coordinates with names, else with hemispheres, else the last two decimals or angles side by side."""
    candidates = [(list(_LAT.finditer(text)), list(_LON.finditer(text)))]
    for pattern in (_AFTER, _BEFORE):
        matches = list(pattern.finditer(text))
        candidates.append(([m for m in matches if m["half1"] in "NSns"], [m for m in matches if m["half1"] in "EWew"]))
    for lats, lons in candidates:
        if lats and lons:
            return _degrees(lats[-1]), _degrees(lons[-1])
    pairs = [m for m in _PAIR.finditer(text) if all("." in m[f"deg{n}"] or m[f"mark{n}"] for n in (1, 2))]
    return (_degrees(pairs[-1], 1), _degrees(pairs[-1], 2)) if pairs else None


def _degrees(match: re.Match[str], number: int = 1) -> float:
    parts = match.groupdict()
    size = sum(float(parts[f"{name}{number}"] or 0) / by for name, by in (("deg", 1), ("min", 60), ("sec", 3600)))
    negative = parts[f"sign{number}"] == "-" or (parts.get(f"half{number}") or "N") in "SWsw"
    return -size if negative else size


def _inside(point: Point, city: Bounds) -> bool:
    west, south, east, north = city
    return south - NEAR_DEG <= point[0] <= north + NEAR_DEG and west - NEAR_DEG <= point[1] <= east + NEAR_DEG


SYSTEM_KEYS = {"labels.model": "model", "labels.base_url": "endpoint", "labels.labeler is openai": "the system has an endpoint"}


class _SystemPrompt:
    """In place of a prompt file of the labels: the message is the system's own prompt."""

    version = "rag"
    hide_rejected = False

    def opening_messages(self) -> list[dict[str, str]]:
        return []

    def user_message(self, _: Facts, text: str) -> str:
        return text


class _PhotoRequest(RetryState):
    """The request about one photo: every answer is a reply."""

    def __init__(self, request: Request, text: str, config: LabelsConfig) -> None:
        self.request, self.prompt, self.config, self.question = request, _SystemPrompt(), config, text  # type: ignore[assignment]
        self.attempts, self._rejected, self.useless = 0, None, None

    def add_answer(self, text: str | None, refusal: str | None = None, unusable: str | None = None) -> Label:
        self.attempts, self.useless = self.attempts + 1, unusable
        return Label(self.question, text or refusal or "", label_source(self.config), self.attempts)

    def fall_back(self, *problems: str) -> Label:
        return Label(self.question, "", "no answer", self.attempts)


def endpoint_replies(
    labels: LabelsConfig,
    system: RagConfig,
    photos: Iterable[tuple[str, bytes, str]],
    total: int,
    cache: AnyPath,
    redo_failed: bool = False,
    show: Callable[[str], object] = print,
) -> dict[str, str | None]:
    """Photo -> the reply, or the endpoint's own words if it refused; None where there is none.

    Args:
        photos: id, encoded image and prompt.
        cache: folder of the response cache.
        redo_failed: request again photos for which the endpoint failed.

    Raises:
        InputError: the endpoint refuses the key, the model or a request, or keeps failing; the budget is used up.
    """
    config = labels.model_copy(
        update={
            "labeler": "openai", "model": system.model, "base_url": system.endpoint, "max_tokens": system.max_new_tokens,
            "temperature": system.temperature, "send_image": True, "max_attempts": 1,
        }
    )  # fmt: skip
    ids: list[str] = []
    prompts: dict[str, str] = {}
    replies: dict[str, str | None] = {}

    def requests() -> Iterator[Request]:
        for photo, image, prompt in photos:
            ids.append(photo)
            prompts[photo] = prompt
            yield Request(photo, image, Facts("", "", ()))

    def done(number: int, label: Label) -> None:
        replies[ids[number]] = label.text or None

    try:
        with open_for_writing(cache) as responses:
            labeler = OpenAILabeler(
                config,
                lambda request: _PhotoRequest(request, prompts[request.id], config),
                responses,
                lambda line: show(line.replace("label:", f"compare: {system.name}:")),
                redo_failed,
            )
            labeler.run(requests(), total, done)
    except InputError as error:
        message = str(error)
        for labels_key, system_key in SYSTEM_KEYS.items():
            message = message.replace(labels_key, system_key)
        raise InputError(f"'{system.name}': {message}") from None
    return {photo: replies.get(photo) for photo in ids}
