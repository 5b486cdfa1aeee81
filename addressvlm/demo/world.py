"""A generated city: streets, districts, buildings and trees, in metres, from a seed.

Streets are axis-parallel, rotated by `angle`: in the plan frame every wall is a box side, and the map still looks like a city.
Each block of a street (the stretch between two crossings) has traits of its own; a share of them, `COHERENCE`, is that of its
street (paving, trees) or its district (fronts, windows, floors). Roofs have the colour of the fronts, so that fronts, paving
and trees can be seen both from the street and from above: whoever knows the map knows what a block looks like that nobody has
photographed.
"""

import itertools
import random
from dataclasses import asdict, dataclass, field

import numpy as np

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (176, 62, 52), "orange": (214, 126, 58), "yellow": (222, 192, 98), "cream": (228, 214, 184),
    "white": (236, 236, 234), "grey": (142, 142, 144), "dark": (74, 74, 82), "brown": (120, 84, 60), "blue": (88, 118, 168),
    "green": (104, 146, 104),
}  # fmt: skip
CROWNS = {"plane": (92, 128, 58), "cherry": (206, 138, 156), "pine": (38, 84, 62), "maple": (196, 112, 40)}
PAVINGS = {"asphalt": (92, 92, 96), "concrete": (158, 156, 150), "brick": (150, 100, 84), "gravel": (184, 166, 132)}
FLOORS = (2, 3, 4, 5, 6)
WINDOWS = {1.6: "narrow", 2.8: "usual", 5.0: "wide"}  # metres between windows -> word
TREE_GAPS = {6.0: "dense", 13.0: "some", 28.0: "few"}  # metres between trees -> word

WORDS = (
    "Oak Mill Church King Queen Park River Hill Station Market Bridge Castle School Garden Forest Lake North South East "
    "West Silver Gold Iron Stone Rose Lily Maple Cedar Pine Elm Ash Birch Willow Hazel Harbor Ocean Bay Shore Island "
    "Summer Winter Spring Autumn Sun Moon Star Eagle Falcon Swan Heron Wolf Bear Fox Deer Lion Horse Abbey Temple Chapel "
    "College Museum Theater Opera Palace Tower Gate Wall Field Meadow Valley Canyon Prairie Orchard Clay Barley Wheat "
    "Copper Amber Pearl Coral Ivory Velvet Linen Cotton Saddle Anchor Lantern Compass Clover Juniper Myrtle Laurel Holly"
).split()
KINDS = ("Street", "Avenue", "Road", "Lane", "Way")
DISTRICTS = (
    "Harbourside Oldtown Riverbend Hillcrest Westgate Eastgate Northfield Southbank Brewery Cathedral Dockyard Greenwood "
    "Lakeview Millbank Parkside Quarry Ropewalk Saltmarsh Tannery Uplands Weavers Kingsmead Foundry Glassworks"
).split()

ROAD_HALF = 4.5  # metres from the centre line to the kerb
FRONT = 8.0  # metres from the centre line to the facades
DEPTH = 13.0  # of a building, in metres
COHERENCE = 0.6  # share of a block's traits that are its street's or its district's
STRAY = 0.1  # share of buildings whose colour or height is not their block's


