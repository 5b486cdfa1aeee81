"""The evaluate job on a real Ray with a random model, from photos to report."""

import io
import json
import os
import random
from contextlib import redirect_stdout

import pytest
from PIL import Image

from addressvlm import InputError
from addressvlm.config import EvaluateConfig, validate
from addressvlm.evaluation import metrics, run_questions
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.inference import Localizer
from addressvlm.questions import evaluation_rounds
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from ray_jobs import evaluate, evaluation
from tests.support.tiny import tiny_llava

pytestmark = pytest.mark.xdist_group("ray-answers")

ADDRESSES = [Address("Mill Street", "Harbour"), Address("Oak Avenue", "Old Town"), Address("Elm Row", "Old Town")]
GAZETTEER = Gazetteer(ADDRESSES, city="Toytown", attribution=["generated"])


def jpeg(seed):
    rng = random.Random(seed)
    buffer = io.BytesIO()
    Image.new("RGB", (48, 36), tuple(rng.randrange(256) for _ in range(3))).save(buffer, "JPEG")
    return buffer.getvalue()


def photo(i):
    address = ADDRESSES[i % 3]
    return {
        "id": f"photo{i}", "place": f"place{i // 2}", "lat": 52.2 + i / 1000, "lon": 0.1 - i / 1000, "heading": None,
        "image": {"bytes": jpeg(i), "path": f"{i}.jpg"}, "street": address.street, "district": address.district,
        "cross_street": None, "distance_m": 3.0, "ambiguous": False,
        "rounds": evaluation_rounds(address, GAZETTEER, random.Random(i)),
    }  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two random models, one of which knows the city."""
    folder = tmp_path_factory.mktemp("models")
    tiny_llava(folder / "base", seed=0)
    tiny_llava(folder / "tuned" / "merged", seed=1)
    GAZETTEER.save(folder / "tuned" / "merged" / "gazetteer.geojson")
    return folder


def config_in(folder, models, workers=1):
    """A run with ten test photos, one untrained system and a trained one."""
    config = validate(
        {
            "name": "r", "storage": str(folder), "model": {"base": str(models / "base")},
            "evaluate": {"workers": workers, "batch_size": 8, "max_new_tokens": 4, "bootstrap": 100},
            "train": {"systems": [{"name": "zero-shot"}, {"name": "AddressVLM", "stages": ["localization"]}]},
        },
        "test",
    )  # fmt: skip
    run = Run(config)
    tables.write_table(run.photos, "test", [photo(i) for i in range(10)], tables.PHOTOS)
    GAZETTEER.save(run.gazetteer)
    run.model_dir("AddressVLM").mkdir(parents=True)
    (run.model_dir("AddressVLM") / "merged").symlink_to(models / "tuned" / "merged")
    return config


@pytest.fixture
def config(models, tmp_path):
    return config_in(tmp_path, models)


@pytest.fixture(scope="module")
def scored(ray_local, models, tmp_path_factory):
    """A run that two workers have scored, and what was printed."""
    config, printed = config_in(tmp_path_factory.mktemp("scored"), models, workers=2), io.StringIO()
    with redirect_stdout(printed):
        evaluate.run_step(config, redo=False)
    return config, printed.getvalue()


def write_yaml(config, path):
    path.write_text(config.model_dump_json())  # JSON is YAML
    return str(path)


def test_scores_every_system_of_the_run(scored, capsys):
    config, printed = scored
    run = Run(config)
    result = json.loads(run.metrics.read_text())
    assert set(result) == {"city", "split", "systems"}
    assert (result["city"], result["split"]) == ("Toytown", "test")
    assert [s["name"] for s in result["systems"]] == ["zero-shot", "AddressVLM"]
    questions = sum(len(row["rounds"]) for row in tables.iter_rows(run.photos, "test"))
    for system in result["systems"]:
        assert list(system["metrics"]) == metrics.METRICS
        assert system["metrics"]["A_ds"]["n"] == 10
        assert system["metrics"]["A"]["n"] == questions - 10
    for slug in ("zero-shot", "addressvlm"):
        answers = tables.read_table(run.answers / slug, "test")
        assert answers.schema.equals(tables.ANSWERS)
        assert len(answers) == questions
        assert len(set(zip(*(answers[c].to_pylist() for c in ("id", "level", "kind", "question")), strict=True))) == questions
    assert "<svg" in run.report.read_text()
    assert "A_ds" in printed
    assert str(run.metrics) in printed
    assert "evaluate: zero-shot: 10 photos, " in printed

    evaluate.run_step(config, redo=False)
    assert "zero-shot: already answered" in capsys.readouterr().out
    other = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"max_new_tokens": 5})})
    with pytest.raises(InputError, match="max_new_tokens"):
        evaluate.run_step(other, redo=False)


def test_named_models_on_a_folder_of_photos_answer_as_in_the_run(scored, models, tmp_path):
    """Whatever the number of workers, the size of a batch, and the other photos."""
    config = config_in(tmp_path, models)
    both = ["--model", f"mine={models / 'tuned' / 'merged'}", "--model", str(models / "base")]
    some = ["--set", "evaluate.max_photos=3", "--set", "evaluate.batch_size=3"]
    evaluate.main(["--config", write_yaml(config, tmp_path / "c.yaml"), *both, "--data", str(Run(config).photos), *some])
    out = Run(config).folder / "evaluations" / "r"
    result = json.loads((out / "metrics.json").read_text())
    assert [s["name"] for s in result["systems"]] == ["mine", "base"]
    assert {s["metrics"]["A_ds"]["n"] for s in result["systems"]} == {3}
    ids = tables.read_table(out / "answers" / "mine", "test")["id"].unique().to_pylist()
    assert ids == sorted(ids, key=lambda photo: int(photo.removeprefix("photo")))
    for name, system in (("mine", "addressvlm"), ("base", "zero-shot")):
        in_run = tables.read_table(Run(scored[0]).answers / system, "test").to_pylist()
        assert tables.read_table(out / "answers" / name, "test").to_pylist() == [row for row in in_run if row["id"] in ids]
    assert not Run(config).metrics.exists()


def test_a_manifest_of_new_photos(ray_local, config, models, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    lines = ["file,lat,lon,street,district"]
    for i, address in enumerate(ADDRESSES):
        (new / f"{i}.jpg").write_bytes(jpeg(i))
        lines.append(f"{i}.jpg,{52 + i / 100},{i / 100},{address.street},{address.district}")
    (tmp_path / "new.csv").write_text("\n".join(lines))
    out = tmp_path / "scored"
    yaml = write_yaml(config, tmp_path / "c.yaml")
    arguments = ["--config", yaml, "--model", str(models / "tuned" / "merged"), "--out", str(out)]
    evaluate.main([*arguments, "--data", str(tmp_path / "new.csv"), "--photos", str(new)])
    scored = json.loads((out / "metrics.json").read_text())
    assert [s["name"] for s in scored["systems"]] == ["tuned"]
    assert scored["systems"][0]["metrics"]["A_ds"]["n"] == 3

    (new / "3.jpg").write_bytes(jpeg(3))
    (tmp_path / "new.csv").write_text("\n".join([*lines, "3.jpg,52.03,0.03,Mill Street,Harbour"]))
    os.utime(tmp_path / "new.csv", (2e9, 2e9))
    with pytest.raises(InputError, match="made with other settings"):  # the answers were to other photos
        evaluate.main([*arguments, "--data", str(tmp_path / "new.csv"), "--photos", str(new)])
    evaluate.main([*arguments, "--data", str(tmp_path / "new.csv"), "--photos", str(new), "--redo"])
    assert json.loads((out / "metrics.json").read_text())["systems"][0]["metrics"]["A_ds"]["n"] == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "/nowhere/at/all"], "no model folder /nowhere/at/all"),
        (["--data", "/nowhere.csv"], "--data /nowhere.csv does not exist"),
        (["--split", "val"], r"no table .*val-\*\.parquet"),
        (["--set", "evaluate.workers=999"], "needs 999 CPUs and the cluster has"),
        (["--model", "a=toy", "--model", "A=toy"], "two models are called 'A'"),
    ],
)
def test_a_user_error_is_one_sentence(ray_local, config, tmp_path, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        evaluate.main(["--config", write_yaml(config, tmp_path / "c.yaml"), *arguments])


def test_untrained_system(ray_local, config):
    (Run(config).model_dir("AddressVLM") / "merged").unlink()
    with pytest.raises(InputError, match=r"'AddressVLM' is not trained yet.*ray_jobs/train\.py"):
        evaluate.run_step(config, redo=False)
    evaluate.run_step(config, redo=False, only=["zero-shot"])
    assert [system["name"] for system in json.loads(Run(config).metrics.read_text())["systems"]] == ["zero-shot"]


def test_a_broken_model_is_told_from_the_worker(ray_local, config, models, tmp_path):
    broken = tiny_llava(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match=r"broken' can't be loaded"):
        evaluate.main(["--config", write_yaml(config, tmp_path / "c.yaml"), "--model", str(broken)])


def test_digest_follows_the_weights(models, tmp_path):
    same, other = tiny_llava(tmp_path / "a", seed=0), tiny_llava(tmp_path / "b", seed=5)
    assert (
        evaluation.model_digest(str(models / "base"))
        == evaluation.model_digest(str(same))
        != evaluation.model_digest(str(other))
    )
    assert evaluation.model_digest("owner/model") == "owner/model"


def test_each_photo_is_asked_its_own_questions(models):
    localizer = Localizer(models / "base")
    photos = [photo(i) for i in range(3)]
    settings = EvaluateConfig(batch_size=4, max_new_tokens=3)
    rows = [row for batch in run_questions.run_questions(localizer, photos, settings, seed=0) for row in batch]
    assert len(rows) == sum(len(p["rounds"]) for p in photos)
    row = next(row for row in rows if row["id"] == "photo2" and row["level"] == "address")
    image = Image.open(io.BytesIO(photos[2]["image"]["bytes"]))
    assert row["answer"] == localizer.answer([image], [row["question"]], 3)[0]
    assert row["expected"] == "Elm Row, Old Town"


def test_constrained_answers_are_names(models):
    localizer = Localizer(models / "tuned" / "merged")
    settings = EvaluateConfig(batch_size=4, answers="constrained")
    rows = [row for batch in run_questions.run_questions(localizer, [photo(0), photo(1)], settings, seed=0) for row in batch]
    allowed = {"street": GAZETTEER.streets, "district": GAZETTEER.districts, "address": [a.text() for a in ADDRESSES]}
    for row in rows:
        names = {"judgment": ["Yes", "No"], "choice": row["options"], "generation": allowed[row["level"]]}
        assert row["answer"] in names[row["kind"]]
    generated = [
        r for b in run_questions.run_questions(localizer, [photo(0)], settings, seed=0, kinds=["generation"]) for r in b
    ]
    assert {row["kind"] for row in generated} == {"generation"}
    assert generated[0] in rows


def test_free_answers_have_room_for_the_longest_address(models):
    localizer = Localizer(models / "base")
    localizer.gazetteer = None
    assert run_questions.answer_limit(localizer) == run_questions.MIN_ANSWER_TOKENS
    long = Address("Avenue of the Twenty-Fourth of November between Long Row and the Old Salt Market", "Old Town")
    localizer.gazetteer = Gazetteer([*ADDRESSES, long])
    tokens = localizer.tokenizer(long.text(), add_special_tokens=False)["input_ids"]
    assert run_questions.answer_limit(localizer) == len(tokens) + run_questions.WORDS_AROUND > 40


@pytest.mark.parametrize("answers", ["free", "constrained"])
def test_questions_of_a_batch_are_answered_as_each_alone(models, answers):
    """In order of their length, whoever's photo they are about."""
    localizer = Localizer(models / "tuned" / "merged")
    photos = [photo(i) for i in range(3)]
    batches = list(
        run_questions.run_questions(localizer, photos, EvaluateConfig(batch_size=5, max_new_tokens=3, answers=answers), seed=0)
    )
    assert [len(batch) for batch in batches] == [5] * 5 + [2]
    alone = EvaluateConfig(batch_size=1, max_new_tokens=3, answers=answers)
    rows = [row for one in photos for (row,) in run_questions.run_questions(localizer, [one], alone, seed=0)]
    alone_rows = {(row["id"], row["level"], row["kind"], row["expected"]): row for row in rows}
    assert len(alone_rows) == 27
    assert all(row == alone_rows[row["id"], row["level"], row["kind"], row["expected"]] for batch in batches for row in batch)


def test_sampled_answers_repeat(models):
    localizer = Localizer(models / "base")
    settings = EvaluateConfig(batch_size=4, max_new_tokens=8, temperature=5.0)

    def sample(seed):
        return [row["answer"] for batch in run_questions.run_questions(localizer, [photo(0)], settings, seed) for row in batch]

    assert sample(1) == sample(1) != sample(2)
    twin = {**photo(0), "id": "twin"}
    assert [row["answer"] for batch in run_questions.run_questions(localizer, [twin], settings, 1) for row in batch] != sample(
        1
    )
