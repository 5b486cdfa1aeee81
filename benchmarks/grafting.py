"""How much faster photos are grafted than by a plain Pillow loop; both take turns, the median ratio of CPU times counts.

    python benchmarks/grafting.py
    python benchmarks/grafting.py --photo-side 1920 --places 4
    python benchmarks/grafting.py --photos /data/my_city/photos

The plain loop opens tile (512 px PNG) and photo (JPEG), resizes both, pastes and encodes, for every photo. Ours opens the
tile once a place, decodes photos at a reduced scale and resizes with cheaper filters; quality and colour resolution of the
JPEGs are the same, and how far the pixels are apart is printed. The third line draws the tiles, as the graft step does.
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
from addressvlm.demo.city import street_places, to_degrees, write_maps
from addressvlm.demo.world import generate
from addressvlm.grafting import FILTER, encode_jpeg, graft_photo, pasted_size
from addressvlm.tiles.renderer import TileRenderer

CITY_SEED = 1
TILES = TilesConfig()  # 336 px, as in paper 001
VIEWS = 12  # a place
TILE_FILE_SIDE = 512


@dataclass(frozen=True)
class Spot:
    """A place of the toy city, its tile as a PNG file, and its encoded photos."""

    lat: float
    lon: float
    street: str
    tile: bytes
    photos: list[bytes]


def spots(count: int, side: int, files: list[Path], folder: Path) -> tuple[list[Spot], TileRenderer]:
    """`count` places with 12 photos each, drawn at `side` x `side` pixels or taken from `files`; and what draws the tiles."""
    world, rng = generate(CITY_SEED), random.Random(CITY_SEED)
    paths = {key: folder / key for key in ("streets", "districts", "imagery")}
    write_maps(world, paths)
    renderer = TileRenderer(paths["streets"], paths["imagery"], TILES)
    large = TileRenderer(paths["streets"], paths["imagery"], TILES.model_copy(update={"pixels": TILE_FILE_SIDE}))
    found = []
    for street, x, y in rng.sample(list(street_places(world)), count):
        lon, lat = map(float, to_degrees(world, np.array([[x, y]]))[0])
        tile = io.BytesIO()
        large.tile(lat, lon, street.name).image.save(tile, "PNG")
        if files:
            photos = [file.read_bytes() for file in rng.choices(files, k=VIEWS)]
        else:
            photos = [encode_jpeg(photograph(world, x, y, 360 * view / VIEWS, 1.0, side), 88) for view in range(VIEWS)]
        found.append(Spot(lat, lon, street.name, tile.getvalue(), photos))
    return found, renderer


def plain(tile: Image.Image, photo: bytes) -> bytes:
    """Open, resize, paste, encode."""
    opened = Image.open(io.BytesIO(photo)).convert("RGB")
    small = opened.resize(pasted_size(opened.size, tile.width, TILES.delta), Image.Resampling.LANCZOS)
    tile.paste(small, (tile.width - small.width, 0))
    out = io.BytesIO()
    tile.save(out, "JPEG", quality=TILES.jpeg_quality, subsampling=0)
    return out.getvalue()


def opened(tile: bytes) -> Image.Image:
    """The tile as our side opens it."""
    return Image.open(io.BytesIO(tile)).convert("RGB").resize((TILES.pixels, TILES.pixels), FILTER)


def grafted(tile: Image.Image, photos: list[bytes]) -> Iterable[bytes]:
    """What the graft step does with the photos of a place."""
    for photo in photos:
        yield graft_photo(tile, photo, TILES.delta, TILES.jpeg_quality)[0]


Work = Callable[[], Iterable[bytes]]


def compare(name: str, slow: Work, fast: Work, rounds: int) -> None:
    """Run both in turn, print milliseconds of CPU time an image (best round of each) and the ratio."""
    count = len(list(slow()))
    times = [(_seconds(slow), _seconds(fast)) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in times)
    best_slow, best_fast = (1000 * min(column) / count for column in zip(*times, strict=True))
    spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(
        f"{name:36}  plain {best_slow:6.2f} ms  ours {best_fast:5.2f} ms   ratio {statistics.median(ratios):.2f} {spread}",
        flush=True,
    )


def _seconds(work: Work) -> float:
    started = time.process_time()
    for _ in work():
        pass
    return time.process_time() - started


def difference(slow: Work, fast: Work) -> str:
    """How far the pixels of both are apart, on the scale to 255, as decoded from the JPEGs."""
    pairs = [
        [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int16) for data in pair]
        for pair in zip(slow(), fast(), strict=True)
    ]
    apart = np.stack([abs(a - b) for a, b in pairs])
    corner = round(TILES.delta * TILES.pixels)
    photo = apart[:, :corner, -corner:]
    return (
        f"mean {apart.mean():.2f}, 99.9th percentile {np.percentile(apart, 99.9):.0f} of 255; "
        f"in the photo alone {photo.mean():.2f} and {np.percentile(photo, 99.9):.0f}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=8, help="places, twelve photos each (default: 8)")
    parser.add_argument("--photo-side", type=int, default=640, help="of the square toy photos, in pixels (default: 640)")
    parser.add_argument("--photos", type=Path, help="folder of JPEGs to take instead of toy photos")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: 7)")
    args = parser.parse_args()
    files = sorted(args.photos.rglob("*.jpg")) if args.photos else []
    with tempfile.TemporaryDirectory() as folder:
        chosen, renderer = spots(args.places, args.photo_side, files, Path(folder))

    def loop() -> Iterable[bytes]:
        for spot in chosen:
            for photo in spot.photos:
                tile = Image.open(io.BytesIO(spot.tile)).convert("RGB").resize((TILES.pixels, TILES.pixels))
                yield plain(tile, photo)

    def by_place() -> Iterable[bytes]:
        for spot in chosen:
            yield from grafted(opened(spot.tile), spot.photos)

    def one_by_one() -> Iterable[bytes]:
        for spot in chosen:
            for photo in spot.photos:
                yield from grafted(opened(spot.tile), [photo])

    def drawing_loop() -> Iterable[bytes]:
        for spot in chosen:
            for photo in spot.photos:
                yield plain(renderer.tile(spot.lat, spot.lon, spot.street).image, photo)

    def drawn_by_place() -> Iterable[bytes]:
        for spot in chosen:
            yield from grafted(renderer.tile(spot.lat, spot.lon, spot.street).image, spot.photos)

    compare(f"{VIEWS} views a place", loop, by_place, args.rounds)
    compare("1 view a place", loop, one_by_one, args.rounds)
    compare(f"{VIEWS} views a place, tiles drawn", drawing_loop, drawn_by_place, args.rounds)
    print(f"pixels apart: {difference(loop, by_place)}")


if __name__ == "__main__":
    main()