@dataclass(frozen=True)
class Character:
    """The typical appearance of a block, street or district."""

    facade: str  # and roof
    floors: int
    crown: str
    tree_gap: float  # metres between trees
    paving: str
    windows: float  # metres between windows

    @staticmethod
    def draw(rng: random.Random) -> "Character":
        return Character(
            facade=rng.choice(list(PALETTE)),
            floors=rng.choice(FLOORS),
            crown=rng.choice(list(CROWNS)),
            tree_gap=rng.choice(list(TREE_GAPS)),
            paving=rng.choice(list(PAVINGS)),
            windows=rng.choice(list(WINDOWS)),
        )

    @staticmethod
    def of_block(rng: random.Random, street: "Character", district: "Character", coherence: float) -> "Character":
        """Each trait is drawn anew, or with probability `coherence` that of the street or district."""
        drawn = asdict(Character.draw(rng))
        owners = {"facade": district, "floors": district, "windows": district}
        for trait in drawn:
            if rng.random() < coherence:
                drawn[trait] = getattr(owners.get(trait, street), trait)
        return Character(**drawn)

    def traits(self, from_above: bool = False) -> list[str]:
        """The traits in words, always in this order; from above without windows and floors."""
        shared = [
            f"{self.paving} road", f"{self.facade} fronts", f"{self.crown} trees", f"{TREE_GAPS[self.tree_gap]} trees",
        ]  # fmt: skip
        return shared if from_above else [*shared, f"{self.floors} floors", f"{WINDOWS[self.windows]} windows"]

    @staticmethod
    def trait_values() -> list[list[str]]:
        """All possible values of each element of `traits`."""
        return [
            [f"{paving} road" for paving in PAVINGS],
            [f"{colour} fronts" for colour in PALETTE],
            [f"{crown} trees" for crown in CROWNS],
            [f"{word} trees" for word in TREE_GAPS.values()],
            [f"{floors} floors" for floors in FLOORS],
            [f"{word} windows" for word in WINDOWS.values()],
        ]


@dataclass(frozen=True)
class Block:
    """The stretch of a street from `start` to `end`, metres along it, with the buildings and trees on both sides."""

    start: float
    end: float
    character: Character


@dataclass
class Street:
    """A straight street in the plan frame: along x at y = `at` if `horizontal`, else along y at x = `at`."""

    name: str
    horizontal: bool
    at: float
    start: float
    end: float
    blocks: list[Block]

    def block_at(self, x: float, y: float) -> Block:
        """The block beside a point of the plan frame; beyond the street's ends the nearest."""
        along = x if self.horizontal else y
        return next((block for block in self.blocks if along < block.end), self.blocks[-1])

    def point(self, along: float) -> tuple[float, float]:
        return (along, self.at) if self.horizontal else (self.at, along)


@dataclass
class District:
    name: str
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in the plan frame
    character: Character


@dataclass
class World:
    """A city; arrays are in the plan frame, metres, float32."""

    angle: float  # radians, plan frame to east/north
    size: tuple[float, float]
    streets: list[Street]
    districts: list[District]
    north: float = 0.0  # metres from the common origin to its centre
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))  # N x (x0, y0, x1, y1)
    heights: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # N
    facades: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.float32))  # N x RGB
    roofs: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.float32))  # N x RGB
    windows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # N, metres between windows
    trees: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.float32))  # M x (x, y, crown radius)
    crowns: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.float32))  # M x RGB

    def to_ground(self, points: np.ndarray) -> np.ndarray:
        """Plan frame (N, 2) to metres east and north of the city's centre (N, 2)."""
        centred = np.asarray(points, float) - np.array(self.size) / 2
        c, s = np.cos(self.angle), np.sin(self.angle)
        return centred @ np.array([[c, s], [-s, c]])


def generate(seed: int, columns: int = 7, rows: int = 6, coherence: float = COHERENCE) -> World:
    """A city of `columns` + `rows` streets, whose blocks have a share `coherence` of the traits of their street or district."""
    rng = random.Random(seed)
    xs, ys = _lines(rng, columns), _lines(rng, rows)
    width, height = xs[-1] + 60, ys[-1] + 60
    words = rng.sample(WORDS, columns + rows)
    districts = _districts(rng, xs, ys, width, height)
    world = World(rng.uniform(-0.35, 0.35), (width, height), [], districts)
    for i, word in enumerate(words):
        horizontal = i >= columns
        at = ys[i - columns] if horizontal else xs[i]
        across = xs if horizontal else ys
        first, last = rng.choice([0, 0, 1]), rng.choice([-1, -1, -2])  # not every street crosses the city
        start, end = across[first] - 45, across[last] + 45
        street = Street(f"{word} {rng.choice(KINDS)}", horizontal, at, start, end, [])
        typical = Character.draw(rng)
        for low, high in itertools.pairwise([start, *(a for a in across if start < a < end), end]):
            home = district_at(world, *street.point((low + high) / 2)).character
            street.blocks.append(Block(low, high, Character.of_block(rng, typical, home, coherence)))
        world.streets.append(street)
    _build(world, rng, xs, ys)
    _plant(world, rng)
    return world


