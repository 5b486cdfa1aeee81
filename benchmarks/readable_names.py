"""Measure how many street names of a tile an OCR engine can read, over the places of a city.

    python benchmarks/readable_names.py streets.geojson photos.csv --places 100

The table needs the columns `place`, `lat` (or `latitude`) and `lon` (or `longitude`). The engine (rapidocr, extra `dev`) reads
each tile once, upright and at full size; a name counts as read if at most a fifth of its letters is wrong.
"""

import argparse
import csv
from pathlib import Path

from addressvlm.config import TilesConfig
from addressvlm.tiles.renderer import TileRenderer
from tests.support.ocr import NEAR, Reader, letters, wrong


def places(table: Path, count: int) -> list[tuple[float, float]]:
    """Latitude and longitude of about `count` places, evenly from the table."""
    positions: dict[str, tuple[float, float]] = {}
    with table.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            lat, lon = (
                float(row[key] if key in row else row[long]) for key, long in (("lat", "latitude"), ("lon", "longitude"))
            )
            positions.setdefault(row["place"], (lat, lon))
    return [positions[key] for key in sorted(positions)][:: max(1, len(positions) // count)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("streets", help="file of the city's streets")
    parser.add_argument("photos", type=Path, help="table of photos with place, lat, lon")
    parser.add_argument("--imagery", help="as tiles.imagery")
    parser.add_argument("--places", type=int, default=100, help="approximate number (default: 100)")
    parser.add_argument("--side-m", type=float, default=200.0, help="side of the tiles in metres (default: 200)")
    args = parser.parse_args()
    reader, config = Reader(), TilesConfig(side_m=args.side_m)
    renderer = TileRenderer(args.streets, args.imagery, config)
    errors: list[float] = []
    unlisted = 0
    centres = places(args.photos, args.places)
    for centre in centres:
        tile = renderer.tile(*centre)
        texts = reader.read(tile.image)
        errors += [wrong(name, texts) for name in tile.names]
        listed = ["".join(map(letters, tile.names))]
        unlisted += sum(len(letters(text)) >= 5 and wrong(text, listed) > 0.4 for text in texts)
    exact, near = (sum(error <= bound for error in errors) for bound in (0, NEAR))
    print(
        f"{len(centres)} tiles of {config.pixels} px, {len(errors)} names: {near / len(errors):.1%} read, "
        f"{exact / len(errors):.1%} without a wrong letter; {unlisted} texts that are no listed name"
    )


if __name__ == "__main__":
    main()
