"""What many cities will take: counted photos, money for labels, hours"""

from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from addressvlm.config import validate
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from ray_jobs import city_estimate
from ray_jobs.city_estimate import count_photos, label_cost, print_world_estimate
from tests.config.test_world import world_of


def test_photos_are_counted_where_a_glance_is_enough(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('file,lat,lon\n"a\nb.jpg",1,2\nc.jpg,1,2\n')
    pq.write_table(pa.table({"file": ["a", "b", "c"]}), tmp_path / "a.parquet")
    cities = {"csv": "a.csv", "parquet": "a.parquet", "json": "a.json", "gone": "gone.csv"}
    (tmp_path / "a.json").write_text("[]")
    counts = {}
    for name, file in cities.items():
        city = {"manifest": str(tmp_path / file)}
        counts[name] = count_photos(validate({"name": name, "storage": str(tmp_path), "city": city}, "test"))
    assert counts == {"csv": 2, "parquet": 3, "json": None, "gone": None}
    (tmp_path / "a.tsv").write_text("file\tlat\n")
    empty = validate({"name": "tsv", "storage": str(tmp_path), "city": {"manifest": str(tmp_path / "a.tsv")}}, "test")
    assert count_photos(empty) == 0
    assert count_photos(validate({"name": "toy", "storage": str(tmp_path), "city": {"toy": "alderbrook"}}, "test")) is None


def test_prepared_photos_of_all_splits_are_counted_before_the_table_s_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("file\n" + "x.jpg\n" * 9)
    config = validate({"name": "a", "storage": str(tmp_path), "city": {"manifest": str(tmp_path / "a.csv")}}, "test")
    for split, rows in (("train", 3), ("val", 2), ("test", 1)):
        tables.write_table(Run(config).photos, split, [{"id": str(n)} for n in range(rows)], pa.schema([("id", pa.string())]))
    assert count_photos(config) == 9  # it is not prepared yet
    (Run(config).photos / "card.json").write_text("{}")
    assert count_photos(config) == 6


def test_labels_cost_what_the_endpoint_takes_for_tokens() -> None:
    prices = {"usd_per_million_in": 2.0, "usd_per_million_out": 4.0}
    labels = {"labeler": "openai", "image_rule": "fixed", "image_base": 1000, "max_tokens": 100, **prices}
    tokens, usd = label_cost(validate({"labels": labels}, "test"))
    assert 1300 < tokens < 3000
    assert usd == pytest.approx((2 * (tokens - 100) + 4 * 100) / 1e6)
    for price in prices:
        assert label_cost(validate({"labels": {**labels, price: None}}, "test")) == (tokens, None)
    more = {"labels": {**labels, "image_base": 1500}, "tiles": {"pixels": 320}}
    assert label_cost(validate(more, "test"))[0] == tokens + 500
    patches = [{"labels": {**labels, "image_rule": "patches"}, "tiles": {"pixels": side}} for side in (320, 640)]
    few, many = (label_cost(validate(tree, "test"))[0] for tree in patches)
    assert many - few == pytest.approx(300 * validate(patches[0], "test").labels.image_each, abs=1)  # 20 x 20 less 10 x 10
    assert label_cost(validate({}, "test")) == (0.0, 0.0)


def test_the_estimate_adds_up_all_cities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rows in (("a", 300), ("b", 700)):
        (tmp_path / f"{name}.csv").write_text("file\n" + "x.jpg\n" * rows)
    table = [{"name": name, "manifest": str(tmp_path / f"{name}.csv")} for name in "ab"] + [{"name": "c", "photos": "p"}]
    split = {"train": 0.5, "val": 0.3, "test": 0.2}
    prices = {"usd_per_million_in": 1e6, "usd_per_million_out": 1e6}
    labels = {"labeler": "openai", **prices}
    settings = {"workers": 2, "gpus_per_worker": 1, "mfu": 0.5}
    world = world_of(tmp_path, table, city={"split": split}, train=settings, labels=labels)
    stage = SimpleNamespace(steps=10, rows_per_step=8, flops=9e15)  # of a city of 250 photos to train on
    asked = []
    monkeypatch.setattr(city_estimate, "model_shape", lambda config: None)
    monkeypatch.setattr(city_estimate, "peak_flops", lambda *_: 2e15)
    monkeypatch.setattr(
        city_estimate, "estimate_stages", lambda config, system, shape, photos, cpu: asked.append((photos, cpu)) or [stage]
    )
    print_world_estimate(world, ["a", "b", "c"], ["AddressVLM"], None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["a: 300 photos", "b: 700 photos"]
    assert lines[2] == "not counted: c (give --photos N for each of them)"
    assert lines[3].startswith("2 cities: 1,000 photos, about 500 to train on, 0.1 GB")
    each = label_cost(world.cities["a"])[0]
    assert lines[4] == f"labels: {500 * each:,.0f} tokens, at most {500 * each:,.4g} US dollars, for one request a photo"
    assert lines[-1].endswith("about 0.4 GPU hours at 50% of the peak")
    assert asked == [(250, False)]
    print_world_estimate(world, ["c"], ["AddressVLM"], 40)
    assert "1 city: 40 photos" in capsys.readouterr().out
    print_world_estimate(world, ["a", "c"], ["AddressVLM"], 10**6)  # a's photos are counted
    assert "2 cities: 1,000,300 photos, about 500,150 to train on, 84.7 GB of tables" in capsys.readouterr().out
    assert asked[1:] == [(20, False), (250_075, False)]
    monkeypatch.setattr(city_estimate, "peak_flops", lambda *_: None)
    free = world_of(tmp_path, table, labels={"labeler": "openai"}, train={"workers": 1, "gpus_per_worker": 0})
    print_world_estimate(free, ["a"], None, None)
    lines = capsys.readouterr().out.splitlines()
    assert "unknown cost without labels.usd_per_million_in" in lines[-2]
    assert lines[-1].endswith("PFLOP; set train.peak_tflops for hours")
    assert asked[-1][1]
