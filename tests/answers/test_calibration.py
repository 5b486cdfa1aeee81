"""The temperature, the threshold and the errors, on answers whose truth is known."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm import InputError
from addressvlm.answers import calibration
from addressvlm.answers.calibration import Calibration, ScoredPhotos


def drawn(photos=2000, addresses=12, temperature=1.0, seed=0, views=4):
    """Photos of a model whose probabilities, at that temperature, are exactly how often it is right."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 2, (photos, addresses))
    below = calibration.softmax(scores).cumsum(axis=1) < rng.random((photos, 1))
    truth = np.minimum(below.sum(axis=1), addresses - 1)
    return ScoredPhotos(scores * temperature, truth, [f"place{i // views}" for i in range(photos)])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found(temperature):
    fitted = calibration.fit_calibration(drawn(temperature=temperature), target=0.8)
    assert fitted.temperature == pytest.approx(temperature, rel=0.1)
    assert fitted.measured["ece"]["after"] < 0.05
    assert fitted.measured["nll"]["after"] <= fitted.measured["nll"]["before"] + 1e-9
    assert fitted.measured["photos"] == 2000
    assert fitted.measured["places"] == 500


def test_the_temperature_minimizes_the_loss():
    scored = drawn(photos=300, temperature=2.0)
    best = calibration.fit_calibration(scored, 0.8).temperature
    losses = [calibration.nll(scored.scores / t, scored.truth) for t in (best * 0.97, best, best * 1.03)]
    assert min(losses) == losses[1]


@pytest.mark.parametrize("temperature", [0.1, 20.0])
def test_a_temperature_far_from_1_is_found(temperature):
    scored = drawn(photos=200, temperature=temperature)
    assert calibration.fit_calibration(scored, 0.8).temperature == pytest.approx(temperature, rel=0.2)


def test_photos_whose_true_address_was_ruled_out_decide_no_temperature():
    scored = drawn(photos=60, views=1)
    out = np.arange(60) % 3 == 0
    scores = scored.scores.copy()
    scores[out, scored.truth[out]] = -math.inf
    left = ScoredPhotos(scores[~out], scored.truth[~out], [scored.places[i] for i in np.flatnonzero(~out)])
    cut = ScoredPhotos(scores, scored.truth, scored.places)
    assert cut.reachable.tolist() == (~out).tolist()
    assert calibration.fit_calibration(cut, 0.8).temperature == calibration.fit_calibration(left, 0.8).temperature
    assert cut.truth.tolist() == scored.truth.tolist()


