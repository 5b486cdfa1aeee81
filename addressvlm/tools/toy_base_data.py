"""Draw the pictures that the toy base model learns from, and make lessons about them, endlessly.

    python -m addressvlm.tools.toy_base_data OUT --cities 60 --first-seed 2000

The cities are not those of the demo: the model learns to read, to see and to answer, but none of the demo's streets. Each city
gives tiles with and without names, and photos of the same places. Lessons are drawn anew every time: 40 % are about reading,
of names that the map has, or of any names written in any direction over a tile without any.
"""

import argparse
import json
import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from addressvlm.config.city import TilesConfig
from addressvlm.demo.camera import photograph
from addressvlm.demo.city import address_at, compass_heading, street_places, to_degrees, view_headings, write_maps
from addressvlm.demo.world import KINDS, WORDS, Character, Street, World, generate
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.grafting import graft
from addressvlm.labels.facts import Facts, graft_facts
from addressvlm.labels.lexicon import join_words
from addressvlm.labels.prompt import load_prompt
from addressvlm.labels.templates import explain
from addressvlm.questions import OPTIONS, SUFFIXES, templates, training_rounds
from addressvlm.tiles.renderer import TEXT, TileRenderer

SIDE = 128  # pixels
TILES = TilesConfig(side_m=120, pixels=SIDE, font_px=11)  # as in the demo presets
COHERENCE = 0.3  # less than in the demo, for more variety
PLACES, VIEWS = 50, 3  # places of a city, photos of each
DRAWN_MAPS = 4  # one city in so many has drawn maps instead of imagery
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")
FONT_SIZES = (10, 13)  # least and greatest height of a name that a lesson writes, pixels
TRAITS = Character.trait_values()

READ = ["Which street names are on this map?", "Read the names on the map.", "Name the streets written on this map."]
CENTRE = ["Which street runs through the middle of the map?", "Name the street at the centre of the map."]
WRITTEN = ["Is this name on the map:", "Can one read this name:"]
DESCRIBE = ["What do you see?", "Describe this photo.", "What is this street like?"]
ABOVE = ["What does the street at the centre look like from above?", "Describe the place from above."]
CLAIMS = ["Is this:", "Do we see:", "What is this street like? Is it:"]
MATCH = ["Was the photo taken at the centre of the map?", "Do the photo and the map show the same place?"]
MAX_ROUNDS = 3
SHARES = (0.15, 0.15, 0.25, 0.25, 0.2)  # of kinds of lessons
TOWER_SHARES = (0.4, 0.1, 0.3, 0.2, 0.0)  # while the tower learns alone: reading takes it longest
MAX_NAMES = 5  # that a lesson writes, as far as there is room
Rounds = list[tuple[str, str]]


@dataclass
class City:
    """The pictures of one city: N places, their tiles (uint8, N x SIDE x SIDE x 3) and photos (N x VIEWS x SIDE x SIDE x 3)."""

    about: list[dict[str, Any]]  # one a place, see `_place`
    tiles: np.ndarray
    bare: np.ndarray  # the tiles without names
    photos: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> "City":
        """A city that `draw_city` wrote."""
        arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tiles", "bare", "photos"))
        return cls(json.loads((folder / "about.json").read_text(encoding="utf-8")), *arrays)

    def gazetteer(self) -> Gazetteer:
        return Gazetteer({Address(place["street"], place["district"]) for place in self.about})


@dataclass
class Lesson:
    """An image with questions and what is on it.

    Attributes:
        rounds: questions and answers, each to be answered from the image alone.
        words: the words of all names on the image.
        traits: one a kind of `TRAITS`, None where it can't be seen; all None for an image of both views.
        centre: whether the traits are those at the image's centre.
        places: words of the names that the lesson wrote, and the pixel (x, y) at their middle.
    """

    image: Image.Image
    rounds: Rounds
    words: set[str]
    traits: list[str | None]
    centre: bool
    places: list[tuple[str, float, float]] = field(default_factory=list)


