"""AddressCLIP (paper 002): train a dual encoder on a city's photos, addresses and captions, and score addresses with it.

Under torch.distributed each worker runs `train` on its share of every step; all workers' photos are each other's negatives.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from addressvlm.addresses import GAZETTEER, Gazetteer
from addressvlm.baselines.captions import captions_of
from addressvlm.baselines.clip_card import card
from addressvlm.baselines.clip_losses import gathered, total_loss
from addressvlm.baselines.dual_encoder import DualEncoder, Tensors, begin
from addressvlm.baselines.lessons import COLUMNS, Batch, Lessons, number_of
from addressvlm.config import Config
from addressvlm.config_compare import AddressClipConfig
from addressvlm.config_training import StageConfig
from addressvlm.errors import InputError
from addressvlm.files import replaced
from addressvlm.models.base import placed
from addressvlm.models.lora import keep_statistics, trainable
from addressvlm.run import Run, slug
from addressvlm.stores import AnyPath
from addressvlm.training import loop
from addressvlm.training.hardware import memory_gib
from addressvlm.training.journal import Journal
from addressvlm.training.rejects import Rejects
from addressvlm.training.rows import Rows, Schedule, steps_of
from addressvlm.training.snapshot import Snapshot
from addressvlm.training.step import autocast, learning_rate
from addressvlm.training.strategy import shared
from addressvlm.training.strategy.ddp import Ddp
from addressvlm.training.system import Report

BETAS = (0.9, 0.98)  # paper 002, App. B
STAGE = "contrast"
LEARNT = "learnt.json"


class Towers(nn.Module):
    """A step's features. What a frozen encoder makes of a photo or a text is computed once and kept."""

    def __init__(self, encoder: DualEncoder, rival: AddressClipConfig, lessons: Lessons) -> None:
        super().__init__()
        self.encoder, self.rival, self.lessons = encoder, rival, lessons
        self.of_photos: dict[int, torch.Tensor] = {}
        self.of_texts: dict[str, torch.Tensor] = {}
        self.tokens = 0  # of texts, encoded at the last step

    def forward(self, batch: Batch) -> Tensors:
        """What `total_loss` takes."""
        self.tokens = 0
        lessons, encoder, weights = batch.lessons, self.encoder, self.rival.weights
        features = {
            "images": encoder.project_images(self._photo_states(batch)),
            "scale": encoder.scale.float(),
            "positions": batch.positions.to(encoder.device),
        }
        if weights.address:
            features |= self._texts("address", [lesson.address for lesson in lessons])
        if weights.caption and lessons[0].caption is not None:
            features |= self._texts("caption", [lesson.caption or lesson.address for lesson in lessons])
        return features

    def _texts(self, kind: str, texts: Sequence[str]) -> Tensors:
        """Each different text is encoded once."""
        different = list(dict.fromkeys(texts))
        at = {text: number for number, text in enumerate(different)}
        vectors = self.encoder.project_texts(self._text_states(different))[[at[text] for text in texts]]
        names = torch.tensor([number_of(text) for text in texts], device=self.encoder.device)
        return {f"{kind}es" if kind == "address" else f"{kind}s": vectors, f"{kind}_names": names}

    def _photo_states(self, batch: Batch) -> torch.Tensor:
        pixels = batch.pixels and {name: value.to(self.encoder.device) for name, value in batch.pixels.items()}
        if self.rival.train_image and pixels:
            return self.encoder.image_states(pixels)
        fresh = [lesson for lesson in batch.lessons if lesson.image is not None]
        if pixels:
            with torch.no_grad():
                states = self.encoder.image_states(pixels)
            for lesson, state in zip(fresh, states, strict=True):
                self.of_photos[lesson.index] = state
                self.lessons.keep(lesson)
        return torch.stack([self.of_photos[lesson.index] for lesson in batch.lessons])

    def _text_states(self, texts: Sequence[str]) -> torch.Tensor:
        if self.rival.train_text:
            return self._encoded(texts)
        if fresh := [text for text in texts if text not in self.of_texts]:
            with torch.no_grad():
                self.of_texts |= zip(fresh, self._encoded(fresh), strict=True)
        return torch.stack([self.of_texts[text] for text in texts])

    def _encoded(self, texts: Sequence[str]) -> torch.Tensor:
        tokens = self.encoder.tokens(texts)
        self.tokens += int(tokens.get("attention_mask", tokens["input_ids"]).count_nonzero())
        return self.encoder.text_states({name: value.to(self.encoder.device) for name, value in tokens.items()})


