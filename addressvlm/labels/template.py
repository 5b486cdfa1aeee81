"""Labels without a language model: facts put into sentences, first the evidence, then the address."""

import random

from addressvlm.labels import frames
from addressvlm.labels.facts import Facts
from addressvlm.labels.words import listed
from addressvlm.names import normal

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
    seen = [*_photo(facts, rng), *_drawn(frames.SKY, facts.sky, rng), *_drawn(frames.GREENERY, facts.greenery, rng)]
    return " ".join(seen)


def _conclusion(facts: Facts, rng: random.Random) -> str:
    return rng.choice(frames.CONCLUSIONS).format(street=facts.street, district=facts.district)


def _photo(facts: Facts, rng: random.Random) -> list[str]:
    """What is visible in the photo: colours and where the camera looks."""
    colours = listed(facts.photo_colours)
    if facts.facing is None:
        forms = frames.PHOTO_COLOURS_ONLY if colours else frames.PHOTO_BARE
        return [rng.choice(forms).format(colours=colours)]
    view = rng.choice(frames.VIEWS[facts.view]).format(facing=facts.facing)
    return [rng.choice(frames.PHOTO if colours else frames.PHOTO_VIEW_ONLY).format(view=view, colours=colours)]


def _map(facts: Facts, rng: random.Random) -> list[str]:
    """What the tile shows: names, the street's direction, colours of what lies around."""
    own = [name for name in facts.names if normal(name) == normal(facts.on_map)]
    names = [*([facts.on_map] if own else []), *(name for name in facts.names if name not in own)][:MOST_NAMES]
    sentences = []
    if names:
        one = frames.NAME if own else [form for form in frames.NAME if "centre" not in form]
        sentences.append(rng.choice(frames.NAMES if len(names) > 1 else one).format(names=listed(names)))
    if facts.direction:
        forms = frames.OWN_DIRECTION if own else frames.UNREAD_DIRECTION
        sentences.append(rng.choice(forms).format(street=facts.on_map, direction=facts.direction))
    if facts.tile_colours:
        sentences.append(rng.choice(frames.FROM_ABOVE).format(colours=listed(facts.tile_colours[:2])))
    return sentences


def _crossing(facts: Facts, rng: random.Random) -> list[str]:
    """The nearest street that meets the photo's own."""
    if not facts.cross_street or facts.cross_distance_m is None:
        return []
    forms = frames.CORNER if facts.cross_distance_m < CORNER_M else frames.CROSSING
    return [rng.choice(forms).format(cross=facts.cross_street, metres=facts.cross_distance_m, way=facts.cross_direction)]


def _drawn(forms: dict[str, list[str]], fact: str | None, rng: random.Random) -> list[str]:
    return [rng.choice(forms[fact])] if fact else []
