"""Statistics of a comparison beyond the metrics of each system, and fusion."""

import math
from itertools import pairwise

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from addressvlm import InputError
from addressvlm.answers import calibration
from addressvlm.baselines import fusion
from addressvlm.evaluation import comparison, metrics, report
from addressvlm.evaluation.likelihood import scored_photos
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from tests.support import north

ADDRESSES = [Address("Mill Street", "Harbour"), Address("Oak Avenue", "Old Town"), Address("Elm Row", "Old Town")]
SHAPES = {a.street: shapely.LineString([(0.1 + i / 100, 52.2), (0.1 + i / 100, 52.21)]) for i, a in enumerate(ADDRESSES)}
CITY = Gazetteer(ADDRESSES, SHAPES, city="Toytown")


def answer(i, correct, address=ADDRESSES[0], said=""):
    return {
        "id": f"photo{i}", "place": f"place{i // 2}", "lat": 52.2, "lon": 0.1 + i / 1000, "street": address.street,
        "district": address.district, "level": "address", "kind": "generation", "question": "Where?", "options": [],
        "expected": address.text(), "answer": said, "correct": correct,
    }  # fmt: skip


def score(i, scores, address=ADDRESSES[0]):
    return {**{k: v for k, v in answer(i, True, address).items() if k in ("id", "place", "lat", "lon", "street", "district")},
            "scores": scores}  # fmt: skip


def ordered(*scores):
    """Scores of ADDRESSES in the gazetteer's order."""
    of = dict(zip(ADDRESSES, scores, strict=True))
    return [of[address] for address in CITY.addresses]


def test_mcnemar_is_the_exact_binomial_test():
    main = [answer(i, i < 8) for i in range(12)]
    other = [answer(i, i in (0, 1, 8)) for i in range(12)]
    result = comparison.mcnemar(main, other)
    assert (result["better"], result["worse"]) == (6, 1)
    assert result["p"] == pytest.approx(2 * (1 + 7) / 2**7)
    assert comparison.mcnemar(main, main) == {"better": 0, "worse": 0, "p": 1.0}
    unasked = [answer(20, False), *(row | {"level": "street"} for row in main)]
    assert comparison.mcnemar(main, [*unasked[:1], *other[::-1], *unasked[1:]]) == result
    only_main, only_other = comparison.split_verdicts(main, other[::-1])
    assert (only_main, only_other) == ([f"photo{i}" for i in range(2, 8)], ["photo8"])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30))
def test_mcnemar_is_the_same_for_both_sides(pairs):
    a, b = ([answer(i, pair[side]) for i, pair in enumerate(pairs)] for side in (0, 1))
    one, two = comparison.mcnemar(a, b), comparison.mcnemar(b, a)
    assert (one["better"], one["worse"], one["p"]) == (two["worse"], two["better"], two["p"])
    assert 0 <= one["p"] <= 1


def test_top_counts_streets_once_and_knows_unlisted_addresses_are_missed():
    city = Gazetteer([Address("Mill Street", "Harbour"), Address("Mill Street", "Old Town"), Address("Elm Row", "Old Town")])
    liked = {"Elm Row": -1.0, "Mill Street": 0.0}  # and more so in the wrong district
    scores = [liked[a.street] + (a.street == "Mill Street" and a.district == "Old Town") for a in city.addresses]
    rows = [score(0, scores), score(2, scores, Address("Never Learnt", "Harbour"))]
    result = {name: cell["value"] for name, cell in comparison.top_k_accuracy(rows, city, 100, 0).items()}
    assert result == {"address-1": 0, "address-5": 0.5, "street-1": 0.5, "street-5": 0.5}
    assert comparison.top_k_accuracy([], city, 100, 0) == {}


@pytest.mark.parametrize(("rank", "first", "five"), [(1, 1, 1), (2, 0, 1), (5, 0, 1), (6, 0, 0)])
def test_ranks_of_addresses_and_of_streets(rank, first, five):
    """Seven streets in two districts each; each street's addresses stand one after the other in the ranking."""
    city = Gazetteer([Address(f"Street {i}", district) for i in range(7) for district in "AB"])
    worse = {address: -int(address.street[-1]) - 0.1 * (address.district == "B") for address in city.addresses}
    scores = [worse[address] for address in city.addresses]
    result = comparison.top_k_accuracy([score(0, scores, Address(f"Street {rank - 1}", "A"))], city, 10, 0)
    assert (result["street-1"]["value"], result["street-5"]["value"]) == (first, five)
    by_address = comparison.top_k_accuracy([score(0, scores, city.addresses[rank - 1])], city, 10, 0)
    assert (by_address["address-1"]["value"], by_address["address-5"]["value"]) == (first, five)