def _lines(rng: random.Random, count: int) -> list[float]:
    """Positions of parallel streets, 85 to 135 m apart."""
    positions = [60.0]
    while len(positions) < count:
        positions.append(positions[-1] + rng.uniform(85, 135))
    return positions


def _districts(rng: random.Random, xs: list[float], ys: list[float], width: float, height: float) -> list[District]:
    """2 x 2 districts (3 x 2 in a wide city) with borders between streets."""
    cuts_x = [0.0, *((xs[i] + xs[i + 1]) / 2 for i in ([1, 4] if len(xs) > 6 else [len(xs) // 2 - 1])), width]
    cuts_y = [0.0, (ys[len(ys) // 2 - 1] + ys[len(ys) // 2]) / 2, height]
    cells = [(x0, y0, x1, y1) for x0, x1 in itertools.pairwise(cuts_x) for y0, y1 in itertools.pairwise(cuts_y)]
    names = rng.sample(DISTRICTS, len(cells))
    return [District(name, cell, Character.draw(rng)) for name, cell in zip(names, cells, strict=False)]


def district_at(world: World, x: float, y: float) -> District:
    """The district of a point in the plan frame; for a point outside the nearest."""
    x, y = min(max(x, 0.0), world.size[0]), min(max(y, 0.0), world.size[1])
    return next(d for d in world.districts if d.box[0] <= x <= d.box[2] and d.box[1] <= y <= d.box[3])


def _build(world: World, rng: random.Random, xs: list[float], ys: list[float]) -> None:
    """Add buildings on both sides of every street, none at the crossings."""
    boxes, heights, facades, roofs, windows = [], [], [], [], []
    for street in world.streets:
        crossings = xs if street.horizontal else ys
        for side in (-1, 1):
            along = street.start
            while along < street.end - 8:
                length = rng.uniform(9, 20)
                if min(abs(c - along - length / 2) for c in crossings) < FRONT + length / 2:
                    along += 3
                    continue
                a0, a1 = along, along + length - rng.choice([0.0, 0.0, 2.5])
                b0, b1 = sorted((street.at + side * FRONT, street.at + side * (FRONT + DEPTH * rng.uniform(0.8, 1.1))))
                box = (a0, b0, a1, b1) if street.horizontal else (b0, a0, b1, a1)
                block = street.block_at(*street.point(along + length / 2)).character
                colour = _stray(rng, block, Character.draw(rng)).facade
                boxes.append(box)
                heights.append(3.1 * _stray(rng, block, Character.draw(rng)).floors)
                facades.append(_shade(rng, PALETTE[colour]))
                roofs.append(_shade(rng, PALETTE[colour]))
                windows.append(block.windows)
                along += length
    world.boxes, world.heights = np.array(boxes, np.float32), np.array(heights, np.float32)
    world.facades, world.roofs = np.array(facades, np.float32), np.array(roofs, np.float32)
    world.windows = np.array(windows, np.float32)


def _stray(rng: random.Random, block: Character, other: Character) -> Character:
    return other if rng.random() < STRAY else block


def _shade(rng: random.Random, colour: tuple[int, int, int], spread: float = 14) -> list[float]:
    light = rng.uniform(-spread, spread)
    return [min(255.0, max(0.0, c + light + rng.uniform(-6, 6))) for c in colour]


def _plant(world: World, rng: random.Random) -> None:
    """Add street trees; species and spacing are the block's."""
    trees, crowns = [], []
    for street in world.streets:
        for block, side in itertools.product(street.blocks, (-1, 1)):
            gap = block.character.tree_gap
            along = block.start + FRONT + rng.uniform(0, gap)
            while along < block.end - FRONT:
                x, y = street.point(along)
                offset = side * (ROAD_HALF + 1.2)
                x, y = (x, y + offset) if street.horizontal else (x + offset, y)
                trees.append((x, y, rng.uniform(1.6, 2.4)))
                crowns.append(_shade(rng, CROWNS[block.character.crown]))
                along += gap * rng.uniform(0.85, 1.15)
    world.trees, world.crowns = np.array(trees, np.float32), np.array(crowns, np.float32)