@given(st.integers(1, 45), st.sampled_from([0.3, 0.5, 0.8]), st.integers(0, 999))
@settings(max_examples=25)
def test_a_threshold_keeps_the_most_tenths_whose_answers_bear_the_target_out(photos, target, seed):
    rng = np.random.default_rng(seed)
    confidence, places = rng.random(photos).round(2), [str(n) for n in rng.integers(0, photos, photos)]
    right = rng.random(photos) < 0.97
    sure = sorted(confidence, reverse=True)
    expected = calibration.NEVER
    for tenths in range(1, 11):
        kept = confidence >= sure[-(-photos * tenths // 10) - 1]  # so many of the surest, and those as sure as the last one
        trials = len({places[i] for i in np.flatnonzero(kept)})
        successes = int(right[kept].mean() * trials + 1e-9)
        if calibration.lower_bound(successes, trials, TRIED) >= target:
            expected = (confidence[kept].min() + confidence[~kept].max()) / 2 if (~kept).any() else calibration.ALWAYS
    assert calibration.threshold(confidence, right, places, target) == pytest.approx(expected)


def test_a_threshold_keeps_its_target_on_other_photos():
    kept = []
    others = drawn(2000, seed=1000)
    for seed in range(40):
        scored = drawn(300, seed=seed)
        chosen = calibration.threshold(*scored.confidences(1.0), scored.places, 0.7)
        confidence, right = others.confidences(1.0)
        above = confidence > chosen
        kept.append(not above.any() or right[above].mean() >= 0.7)
    assert np.mean(kept) >= 0.95


def test_thresholds_rise_with_the_target():
    thresholds = calibration.fit_calibration(drawn(), 0.8).thresholds
    assert list(thresholds) == ["0.5", "0.6", "0.7", "0.8", "0.9", "0.95"]
    assert sorted(thresholds.values()) == list(thresholds.values())
    assert 0 < thresholds["0.7"] < 1


CONFIDENCE = np.linspace(0.99, 0.90, 10)
TRIED = calibration.ALPHA / calibration.COVERAGES


def test_an_exact_threshold_by_hand():
    """Ten photos of ten places, the surest eight right: all k right of k bear out 0.005 ** (1 / k), 8 of 9 bear out 0.42."""
    right, places = np.arange(10) < 8, [str(i) for i in range(10)]
    between = (CONFIDENCE[7] + CONFIDENCE[8]) / 2
    for target in (0.45, 0.515, calibration.lower_bound(8, 8, TRIED)):
        assert calibration.threshold(CONFIDENCE, right, places, target) == pytest.approx(between)
    assert calibration.threshold(CONFIDENCE, right, places, 0.516) == calibration.NEVER
    shuffled = np.random.default_rng(0).permutation(10)
    assert calibration.threshold(CONFIDENCE[shuffled], right[shuffled], places, 0.45) == pytest.approx(between)
    everything = np.ones(10, dtype=bool)
    assert calibration.threshold(CONFIDENCE, everything, places, 0.588) == calibration.ALWAYS
    assert calibration.threshold(CONFIDENCE, everything, places, 0.589) == calibration.NEVER


def test_equally_sure_answers_are_kept_or_left_together():
    """The surest eight of ten are as sure as the ninth, which is wrong."""
    confidence = np.array([*CONFIDENCE[:7], CONFIDENCE[7], CONFIDENCE[7], 0.1])
    places = [str(i) for i in range(10)]
    assert calibration.threshold(confidence, np.arange(10) < 8, places, 0.5) == calibration.NEVER


@given(st.integers(4, 60), st.integers(2, 5), st.sampled_from(calibration.TARGETS), st.integers(0, 99))
@settings(deadline=None)
def test_views_of_a_place_that_are_alike_say_no_more_than_one(places, views, target, seed):
    rng = np.random.default_rng(seed)
    confidence = rng.random(places).round(2)
    right = rng.random(places) < 0.5 + confidence / 2
    names = [str(i) for i in range(places)]
    once = calibration.threshold(confidence, right, names, target)
    assert calibration.threshold(confidence.repeat(views), right.repeat(views), np.repeat(names, views), target) == once


def test_a_place_that_is_right_in_part_is_not_rounded_up():
    """Of ten places with two views each one view is wrong: nineteen of twenty, so nine places of ten."""
    right, places = np.arange(20) < 19, [str(i // 2) for i in range(20)]
    confidence, borne_out = CONFIDENCE.repeat(2), calibration.lower_bound(9, 10, TRIED)
    assert calibration.threshold(confidence, right, places, borne_out) == calibration.ALWAYS
    assert calibration.threshold(confidence, np.ones(20, dtype=bool), places, borne_out + 0.01) == calibration.ALWAYS
    assert calibration.threshold(confidence, right, places, borne_out + 0.01) != calibration.ALWAYS


def test_few_or_wrong_answers_are_never_sure_enough():
    few = ScoredPhotos(np.array([[9.0, 0.0]] * 4), np.zeros(4, dtype=int), ["a", "a", "b", "b"])
    assert calibration.fit_calibration(few, 0.9).threshold == calibration.NEVER  # all right, but two places tell little
    many = ScoredPhotos(np.array([[9.0, 0.0]] * 200), np.zeros(200, dtype=int), [str(i) for i in range(200)])
    assert calibration.fit_calibration(many, 0.9).threshold == calibration.ALWAYS
    wrong = ScoredPhotos(many.scores, np.ones(200, dtype=int), many.places)
    assert set(calibration.fit_calibration(wrong, 0.9).thresholds.values()) == {calibration.NEVER}


@given(st.integers(1, 60), st.data())
@settings(deadline=None)
def test_the_lower_bound_is_clopper_and_pearsons(trials, data):
    successes = data.draw(st.integers(0, trials))
    low = calibration.lower_bound(successes, trials, 0.05)
    assert 0 <= low <= successes / trials
    at_least = sum(math.comb(trials, k) * low**k * (1 - low) ** (trials - k) for k in range(successes, trials + 1))
    assert successes == 0 or at_least == pytest.approx(0.05, rel=1e-3)


def test_all_right_has_a_closed_form():
    assert calibration.lower_bound(10, 10, 0.05) == pytest.approx(0.05**0.1, rel=1e-6)


def generative(photos, common, seed=0, addresses=8):
    """A model trained on the first address 20 times as often, on photos of which it is as common, or all alike."""
    rng = np.random.default_rng(seed)
    frequency = np.array([1.0, *[0.05] * (addresses - 1)]) if common else np.ones(addresses)
    truth = rng.choice(addresses, photos, p=frequency / frequency.sum())
    evidence = rng.normal(0, 1, (photos, addresses))
    evidence[np.arange(photos), truth] += 1.0  # ln p(photo | address) up to a constant
    prior = np.log(np.array([1.0, *[0.05] * (addresses - 1)]))
    return ScoredPhotos(evidence + prior, truth, [str(i) for i in range(photos)])


def test_a_prior_that_photos_do_not_bear_out_is_divided_by():
    training, validation, test = generative(600, True, 1), generative(300, False, 2), generative(300, False, 3)
    plain, fitted = (calibration.fit_calibration(validation, 0.8, scores) for scores in (None, training.scores))
    assert not plain.own_prior
    assert np.argmax(fitted.own_prior) == 0
    assert fitted.measured["nll"]["after"] < plain.measured["nll"]["after"] - 0.1
    before, after = (np.mean(np.argmax(c.apply(test.scores), axis=1) == test.truth) for c in (plain, fitted))
    assert after > before + 0.15


def test_the_own_prior_goes_before_the_temperature():
    made = Calibration(temperature=2.0, own_prior=(1.0, 3.0))
    assert made.apply(np.array([5.0, 9.0])).tolist() == [2.0, 3.0]
    assert made.apply(np.array([[5.0, 9.0], [1.0, -1.0]])).tolist() == [[2.0, 3.0], [0.0, -2.0]]
    assert Calibration(temperature=4.0).apply(np.array([8.0, -2.0])).tolist() == [2.0, -0.5]


@pytest.mark.parametrize("common", [False, True])
def test_what_is_measured_and_chosen_is_of_the_scores_as_they_are_applied(common):
    """With an own prior and without one, of a model that is three times too sure."""
    training, validation = generative(600, True, 1), generative(400, common, 2)
    validation = ScoredPhotos(validation.scores * 3, validation.truth, validation.places)
    fitted = calibration.fit_calibration(validation, 0.55, training.scores * 3)
    applied = fitted.apply(validation.scores)
    assert bool(fitted.own_prior) is not common
    assert fitted.temperature > 1.5
    if fitted.own_prior:
        assert fitted.own_prior == pytest.approx(calibration.own_prior(training.scores * 3))
    held_out = np.empty_like(applied)  # each half of the places with the temperature of the other one
    fold = calibration._folds(validation.places, validation.reachable)
    scores = validation.scores - np.array(fitted.own_prior or 0.0)
    assert 150 < fold.sum() < 250
    for half in (0, 1):
        other = [i for i in range(400) if fold[i] != half]
        alone = ScoredPhotos(scores[other], validation.truth[other], [validation.places[i] for i in other])
        held_out[fold == half] = scores[fold == half] / calibration.fit_calibration(alone, 0.8).temperature
    confidence, right = ScoredPhotos(held_out, validation.truth, validation.places).confidences(1.0)
    raw, raw_right = validation.confidences(1.0)
    assert fitted.thresholds == {
        f"{target:g}": calibration.threshold(confidence, right, validation.places, target)
        for target in sorted({*calibration.TARGETS, 0.55})
    }
    assert fitted.measured == {
        "photos": 400,
        "places": 400,
        "right": np.mean(applied.argmax(axis=1) == validation.truth),
        "nll": {
            "before": pytest.approx(calibration.nll(validation.scores, validation.truth)),
            "after": pytest.approx(calibration.nll(held_out, validation.truth)),
        },
        "ece": {
            "before": pytest.approx(calibration.ece(raw, raw_right)),
            "after": pytest.approx(calibration.ece(confidence, right)),
        },
    }
    assert calibration.nll(applied, validation.truth) <= min(
        calibration.nll(applied * t, validation.truth) for t in (0.97, 1.03)
    )


def test_a_prior_that_photos_bear_out_stays():
    training, validation = generative(600, True, 1), generative(300, True, 2)
    fitted = calibration.fit_calibration(validation, 0.8, training.scores)
    assert fitted == calibration.fit_calibration(validation, 0.8)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 99))
@settings(deadline=None)
def test_the_own_prior_is_a_distribution(photos, addresses, seed):
    scores = np.random.default_rng(seed).normal(0, 30, (photos, addresses))
    prior = calibration.own_prior(scores)
    assert np.exp(prior).sum() == pytest.approx(1)
    assert prior.min() >= -math.log(addresses * (photos + 1)) - 1e-9
    assert calibration.own_prior(scores + 5) == pytest.approx(prior)


def test_a_prior_of_another_gazetteer_is_one_sentence():
    with pytest.raises(InputError, match=r"calibration\.json is of 2 addresses and the gazetteer beside it has 3: delete it"):
        Calibration(own_prior=(0.0, -1.0)).apply(np.zeros((4, 3)))


def test_errors_of_bins():
    confidence, right = np.array([0.95, 0.95, 0.55, 1.0]), np.array([True, False, True, True])
    bins = calibration.reliability(confidence, right)
    assert [(b["low"], b["high"], b["photos"], b["right"]) for b in bins] == [
        (0.5, 0.6, 1, 1),
        (0.9, 1, 3, pytest.approx(2 / 3)),
    ]
    assert [b["confidence"] for b in bins] == pytest.approx([0.55, 2.9 / 3])
    assert calibration.ece(confidence, right) == pytest.approx((0.45 + abs(2.9 - 2)) / 4)


def test_saved_and_loaded(tmp_path):
    fitted = calibration.fit_calibration(drawn(400), 0.75)
    fitted.save(tmp_path)
    assert Calibration.load(tmp_path) == fitted
    assert fitted.threshold == fitted.thresholds["0.75"]
    divided = calibration.fit_calibration(generative(300, False, 2), 0.8, generative(600, True, 1).scores)
    divided.save(tmp_path)
    assert Calibration.load(tmp_path) == divided
    assert Calibration.load(tmp_path / "nowhere") == Calibration()
    assert Calibration().threshold == calibration.ALWAYS
    assert Calibration(target=1.0, thresholds={"1": 0.97, "0.9": 0.5}).threshold == 0.97


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"temperature": 0, "target": 0.8, "thresholds": {}}',
        "\x00",
        '{"temperature": Infinity, "target": 0.8, "thresholds": {}}',
        '{"temperature": NaN, "target": 0.8, "thresholds": {}}',
        '{"temperature": -1, "target": 0.8, "thresholds": {}}',
        '{"temperature": 1, "target": 0.8, "thresholds": {}, "own_prior": [NaN]}',
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, text):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(InputError, match=r"calibration\.json is not a calibration .*run evaluate again"):
        Calibration.load(tmp_path)


