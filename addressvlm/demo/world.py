"""A generated city: streets, districts, buildings and trees, in metres, from a seed.

The plan consists of axis-parallel blocks, rotated by `angle`: in the plan frame every wall is a box side, and the map still
looks like a city. A street is recognizable by its paving, trees and windows, a district mostly by its facades, roofs and
heights, both with random variation. Camera and satellite image show the same buildings and trees.
"""

import itertools
import random
from dataclasses import dataclass, field

import numpy as np

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (176, 62, 52), "orange": (214, 126, 58), "yellow": (222, 192, 98), "cream": (228, 214, 184),
    "white": (236, 236, 234), "grey": (142, 142, 144), "dark": (74, 74, 82), "brown": (120, 84, 60), "blue": (88, 118, 168),
    "green": (104, 146, 104),
}  # fmt: skip
CROWNS = {"plane": (92, 128, 58), "cherry": (206, 138, 156), "pine": (38, 84, 62), "maple": (196, 112, 40)}
PAVINGS = {"asphalt": (92, 92, 96), "concrete": (158, 156, 150), "brick": (150, 100, 84), "gravel": (184, 166, 132)}
FLOORS = (2, 3, 4, 5, 6)
WINDOWS = {2.0: "narrow", 3.0: "usual", 4.5: "wide"}  # metres between windows -> word
TREE_GAPS = {9.0: "dense", 14.0: "many", 22.0: "some", 60.0: "few"}  # metres between trees -> word

WORDS = (
    "Oak Mill Church King Queen Park River Hill Station Market Bridge Castle School Garden Forest Lake North South East "
    "West Silver Gold Iron Stone Rose Lily Maple Cedar Pine Elm Ash Birch Willow Chestnut Harbor Ocean Bay Shore Island "
    "Summer Winter Spring Autumn Sun Moon Star Eagle Falcon Swan Heron Wolf Bear Fox Deer Lion Horse Abbey Temple Chapel "
    "College Museum Theater Opera Palace Tower Gate Wall Field Meadow Valley Canyon Prairie Orchard Vineyard Barley Wheat "
    "Copper Amber Pearl Coral Ivory Velvet Linen Cotton Saddle Anchor Lantern Compass Clover Juniper Magnolia Laurel Holly"
).split()
KINDS = ("Street", "Avenue", "Road", "Lane", "Way")
DISTRICTS = (
    "Harbourside Oldtown Riverbend Hillcrest Westgate Eastgate Northfield Southbank Brewery Cathedral Dockyard Greenwood "
    "Lakeview Millbank Parkside Quarry Ropewalk Saltmarsh Tannery Uplands Weavers Kingsmead Foundry Glassworks"
).split()

ROAD_HALF = 4.5  # metres from the centre line to the kerb
FRONT = 8.0  # metres from the centre line to the facades
DEPTH = 13.0  # of a building, in metres


@dataclass
class Character:
    """The typical appearance of a street or district."""

    facade: str
    roof: str
    floors: int
    crown: str
    tree_gap: float  # metres between trees
    paving: str
    windows: float  # metres between windows

    @staticmethod
    def draw(rng: random.Random) -> "Character":
        return Character(
            facade=rng.choice(list(PALETTE)),
            roof=rng.choice(list(PALETTE)),
            floors=rng.choice(FLOORS),
            crown=rng.choice(list(CROWNS)),
            tree_gap=rng.choice(list(TREE_GAPS)),
            paving=rng.choice(list(PAVINGS)),
            windows=rng.choice(list(WINDOWS)),
        )

    def traits(self, district: "Character") -> list[str]:
        """Typical traits of a street of this character in that district, in words, always in this order."""
        return [
            f"{self.paving} road",
            f"{self.crown} trees",
            f"{district.facade} fronts",
            f"{district.roof} roofs",
            f"{district.floors} floors",
            f"{WINDOWS[self.windows]} windows",
            f"{TREE_GAPS[self.tree_gap]} trees",
        ]

    @staticmethod
    def trait_values() -> list[list[str]]:
        """All possible values of each element of `traits`."""
        return [
            [f"{paving} road" for paving in PAVINGS],
            [f"{crown} trees" for crown in CROWNS],
            [f"{colour} fronts" for colour in PALETTE],
            [f"{colour} roofs" for colour in PALETTE],
            [f"{floors} floors" for floors in FLOORS],
            [f"{word} windows" for word in WINDOWS.values()],
            [f"{word} trees" for word in TREE_GAPS.values()],
        ]


@dataclass
class Street:
    """A straight street in the plan frame: along x at y = `at` if `horizontal`, else along y at x = `at`."""

    name: str
    horizontal: bool
    at: float
    start: float
    end: float
    character: Character

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


def generate(seed: int, columns: int = 7, rows: int = 6) -> World:
    """A city of `columns` + `rows` streets."""
    rng = random.Random(seed)
    xs, ys = _lines(rng, columns), _lines(rng, rows)
    width, height = xs[-1] + 60, ys[-1] + 60
    words = rng.sample(WORDS, columns + rows)
    streets = []
    for i, word in enumerate(words):
        horizontal = i >= columns
        at = ys[i - columns] if horizontal else xs[i]
        across = xs if horizontal else ys
        first, last = rng.choice([0, 0, 1]), rng.choice([-1, -1, -2])  # not every street crosses the city
        streets.append(
            Street(f"{word} {rng.choice(KINDS)}", horizontal, at, across[first] - 45, across[last] + 45, Character.draw(rng))
        )
    world = World(rng.uniform(-0.35, 0.35), (width, height), streets, _districts(rng, xs, ys, width, height))
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
                home = district_at(world, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2).character
                boxes.append(box)
                heights.append(3.1 * max(1, _mix(rng, street.character, home).floors + rng.choice([-1, 0, 0, 1])))
                facades.append(_shade(rng, PALETTE[_mix(rng, street.character, home).facade]))
                roofs.append(_shade(rng, PALETTE[_mix(rng, street.character, home).roof]))
                windows.append(street.character.windows)
                along += length
    world.boxes, world.heights = np.array(boxes, np.float32), np.array(heights, np.float32)
    world.facades, world.roofs = np.array(facades, np.float32), np.array(roofs, np.float32)
    world.windows = np.array(windows, np.float32)


def _mix(rng: random.Random, street: Character, district: Character) -> Character:
    """The character that one feature of one building takes: mostly the district's."""
    draw = rng.random()
    return district if draw < 0.7 else street if draw < 0.85 else Character.draw(rng)


def _shade(rng: random.Random, colour: tuple[int, int, int], spread: float = 14) -> list[float]:
    light = rng.uniform(-spread, spread)
    return [min(255.0, max(0.0, c + light + rng.uniform(-6, 6))) for c in colour]


def _plant(world: World, rng: random.Random) -> None:
    """Add street trees; species and spacing are the street's."""
    trees, crowns = [], []
    for street in world.streets:
        for side in (-1, 1):
            along = street.start + rng.uniform(0, street.character.tree_gap)
            while along < street.end:
                x, y = street.point(along)
                offset = side * (ROAD_HALF + 1.2)
                x, y = (x, y + offset) if street.horizontal else (x + offset, y)
                trees.append((x, y, rng.uniform(1.4, 2.3)))
                crowns.append(_shade(rng, CROWNS[street.character.crown]))
                along += street.character.tree_gap * rng.uniform(0.8, 1.3)
    world.trees, world.crowns = np.array(trees, np.float32), np.array(crowns, np.float32)
