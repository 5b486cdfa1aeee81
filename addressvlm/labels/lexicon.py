"""English words of labels: directions, colours, distances, visible things, and words that show what a claim is about."""

import re
from collections.abc import Sequence

# Directions

COMPASS = ["north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest"]
DIRECTIONS = ["north-south", "northeast-southwest", "east-west", "northwest-southeast"]
DIRECTION_OF = {end: direction for direction in DIRECTIONS for end in direction.split("-")}

# Colours: words by the colour that is measured

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

# Distances

_ONES = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBERS = {word: i for i, word in enumerate(_ONES.split(), 1)} | {word: 10 * i for i, word in enumerate(_TENS.split(), 2)}
METRES = {"m": 1.0, "metre": 1.0, "meter": 1.0, "km": 1000.0, "kilometre": 1000.0, "kilometer": 1000.0, "foot": 0.3048,
          "feet": 0.3048, "ft": 0.3048, "yard": 0.9144, "mile": 1609.0}  # fmt: skip
_HUNDREDS = rf"(?:(a|{'|'.join(NUMBERS)})[ -]hundred(?: and)? ?)?"
_DISTANCE = re.compile(rf"\b{_HUNDREDS}(\d[\d.,]*|[a-z]+(?:-[a-z]+)?)?[ -]?(?:(?<=\d)|\b)({'|'.join(METRES)})s?\b")

# Visible things

_VISIBLE = """
    alley arch architecture asphalt awning balcon bank bench bicycle bike bin block bollard brick bridge building bus bush cafe
    camera car chimney church cobble college concrete cottage crossroad crosswalk curb curve cyclist dome door facade façade
    fence flag flat flower footpath fountain front garage garden gate glass grass greenery ground hedge hill hotel house
    intersection ivy junction kerb lamp lane lawn leaf leaves letter line lot map marking monument narrow office parking park
    path pavement paving pedestrian people pillar plaster playground pole pub railing restaurant river road roof row school
    shade shop shrub sidewalk sign sky slope square stair statue steeple steps stone store storey stories street surface
    terrace tile tower track traffic tree truck van vegetation vehicle wall warehouse window wood
"""
_VISIBLE_WORD = re.compile(
    rf"\b((?:{'|'.join(_VISIBLE.split())})(?:s|es|ed|n|ies|y)?|{'|'.join(COLOUR_OF)}|{'|'.join(COMPASS)})\b", re.IGNORECASE
)
_SETTING = re.compile(
    r"\b(on|in|along|from|of) (this|the|that|a|which) (street|road|lane|square|map|district)\b", re.IGNORECASE
)

# What a claim is about; names are marks here (see fact_checker)

_TOPIC_WORDS = {
    "facing": "camera photo photograph photographer picture scene viewer view gaze looks looking look faces facing faced face "
    "gazes gazing points pointing pointed turned aimed directed shot seen sees",
    "cross": "§cross §other §foreign §unknown junction meets meet meeting met crosses crossing crossed corner intersection "
    "intersects joins joining joined metres meters metre meter m away branches",
    "axis": "runs run running ran axis oriented orientation aligned extends extending stretches leads leading",
}
TOPIC_OF = {word: topic for topic, words in _TOPIC_WORDS.items() for word in words.split()}
LOOKING = set("camera looks looking look faces facing faced turned points pointing pointed aimed gazes directed view".split())
MEETING = set(
    "meets meet meeting met crosses crossing crossed intersects intersecting joins joining joined junction intersection".split()
)
MEETING_VERBS = {"meets", "crosses", "intersects", "joins"}
TURNING = {("corner", "of"), ("corner", "with"), ("comes", "to"), ("come", "to"), ("turn", "into"), ("turns", "into")}
READING = set(
    "read reads reading written labelled labeled labels label marked inscribed printed legible bears names named".split()
)
GROUND = set("above aerial overhead satellite roofs ground around surroundings map tile".split())
PICTURE = set(
    "photo camera view facades façades fronts surfaces picture image street-level shows walls buildings houses".split()
)
VIEW_OF = {"along": "along", "down": "along", "up": "along", "follows": "along", "following": "along", "across": "across",
           "over": "across"} | dict.fromkeys(
               ("half", "slantwise", "obliquely", "diagonally", "askew", "angle", "slanting"), "oblique")  # fmt: skip
NOT_STREETS = {"camera", "photo", "map", "centre", "center", "corner", "picture", "viewer"}
NO_OBJECT = {"", "it", "its", "at", "about", "around", "roughly", "right", "here"}  # after a verb of meeting: no other street
NEXT_CLAUSE = {"runs", ";", "so", "therefore", "which", "where", "that", "at"}
SKY_OF = {"wide": "wide", "open": "wide", "broad": "wide", "narrow": "narrow", "little": "narrow", "strip of": "narrow",
          "hidden": "hidden", "no": "hidden"}  # fmt: skip
STREET_WORDS = (
    r"(?:Street|St\.?|Road|Rd\.?|Avenue|Ave\.?|Lane|Ln\.?|Drive|Boulevard|Blvd\.?|Place|Court|Square|Row|Terrace|Close|Passage|"
    r"Crescent|Parade|Way|Alley)"
)
NO_NAMES = {*COMPASS, *(f"{point}ern" for point in COMPASS), "i'm", "i've", "street", "road", "district", "district's"}


def join_words(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`; empty for none."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def mentions_visible_things(text: str) -> bool:
    """Whether a text without names mentions two different things that an image can show."""
    words = (match.group().lower() for match in _VISIBLE_WORD.finditer(_SETTING.sub("", text)))
    first = next(words, None)
    return any(word != first for word in words)


def parse_distances(text: str) -> list[tuple[str, float]]:
    """Every distance in a text in lower case: its words, and metres."""
    distances = []
    for match in _DISTANCE.finditer(text):
        hundreds, word, unit = match.groups()
        value = _parse_number(word) if word else 0.0
        if value is not None and (word or hundreds):
            metres = (100 * NUMBERS.get(hundreds or "", 1 if hundreds else 0) + value) * METRES[unit]
            distances.append((match.group(), metres))
    return distances


def _parse_number(word: str) -> float | None:
    """`40`, `1,200`, `forty`, `forty-five` as a number; None if it is none."""
    if re.fullmatch(r"\d{1,3}(,\d{3})+|\d+(\.\d+)?", word):
        return float(word.replace(",", ""))
    parts = [NUMBERS.get(part) for part in word.split("-")]
    return None if None in parts else float(sum(part for part in parts if part))
