"""pytest tests/test_report.py: the report holds what the run has, needs nothing else, and draws what the data say."""

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

from addressvlm import tables
from addressvlm.addresses import Address, Gazetteer
from addressvlm.config_labels import LabelsConfig
from addressvlm.evaluation import metrics, report
from addressvlm.evaluation.figures import CityMap, interval_bar, loss_curves
from addressvlm.labels.tally import report_of

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
    tables.write(tmp_path / "photos", "test", [photo | place | image for image in images], tables.PHOTOS)
    card = {"city": "Toytown", "guard_m": 25.0, "attribution": ["© photographer"], "splits": {"train": {"photos": 1234}},
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
    tables.write(tmp_path / "alignment", "train", [graft | images[0]], tables.ALIGNMENT)
    counts = Counter({"source openai:m": 9, "source fallback:template": 1, "problem length": 3})
    labels = report_of(LabelsConfig(labeler="openai", model="m"), counts, {}, None)
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
    systems = [{"name": name, "metrics": metrics.score(rows, 100)} for name, rows in answers.items()]
    path = folder / "report.html"
    report.write(path, {"city": "Toytown", "split": "test", "systems": systems}, answers, gazetteer, sources, resamples=100)
    return path.read_text()


def all_sources(run):
    return report.Sources(run / "photos", run / "alignment", run / "training", run / "rejects")


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
        "No held-out place is nearer than 27.3 m to a training place (guard 25 m).",
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
    assert "10 labels: 9 openai:m, 1 fallback:template; texts not taken for: 3 length." in page
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
