"""Write the training data of the toy base model: images of generated cities with conversations about them.

    python -m addressvlm.tools.toy_base_data OUT --cities 100 --first-seed 1000

Each city gives tiles to read names from, photos to describe, claims about them to judge, grafted images to explain, and the
questions of stage 2. The cities are not those of the demo: the base model learns words, colours and how to answer, but none of
the demo's streets. Every image also has `traits`, typical of its place, to pretrain the vision encoder on.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from addressvlm.config.city import TilesConfig
from addressvlm.demo.camera import photograph
from addressvlm.demo.city import address_at, compass_heading, street_places, to_degrees, view_headings, write_maps
from addressvlm.demo.world import Character, World, district_at, generate
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.grafting import encode_jpeg, graft
from addressvlm.labels.facts import graft_facts
from addressvlm.labels.prompt import load_prompt
from addressvlm.labels.templates import explain
from addressvlm.questions import OPTIONS, SUFFIXES, training_rounds
from addressvlm.storage import tables
from addressvlm.tiles.renderer import Tile, TileRenderer

TILES = TilesConfig(side_m=120, pixels=144, font_px=10)  # as in the demo presets
PLACES, EXTRA_TILES = 60, 50  # per city
SCHEMA = tables.with_features(
    tables.pa.schema([("image", tables.IMAGE), ("rounds", tables.ROUNDS), ("traits", tables.pa.list_(tables.pa.string()))])
)
READING = ["Which street names are on this map?", "Read the names on the map.", "Name the streets written on this map."]
TRAITS = [*Character.trait_values(), ["along", "across", "oblique"]]  # possible values of each trait
VERIFICATIONS = 4  # questions about the traits of an image
CLAIMS = ["Is this:", "Do we see:", "What is this street like? Is it:"]
DESCRIBE = ["What do you see?", "Describe this photo.", "What is this street like?"]


def training_rows(seed: int) -> Iterator[dict[str, Any]]:
    """Rows (`image`, `rounds`, `traits`) of one city."""
    rng = random.Random(seed)
    world = generate(seed, columns=rng.randint(5, 7), rows=rng.randint(4, 6))
    with tempfile.TemporaryDirectory() as folder:
        paths = {key: Path(folder) / key for key in ("streets", "districts", "imagery")}
        write_maps(world, paths)
        renderer = TileRenderer(paths["streets"], paths["imagery"], TILES)
        everywhere = list(street_places(world))
        addresses = {Address(*address_at(world, *place)) for place in everywhere}
        gazetteer = Gazetteer(addresses)
        for place in rng.sample(everywhere, min(PLACES, len(everywhere))):
            yield from _place(world, renderer, gazetteer, place, rng)
        for street, x, y in rng.choices(everywhere, k=EXTRA_TILES):
            x, y = x + rng.uniform(-25, 25), y + rng.uniform(-25, 25)
            lon, lat = to_degrees(world, np.array([[x, y]]))[0]
            tile = renderer.tile(lat, lon, street.name)
            if tile.names:
                yield _row(tile.image, [(rng.choice(READING), f"{', '.join(tile.names)}.")], _words(tile))


def _place(
    world: World, renderer: TileRenderer, gazetteer: Gazetteer, place: tuple[Any, float, float], rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Rows of two views of a place, each as a photo and grafted, with a random kind of conversation."""
    street, x, y = place
    address = Address(*address_at(world, street, x, y))
    x, y = x + rng.uniform(-1.5, 1.5), y + rng.uniform(-1.5, 1.5)
    lon, lat = to_degrees(world, np.array([[x, y]]))[0]
    tile = renderer.tile(lat, lon, street.name)
    for heading in rng.sample(view_headings(street, rng), 2):
        photo = photograph(world, x, y, heading, rng.uniform(0.8, 1.12))
        facts = graft_facts(
            address.street, address.district, lat, lon, compass_heading(world, heading), photo, tile,
            renderer.roads, TILES.delta,
        )  # fmt: skip
        traits = [*street.character.traits(district_at(world, *place[1:]).character), facts.view or ""]
        conversations = [
            _localization(address, gazetteer, rng),
            [(rng.choice(DESCRIBE), f"{', '.join(traits)}.")],
            _verification(traits, rng),
        ]
        yield _row(photo, rng.choices(conversations, [0.15, 0.35, 0.5])[0], traits)
        explanation = [(rng.choice(load_prompt().questions), explain(facts, rng))]
        rounds = rng.choices(
            [_localization(address, gazetteer, rng), explanation, _verification(traits, rng)], [0.2, 0.5, 0.3]
        )[0]
        yield _row(graft(tile.image, photo, TILES.delta), rounds, [*traits, *_words(tile)])


def _verification(traits: list[str], rng: random.Random) -> list[tuple[str, str]]:
    """Judgments and choices about the traits, worded as the questions of stage 2."""
    rounds = []
    for trait, others in rng.sample([(t, kind) for t, kind in zip(traits, TRAITS, strict=True) if t], VERIFICATIONS):
        wrong = rng.sample([other for other in others if other != trait], min(OPTIONS, len(others)) - 1)
        if rng.random() < 0.3:
            options = [trait, *wrong]
            rng.shuffle(options)
            rounds.append((f"{rng.choice(DESCRIBE)} {SUFFIXES['choice'].format(options='; '.join(options))}", trait))
        else:
            true = rng.random() < 0.5
            claim = f"{rng.choice(CLAIMS)} {trait if true else wrong[0]}? {SUFFIXES['judgment']}"
            rounds.append((claim, "Yes" if true else "No"))
    return rounds


def _words(tile: Tile) -> list[str]:
    return [name.split()[0] for name in tile.names]


def _localization(address: Address, gazetteer: Gazetteer, rng: random.Random) -> list[tuple[str, str]]:
    return [(r["question"], r["answer"]) for r in training_rounds(address, gazetteer, rng)]


def _row(image: Image.Image, rounds: list[tuple[str, str]], traits: list[str]) -> dict[str, Any]:
    turns = [{"level": "", "kind": "", "question": q, "answer": a, "options": []} for q, a in rounds]
    return {"image": {"bytes": encode_jpeg(image, 90), "path": None}, "rounds": turns, "traits": traits}


def main() -> None:
    """Write the data of a range of seeds as `<OUT>/train-NNNNN.parquet`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cities", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=1000)
    args = parser.parse_args()
    for seed in range(args.first_seed, args.first_seed + args.cities):
        name = f"train-{seed:05d}"
        if not list(args.out.glob(f"{name}-*.parquet")):
            count = tables.write_table(args.out, name, training_rows(seed), SCHEMA)
            print(f"toy data: city {seed}, {count} rows", flush=True)


if __name__ == "__main__":
    main()
