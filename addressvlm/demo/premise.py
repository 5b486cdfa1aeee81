"""Can a map tell more than photos do? Two look-ups on the true traits of a toy city's blocks, before anything is trained.

    python -m addressvlm.demo.premise

A part of the blocks is photographed. A photo of any other block is looked up by its traits: among the photographed blocks, by
all that a photo shows, or among all blocks of the map, by what is seen from above. Only where the second is far better can
training on the map help a model at all.
"""

import random
from collections.abc import Sequence

from addressvlm.demo.city import address_at
from addressvlm.demo.world import Block, Street, World, generate

SHARES = (0.25, 0.5, 0.75)  # of the blocks that are photographed
DRAWS = 20  # of the photographed blocks
Labelled = tuple[list[str], tuple[str, str]]  # traits and address of a block


def lookup_accuracy(world: World, share: float, rng: random.Random) -> tuple[float, float]:
    """Shares of the blocks without photos whose address is found among the photographed blocks, and on the map."""
    blocks = [(block, _address(world, street, block)) for street in world.streets for block in street.blocks]
    photographed = set(rng.sample(range(len(blocks)), round(share * len(blocks))))
    seen = [(block.character.traits(), address) for i, (block, address) in enumerate(blocks) if i in photographed]
    mapped = [(block.character.traits(from_above=True), address) for block, address in blocks]
    known = {address[0] for _, address in seen}
    queries = [blocks[i] for i in range(len(blocks)) if i not in photographed and blocks[i][1][0] in known]
    found = [[_found(block.character.traits(), address, among) for block, address in queries] for among in (seen, mapped)]
    by_photos, by_map = (sum(one) / len(one) for one in found)
    return by_photos, by_map


def _address(world: World, street: Street, block: Block) -> tuple[str, str]:
    return address_at(world, street, *street.point((block.start + block.end) / 2))


def _found(traits: list[str], address: tuple[str, str], among: Sequence[Labelled]) -> float:
    """The chance that a block drawn from those with the most traits in common has this address."""
    common = [len(set(traits) & set(others)) for others, _ in among]
    best = [other for n, (_, other) in zip(common, among, strict=True) if n == max(common)]
    return sum(other == address for other in best) / len(best)


def main() -> None:
    """Print a table for the world of the demo."""
    print("| share of blocks photographed | by photographed blocks | by the map |\n|---:|---:|---:|")
    for share in SHARES:
        rng = random.Random(0)
        by_photos, by_map = zip(*(lookup_accuracy(generate(1), share, rng) for _ in range(DRAWS)), strict=True)
        print(f"| {share:.0%} | {sum(by_photos) / DRAWS:.0%} | {sum(by_map) / DRAWS:.0%} |")


if __name__ == "__main__":
    main()
