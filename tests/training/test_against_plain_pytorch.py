"""The training loop against plain PyTorch written out here: losses, moments and weights of two stages; dropout, statistics

python -m pytest -q tests/training/test_against_plain_pytorch.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from peft.tuners import lora

from addressvlm.config import Config
from addressvlm.config.train import ModelConfig, PartConfig, StageConfig
from addressvlm.models import load_model
from addressvlm.models import lora as lora_module
from addressvlm.models.loading import enable_packing
from addressvlm.models.lora import adapter_state, adapter_weights, attach_lora
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.training import trainer
from addressvlm.training.checkpoint import TrainingCheckpoint
from addressvlm.training.collator import Collator, image_from_row, sample_from_row
from addressvlm.training.dataset import Schedule, TableRows
from addressvlm.training.metrics_logger import StepMetrics
from addressvlm.training.stages import Stage, build_stages
from addressvlm.training.trainer import AdaptedModel, train_system
from tests.support.families import tiny_fastvlm
from tests.support.training_tables import ListTable, keeping, nothing, picture, table_rows, train_stage, trained_config

WORDS = {"vision": "vision_tower", "adapter": "multi_modal_projector", "llm": "language_model"}


STEPS, PER_STEP = 3, 4


SHARES = [1.0, 1.0, 0.5]  # of the learning rate: one step of warm-up, then half a cosine of two steps


STAGES: dict[str, dict[str, Any]] = {
    "alignment": {"parts": ["adapter", "llm"], "learning_rate": 0.02, "max_grad_norm": 2.0, "weight_decay": 3.0},
    "localization": {
        "parts": ["vision", "llm"], "learning_rate": 0.01, "learning_rates": {"vision": 0.005}, "max_grad_norm": 4.0,
        "weight_decay": 1.0, "isolate_questions": True,
    },
}  # fmt: skip


def asked(question: str, answer: str, kind: str) -> dict[str, Any]:
    return {"level": "street", "kind": kind, "question": question, "answer": answer, "options": []}


def uneven(count: int, word: str) -> list[dict[str, Any]]:
    """Rows of one to three rounds whose answers are of one to five words."""
    rows = []
    for number in range(count):
        answer = " ".join([word] * (1 + number % 5))
        rounds = [
            asked("Which street is this?", answer, "generation"),
            asked("Is it?", "Yes" if number % 2 else "No", "judgment"),
            asked("Options: A; B", "B" * (1 + number % 4), "choice"),
        ][: 1 + number % 3]
        colour = ("red", "blue", "green", "white")[number % 4]
        rows.append({"id": f"{word}{number}", "place": str(number), "image": picture(colour), "rounds": rounds})
    return rows


def two_stages(folder: Path, base: Path, batch_size: int, gradient_accumulation_steps: int, packing: str) -> Config:
    config = trained_config(folder, base, packing=packing, checkpoint_every=1)
    config.model.lora_dropout = 0.0  # its masks depend on how rows are laid out
    run = Run(config)
    schema = tables.with_features(tables.pa.schema([tables.PHOTOS.field(c) for c in ("id", "place", "image", "rounds")]))
    for table, word in ((run.alignment, "Harbour"), (run.photos, "Mill")):
        tables.write_table(table, "train", uneven(24, word), schema)
    for name, given in STAGES.items():
        data = "alignment" if name == "alignment" else "photos"
        sizes = {
            "batch_size": batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "max_steps": STEPS,
            "warmup_ratio": 0.34,
        }
        config.train.stages[name] = StageConfig(data=data, **sizes, **given)
    return config


def plain_losses(model: Any, processor: Any, image: Any, rounds: list[tuple[str, str]]) -> list[torch.Tensor]:
    """The cross-entropy of each answer's tokens, one tensor a round, of one conversation in a row of its own."""

    def tokens(text: str) -> list[int]:
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    ids, answers = [], []
    for number, (question, answer) in enumerate(rounds):
        images = "<image>" * 16 if number == 0 else ""
        ids += tokens(f"<|user|>{images}{question}<|end|><|assistant|>")
        answers.append((len(ids), tokens(f"{answer}<|end|>")))
        ids += answers[-1][1]
    pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    row = torch.tensor([ids])
    logits = model(input_ids=row, attention_mask=torch.ones_like(row), pixel_values=pixels).logits[0].float()
    return [F.cross_entropy(logits[at - 1 : at - 1 + len(own)], torch.tensor(own), reduction="none") for at, own in answers]


def of_row(model: Any, processor: Any, row: dict[str, Any], apart: bool = False) -> list[torch.Tensor]:
    image, rounds = image_from_row(row), [(r["question"], r["answer"]) for r in row["rounds"]]
    if apart:
        return [plain_losses(model, processor, image, [one])[0] for one in rounds]
    return plain_losses(model, processor, image, rounds)


