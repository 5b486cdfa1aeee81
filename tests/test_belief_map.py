"""pytest tests/test_belief_map.py: sampled answers counted by street and drawn (paper 001, Fig. 3)."""

from collections import Counter

import numpy as np
import pytest
import shapely
from PIL import Image

from addressvlm import InputError
from addressvlm.addresses import Address, Gazetteer
from addressvlm.answers import sampling
from addressvlm.answers.sampling import Sampled
from tests.families import localizer_of, picture

LINES = {"Mill Street": shapely.LineString([(0, 0), (0.01, 0)]), "Oak Avenue": shapely.LineString([(0, 0.01), (0.01, 0.01)])}
CITY = Gazetteer([Address(street, "Harbour") for street in LINES], LINES, city="Toytown", attribution=["generated"])


class Said:
    """A model that gives these answers in turn, whatever it is asked."""

    def __init__(self, *answers, with_options=()):
        self.answers, self.with_options, self.asked = answers, with_options, []

    def answer(self, images, questions, max_tokens, temperature):
        self.asked += questions
        said = self.with_options if "Options" in questions[0] else self.answers
        return [said[i % len(said)] for i in range(len(questions))]


def test_only_answers_that_name_one_street_count():
    said = Said("Mill Street", "mill st.", "Oak Avenue", "no idea", "Mill Street or Oak Avenue")
    found = sampling.sample(said, picture(1), CITY, n=100)
    assert found.counts == Counter({"Mill Street": 40, "Oak Avenue": 20})
    assert found.valid == 0.6
    assert not found.offered


def test_a_model_that_knows_no_street_chooses_among_those_of_the_others():
    knows, lost = Said("Mill Street"), Said("a street", with_options=["Mill Street", "?"])
    before, after = sampling.sample_all([lost, knows], picture(1), CITY, 10, 0.8, 0)
    assert (before.counts["Mill Street"], before.offered) == (5, True)
    assert (after.counts["Mill Street"], after.offered) == (10, False)
    assert "Options: Mill Street." in lost.asked[-1]


def test_how_far_the_answers_lie():
    found = Sampled(Counter({"Mill Street": 3, "Oak Avenue": 1}), 4)
    assert sampling.spread_m(found, CITY, 0, 0.005) == pytest.approx(0.25 * 0.01 * 111_320, rel=1e-3)
    assert sampling.spread_m(Sampled(Counter(), 4), CITY, 0, 0) is None


def test_a_real_model_draws_and_the_picture_shows_it(tmp_path, capsys, monkeypatch):
    localizer = localizer_of("llava", tmp_path, CITY)
    picture(1).save(tmp_path / "photo.jpg")
    counted = Sampled(Counter({"Mill Street": 6}), 8)
    monkeypatch.setattr(sampling, "sample_all", lambda *given: [sampling.sample(given[0][0], given[1], CITY, 2), counted])
    out = tmp_path / "belief.png"
    models = ["--model", f"before={localizer.folder}", "--model", str(localizer.folder)]
    sampling.main([*models, "--photo", str(tmp_path / "photo.jpg"), "--at", "0,0.005", "--out", str(out), "--samples", "8"])
    red, green, blue = np.moveaxis(np.asarray(Image.open(out).convert("RGB")), 2, 0)
    assert ((red > 100) & (green < 40) & (blue < 60)).sum() > 100  # a street in the dark end of the scale
    assert "Mill Street 75%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--photo", "{here}/none.jpg"], "none.jpg is not a photo that can be read"),
        (["--photo", "{here}/text.jpg"], "text.jpg is not a photo that can be read"),
        (["--photo", "{here}/photo.jpg", "--at", "here"], "--at here: write it as latitude,longitude"),
        (["--photo", "{here}/photo.jpg", "--samples", "0"], "--samples 0"),
        (["--photo", "{here}/photo.jpg"], "no streets to draw on"),
    ],
)
def test_what_a_person_can_mend(tmp_path, arguments, sentence):
    (tmp_path / "text.jpg").write_text("<html>")
    picture(1).save(tmp_path / "photo.jpg")
    with pytest.raises(InputError, match=sentence):
        sampling.main(["--model", "toy", *(a.replace("{here}", str(tmp_path)) for a in arguments)])
