"""Coordinates out of what a language model writes. The rule:

- labelled coordinates count (`"lat": 52.2, "lon": 0.12`, `latitude: 52.2 … longitude: 0.12`, in either order), else a pair
  with hemispheres (`52.2° N, 0.12° E`, `52°12'18.4"N 0°07'08"E`, `N 52.2 E 0.12`), else two numbers beside each other that
  have a decimal point or a degree sign;
- of several the last counts: what is weighed before comes before the answer;
- a latitude beyond 90° beside a longitude within is swapped with it, and so is a pair that lies nowhere near the city but
  does so when swapped; what is out of range either way is no answer;
- no coordinates at all are a refusal. The reply itself is kept.
"""

import re
from dataclasses import dataclass

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


def read(text: str, city: Bounds | None = None) -> Reply:
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