def test_trust_is_of_test_photos_at_the_temperature_of_validation_photos():
    rng = np.random.default_rng(0)
    validation, test = (
        [score(i, (sharp * rng.normal(0, 1, 3)).tolist(), ADDRESSES[rng.integers(3)]) for i in range(n)]
        for n, sharp in ((60, 3), (40, 1))
    )
    result = comparison.confidence_accuracy(validation, test, CITY)
    temperature = calibration.fit_calibration(scored_photos(validation, CITY), 0.0).temperature
    confidence, right = scored_photos(test, CITY).confidences(temperature)
    assert result == {
        "temperature": temperature,
        "bins": calibration.reliability(confidence, right),
        "ece": calibration.ece(confidence, right),
    }
    assert sum(b["photos"] for b in result["bins"]) == 40


def test_an_address_that_a_prior_rules_out_has_no_rank():
    rows = [score(0, ordered(-math.inf, 0.0, -math.inf)), score(2, ordered(1.0, 0.0, 2.0))]  # Mill Street is the true one
    result = {name: cell["value"] for name, cell in comparison.top_k_accuracy(rows, CITY, 100, 0).items()}
    assert result == {"address-1": 0, "address-5": 0.5, "street-1": 0, "street-5": 0.5}


def test_trust_is_finite_where_a_prior_rules_out_the_truth():
    seen = [score(i, ordered(0.0, float(i % 3) - 0.5, -math.inf)) for i in range(8)]
    lost = score(8, ordered(-math.inf, 1.0, 0.0))
    result = comparison.confidence_accuracy([*seen, lost], [*seen, lost], CITY)
    assert result["temperature"] == comparison.confidence_accuracy(seen, seen, CITY)["temperature"]
    assert 0 <= result["ece"] <= 1
    assert sum(b["photos"] for b in result["bins"]) == 9
    assert comparison.confidence_accuracy([lost], [lost], CITY) is None


def test_addresses_that_training_never_saw_are_told_apart():
    rows = [answer(0, True), answer(1, False, ADDRESSES[1]), answer(2, True, ADDRESSES[1])]
    result = comparison.by_training(rows, {ADDRESSES[0]}, 100, 0)
    assert (result["seen"]["value"], result["seen"]["n"]) == (1, 1)
    assert (result["unseen"]["value"], result["unseen"]["n"]) == (0.5, 2)
    assert list(comparison.by_training(rows[:1], {ADDRESSES[0]}, 100, 0)) == ["seen"]


def test_distance_to_the_nearest_training_photo():
    photos = [{"id": "a", "lat": 52.2, "lon": 0.1}, {"id": "b", "lat": 52.2, "lon": 0.2}, {"id": "c", "lat": None, "lon": None}]
    result = comparison.nearest_training_m(
        photos, [{"id": "t", "lat": 52.2, "lon": 0.1}, {"id": "u", "lat": 52.21, "lon": 0.2}]
    )
    assert result["a"] == 0
    assert result["b"] == pytest.approx(1113, rel=0.01)
    assert set(result) == {"a", "b"}
    assert comparison.nearest_training_m(photos, []) == {}


def test_the_nearest_training_photo_far_from_the_equator():
    """One to the east, one to the north, the photo a little nearer to the one or to the other."""
    training = [north.at(1000, 0), north.at(0, 1000)]
    for east, up, expected in ((100, 0, 900), (0, 100, 900), (-400, 0, 1077), (600, 600, 721)):
        lat, lon = north.at(east, up)
        rows = [{"id": "t", "lat": at[0], "lon": at[1]} for at in training]
        result = comparison.nearest_training_m([{"id": "p", "lat": lat, "lon": lon}], rows)["p"]
        assert result == pytest.approx(min(north.metres((lat, lon), at) for at in training), rel=0.01)
        assert result == pytest.approx(expected, rel=0.01)


