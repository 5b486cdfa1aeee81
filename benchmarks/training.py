"""A tuning step of this repository against TRL's SFTTrainer and the Hugging Face Trainer, on the same rows in turn.

    pip install trl
    python benchmarks/training.py my_city.yaml                      # samples/s and losses, three seeds
    python benchmarks/training.py my_city.yaml --growth             # time per step against rounds and images
    python benchmarks/training.py my_city.yaml --memory             # estimated against measured memory

    python benchmarks/training.py demo --set model.base=full-size --set model.dtype=bfloat16 --rows 16 --steps 20   # a GPU

The run must have photos (`python ray_jobs/prepare.py`); `full-size` is made by benchmarks/full_size.py. All sides have the same
base, adapter, rows, batches, optimizer, schedule, precision and loss (on the answers). TRL is used as it recommends for images:
gradient checkpointing (its default), `assistant_only_loss`, no truncation; the Trainer pads our rows and masks our labels. On
CPUs seconds of processor time count, on a GPU those of the clock; there the memory and the share of the peak are shown too,
with the same useful operations a row for all sides.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import Trainer as HuggingFaceTrainer
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging

from addressvlm.config import Config, load
from addressvlm.models import load_model
from addressvlm.models.families import parts_of
from addressvlm.models.lora import freeze_batchnorm, lora_config, set_trainable_parts
from addressvlm.training.collator import Collator, sample_from_row
from addressvlm.training.dataset import Schedule
from addressvlm.training.memory_estimate import GIB, estimate_stages, model_shape
from addressvlm.training.metrics_logger import StepMetrics, memory_gib
from addressvlm.training.stages import Stage, training_rows
from addressvlm.training.trainer import AdaptedModel, Trainer, attach_adapter

WARM = 1  # steps that are not timed
# TRL finds the answers by what is between `generation` marks; this is ChatML, for other bases write theirs.
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds() -> float:
    """Of this process on a CPU; of the clock on a GPU, when all that was begun is done."""
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):
    """Seconds and loss of every step of a Trainer.

    Attributes:
        mfu: share of the GPU's peak in the last step, if it was measured.
        tokens: of a row, likewise.
        memory: most that was held on the GPU, GiB.
        peak_gib: most that this repository's trainer reports, on a CPU too.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.mfu: float | None = None
        self.tokens = self.memory = self.peak_gib = 0.0
        self.last = seconds()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.seconds:
            self.last = seconds()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = seconds()
        if DEVICE.type == "cuda":
            self.memory = memory_gib(DEVICE)
        self.seconds.append(now - self.last)
        self.last = now

    def log_step(self, metrics: StepMetrics) -> None:
        """Called by this repository's trainer."""
        self.on_step_end()
        self.losses.append(metrics.loss)
        self.mfu, self.tokens = metrics.mfu, metrics.tokens_per_s / metrics.samples_per_s
        self.peak_gib = max(self.peak_gib, metrics.memory_gib)

    def sync(self) -> None:
        """The trainer's logger has storage to sync, this one has none."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


class Bench:
    """One stage of a run, cut to a number of steps."""

    def __init__(self, config: Config, stage: str, steps: int, rows: int, frozen: bool) -> None:
        parts = ["adapter", "llm"] if frozen else ["vision", "adapter", "llm"]
        self.stage = config.train.stages[stage].model_copy(
            update={"batch_size": rows, "gradient_accumulation_steps": 1, "isolate_questions": False, "parts": parts}
        )
        self.config, self.steps, self.rows = config, steps, rows
        self.table = training_rows(config, self.stage.tables)

    def order(self, seed: int) -> list[int]:
        """The rows of all steps."""
        schedule = Schedule(self.table, self.rows, seed)
        return [row for step in range(self.steps) for row in schedule.indices(step)]

    def base(self, seed: int) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        return load_model(self.config.model.base, self.config.model.dtype)

    def ours(self, seed: int) -> Clock:
        base, processor = self.base(seed)
        clock = Clock()
        model = attach_adapter(base, processor, self.config.model_copy(update={"seed": seed}), DEVICE)
        stage = Stage("bench", self.stage, Schedule(self.table, self.rows, seed), self.steps, seed)
        self.train(model, stage, clock)
        return clock

    def train(self, model: AdaptedModel, stage: Stage, clock: Clock) -> None:
        """Train one stage with this repository's trainer; the clock notes every step."""
        settings = self.config.train.model_copy(
            update={"strategy": "ddp", "validate_every": None, "checkpoint_activations": False}
        )
        trainer = Trainer(settings, [stage], lambda: model, DEVICE)
        trainer.logger = clock  # type: ignore[assignment]
        trainer.fit()

    def trainer(self, seed: int) -> Clock:
        model, processor = self._tuned(seed)
        collate = Collator(processor)

        def batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            encoded = collate([sample_from_row(self.table[row["row"]]) for row in rows])
            return {key: value for key, value in encoded.items() if key != "kinds"}

        rows: Any = [{"row": row} for row in self.order(seed)]
        return self._train(HuggingFaceTrainer, TrainingArguments, seed, model=model, train_dataset=rows, data_collator=batch)

    def trl(self, seed: int) -> Clock:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        model, processor = self._tuned(seed)
        processor.chat_template = GENERATION
        processor.tokenizer.backend = "tokenizers"  # loaded with backend="pil", it takes that for its own
        samples = [sample_from_row(self.table[row]) for row in self.order(seed)]
        rows = Dataset.from_dict({"row": list(range(len(samples)))})

        def transform(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
            chosen = [samples[row] for row in batch["row"]]
            talks = [
                [turn for q, a in s.rounds for turn in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
                for s in chosen
            ]
            return {"images": [[s.image] for s in chosen], "messages": talks}

        rows.set_transform(transform)
        extra = {"assistant_only_loss": True, "max_length": None}
        return self._train(SFTTrainer, SFTConfig, seed, extra, model=model, train_dataset=rows, processing_class=processor)

    def _tuned(self, seed: int) -> tuple[Any, Any]:
        """The base with PEFT's own layers; its attention is the one that is quicker here."""
        base, processor = self.base(seed)
        model = get_peft_model(base, lora_config(base, parts_of(base), self.config.model))
        set_trainable_parts(model, parts_of(base), self.stage.parts)
        model.config.use_cache = False
        return model, processor

    def _train(self, trainer: Any, arguments: Any, seed: int, extra: dict[str, Any] | None = None, **settings: Any) -> Clock:
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            training_arguments = arguments(
                folder, max_steps=self.steps, per_device_train_batch_size=self.rows, learning_rate=self.stage.learning_rate,
                lr_scheduler_type="cosine", warmup_steps=max(1, round(self.steps * self.stage.warmup_ratio)) - 1,
                adam_beta2=0.999, weight_decay=self.stage.weight_decay, max_grad_norm=self.stage.max_grad_norm, logging_steps=1,
                save_strategy="no", report_to=[], bf16=self.config.train.precision != "float32", seed=seed,
                use_cpu=not torch.cuda.is_available(), remove_unused_columns=False, disable_tqdm=True,
                train_sampling_strategy="sequential", **(extra or {}),
            )  # fmt: skip
            running = trainer(args=training_arguments, callbacks=[clock, FreezeBatchNorm()], **settings)
            running.train()
        return clock


class FreezeBatchNorm(TrainerCallback):
    """BatchNorm keeps its statistics, as in this repository."""

    def on_step_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        freeze_batchnorm(model)


def compare(bench: Bench, seeds: int, sides: list[str]) -> None:
    """Samples a second of each side, and the loss over the last half of the steps."""
    pace: dict[str, list[float]] = {side: [] for side in sides}
    loss: dict[str, list[float]] = {side: [] for side in sides}
    useful, tokens = None, 0.0  # share of the peak by a row a second, known once ours has run; tokens of a row
    for seed in range(seeds):
        for side in sides:
            clock: Clock = getattr(bench, side)(seed)
            pace[side].append(bench.rows / statistics.median(clock.seconds[WARM:]))
            loss[side].append(statistics.mean(clock.losses[bench.steps // 2 :]))
            line = f"seed {seed} {side:8} {pace[side][-1]:.3f} samples/s, loss {loss[side][-1]:.4f}"
            if side == "ours":
                useful, tokens = clock.mfu and clock.mfu / (bench.rows / clock.seconds[-1]), clock.tokens
            if useful:
                line += f", {100 * useful * pace[side][-1]:.1f} % of the peak, {tokens * pace[side][-1]:,.0f} tokens/s"
            print(f"{line}, {clock.memory:.1f} GiB" if clock.memory else line, flush=True)
    for side in sides:
        ratio = statistics.median(a / b for a, b in zip(pace["ours"], pace[side], strict=True))
        spread = f"{min(loss[side]):.4f} to {max(loss[side]):.4f}"
        print(f"{side:8} {statistics.median(pace[side]):.3f} samples/s, ours is {ratio:.2f} x; loss {spread}")


def growth(config: Config, bench: Bench) -> None:
    """A table of seconds a step: rounds of a conversation, images of a batch."""
    model = attach_adapter(*bench.base(0), config, DEVICE)
    print("| rounds | images a batch | tokens | seconds a step | seconds a 1,000 tokens |\n|---:|---:|---:|---:|---:|")
    for rounds, images in ((1, 2), (3, 2), (7, 2), (14, 2), (7, 1), (7, 4)):
        clock, table = Clock(), Longer(bench.table, rounds)
        settings = bench.stage.model_copy(update={"batch_size": images})
        bench.train(model, Stage("bench", settings, Schedule(table, images, 0), 3, 0), clock)
        step, length = statistics.median(clock.seconds[WARM:]), clock.tokens * images
        print(f"| {rounds} | {images} | {length:.0f} | {step:.2f} | {1000 * step / length:.2f} |", flush=True)


class Longer:
    """A table whose conversations have another number of rounds."""

    def __init__(self, table: Any, rounds: int) -> None:
        self.table, self.rounds, self.starts, self.group_count = table, rounds, table.starts, table.group_count

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.table[index]
        return row | {"rounds": (row["rounds"] * self.rounds)[: self.rounds]}

    def prefetch(self, indices: Any, keep: int) -> None:
        self.table.prefetch(indices, keep)

    def epoch(self, seed: int, epoch: int, window: int = 1) -> Any:
        return self.table.epoch(seed, epoch, window)


def memory(config: Config, bench: Bench, stage: str) -> None:
    """The estimated memory against the peak of tensors on a GPU, or the growth of this process on a CPU."""
    before = process_memory_gib() if DEVICE.type == "cpu" else 0.0
    clock = Clock()
    two_steps = Stage("bench", bench.stage, Schedule(bench.table, bench.rows, 0), 2, 0)
    bench.train(attach_adapter(*bench.base(0), config, DEVICE), two_steps, clock)
    took = clock.peak_gib - before
    config.train.stages = {stage: bench.stage.model_copy(update={"max_steps": 1})}
    system = config.train.systems[0].model_copy(update={"stages": [stage]})
    planned = estimate_stages(config, system, model_shape(config), cpu=DEVICE.type == "cpu")[0].memory / GIB
    print(f"planned {planned:.2f} GiB, took {took:.2f} GiB: {100 * (planned / took - 1):+.0f} %")


def process_memory_gib() -> float:
    """Memory of this process now, GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a preset or YAML file whose run has been prepared")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--stage", default="localization")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="images a batch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--frozen", action="store_true", help="the vision encoder does not learn")
    parser.add_argument("--sides", nargs="+", default=["ours", "trainer", "trl"])
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = load(args.config, args.sets)
    bench = Bench(config, args.stage, args.steps, args.rows, args.frozen)
    if args.memory:
        memory(config, bench, args.stage)
    elif args.growth:
        growth(config, bench)
    else:
        compare(bench, args.seeds, args.sides)


if __name__ == "__main__":
    main()
