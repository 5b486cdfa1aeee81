"""Compare the speed of grafting with a plain Pillow loop; rounds alternate, the result is the median ratio of CPU times.

    python benchmarks/grafting.py
    python benchmarks/grafting.py --photo-side 1920 --places 4
    python benchmarks/grafting.py --photos /data/my_city/photos

For every photo the plain loop opens tile (512 px PNG) and photo (JPEG), resizes both, pastes and encodes. The graft step opens
the tile once per place, decodes photos at a reduced scale and resizes with cheaper filters; quality and colour resolution of
the JPEGs are equal, and the difference of the pixels is printed. The third line includes the rendering of tiles.
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
VIEWS = 12  # per place
TILE_FILE_SIDE = 512


@dataclass(frozen=True)
class BenchmarkPlace:
    """A place of the toy city, its tile as a PNG file, and its encoded photos."""

    lat: float
    lon: float
    street: str
    tile: bytes
    photos: list[bytes]


def make_places(count: int, side: int, files: list[Path], folder: Path) -> tuple[list[BenchmarkPlace], TileRenderer]:
    """`count` places with 12 photos each of `side` x `side` pixels, or from `files`; and the renderer of their tiles."""
    world, rng = generate(CITY_SEED), random.Random(CITY_SEED)
    paths = {key: folder / key for key in ("streets", "districts", "imagery")}
    write_maps(world, paths)
    renderer = TileRenderer(paths["streets"], paths["imagery"], TILES)
    large = TileRenderer(paths["streets"], paths["imagery"], TILES.model_copy(update={"pixels": TILE_FILE_SIDE}))
    places = []
    for street, x, y in rng.sample(list(street_places(world)), count):
        lon, lat = map(float, to_degrees(world, np.array([[x, y]]))[0])
        tile = io.BytesIO()
        large.tile(lat, lon, street.name).image.save(tile, "PNG")
        if files:
            photos = [file.read_bytes() for file in rng.choices(files, k=VIEWS)]
        else:
            photos = [encode_jpeg(photograph(world, x, y, 360 * view / VIEWS, 1.0, side), 88) for view in range(VIEWS)]
        places.append(BenchmarkPlace(lat, lon, street.name, tile.getvalue(), photos))
    return places, renderer


def plain_graft(tile: Image.Image, photo: bytes) -> bytes:
    """Open, resize, paste, encode."""
    image = Image.open(io.BytesIO(photo)).convert("RGB")
    small = image.resize(pasted_size(image.size, tile.width, TILES.delta), Image.Resampling.LANCZOS)
    tile.paste(small, (tile.width - small.width, 0))
    out = io.BytesIO()
    tile.save(out, "JPEG", quality=TILES.jpeg_quality, subsampling=0)
    return out.getvalue()


def open_tile(tile: bytes) -> Image.Image:
    """The tile at the size of the graft."""
    return Image.open(io.BytesIO(tile)).convert("RGB").resize((TILES.pixels, TILES.pixels), FILTER)


def graft_all(tile: Image.Image, photos: list[bytes]) -> Iterable[bytes]:
    """Graft the photos of a place as the graft step does."""
    for photo in photos:
        yield graft_photo(tile, photo, TILES.delta, TILES.jpeg_quality)[0]


Work = Callable[[], Iterable[bytes]]


def compare(name: str, slow: Work, fast: Work, rounds: int) -> None:
    """Alternate both, print milliseconds of CPU time per image (best round of each) and the ratio."""
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
    """Difference of the decoded pixels, of 255."""
    pairs = [
        [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int16) for data in pair]
        for pair in zip(slow(), fast(), strict=True)
    ]
    differences = np.stack([abs(a - b) for a, b in pairs])
    corner = round(TILES.delta * TILES.pixels)
    photo = differences[:, :corner, -corner:]
    return (
        f"mean {differences.mean():.2f}, 99.9th percentile {np.percentile(differences, 99.9):.0f} of 255; "
        f"in the photo alone {photo.mean():.2f} and {np.percentile(photo, 99.9):.0f}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=8, help="places with twelve photos each (default: 8)")
    parser.add_argument("--photo-side", type=int, default=640, help="of the square toy photos, in pixels (default: 640)")
    parser.add_argument("--photos", type=Path, help="folder of JPEGs to use instead of toy photos")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each (default: 7)")
    args = parser.parse_args()
    files = sorted(args.photos.rglob("*.jpg")) if args.photos else []
    with tempfile.TemporaryDirectory() as folder:
        places, renderer = make_places(args.places, args.photo_side, files, Path(folder))

    def plain_loop() -> Iterable[bytes]:
        for place in places:
            for photo in place.photos:
                tile = Image.open(io.BytesIO(place.tile)).convert("RGB").resize((TILES.pixels, TILES.pixels))
                yield plain_graft(tile, photo)

    def by_place() -> Iterable[bytes]:
        for place in places:
            yield from graft_all(open_tile(place.tile), place.photos)

    def one_view() -> Iterable[bytes]:
        for place in places:
            for photo in place.photos:
                yield from graft_all(open_tile(place.tile), [photo])

    def plain_with_tiles() -> Iterable[bytes]:
        for place in places:
            for photo in place.photos:
                yield plain_graft(renderer.tile(place.lat, place.lon, place.street).image, photo)

    def by_place_with_tiles() -> Iterable[bytes]:
        for place in places:
            yield from graft_all(renderer.tile(place.lat, place.lon, place.street).image, place.photos)

    compare(f"{VIEWS} views per place", plain_loop, by_place, args.rounds)
    compare("1 view per place", plain_loop, one_view, args.rounds)
    compare(f"{VIEWS} views per place, with tiles", plain_with_tiles, by_place_with_tiles, args.rounds)
    print(f"pixel difference: {difference(plain_loop, by_place)}")


if __name__ == "__main__":
    main()
