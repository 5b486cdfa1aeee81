"""Draw docs/grafting.png, the figure of the README, from a run of the toy city.

    python docs/figure.py runs/demo docs/grafting.png --id 0250_0.jpg

Photo and tile are rendered again at a higher resolution; label, questions and answers come from the run.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pyproj import Transformer

from addressvlm import InputError
from addressvlm.config import TilesConfig, load
from addressvlm.demo.camera import photograph
from addressvlm.demo.city import TOY_CITIES, UTM, origin
from addressvlm.demo.world import generate
from addressvlm.evaluation.answer_picture import INK, RULE, SOFT, WRONG, font
from addressvlm.grafting import graft
from addressvlm.storage import tables
from addressvlm.tiles.renderer import TileRenderer

WIDTH, EDGE, GAP = 1500, 50, 70  # pixels, as all below
SIDE, SMALL = 420, 368  # of the images in the first and second row
TEXT, LEADING, PADDING = 23, 33, 20  # of questions and answers
STAGE, CARD = WRONG, "#f4f6f9"


def find_row(folder: Path, photo: str) -> dict[str, Any]:
    """The row of a training table with this id.

    Raises:
        InputError: there is none.
    """
    for row in tables.iter_rows(folder, "train"):
        if row["id"] == photo:
            return row
    raise InputError(f"{folder} has no photo {photo}: give the --id of a training photo.")


def render_photo(toy: str, row: dict[str, Any], pixels: int) -> Image.Image:
    """The toy photo of the row's place and heading, at this resolution."""
    world = generate(TOY_CITIES[toy])
    east, north = Transformer.from_crs("EPSG:4326", UTM, always_xy=True).transform(row["lon"], row["lat"])
    ground = np.array([east, north]) - np.array(origin(world))
    c, s = np.cos(world.angle), np.sin(world.angle)
    x, y = ground @ np.array([[c, -s], [s, c]]) + np.array(world.size) / 2
    heading = math.radians(90 - row["heading"]) - world.angle
    return photograph(world, float(x), float(y), heading, 1.0, pixels)


class Sheet:
    """A white page for images, lines and text; coordinates in pixels from the upper left corner."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH, 2 * WIDTH), "white")
        self.draw = ImageDraw.Draw(self.image)

    def add_image(self, image: Image.Image, x: int, y: int, side: int, caption: str) -> None:
        self.image.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        self.draw.rectangle((x, y, x + side - 1, y + side - 1), outline=SOFT, width=2)
        self.draw.text((x + side / 2, y + side + 26), caption, SOFT, font(23), anchor="mm")

    def title(self, x: int, y: int, number: str, words: str) -> None:
        self.draw.ellipse((x, y - 22, x + 44, y + 22), fill=STAGE)
        self.draw.text((x + 22, y), number, "white", font(25, bold=True), anchor="mm")
        self.draw.text((x + 62, y), words, INK, font(29, bold=True), anchor="lm")

    def plus(self, x: int, y: int) -> None:
        self.draw.line((x - 18, y, x + 18, y), INK, 6)
        self.draw.line((x, y - 18, x, y + 18), INK, 6)

    def arrow(self, x: int, y: int) -> None:
        self.draw.line((x - 24, y, x + 12, y), INK, 6)
        self.draw.polygon([(x + 8, y - 15), (x + 30, y), (x + 8, y + 15)], fill=INK)

    def card(self, x: int, y: int, width: int, height: int, turn: dict[str, Any]) -> None:
        """A box with a question and its answer, bold if it is short."""
        self.draw.rounded_rectangle((x, y, x + width, y + height), 14, fill=CARD, outline=RULE, width=2)
        question, answer, face = wrap_card(turn, width)
        y += PADDING
        for number, line in enumerate([*question, *answer]):
            is_question = number < len(question)
            self.draw.text((x + PADDING, y), line, SOFT if is_question else INK, font(TEXT) if is_question else face)
            y += LEADING + (8 if number == len(question) - 1 else 0)

    def notch(self, x: int, y: int) -> None:
        """A tip on a card's upper edge that points at the image above."""
        self.draw.polygon([(x - 18, y + 2), (x, y - 16), (x + 18, y + 2)], fill=CARD)
        self.draw.line([(x - 18, y + 1), (x, y - 16), (x + 18, y + 1)], RULE, 2)


