"""The training loop: a system's stages one after the other on one adapter (paper 001, Sec. 3.3), then save and merge.

No Ray in here. Under torch.distributed every worker runs it on its share of each step.
"""

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers.modeling_layers import GradientCheckpointingLayer

from addressvlm.config import Config
from addressvlm.config.train import Part, TrainConfig
from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import Gazetteer, merge_gazetteers
from addressvlm.models import load_model
from addressvlm.models.cards import write_cards
from addressvlm.models.loading import autocast, context_length, enable_packing, to_device
from addressvlm.models.lora import attach_lora, export_merged, freeze_batchnorm, load_adapter_state, set_trainable_parts
from addressvlm.storage.files import atomic_replace_dir
from addressvlm.storage.run_dir import Run, slug
from addressvlm.training.activation_checkpointing import checkpoint_activations, probe_first_row
from addressvlm.training.checkpoint import BestAdapter, TrainingCheckpoint, better_adapter
from addressvlm.training.collator import IGNORE_INDEX, KINDS, Collator
from addressvlm.training.dataset import low_locatability
from addressvlm.training.loader import StepBatches, StepLoader, loader_processes
from addressvlm.training.loss import answer_weights, token_losses
from addressvlm.training.metrics_logger import MetricsLogger, StepClock, StepMetrics, memory_gib, peak_flops
from addressvlm.training.optim import learning_rate
from addressvlm.training.pixels import decoded_size
from addressvlm.training.stages import RejectedRows, Stage, build_stages, training_runs
from addressvlm.training.strategy import SHARDS_WEIGHTS, OptimizerState, Strategy, is_distributed, make_strategy
from addressvlm.training.validation import Validation

messages = logging.getLogger(__name__)  # what a user should know; jobs pass it on

Report = Callable[[dict[str, Any], TrainingCheckpoint | None], None]


