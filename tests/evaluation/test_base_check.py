"""A base that reads and matches, one that does neither, and what is said about them."""

import random

import numpy as np
import pytest
from PIL import Image

from addressvlm.evaluation import base_check
from addressvlm.evaluation.base_check import CheckedPlace, check_base, verdict

STREETS = [f"{name} Street" for name in ("Mill", "Oak", "Harbour", "Elm", "King", "Rose")]
COLOURS = {"red": (190, 50, 45), "blue": (60, 90, 200), "green": (60, 150, 60), "yellow": (220, 200, 40)}


def places(count: int = 24) -> list[CheckedPlace]:
    """Each place has a colour in both views, and a pixel of its number, which tells a model of the test all it needs."""
    made = []
    for i in range(count):
        image = Image.new("RGB", (64, 64), list(COLOURS.values())[i % 4])
        street = STREETS[i % len(STREETS)]
        views = [image.copy() for _ in range(3)]
        for view, corner in zip(views, ((0, 0), (0, 63), (0, 63)), strict=True):
            view.putpixel(corner, (i, 0, 0))
        names = [street] if i % 6 else [STREETS[1]]  # of a sixth of the places the own name is not written
        made.append(CheckedPlace(f"{i}", street, *views, names))
    return made


def knowing(images: list[Image.Image], questions: list[str]) -> list[str]:
    """Reads, matches and sees."""
    said = []
    for image, question in zip(images, questions, strict=True):
        pixels = np.asarray(image)
        if question == base_check.READ:
            said.append(f"It is {STREETS[pixels[63, 0, 0] % len(STREETS)]}.")
        elif question == base_check.MATCH:
            corner, tile = pixels[5:28, 36:60].mean((0, 1)), pixels[63, 32]
            said.append("Yes" if np.abs(corner - tile).max() < 20 else "No, they differ.")
        else:
            colour = pixels[32, 32]
            name = min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - colour).sum())
            said.append(f"What is covered and rendered here is {name}.")  # where no colour but one is named
    return said


def guessing(images: list[Image.Image], questions: list[str]) -> list[str]:
    rng = random.Random(0)
    return [rng.choice(["Yes", "No"]) if q == base_check.MATCH else rng.choice([*COLOURS, *STREETS]) for q in questions]


def test_a_base_that_reads_and_matches_may_learn_from_the_map() -> None:
    shares = check_base(places(), knowing, STREETS, 0.5)
    assert shares["names read"] == {"value": 1.0, "low": pytest.approx(0.83, abs=0.01), "high": 1.0, "n": 20}
    assert shares["colours told apart"]["value"] == 1.0
    assert 0.6 < shares["photos matched"]["value"] < 1  # four colours: another tile may have the photo's
    assert shares["photos matched"]["low"] > 0.4
    assert verdict(shares).startswith("It reads the names on these tiles")
    assert "recognises a place from both views" in verdict(shares)


def test_a_base_that_guesses_is_not_worth_labels() -> None:
    shares = check_base(places(), guessing, STREETS, 0.5)
    assert shares["names read"]["high"] < 0.5
    assert shares["photos matched"]["low"] <= 0.25 <= shares["photos matched"]["high"]
    assert verdict(shares).startswith("It does not read the names on these tiles")
    assert "not match photos with tiles better than chance" in verdict(shares)


@pytest.mark.parametrize("said", ["Yes", "No", ""])
def test_always_the_same_is_chance(said: str) -> None:
    shares = check_base(places(8), lambda images, questions: [said] * len(images), STREETS, 0.5)
    assert shares["photos matched"]["value"] == 0.25
    assert (shares["names read"]["value"], shares["colours told apart"]["value"]) == (0, 0)


def test_few_places_leave_it_open() -> None:
    shares = check_base(places(8), knowing, STREETS, 0.5)
    assert (shares["names read"]["low"] or 0) > 0.5  # six of six
    some = {**shares, "names read": {"value": 0.5, "low": 0.2, "high": 0.8, "n": 6}}
    assert "not certain: check more places" in verdict(some)
