import io
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from addressvlm import InputError
from addressvlm.config import Config, validate
from addressvlm.labels.facts import Facts
from addressvlm.labels.templates import explain
from addressvlm.labels.validator import LabelValidator
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.tiles.graft_rows import Grafter
from ray_jobs import graft, label
from ray_jobs.ray_data import to_input_error
from tests.support import town
from tests.support.openai_endpoint import Endpoint, says

pytestmark = pytest.mark.xdist_group("ray")


def photo(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def rows(places: int = 8, views: int = 3) -> list[dict[str, Any]]:
    """Photos along Mill Street; the views of a place follow one another."""
    result = []
    for place in range(places):
        lat, lon = town.degrees(12 * place - 40, 0)
        for view in range(views):
            result.append({
                "id": f"{place}_{view}", "place": str(place), "lat": lat, "lon": lon,
                "heading": None if view == 0 else 120.0 * view,
                "image": {"bytes": photo((200, 30, 30)), "path": f"{place}_{view}.jpg"},
                "street": "Mill Street", "main_street": "Mill Street",
                "district": "Harbour", "cross_street": "King Street", "distance_m": 1.0, "ambiguous": False, "rounds": [],
            })  # fmt: skip
    return result


def config_of(folder: Path, **changes: Any) -> Config:
    town.write_streets(folder / "streets.geojson")
    tree = {
        "name": "town",
        "storage": str(folder / "runs"),
        "city": {"manifest": "unused.csv", "streets": str(folder / "streets.geojson")},
        "tiles": {"pixels": 160, "font_px": 10.0},
        **changes,
    }
    config = validate(tree, "test")
    town.write_run_roads(config)
    return config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with photos: one of them is not a picture, all others are good."""
    config = config_of(tmp_path_factory.mktemp("graft"))
    photos = rows()
    photos[5]["image"]["bytes"] = b"no picture"
    tables.write_table(Run(config).photos, "train", photos, tables.PHOTOS, rows_per_file=10)
    return config


def test_photos_become_labelled_grafts(config: Config, ray_local: None, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(config)
    graft.run_step(config, redo=False)
    label.run_step(config, redo=False)
    out = capsys.readouterr().out
    assert "graft: 24 photos" in out
    assert "1 rejected" in out
    assert "23 template" in out

    grafts = list(tables.iter_rows(run.grafts, "train"))
    assert [row["id"] for row in grafts] == [row["id"] for row in rows() if row["id"] != "1_2"]  # in order, less the bad one
    (reject,) = pq.read_table(run.rejects / "graft.parquet").to_pylist()
    assert (reject["id"], reject["file"]) == ("1_2", "1_2.jpg")
    assert "can't be decoded" in reject["reason"]

    one = datasets.load_dataset(
        "parquet", data_files=str(run.grafts / "train-*.parquet"), split="train", cache_dir=str(run.folder)
    )[0]
    assert one["image"].size == (160, 160)
    corner = np.asarray(one["image"].convert("RGB"))[4:56, 84:156]
    assert abs(corner.astype(int) - (200, 30, 30)).max() < 30
    assert "Mill Street" in one["names"]
    assert Facts.from_json(one["facts"]).cross_street == "King Street"

    files = str(run.alignment / "train-*.parquet")
    labels = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(run.folder))
    assert len(labels) == 23
    assert labels[0]["image"].size == (160, 160)
    (round_,) = labels[0]["rounds"]
    assert "Mill Street" in round_["answer"]
    assert (round_["level"], round_["kind"], labels[0]["source"]) == ("alignment", "explanation", "template")


def test_photos_become_reasoning_labels(config: Config, ray_local: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The prompt decides what is read and written; a photo that is none is rejected."""
    labels = config.labels.model_copy(update={"prompt": "reasoning"})
    label.run_step(config.model_copy(update={"labels": labels}), redo=False)
    result = list(tables.iter_rows(Run(config).reasoning, "train"))
    assert len(result) == 23
    assert {row["rounds"][0]["level"] for row in result} == {"reasoning"}
    (reject,) = pq.read_table(Run(config).rejects / "label-reasoning.parquet").to_pylist()
    assert (reject["id"], reject["file"]) == ("1_2", "1_2.jpg")
    assert "23 template; 1 rejected" in capsys.readouterr().out


def test_done_steps_are_skipped_and_changed_ones_refused(
    config: Config, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    graft.run_step(config, redo=False)
    label.run_step(config, redo=False)
    before = (Run(config).alignment / "train-00000.parquet").read_bytes()
    capsys.readouterr()
    graft.run_step(config, redo=False)
    label.run_step(config.model_copy(update={"labels": config.labels.model_copy(update={"concurrency": 2})}), redo=False)
    assert capsys.readouterr().out == "graft: already done\nlabel: already done\n"
    with pytest.raises(InputError, match=r"tiles\.delta"):
        graft.run_step(config.model_copy(update={"tiles": config.tiles.model_copy(update={"delta": 0.3})}), redo=False)
    label.run_step(config, redo=True)
    assert (Run(config).alignment / "train-00000.parquet").read_bytes() == before  # labels are the same every time


def test_too_many_bad_places_stop_the_run(tmp_path: Path, ray_local: None) -> None:
    config = config_of(tmp_path)
    photos = rows(places=2)
    for row in photos[:4]:
        row["lat"] += 1.0
    tables.write_table(Run(config).photos, "train", photos, tables.PHOTOS)
    with pytest.raises(
        InputError, match=r"4 of 6 photos have no graft \(the first: no street of the map.*\): fix .*graft\.parquet, or raise"
    ):
        graft.run_step(config, redo=False)
    assert pq.read_metadata(Run(config).rejects / "graft.parquet").num_rows == 4
    assert not Run(config).grafts.exists()


def test_missing_inputs_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    with pytest.raises(InputError, match="no table"):
        graft.run_step(config, redo=False)
    with pytest.raises(InputError, match="no table"):
        label.run_step(config, redo=False)
    tables.write_table(Run(config).photos, "train", rows(1), tables.PHOTOS)
    Run(config).roads.unlink()
    with pytest.raises(InputError, match=r"no .*roads\.fgb to draw tiles from: rerun prepare"):
        graft.run_step(config, redo=False)
    tables.write_table(Run(config).grafts, "train", [{"id": "a", "facts": "{}"}], tables.GRAFTS)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    paid = config.model_copy(update={"labels": config.labels.model_copy(update={"labeler": "openai"})})
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        label.run_step(paid, redo=False)


def test_labels_of_an_endpoint(tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Good texts are taken; for places where the endpoint talks nonsense the template's are, marked as such."""
    good = (
        "The road leads on between two plain walls here, and the map shows it running straight. This is Mill Street in Harbour."
    )
    pictures: list[str] = []

    def reply(number: int, body: dict[str, Any]) -> Any:
        picture = body["messages"][1]["content"][0]["image_url"]["url"]
        if picture not in pictures:
            pictures.append(picture)
        return says(good if pictures.index(picture) < 5 else "No idea.")

    with Endpoint(reply).running() as endpoint:
        labels = {"labeler": "openai", "model": "m", "base_url": endpoint.url, "max_attempts": 2, "concurrency": 4}
        config = config_of(tmp_path, labels={**labels, "usd_per_million_in": 1.0, "usd_per_million_out": 2.0})
        run = Run(config)
        tables.write_table(run.photos, "train", rows(places=8, views=1), tables.PHOTOS)
        graft.run_step(config, redo=False)
        label.run_step(config, redo=False, dry_run=True)
        assert not endpoint.requests
        assert not run.alignment.exists()
        label.run_step(config, redo=False)
    out = capsys.readouterr().out
    assert out.count("8 rows: 0 have cached answers, 8 will be sent") == 2  # the dry run says what the real one says
    assert Counter(row["source"] for row in tables.iter_rows(run.alignment, "train")) == {"openai:m": 5, "fallback:template": 3}
    assert {row["rounds"][0]["answer"] for row in tables.iter_rows(run.alignment, "train") if row["source"] == "openai:m"} == {
        good
    }
    assert len(endpoint.requests) == 5 + 2 * 3
    report = json.loads((run.alignment / "labels.json").read_text())
    assert (report["sources"], report["problems"]["street"]) == ({"openai:m": 5, "fallback:template": 3}, 6)
    assert (report["last_job"]["asked"], report["last_job"]["usd"]) == (11, pytest.approx(report["run"]["usd"], rel=1e-3))
    assert "8 labels: 5 openai:m, 3 fallback:template" in out


def test_an_unreachable_endpoint(tmp_path: Path, ray_local: None) -> None:
    """An endpoint that is not there ends the job with its sentence, and no table is written."""
    config = config_of(tmp_path, labels={"labeler": "openai", "base_url": "http://127.0.0.1:9/v1", "retries": 0})
    photos = rows(places=8)
    tables.write_table(Run(config).photos, "train", photos, tables.PHOTOS)
    graft.run_step(config, redo=False)
    with pytest.raises(InputError, match=r"^http://127\.0\.0\.1:9/v1/ keeps failing"):
        label.run_step(config, redo=False)
    assert not Run(config).alignment.exists()


def test_a_places_tile_is_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    grafter = Grafter(config.city.streets, None, config.tiles)
    drawn = []
    draw = grafter.renderer.tile
    monkeypatch.setattr(grafter.renderer, "tile", lambda *spot: (drawn.append(spot), draw(*spot))[1])
    result = list(grafter.graft_rows(rows(places=4, views=3)))
    assert len(result) == 12
    assert len(drawn) == 4


def test_a_sub_street_has_the_facts_of_its_street(tmp_path: Path) -> None:
    """The answer is a part of Mill Street; what is measured is Mill Street, what is concluded on is the part."""
    config = config_of(tmp_path)
    part = "Mill Street between Low Street and King Street"
    (photo,) = rows(places=1, views=3)[1:2]
    (row,) = Grafter(config.city.streets, None, config.tiles).graft_rows(
        [{**photo, "street": part, "main_street": "Mill Street"}]
    )
    facts = Facts.from_json(row["facts"])
    assert (facts.street, facts.main_street, facts.names[0]) == (part, "Mill Street", "Mill Street")
    assert (facts.direction, facts.view, facts.cross_street) == ("east-west", "along", "King Street")
    for seed in range(20):
        text = explain(facts, random.Random(seed))
        assert "Mill Street runs east-west" in text or "Mill Street in the middle" not in text
        assert LabelValidator([part, "Low Street"]).problems(text, facts) == []
    whole = text.replace(f"{part}", "Mill Street")
    assert {problem.kind for problem in LabelValidator([part]).problems(whole, facts)} == {"street", "conclusion"}


def test_a_street_in_another_spelling_is_the_same_street(tmp_path: Path) -> None:
    """The map calls the street in two languages, the address in one of them."""
    config = config_of(tmp_path)
    photo = {**rows(places=1, views=1)[0], "street": "Muhlenstrasse", "main_street": "Muhlenstrasse"}
    lines = {name: line for name, line in town.STREETS.items() if name == "Mill Street"}
    streets = town.write_streets(tmp_path / "mill.geojson", lines, alt_name="Via del Molino; Mühlenstraße")
    (row,) = Grafter(str(streets), None, config.tiles).graft_rows([photo])
    facts = Facts.from_json(row["facts"])
    assert (facts.direction, facts.names) == ("east-west", ("Mill Street",))
    text = "Plain walls stand on both sides and the map shows one road. So this is the Via del Molino in Harbour, by the mill."
    mill = replace(facts, street="Mill Street", main_street="Mill Street")
    variants = {"Mill Street": ["Via del Molino"]}
    assert LabelValidator(["Mill Street"], variants=variants).problems(text, mill) == []
    assert LabelValidator(["Mill Street"]).problems(text, mill) != []


def test_an_exception_of_a_worker_keeps_its_sentence(ray_local: None) -> None:
    @ray.remote
    class Worker:
        def __init__(self) -> None:
            raise InputError("no model folder: give one that exists.")

        def work(self) -> None: ...

    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.get(Worker.remote().work.remote())
    assert str(to_input_error(caught.value)) == "no model folder: give one that exists."

    def fail(batch: Any) -> Any:
        raise InputError("the batch is bad: mend it.")

    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.data.range(1).map_batches(fail).materialize()
    assert str(to_input_error(caught.value)) == "the batch is bad: mend it."
    assert to_input_error(KeyError("ours")) is None
