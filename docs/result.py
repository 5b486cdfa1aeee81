"""Draw docs/result.png, the picture of an answer in the README: test photos and their likeliest addresses.

    python docs/result.py runs/demo "stage 2 only, equal steps" docs/result.png --count 4

The photos are drawn by seed from the test split, right or wrong; the toy camera takes them again in more pixels, the model sees
the run's own.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from figure import EDGE, INK, RULE, SOFT, WIDTH, font, render_photo
from PIL import Image, ImageDraw

from addressvlm import Localizer
from addressvlm.grafting import decode_photo
from addressvlm.storage import tables
from addressvlm.storage.run_dir import slug

RIGHT, WRONG = "#2b7a4b", "#b3402b"
GAP, BAR, ROW = 40, 22, 78  # pixels between photos, height of a bar, and from one candidate to the next


def draw_candidates(draw: ImageDraw.ImageDraw, x: int, y: int, width: int, localization: Any, truth: tuple[str, str]) -> None:
    """Ranked addresses with a bar each, as long as its probability; the true one is green."""
    for candidate in localization.candidates:
        address = (candidate.street, candidate.district)
        colour = RIGHT if address == truth else SOFT
        draw.text((x, y), ", ".join(address), INK if address == truth else SOFT, font(18, bold=address == truth))
        draw.rectangle((x, y + 30, x + width, y + 30 + BAR), fill=RULE)
        draw.rectangle((x, y + 30, x + round(width * candidate.probability), y + 30 + BAR), fill=colour)
        draw.text((x + width - 8, y + 30 + BAR / 2), f"{candidate.probability:.0%}", INK, font(17), anchor="rm")
        y += ROW
    if truth not in [(c.street, c.district) for c in localization.candidates]:
        draw.text((x, y), f"taken on {', '.join(truth)}", WRONG, font(18, bold=True))


def result(run: Path, system: str, count: int, seed: int, toy: str) -> Image.Image:
    """Photos side by side, below each its three likeliest addresses."""
    localizer = Localizer(str(run / "models" / slug(system) / "merged"))
    rows = sorted(tables.iter_rows(run / "photos", "test"), key=lambda row: row["id"])
    chosen = random.Random(seed).sample(rows, count)
    side = (WIDTH - 2 * EDGE + GAP) // count - GAP
    sheet = Image.new("RGB", (WIDTH, side + 4 * ROW + 2 * EDGE), "white")
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(chosen):
        x = EDGE + number * (side + GAP)
        sheet.paste(render_photo(toy, row, side), (x, EDGE))
        draw.rectangle((x, EDGE, x + side - 1, EDGE + side - 1), outline=SOFT, width=2)
        localization = localizer.localize(decode_photo(row["image"]["bytes"]), top_k=3)
        draw_candidates(draw, x, EDGE + side + 20, side, localization, (row["street"], row["district"]))
    return sheet


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("system")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=4, help="photos (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="draws the photos (default: 0)")
    parser.add_argument("--toy", default="alderbrook", help="the toy city of the run (default: alderbrook)")
    args = parser.parse_args()
    result(args.run, args.system, args.count, args.seed, args.toy).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
