"""`python -m addressvlm localize`: photos to addresses without Ray, and the package's lazy `Localizer`."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

import addressvlm
from addressvlm import InputError, __main__
from addressvlm.answers.calibration import Calibration
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.inference import Localizer
from tests.support.families import picture
from tests.support.tiny import tiny_llava

ADDRESSES = [Address("Mill Street", "Harbour"), Address("Oak Avenue", "Harbour"), Address('"Q" Road, North', "Old Town")]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llava(tmp_path_factory.mktemp("model"))
    Gazetteer(ADDRESSES, city="Toytown").save(folder / "gazetteer.geojson")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos, one of them in a folder below, one file that is no photo, and one that ends early."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for seed, name in enumerate(["a.png", "b.png", "more/c.png"]):
        picture(seed).save(folder / name)
    (folder / "page.jpg").write_text("<html>")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:-200])
    return folder


def localized(model: Path, seed: int, top_k: int = 3) -> dict:
    """What the library says of a photo, as the command's JSON has it."""
    result = Localizer(model, device="cpu").localize(picture(seed), top_k)
    candidates = [vars(candidate) for candidate in result.candidates]
    return {"known": result.known, "confidence": result.confidence, "threshold": result.threshold, "candidates": candidates}


def close(row: dict) -> dict:
    """The row with numbers that may differ in their last digits, as photos in a batch do."""
    candidates = [c | {"probability": pytest.approx(c["probability"], rel=1e-3)} for c in row["candidates"]]
    return row | {"confidence": pytest.approx(row["confidence"], rel=1e-3), "candidates": candidates}


def test_ray_is_not_imported_and_torch_only_to_localize(model: Path, photos: Path) -> None:
    code = f"""if True:
        import sys
        import addressvlm
        from addressvlm import __main__, InputError
        assert "torch" not in sys.modules and "transformers" not in sys.modules
        assert __main__.main(["localize", {str(photos / "a.png")!r}, "--model", {str(model)!r}]) == 0
        assert "torch" in sys.modules
        assert not [name for name in sys.modules if name.partition(".")[0] in ("ray", "ray_jobs", "serve")]
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{photos / 'a.png'}\n")


def test_one_photo_as_text_from_the_command_line(model: Path, photos: Path) -> None:
    command = [sys.executable, "-m", "addressvlm", "localize", str(photos / "a.png"), "--model", str(model), "--top-k", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = [f"  {c['probability']:6.1%}  {c['street']}, {c['district']}" for c in localized(model, 0, 2)["candidates"]]
    assert done.stdout.splitlines() == [str(photos / "a.png"), *expected]
    assert done.stderr == ""


def test_a_folder_as_json_names_and_counts_what_cant_be_read(model: Path, photos: Path, capsys: pytest.CaptureFixture) -> None:
    assert __main__.main(["localize", str(photos), "--model", str(model), "--format", "json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    files = ["a.png", "b.png", "more/c.png"]
    assert rows == [{"photo": str(photos / file), **close(localized(model, seed))} for seed, file in enumerate(files)]
    assert [line.split(":")[0] for line in err.splitlines()[:-1]] == ["rejected, photo damaged", "rejected, not a photo"]
    assert str(photos / "cut.png") in err
    assert str(photos / "page.jpg") in err
    assert err.splitlines()[-1] == "2 of 5 photos could not be read."


def test_photos_come_in_the_order_given_each_once_also_over_several_batches(
    model: Path, photos: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(__main__, "BATCH_SIZE", 2)
    order = [str(photos / "b.png"), str(photos), str(photos / "a.png")]
    assert __main__.main(["localize", *order, "--model", str(model), "--format", "json", "--top-k", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)
    seeds = {"b.png": 1, "a.png": 0, "more/c.png": 2}
    assert rows == [{"photo": str(photos / f), **close(localized(model, seed, 1))} for f, seed in seeds.items()]


def test_csv_into_a_file_has_a_row_an_address(model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "new" / "addresses.csv"
    photo = str(photos / "b.png")
    assert __main__.main(["localize", photo, "--model", str(model), "--format", "csv", "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = localized(model, 1)["candidates"]
    assert [(r["photo"], r["rank"], r["street"], r["district"], r["known"]) for r in rows] == [
        (photo, str(rank), c["street"], c["district"], "true") for rank, c in enumerate(expected, start=1)
    ]
    assert [float(r["probability"]) for r in rows] == [pytest.approx(c["probability"], rel=1e-3) for c in expected]
    assert b"\r" not in out.read_bytes()


def test_an_answer_below_the_models_threshold_says_so(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    unsure = tmp_path / "unsure"
    unsure.mkdir()
    for file in model.iterdir():
        (unsure / file.name).symlink_to(file)
    Calibration(1.0, 0.8, {"0.8": 0.999}).save(unsure)
    photo = str(photos / "a.png")
    assert __main__.main(["localize", photo, "--model", str(unsure)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{photo}  (not sure: below the model's threshold of 100%)"


def test_a_model_in_a_store(model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    import fsspec

    monkeypatch.setenv("ADDRESSVLM_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.put(str(model), "memory://command/model", recursive=True)
    try:
        photo = str(photos / "a.png")
        command = ["localize", photo, "--format", "json", "--model"]
        assert __main__.main([*command, "memory://command/model"]) == 0
        assert json.loads(capsys.readouterr().out) == [{"photo": photo, **close(localized(model, 0))}]
        assert len(list((tmp_path / "cache" / "models").glob("*/model/model.safetensors"))) == 1
    finally:
        store.rm("memory://command", recursive=True)


def test_a_model_of_the_hub_comes_with_its_gazetteer(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert __main__.model_folder("owner/model") == model
    assert asked[0] == ("owner/model", ["gazetteer.geojson"])
    assert {"*.safetensors", "*.json", "gazetteer.geojson"} <= set(asked[1][1])
    assert not {"*", "*.py", "*.bin"} & set(asked[1][1])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{photos}/none.jpg", "--model", "{model}"], "0 of 1 photos can be read"),
        (["{photos}/page.jpg", "{photos}/cut.png", "--model", "{model}"], "0 of 2 photos can be read"),
        (["{empty}", "--model", "{model}"], "has no photos"),
        (["{photos}", "--model", "{empty}"], "holds no model"),
        (["{photos}", "--model", "./no/such/folder"], "no model folder ./no/such/folder"),
        (["{photos}", "--model", "owner/no-such-model"], "model 'owner/no-such-model' can't be downloaded"),
        (["{photos}", "--model", "toy"], "toy holds no gazetteer.geojson"),
        (["{photos}", "--model", "{model}", "--top-k", "0"], "--top-k is 0"),
        (["{photos}/a.png", "--model", "{model}", "--out", "{photos}/a.png/out.txt"], "out.txt can't be written"),
    ],
)
def test_what_cant_be_used_ends_in_one_sentence(
    arguments: list[str], sentence: str, model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    filled = [argument.format(photos=photos, model=model, empty=tmp_path) for argument in arguments]
    assert __main__.main(["localize", *filled]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert sentence in last
    assert "Traceback" not in err


def test_a_failed_run_leaves_no_output_file(model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    arguments = ["localize", str(photos / "page.jpg"), "--model", str(model), "--format", "csv", "--out", str(out)]
    assert __main__.main(arguments) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_package_offers_the_localizer_and_nothing_unknown() -> None:
    assert addressvlm.Localizer is Localizer
    assert addressvlm.InputError is InputError
    with pytest.raises(AttributeError, match="no attribute 'Localiser'"):
        _ = addressvlm.Localiser