def draw_city(seed: int, folder: Path) -> None:
    """Draw the pictures of one city; `about.json` is written last."""
    rng = random.Random(seed)
    world = generate(seed, columns=rng.randint(5, 7), rows=rng.randint(4, 6), coherence=COHERENCE)
    with tempfile.TemporaryDirectory() as maps:
        paths = {key: Path(maps) / key for key in ("streets", "districts", "imagery")}
        write_maps(world, paths)
        imagery = None if seed % DRAWN_MAPS == 0 else paths["imagery"]
        named = TileRenderer(paths["streets"], imagery, TILES)
        bare = TileRenderer(paths["streets"], imagery, TILES.model_copy(update={"names": False}))
        everywhere = list(street_places(world))
        places = [_place(world, (named, bare), place, rng) for place in rng.sample(everywhere, min(PLACES, len(everywhere)))]
    folder.mkdir(parents=True, exist_ok=True)
    for column in ("tiles", "bare", "photos"):
        np.save(folder / f"{column}.npy", np.stack([place.pop(column) for place in places]))
    (folder / "about.json").write_text(json.dumps(places), encoding="utf-8")


def _place(
    world: World, renderers: tuple[TileRenderer, TileRenderer], place: tuple[Street, float, float], rng: random.Random
) -> dict[str, Any]:
    """The pictures of one place and what they show."""
    street, x, y = place
    name, district = address_at(world, street, x, y)
    character = street.block_at(x, y).character
    x, y = x + rng.uniform(-1.5, 1.5), y + rng.uniform(-1.5, 1.5)
    lon, lat = to_degrees(world, np.array([[x, y]]))[0]
    tile, bare = (renderer.tile(lat, lon, name) for renderer in renderers)
    imagery = renderers[0].imagery is not None
    photos, facts, traits = [], [], []
    for heading in rng.sample(view_headings(street, rng), VIEWS):
        photo = photograph(world, x, y, heading, rng.uniform(0.8, 1.12), SIDE)
        fact = graft_facts(
            name, district, lat, lon, compass_heading(world, heading), photo, tile, renderers[0].roads, TILES.delta,
            imagery=imagery,
        )  # fmt: skip
        photos.append(np.asarray(photo))
        facts.append(fact.to_json())
        traits.append(_visible_traits(world, street, character, (x, y), heading, fact.view))
    return {
        "street": name, "district": district, "names": tile.names, "facts": facts, "traits": traits,
        "above": character.traits(from_above=True) if imagery else [],
        "tiles": np.asarray(tile.image), "bare": np.asarray(bare.image), "photos": np.stack(photos),
    }  # fmt: skip


def _visible_traits(
    world: World, street: Street, character: Character, at: tuple[float, float], heading: float, view: str | None
) -> list[str | None]:
    """The traits that a photo shows: trees if the nearest in view is the block's, their spacing and the floors only in a view
    along the street."""
    offset = world.trees[:, :2] - np.array(at, np.float32)
    forward = offset @ np.array([np.cos(heading), np.sin(heading)])
    right = offset @ np.array([np.sin(heading), -np.cos(heading)])
    seen = np.flatnonzero((forward > 3) & (forward < 40) & (abs(right) < 0.9 * forward))
    nearest = world.trees[seen[forward[seen].argmin()]] if len(seen) else None
    block = street.block_at(*at)
    own = nearest is not None and abs((nearest[1] if street.horizontal else nearest[0]) - street.at) < 7
    own = own and nearest is not None and street.block_at(float(nearest[0]), float(nearest[1])) is block
    paving, fronts, crown, gap, floors, windows = character.traits()
    along = view == "along"
    return [paving, fronts, crown if own else None, gap if own and along else None, floors if along else None, windows]


def draw_lesson(cities: list[City], rng: random.Random, shares: Sequence[float] = SHARES) -> Lesson:
    """A random lesson about a random place; `shares` are those of names anywhere, of the map, above, photos and grafts."""
    city = rng.choice(cities)
    number = rng.randrange(len(city.about))
    lesson = rng.choices([_any_names, _map_names, _from_above, _photo, _graft], shares)[0]
    drawn = lesson(city, number, rng)
    drawn.rounds = rng.sample(drawn.rounds, min(MAX_ROUNDS, len(drawn.rounds)))
    return drawn


