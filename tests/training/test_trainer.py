"""Collation, order, loss, resume and what is saved, on a random LLaVA without Ray.

python -m pytest -q tests/training/test_trainer.py
"""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from addressvlm import InputError
from addressvlm.config.train import AugmentConfig, ModelConfig, PartConfig
from addressvlm.models import load_model
from addressvlm.models.loading import autocast, has_1d_positions
from addressvlm.models.lora import adapter_state, attach_lora, set_trainable_parts, trainable_params
from addressvlm.models.parts import part_of
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.training.collator import IGNORE_INDEX, Collator, Sample, messages
from addressvlm.training.dataset import Schedule, TableRows, count_steps
from addressvlm.training.loss import answer_loss
from addressvlm.training.optim import learning_rate
from addressvlm.training.stages import build_stages
from addressvlm.training.trainer import AdaptedModel, train_system
from tests.support.tiny import tiny_llava
from tests.support.training_tables import keeping, table_rows, train_stage, trained_config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(base: Path) -> tuple:
    return load_model(str(base))


def sample(*rounds: tuple[str, str]) -> Sample:
    return Sample(Image.new("RGB", (40, 30), "red"), list(rounds))


def test_loss_is_on_the_answers_and_their_end_only(loaded: tuple) -> None:
    batch = Collator(loaded[1])([sample(("Which street is this?", "Mill Street"), ("Is it?", "Yes"))])
    learned = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX]
    assert loaded[1].tokenizer.decode(learned) == "Mill Street<|end|>Yes<|end|>"


def test_tokens_are_those_of_the_whole_text(loaded: tuple) -> None:
    processor = loaded[1]
    rounds = [("Which street is this?", "Mill Street"), ("Is it?", "Yes")]
    batch = Collator(processor)([sample(*rounds), sample(rounds[0])])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    told = "<|user|>Which street is this?<|end|><|assistant|>Mill Street<|end|><|user|>Is it?<|end|><|assistant|>Yes<|end|>"
    assert text.replace("<image>", "") == told
    assert text.count("<image>") == 16  # (32 / 8)^2: none is ever cut
    assert batch["attention_mask"][1].sum() < batch["attention_mask"][0].sum()


def test_loss_equals_that_of_the_rows_alone(loaded: tuple) -> None:
    model, processor = loaded
    collate = Collator(processor)
    samples = [sample(("Which street is this?", "Mill Street")), sample(("Is it?", "Yes"), ("Which?", "Oak Avenue"))]
    together, count = answer_loss(model, collate(samples))
    alone = [answer_loss(model, collate([s])) for s in samples]
    assert count == sum(n for _, n in alone)
    torch.testing.assert_close(together, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rounds_apart_are_learnt_as_if_each_had_a_row_of_its_own(base: Path, attention: str) -> None:
    model, processor = load_model(str(base))
    model.set_attn_implementation(attention)
    rounds = [("Which street is this?", "Mill Street"), ("Is it?", "Yes"), ("Where is it?", "Oak Avenue, Harbour")]
    shared, count = answer_loss(model, Collator(processor, isolate_questions=True)([sample(*rounds), sample(rounds[1])]))
    alone = [answer_loss(model, Collator(processor)([sample(r)])) for r in [*rounds, rounds[1]]]
    assert count == sum(n for _, n in alone)
    torch.testing.assert_close(shared, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-5)


def test_a_model_with_positions_by_image_row_and_column_is_told_apart(loaded: tuple) -> None:
    with torch.device("meta"):
        qwen = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig())
    assert not has_1d_positions(qwen)
    assert has_1d_positions(loaded[0])