def train_system(
    config: Config,
    name: str,
    checkpoint: Path | None,
    report: Report,
    device: str | torch.device = "cpu",
    is_checkpoint_due: Callable[[], bool] = lambda: False,
) -> None:
    """Train a system of the configuration, or resume it, and save it; every worker of the process group calls it.

    Args:
        checkpoint: folder with the checkpoint to resume from.
        report: called by all workers together at every checkpoint; only the first gets the checkpoint, the others None.
        is_checkpoint_due: called by all workers after every step; whether to make a checkpoint besides the regular ones.

    Raises:
        InputError: data, base model or checkpoint can't be used, or see `Trainer.fit`.
    """
    run, settings, device = Run(config), config.train, torch.device(device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    stages = build_stages(config, next(s for s in settings.systems if s.name == name))
    trainer = Trainer(settings, stages, lambda: load_adapted_model(config, device), device, report)
    trainer.is_checkpoint_due = is_checkpoint_due
    trainer.validation = Validation(config, whole_split=shards_weights(settings)) if settings.validate_every else None
    resumed = TrainingCheckpoint.read(checkpoint) if checkpoint else None
    done = sum(s.steps for s in stages[: resumed.stage]) + resumed.step if resumed else 0
    total = sum(s.steps for s in stages)
    trainer.rejected = rejected = RejectedRows(run.rejects / f"train-{slug(name)}.parquet", resumed=done > 0)
    if rank == 0:
        trainer.logger = MetricsLogger(run.training_dir(name), name, done, total, settings.loggers, config.name)
        notes = [f"resuming after step {done} of {total}"] if done else []
        if uneven := next((s.schedule.per_step for s in stages if s.schedule.per_step % world), None):
            notes.append(f"{uneven} rows of a step are divided among {world} workers, so some have one more")
        for stage in stages:
            if low := low_locatability(stage.schedule.rows):
                notes.append(f"{stage.name} skips {len(low):,} photos with a locatability below {stage.config.locatability:g}")
        if notes:
            messages.info(f"{name}: {'; '.join(notes)}")

    adapter = trainer.fit(resumed)
    count = rejected.write(stages)
    if rank == 0:
        if count:
            messages.info(f"{name}: {count:,} rows were rejected: see {rejected.file}")
        save_system(config, trainer, name, adapter)


@dataclass
class AdaptedModel:
    """A base model with its LoRA adapter.

    Attributes:
        parts: module path of each part.
        packed: whether conversations share a row, see `train.packing`.
    """

    peft: PeftModel
    parts: dict[Part, str]
    processor: Any
    packed: bool = False


class Trainer:
    """Trains one adapter through stages.

    Attributes:
        validation: run every `validate_every` steps and after each stage's last, if set.
        logger: of the first worker, if set.
        rejected: written at every checkpoint, if set.
        best: the adapter that validated best in the last stage; the first worker's.
    """

    def __init__(
        self,
        settings: TrainConfig,
        stages: list[Stage],
        load: Callable[[], AdaptedModel],
        device: torch.device,
        report: Report | None = None,
    ) -> None:
        """Load the model. `load` is called again before later stages where the strategy shards it."""
        self.settings, self.stages, self.load, self.device, self.report = settings, stages, load, device, report
        self.rank: int = dist.get_rank() if dist.is_initialized() else 0
        self.world: int = dist.get_world_size() if dist.is_initialized() else 1
        self.model = load()
        self.is_checkpoint_due: Callable[[], bool] = lambda: False
        self.clock, self.saved, self.checkpoint_due = StepClock(device), time.monotonic(), False
        self.validation: Validation | None = None
        self.logger: MetricsLogger | None = None
        self.rejected: RejectedRows | None = None
        self.best: BestAdapter | None = None
        self.strategy: Strategy | None = None

    def fit(self, checkpoint: TrainingCheckpoint | None = None) -> dict[str, torch.Tensor]:
        """Train all stages, or what is left of them after a checkpoint; returns the adapter's weights, on the CPU.

        Raises:
            InputError: the checkpoint is of another model, the loss is not finite, a chosen part gets no gradient, or no row
                can be used.
        """
        first, start, optimizer_state = 0, 0, None
        if checkpoint:
            first, start, optimizer_state = checkpoint.stage, checkpoint.step, checkpoint.optimizer_state
            load_adapter_state(self.model.peft, checkpoint.adapter)
            self.best = checkpoint.best
        for number in range(first, len(self.stages)):
            self.begin_stage(number, optimizer_state)
            self.train_stage(start)
            start, optimizer_state = 0, None
        assert self.strategy
        return self.strategy.weights()

    def release(self) -> None:
        """Give up the model and the optimizer."""
        del self.model
        self.strategy = None
        gc.collect()

    def train_stage(self, start: int = 0) -> None:
        """The steps of the stage from `start`, which counts from 0, with validation and checkpoints."""
        on_gpu = self.device.type == "cuda"
        processes = loader_processes(self.settings, on_gpu)
        loader = StepLoader(self.stage, self.collator, start, self.rank, self.world, processes, pin=on_gpu)
        shares = iter(loader)
        self.clock.restart()
        for step in range(start, self.stage.steps):
            with self.clock.waiting("data"):
                share = next(shares)
            metrics = self.train_step(step, share)
            if self.logger:
                self.logger.log_step(metrics)
            last = metrics.step == self.stage.steps
            every = self.settings.validate_every
            if self.validation and every and (metrics.step % every == 0 or last):
                with self.clock.waiting("validation"):
                    self.validate(metrics.step)
            steps, preempted = self.settings.checkpoint_every, self.is_checkpoint_due()
            if last or preempted or (metrics.step % steps == 0 if steps else self.checkpoint_due):
                with self.clock.waiting("checkpoints"):
                    self.save_checkpoint(metrics)

    def begin_stage(self, number: int, optimizer_state: OptimizerState | None = None) -> None:
        """Choose the parameters that the stage trains, distribute the model over workers, make the optimizer."""
        if self.strategy and self.settings.strategy != "ddp" and self.world > 1:  # what is sharded can't be sharded again
            adapter = self.strategy.weights()
            if not shards_weights(self.settings):
                self.model.peft.to("cpu")  # frees the GPU for the new one
            self.model = self.load()
            load_adapter_state(self.model.peft, adapter)
        self.number, self.stage = number, self.stages[number]
        model, parts = self.model.peft, self.model.parts
        context = context_length(model.get_base_model())
        isolate = self.stage.config.isolate_questions
        self.collator = Collator(self.model.processor, isolate, self.model.packed, context, use_bytes=True)
        self.stage.schedule.decoded_size = decoded_size(self.model.processor.image_processor, self.stage.config.augment)
        set_trainable_parts(model, parts, self.stage.config.parts)
        model.train()
        freeze_batchnorm(model)
        checkpoint_activations(model, self.settings.checkpoint_activations)
        dtype = model.get_base_model().dtype

        def probe() -> int:
            with autocast(next(model.parameters()).device, dtype, self.settings.precision):
                return probe_first_row(model, parts, self.collator, self.stage)

        self.autocast = lambda: autocast(self.device, dtype, self.settings.precision)
        bfloat16 = self.autocast()._enabled
        self.peak = peak_flops(self.device, torch.bfloat16 if bfloat16 else torch.float32, self.settings.peak_tflops)
        self.strategy = make_strategy(self.settings.strategy, model, self.stage.config, probe, self.device, bfloat16)
        if self.settings.compile:
            for layer in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]:
                layer.compile(dynamic=True)
        if optimizer_state is not None:
            self.strategy.load_optimizer_state(optimizer_state)

    def train_step(self, step: int, share: StepBatches) -> StepMetrics:
        """One optimizer step on this worker's share; `step` counts from 0."""
        assert self.strategy
        stage, strategy = self.stage, self.strategy
        torch.manual_seed(stage.dropout_seed(step, self.rank))
        weights = [answer_weights(batch["labels"], stage.config.loss) for batch in share.batches]
        weighed = round(sum(float(batch.sum()) for batch in weights))
        counts = torch.tensor([weighed, sum(map(len, weights)), share.tokens]).to(self.device, non_blocking=True)
        with self.clock.collective():
            all_reduce(counts)
        sums = torch.zeros(2 * (len(KINDS) + 1) + 1)
        sums[-1] = self.rank == 0 and time.monotonic() - self.saved >= 60 * self.settings.checkpoint_minutes
        sums = sums.to(self.device, non_blocking=True)  # of all workers: whether a checkpoint is due comes last
        by_kind = sums[:-1].view(2, -1)  # loss and answer tokens of each kind of question
        for number, batch in enumerate(share.batches):
            with self.autocast():
                losses = token_losses(strategy.module, self.collator.finish(inputs_on(self.device, batch)))
            weight = weights[number].to(self.device, non_blocking=True)
            losses = losses * weight
            # The mean is over the answer tokens, or the answers, of all workers, whose gradients will be averaged: times world.
            strategy.backward(losses.sum() * (self.world / counts[0]), last=number == len(share.batches) - 1)
            kinds = batch["kinds"][:, 1:][batch["labels"][:, 1:] != IGNORE_INDEX].to(self.device, non_blocking=True)
            by_kind.index_add_(1, kinds, torch.stack([losses.detach(), weight]))
        rate = learning_rate(step, stage.steps, stage.config.learning_rate, stage.config.warmup_ratio)
        norm = torch.as_tensor(strategy.step(rate), dtype=torch.float32, device=self.device)
        all_reduce(sums)
        # The only synchronization of a step with a GPU
        total, answers, tokens, norm, *by_kind, due = torch.cat([counts.double(), norm.double()[None], sums.double()]).tolist()
        loss_sums, kind_counts = by_kind[: len(KINDS) + 1], by_kind[len(KINDS) + 1 :]
        self.checkpoint_due = bool(due)
        loss = sum(loss_sums) / total
        if not (loss - loss == 0 and norm - norm == 0):  # NaN or infinite
            raise InputError(
                f"{stage.name}: the loss is {loss} and the gradient's norm {norm} at step {step + 1}: lower "
                f"train.stages.{stage.name}.learning_rate ({stage.config.learning_rate:g}); the last good checkpoint is kept."
            )
        seconds, waits = self.clock.lap()
        samples_per_s = stage.schedule.per_step / seconds
        return StepMetrics(
            stage.name, step + 1, stage.steps, loss, rate, norm, samples_per_s, int(answers), tokens / seconds,
            mfu=samples_per_s * strategy.flops / (self.peak * self.world) if self.peak else None,
            memory_gib=memory_gib(self.device),
            by_kind={kind: a / b for kind, a, b in zip((*KINDS, "other"), loss_sums, kind_counts, strict=True) if b},
            rejected=len(stage.schedule.rejected), seconds=seconds, waits=waits,
        )  # fmt: skip

    def validate(self, step: int) -> None:
        """Ask about photos of the split `val`; in the last stage, keep the adapter that answers best."""
        assert self.validation
        assert self.strategy
        metrics = self.validation(self.model.peft, self.model.processor)
        adapter = self.strategy.weights() if self.logger or self.strategy.sharded else {}
        if self.logger:
            self.logger.log_validation(self.stage.name, step, metrics)
            last_stage = self.number == len(self.stages) - 1
            self.best = better_adapter(self.best, step, metrics, adapter) if last_stage else None

    def save_checkpoint(self, metrics: StepMetrics) -> None:
        """Report a checkpoint with all that resuming needs."""
        assert self.strategy
        if self.rejected:
            self.rejected.write(self.stages)
        if self.logger:
            self.logger.sync()
        checkpoint = None
        if self.report:
            if self.rank == 0 or self.strategy.sharded:
                state = self.strategy.weights(), self.strategy.optimizer_state()
                checkpoint = TrainingCheckpoint(self.number, metrics.step, *state, self.best)
            self.report(metrics.as_dict(), checkpoint if self.rank == 0 else None)
        self.saved = time.monotonic()


