"""Photos with a prompt each, answered by a model behind an OpenAI-compatible endpoint.

Requests are sent as for labels (addressvlm/labels/request_scheduler.py): with retries, rate limits, a budget and a response
cache, so that no answer is paid for twice. Limits, budget, image size and time-outs are the settings `labels.*`; endpoint,
model, length and temperature are the row's own.
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

NAMED_HERE = {"labels.model": "model", "labels.base_url": "endpoint", "labels.labeler is openai": "the row has an endpoint"}
NOTHING = Facts("", "", ())


class _Words:
    """In place of a prompt file: the prompt is the row's own text."""

    version = "rag"
    hide_rejected = False

    def opening_messages(self) -> list[dict[str, str]]:
        return []

    def user_message(self, _: Facts, text: str) -> str:
        return text


class _Asked(RetryState):
    """One photo: whatever comes back is the reply."""

    def __init__(self, request: Request, text: str, config: LabelsConfig) -> None:
        self.request, self.prompt, self.config, self.question = request, _Words(), config, text  # type: ignore[assignment]
        self.attempts, self._rejected = 0, None

    def add_answer(self, text: str | None, refusal: str | None = None) -> Label:
        self.attempts += 1
        return Label(self.question, text or refusal or "", label_source(self.config), self.attempts)

    def fall_back(self, *problems: str) -> Label:
        return Label(self.question, "", "no answer", self.attempts)


def endpoint_replies(
    labels: LabelsConfig,
    row: RagConfig,
    photos: Iterable[tuple[str, bytes, str]],
    total: int,
    ledger: AnyPath,
    again: bool = False,
    show: Callable[[str], object] = print,
) -> dict[str, str | None]:
    """Photo -> the reply as it came, what was refused in the endpoint's words; None where there was none.

    Args:
        photos: id, encoded image and prompt.
        ledger: folder of the answers that are kept.
        again: ask once more about photos that the endpoint failed for.

    Raises:
        InputError: the endpoint refuses the key, the model or a request, or keeps failing; the budget is used up.
    """
    config = labels.model_copy(
        update={
            "labeler": "openai", "model": row.model, "base_url": row.endpoint, "max_tokens": row.max_new_tokens,
            "temperature": row.temperature, "send_image": True, "max_attempts": 1,
        }
    )  # fmt: skip
    ids: list[str] = []
    texts: dict[str, str] = {}
    found: dict[str, str | None] = {}

    def requests() -> Iterator[Request]:
        for photo, image, text in photos:
            ids.append(photo)
            texts[photo] = text
            yield Request(photo, image, NOTHING)

    def done(number: int, label: Label) -> None:
        found[ids[number]] = label.text or None

    def named(line: str) -> None:
        show(line.replace("label:", f"compare: {row.name}:"))

    try:
        with open_for_writing(ledger) as kept:
            asking = OpenAILabeler(config, lambda request: _Asked(request, texts[request.id], config), kept, named, again)
            asking.run(requests(), total, done)
    except InputError as error:
        said = str(error)
        for there, here in NAMED_HERE.items():
            said = said.replace(there, here)
        raise InputError(f"'{row.name}': {said}") from None
    return {photo: found.get(photo) for photo in ids}


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


def rag_prompt(config: RagConfig, similar: Sequence[Row], dissimilar: Sequence[Row]) -> str:
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
    """What a reply says.

    Attributes:
        point: None if it can't be used.
        why: `refused` or `out of range` where there is no point, `swapped` where the two were the wrong way round.
    """

    point: Point | None
    why: str = ""


def parse_coordinates(text: str, city: Bounds | None = None) -> Reply:
    """The coordinates in a reply; `city` is where its photos are, if that is known."""
    text = text.translate(_SAME).replace('\\"', '"').replace("\\u00b0", "°")  # as JSON in JSON writes them
    found = _labelled(text) or _with_letters(text) or _plain(text)
    if found is None:
        return Reply(None, "refused")
    lat, lon = found
    if abs(lat) > 90 or (city and not _inside(found, city)):
        turned = (lon, lat)
        if abs(lat) <= 180 and abs(lon) <= 90 and (abs(lat) > 90 or (city and _inside(turned, city))):
            return Reply(turned, "swapped")
    return Reply(found) if abs(lat) <= 90 and abs(lon) <= 180 else Reply(None, "out of range")


def _labelled(text: str) -> Point | None:
    lats, lons = list(_LAT.finditer(text)), list(_LON.finditer(text))
    return (_degrees(lats[-1]), _degrees(lons[-1])) if lats and lons else None


def _with_letters(text: str) -> Point | None:
    for pattern in (_AFTER, _BEFORE):
        found = list(pattern.finditer(text))
        lats = [m for m in found if m["half1"] in "NSns"]
        lons = [m for m in found if m["half1"] in "EWew"]
        if lats and lons:
            return _degrees(lats[-1]), _degrees(lons[-1])
    return None


def _plain(text: str) -> Point | None:
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
