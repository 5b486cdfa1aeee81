"""Any number of photos localized on a real Ray, through interruptions."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from addressvlm import InputError
from addressvlm.answers.batch_localize import BatchLocalizer, photo_table
from addressvlm.answers.calibration import Calibration
from addressvlm.config import validate
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.inference import Localizer
from addressvlm.storage import tables
from addressvlm.storage.run_dir import mark_done
from addressvlm.storage.shards import MARKS_DIR, plan_file_shards
from ray_jobs import localize
from tests.support.families import picture
from tests.support.tiny import tiny_llava

pytestmark = pytest.mark.xdist_group("ray-answers")

CITY = Gazetteer([Address("Mill Street", "Harbour"), Address("Oak Avenue", "Old Town")], city="Toytown")
CPUS = ["--set", "evaluate.workers=2", "--set", "evaluate.cpus_per_worker=0.5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_llava(tmp_path_factory.mktemp("model"))
    CITY.save(folder / "gazetteer.geojson")
    Calibration(2.0, 0.8, {"0.8": 0.6}).save(folder)
    return folder


def jpeg(seed):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos, one in a folder of its own, and two files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for i in range(30):
        (folder / f"{i:02}.jpg").write_bytes(jpeg(i))
    (folder / "more" / "30.jpg").write_bytes(jpeg(30))
    (folder / "broken.jpg").write_bytes(jpeg(7)[:-200])
    (folder / "page.jpg").write_text("<html>")
    return folder


def found(out):
    return tables.read_table(out, "located").to_pylist()


def test_a_killed_job_goes_on(ray_local, model, photos, tmp_path, monkeypatch, capsys):
    """kill -9 after the first shards; the second run makes the rest, and nothing twice."""
    out = tmp_path / "out"
    arguments = ["--model", str(model), "--photos", str(photos), "--out", str(out), *CPUS, "--top-k", "1"]
    code = f"from ray_jobs import localize\nlocalize.SHARD = 1\nlocalize.main({arguments!r})"
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    job = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[2])
    marks = Path(f"{out}.partial") / MARKS_DIR
    started = threading.Event()  # never set; its wait is the pace of the polling
    while job.poll() is None and len(list(marks.glob("*.json"))) < 2:
        started.wait(0.005)
    assert job.poll() is None
    job.kill()
    job.wait()
    names = [name for mark in marks.glob("*.json") for name in json.loads(mark.read_text())["files"]]
    times = {name: (Path(f"{out}.partial") / name).stat().st_mtime_ns for name in names}
    assert 2 <= len(times) < 30
    monkeypatch.setattr(localize, "SHARD", 1)
    localize.main(arguments)
    rows = found(out)
    assert [row["id"] for row in rows] == [*(f"{i:02}.jpg" for i in range(30)), "more/30.jpg"]
    assert times == {name: (out / name).stat().st_mtime_ns for name in times}
    rejects = pq.read_table(out / "rejects.parquet").to_pylist()
    assert {row["id"]: row["reason"].split(":")[0] for row in rejects} == {
        "broken.jpg": "photo damaged", "page.jpg": "not a photo",
    }  # fmt: skip
    assert "31 photos localized, 2 rejected" in capsys.readouterr().out
    localize.main(arguments)
    assert "already done" in capsys.readouterr().out
    with pytest.raises(InputError, match="top_k"):
        localize.main([*arguments[:-1], "3"])
    check(rows[:3], model, photos)


def check(rows, model, photos):
    """The rows are what the model says of these photos."""
    images = [Image.open(photos / row["id"]).convert("RGB") for row in rows]
    for row, one in zip(rows, Localizer(model, device="cpu").localize_many(images, 1), strict=True):
        assert (row["street"], row["district"]) == (one.candidates[0].street, one.candidates[0].district)
        assert row["confidence"] == pytest.approx(one.confidence, rel=1e-3)
        assert row["known"] == one.known == (row["confidence"] > 0.6)
        assert len(row["candidates"]) == 1


def located(photos, model, folder):
    """What the job makes of these photos, without Ray: rows and rejects."""
    shards, columns, rejects = localize.open_photos(str(photos), "test").plan(folder)
    work = BatchLocalizer(str(model), "float32", False, str(photos.parent), 100, 2, 1)
    results = [work(rows) for shard in shards for rows in shard.batches(columns)]
    return [row for result in results for row in result.tables["located"]], [
        *rejects,
        *(r for result in results for r in result.rejects),
    ]


def test_a_manifest(model, photos, tmp_path):
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"id,photo\na,{photos}/00.jpg\nb,{photos}/01.jpg\na,{photos}/02.jpg\nc,\nd,{photos}/none.jpg\n")
    rows, rejects = located(manifest, model, tmp_path)
    assert [row["id"] for row in rows] == ["a", "b"]
    assert [(r["row"], r["id"], r["reason"].split(":")[0]) for r in rejects] == [
        (3, "a", "duplicate id"), (4, "c", "empty cell"), (5, "d", "photo missing"),
    ]  # fmt: skip


def test_parquet_with_images(model, photos, tmp_path):
    packed = tmp_path / "photos.parquet"
    rows = [{"id": n, "image": {"bytes": (photos / f"0{i}.jpg").read_bytes(), "path": None}} for i, n in enumerate("ab")]
    rows += [{"id": "z", "image": None}, rows[0]]
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([("id", pa.string()), ("image", tables.IMAGE)])), packed)
    rows, rejects = located(packed, model, tmp_path)
    assert [row["id"] for row in rows] == ["a", "b"]
    assert [row["reason"] for row in rejects] == ["duplicate id: a came before", "photo empty: z has zero bytes"]
    assert rejects[0]["row"] == 4
    assert len(rows[0]["candidates"]) == 2


def test_an_id_counts_once_whichever_shard_it_comes_in(tmp_path):
    schema = pa.schema([("id", pa.string()), ("image", tables.IMAGE)])
    for number, ids in enumerate(("abcab", "ade", "fca")):
        rows = [{"id": name, "image": {"bytes": f"{number}{at}".encode(), "path": None}} for at, name in enumerate(ids)]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / f"test-0000{number}.parquet", row_group_size=2)
    files = sorted(tmp_path.glob("*.parquet"))
    for size in (2, 3, 100):
        shards, rejects = localize.skip_repeated_ids(plan_file_shards(files, size))
        rows = [row for shard in shards for batch in shard.batches() for row in batch]
        assert [(row["id"], row["image"]["bytes"]) for row in rows] == [
            ("a", b"00"), ("b", b"01"), ("c", b"02"), ("d", b"11"), ("e", b"12"), ("f", b"20"),
        ]  # fmt: skip
        assert sum(shard.rows for shard in shards) == 6
        assert [(reject["row"], reject["id"]) for reject in rejects] == [(4, "a"), (5, "b"), (6, "a"), (10, "c"), (11, "a")]


def test_a_shorter_list_leaves_nothing_of_a_longer_one(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(localize, "SHARD", 2)
    for last in (7, 3):
        manifest = tmp_path / "list.csv"
        manifest.write_text("file\n" + "".join(f"{photos}/{i:02}.jpg\n" for i in range(last)))
        shards, columns, _ = localize.open_photos(str(manifest), "test").plan(tmp_path)
        rows = [row for shard in shards for batch in shard.batches(columns) for row in batch]
        assert [(row["row"], row["file"]) for row in rows] == [(i + 1, f"{photos}/{i:02}.jpg") for i in range(last)]
        assert [shard.rows for shard in shards] == [2] * (last // 2) + [1]


def test_what_was_located_is_kept_for_the_same_model_and_question_alone(model, photos, tmp_path, monkeypatch):
    calls = []

    def made(step, shards, folder, work, workers, actor):
        calls.append((work.function.top_k, work.function.dtype, work.function.threads, workers, actor))
        rows = [row for shard in shards for batch in shard.batches(work.columns) for row in batch]
        reject = {"file": None, "row": 1, "id": rows[0]["id"], "reason": "bad"}
        return [{"number": 0, "rows": len(rows), "written": {"located": len(rows) - 1}, "rejects": [reject]}]

    monkeypatch.setattr(localize, "run_shards", made)
    monkeypatch.setattr(localize, "require_evaluation_workers", lambda *_: None)
    here = tmp_path / "photos"
    shutil.copytree(photos, here)
    copied = tmp_path / "model"
    shutil.copytree(model, copied)

    def locate(top_k=5, split="test", config=None, redo=False):
        config = config or validate({"evaluate": {"workers": 3, "cpus_per_worker": 2, "gpus_per_worker": 0.5}}, "test")
        localize.localize(config, str(copied), str(here), split, tmp_path / "out", top_k, redo)
        return len(calls)

    assert locate() == locate() == 1
    assert calls[0] == (5, "float32", 2, 3, {"num_cpus": 2, "num_gpus": 0.5})
    assert pq.read_table(tmp_path / "out" / "rejects.parquet")["reason"].to_pylist() == ["bad"]
    for changes in ({"top_k": 4}, {"split": "val"}, {"config": validate({"model": {"dtype": "bfloat16"}}, "test")}):
        with pytest.raises(InputError, match="made with other settings"):
            locate(**changes)
    Calibration(3.0, 0.8, {"0.8": 0.6}).save(copied)
    with pytest.raises(InputError, match=r"made with other settings \(calibration: "):
        locate()
    assert locate(redo=True) == 2
    (here / "31.jpg").write_bytes(jpeg(31))
    with pytest.raises(InputError, match=r"made with other settings \(content: "):
        locate()
    assert locate(redo=True) == 3
    (copied / "chat_template.jinja").write_text("another")
    with pytest.raises(InputError, match=r"made with other settings \(model: "):
        locate()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "toy"], r"holds no gazetteer\.geojson"),
        (["--model", "/nowhere"], "no model folder /nowhere"),
        (["--photos", "/nowhere"], "no manifest at /nowhere|is not a .csv"),
        (["--photos", "{here}/empty"], "has no photos"),
        (["--photos", "{here}/empty.csv"], "names no photo"),
        (["--photos", "{here}/other.csv"], "lacks the column file"),
        (["--photos", "{here}/bad.parquet"], "is not Parquet"),
        (["--top-k", "0"], "--top-k is 0"),
        (["--set", "evaluate.workers=999"], "needs 499.5 CPUs"),
    ],
)
def test_a_user_error_is_one_sentence(ray_local, model, photos, tmp_path, arguments, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.csv").write_text("id,file\n")
    (tmp_path / "other.csv").write_text("id,lat\na,1\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    inputs = ["--model", str(model), "--photos", str(photos), "--out", str(tmp_path / "out"), *CPUS]
    with pytest.raises(InputError, match=sentence):
        localize.main([*inputs, *(a.replace("{here}", str(tmp_path)) for a in arguments)])


def test_a_folder_with_other_content_is_left_alone(tmp_path):
    settings = {"photos": "my_photos", "top_k": 5}
    localize.require_own_folder(tmp_path, settings)  # empty
    localize.require_own_folder(tmp_path / "new", settings)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds something else: give an empty or a new --out"):
        localize.require_own_folder(tmp_path, settings)
    mark_done(tmp_path, {"city": "another step's"})
    with pytest.raises(InputError, match="holds something else"):
        localize.require_own_folder(tmp_path, settings)
    mark_done(tmp_path, settings | {"top_k": 1})
    localize.require_own_folder(tmp_path, settings)


def test_what_is_done_is_done_for_these_photos_alone(photos, tmp_path):
    def content():
        return localize.open_photos(str(folder), "test").fingerprint(str(folder))

    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    before = content()
    assert content() == before
    (folder / "00.jpg").write_bytes(jpeg(99) + b" ")
    changed = content()
    (folder / "new.jpg").write_bytes(jpeg(100))
    assert len({before, changed, content()}) == 3


def test_ids_are_files_where_there_are_none():
    good, rejects = photo_table([{"file": "a.jpg"}, {"id": 7.0, "file": "a.jpg"}, {}, {"id": float("nan"), "file": "a.jpg"}])
    assert [(row["row"], row["id"]) for row in good] == [(1, "a.jpg"), (2, "7")]
    assert [(row["row"], row["reason"]) for row in rejects] == [(4, "duplicate id: 'a.jpg' is already the id of row 1")]


def test_a_list_is_read_as_prepare_reads_it(tmp_path):
    (tmp_path / "Cafe\u0301.jpg").write_bytes(jpeg(1))
    table = {
        "file": ["Caf\u00e9.jpg", "Caf\u00e9.jpg", None, "x.jpg"],
        "id": [1001.0, None, None, 3e17],
        "note": ["nan", "", None, "a"],
    }
    pq.write_table(pa.table(table), tmp_path / "list.parquet")
    source = localize.open_photos(str(tmp_path / "list.parquet"), "test")
    assert source.rows == [
        {"row": 1, "id": "1001", "file": "Cafe\u0301.jpg"}, {"row": 2, "id": "Caf\u00e9.jpg", "file": "Cafe\u0301.jpg"},
    ]  # fmt: skip
    assert [(row["row"], row["reason"].partition(":")[0]) for row in source.rejects] == [(4, "id rounded")]


def test_the_work_travels_without_its_model(model):
    import pickle

    work = BatchLocalizer(str(model), "float32", False, "", 100, 1, 1)
    assert work._localizer.gazetteer
    assert "_localizer" not in pickle.loads(pickle.dumps(work)).__dict__