class Learner(Ddp):
    """What learns, and its optimizer; see `training.strategy.Strategy`."""

    def __init__(self, towers: Towers, first: Batch, clip: float, context: Any) -> None:
        """Weights that the features of the `first` photos do not depend on are left as they are.

        Raises:
            InputError: nothing can learn.
        """
        encoder, rival = towers.encoder, towers.rival
        old, new = encoder.learning(rival.train_image, rival.train_text)
        encoder.requires_grad_(False)
        for weights in (*old, *new):
            weights.requires_grad = True
        encoder.train()
        for module in [*([] if rival.train_image else encoder.eyes()), *([] if rival.train_text else encoder.reader())]:
            module.eval()
        keep_statistics(encoder)
        with context:
            loss, _ = total_loss(towers(first), rival.weights)
        if loss.requires_grad:
            loss.backward()
        for weights in (*old, *new):
            weights.requires_grad, weights.grad = weights.grad is not None, None
        groups = [
            {"params": [w for w in old if w.requires_grad], "share": 1.0, "weight_decay": rival.weight_decay},
            {
                "params": [w for w in new if w.requires_grad],
                "share": rival.projection_learning_rate / rival.learning_rate,
                "weight_decay": 0.0,
            },
        ]
        self.model, self.towers, self.clip = encoder, towers, clip
        self.learning = trainable(encoder)
        if not self.learning:
            raise InputError(
                f"{rival.name}: nothing learns: switch on train_image or train_text, and give one of its losses a weight "
                "above 0."
            )
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=BETAS)
        self.alone = not shared()
        self.module = towers if self.alone else DistributedDataParallel(towers)

    def weights(self) -> Tensors:
        return {name: weights.detach().cpu().clone() for name, weights in self.learning.items()}


def stage_of(config: Config, rival: AddressClipConfig, schedule: Schedule) -> loop.Stage:
    """The training as a stage."""
    settings = StageConfig(
        data="photos", epochs=rival.epochs, max_steps=rival.max_steps, batch_size=rival.batch_size,
        learning_rate=rival.learning_rate, warmup=rival.warmup, weight_decay=rival.weight_decay,
    )  # fmt: skip
    steps = steps_of(len(schedule.rows), schedule.per_step, rival.epochs, rival.max_steps)
    return loop.Stage(STAGE, settings, schedule, steps, schedule.seed)


