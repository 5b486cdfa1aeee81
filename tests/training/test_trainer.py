"""Training, resuming and what is saved, on a random LLaVA without Ray

python -m pytest -q tests/training/test_trainer.py
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from addressvlm import InputError
from addressvlm.models import load_model
from addressvlm.models.loading import autocast
from addressvlm.models.lora import adapter_state, attach_lora
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.training import dataset, trainer
from addressvlm.training.collator import messages
from addressvlm.training.stages import build_stages
from addressvlm.training.trainer import AdaptedModel, train_system
from addressvlm.training.validation import Validation
from tests.support.training_tables import keeping, nothing, table_rows, train_stage, trained_config


def losses(run: Run, system: str) -> list[float]:
    path = run.training_dir(system) / "loss.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


# Of the run below; a change to training that is not meant to change results leaves them as they are.
EXPECTED = [7.5961, 6.6486, 5.9677, 5.0786, 5.2495, 6.4782, 4.9423, 4.9360, 8.4112, 5.2908, 7.0645, 5.3191]


def answers_of_the_adapter(adapter: Path, base: Path) -> list[str]:
    model, processor = load_model(str(base))
    tuned = PeftModel.from_pretrained(model, str(adapter)).eval()
    text = processor.apply_chat_template(messages([("Which street is this?", "")]), add_generation_prompt=True, tokenize=False)
    answers = []
    for colour in ("red", "blue", "green"):
        inputs = processor(text=[text], images=[Image.new("RGB", (32, 32), colour)], return_tensors="pt")
        tokens = tuned.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(tokens, skip_special_tokens=True))
    return answers


def spoiled(base: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the base with some of its files changed (None: removed)."""
    shutil.copytree(base, folder)
    for name, change in changes.items():
        file = next(path for path in folder.iterdir() if path.stem == name)
        if change is None:
            file.unlink()
        else:
            file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return folder


def test_training_learns_and_resumes_to_equal_weights(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path / "whole", base)
    kept: list[Path] = []

    train_system(config, "AddressVLM", None, keeping(kept, tmp_path))
    run = Run(config)
    curve = losses(run, "AddressVLM")
    assert len(curve) == 24
    assert sum(curve[-4:]) < 0.8 * sum(curve[:4])
    whole = load_file(run.model_dir("AddressVLM") / "adapter" / "adapter_model.safetensors")
    middle = next(k for k in kept if json.loads((k / "position.json").read_text()) == {"format": 2, "stage": 0, "step": 10})
    for checkpoint in (middle, kept[-3]):
        shutil.rmtree(run.model_dir("AddressVLM"))
        train_system(config, "AddressVLM", checkpoint, nothing)
        again = load_file(run.model_dir("AddressVLM") / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(whole[k], again[k]) for k in whole)
        assert losses(run, "AddressVLM") == curve


@pytest.mark.parametrize("packing", ["on", "off"])
def test_losses_are_those_of_before(tmp_path: Path, base: Path, packing: str) -> None:
    config = trained_config(tmp_path, base, packing=packing)
    config.model.lora_dropout = 0.0  # masks depend on the shape of a batch
    train_system(config, "stage 2 only", None, nothing)
    assert losses(Run(config), "stage 2 only") == pytest.approx(EXPECTED, rel=1e-3)


def test_activation_checkpointing_changes_nothing(tmp_path: Path, base: Path) -> None:
    curves, shares = [], []
    for twice in (False, True):
        config = trained_config(tmp_path / str(twice), base, checkpoint_activations=twice, peak_tflops=1.0)
        config.train.stages["localization"].max_steps = 4
        train_system(config, "stage 2 only", None, nothing)
        lines = (Run(config).training_dir("stage 2 only") / "loss.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        curves.append([step["loss"] for step in steps])
        shares.append(steps[0]["mfu"] / steps[0]["samples_per_s"])
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)
    assert shares[1] == pytest.approx(shares[0], rel=1e-6)  # only useful operations are counted


