"""Train, validation and test places, in blocks, with a buffer between them so that neighbouring views can't leak.

Blocks (square cells of the city) go to the test split, then to validation, in an order drawn by seed. A block is moved only
if every address (street and district) in it keeps a training place, since a model can't answer with an address that it was
never trained on; where blocks as large as the settings say fail, halves and quarters of them are tried.
The training places can be thinned, by place and by view, to study the effect of density (paper 001, Fig. 5).
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import shapely

from addressvlm.config.city import CityConfig
from addressvlm.dataset.geocoding import Place
from addressvlm.dataset.photos import Photo
from addressvlm.gazetteer.gazetteer import Address

MIN_BLOCK_M = 5.0

Part = Literal["train", "val", "test", "aside"]


@dataclass(frozen=True)
class PlaceSplit:
    """The split of each place.

    Attributes:
        part: place id -> its split; "aside" places are in none.
        reason: place id -> why it is aside.
        min_distance_m: the smallest distance from a training place to a validation or test place, None without either.
    """

    part: dict[str, Part]
    reason: dict[str, str]
    min_distance_m: float | None

    def count(self, part: Part) -> int:
        """Number of places in a split."""
        return sum(p == part for p in self.part.values())


def split_places(places: Sequence[Place], city: CityConfig, seed: int) -> PlaceSplit:
    """Split by the shares, block, buffer and density of the city's settings; the same places and seed give the same split.

    Every address of a validation or test place keeps a training place.
    Density is applied last and with draws of its own, so that validation and test places do not depend on it.
    """
    places = sorted(places, key=lambda p: p.id)
    splitter = _Splitter(places, city.split_buffer_m)
    rng = random.Random(seed)
    splitter.fill("test", round(city.split.test * len(places)), city.split_block_m, rng)
    splitter.fill("val", round(city.split.val * len(places)), city.split_block_m, rng)
    splitter.thin(city.density.places, random.Random(f"{seed}:density"))
    ids = [p.id for p in places]
    return PlaceSplit(
        part=dict(zip(ids, splitter.part, strict=True)),
        reason={ids[i]: reason for i, reason in sorted(splitter.reason.items())},
        min_distance_m=splitter.min_distance(),
    )


def thin_views(photos: Sequence[Photo], part: Mapping[str, Part], share: float, seed: int) -> list[Photo]:
    """The photos with a share of the views of each training place, at least one; other places keep all.

    Args:
        photos: of places in `part`; their order stays.
        part: place id -> its part, as in `PlaceSplit`.
        share: in (0, 1]; a smaller share selects a subset of a larger one.
    """
    views = defaultdict(list)
    for photo in photos:
        if part[photo.place] == "train":
            views[photo.place].append(photo.id)
    dropped: set[str] = set()
    for place, ids in views.items():
        order = sorted(ids)
        random.Random(f"{seed}:{place}").shuffle(order)
        dropped.update(order[max(1, round(share * len(order))) :])
    return [photo for photo in photos if photo.id not in dropped]


class _Splitter:
    """The split in progress; places are identified by their index."""

    def __init__(self, places: Sequence[Place], split_buffer_m: float) -> None:
        self.xy = np.array([[p.x, p.y] for p in places]).reshape(-1, 2)
        self.points = shapely.points(self.xy)
        self.addresses = [p.address for p in places]
        self.split_buffer_m = split_buffer_m
        self.part: list[Part] = ["train"] * len(places)
        self.reason: dict[int, str] = {}
        self.train_counts = Counter(self.addresses)  # address -> number of its training places
        self.near: list[list[int]] = [[] for _ in places]  # the others within the buffer
        if split_buffer_m > 0 and places:
            tree = shapely.STRtree(self.points)
            for i, j in tree.query(self.points, predicate="dwithin", distance=split_buffer_m).T:
                if i != j and np.hypot(*(self.xy[i] - self.xy[j])) < split_buffer_m:
                    self.near[i].append(int(j))

    def fill(self, part: Literal["val", "test"], target: int, split_block_m: float, rng: random.Random) -> None:
        """Move blocks to the split until it has about `target` places."""
        side, count = split_block_m, 0
        while side >= max(MIN_BLOCK_M, min(self.split_buffer_m, split_block_m)):
            for block in self._blocks(side, rng):
                missing = target - count
                if missing <= 0:
                    return
                members = [
                    i for i in block
                    if self.part[i] in ("train", "aside") and {self.part[j] for j in self.near[i]} <= {"train", "aside", part}
                ]  # fmt: skip
                if members and len(members) < 2 * missing and self._keeps_addresses_trained(members):
                    for m in members:
                        if self.part[m] == "train":
                            self.train_counts[self.addresses[m]] -= 1
                        self.part[m] = part
                        self.reason.pop(m, None)
                    for i in sorted({j for m in members for j in self.near[m] if self.part[j] == "train"}):
                        self.train_counts[self.addresses[i]] -= 1
                        self.part[i] = "aside"
                        self.reason[i] = f"nearer than {self.split_buffer_m:g} m to a {part} place"
                    count += len(members)
            side /= 2

    def thin(self, share: float, rng: random.Random) -> None:
        """Put training places aside until this share remains, and one more for each address that would have none.

        The order of the places is drawn once: a smaller share selects a subset of a larger one.
        """
        order = [i for i, part in enumerate(self.part) if part == "train"]
        rng.shuffle(order)
        target = round(share * len(order))
        trained: set[Address] = set()
        for rank, i in enumerate(order):
            if rank >= target and self.addresses[i] in trained:
                self.part[i] = "aside"
                self.reason[i] = f"thinned to {share:g} of the training places"
            trained.add(self.addresses[i])

    def min_distance(self) -> float | None:
        """Smallest distance from a training place to a validation or test place."""
        train = self.points[[p == "train" for p in self.part]]
        others = self.points[[p in ("val", "test") for p in self.part]]
        if not len(train) or not len(others):
            return None
        _, distances = shapely.STRtree(train).query_nearest(others, return_distance=True, all_matches=False)
        return float(distances.min())

    def _blocks(self, side: float, rng: random.Random) -> list[list[int]]:
        """Places by cells of this side, the grid and the order drawn by rng."""
        shift = np.array([rng.uniform(0, side), rng.uniform(0, side)])
        cells = defaultdict(list)
        for i, cell in enumerate(np.floor((self.xy + shift) / side).astype(int)):
            cells[tuple(cell)].append(i)
        blocks = [cells[cell] for cell in sorted(cells)]
        rng.shuffle(blocks)
        return blocks

    def _keeps_addresses_trained(self, members: list[int]) -> bool:
        """Whether each address in the block, and each that its buffer takes places from, keeps a training place."""
        leaving = {i for m in members for i in (m, *self.near[m]) if self.part[i] == "train"}
        loss = Counter(self.addresses[i] for i in leaving)
        touched = set(loss) | {self.addresses[m] for m in members}
        return all(self.train_counts[address] > loss[address] for address in touched)
