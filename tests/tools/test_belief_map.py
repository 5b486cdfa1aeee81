"""Sampled answers counted by street and drawn (paper 001, Fig. 3)."""

from collections import Counter

import numpy as np
import pytest
import shapely
import torch
from PIL import Image

from addressvlm import InputError
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.tools import belief_map
from addressvlm.tools.belief_map import SampledAnswers
from tests.support import north
from tests.support.families import localizer_of, picture

LINES = {"Mill Street": shapely.LineString([(0, 0), (0.01, 0)]), "Oak Avenue": shapely.LineString([(0, 0.01), (0.01, 0.01)])}
CITY = Gazetteer([Address(street, "Harbour") for street in LINES], LINES, city="Toytown", attribution=["generated"])


LINES_BY_NUMBER = [*LINES, "no idea"]


class ScriptedModel:
    """A model that gives these answers in turn, whatever the question."""

    def __init__(self, *answers, with_options=()):
        self.answers, self.with_options, self.questions = answers, with_options, []

    def answer(self, images, questions, max_tokens, temperature):
        self.questions += questions
        answers = self.with_options if "Options" in questions[0] else self.answers
        return [answers[i % len(answers)] for i in range(len(questions))]


def test_only_answers_that_name_one_street_count():
    model = ScriptedModel("Mill Street", "mill st.", "Oak Avenue", "no idea", "Mill Street or Oak Avenue")
    sample = belief_map.sample_answers(model, picture(1), CITY, n=100)
    assert sample.counts == Counter({"Mill Street": 40, "Oak Avenue": 20})
    assert sample.valid == 0.6
    assert not sample.has_options


def test_a_model_that_names_no_street_gets_the_streets_of_the_others_as_options():
    knows, lost = ScriptedModel("Mill Street"), ScriptedModel("a street", with_options=["Mill Street", "?"])
    before, after = belief_map.sample_all([lost, knows], picture(1), CITY, 10, 0.8, 0)
    assert (before.counts["Mill Street"], before.has_options) == (5, True)
    assert (after.counts["Mill Street"], after.has_options) == (10, False)
    assert "Options: Mill Street." in lost.questions[-1]


def test_mean_distance_of_the_answers():
    sample = SampledAnswers(Counter({"Mill Street": 3, "Oak Avenue": 1}), 4)
    assert belief_map.spread_m(sample, CITY, 0, 0.005) == pytest.approx(0.25 * 0.01 * 111_320, rel=1e-3)
    assert belief_map.spread_m(SampledAnswers(Counter(), 4), CITY, 0, 0) is None


NORTH = Gazetteer(
    [Address(name, "Harbour") for name in ("East Road", "North Road")],
    {
        "East Road": shapely.LineString([north.at(400, 0)[::-1], north.at(500, 0)[::-1]]),
        "North Road": shapely.LineString([north.at(0, 400)[::-1], north.at(0, 500)[::-1]]),
    },
)


def test_distances_and_extent_far_from_the_equator():
    one = SampledAnswers(Counter({"East Road": 3}), 4)
    for street in NORTH.streets:
        assert belief_map.spread_m(SampledAnswers(Counter({street: 3}), 4), NORTH, north.LAT, north.LON) == pytest.approx(
            400, rel=0.01
        )
    west, south, east, north_end = belief_map._view([one], NORTH, (north.LAT, north.LON))
    across, up = north.metres((north.LAT, west), (north.LAT, east)), north.metres((south, west), (north_end, west))
    assert (across, up) == (pytest.approx(650, rel=0.01), pytest.approx(650, rel=0.01))  # 500 m and the margin
    assert (west + east) / 2 == pytest.approx(north.at(250, 0)[1])
    assert (south + north_end) / 2 == pytest.approx(north.LAT)
    drawn = {}

    class Axis:
        def __getattr__(self, name):
            return lambda *arguments, **named: drawn.setdefault(name, arguments)

    belief_map._draw_map(Axis(), one, NORTH, (north.LAT, north.LON), 1.0, (west, south, east, north_end))
    assert drawn["set_aspect"] == (pytest.approx(across / up * (north_end - south) / (east - west) / 0.25, rel=0.01),)


def test_sampling_is_seeded_and_returns_n_answers():
    class Draws(ScriptedModel):
        def answer(self, images, questions, max_tokens, temperature):
            self.questions.append((len(images), len(questions), temperature))
            return [LINES_BY_NUMBER[int(i)] for i in torch.randint(3, (len(questions),))]

    draws = Draws()
    first, again, other = (belief_map.sample_answers(draws, picture(1), CITY, 130, 0.7, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.counts != other.counts
    assert draws.questions[:3] == [(50, 50, 0.7), (50, 50, 0.7), (30, 30, 0.7)]
    assert first.answers == 130


def test_the_command_draws_the_map_of_a_real_model(tmp_path, capsys, monkeypatch):
    localizer = localizer_of("llava", tmp_path, CITY)
    picture(1).save(tmp_path / "photo.jpg")
    counted = SampledAnswers(Counter({"Mill Street": 6}), 8)
    monkeypatch.setattr(
        belief_map, "sample_all", lambda *inputs: [belief_map.sample_answers(inputs[0][0], inputs[1], CITY, 2), counted]
    )
    out = tmp_path / "belief.png"
    models = ["--model", f"before={localizer.folder}", "--model", str(localizer.folder)]
    belief_map.main([*models, "--photo", str(tmp_path / "photo.jpg"), "--at", "0,0.005", "--out", str(out), "--samples", "8"])
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
        (["--photo", "{here}/photo.jpg"], "no streets to draw"),
    ],
)
def test_wrong_arguments_are_one_sentence(tmp_path, arguments, sentence):
    (tmp_path / "text.jpg").write_text("<html>")
    picture(1).save(tmp_path / "photo.jpg")
    with pytest.raises(InputError, match=sentence):
        belief_map.main(["--model", "toy", *(a.replace("{here}", str(tmp_path)) for a in arguments)])
