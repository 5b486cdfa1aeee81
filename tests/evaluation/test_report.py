"""The report holds what the run has, needs nothing else, and draws what the data say."""

import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from PIL import Image

from addressvlm.config.labels import LabelsConfig
from addressvlm.evaluation import metrics, plots, report
from addressvlm.evaluation.plots import CityMap, distance_curves, interval_bar, loss_curves, reliability_diagram
from addressvlm.evaluation.report import rejects_section
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.labels.costs import label_report
from addressvlm.storage import tables
from tests.support import north

GAZETTEER = Gazetteer(
    [Address("Mill Street", "Harbour"), Address("Oak & Elm <Row>", "Old Town")],
    {
        "Mill Street": shapely.LineString([(0.1, 52.2), (0.11, 52.2)]),
        "Oak & Elm <Row>": shapely.LineString([(0.1, 52.201), (0.11, 52.205)]),
    },
    {"Harbour": shapely.box(0.09, 52.19, 0.12, 52.21)},
    city="Toytown",
    attribution=["© somebody"],
)
SYSTEMS = ["zero-shot", "AddressVLM"]


def jpeg(size=(40, 30), colour=(200, 30, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


def answered(correct):
    """Twelve questions about each of six photos of three places; every second one right, or none."""
    rows = []
    for i in range(6):
        for level, kind in metrics.CELLS.values():
            street = "Mill Street" if i % 2 else "Oak & Elm <Row>"
            rows.append(
                {
                    "id": f"photo{i}", "place": f"place{i // 2}", "lat": 52.2 + i // 2 / 1000, "lon": 0.1, "street": street,
                    "district": "Harbour", "level": level, "kind": kind, "question": "q", "options": [],
                    "expected": f"{street}, Harbour", "answer": "<b>Mill</b>", "correct": correct and i != 0,
                }
            )  # fmt: skip
    return rows


@pytest.fixture
def run(tmp_path):
    photo = {"heading": None, "cross_street": None, "distance_m": 1.0, "ambiguous": False, "rounds": []}
    place = {"lat": 52.2, "lon": 0.1, "street": "Mill Street", "district": "Harbour"}
    images = [{"id": f"photo{i}", "place": "p", "image": {"bytes": jpeg((900, 600)), "path": None}} for i in range(6)]
    tables.write_table(tmp_path / "photos", "test", [photo | place | image for image in images], tables.PHOTOS)
    card = {"city": "Toytown", "split_buffer_m": 25.0, "attribution": ["© photographer"], "splits": {"train": {"photos": 1234}},
            "min_train_to_held_out_m": 27.34, "questions_by_kind": {"train": {"street": {"choice": 99}}}}  # fmt: skip
    (tmp_path / "photos" / "card.json").write_text(json.dumps(card))
    label = {
        "level": "alignment",
        "kind": "explanation",
        "question": "Why there?",
        "answer": "The bend & the tower.",
        "options": [],
    }
    graft = {"street": "Mill Street", "district": "Harbour", "rounds": [label], "source": "template", "attempts": 1}
    tables.write_table(tmp_path / "alignment", "train", [graft | images[0]], tables.ALIGNMENT)
    counts = Counter({"source openai:m": 9, "source fallback:template": 1, "problem length": 3})
    labels = label_report(LabelsConfig(labeler="openai", model="m"), counts, {}, None)
    (tmp_path / "alignment" / "labels.json").write_text(json.dumps(labels))
    (tmp_path / "training" / "addressvlm").mkdir(parents=True)
    logged = [
        {"stage": s, "step": i, "loss": 2 / i, "learning_rate": 1e-4} for s in ("alignment", "localization") for i in (1, 2, 3)
    ]
    (tmp_path / "training" / "addressvlm" / "loss.jsonl").write_text("\n".join(map(json.dumps, logged)))
    (tmp_path / "rejects").mkdir()
    rejected = [{"file": "m", "row": i, "id": str(i), "reason": f"too far: {i} m"} for i in range(7)]
    pq.write_table(pa.Table.from_pylist(rejected, schema=tables.REJECTS), tmp_path / "rejects" / "prepare.parquet")
    return tmp_path


def written(folder, sources=None, gazetteer=GAZETTEER, answers=None):
    answers = answers or {"zero-shot": answered(False), "AddressVLM": answered(True)}
    systems = [{"name": name, "metrics": metrics.compute_metrics(rows, 100)} for name, rows in answers.items()]
    path = folder / "report.html"
    report.write_report(
        path, {"city": "Toytown", "split": "test", "systems": systems}, answers, gazetteer, sources, resamples=100
    )
    return path.read_text()


def all_sources(run):
    return report.ReportSources(run / "photos", run / "alignment", run / "training", run / "rejects")


class Checker(HTMLParser):
    """Collects what a page loads, and whether its tags are closed in order."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self):
        super().__init__()
        self.open, self.loaded = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attributes):
        self.loaded += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_shows_everything_the_run_has(run):
    page = written(run, all_sources(run))
    for text in (
        "Toytown",
        "No held-out place is nearer than 27.3 m to a training place (split buffer 25 m).",
        "83.3",
        "Why there?",
        "The bend &amp; the tower.",
        "© somebody",
        "© photographer",
        "1,234",
        "too far",
    ):
        assert text in page
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert len(titles) == 7
    assert page.count('class="map"') == len(SYSTEMS)
    assert page.count('class="loss"') == 1
    assert page.count("data:image/jpeg;base64,") == 3 + 1  # a photo of each place, one graft
    assert "10 labels: 9 openai:m, 1 fallback:template; texts rejected for: 3 length." in page
    assert 'polyline class="smooth stage1"' in page


def test_is_self_contained_and_well_formed(run):
    checker = Checker()
    checker.feed(written(run, all_sources(run)))
    assert checker.open == []
    assert all(value.startswith(("data:", "#")) for value in checker.loaded)
    assert "url(" not in written(run)


def test_text_from_outside_is_escaped(run):
    page = written(run, all_sources(run))
    assert "<b>Mill</b>" not in page
    assert "<Row>" not in page
    assert "Oak &amp; Elm &lt;Row&gt;" in page


def test_needs_only_metrics_and_answers(tmp_path):
    page = written(tmp_path, gazetteer=None)
    assert len(re.findall("<h2>", page)) == 3  # accuracy, differences, map
    assert page.count('class="map"') == 2


def test_one_system_without_places_on_the_map(tmp_path):
    rows = [row | {"lat": None, "lon": None} for row in answered(True)]
    page = written(tmp_path, answers={"mine": rows})
    assert "against the others" not in page
    assert 'class="map"' not in page


def test_a_resumed_run_counts_a_step_once(tmp_path):
    entries = [("a", 1, 9.0), ("a", 2, 8.0), ("a", 2, 7.0), ("b", 1, 5.0)]
    lines = [json.dumps({"stage": s, "step": i, "loss": loss, "learning_rate": 0}) for s, i, loss in entries]
    (tmp_path / "loss.jsonl").write_text("\n".join(lines))
    assert report._losses(tmp_path / "loss.jsonl") == {"a": [(1, 9.0), (2, 7.0)], "b": [(3, 5.0)]}


def test_map_marks_right_partly_and_wrong():
    city = CityMap([(52.2, 0.1), (52.21, 0.11)], GAZETTEER)
    places = [
        {"lat": 52.2 + i / 200, "lon": 0.1 + i / 200, "share": share, "note": "<n>"} for i, share in enumerate((0, 0.5, 1))
    ]
    root = ElementTree.fromstring(city.draw(places))
    marks = [element.get("class") for element in root.iter() if element.get("class")]
    assert marks == ["map", "wrong", "partly", "right", "right"]
    drawn = list(root.iter("circle"))
    x = [float(circle.get("cx")) for circle in drawn]
    y = [float(circle.get("cy")) for circle in drawn]
    assert x == sorted(x)  # east is right
    assert y == sorted(y, reverse=True)  # north is up
    assert all(0 <= value <= city.width for value in x)
    assert all(0 <= value <= city.height for value in y)
    assert len(ElementTree.fromstring(city.defs).findall(".//path[@class='street']")) == 2


def test_a_map_far_from_the_equator_is_not_stretched():
    """Four places 300 m around the middle of the map are as far from it on the map."""
    corners = [north.at(east, up) for east, up in ((1000, 1000), (-1000, -1000))]
    around = [north.at(east, up) for east, up in ((0, 0), (300, 0), (-300, 0), (0, 300), (0, -300))]
    places = [{"lat": lat, "lon": lon, "share": 1, "note": ""} for lat, lon in around]
    marks = list(ElementTree.fromstring(CityMap(corners, None).draw(places)).iter("circle"))
    (x, y), *others = [(float(mark.get("cx")), float(mark.get("cy"))) for mark in marks]
    unit = others[0][0] - x
    assert unit == pytest.approx(300 * 520 / 2240, rel=0.02)  # 2 km and the margins over the width
    expected = [(x + unit, y), (x - unit, y), (x, y - unit), (x, y + unit)]
    assert others == [(pytest.approx(right, abs=0.5), pytest.approx(down, abs=0.5)) for right, down in expected]


def test_curves_and_bins_stand_where_their_numbers_are():
    bands = [
        {"from_m": 0, "to_m": 100, "value": 0.5, "n": 3},
        {"from_m": 100, "to_m": 400, "value": 0.25, "n": 3},
    ]
    drawn = ElementTree.fromstring(distance_curves([{"name": "A", "hue": 3, "by_distance": bands}]))
    (x, y), (further, lower) = [(float(c.get("cx")), float(c.get("cy"))) for c in drawn.iter("circle")]
    assert drawn.find("g[@class='hue3']") is not None
    ends = [float(tick.get("x")) for tick in drawn.findall("text") if tick.text.endswith(" m")]
    bottom, top = (float(line.get("y1")) for line in drawn.findall("line")[::2])
    assert [x, further] == pytest.approx([ends[0] + (ends[2] - ends[0]) * share for share in (50 / 400, 250 / 400)], abs=0.1)
    assert [y, lower] == pytest.approx([bottom + (top - bottom) * share / 0.55 for share in (0.5, 0.25)], abs=0.1)
    bins = [{"photos": 4, "confidence": 0.5, "right": 0.25}, {"photos": 1, "confidence": 1.0, "right": 1.0}]
    diagram = ElementTree.fromstring(reliability_diagram(bins))
    frame = {key: float(value) for key, value in diagram.find("rect").attrib.items() if key != "class"}
    first, last = ([float(c.get(key)) for key in ("cx", "cy", "r")] for c in diagram.iter("circle"))
    assert first[:2] == pytest.approx([frame["x"] + frame["width"] / 2, frame["y"] + 0.75 * frame["height"]], abs=0.1)
    assert last[:2] == pytest.approx([frame["x"] + frame["width"], frame["y"]], abs=0.1)
    assert (first[2], last[2]) == (10.0, 6.5)  # the area over the least goes by the photos


def test_what_is_confused_most_is_counted_by_photo():
    def said(street, named, level="street", kind="generation", correct=False):
        return {"expected": street, "answer": named, "level": level, "kind": kind, "correct": correct}

    rows = [
        *[said("A", "B")] * 2, *[said("C", "A")] * 3, said("B", "A"), *[said("A", "A", correct=True)] * 5,
        *[said("A", "D", level="address")] * 5, *[said("A", "No", kind="judgment")] * 5,
    ]  # fmt: skip
    assert report._confusions(rows) == [{"expected": "C", "answer": "A", "n": 3}, {"expected": "A", "answer": "B", "n": 2}]


def test_rows_left_out_are_counted_by_step_and_reason(tmp_path):
    for step, reasons in (("prepare", ["far: 3 m"] * 3 + ["far: 4 m"] + ["no file"] * 2), ("grafts", ["far: 9 m"] * 3)):
        rows = [{"file": "m", "row": i, "id": str(i), "reason": reason} for i, reason in enumerate(reasons)]
        pq.write_table(pa.Table.from_pylist(rows, schema=tables.REJECTS), tmp_path / f"{step}.parquet")
    assert rejects_section(tmp_path) == [("prepare", "far", 4), ("grafts", "far", 3), ("prepare", "no file", 2)]
    assert rejects_section(None) == []


def test_a_smooth_curve_is_the_mean_around_each_point():
    """Of 48 losses three on each side, fewer at the ends; a straight line stays one."""
    straight = [(float(step), 100.0 - step) for step in range(1, 49)]
    assert plots._smooth(straight) == pytest.approx(straight)
    jump = [(float(step), 7.0 * (step > 24)) for step in range(1, 49)]
    smoothed = [loss for _, loss in plots._smooth(jump)]
    assert smoothed[20:28] == pytest.approx([0, 1, 2, 3, 4, 5, 6, 7])
    assert (smoothed[0], smoothed[-1]) == (0, 7)
    assert [plots._ticks(end) for end in (4, 1, 0.3, 900)] == [
        [0, 1, 2, 3, 4], [0, 0.25, 0.5, 0.75, 1], [0, 0.1, 0.2, 0.3], [0, 250, 500, 750]
    ]  # fmt: skip


def test_places_of_the_map_are_those_of_address_answers():
    rows = [
        {"id": str(i), "place": place, "lat": lat, "lon": 0.1, "level": level, "expected": "E", "answer": answer,
         "correct": right}
        for i, (place, lat, level, answer, right) in enumerate(
            [("p", 1.0, "address", "x", True), ("p", 1.0, "address", "y", False), ("p", 1.0, "address", "y", False),
             ("p", 1.0, "street", "x", True), ("q", 2.0, "address", "z", True), ("r", None, "address", "z", True)]
        )
    ]  # fmt: skip
    assert report._places(rows) == [
        {"lat": 1.0, "lon": 0.1, "share": pytest.approx(1 / 3), "note": "E: 1 of 3 right; answered “y”"},
        {"lat": 2.0, "lon": 0.1, "share": 1, "note": "E: 1 of 1 right; answered “z”"},
    ]


def test_differences_are_the_main_system_minus_each_other():
    answers = {"zero-shot": answered(False), "AddressVLM": answered(True)}
    systems = [{"name": name} for name in answers]
    (result,) = report._differences(systems, systems[1], answers, 100, 0)
    assert (result["name"], result["gain"]["A_ds"]["value"]) == ("zero-shot", pytest.approx(5 / 6))
    assert report._reach([result]) == 1.0
    assert report._reach([{"gain": {"A": {"low": -0.41, "high": 0.1}}}]) == 0.5
    assert report.main_system(["AddressVLM", "other"]) == "AddressVLM"
    assert report.main_system(["a", "b"]) == "b"


def test_examples_are_of_different_places_half_of_them_right(run):
    rows = answered(True)
    answers = {"zero-shot": answered(False), "AddressVLM": rows}
    systems = [{"name": name} for name in answers]
    result = report._examples(systems, systems[1], answers, "test", run / "photos", 0)
    assert len({row["place"] for row in result}) == len(result) == 3
    for row in result:
        assert [a["name"] for a in row["answers"]] == list(answers)
        assert [a["row"]["id"] for a in row["answers"]] == [row["id"]] * 2
        assert [a["row"]["correct"] for a in row["answers"]] == [False, row["id"] != "photo0"]
    many = [{**rows[6], "id": f"photo{i % 6}", "place": str(i), "correct": i < 30} for i in range(60)]
    chosen = report._examples([systems[1]], systems[1], {"AddressVLM": many}, "test", run / "photos", 0)
    assert [row["correct"] for row in chosen] == [True] * 4 + [False] * 4


def test_map_of_a_single_place():
    city = CityMap([(52.2, 0.1)], GAZETTEER)
    ElementTree.fromstring(city.draw([{"lat": 52.2, "lon": 0.1, "share": 1.0, "note": ""}]))


def test_interval_bar_lengths():
    bar = ElementTree.fromstring(interval_bar({"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}, width=100))
    assert float(bar.find("rect[@class='bar']").get("width")) == 50
    whisker = bar.find("line[@class='whisker']")
    assert (float(whisker.get("x1")), float(whisker.get("x2"))) == (25, 75)
    negative = ElementTree.fromstring(interval_bar({"value": -0.5, "low": -0.6, "high": -0.4, "n": 4}, 100, low=-1))
    assert float(negative.find("rect[@class='bar']").get("x")) == 25
    assert interval_bar({"value": None, "low": None, "high": None, "n": 0}) == ""


def test_loss_curves_share_their_axes():
    root = ElementTree.fromstring(loss_curves({"a": [(1, 2.0), (2, 1.0)], "b": [(3, 2.0)]}, top=2.0, steps=6))
    lines = root.findall("polyline")
    assert len(lines) == 4
    assert lines[1].get("points").split()[0].split(",")[1] == lines[3].get("points").split(",")[1]  # same loss, same height