def test_address_answers_by_distance():
    """Ten photos, the nearest three right and the furthest one, in four bands."""
    rows = [answer(i, i in (0, 1, 2, 9)) for i in range(10)]
    distances = {f"photo{i}": 10.0 * i for i in (3, 7, 1, 9, 0, 5, 2, 8, 6, 4)}
    result = comparison.by_distance([*rows[::-1], answer(1, False) | {"level": "street"}], distances, 50, 0)
    assert [(b["from_m"], b["to_m"], b["value"], b["n"]) for b in result] == [
        (0, 20, 1, 3), (30, 50, 0, 3), (60, 70, 0, 2), (80, 90, 0.5, 2)
    ]  # fmt: skip


@given(st.dictionaries(st.text(max_size=4), st.floats(0, 1e4), max_size=40))
def test_bands_hold_every_photo_once_in_order_of_distance(distances):
    bands = comparison.distance_bands(distances)
    assert sorted(photo for _, _, ids in bands for photo in ids) == sorted(distances)
    assert all(low <= high for low, high, _ in bands)
    assert all(a[1] <= b[0] for a, b in pairwise(bands))
    assert len(bands) <= comparison.BANDS


def test_wrong_streets_near_the_true_one():
    rows = [answer(0, False, said="Oak Avenue, Old Town"), answer(1, False, said="Elm Row"), answer(2, False, said="nowhere")]
    assert comparison.neighbours(rows, CITY, near=1) == {"wrong": 2, "near": 1, "of": 1}
    assert comparison.neighbours([answer(0, True)], CITY) is None


def test_fusion_finds_the_system_that_knows():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 200)
    knows = np.where(np.arange(3) == truth[:, None], 2.0, 0.0) + rng.normal(0, 1, (200, 3))
    noise = rng.normal(0, 3, (200, 3))
    weights = fusion.fit_fusion({"knows": knows, "noise": noise}, truth)
    assert weights["knows"] > 0.5
    assert weights["noise"] < 0.1
    fused = fusion.fuse_scores({"knows": knows, "noise": noise}, weights)
    assert (fused.argmax(1) == truth).mean() >= (knows.argmax(1) == truth).mean() - 0.02
    assert (fused.argmax(1) == truth).mean() > (noise.argmax(1) == truth).mean() + 0.2


def test_fused_is_the_weighted_sum_of_logarithms_of_probabilities():
    scores = {"a": np.log(np.array([[0.5, 0.3, 0.2]])) + 7, "b": np.array([[0.0, -np.inf, np.log(3)]])}
    fused = fusion.fuse_scores(scores, {"b": 0.5, "a": 2.0})
    ruled_out = np.log([0.2, 0.2, 0.6])  # as the least of the others
    assert fused[0] == pytest.approx(2 * np.log([0.5, 0.3, 0.2]) + 0.5 * ruled_out)


def test_fusion_finds_the_best_weights_from_photos_whose_address_is_known():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 4, 60)
    right = np.arange(4) == truth[:, None]
    scores = {name: right * gain + rng.normal(0, 1, (60, 4)) for name, gain in (("a", 1.0), ("b", 0.5), ("c", -0.5))}
    result = fusion.fit_fusion(scores, truth)

    def loss(weights):
        fused = fusion.fuse_scores(scores, weights)
        likely = fused - np.logaddexp.reduce(fused, axis=1, keepdims=True)
        return -likely[np.arange(60), truth].mean() + 1e-3 * sum(weight**2 for weight in weights.values())

    assert list(result) == ["a", "b", "c"]
    assert all(weight >= 0 for weight in result.values())
    assert result["c"] < 0.01
    for name in scores:
        assert all(loss(result) <= loss(result | {name: max(result[name] + step, 0)}) + 1e-6 for step in (0.05, -0.05))
    at = np.array([3, 17, 40])  # unknown ones among them change nothing
    more = {name: np.insert(of, at, rng.normal(size=(3, 4)), axis=0) for name, of in scores.items()}
    assert fusion.fit_fusion(more, np.insert(truth, at, -1)) == pytest.approx(result, abs=1e-6)