def plain_training(config: Config, base: Path) -> Iterator[tuple[float, float, Any, Any]]:
    """Loss, gradient's norm, model and optimizer after each step."""
    model, processor = load_model(str(base))
    torch.manual_seed(config.training_seed)
    model, _ = attach_lora(model, config.model)
    model.train()
    run = Run(config)
    for stage, folder in zip(build_stages(config, config.train.systems[-1]), (run.alignment, run.photos), strict=True):
        given, table = STAGES[stage.name], TableRows(folder, "train", ("id", "image", "rounds"))
        rates = {part: given.get("learning_rates", {}).get(part, given["learning_rate"]) for part in given["parts"]}
        groups = []
        for name, weights in model.named_parameters():
            part = next((part for part in given["parts"] if WORDS[part] in name), None)
            weights.requires_grad = part is not None and ("lora_" in name or "modules_to_save" in name)
            weights.grad = None
            if weights.requires_grad:
                groups.append({"params": [weights], "rate": rates[part]})
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), weight_decay=given["weight_decay"])
        for step, share in enumerate(SHARES):
            order = stage.schedule.indices(step)
            assert len(order) == PER_STEP
            of_rows = [of_row(model, processor, table[i], "isolate_questions" in given) for i in order]
            loss = torch.cat([losses for row in of_rows for losses in row]).mean()
            loss.backward()
            gradients = [weights.grad for group in groups for weights in group["params"] if weights.grad is not None]
            norm = sum(float((gradient**2).sum()) for gradient in gradients) ** 0.5
            for gradient in gradients:
                gradient.mul_(min(1.0, given["max_grad_norm"] / norm))
            for group in optimizer.param_groups:
                group["lr"] = share * group["rate"]
            optimizer.step()
            optimizer.zero_grad()
            yield float(loss.detach()), norm, model, optimizer


