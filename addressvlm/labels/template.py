"""Alignment labels without a language model: facts put into sentences, first the evidence, then the address."""

import random

from addressvlm.labels.facts import Facts
from addressvlm.names import normal

QUESTIONS = [
    "Where was the photo in the upper right corner taken? Explain from what can be seen.",
    "Which address does the street-view photo belong to? Give the reason.",
    "Look at the map and the photo in its corner: at which address does the camera stand, and why?",
    "Match the photo with the map around it. Which street and district is it, and what shows that?",
    "Explain step by step at which address the small photo was taken.",
    "Use the map and the photo to find the address. Say what led you to it.",
]

CONCLUSIONS = [
    "So this is {street} in {district}.",
    "The photo was therefore taken on {street} in {district}.",
    "All of this points to {street}, {district}.",
]
VIEWS = {
    "along": [
        "looks along the street to the {facing}",
        "follows the street to the {facing}",
        "faces {facing} down the street",
    ],
    "across": [
        "looks across the street to the {facing}",
        "faces {facing} over the street",
        "is turned {facing} across the road",
    ],
    "oblique": [
        "looks {facing} at an angle to the street",
        "faces {facing} slantwise to the street",
        "is turned {facing} half along the road",
    ],
    None: ["looks to the {facing}", "faces {facing}", "is turned to the {facing}"],
}
PHOTO = [
    "The camera {view} and sees mostly {colours} surfaces.",
    "The photo shows mainly {colours} fronts, and its camera {view}.",
    "Mostly {colours} surfaces fill the photo, whose camera {view}.",
]
PHOTO_COLOURS_ONLY = [
    "The photo shows a street scene with mostly {colours} surfaces.",
    "In the photo {colours} surfaces stand out.",
    "The photo in the corner is dominated by {colours} surfaces.",
]
NAMES = [
    "On the map one can read {names}.",
    "The map around it is marked with {names}.",
    "The map bears the names {names}.",
]
OWN_DIRECTION = [
    "{street} runs {direction} through the centre.",
    "At the centre {street} runs {direction}.",
    "Through the middle of the map, {street} runs {direction}.",
]
UNREAD_DIRECTION = [
    "The street at the centre runs {direction}.",
    "The street in the middle of the map runs {direction}.",
    "Through the centre the street runs {direction}.",
]
FROM_ABOVE = [
    "Seen from above, the place is mostly {colours}.",
    "From above, {colours} prevails around it.",
    "Around it the ground and roofs are {colours}.",
]
CORNER = [
    "{cross} meets it right here.",
    "The corner with {cross} is right at the camera.",
    "It stands at the junction with {cross}.",
]
CROSSING = [
    "{cross} meets it about {metres} metres to the {way}.",
    "The junction with {cross} lies some {metres} metres {way}.",
    "About {metres} metres to the {way} it meets {cross}.",
]
MOST_NAMES = 3
CORNER_M = 10


def explain(facts: Facts, rng: random.Random) -> str:
    """A label of about 35 to 60 words: what the photo shows, what the map shows, then the address."""
    conclusion = rng.choice(CONCLUSIONS).format(street=facts.street, district=facts.district)
    return " ".join([*_photo(facts, rng), *_map(facts, rng), *_crossing(facts, rng), conclusion])


def _photo(facts: Facts, rng: random.Random) -> list[str]:
    """What is visible in the photo: colours and where the camera looks."""
    colours = _list(facts.photo_colours)
    if facts.facing is None:
        return [rng.choice(PHOTO_COLOURS_ONLY).format(colours=colours) if colours else "The photo is a view from the street."]
    view = rng.choice(VIEWS[facts.view]).format(facing=facts.facing)
    return [rng.choice(PHOTO).format(view=view, colours=colours) if colours else f"The camera {view}."]


def _map(facts: Facts, rng: random.Random) -> list[str]:
    """What the tile shows: names, the street's direction, colours of what lies around."""
    own = [name for name in facts.names if normal(name) == normal(facts.street)]
    names = [*([facts.street] if own else []), *(name for name in facts.names if name not in own)][:MOST_NAMES]
    sentences = []
    if names:
        sentences.append(rng.choice(NAMES).format(names=_list(names)))
    if facts.direction:
        forms = OWN_DIRECTION if own else UNREAD_DIRECTION
        sentences.append(rng.choice(forms).format(street=facts.street, direction=facts.direction))
    if facts.tile_colours:
        sentences.append(rng.choice(FROM_ABOVE).format(colours=_list(facts.tile_colours[:2])))
    return sentences


def _crossing(facts: Facts, rng: random.Random) -> list[str]:
    """The nearest street that meets the photo's own."""
    if not facts.cross_street or facts.cross_distance_m is None:
        return []
    forms = CORNER if facts.cross_distance_m < CORNER_M else CROSSING
    return [rng.choice(forms).format(cross=facts.cross_street, metres=facts.cross_distance_m, way=facts.cross_direction)]


def _list(words: tuple[str, ...] | list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""