def test_fusion_takes_no_photo_of_an_unknown_address_and_no_other_city():
    scores = np.zeros((2, 3))
    with pytest.raises(InputError, match="no validation photo"):
        fusion.fit_fusion({"a": scores, "b": scores}, np.array([-1, -1]))
    with pytest.raises(InputError, match=r"a 3, b 4"):
        fusion.fit_fusion({"a": scores, "b": np.zeros((2, 4))}, np.array([0, 1]))
    ruled_out = np.array([[0.0, -math.inf, 1.0]])
    assert np.isfinite(fusion.fuse_scores({"a": ruled_out, "b": np.zeros((1, 3))}, {"a": 1, "b": 1})).all()


def tree(rows):
    return {"city": "Toytown", "split": "test", "main": "A", "photos": 2, "validation_photos": 0, "systems": rows}


def row(name, answers, **more):
    return {
        "name": name, "kind": "generated", "failed": "", "metrics": metrics.compute_metrics(answers, 100), "top": {},
        "by_training": comparison.by_training(answers, {ADDRESSES[0]}, 100, 0), "by_distance": [], "against": None,
        "trust": None, "neighbours": None, "within": {}, "licences": {"base model": "mit"}, "notes": {},
        "cost": {"parameters": 2_000_000, "stored_bytes": 5_000_000,
                 "training": {"seconds": 1800, "photos": 10, "cpus": 2, "gpus": 0},
                 "answering": {"seconds": 1, "photos": 2, "cpus": 2, "gpus": 0}},
        **more,
    }  # fmt: skip


def test_photos_that_systems_disagree_about(monkeypatch):
    """Those that only the main system got right and those that only the best other one did, with what both said."""
    monkeypatch.setattr(report, "thumbnails", lambda folder, split, ids: {photo: f"of {photo}" for photo in ids})
    rights = {"A": (0, 1, 4), "B": (1, 2, 4, 5), "C": (3,)}
    answers = {name: [answer(i, i in right, said=f"{name}{i}") for i in range(6)] for name, right in rights.items()}
    rows = [row(name, of) for name, of in answers.items()]
    result = report.comparison_section(tree(rows), [{**r, "hue": i + 4} for i, r in enumerate(rows)], answers, "photos", 0)
    assert [r["hue"] for r in result["systems"]] == [4, 5, 6]
    disagreements = result["disagreements"]
    assert [(d["thumbnail"], d["right"]) for d in disagreements] == [("of photo0", "A"), ("of photo2", "B"), ("of photo5", "B")]
    for d in disagreements:
        assert [(name, row["answer"]) for name, row in d["answers"]] == [(n, n + d["thumbnail"][-1]) for n in "AB"]


def test_report_shows_the_comparison(tmp_path):
    ours, theirs = [answer(0, True), answer(1, True)], [answer(0, True), answer(1, False, said="Elm Row, Old Town")]
    curve = comparison.by_distance(ours, {"photo0": 3.0, "photo1": 30.0}, 100, 0)
    rows = [row("A", ours, by_distance=curve), row("B", theirs, against=comparison.paired_difference(ours, theirs, 100, 0))]
    failed = {"name": "C", "kind": "rag", "failed": "no model <folder>"}
    answers = {"A": ours, "B": theirs}
    page = tmp_path / "report.html"
    report.write_report(page, tree(rows), answers, CITY, comparison=tree([*rows, failed]))
    text = page.read_text()
    assert "no model &lt;folder&gt;" in text
    assert "Accuracy by distance to training photos" in text
    assert text.count("<svg") > 4


def test_sub_streets_and_their_streets_are_counted_in_one_ranking():
    """The right street's other part comes first: SSA-1 is 0, SA-1 is 1; parts of one street share a rank."""
    parts = ["Mill Street between A and B", "Mill Street between B and C", *(f"Street {i}" for i in range(5))]
    city = Gazetteer([Address(part, "Town") for part in parts])
    main = {part: part.split(" between ")[0] for part in parts}
    order = [parts.index(a.street) for a in city.addresses]
    rows = [
        {
            "place": f"{i}",
            "street": truth,
            "district": "Town",
            "scores": [-float(order[j] != first) * (1 + j) for j in range(7)],
        }
        for i, (truth, first) in enumerate([(parts[0], 1), (parts[2], 2)])
    ]
    result = {name: cell["value"] for name, cell in comparison.top_k_accuracy(rows, city, 50, 0, main).items()}
    assert (result["address-1"], result["main-1"]) == (0.5, 1.0)
    assert result["main-5"] == 1.0
    assert "main-1" not in comparison.top_k_accuracy(rows, city, 50, 0, {part: part for part in parts})
