"""Results as text: the comparison in its files and on the terminal, and the decoding modes."""

import csv
import io
import json

from addressvlm.evaluation import comparison, result_tables
from tests.evaluation.test_comparison import ADDRESSES, answer, row, tree


def test_files_have_the_cost_of_a_system_and_why_one_failed(tmp_path):
    ours, theirs = ([answer(0, True), answer(1, right, ADDRESSES[1])] for right in (True, False))
    rows = [
        row("A", ours), row("B", theirs, against=comparison.paired_difference(ours, theirs, 100, 0)),
        {"name": "C", "kind": "rag", "failed": "no model folder /nowhere: give one."},
    ]  # fmt: skip
    result_tables.write_comparison(tmp_path, tree(rows))
    assert json.loads((tmp_path / "comparison.json").read_text())["systems"][2]["failed"].startswith("no model folder")
    text = (tmp_path / "comparison.md").read_text()
    assert "| C | not done: no model folder /nowhere: give one. |" in text
    assert "2.0 M" in text
    assert "1 CPU h" in text
    assert "| 500 |" in text
    assert "-50.0" in text
    lines = list(csv.DictReader(io.StringIO((tmp_path / "comparison.csv").read_text())))
    assert [line["name"] for line in lines] == ["A", "B", "C"]
    assert float(lines[1]["A_ds_minus_main"]) == -0.5
    assert lines[2]["A_ds"] == ""
    assert "not done" in result_tables.comparison_text(tree(rows))


def test_the_cost_of_a_system_is_the_sum_of_its_parts():
    parts = {
        "training": {"seconds": 3600, "cpus": 4, "gpus": 2},
        "index": {"seconds": 1800, "cpus": 8, "gpus": 1},
        "answering": {"seconds": 3, "photos": 12, "cpus": 2, "gpus": 1},
    }
    system = {"cost": {"parameters": 1_500_000, "stored_bytes": 2_500_000, **parts}}
    assert result_tables.total_cost(system) == {
        "parameters": 1_500_000, "cpu_hours": 8.0, "gpu_hours": 2.5, "ms_per_photo": 250.0, "stored_bytes": 2_500_000
    }  # fmt: skip
    assert result_tables.cost_cells(system) == ["1.5 M", "2.5 GPU h, 8 CPU h", "250", "2.5 MB"]
    assert result_tables.cost_cells({}) == ["–"] * 4


def test_differences_are_those_of_the_other_system():
    """In the table, in the CSV: the other minus the main one, so that the ends change places."""
    cell = {"value": 0.25, "low": 0.125, "high": 0.5, "n": 8}
    against = {"A_ds": cell, "mcnemar": {"better": 3, "worse": 1, "p": 0.0625}}
    top = {"address-1": {"value": 0.5, "low": 0.4, "high": 0.6}, "address-5": {"value": 0.75, "low": 0.7, "high": 0.8}}
    other = row("B", [answer(0, True)], against=against, top=top)
    shown = dict(zip(result_tables.HEAD, result_tables.cells(other, "A"), strict=True))
    assert (shown["minus main, A_ds"], shown["p"]) == ("-25.0 (-50.0 to -12.5)", "0.062")
    assert shown["top 5"] == "75.0 (70–80)"
    (line,) = csv.DictReader(io.StringIO(result_tables._comparison_csv(tree([other]))))
    assert [float(line[f"A_ds_minus_main{end}"]) for end in ("_low", "", "_high")] == [-0.5, -0.25, -0.125]
    assert (float(line["mcnemar_p"]), float(line["address_5"])) == (0.0625, 0.75)
    (note,) = result_tables._footnotes(tree([row("B", [answer(0, True), answer(1, False, ADDRESSES[1])])]))[1:]
    assert "of 1 where training has the address, 0.0 (0–" in note


def test_the_terminal_shows_the_calibration_of_a_model():
    cells = {
        name: {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 9}
        for name, value in (("ece", 0.125), ("half", 0.75), ("coverage", 0.5), ("precision", 0.8))
    }
    trust = {**cells, "ece_uncalibrated": 0.25, "target": 0.9}
    lines = result_tables.decoding_table({"system": "Ours", "photos": 1234, "table": [], "trust": trust}).splitlines()
    assert lines[0] == "Ours, decoding modes, 1,234 photos"
    assert lines[-3:] == [
        "calibration error 12.5 (2–22) (uncalibrated 25.0)",
        "accuracy on the most confident 50 % 75.0 (65–85)",
        "at a target of 90% right answers: answers 50.0 (40–60) of the photos, accuracy 80.0 (70–90)",
    ]