def test_merged_folder_needs_nothing_of_ours(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    train_system(config, "stage 2 only", None, nothing)
    folder = Run(config).model_dir("stage 2 only") / "merged"
    script = (
        "import sys; sys.modules['addressvlm'] = None\n"
        "from PIL import Image\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"m = AutoModelForImageTextToText.from_pretrained({str(folder)!r})\n"
        f"p = AutoProcessor.from_pretrained({str(folder)!r}, backend='pil')\n"
        "chat = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'Which street is this?'}]}]\n"
        "for colour in ('red', 'blue', 'green'):\n"
        "    text = p.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)\n"
        "    inputs = p(text=[text], images=[Image.new('RGB', (32, 32), colour)], return_tensors='pt')\n"
        "    out = m.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs['input_ids'].shape[1]:]\n"
        "    print(p.tokenizer.decode(out, skip_special_tokens=True))\n"
    )
    message = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert message.stdout == "".join(f"{line}\n" for line in answers_of_the_adapter(folder.parent / "adapter", base))


def test_bfloat16_is_for_matrix_products_only(tmp_path: Path, base: Path) -> None:
    square = torch.ones(2, 2)
    result = {}
    for precision in ("float32", "bfloat16"):
        with autocast(torch.device("cpu"), torch.float32, precision):
            result[precision] = (square @ square).dtype
    assert result == {"float32": torch.float32, "bfloat16": torch.bfloat16}
    config = trained_config(tmp_path, base, precision="bfloat16")
    train_system(config, "stage 2 only", None, nothing)
    curve = losses(Run(config), "stage 2 only")
    assert sum(curve[-3:]) < 0.9 * sum(curve[:3])
    saved = load_file(Run(config).model_dir("stage 2 only") / "merged" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}


def test_a_part_without_gradient_is_an_error(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    config.model.vision.full = False
    model, processor = load_model(str(base))
    tuned, parts = attach_lora(model, config.model)
    stage = build_stages(config, config.train.systems[1])[0]
    tuned.get_input_embeddings().weight.data.zero_()
    broken = {**parts, "vision": "model.nothing"}
    with pytest.raises(InputError, match="no gradient reaches the vision part"):
        train_stage(AdaptedModel(tuned, broken, processor), stage)


def test_a_diverging_loss_is_an_error(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    for stage in config.train.stages.values():
        stage.learning_rate, stage.max_grad_norm = 1e30, 1e30
    with pytest.raises(InputError, match=r"lower train\.stages\.localization\.learning_rate"):
        train_system(config, "stage 2 only", None, nothing)


def test_validation_is_logged_and_changes_nothing(tmp_path: Path, base: Path) -> None:
    weights = []
    for every in (None, 4):
        config = trained_config(tmp_path / str(every), base)
        config.evaluate.max_new_tokens = 4
        config.train.validate_every, config.train.validate_photos = every, 2
        rows = [
            row | {"lat": 0.0, "lon": 0.0, "street": "Mill Street", "district": "Harbour", "heading": None}
            for row in table_rows(4)
        ]
        columns = ("id", "place", "lat", "lon", "street", "district", "image", "rounds")
        schema = tables.with_features(tables.pa.schema([tables.PHOTOS.field(c) for c in columns]))
        tables.write_table(Run(config).photos, "val", rows, schema)
        train_system(config, "stage 2 only", None, nothing)
        weights.append(load_file(Run(config).model_dir("stage 2 only") / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    lines = (Run(config).training_dir("stage 2 only") / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12]
    assert 0 <= json.loads(lines[-1])["A_s_G"] <= 1


def test_validation_reads_only_the_photos_that_it_asks_about(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained_config(tmp_path, base, validate_photos=3)
    columns = ("id", "place", "lat", "lon", "street", "district", "image", "rounds")
    schema = tables.with_features(tables.pa.schema([tables.PHOTOS.field(c) for c in columns]))
    tables.write_table(Run(config).photos, "val", table_rows(120), schema, rows_per_file=1)
    reads, one = [], dataset.TableRows._read
    monkeypatch.setattr(dataset.TableRows, "_read", lambda self, group: reads.append(group) or one(self, group))
    photos = Validation(config).photos
    assert len(reads) == 3
    assert sorted(int(photo["id"]) for photo in photos) == sorted(reads)


def test_the_photos_of_a_validation_are_drawn_by_the_run_s_seed(tmp_path: Path, base: Path) -> None:
    def drawn(seed: int, count: int) -> list[int]:
        config = trained_config(tmp_path, base, validate_photos=count)
        config.seed = seed
        return [int(photo["id"]) for photo in Validation(config).photos]

    columns = ("id", "place", "lat", "lon", "street", "district", "image", "rounds")
    schema = tables.with_features(tables.pa.schema([tables.PHOTOS.field(c) for c in columns]))
    tables.write_table(Run(trained_config(tmp_path, base)).photos, "val", table_rows(40), schema)
    results = [drawn(seed, 4) for seed in (0, 1, 2, 0)]
    assert results[3] == results[0]
    assert len({tuple(one) for one in results}) == 3
    assert all(one == sorted(set(one)) and len(one) == 4 for one in results)
    assert drawn(0, 99) == list(range(40))


def test_random_weights_are_those_of_training_s_seed(tmp_path: Path, base: Path) -> None:
    def first(seed: int, own: int | None) -> dict[str, torch.Tensor]:
        config = trained_config(tmp_path, base, seed=own)
        config.seed = seed
        return adapter_state(trainer.attach_adapter(*load_model(str(base)), config, torch.device("cpu")).peft)

    one, same, other = first(3, 7), first(4, 7), first(7, 8)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_processor_with_another_number_of_image_tokens_is_an_error(base: Path, tmp_path: Path) -> None:
    other = spoiled(base, tmp_path / "spoiled", processor_config={"num_additional_image_tokens": 3})
    config = trained_config(tmp_path, other)
    with pytest.raises(InputError, match="the base model and its processor disagree on the number of image tokens"):
        train_system(config, "stage 2 only", None, nothing)
