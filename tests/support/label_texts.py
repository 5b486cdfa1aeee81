"""Good labels and labels with one thing wrong, to measure the checks with."""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from addressvlm.labels.facts import Facts
from addressvlm.labels.lexicon import COLOURS, COMPASS, DIRECTIONS
from addressvlm.labels.templates import explain

FACTS = Facts(
    "Mill Street", "Harbour", ("Mill Street", "King Street"), "east-west", "along", "east", "King Street", 40, "east", ("red",)
)  # fmt: skip
GOOD = (
    "A row of red brick houses stands on the left and the camera looks along the road. On the map King Street meets the "
    "street a little to the east. This is Mill Street in Harbour."
)
STREETS = [
    "Mill Street", "Old Mill Street", "King Street", "St. Mary's Passage", "Hint Street", "North Terrace", "5th Avenue",
    "Rue de l'Évêché", "Broadway", "Green Lane", "Castle Hill", "Elm Road", "Sidney Street", "Corn Exchange Street",
]  # fmt: skip
DISTRICTS = ["Harbour", "Old Town", "Market", "Castle", "Saint Germain"]

# How other hands put the same facts.
PARAPHRASES = [
    "The photo, taken facing {facing}, is dominated by {photo} tones. The map labels {street}, which runs {direction} "
    "through the middle, and {cross} crosses it about {metres} m to the {way}. This places the camera on {street} in "
    "{district}.",
    "Looking {facing}, the camera sees {photo} buildings. According to the map, {street} runs {direction} here; {cross} "
    "meets it roughly {metres} meters {way} of this point. Therefore the address is {street}, {district}.",
    "In the street-level picture, {photo} façades stand out and the view is {view_said} the road, towards the {facing}. On "
    "the map {street} and {cross} are labelled, and their junction is {metres} metres to the {way}. It must be {street} in "
    "{district}.",
    "{street} is written across the centre of the map and has a {direction} orientation. To the {way}, some {metres} metres"
    " away, it is met by {cross}. The photo shows {photo} walls. We are on {street}, in the {district} district.",
    "With its {photo} fronts, the scene fits a town street seen towards the {facing}. The map shows the names {street} and "
    "{cross}; the latter joins {metres} m further {way}. The place is {street}, {district}.",
    "The small picture has mainly {photo} surfaces, and its camera points {facing}. Around it, the street runs {direction}."
    " {cross} intersects with it {metres} metres to the {way}, so the photo belongs to {street} in {district}.",
    "A {photo} row of houses lines the road as one looks {facing}. The street names {street} and {cross} can be read on the"
    " map, and the two meet {metres} metres {way} from here, which leads to {street} in {district}.",
    "The camera stands on a street that runs {direction}, with {cross} meeting it {metres} metres to the {way}. Most of "
    "what it sees, facing {facing}, is {photo}. That combination identifies {street} in {district}.",
    "From the photo: {photo} walls and a gaze directed {facing}. From the map: a street running {direction}, marked "
    "{street}, with a junction with {cross} {metres} metres to the {way}. Conclusion: {street}, {district}.",
    "Because the street on the map runs {direction} and bears the name {street}, and because {cross} crosses {metres} "
    "metres to its {way}, the {photo} buildings in the photo, seen while facing {facing}, must stand on {street} in "
    "{district}.",
    "A camera pointed {facing} captured these {photo} houses. On the map, one finds {cross} {metres} metres to the {way}, "
    "where it meets the {direction} line of {street}. This is {street} in {district}.",
    "What one sees is mostly {photo}: fronts on both sides of a road, in a picture that looks {facing}. The road at the "
    "centre of the map runs {direction} and is labelled {street}; its next junction, {metres} m to the {way}, is with "
    "{cross}. So the answer is {street}, {district}.",
    "Heading {facing}, the photographer captured a scene of {photo} surfaces. The surrounding map reads {street}, a road "
    "stretching {direction}, and {cross}, which meets {street} about {metres} meters to the {way}. The location is {street}"
    " in {district}.",
    "The street-view image faces {facing} and shows {photo} buildings. The map indicates that {street} runs {direction} "
    "through the center. {cross} is the nearest crossing street, {metres} meters to the {way}. Based on this, the photo was"
    " taken on {street} in {district}.",
    "Mostly {photo} facades are visible in the photo as the camera faces {facing}. {street} runs {direction} at the center "
    "of the map, and {cross} meets {street} {metres} m to the {way}. The names {street} and {cross} are written on the map."
    " This is {street} in {district}.",
    "I first noticed the {photo} fronts in the photo, which looks to the {facing}. The label {street} follows a street "
    "drawn {direction} in the middle. {metres} metres {way} of the camera there is a junction with {cross}. That settles "
    "it: {street} in {district}.",
    "This photo shows a street with {photo} buildings, looking {facing}. The map displays {street} running {direction}, "
    "with {cross} intersecting it {metres} meters to the {way}. The street name and the crossing confirm that this is "
    "{street} in {district}.",
    "The image depicts a {photo} street scene with the camera facing {facing}. On the map, {street} is clearly marked and "
    "runs {direction}. At a distance of {metres} metres towards the {way}, {cross} meets {street}. Thus, this is {street} "
    "in {district}.",
]  # fmt: skip


