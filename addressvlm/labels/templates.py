"""Labels without a language model: facts put into sentences, first the evidence, then the address."""

import random
import re
from collections.abc import Sequence

from addressvlm.gazetteer.name_matcher import normalize_name
from addressvlm.labels.facts import COMPASS, Facts

CONCLUSIONS = [
    "So this is {street} in {district}.",
    "The photo was therefore taken on {street} in {district}.",
    "All of this points to {street}, {district}.",
    "This is {street} in {district}.",
    "The address is therefore {street}, {district}.",
    "Therefore it is {street} in {district}.",
]
VIEWS = {
    "along": [
        "looks along the street to the {facing}",
        "follows the street to the {facing}",
        "faces {facing} down the street",
        "points {facing} along the road",
        "looks {facing} down the road",
    ],
    "across": [
        "looks across the street to the {facing}",
        "faces {facing} over the street",
        "is turned {facing} across the road",
        "looks {facing} over the road",
        "points {facing} across the street",
    ],
    "oblique": [
        "looks {facing} at an angle to the street",
        "faces {facing} slantwise to the street",
        "is turned {facing} half along the road",
        "points {facing} at an angle to the road",
        "looks {facing} diagonally over the road",
    ],
    None: [
        "looks to the {facing}",
        "faces {facing}",
        "is turned to the {facing}",
        "points {facing}",
    ],
}
PHOTO = [
    "The camera {view} and sees mostly {colours} surfaces.",
    "The photo shows mainly {colours} fronts, and its camera {view}.",
    "Mostly {colours} surfaces fill the photo, whose camera {view}.",
    "In the photo, mostly {colours}, the camera {view}.",
    "The camera {view}, with mainly {colours} fronts before it.",
    "The camera {view}. The photo is mostly {colours}.",
]
PHOTO_VIEW_ONLY = [
    "The camera {view}.",
    "In the photo the camera {view}.",
    "The photo shows the roadway, and its camera {view}.",
]
PHOTO_COLOURS_ONLY = [
    "The photo shows a street scene with mostly {colours} surfaces.",
    "In the photo {colours} surfaces stand out.",
    "The photo is dominated by {colours} surfaces.",
    "Mainly {colours} fronts can be seen in the photo.",
]
PHOTO_BARE = [
    "The photo shows the roadway and what stands beside it.",
    "The photo is a view from the road, with what stands at its sides.",
]
NAMES = [
    "On the map one can read {names}.",
    "The map around it is marked with {names}.",
    "The map bears the names {names}.",
    "The names {names} are written on the map.",
    "Around it one can read {names}.",
]
NAME = [
    "On the map one can read {names}.",
    "The map around it is marked with {names}.",
    "The map bears the name {names}.",
    "The name {names} is written on the map.",
    "The street at the centre bears the name {names}.",
]
OWN_DIRECTION = [
    "{street} runs {direction} through the centre.",
    "At the centre {street} runs {direction}.",
    "Through the middle of the map, {street} runs {direction}.",
    "There {street} runs {direction}.",
    "In the middle {street} runs {direction}.",
]
UNREAD_DIRECTION = [
    "The street at the centre runs {direction}.",
    "The street in the middle of the map runs {direction}.",
    "Through the centre the street runs {direction}.",
    "A street runs {direction} through the middle of the map.",
]
FROM_ABOVE = [
    "Seen from above, the place is mostly {colours}.",
    "From above, {colours} prevails around it.",
    "Around it the ground and roofs are {colours}.",
    "The ground around it is mainly {colours}.",
    "From above one sees {colours} all around.",
]
CORNER = [
    "{cross} meets it right here.",
    "The corner with {cross} is right at the camera.",
    "It stands at the junction with {cross}.",
    "This is where {cross} meets it.",
]
CROSSING = [
    "{cross} meets it about {metres} metres to the {way}.",
    "The junction with {cross} lies some {metres} metres {way}.",
    "About {metres} metres to the {way} it meets {cross}.",
    "It meets {cross} about {metres} metres to the {way}.",
    "Some {metres} metres {way} it meets {cross}.",
    "{cross} joins it some {metres} metres {way}.",
]
SKY = {
    "wide": ["Much open sky is above the street.", "The sky is wide above the roadway."],
    "narrow": ["Only a strip of sky is left between the fronts.", "There is little sky above the street."],
    "hidden": ["There is no sky to be seen.", "What stands beside the road hides the sky."],
}
GREENERY = {
    "much": ["Trees or hedges take up much of the view.", "There is much greenery beside the road."],
    "some": ["Some greenery stands beside the road.", "Here and there is some greenery."],
    "little": ["There is hardly any greenery.", "Hardly a tree or a hedge is in the view."],
}


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