def _any_names(city: City, number: int, rng: random.Random) -> Lesson:
    """Random names written over a tile without names, turned or mirrored, in half of the cases with a photo in its corner."""
    image = Image.fromarray(city.bare[number])
    if turn := rng.choice([None, *Image.Transpose]):
        image = image.transpose(turn)
    taken = []
    if rng.random() < 0.5:
        image = graft(image, Image.fromarray(_any_photo(city, rng)), TILES.delta)
        taken.append((SIDE // 2, 0, SIDE, SIDE // 2))
    names = [f"{word} {rng.choice(KINDS)}" for word in rng.sample(WORDS, rng.randint(1, MAX_NAMES))]
    places: list[tuple[str, float, float]] = []
    written = [name for name in names if _write(image, name, rng, taken, places)]
    return Lesson(image, _reading(written, rng), _words(written), [None] * len(TRAITS), False, places)


def _map_names(city: City, number: int, rng: random.Random) -> Lesson:
    """A tile with its names."""
    about, image = city.about[number], Image.fromarray(city.tiles[number])
    if rng.random() < 0.5:
        image = graft(image, Image.fromarray(_any_photo(city, rng)), TILES.delta)
    return Lesson(image, own_name(about, rng) + _reading(about["names"], rng), _words(about["names"]), [None] * 6, False)


def own_name(about: dict[str, Any], rng: random.Random) -> Rounds:
    """The question for the street at the centre, if its name is written."""
    return [(rng.choice(CENTRE), about["street"])] if about["street"] in about["names"] else []


def _from_above(city: City, number: int, rng: random.Random) -> Lesson:
    """What the place looks like from above; about a drawn map, its names."""
    about, named = city.about[number], rng.random() < 0.5
    if not about["above"]:
        return _map_names(city, number, rng)
    image = Image.fromarray((city.tiles if named else city.bare)[number])
    rounds = [(rng.choice(ABOVE), described(about["above"])), *_verification(about["above"], rng)]
    return Lesson(image, rounds, _words(about["names"] if named else []), [*about["above"], None, None], True)


def _photo(city: City, number: int, rng: random.Random) -> Lesson:
    """What a photo shows, sometimes with questions about its address, which it does not tell."""
    about, view = city.about[number], rng.randrange(VIEWS)
    traits = about["traits"][view]
    rounds = [(rng.choice(DESCRIBE), described(traits)), *_verification(traits, rng)]
    if rng.random() < 0.15:
        rounds = _localization(about, city, rng)
    return Lesson(Image.fromarray(city.photos[number, view]), rounds, set(), traits, False)


def _graft(city: City, number: int, rng: random.Random) -> Lesson:
    """A photo on a tile: an explanation, the street's name, or whether the photo was taken there."""
    about, view = city.about[number], rng.randrange(VIEWS)
    photo = Image.fromarray(city.photos[number, view])
    if about["above"] and rng.random() < 0.3:
        other = rng.randrange(len(city.about))
        same = rng.random() < 0.5 or city.about[other]["above"] == about["above"]
        named = rng.random() < 0.5
        shown = photo if same else Image.fromarray(city.photos[other, rng.randrange(VIEWS)])
        image = graft(Image.fromarray((city.tiles if named else city.bare)[number]), shown, TILES.delta)
        question = f"{rng.choice(MATCH)} {SUFFIXES['judgment']}"
        return Lesson(image, [(question, "Yes" if same else "No")], _words(about["names"] if named else []), [None] * 6, False)
    image = graft(Image.fromarray(city.tiles[number]), photo, TILES.delta)
    rounds = own_name(about, rng)
    if rounds:
        rounds.append((rng.choice(templates("street", "generation")), about["street"]))
    if rng.random() < 0.5:
        rounds = [(rng.choice(load_prompt().questions), explain(Facts.from_json(about["facts"][view]), rng))]
    elif not rounds:
        rounds = _localization(about, city, rng)
    return Lesson(image, rounds, _words(about["names"]), [None] * 6, False)


def _any_photo(city: City, rng: random.Random) -> np.ndarray:
    photo: np.ndarray = city.photos[rng.randrange(len(city.photos)), rng.randrange(VIEWS)]
    return photo


def described(traits: list[Any]) -> str:
    """The traits that can be seen, as an answer."""
    return f"{', '.join(trait for trait in traits if trait)}."


def _reading(names: list[str], rng: random.Random) -> Rounds:
    """Questions about the names on a tile: all of them in alphabetical order, one that is there or not, one of four."""
    rounds = [(rng.choice(READ), f"{join_words(sorted(names))}." if names else "None.")]
    wrong = [f"{word} {rng.choice(KINDS)}" for word in rng.sample(WORDS, OPTIONS)]
    wrong = [name for name in wrong if name.split()[0] not in _words(names)]
    present = bool(names) and rng.random() < 0.5
    claim = rng.choice(names) if present else wrong[0]
    rounds.append((f"{rng.choice(WRITTEN)} {claim}? {SUFFIXES['judgment']}", "Yes" if present else "No"))
    if names:
        right = rng.choice(names)
        options = rng.sample([right, *wrong[: OPTIONS - 1]], len(wrong[: OPTIONS - 1]) + 1)
        rounds.append((f"{rng.choice(READ)} {SUFFIXES['choice'].format(options='; '.join(options))}", right))
    return rounds


def _verification(traits: list[Any], rng: random.Random) -> Rounds:
    """Judgments and choices about the traits, worded as the questions of stage 2."""
    rounds = []
    for trait, others in ((t, kind) for t, kind in zip(traits, TRAITS, strict=False) if t):
        wrong = rng.sample([other for other in others if other != trait], min(OPTIONS, len(others)) - 1)
        if rng.random() < 0.3:
            options = rng.sample([trait, *wrong], len(wrong) + 1)
            rounds.append((f"{rng.choice(DESCRIBE)} {SUFFIXES['choice'].format(options='; '.join(options))}", trait))
        else:
            true = rng.random() < 0.5
            claim = f"{rng.choice(CLAIMS)} {trait if true else wrong[0]}? {SUFFIXES['judgment']}"
            rounds.append((claim, "Yes" if true else "No"))
    return rounds


def _localization(about: dict[str, Any], city: City, rng: random.Random) -> Rounds:
    address = Address(about["street"], about["district"])
    return [(r["question"], r["answer"]) for r in training_rounds(address, city.gazetteer(), rng, MAX_ROUNDS)]


def _words(names: list[str]) -> set[str]:
    return {word for name in names for word in name.split()}


def _write(
    image: Image.Image,
    name: str,
    rng: random.Random,
    taken: list[tuple[int, int, int, int]],
    places: list[tuple[str, float, float]],
) -> bool:
    """Write a name at a random free place, in any direction; `taken` boxes stay free. Adds its box and its words' places."""
    size, angle = rng.randint(*FONT_SIZES), _angle(rng)
    font, label = _font(size), _label(name, size)
    long, label = label.width, label.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    width, height = label.size
    if width > SIDE or height > SIDE:
        return False
    for _ in range(40):
        x, y = rng.randint(0, SIDE - width), rng.randint(0, SIDE - height)
        box = (x, y, x + width, y + height)
        if all(box[0] >= b[2] or b[0] >= box[2] or box[1] >= b[3] or b[1] >= box[3] for b in taken):
            image.paste(label, (x, y), label)
            taken.append(box)
            word, kind = name.split()
            for text, along in ((word, font.getlength(word) / 2), (kind, long - font.getlength(kind) / 2)):
                forward = along - long / 2  # from the middle of the name, in its direction
                turn = math.radians(angle)
                places.append((text, x + width / 2 + forward * math.cos(turn), y + height / 2 - forward * math.sin(turn)))
            return True
    return False


def _angle(rng: random.Random) -> float:
    """Degrees that a name is turned by: as on maps of this world, mostly level, or along streets of a tilted grid."""
    tilt = rng.uniform(0, 22)
    angle: float = rng.choice([0.0, 0.0, 0.0, tilt, 90 - tilt, rng.uniform(0, 90)])
    return rng.choice([-angle, angle])


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT, size)


@cache
def _label(name: str, size: int) -> Image.Image:
    """A level name with a white rim, on nothing."""
    font = _font(size)
    left, top, right, bottom = font.getbbox(name, stroke_width=2)
    label = Image.new("RGBA", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(label).text((-left, -top), name, TEXT, font, stroke_width=2, stroke_fill="white")
    return label


def main() -> None:
    """Draw the cities of a range of seeds, each into a folder of its own below OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cities", type=int, default=60)
    parser.add_argument("--first-seed", type=int, default=2000)
    args = parser.parse_args()
    for seed in range(args.first_seed, args.first_seed + args.cities):
        if not (args.out / f"{seed}" / "about.json").is_file():
            draw_city(seed, args.out / f"{seed}")
            print(f"toy data: city {seed}", flush=True)


if __name__ == "__main__":
    main()