def random_facts(rng: random.Random) -> Facts:
    """Facts of some place, complete."""
    street, cross, *others = rng.sample(STREETS, 5)
    return Facts(
        street=street,
        district=rng.choice(DISTRICTS),
        names=(street, cross, *others[: rng.randint(0, 2)]),
        direction=rng.choice(DIRECTIONS),
        view=rng.choice(["along", "across", "oblique"]),
        facing=rng.choice(COMPASS),
        cross_street=cross,
        cross_distance_m=rng.choice(range(20, 100, 10)),
        cross_direction=rng.choice(COMPASS),
        photo_colours=tuple(rng.sample(sorted(COLOURS), rng.randint(1, 2))),
        tile_colours=tuple(rng.sample(sorted(COLOURS), rng.randint(0, 2))),
    )


def paraphrase(facts: Facts, rng: random.Random) -> str:
    """The facts in the words of one of PARAPHRASES."""
    return rng.choice(PARAPHRASES).format(
        street=facts.street, district=facts.district, direction=facts.direction, facing=facts.facing, cross=facts.cross_street,
        metres=facts.cross_distance_m, way=facts.cross_direction, photo=" and ".join(facts.photo_colours),
        view_said={"along": "along", "across": "across", "oblique": "diagonally over"}[facts.view or ""],
    )  # fmt: skip


def good(seed: int, count: int) -> Iterator[tuple[str, Facts]]:
    """Labels to pass, half of them the template's."""
    rng = random.Random(seed)
    for i in range(count):
        facts = random_facts(rng)
        if i % 10 == 0:
            facts = replace(facts, cross_distance_m=0)
        yield (explain if i % 2 or not facts.cross_distance_m else paraphrase)(facts, rng), facts


def corrupted(seed: int, count: int) -> Iterator[tuple[str, str, Facts]]:
    """Kinds of corruption, and labels with it: to refuse."""
    rng = random.Random(seed)
    kinds = list(CORRUPTIONS)
    for i in range(count):
        kind, facts = kinds[i % len(kinds)], random_facts(rng)
        text = (paraphrase if rng.random() < 0.5 else explain)(facts, rng)
        wrong = CORRUPTIONS[kind](text, facts, rng)
        if wrong != text:
            yield kind, wrong, facts


