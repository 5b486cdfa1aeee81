"""What a training will take, from config.json alone, and base models that can't be trained

python -m pytest -q tests/training/test_memory_estimate.py
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen3VLConfig, SmolVLMConfig

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.config import load as configuration
from addressvlm.config.train import ModelConfig, PartConfig
from addressvlm.models import load_model
from addressvlm.models.lora import adapter_weights, attach_lora, set_trainable_parts
from addressvlm.training.activation_checkpointing import probe_first_row
from addressvlm.training.collator import Collator, sample_from_row
from addressvlm.training.dataset import Schedule
from addressvlm.training.memory_estimate import (
    GIB,
    LIBRARIES,
    StageEstimate,
    estimate_stages,
    model_shape,
    print_estimate,
    row_cost,
    shape_of,
)
from addressvlm.training.stages import Stage
from tests.support.tiny_families import FAMILIES
from tests.support.training_tables import ListTable, table_rows, trained_config


def shaped(base: Path, folder: Path, vision_layers: int, layers: int) -> Path:
    """The shape of xtuner/llava-phi-3-mini-hf, with so many layers, without its weights and with a tokenizer of few words."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["patch_size"] = 14
    processor["image_processor"]["size"] = {"height": 336, "width": 336}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=vision_layers,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=32,
        vocab_size=32064, max_position_embeddings=4096,
    )  # fmt: skip
    token = load_model(str(base))[0].config.image_token_id
    LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=token, architectures=["LlavaForConditionalGeneration"]
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def full_size(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layers."""
    return shaped(base, tmp_path_factory.mktemp("full") / "base", 24, 32)


@pytest.fixture(scope="module")
def half_depth(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As wide, of half as many layers."""
    return shaped(base, tmp_path_factory.mktemp("half") / "base", 12, 16)


def paper(full_size: Path, tmp_path: Path, *sets: str) -> Config:
    return configuration("paper-pitts", [f"model.base={full_size}", f"storage={tmp_path}", *sets], {})


def sketched(model: Any, processor: Any) -> Any:
    """The cost of a row, from the model's shape alone."""
    with torch.device("meta"):
        base = type(model)._from_config(model.config)
    tuned, parts = attach_lora(base, ModelConfig(vision=PartConfig(rank=2), llm=PartConfig(rank=2)))
    row = Collator(processor).encode(sample_from_row(table_rows(1)[0]))
    return row_cost(tuned, parts, row.pixels, len(row.ids), 4)


def test_the_paper_is_estimated_from_its_shape_alone(full_size: Path, tmp_path: Path) -> None:
    config = paper(full_size, tmp_path)
    made = model_shape(config)
    assert made.totals == {"vision": 303_507_456, "adapter": 12_589_056, "llm": 3_821_079_552}
    stage = estimate_stages(config, config.train.systems[-1], made, photos=177_840)[1]
    assert stage.steps == round(177_840 / 128)
    rank_128 = 32 * 128 * (4 * (3072 + 3072) + 2 * (3072 + 8192) + (8192 + 3072))  # q, k, v, o; gate, up; down
    assert stage.trained["llm"] == rank_128
    assert stage.trained["adapter"] == made.totals["adapter"]
    frozen = sum(made.totals.values()) * 2 / GIB
    assert frozen < stage.weights / GIB < frozen + 1.5
    products = 4 * 3_723_000_000 * stage.tokens  # both passes through the language model's matrices, head and adapter aside
    assert products < stage.flops < 1.5 * products
    assert stage.seconds(71e12, 8, 0.4) == pytest.approx(177_840 * stage.flops / (0.4 * 71e12 * 8), rel=0.01)


def test_memory_of_the_machine_is_for_loading_rows_and_checkpoints(half_depth: Path, tmp_path: Path) -> None:
    config = paper(half_depth, tmp_path)
    made = model_shape(config)
    stage = estimate_stages(config, config.train.systems[-1], made, photos=1000)[1]
    assert stage.loading == 2 * sum(made.totals.values())
    adapter = sum(weights.numel() for _, weights in adapter_weights(made.model))
    assert stage.kept == 12 * adapter  # all of it learns in this stage: itself and two moments in float32
    assert stage.host_memory(on_cpu=False) == pytest.approx(stage.loading + stage.ahead + LIBRARIES)
    assert stage.host_memory(on_cpu=True) == pytest.approx(stage.kept + stage.memory + stage.ahead + LIBRARIES)
    config.train.loader_processes = 1
    fewer = estimate_stages(config, config.train.systems[-1], made, photos=1000)[1]
    assert fewer.ahead < stage.ahead - 2 * LIBRARIES + 1  # three processes of four CPUs


QWEN3_VL_4B = Qwen3VLConfig(
    text_config={
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    vision_config={
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560,
        "patch_size": 16, "deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304,
    },
    tie_word_embeddings=True,
)  # fmt: skip
SMOLVLM2_2B = SmolVLMConfig(
    text_config={
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49280, "pad_token_id": 2,
    },
    vision_config={
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384,
        "patch_size": 14,
    },
    scale_factor=3,
)  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "architecture", "family", "billions"),
    [("qwen-city", QWEN3_VL_4B, "qwen3-vl", 4.4), ("smol-city", SMOLVLM2_2B, "smolvlm2", 2.2)],
)
def test_presets_of_today_s_families_fit_their_card(
    tmp_path: Path, preset: str, architecture: Any, family: str, billions: float
) -> None:
    """The shapes of the real bases, with the processor of a small one."""
    config = configuration(preset, [f"storage={tmp_path}"], {})
    made = shape_of(architecture, FAMILIES[family]()[1], config)
    assert sum(made.totals.values()) == pytest.approx(billions * 1e9, rel=0.03)
    (stage,) = estimate_stages(config, config.train.systems[1], made, photos=20_000)
    assert stage.loading / GIB < stage.memory / GIB < 24


