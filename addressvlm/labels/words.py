"""The English words in which labels speak of directions, distances, colours and things that can be seen."""

import re
from collections.abc import Sequence

from addressvlm.labels.facts import COMPASS

AXES = {"north": "north-south", "northeast": "northeast-southwest", "east": "east-west", "northwest": "northwest-southeast"}

COLOURS = {
    "red": ["red", "reddish", "crimson", "scarlet", "maroon"],
    "orange": ["orange"],
    "brown": ["brown", "brownish", "tan"],
    "yellow": ["yellow", "yellowish", "golden"],
    "cream": ["cream", "beige", "ivory"],
    "green": ["green", "greenish"],
    "blue": ["blue", "bluish"],
    "purple": ["purple", "violet"],
    "grey": ["grey", "gray", "greyish", "grayish", "silver"],
    "white": ["white", "whitish"],
    "dark": ["dark", "black", "darker"],
}
COLOUR_OF = {word: colour for colour, words in COLOURS.items() for word in words}

_ONES = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBERS = {word: i for i, word in enumerate(_ONES.split(), 1)} | {word: 10 * i for i, word in enumerate(_TENS.split(), 2)}
METRES = {"m": 1.0, "metre": 1.0, "meter": 1.0, "km": 1000.0, "kilometre": 1000.0, "kilometer": 1000.0, "foot": 0.3048,
          "feet": 0.3048, "ft": 0.3048, "yard": 0.9144, "mile": 1609.0}  # fmt: skip

_HUNDREDS = rf"(?:(a|{'|'.join(NUMBERS)})[ -]hundred(?: and)? ?)?"
_AMOUNT = re.compile(rf"\b{_HUNDREDS}(\d[\d.,]*|[a-z]+(?:-[a-z]+)?)?[ -]?(?:(?<=\d)|\b)({'|'.join(METRES)})s?\b")

_VISIBLE = """
    alley arch architecture asphalt awning balcon bank bench bicycle bike bin block bollard brick bridge building bus bush cafe
    camera car chimney church cobble college concrete cottage crossroad crosswalk curb curve cyclist dome door facade façade
    fence flag flat flower footpath fountain front garage garden gate glass grass greenery ground hedge hill hotel house
    intersection ivy junction kerb lamp lane lawn leaf leaves letter line lot map marking monument narrow office parking park
    path pavement paving pedestrian people pillar plaster playground pole pub railing restaurant river road roof row school
    shade shop shrub sidewalk sign sky slope square stair statue steeple steps stone store storey stories street surface
    terrace tile tower track traffic tree truck van vegetation vehicle wall warehouse window wood
"""
_SEEN = re.compile(
    rf"\b((?:{'|'.join(_VISIBLE.split())})(?:s|es|ed|n|ies|y)?|{'|'.join(COLOUR_OF)}|{'|'.join(COMPASS)})\b", re.IGNORECASE
)
_FRAME = re.compile(r"\b(on|in|along|from|of) (this|the|that|a|which) (street|road|lane|square|map|district)\b", re.IGNORECASE)


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`; empty for none."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def cites_something(text: str) -> bool:
    """Whether a text without names speaks of two different things that a picture can show."""
    seen = (match.group().lower() for match in _SEEN.finditer(_FRAME.sub("", text)))
    first = next(seen, None)
    return any(word != first for word in seen)


def amounts(text: str) -> list[tuple[str, float]]:
    """Every distance in a text in lower case: as it is said, and in metres."""
    found = []
    for match in _AMOUNT.finditer(text):
        hundreds, word, unit = match.group(1), match.group(2), match.group(3)
        value = _number(word) if word else 0.0
        if value is not None and (word or hundreds):
            found.append((match.group(), (100 * NUMBERS.get(hundreds or "", 1 if hundreds else 0) + value) * METRES[unit]))
    return found


def _number(word: str) -> float | None:
    """The number that a word stands for: `40`, `1,200`, `forty`, `forty-five`; None if it is none."""
    if re.fullmatch(r"\d{1,3}(,\d{3})+|\d+(\.\d+)?", word):
        return float(word.replace(",", ""))
    parts = [NUMBERS.get(part) for part in word.split("-")]
    return None if None in parts else float(sum(part for part in parts if part))
