"""Train, validation and test places: in stratified blocks with a buffer, at random as in the papers, or as the table says.

Blocks (of the table's column `block`, or square cells of the city) go to the test split, then to validation, in an order drawn
by seed, until each address (street and district) has given its share of places: so that no address is common in training and
rare in the test. A buffer keeps neighbouring views from leaking. An address always keeps a training place, since a model can't
answer with one that it was never trained on; where blocks as large as the settings say fail, halves and quarters are tried.
The training places can be thinned, by block, place and view, to study the effect of density (paper 001, Fig. 5).
"""

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import shapely
from numpy.typing import NDArray

from addressvlm.config.city import CityConfig
from addressvlm.dataset.geocoding import Place
from addressvlm.dataset.photos import Photo
from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import Address

Ints = NDArray[np.int64]
MIN_BLOCK_M = 5.0

Part = Literal["train", "val", "test", "aside"]
TABLE_PARTS: dict[str, Part] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}  # words of a table's column `split`


@dataclass(frozen=True)
class PlaceSplit:
    """The split of each place.

    Attributes:
        part: place id -> its split; "aside" places are in none.
        reason: place id -> why it is aside.
        min_distance_m: the smallest distance from a training place to a validation or test place, None without either.
        map_only: addresses that thinning left without a training place: the model knows them from the map alone.
    """

    part: dict[str, Part]
    reason: dict[str, str]
    min_distance_m: float | None
    map_only: tuple[Address, ...] = ()

    def count(self, part: Part) -> int:
        """Number of places in a split."""
        return sum(p == part for p in self.part.values())


