"""Labels without a model: facts put into sentences, first the evidence, then the address."""

import random

from addressvlm.gazetteer.name_matcher import normalize_name
from addressvlm.labels.facts import Facts
from addressvlm.labels.lexicon import join_words

MAX_NAMES = 3
CORNER_M = 10  # a street nearer than this is met "right here"

CONCLUSIONS = [
    "So this is {street} in {district}.",
    "The photo was therefore taken on {street} in {district}.",
    "All of this points to {street}, {district}.",
    "This is {street} in {district}.",
    "The address is therefore {street}, {district}.",
    "Therefore it is {street} in {district}.",
]
DISTRICT_CONCLUSIONS = [
    "So this is {district}.",
    "The photo was therefore taken in {district}.",
    "All of this points to {district}.",
    "This is {district}.",
    "The district is therefore {district}.",
    "Therefore it is in {district}.",
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


def explain(facts: Facts, rng: random.Random) -> str:
    """A label of about 35 to 60 words for a grafted image: what the photo shows, what the map shows, then the address."""
    sentences = [*_photo(facts, rng), *_map(facts, rng)]
    if facts.cross_street and facts.cross_distance_m is not None:
        template = rng.choice(CORNER if facts.cross_distance_m < CORNER_M else CROSSING)
        sentences.append(template.format(cross=facts.cross_street, metres=facts.cross_distance_m, way=facts.cross_direction))
    return " ".join([*sentences, _conclusion(facts, rng)])


def reason(facts: Facts, rng: random.Random, concludes: str = "district") -> str:
    """A label for a street view alone: what it shows, then the district or the address, without what only a map shows."""
    conclusions = DISTRICT_CONCLUSIONS if concludes == "district" else CONCLUSIONS
    return f"{describe(facts, rng)} {rng.choice(conclusions).format(street=facts.street, district=facts.district)}"


def describe(facts: Facts, rng: random.Random) -> str:
    """What a street view shows, without its address."""
    sentences = _photo(facts, rng)
    for templates, fact in ((SKY, facts.sky), (GREENERY, facts.greenery)):
        if fact:
            sentences.append(rng.choice(templates[fact]))
    return " ".join(sentences)


def _conclusion(facts: Facts, rng: random.Random) -> str:
    return rng.choice(CONCLUSIONS).format(street=facts.street, district=facts.district)


def _photo(facts: Facts, rng: random.Random) -> list[str]:
    """The photo: colours, and where the camera looks."""
    colours = join_words(facts.photo_colours)
    if facts.facing is None:
        templates = PHOTO_COLOURS_ONLY if colours else PHOTO_BARE
        return [rng.choice(templates).format(colours=colours)]
    view = rng.choice(VIEWS[facts.view]).format(facing=facts.facing)
    return [rng.choice(PHOTO if colours else PHOTO_VIEW_ONLY).format(view=view, colours=colours)]


def _map(facts: Facts, rng: random.Random) -> list[str]:
    """The tile: names, the street's direction, colours of what lies around."""
    others = [name for name in facts.names if normalize_name(name) != normalize_name(facts.on_map)]
    readable = len(others) < len(facts.names)  # the photo's street
    names = [*([facts.on_map] if readable else []), *others][:MAX_NAMES]
    sentences = []
    if names:
        one = NAME if readable else [template for template in NAME if "centre" not in template]
        sentences.append(rng.choice(NAMES if len(names) > 1 else one).format(names=join_words(names)))
    if facts.direction:
        templates = OWN_DIRECTION if readable else UNREAD_DIRECTION
        sentences.append(rng.choice(templates).format(street=facts.on_map, direction=facts.direction))
    if facts.tile_colours:
        sentences.append(rng.choice(FROM_ABOVE).format(colours=join_words(facts.tile_colours[:2])))
    return sentences