def _swap(text: str, pattern: str, new: Callable[[str], str], rng: random.Random) -> str:
    """The text with one match of the pattern replaced."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        return text
    match = rng.choice(matches)
    return text[: match.start()] + new(match.group()) + text[match.end() :]


_POINTS = "|".join(sorted(COMPASS, key=len, reverse=True))
_AXES = "|".join(DIRECTIONS)


def _other(options: list[str], *excluded: str | None) -> list[str]:
    return [option for option in options if option not in excluded]


def _compass(text: str, facts: Facts, rng: random.Random) -> str:
    return _swap(text, rf"(?<!-)\b({_POINTS})\b(?!-)", lambda old: rng.choice(_other(COMPASS, old)), rng)


def _axis(text: str, facts: Facts, rng: random.Random) -> str:
    return _swap(text, _AXES, lambda old: rng.choice(_other(DIRECTIONS, old)), rng)


def _distance(text: str, facts: Facts, rng: random.Random) -> str:
    true = facts.cross_distance_m or 0
    return _swap(
        text,
        rf"\b{true}\b",
        lambda old: str(rng.choice([d for d in range(10, 200, 10) if abs(d - true) > 0.3 * true + 10])),
        rng,
    )


def _crossing(text: str, facts: Facts, rng: random.Random) -> str:
    """Another street is said to meet it, in the last place that names the true one."""
    start = text.rfind(facts.cross_street or "")
    other = rng.choice(_other(STREETS, facts.street, facts.cross_street))
    return text[:start] + other + text[start + len(facts.cross_street or "") :]


def _street(text: str, facts: Facts, rng: random.Random) -> str:
    """The conclusion is on another street."""
    start = text.rfind(facts.street)
    return text[:start] + rng.choice(_other(STREETS, facts.street)) + text[start + len(facts.street) :]


def _district(text: str, facts: Facts, rng: random.Random) -> str:
    start = text.rfind(facts.district)
    return text[:start] + rng.choice(_other(DISTRICTS, facts.district)) + text[start + len(facts.district) :]


def _colour(text: str, facts: Facts, rng: random.Random) -> str:
    reply = (*facts.photo_colours, *facts.tile_colours)
    return _swap(text, rf"\b({'|'.join(reply)})\b", lambda old: rng.choice(_other(sorted(COLOURS), *reply)), rng)


def _view(text: str, facts: Facts, rng: random.Random) -> str:
    turned = {"along": ["along", "down"], "across": ["across", "over"]}
    for reply, words in turned.items():
        for word in words:
            if facts.view == reply and re.search(rf"\b{word} the (street|road)", text):
                other = "across" if reply == "along" else "along"
                return re.sub(rf"\b{word} the (street|road)", rf"{other} the \1", text)
    return text


def _hint(text: str, facts: Facts, rng: random.Random) -> str:
    talk = ["As the hint says, this fits.", "This matches the given address.", "As the provided information states, it fits.",
            "The facts say so.", "The address was given.", "You told me the location.", "According to the notes, it fits.",
            "It agrees with the correct answer.", "Based on the supplied data, this is right."]  # fmt: skip
    return f"{rng.choice(talk)} {text}" if rng.random() < 0.5 else f"{text} {rng.choice(talk)}"


def _invented(text: str, facts: Facts, rng: random.Random) -> str:
    extra = ["The map also bears the name Wobble Road.", "Pumpernickel Avenue is written on the map as well.",
             f"Next to it {rng.choice(_other(STREETS, facts.street, *facts.names))} can be read."]  # fmt: skip
    return f"{rng.choice(extra)} {text}"


def _repeated(text: str, facts: Facts, rng: random.Random) -> str:
    return f"{text} {text}"


def _foreign(text: str, facts: Facts, rng: random.Random) -> str:
    reply = "Auf dem Bild sieht man vor allem Häuser, und die Kamera schaut die Straße entlang. Daher ist das"
    return f"{reply} {facts.street} in {facts.district}."


def _short(text: str, facts: Facts, rng: random.Random) -> str:
    return f"A road with houses: {facts.street}, {facts.district}."


def _listed(text: str, facts: Facts, rng: random.Random) -> str:
    return "\n".join(f"- {part.strip()}" for part in text.split(". "))


def _empty_words(text: str, facts: Facts, rng: random.Random) -> str:
    reply = "It is plain to everybody who knows the city well that this can only be one address, and it is"
    return f"{reply} {facts.street} in {facts.district}."


CORRUPTIONS: dict[str, Callable[[str, Facts, random.Random], str]] = {
    "compass": _compass, "axis": _axis, "distance": _distance, "crossing": _crossing, "street": _street, "district": _district,
    "colour": _colour, "view": _view, "hint": _hint, "invented": _invented, "repetition": _repeated, "language": _foreign,
    "length": _short, "form": _listed, "visible": _empty_words,
}  # fmt: skip