def split_places(places: Sequence[Place], city: CityConfig, seed: int, photos: Iterable[Photo] = ()) -> PlaceSplit:
    """Split by the city's settings; the same places and seed give the same split.

    Unless the table's own split is taken, every address of a validation or test place has a training place before thinning.
    Density is applied last and with draws of its own, so that validation and test places do not depend on it.

    Args:
        photos: of these places; their `block` and `split`.

    Raises:
        InputError: the split is to be the table's, and it has none.
    """
    places = sorted(places, key=lambda p: p.id)
    columns: dict[str, dict[str, set[str]]] = {"block": defaultdict(set), "split": defaultdict(set)}
    for photo in photos:
        columns["block"][photo.place].add(photo.block)
        columns["split"][photo.place].add(photo.split)
    blocks = [min(columns["block"].get(p.id, {""})) for p in places]
    splitter = _Splitter(places, city.split_buffer_m if city.split_method == "blocks" else 0.0, blocks)
    rng = random.Random(seed)
    if city.split_method == "table":
        splitter.take([columns["split"].get(p.id, {""}) for p in places])
    elif city.split_method == "random":
        splitter.draw({"test": city.split.test, "val": city.split.val}, rng)
    else:
        splitter.fill("test", city.split.test, city.split_block_m, rng)
        splitter.fill("val", city.split.val, city.split_block_m, rng)
    before = {address for address, part in zip(splitter.addresses, splitter.part, strict=True) if part == "train"}
    splitter.thin_blocks(city.density.blocks, city.split_block_m, random.Random(f"{seed}:blocks"))
    splitter.thin(city.density.places, random.Random(f"{seed}:density"))
    after = {address for address, part in zip(splitter.addresses, splitter.part, strict=True) if part == "train"}
    ids = [p.id for p in places]
    return PlaceSplit(
        part=dict(zip(ids, splitter.part.tolist(), strict=True)),
        reason={ids[i]: reason for i, reason in sorted(splitter.reason.items())},
        min_distance_m=splitter.min_distance(),
        map_only=tuple(sorted(before - after)),
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

    def __init__(self, places: Sequence[Place], split_buffer_m: float, blocks: Sequence[str]) -> None:
        self.blocks = blocks if any(blocks) else None  # of the table
        self.xy = np.array([[p.x, p.y] for p in places]).reshape(-1, 2)
        self.points = shapely.points(self.xy)
        self.addresses = [p.address for p in places]
        self.split_buffer_m = split_buffer_m
        self.part = np.full(len(places), "train", dtype="<U5")  # a Part each
        self.reason: dict[int, str] = {}
        self.train_counts = Counter(self.addresses)  # address -> number of its training places
        self.tree = shapely.STRtree(self.points)

    def near(self, places: Iterable[int]) -> tuple[Ints, Ints]:
        """Pairs of one of these places and another place within the buffer; searched for when needed, all would be too many."""
        asked = np.array(list(places), dtype=np.int64)
        if not len(asked) or self.split_buffer_m <= 0:
            return asked[:0], asked[:0]
        index, other = self.tree.query(self.points[asked], predicate="dwithin", distance=self.split_buffer_m)
        place = asked[index]
        within = (place != other) & (np.hypot(*(self.xy[place] - self.xy[other]).T) < self.split_buffer_m)
        return place[within], other[within]

    def take(self, named: Sequence[set[str]]) -> None:
        """The split that the table gives each place.

        Raises:
            InputError: it gives none.
        """
        if not any(any(values) for values in named):
            raise InputError("the table has no column split: add one (train, val, test), or set city.split_method to blocks.")
        for i, values in enumerate(named):
            known = {TABLE_PARTS.get(value.lower()) for value in values}
            part = next(iter(known)) if len(known) == 1 else None
            self.part[i] = part or "aside"
            if part is None:
                self.reason[i] = f"the table's split is {' and '.join(repr(value) for value in sorted(values))}"

    def draw(self, shares: Mapping[Literal["val", "test"], float], rng: random.Random) -> None:
        """Places at random, without a buffer; the first place drawn of each address is for training."""
        order = list(range(len(self.part)))
        rng.shuffle(order)
        first = {self.addresses[i]: i for i in reversed(order)}
        free = [i for i in order if first[self.addresses[i]] != i]
        for part, share in shares.items():
            target = round(share * len(order))
            for i in free[:target]:
                self.part[i] = part
            free = free[target:]

    def fill(self, part: Literal["val", "test"], share: float, split_block_m: float, rng: random.Random) -> None:
        """Move blocks to the split until each address has given about this share of its places."""
        missing = self._quotas(share, rng)
        least = min(split_block_m, max(MIN_BLOCK_M, min(self.split_buffer_m, split_block_m)))
        sides = itertools.takewhile(lambda side: side >= least, (split_block_m / 2**n for n in itertools.count()))
        for side in [split_block_m] if self.blocks else sides:
            for block in self._cells(range(len(self.part)), side, rng):
                free = [i for i in block if self.part[i] in ("train", "aside")]
                place, other = self.near(free)
                taken = set(place[np.isin(self.part[other], ("train", "aside", part), invert=True)].tolist())
                members = [i for i in free if i not in taken]
                counts = Counter(self.addresses[i] for i in members)
                if self.blocks:  # whole or not at all
                    members = members if len(members) < 2 * sum(max(0, missing[address]) for address in counts) else []
                else:
                    members = [i for i in members if counts[self.addresses[i]] < 2 * missing[self.addresses[i]]]
                around = set(other[np.isin(place, members) & (self.part[other] == "train")].tolist()).difference(members)
                if not members or not self._keeps_addresses_trained(members, around):
                    continue
                for m in members:
                    missing[self.addresses[m]] -= 1
                    if self.part[m] == "train":
                        self.train_counts[self.addresses[m]] -= 1
                    self.part[m] = part
                    self.reason.pop(m, None)
                for i in sorted(around):
                    self.train_counts[self.addresses[i]] -= 1
                    self.part[i] = "aside"
                    self.reason[i] = f"nearer than {self.split_buffer_m:g} m to a {part} place"

    def thin_blocks(self, share: float, side: float, rng: random.Random) -> None:
        """Put the training places of whole blocks aside until this share of the blocks remains, at least one.

        The order of the blocks is drawn once: a smaller share selects a subset of a larger one.
        """
        blocks = self._cells([i for i, part in enumerate(self.part) if part == "train"], side, rng)
        for i in itertools.chain(*blocks[max(1, round(share * len(blocks))) :]):
            self.part[i] = "aside"
            self.reason[i] = f"thinned to {share:g} of the training blocks"

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
        train = self.points[self.part == "train"]
        others = self.points[np.isin(self.part, ("val", "test"))]
        if not len(train) or not len(others):
            return None
        _, distances = shapely.STRtree(train).query_nearest(others, return_distance=True, all_matches=False)
        return float(distances.min())

    def _quotas(self, share: float, rng: random.Random) -> Counter[Address]:
        """How many places each address is to give: the share of its places, rounded so that the sum is right."""
        counts = Counter(self.addresses)
        exact = {address: share * n for address, n in sorted(counts.items())}
        quotas = Counter({address: int(value) for address, value in exact.items()})
        order = sorted(exact, key=lambda address: (quotas[address] - exact[address], rng.random()))
        quotas.update(order[: round(share * len(self.addresses)) - quotas.total()])
        return quotas

    def _cells(self, among: Iterable[int], side: float, rng: random.Random) -> list[list[int]]:
        """Some places by the table's block, else by cells of this side, the grid and the order drawn by rng."""
        shift = np.array([rng.uniform(0, side), rng.uniform(0, side)])
        keys: Sequence[Any] = self.blocks or list(map(tuple, np.floor((self.xy + shift) / side).astype(int)))
        cells = defaultdict(list)
        for i in among:
            cells[keys[i]].append(i)
        blocks = [cells[cell] for cell in sorted(cells)]
        rng.shuffle(blocks)
        return blocks

    def _keeps_addresses_trained(self, members: list[int], around: set[int]) -> bool:
        """Whether each address in the block, and each that its buffer takes places from (`around`), keeps a training place."""
        loss = Counter(self.addresses[i] for i in (*members, *around) if self.part[i] == "train")
        touched = set(loss) | {self.addresses[m] for m in members}
        return all(self.train_counts[address] > loss[address] for address in touched)
