"""The picture of some answers"""

from pathlib import Path

import numpy as np
from PIL import Image

from addressvlm.answers.address_distribution import Candidate
from addressvlm.evaluation import answer_picture
from addressvlm.evaluation.answer_picture import Example, draw_answers, examples_of
from addressvlm.evaluation.likelihood import ScoreTables
from addressvlm.gazetteer.gazetteer import Address
from addressvlm.storage import tables
from tests.support.baselines import GAZETTEER, photo


def test_examples_are_photos_with_their_own_addresses(tmp_path: Path) -> None:
    photos = [photo("test", number) for number in range(9)]
    tables.write_table(tmp_path / "photos", "test", photos, tables.PHOTOS)
    scores = np.eye(3)[[GAZETTEER.addresses.index(Address(row["street"], row["district"])) for row in photos]] * 4
    rows = [{**row, "scores": line.tolist()} for row, line in zip(photos, scores, strict=True)][1:]
    tables.write_table(tmp_path / "scores", "test", rows, tables.SCORES)
    stored = ScoreTables({"test": tmp_path / "scores"})
    examples = examples_of(tmp_path / "photos", "test", stored, GAZETTEER, seed=0)
    assert len(examples) == 4
    colours = {"Mill Street": (255, 0, 0), "Oak Avenue": (0, 0, 255), "Lake Road": (0, 128, 0)}
    for example in examples:
        assert example.photo.getpixel((0, 0)) == colours[example.truth.street]
        assert (example.candidates[0].street, len(example.candidates)) == (example.truth.street, 3)
        assert example.candidates[0].probability > 0.9

    def drawn(seed: int, count: int = 4) -> list[str]:
        return [one.truth.text() for one in examples_of(tmp_path / "photos", "test", stored, GAZETTEER, seed, count)]

    assert drawn(0) == [example.truth.text() for example in examples]
    assert len({tuple(drawn(seed)) for seed in range(6)}) > 1
    assert len(drawn(0, count=50)) == 8  # of the nine photos one has no scores


def test_a_right_address_is_green_and_a_bar_is_as_long_as_its_probability() -> None:
    candidates = [Candidate("Mill Street", "Harbour", 0.75), Candidate("Oak Avenue", "Harbour", 0.25)]
    right, other = Address("Mill Street", "Harbour"), Address("Lake Road", "Harbour")
    sheets = [draw_answers([Example(Image.new("RGB", (9, 9)), candidates, truth)] * 2) for truth in (right, other)]
    green, grey = Image.new("RGB", (1, 1), answer_picture.RIGHT), Image.new("RGB", (1, 1), answer_picture.SOFT)
    counts = [np.array(sheet).reshape(-1, 3).tolist().count(list(green.getpixel((0, 0)))) for sheet in sheets]
    side = (sheets[0].width - 2 * answer_picture.EDGE - answer_picture.GAP) // 2
    assert counts[0] > 2 * 0.6 * side * answer_picture.BAR  # less what the percentage covers
    assert counts[1] == 0
    assert np.array(sheets[1]).reshape(-1, 3).tolist().count(list(grey.getpixel((0, 0)))) > counts[0]
    assert sheets[0].width < answer_picture.WIDTH