def test_a_system_of_equal_steps_is_estimated_with_them(half_depth: Path, tmp_path: Path) -> None:
    config = paper(half_depth, tmp_path)
    made = model_shape(config)
    whole = [stage.steps for stage in estimate_stages(config, config.train.systems[-1], made, photos=177_840)]
    equal = next(s for s in config.train.systems if s.match_steps_of == config.train.systems[-1].name)
    assert [stage.steps for stage in estimate_stages(config, equal, made, photos=177_840)] == [sum(whole)]
    assert estimate_stages(config, equal, made)[0].steps is None


def test_an_estimate_that_does_not_fit_is_refused_and_one_that_fits_is_printed(
    full_size: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = paper(full_size, tmp_path, "train.peak_tflops=71")
    systems = config.train.systems[1:2]
    print_estimate(config, systems, 177_840)
    message = capsys.readouterr().out
    assert "parameters: vision 303,507,456, adapter 12,589,056, llm 3,821,079,552" in message
    assert "steps: 1,389" in message
    assert "40 % of 71 TFLOP/s" in message
    config.train.gpu_memory_gib = 8
    with pytest.raises(
        InputError, match=r"stage 2 only, localization needs about \d+\.\d GiB a GPU, which has 8: lower batch_size"
    ):
        print_estimate(config, systems, 177_840)


def test_an_estimate_without_data_says_what_is_unknown(half_depth: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = paper(half_depth, tmp_path)
    print_estimate(config, config.train.systems[1:2], None)
    assert "steps: unknown (give --photos)" in capsys.readouterr().out


def test_an_estimate_without_the_base_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"an estimate for 'nobody/nothing' needs its config\.json and processor files"):
        model_shape(configuration("paper-pitts", ["model.base=nobody/nothing"], {}))


@pytest.mark.parametrize("parts", [["vision", "adapter", "llm"], ["adapter", "llm"], ["llm"]])
def test_estimated_operations_are_those_of_the_model(base: Path, tmp_path: Path, parts: list) -> None:
    config = trained_config(tmp_path, base)
    config.model.lora_dropout = 0.0
    config.train.stages["localization"].parts = parts
    table = ListTable(table_rows(3)[:1])
    model, processor = load_model(str(base))
    tuned, where = attach_lora(model, config.model)
    collate = Collator(processor)
    row = collate.encode(sample_from_row(table[0]))
    answers = sum(label != -100 for label in row.labels)

    stage = Stage("s", config.train.stages["localization"], Schedule(table, 1, 0), 1, 0)
    set_trainable_parts(tuned, where, parts)
    real = probe_first_row(tuned, where, collate, stage)
    sketched = model_shape(config)
    set_trainable_parts(sketched.model, sketched.parts, parts)
    assert row_cost(sketched.model, sketched.parts, row.pixels, len(row.ids), answers).flops == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_reads_tensor_values_is_guessed(family: str) -> None:
    cost = sketched(*FAMILIES[family]())
    assert cost.guessed or not family.startswith("qwen")
    assert cost.flops > 0
    assert cost.activations > 0


def test_the_shape_of_llava_is_counted_and_not_guessed(base: Path) -> None:
    assert not sketched(*load_model(str(base))).guessed


def test_memory_is_what_the_strategy_does_not_shard(half_depth: Path, tmp_path: Path) -> None:
    config = paper(half_depth, tmp_path)
    made = model_shape(config)
    result = {}
    for strategy in ("ddp", "zero2", "fsdp2", "zero3"):
        config.train.strategy = strategy
        result[strategy] = estimate_stages(config, config.train.systems[1], made, photos=1000)[0]
    whole = result["ddp"]
    assert result["zero2"].weights == whole.weights
    assert whole.weights / 8 < result["fsdp2"].weights < result["zero3"].weights < whole.weights
    for strategy in ("zero2", "fsdp2", "zero3"):
        assert result[strategy].optimizer == whole.optimizer / 8
        assert result[strategy].gradients == whole.gradients / 8
        assert result[strategy].activations == whole.activations
    config.train.checkpoint_activations = True
    twice = estimate_stages(config, config.train.systems[1], made, photos=1000)[0]
    assert twice.flops == whole.flops
    assert twice.activations < 0.3 * whole.activations


def test_memory_and_steps_follow_from_batch_workers_and_what_learns(base: Path, tmp_path: Path) -> None:
    config = trained_config(tmp_path, base, workers=2)
    stage = config.train.stages["localization"]
    made = model_shape(config)

    def planned_with(**settings: Any) -> StageEstimate:
        config.train.stages["localization"] = stage.model_copy(
            update={"batch_size": 1, "gradient_accumulation_steps": 1, **settings}
        )
        return estimate_stages(config, config.train.systems[1], made)[0]

    one, three, often = planned_with(), planned_with(batch_size=3), planned_with(gradient_accumulation_steps=3)
    assert (one.rows, one.rows_per_step, one.steps) == (24, 2, 24)
    assert (three.rows_per_step, three.steps) == (often.rows_per_step, often.steps) == (6, 8)
    assert three.activations == pytest.approx(3 * one.activations)
    assert often.activations == one.activations
    assert one.memory == pytest.approx(1.05 * (one.weights + one.gradients + one.optimizer + one.activations))
    learnt = sum(one.trained.values())
    assert (one.gradients, one.optimizer) == (4 * learnt, 8 * learnt)  # float32; two moments
    lone = planned_with(parts=["llm"])
    assert (lone.trained["vision"], lone.trained["adapter"]) == (0, 0)
    assert lone.trained["llm"] == one.trained["llm"]
    assert lone.optimizer == 8 * lone.trained["llm"]
    assert one.seconds(2e9, 4, 0.5) == pytest.approx(24 * 2 * one.flops / 4e9)
    on_cpu = estimate_stages(config, config.train.systems[1], made, cpu=True)[0]
    pairs = 2 * 2 * lone.longest**2  # heads and layers of the language model
    assert on_cpu.activations - lone.activations == 4 * pairs
