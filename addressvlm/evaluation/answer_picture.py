"""A picture of answers: photos side by side, below each its likeliest addresses; the true one is green."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from addressvlm.answers.address_distribution import AddressDistribution, Candidate
from addressvlm.evaluation.likelihood import ScoreTables
from addressvlm.evaluation.run_questions import photo_image
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.storage import tables
from addressvlm.storage.remote_path import AnyPath

WIDTH, EDGE, GAP = 1500, 50, 40  # pixels, as all below
BAR, ROW = 22, 78  # height of a bar, and from one candidate to the next
INK, SOFT, RULE, RIGHT, WRONG = "#1d2733", "#5b6876", "#d5dce4", "#2b7a4b", "#b3402b"
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@dataclass(frozen=True)
class Example:
    """A photo, its likeliest addresses, and where it was taken."""

    photo: Image.Image
    candidates: Sequence[Candidate]
    truth: Address


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """A font of matplotlib, so that pictures are the same everywhere."""
    return ImageFont.truetype(FONTS / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"), size)


def draw_answers(examples: Sequence[Example]) -> Image.Image:
    """The picture; photos are resized to squares."""
    side = (WIDTH - 2 * EDGE + GAP) // max(len(examples), 3) - GAP
    sheet = Image.new("RGB", (2 * EDGE + len(examples) * (side + GAP) - GAP, side + 4 * ROW + 2 * EDGE), "white")
    draw = ImageDraw.Draw(sheet)
    for number, example in enumerate(examples):
        x, y = EDGE + number * (side + GAP), EDGE + side + 20
        sheet.paste(example.photo.resize((side, side), Image.Resampling.LANCZOS), (x, EDGE))
        draw.rectangle((x, EDGE, x + side - 1, EDGE + side - 1), outline=SOFT, width=2)
        for candidate in example.candidates:
            address = Address(candidate.street, candidate.district)
            right = address == example.truth
            draw.text((x, y), address.text(), INK if right else SOFT, font(18, bold=right))
            draw.rectangle((x, y + 30, x + side, y + 30 + BAR), fill=RULE)
            draw.rectangle((x, y + 30, x + round(side * candidate.probability), y + 30 + BAR), fill=RIGHT if right else SOFT)
            draw.text((x + side - 8, y + 30 + BAR / 2), f"{candidate.probability:.0%}", INK, font(17), anchor="rm")
            y += ROW
        if example.truth not in [Address(c.street, c.district) for c in example.candidates]:
            draw.text((x, y), f"taken on\n{example.truth.text()}", WRONG, font(18, bold=True))
    return sheet


def examples_of(
    photos: AnyPath, split: str, scores: ScoreTables, gazetteer: Gazetteer, seed: int, count: int = 4
) -> list[Example]:
    """Photos drawn by seed from those that have scores, right or wrong, with their three likeliest addresses."""
    ids = tables.read_table(scores.folders[split], split, ["id"])["id"].to_pylist()
    chosen = random.Random(seed).sample(ids, min(count, len(ids)))
    images = {
        row["id"]: photo_image(row) for row in tables.iter_rows(photos, split, ["id", "image"]) if row["id"] in chosen
    }  # fmt: skip
    examples = {
        row["id"]: Example(
            images[row["id"]],
            AddressDistribution(gazetteer.addresses, np.array(row["scores"])).ranked(3),
            Address(row["street"], row["district"]),
        )
        for row in scores.rows(split)
        if row["id"] in images
    }
    return [examples[photo] for photo in chosen]