def test_photos_of_another_city():
    with pytest.raises(InputError, match="no validation photo has an address"):
        calibration.fit_calibration(ScoredPhotos(np.zeros((3, 2)), np.full(3, -1), ["a", "b", "c"]), 0.8)


def test_a_photo_of_an_unknown_street_counts_as_wrong():
    scored = drawn(100)
    lost = ScoredPhotos(scored.scores, np.where(np.arange(100) < 50, -1, scored.truth), scored.places)
    assert calibration.fit_calibration(lost, 0.8).measured["right"] < calibration.fit_calibration(scored, 0.8).measured["right"]
    known = ScoredPhotos(scored.scores[50:], scored.truth[50:], scored.places[50:])
    assert calibration.fit_calibration(lost, 0.8).temperature == calibration.fit_calibration(known, 0.8).temperature
    assert json.dumps(calibration.fit_calibration(lost, 0.8).measured)


def test_views_of_one_place_are_in_one_half_and_a_single_place_is_no_half():
    reachable = np.ones(8, dtype=bool)
    fold = calibration._folds(["a", "b", "a", "b", "c", "c", "d", "d"], reachable)
    assert fold[0] == fold[2]
    assert fold[1] == fold[3]
    assert sorted(fold[[0, 1, 4, 6]]) == [0, 0, 1, 1]
    assert not calibration._folds(["a"] * 8, reachable).any()
    lost = np.array([place == "a" for place in "aabbccdd"])  # the other half has no photo to fit a temperature on
    assert not calibration._folds(list("aabbccdd"), lost).any()
    assert calibration.fit_calibration(ScoredPhotos(np.eye(2), np.array([0, 1]), ["a", "a"]), 0.8).temperature > 0