def test_loss_equals_that_of_transformers(loaded: tuple) -> None:
    model, processor = loaded
    batch = Collator(processor)([sample(("Which street is this?", "Mill Street"))])
    total, count = answer_loss(model, batch)
    torch.testing.assert_close(total / count, model(**batch).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chosen", [["vision"], ["adapter"], ["llm"], ["vision", "adapter", "llm"]])
def test_only_the_chosen_parts_learn(base: Path, chosen: list) -> None:
    model, parts = attach_lora(load_model(str(base))[0], ModelConfig(vision=PartConfig(rank=2), llm=PartConfig(rank=3)))
    set_trainable_parts(model, parts, chosen)
    names = trainable_params(model)
    assert names
    assert {part_of(n.replace(".modules_to_save.default", ""), parts) for n in names} == set(chosen)
    ranks = {p.shape[0] for n, p in adapter_state(model).items() if "lora_A" in n and "vision_tower" in n}
    assert ranks == {2}


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 300),
    world=st.sampled_from([1, 2, 4]),
    per_rank=st.integers(1, 6),
    seed=st.integers(0, 5),
)
def test_steps_cover_each_epoch_once_whatever_the_workers(rows: int, world: int, per_rank: int, seed: int) -> None:
    class Counted(TableRows):
        def __init__(self) -> None:
            bounds = [*range(0, rows, 64), rows]
            self.groups = [(0, i, b - a) for i, (a, b) in enumerate(itertools.pairwise(bounds))]
            self.starts = torch.tensor(bounds).numpy()

    per_step = world * per_rank
    schedule = Schedule(Counted(), per_step, seed)
    steps = -(-2 * rows // per_step)
    seen = [i for s in range(steps) for i in sorted(x for r in range(world) for x in schedule.indices(s, r, world))]
    alone = [i for s in range(steps) for i in sorted(schedule.indices(s))]
    assert seen == alone
    stream = [schedule._row(p) for p in range(2 * rows)]
    assert sorted(stream[:rows]) == sorted(stream[rows:]) == list(range(rows))
    if rows > 20:
        other = [Schedule(Counted(), per_step, seed + 1)._row(p) for p in range(rows)]
        assert stream[:rows] != stream[rows:]
        assert other not in (stream[:rows], stream[rows:], list(range(rows)))


def test_rows_of_far_groups_are_mixed(tmp_path: Path) -> None:
    schema = tables.pa.schema([("id", tables.pa.string())])
    tables.write_table(tmp_path, "train", [{"id": str(n)} for n in range(80)], schema, rows_per_file=20)
    order = TableRows(tmp_path, "train", ("id",)).epoch(0, 0)
    assert len({int(row) // 20 for row in order[:10]}) > 1
    assert any(later - earlier != 1 for earlier, later in itertools.pairwise(order))


def test_rows_are_those_of_the_table(tmp_path: Path) -> None:
    rows = table_rows(150)
    schema = tables.with_features(tables.pa.schema([tables.PHOTOS.field(c) for c in ("id", "image", "rounds")]))
    tables.write_table(tmp_path, "train", rows, schema, rows_per_file=64)
    table = TableRows(tmp_path, "train", ("id", "rounds"))
    assert len(table) == 150
    assert [table[i]["id"] for i in (149, 0, 64, 63)] == ["149", "0", "64", "63"]


def test_steps_and_learning_rate() -> None:
    assert count_steps(100, 8, 2, None) == 25
    assert count_steps(3, 8, 1, None) == 1
    assert count_steps(100, 8, 2, 7) == 7
    rates = [learning_rate(s, 100, 1.0, 0.1) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[-1] < 0.001


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine() -> None:
    rates = [learning_rate(step, 12, 2.0, 0.25) for step in range(12)]
    assert rates[:4] == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0])
    assert (rates[6], rates[9]) == pytest.approx((1.5, 0.5))  # a third and two thirds of the way down
    assert [learning_rate(step, 3, 1.0, 0.0) for step in range(3)] == pytest.approx([1.0, 1.0, 0.5])
    assert learning_rate(0, 1, 1.0, 0.5) == 1.0


def test_stages_have_seeds_changes_of_photos_and_steps_of_their_own(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base, workers=3)
    config.train.stages["alignment"].gradient_accumulation_steps = 2  # 24 rows, two epochs: 24 a step, then 12
    config.train.stages["localization"].augment = AugmentConfig(colour=0.2)
    systems = {made.name: build_stages(config, made) for made in config.train.systems if made.stages}
    first, second = systems["AddressVLM"]
    assert (first.steps, second.steps) == (2, 4)
    assert [stage.steps for stage in systems["stage 2 only, equal steps"]] == [6]
    assert [stage.steps for stage in systems["stage 2 only"]] == [4]
    assert first.seed != second.seed
    assert (first.schedule.seed, second.schedule.seed) == (first.seed, second.seed)
    assert first.schedule.indices(0)[:12] != second.schedule.indices(0)
    assert [stage.schedule.augment.colour for stage in (first, second)] == [0.0, 0.2]


def losses(run: Run, system: str) -> list[float]:
    path = run.training_dir(system) / "loss.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def test_training_learns_and_resumes_to_equal_weights(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path / "whole", base)
    kept: list[Path] = []

    train_system(config, "AddressVLM", None, keeping(kept, tmp_path))
    run = Run(config)
    curve = losses(run, "AddressVLM")
    assert len(curve) == 24
    assert sum(curve[-4:]) < 0.8 * sum(curve[:4])
    whole = load_file(run.model_dir("AddressVLM") / "adapter" / "adapter_model.safetensors")
    middle = next(k for k in kept if json.loads((k / "position.json").read_text()) == {"stage": 0, "step": 10})
    for checkpoint in (middle, kept[-3]):
        shutil.rmtree(run.model_dir("AddressVLM"))
        train_system(config, "AddressVLM", checkpoint, lambda metrics, folder: None)
        again = load_file(run.model_dir("AddressVLM") / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(whole[k], again[k]) for k in whole)
        assert losses(run, "AddressVLM") == curve


# Of the run below; a change to training that is not meant to change results leaves them as they are.
EXPECTED = [7.5961, 6.6486, 5.9677, 5.0786, 5.2495, 6.4782, 4.9423, 4.9360, 8.4112, 5.2908, 7.0645, 5.3191]


@pytest.mark.parametrize("packing", ["on", "off"])
def test_losses_are_those_of_before(tmp_path: Path, base: Path, packing: str) -> None:
    config = trained_config(tmp_path, base, packing=packing)
    config.model.lora_dropout = 0.0  # masks depend on the shape of a batch
    train_system(config, "stage 2 only", None, lambda metrics, folder: None)
    assert losses(Run(config), "stage 2 only") == pytest.approx(EXPECTED, rel=1e-3)


def test_activations_computed_twice_change_nothing(tmp_path: Path, base: Path) -> None:
    curves, shares = [], []
    for twice in (False, True):
        config = trained_config(tmp_path / str(twice), base, checkpoint_activations=twice, peak_tflops=1.0)
        config.train.stages["localization"].max_steps = 4
        train_system(config, "stage 2 only", None, lambda metrics, folder: None)
        lines = (Run(config).training_dir("stage 2 only") / "loss.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        curves.append([step["loss"] for step in steps])
        shares.append(steps[0]["mfu"] / steps[0]["samples_per_s"])
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)
    assert shares[1] == pytest.approx(shares[0], rel=1e-6)  # only useful operations are counted


def test_merged_folder_needs_nothing_of_ours(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    train_system(config, "stage 2 only", None, lambda metrics, folder: None)
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
    told = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stdout == "".join(f"{line}\n" for line in answers_of_the_adapter(folder.parent / "adapter", base))


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


def test_bfloat16_is_for_products_only(tmp_path: Path, base: Path) -> None:
    square = torch.ones(2, 2)
    found = {}
    for precision in ("float32", "bfloat16"):
        with autocast(torch.device("cpu"), torch.float32, precision):
            found[precision] = (square @ square).dtype
    assert found == {"float32": torch.float32, "bfloat16": torch.bfloat16}
    config = trained_config(tmp_path, base, precision="bfloat16")
    train_system(config, "stage 2 only", None, lambda metrics, folder: None)
    curve = losses(Run(config), "stage 2 only")
    assert sum(curve[-3:]) < 0.9 * sum(curve[:3])
    saved = load_file(Run(config).model_dir("stage 2 only") / "merged" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}


def test_a_part_without_gradient_is_said(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    config.model.vision.full = False
    model, processor = load_model(str(base))
    tuned, parts = attach_lora(model, config.model)
    stage = build_stages(config, config.train.systems[1])[0]
    tuned.get_input_embeddings().weight.data.zero_()
    broken = {**parts, "vision": "model.nothing"}
    with pytest.raises(InputError, match="no gradient reaches the vision part"):
        train_stage(AdaptedModel(tuned, broken, processor), stage)


def test_a_diverging_loss_is_said(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    for stage in config.train.stages.values():
        stage.learning_rate, stage.max_grad_norm = 1e30, 1e30
    with pytest.raises(InputError, match=r"lower train\.stages\.localization\.learning_rate"):
        train_system(config, "stage 2 only", None, lambda metrics, folder: None)


@pytest.mark.parametrize("name", ["state.pt", "position.json"])
def test_a_checkpoint_half_written_is_told(tmp_path: Path, base: Path, name: str) -> None:
    config = trained_config(tmp_path, base)
    config.train.stages["localization"].max_steps = 2
    kept: list[Path] = []
    train_system(config, "stage 2 only", None, keeping(kept, tmp_path))
    content = (kept[0] / name).read_bytes()
    (kept[0] / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"the checkpoint in .* is incomplete \(.*: remove it to resume from the one before"):
        train_system(config, "stage 2 only", kept[0], lambda metrics, folder: None)


def test_checkpoint_of_another_rank_is_refused(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    kept: list[Path] = []
    train_system(config, "stage 2 only", None, keeping(kept, tmp_path))
    config.model.llm.rank = 3
    with pytest.raises(InputError, match="another base model or other LoRA settings"):
        train_system(config, "stage 2 only", kept[0], lambda metrics, folder: None)