def train(
    config: Config, rival: AddressClipConfig, checkpoint: Path | None, report: Report, device: str | torch.device = "cpu"
) -> None:
    """Train from the beginning or from a checkpoint and save; every worker of the process group calls it.

    Args:
        checkpoint: folder into which an earlier run's snapshot was written.
        report: called by all workers together, by the first with a snapshot.

    Raises:
        InputError: the model or the captions are missing, nothing can learn, or the loss is not finite.
    """
    run, device = Run(config), torch.device(device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    encoder = begin(rival.base, config.model.base, config.model.dtype, config.training_seed, config.model.trust_remote_code)
    encoder = placed(encoder, device)
    captions, seed = captions_of(run, rival.captions), config.training_seed * 101
    lessons = Lessons(Rows(run.photos, "train", COLUMNS), rival.batch_size * config.train.workers, seed, captions, encoder)
    stage = stage_of(config, rival, lessons)
    context = autocast(device, torch.float32, config.train.precision)
    towers = Towers(encoder, rival, lessons)
    learner = Learner(towers, lessons.batch(0, rank, world, most=2), stage.config.clip, context)
    start = 0
    if checkpoint:
        found = Snapshot.read(checkpoint)
        start = found.step
        encoder.load_state_dict(found.adapter, strict=False)
        learner.restore(found.moments)
    rejects = Rejects(run.rejects / f"train-{slug(rival.name)}.parquet", resumed=start > 0)
    account = (run.journal(rival.name), rival.name, start, stage.steps, config.train.trackers, config.name)
    journal = Journal(*account) if rank == 0 else None
    if journal and captions.missing:
        print(f"train: {rival.name}: {captions.missing:,} photos without an explanation: their address alone", flush=True)

    for number, batch in lessons.batches(start, stage.steps, rank, world):
        progress = step(learner, stage, number, batch, (rank, world), context)
        if journal:
            journal.note(progress)
        last = progress.step == stage.steps
        if progress.step % config.train.checkpoint_every and not last:
            continue
        rejects.write([stage])
        if journal:
            journal.keep()
        snapshot = Snapshot(0, progress.step, learner.weights(), learner.moments()) if rank == 0 else None
        report(progress.as_dict(), snapshot)
    left_out = rejects.write([stage])
    if rank == 0:
        if left_out:
            print(f"train: {rival.name}: {left_out:,} photos were left out: see {rejects.file}", flush=True)
        parameters = sum(weights.numel() for weights in learner.learning.values())
        save(config, rival, encoder, {"parameters": parameters, "steps": stage.steps, "without_caption": captions.missing})


def step(learner: Learner, stage: loop.Stage, number: int, batch: Batch, of: tuple[int, int], context: Any) -> loop.Progress:
    """One optimizer step of all workers."""
    began = time.perf_counter()
    torch.manual_seed((stage.seed * 1_000_003 + number) * 1_009 + of[0])
    with context:
        features = learner.module(batch)
    loss, parts = total_loss(gathered(features), learner.towers.rival.weights)
    learner.backward(loss, last=True)
    rate = learning_rate(number, stage.steps, stage.config.learning_rate, stage.config.warmup)
    norm = learner.step(rate)
    mean = float(loss.detach())
    if not (mean - mean == 0 and norm - norm == 0):
        raise InputError(
            f"the loss is {mean} and the gradient's norm {norm} at step {number + 1}: lower learning_rate "
            f"({stage.config.learning_rate:g}) of the system; the last good checkpoint is kept."
        )
    took = time.perf_counter() - began
    kinds = {name: float(part.detach()) for name, part in parts.items()}
    tokens = learner.towers.tokens * of[1]
    return loop.Progress(
        STAGE, number + 1, stage.steps, mean, rate, norm, stage.schedule.per_step / took, tokens, tokens / took, None,
        memory_gib(features["images"].device), kinds, len(stage.schedule.rejected),
    )  # fmt: skip


def save(config: Config, rival: AddressClipConfig, encoder: DualEncoder, learnt: dict[str, int]) -> None:
    """Write the model's folder: the encoder, the city's gazetteer, the card, and how much was `learnt` from what."""
    run = Run(config)
    with replaced(run.model(rival.name)) as partial:
        encoder.save(partial)
        Gazetteer.load(run.gazetteer).save(partial / GAZETTEER)
        (partial / LEARNT).write_text(json.dumps(learnt))
        (partial / "README.md").write_text(card(config, rival, learnt["steps"], learnt["parameters"]), encoding="utf-8")


def learnt_of(folder: AnyPath) -> dict[str, int]:
    """`parameters`, `steps` and photos `without_caption` of a folder that `save` wrote."""
    found: dict[str, int] = json.loads((folder / LEARNT).read_text(encoding="utf-8"))
    return found