def far(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many numbers differ by more than a twentieth of the largest: AdamW makes much of a gradient that is only rounding."""
    return int(((one - other).abs() > 0.05 * max(float(other.abs().max()), 1e-7)).sum())


Speaker = tuple[Any, Any, Any]


def speaking(base: Path, dropout: float) -> Speaker:
    """A model whose adapter says something, its parts, and its processor."""
    model, processor = load_model(str(base))
    torch.manual_seed(5)
    model, parts = attach_lora(model, ModelConfig(vision=PartConfig(rank=2), llm=PartConfig(rank=3), lora_dropout=dropout))
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.1)
    return model, parts, processor


def standing_still(speaker: Speaker, stage_name: str = "s", seed: int = 0, start: int = 0) -> list[StepMetrics]:
    """Steps that change next to nothing, each of the same four rows, so that their losses differ by the masks alone."""
    model, parts, processor = speaker
    config = StageConfig(data="photos", batch_size=2, learning_rate=1e-12)
    stage = Stage(stage_name, config, Schedule(ListTable(table_rows(1) * 4), 4, 0), 3, seed)
    checkpoint = None
    if start:
        names = [name for name, _ in adapter_weights(model)]
        zeros = {name: torch.zeros_like(weights) for name, weights in adapter_state(model).items()}
        moments = {n: {"exp_avg": zeros[n], "exp_avg_sq": zeros[n].clone(), "step": torch.tensor(1.0)} for n in names}
        checkpoint = TrainingCheckpoint(0, start, adapter_state(model), moments)
    return train_stage(AdaptedModel(model, parts, processor), stage, checkpoint, peak_tflops=2.0)


def as_worker(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    """Let the loop be one of several workers that all see the same."""
    stand_in = SimpleNamespace(
        is_initialized=lambda: True, get_rank=lambda: rank, get_world_size=lambda: world, all_reduce=lambda v: v.mul_(world)
    )
    monkeypatch.setattr(trainer, "dist", stand_in)


@pytest.mark.parametrize(("batch_size", "gradient_accumulation_steps", "packing"), [(2, 2, "off"), (1, 4, "on")])
def test_two_stages_are_those_of_plain_pytorch(
    tmp_path: Path, base: Path, batch_size: int, gradient_accumulation_steps: int, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, kept = two_stages(tmp_path, base, batch_size, gradient_accumulation_steps, packing), []
    train_system(config, "AddressVLM", None, keeping(kept, tmp_path))
    lines = (Run(config).training_dir("AddressVLM") / "loss.jsonl").read_text().splitlines()
    curve = [json.loads(line) for line in lines]
    assert len(curve) == 2 * STEPS
    held = [TrainingCheckpoint.read(folder) for folder in kept]
    assert [(snapshot.stage, snapshot.step) for snapshot in held] == [(stage, step) for stage in (0, 1) for step in (1, 2, 3)]

    monkeypatch.setattr(lora_module.FusedLoraLinear, "forward", lora.Linear.forward)
    clipped = []
    for number, (loss, norm, model, optimizer) in enumerate(plain_training(config, base)):
        assert curve[number]["loss"] == pytest.approx(loss, rel=2e-3)
        assert curve[number]["gradient_norm"] == pytest.approx(norm, rel=2e-2)
        clipped.append(norm > STAGES["alignment" if number < STEPS else "localization"]["max_grad_norm"])
        snapshot, named = held[number], dict(adapter_weights(model))
        learnt = {name for name in named if named[name] in optimizer.state}
        assert snapshot.adapter.keys() == named.keys()
        assert snapshot.optimizer_state.keys() == learnt
        pairs = [(snapshot.adapter[name], named[name].detach()) for name in named]
        pairs += [
            (snapshot.optimizer_state[n][key], optimizer.state[named[n]][key])
            for n in learnt
            for key in ("exp_avg", "exp_avg_sq")
        ]
        assert sum(far(*pair) for pair in pairs) <= 0.005 * sum(one.numel() for one, _ in pairs)
    assert any(clipped)


def test_dropout_draws_other_masks_at_each_step_on_each_worker_and_in_each_stage(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker = speaking(base, 0.3)

    def losses(**given: Any) -> list[float]:
        return [progress.loss for progress in standing_still(speaker, **given)]

    still = [progress.loss for progress in standing_still(speaking(base, 0.0))]
    assert still == pytest.approx([still[0]] * 3, rel=1e-6)
    whole = losses()
    assert losses() == whole
    assert losses(start=2) == pytest.approx(whole[2:], rel=1e-6)  # as after a resume
    others = [losses(stage_name="t"), losses(seed=1)]
    for rank in range(2):
        as_worker(monkeypatch, rank, 2)
        others.append(losses())
    result = [round(loss, 5) for curve in (whole, *others) for loss in curve]
    assert len(set(result)) == len(result)


def test_two_workers_count_their_rows_and_peaks_together(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speaker = speaking(base, 0.0)
    alone = standing_still(speaker)[0]
    as_worker(monkeypatch, 1, 2)
    pair = standing_still(speaker)[0]
    assert pair.tokens == alone.tokens  # two rows each
    assert pair.loss == pytest.approx(alone.loss, rel=1e-6)
    assert pair.gradient_norm == pytest.approx(alone.gradient_norm, rel=1e-5)
    assert pair.tokens_per_s / pair.samples_per_s == pytest.approx(alone.tokens_per_s / alone.samples_per_s)
    assert pair.mfu is not None
    assert alone.mfu is not None
    assert pair.mfu / pair.samples_per_s == pytest.approx(alone.mfu / alone.samples_per_s / 2)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_losses_by_kind_are_means_over_the_tokens_of_that_kind(base: Path, apart: bool, packed: bool) -> None:
    model, processor = load_model(str(base))
    rows = uneven(6, "Mill")
    rows[1]["rounds"][0]["kind"] = "riddle"
    result: dict[str, list[torch.Tensor]] = {}
    with torch.inference_mode():
        for row in rows:
            for one, losses in zip(row["rounds"], of_row(model, processor, row, apart), strict=True):
                result.setdefault("other" if one["kind"] == "riddle" else one["kind"], []).append(losses)
    expected = {kind: float(torch.cat(losses).mean()) for kind, losses in result.items()}
    every = torch.cat([one for losses in result.values() for one in losses])
    lengths = [len(Collator(processor, apart).encode(sample_from_row(row)).ids) for row in rows]

    assert enable_packing(model, "on", torch.device("cpu"), "tiny") or not packed
    model, parts = attach_lora(model, ModelConfig(vision=PartConfig(rank=2), llm=PartConfig(rank=2), lora_dropout=0.0))
    settings = StageConfig(
        data="photos", batch_size=2, gradient_accumulation_steps=3, learning_rate=1e-9, isolate_questions=apart
    )
    stage = Stage("s", settings, Schedule(ListTable(rows), 6, 0), 1, 0)
    seen = train_stage(AdaptedModel(model, parts, processor, packed), stage)
    assert set(expected) == {"generation", "judgment", "choice", "other"}
    assert seen[0].by_kind == pytest.approx(expected, rel=1e-4)
    assert seen[0].loss == pytest.approx(float(every.mean()), rel=1e-4)
    assert seen[0].tokens == len(every)
    assert seen[0].tokens_per_s / seen[0].samples_per_s == pytest.approx(sum(lengths) / 6)


def test_statistics_of_normalization_stay_those_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet's running means, through two stages and what validation switches."""
    base = tiny_fastvlm(tmp_path / "fast")
    config = trained_config(tmp_path, base, validate_every=1, validate_photos=1)
    config.evaluate.max_new_tokens = 2
    for stage in config.train.stages.values():
        stage.max_steps = 2
    of_place = {"lat": 0.0, "lon": 0.0, "street": "Mill Street", "district": "Harbour", "heading": None}
    columns = ("id", "place", "lat", "lon", "street", "district", "image", "rounds")
    schema = tables.with_features(tables.pa.schema([tables.PHOTOS.field(c) for c in columns]))
    tables.write_table(Run(config).photos, "val", [row | of_place for row in table_rows(1)], schema)
    trained: list[Any] = []
    monkeypatch.setattr(trainer, "save_system", lambda config, one, *_: trained.append(one.model.peft))
    train_system(config, "AddressVLM", None, nothing)
    before, after = (
        [buffer for name, buffer in model.named_buffers() if "running" in name]
        for model in (load_model(str(base))[0], *trained)
    )
    assert len(before) == len(after) > 0
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    norms = [m for m in trained[0].modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert trained[0].training
    assert not any(norm.training for norm in norms)
