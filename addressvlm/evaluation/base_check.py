"""Can a base model read a city's tiles and match photos with them? Measured before labels are paid for.

    check_base(places, answer, seed=0)

Stage 1 teaches through names that the base can read and through places that it recognises from both views. Three things are
asked about tiles and photos of the user's own city: the name of the street at a tile's centre, whether a photo belongs to each
of four tiles without names, and which of two colours prevails in a photo and from above.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from addressvlm.evaluation.metrics import Interval, share_ci
from addressvlm.evaluation.parsing import yes_no
from addressvlm.gazetteer.name_matcher import NameFinder, normalize_name
from addressvlm.grafting import graft
from addressvlm.labels.facts import photo_colours, tile_colours
from addressvlm.questions import SUFFIXES

Answer = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[str]]

READ = "Which street runs through the middle of the map? Name it."
MATCH = f"Do the photo and the map show the same place? {SUFFIXES['judgment']}"
COLOUR = {"photo": "Which colour do most surfaces in this photo have?", "tile": "Which colour prevails from above?"}
COLOURS = ("red", "orange", "yellow", "green", "blue", "brown", "white", "grey", "dark", "cream")
CANDIDATES = 4  # tiles that a photo is to be matched with
CHANCE = {"names read": 0.0, "photos matched": 1 / CANDIDATES, "colours told apart": 0.5}
CAN_READ = 0.5  # share of own names below which names on tiles teach little


@dataclass(frozen=True)
class CheckedPlace:
    """A place of the city: its photo, its tile with names and without, and its street."""

    id: str
    street: str
    photo: Image.Image
    tile: Image.Image
    bare: Image.Image
    names: Sequence[str]  # written on the tile


def check_base(
    places: Sequence[CheckedPlace], answer: Answer, streets: Sequence[str], delta: float, seed: int = 0
) -> dict[str, Interval]:
    """Shares of right answers with 95 % intervals over places, one for each of `CHANCE`.

    Args:
        answer: images and a question about each -> the model's answers.
        streets: all names that an answer may mention; a right answer mentions its own and no other.
        delta: of the grafts.
    """
    rng, finder = random.Random(seed), NameFinder(sorted({*streets, *(place.street for place in places)}))
    readable = [place for place in places if place.street in place.names]
    answers = answer([place.tile for place in readable], [READ] * len(readable))
    read = [finder.find(text) == {normalize_name(place.street)} for text, place in zip(answers, readable, strict=True)]

    others = {p.id: rng.sample([q for q in places if q.street != p.street], CANDIDATES - 1) for p in places}
    tiles = [[place.bare, *(other.bare for other in others[place.id])] for place in places]
    grafts = [graft(tile, place.photo, delta) for place, four in zip(places, tiles, strict=True) for tile in four]
    accepted = [yes_no(text) == "yes" for text in answer(grafts, [MATCH] * len(grafts))]
    matched = [_match(accepted[start : start + CANDIDATES]) for start in range(0, len(accepted), CANDIDATES)]

    images, questions, right, where = [], [], [], []
    for place in places:
        for view, image, colours in (
            ("photo", place.photo, photo_colours(place.photo)), ("tile", place.bare, tile_colours(place.bare, 0.0))
        ):  # fmt: skip
            if colours and colours[0] in COLOURS:
                wrong = rng.choice([colour for colour in COLOURS if colour not in colours])
                options = rng.sample([colours[0], wrong], 2)
                images.append(image)
                questions.append(f"{COLOUR[view]} {SUFFIXES['choice'].format(options='; '.join(options))}")
                right.append((colours[0], wrong))
                where.append(place.id)
    words = [set(re.findall("[a-z]+", text.lower().replace("gray", "grey"))) for text in answer(images, questions)]
    told_apart = [true in named and wrong not in named for named, (true, wrong) in zip(words, right, strict=True)]
    return {
        "names read": share_ci(read, [place.id for place in readable], seed=seed),
        "photos matched": share_ci(matched, [place.id for place in places], seed=seed),
        "colours told apart": share_ci(told_apart, where, seed=seed),
    }


def _match(accepted: Sequence[bool]) -> float:
    """What guessing among the accepted tiles gets right, of which the first is the photo's own; of all where none is."""
    if not any(accepted):
        return 1 / len(accepted)
    return accepted[0] / sum(accepted)


def verdict(shares: dict[str, Interval]) -> str:
    """What stage 1 can be expected to give with this base, in a sentence or two."""
    reads, matches = ((shares[name]["low"] or 0.0, shares[name]["high"] or 0.0) for name in ("names read", "photos matched"))
    if reads[1] < CAN_READ:
        first = (
            "It does not read the names on these tiles, so labels that rest on them teach little: don't buy them for this base"
        )
    elif reads[0] < CAN_READ:
        first = (
            "Whether it reads the names on these tiles is not certain: check more places (--places) before labels are paid for"
        )
    else:
        first = "It reads the names on these tiles, so stage 1 can teach it which street runs where"
    if matches[0] > CHANCE["photos matched"]:
        second = "it recognises a place from both views, so what it learns from the map can carry over to photos."
    else:
        second = (
            "it does not match photos with tiles better than chance: if anything, stage 1 with matching rows must teach that "
            "(train.stages.<name>.data: [alignment, map, matching])."
        )
    return f"{first}; {second}"