def join_words(words: Sequence[str]) -> str:
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


MOST_NAMES = 3
CORNER_M = 10


def explain(facts: Facts, rng: random.Random) -> str:
    """A label of about 35 to 60 words for a grafted image: what the photo shows, what the map shows, then the address."""
    return " ".join([*_photo(facts, rng), *_map(facts, rng), *_crossing(facts, rng), _conclusion(facts, rng)])


def reason(facts: Facts, rng: random.Random) -> str:
    """A label for a street view alone: what it shows, then the address; nothing that only a map tells."""
    return f"{describe(facts, rng)} {_conclusion(facts, rng)}"


def describe(facts: Facts, rng: random.Random) -> str:
    """What a street view shows, without its address."""
    seen = [*_photo(facts, rng), *_drawn(SKY, facts.sky, rng), *_drawn(GREENERY, facts.greenery, rng)]
    return " ".join(seen)


def _conclusion(facts: Facts, rng: random.Random) -> str:
    return rng.choice(CONCLUSIONS).format(street=facts.street, district=facts.district)


def _photo(facts: Facts, rng: random.Random) -> list[str]:
    """What is visible in the photo: colours and where the camera looks."""
    colours = join_words(facts.photo_colours)
    if facts.facing is None:
        forms = PHOTO_COLOURS_ONLY if colours else PHOTO_BARE
        return [rng.choice(forms).format(colours=colours)]
    view = rng.choice(VIEWS[facts.view]).format(facing=facts.facing)
    return [rng.choice(PHOTO if colours else PHOTO_VIEW_ONLY).format(view=view, colours=colours)]


def _map(facts: Facts, rng: random.Random) -> list[str]:
    """What the tile shows: names, the street's direction, colours of what lies around."""
    own = [name for name in facts.names if normalize_name(name) == normalize_name(facts.on_map)]
    names = [*([facts.on_map] if own else []), *(name for name in facts.names if name not in own)][:MOST_NAMES]
    sentences = []
    if names:
        one = NAME if own else [form for form in NAME if "centre" not in form]
        sentences.append(rng.choice(NAMES if len(names) > 1 else one).format(names=join_words(names)))
    if facts.direction:
        forms = OWN_DIRECTION if own else UNREAD_DIRECTION
        sentences.append(rng.choice(forms).format(street=facts.on_map, direction=facts.direction))
    if facts.tile_colours:
        sentences.append(rng.choice(FROM_ABOVE).format(colours=join_words(facts.tile_colours[:2])))
    return sentences


def _crossing(facts: Facts, rng: random.Random) -> list[str]:
    """The nearest street that meets the photo's own."""
    if not facts.cross_street or facts.cross_distance_m is None:
        return []
    forms = CORNER if facts.cross_distance_m < CORNER_M else CROSSING
    return [rng.choice(forms).format(cross=facts.cross_street, metres=facts.cross_distance_m, way=facts.cross_direction)]


def _drawn(forms: dict[str, list[str]], fact: str | None, rng: random.Random) -> list[str]:
    return [rng.choice(forms[fact])] if fact else []