def wrap_card(turn: dict[str, Any], width: int) -> tuple[list[str], list[str], ImageFont.FreeTypeFont]:
    """Question and answer as the lines of a card of that width, and the font of the answer."""
    face, inner = font(TEXT, bold=len(turn["answer"]) < 60), width - 2 * PADDING
    return wrap(turn["question"].split(), font(TEXT), inner), wrap(turn["answer"].split(), face, inner), face


def card_height(turn: dict[str, Any], width: int) -> int:
    """Height of the card that holds a question and its answer."""
    question, answer, _ = wrap_card(turn, width)
    return 2 * PADDING + 4 + LEADING * (len(question) + len(answer))


def wrap(words: Sequence[str], face: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Words as lines no wider than `width` pixels."""
    lines = [words[0]]
    for word in words[1:]:
        longer = f"{lines[-1]} {word}"
        if face.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def figure(run: Path, photo: str, toy: str, tiles: TilesConfig) -> Image.Image:
    """The complete figure."""
    row, label = find_row(run / "photos", photo), find_row(run / "alignment", photo)["rounds"][0]
    city = run / "input" / toy
    large = tiles.model_copy(update={"pixels": 2 * SIDE, "font_px": tiles.font_px * 2 * SIDE / tiles.pixels})
    tile = TileRenderer(city / "streets.geojson", city / "satellite.tif", large).tile(row["lat"], row["lon"], row["street"])
    photo_image = render_photo(toy, row, 2 * SIDE)

    sheet = Sheet()
    top = 96
    columns = [EDGE + i * (SIDE + GAP) for i in range(3)]
    sheet.title(EDGE, 48, "1", "Cross-view alignment: learn why a photo belongs to its address")
    sheet.add_image(photo_image, columns[0], top, SIDE, "street-view photo")
    sheet.plus(columns[1] - GAP // 2, top + SIDE // 2)
    sheet.add_image(tile.image, columns[1], top, SIDE, "satellite tile, street names on it")
    sheet.arrow(columns[2] - GAP // 2, top + SIDE // 2)
    sheet.add_image(graft(tile.image, photo_image, large.delta), columns[2], top, SIDE, "grafted image")
    below = top + SIDE + 68
    label_height = card_height(label, WIDTH - 2 * EDGE)
    sheet.card(EDGE, below, WIDTH - 2 * EDGE, label_height, label)
    sheet.notch(columns[2] + SIDE // 2, below)

    line = below + label_height + 38
    sheet.draw.line((EDGE, line, WIDTH - EDGE, line), RULE, 2)
    sheet.title(EDGE, line + 52, "2", "Address localization: answer from the photo alone")
    top = line + 98
    sheet.add_image(photo_image, EDGE, top, SMALL, "street-view photo")
    sheet.arrow(EDGE + SMALL + GAP // 2, top + SMALL // 2)
    left, space = EDGE + SMALL + GAP, 22
    rounds = sorted(row["rounds"], key=lambda r: (r["level"] != "address", len(r["question"])))[:4]
    width = (WIDTH - EDGE - left - space) // 2
    height = max((SMALL - space) // 2, *(card_height(turn, width) for turn in rounds))
    for i, turn in enumerate(rounds):
        sheet.card(left + (i % 2) * (width + space), top + (i // 2) * (height + space), width, height, turn)
    return sheet.image.crop((0, 0, WIDTH, top + max(SMALL, 2 * height + space) + EDGE))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run with photos and alignment labels, such as runs/demo")
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("--config", default="demo", help="the preset of the run")
    parser.add_argument("--id", default="0250_0.jpg", help="the training photo to show")
    args = parser.parse_args()
    config = load(args.config)
    image = figure(args.run, args.id, config.city.toy or "alderbrook", config.tiles)
    image.quantize(192, dither=Image.Dither.NONE).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
