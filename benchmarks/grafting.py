"""How much faster photos are grafted than by a plain Pillow loop; both take turns, the median ratio of CPU times counts.

    python benchmarks/grafting.py
    python benchmarks/grafting.py --photo-side 1920 --places 10

The plain loop opens each photo at full size, resizes it, pastes it onto the tile and encodes the result as JPEG.
"""

import argparse
import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from addressvlm.config import TilesConfig
from addressvlm.demo.camera import photograph
from addressvlm.demo.city import places, to_degrees, views, write_maps
from addressvlm.demo.world import generate
from addressvlm.grafting import decode_photo, encode, graft, grafted_size
from addressvlm.maps.tiles import TileRenderer

CITY_SEED = 1
TILES = TilesConfig()  # 336 px, as in paper 001


@dataclass(frozen=True)
class Spot:
    """A place of the toy city and its encoded photos."""

    lat: float
    lon: float
    street: str
    photos: list[bytes]


def spots(count: int, side: int, folder: Path) -> tuple[list[Spot], TileRenderer]:
    """`count` places with four photos each of `side` x `side` pixels, and what draws their tiles."""
    world, rng = generate(CITY_SEED), random.Random(CITY_SEED)
    paths = {key: folder / key for key in ("streets", "districts", "imagery")}
    write_maps(world, paths)
    found = []
    for street, x, y in rng.sample(list(places(world)), count):
        lon, lat = to_degrees(world, np.array([[x, y]]))[0]
        photos = [encode(photograph(world, x, y, heading, 1.0, side), 88) for heading in views(street, rng)]
        found.append(Spot(float(lat), float(lon), street.name, photos))
    return found, TileRenderer(paths["streets"], paths["imagery"], TILES)


def plain(tile: Image.Image, photo: bytes) -> bytes:
    """Open, resize, paste, encode."""
    opened = Image.open(io.BytesIO(photo)).convert("RGB")
    small = opened.resize(grafted_size(opened.size, tile.width, TILES.delta), Image.Resampling.LANCZOS)
    grafted = tile.copy()
    grafted.paste(small, (tile.width - small.width, 0))
    out = io.BytesIO()
    grafted.save(out, "JPEG", quality=TILES.jpeg_quality, subsampling=0)
    return out.getvalue()


def ours(tile: Image.Image, photo: bytes) -> bytes:
    """What the graft step does with a photo and its tile."""
    small = decode_photo(photo, round(TILES.delta * TILES.pixels))
    return encode(graft(tile, small, TILES.delta), TILES.jpeg_quality)


def compare(name: str, slow: Callable[[], Iterable[bytes]], fast: Callable[[], Iterable[bytes]], rounds: int) -> None:
    """Run both in turn, print images per second of CPU time (best round of each) and the ratio."""
    count = len(list(slow()))
    assert count == len(list(fast()))
    times = [(_seconds(slow), _seconds(fast)) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in times)
    best_slow, best_fast = (count / min(column) for column in zip(*times, strict=True))
    print(
        f"{name:37}  plain {best_slow:6.0f} images/s  ours {best_fast:6.0f} images/s   "
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )


def _seconds(work: Callable[[], Iterable[bytes]]) -> float:
    started = time.process_time()
    for _ in work():
        pass
    return time.process_time() - started


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=15, help="places, four photos each (default: 15)")
    parser.add_argument("--photo-side", type=int, default=640, help="of the square photos, in pixels (default: 640)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen, renderer = spots(args.places, args.photo_side, Path(folder))
        tiles = [renderer.tile(spot.lat, spot.lon, spot.street).image for spot in chosen]

        def per_photo() -> Iterable[bytes]:
            for spot in chosen:
                for photo in spot.photos:
                    yield plain(renderer.tile(spot.lat, spot.lon, spot.street).image, photo)

        def per_place() -> Iterable[bytes]:
            for spot in chosen:
                tile = renderer.tile(spot.lat, spot.lon, spot.street).image
                for photo in spot.photos:
                    yield ours(tile, photo)

        pairs = [(tile, photo) for tile, spot in zip(tiles, chosen, strict=True) for photo in spot.photos]
        compare(
            "photo onto a tile that is there",
            lambda: (plain(*pair) for pair in pairs),
            lambda: (ours(*pair) for pair in pairs),
            args.rounds,
        )
        compare("tile drawn per photo / once per place", per_photo, per_place, args.rounds)


if __name__ == "__main__":
    main()
