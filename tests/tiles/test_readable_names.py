"""

Names are read back from tiles as the model sees them, 336 px for 200 m. On 182 places of a real town, whose photos are not
in the repository, `benchmarks/readable_names.py` tells the share.
"""

import random
from pathlib import Path

import numpy as np
import pytest

from addressvlm.config import TilesConfig
from addressvlm.demo.city import street_places, to_degrees, toy_world
from addressvlm.tiles.renderer import Tile, TileRenderer
from tests.support import town
from tests.support.ocr import NEAR, Reader, letters, wrong

CONFIG = TilesConfig()
# In metres: level, upright, slanting, bent and curved streets, and three that are too short or too bent for their names.
STREETS: dict[str, list[tuple[float, float]]] = {
    "Trumpington Street": [(-300, -62), (300, -50)],
    "Saint Andrew's Street": [(-70, -300), (-62, 300)],
    "Garret Hostel Lane": [(-58, 20), (-20, -20), (90, -50)],
    "Free School Lane": [(20, -300), (30, -120), (45, -90), (50, -57)],
    "Rue de l'Évêché": [(-99, 80), (-75, 50), (-62, 10)],
    "Jesus Lane": [(60 * np.cos(a) - 20, 60 * np.sin(a) - 40) for a in np.linspace(-2.2, -0.9, 12)],
    "Pembroke Court": [(70, -58), (72, -66)],
    "Quayside": [(-30, 60), (-28, 66)],
}


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader()


@pytest.fixture
def toy_tiles(toy_city: dict[str, str]) -> list[Tile]:
    """Three tiles of a toy city with its satellite image below."""
    world = toy_world("alderbrook")
    renderer = TileRenderer(toy_city["streets"], toy_city["imagery"], CONFIG)
    chosen = random.Random(1).sample(list(street_places(world)), 3)
    return [renderer.tile(*to_degrees(world, np.array([[x, y]]))[0][::-1], street.name) for street, x, y in chosen]


@pytest.fixture
def town_tiles(tmp_path: Path) -> list[Tile]:
    """Three tiles of a drawn town."""
    renderer = TileRenderer(town.write_streets(tmp_path / "streets.geojson", STREETS), None, CONFIG)
    return [renderer.tile(*town.degrees(x, y)) for x, y in ((0, 0), (-30, -20), (10, -60))]


@pytest.mark.parametrize("drawn", ["town_tiles", "toy_tiles"])
def test_ocr_reads_the_listed_names_and_no_others(drawn: str, request: pytest.FixtureRequest, reader: Reader) -> None:
    tiles = request.getfixturevalue(drawn)
    read = [reader.read(tile.image) for tile in tiles]
    listed = [(name, texts) for tile, texts in zip(tiles, read, strict=True) for name in tile.names]
    assert len(listed) >= 7
    assert sum(wrong(name, texts) <= NEAR for name, texts in listed) >= 0.9 * len(listed)
    for tile, texts in zip(tiles, read, strict=True):
        whole = "".join(map(letters, tile.names))
        strangers = [text for text in texts if len(letters(text)) >= 5 and wrong(text, [whole]) > 0.4]
        assert not strangers


def test_ocr_reads_nothing_without_names(tmp_path: Path, reader: Reader) -> None:
    bare = CONFIG.model_copy(update={"names": False})
    renderer = TileRenderer(town.write_streets(tmp_path / "streets.geojson", STREETS), None, bare)
    assert not [text for text in reader.read(renderer.tile(*town.degrees(0, 0)).image) if len(letters(text)) >= 4]