def inputs_on(device: torch.device, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch whose inputs are on the device; labels and kinds stay on the CPU, where they are counted."""
    return {key: value if key in ("labels", "kinds") else value.to(device, non_blocking=True) for key, value in batch.items()}


def all_reduce(value: torch.Tensor) -> torch.Tensor:
    """The sum over all workers."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def shards_weights(settings: TrainConfig) -> bool:
    """Whether no worker holds all weights."""
    return settings.strategy in SHARDS_WEIGHTS and is_distributed()


def load_adapted_model(config: Config, device: torch.device) -> AdaptedModel:
    """The base model with a new adapter, seeded by `train.seed`, laid out for the device.

    Raises:
        InputError: it can't be loaded, or its parts are unknown.
    """
    base, processor = load_model(config.model.base, config.model.dtype, config.model.trust_remote_code)
    return attach_adapter(base, processor, config, device)


def attach_adapter(base: Any, processor: Any, config: Config, device: torch.device) -> AdaptedModel:
    """A loaded base with a new adapter, on the device unless its weights will be sharded.

    Raises:
        InputError: the base's parts have unknown names, or train.packing is on and the base does not support it.
    """
    packed = enable_packing(base, config.train.packing, device, config.model.base)
    torch.manual_seed(config.training_seed)  # LoRA's random matrices
    peft, parts = attach_lora(base, config.model)
    return AdaptedModel(peft if shards_weights(config.train) else to_device(peft, device), parts, processor, packed)


def save_system(config: Config, trainer: Trainer, system: str, adapter: dict[str, torch.Tensor]) -> None:
    """Write `adapter`, `merged` and, if it is another, the `best` adapter, each with its card; all appear at once.

    Args:
        trainer: tells the adapter's form and the best one; its model is given up, since merging loads the base once more.
        adapter: the last weights.
    """
    best = trainer.best

    def save_adapter(weights: dict[str, torch.Tensor], folder: Path) -> None:
        buffers = {name: buffer.contiguous() for name, buffer in trainer.model.peft.named_buffers()}
        trainer.model.peft.save_pretrained(str(folder), state_dict={**buffers, **weights})

    folder = Run(config).model_dir(system)
    with atomic_replace_dir(folder) as partial:
        if best:
            name = "adapter" if config.train.checkpoint_to_merge == "best" else "best"
            save_adapter(best.adapter, partial / name)
            score = f"step {best.step} validated best ({best.metric} {100 * best.value:.1f} %)"
            messages.info(f"{system}: {score}: its adapter is {folder / name}")
        if not best or config.train.checkpoint_to_merge == "last":
            save_adapter(adapter, partial / "adapter")
        trainer.release()
        export_merged(partial / "adapter", config.model, partial / "merged")
        gazetteers = [Gazetteer.load(run.gazetteer) for run, _ in training_runs(config)]
        merge_gazetteers(gazetteers).save(partial / "merged" / "gazetteer.geojson")
        write_cards(config, system, partial)
