"""AddressCLIP (paper 002): train a dual encoder on a city's photos, addresses and captions, and score addresses with it.

Under torch.distributed each worker runs `train_addressclip` on its share of every step; all workers' photos are each other's negatives.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from addressvlm.baselines.addressclip_data import COLUMNS, ClipBatch, ClipData, caption_texts, text_number
from addressvlm.baselines.dual_encoder import DualEncoder, Tensors, build_dual_encoder
from addressvlm.config import Config
from addressvlm.config.compare import AddressClipConfig, LossWeights
from addressvlm.config.train import StageConfig
from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE, Gazetteer
from addressvlm.models.cards import ELSEWHERE, PEOPLE, attributed, base_licence, front_matter, no_metrics_section
from addressvlm.models.loading import to_device
from addressvlm.models.lora import freeze_batchnorm, trainable_params
from addressvlm.storage import tables
from addressvlm.storage.files import atomic_replace_dir
from addressvlm.storage.remote_path import AnyPath
from addressvlm.storage.run_dir import Run, slug
from addressvlm.training import trainer
from addressvlm.training.checkpoint import TrainingCheckpoint
from addressvlm.training.dataset import Schedule, TableRows, count_steps
from addressvlm.training.device_stats import memory_gib
from addressvlm.training.loss import autocast, learning_rate
from addressvlm.training.metrics_logger import MetricsLogger
from addressvlm.training.skipped_rows import SkippedRows
from addressvlm.training.stages import Report
from addressvlm.training.strategy import is_distributed
from addressvlm.training.strategy.ddp import Ddp


def contrastive_loss(images_ND: torch.Tensor, texts_ND: torch.Tensor, scale: torch.Tensor, names_N: torch.Tensor) -> Any:  # noqa: N803
    """Image-text contrastive loss of unit vectors in both directions (eqs. 1 and 2), a scalar.

    The paper takes every other photo of the batch as a negative, also one of the same address, whose text is the very same:
    one and the same pair of vectors would be pulled together and pushed apart. Here all photos with the same text are right
    answers in equal parts; where no two texts are alike this is the paper's loss.

    Args:
        scale: 1 / temperature.
        names_N: a number for each text, equal for equal texts.
    """
    logits = scale * images_ND @ texts_ND.T
    same = (names_N[:, None] == names_N[None, :]).to(logits.dtype)
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pairwise_distances(positions_N2: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """Manhattan distances (N, N) of positions min-max normalised over the batch, each axis by itself (eq. 3); 0 to 2.

    As each axis has its own unit, UTM metres and degrees give the same over a city.
    """
    low, high = positions_N2.amin(dim=0), positions_N2.amax(dim=0)
    unit = (positions_N2 - low) / (high - low).clamp_min(1e-9)
    return torch.cdist(unit, unit, p=1)


def geography_loss(images_ND: torch.Tensor, positions_N2: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """Image-geography matching loss (eqs. 3 to 5): the cosine similarity of two photos shall follow their distance D.

    As printed, eq. 5 draws the similarity towards D itself, so that photos of opposite ends of the city become alike and
    neighbours differ, which is the opposite of what Sec. 4.3 says it is for. Here the target is 1 - D/2: 1 for photos of one
    place, 0 for opposite corners. It is the mean of two triangular kernels, 1 - |east| and 1 - |north|, so unit vectors with
    exactly these similarities exist.

    Args:
        images_ND: unit vectors.
        positions_N2: east and north, in UTM metres or degrees; photos without are NaN and left out.
    """
    known = positions_N2.isfinite().all(dim=1)
    if not known.any():
        return images_ND.sum() * 0
    similarity = images_ND[known] @ images_ND[known].T
    return F.mse_loss(similarity, (1 - pairwise_distances(positions_N2[known]) / 2).to(similarity.dtype))


def total_loss(features: Mapping[str, torch.Tensor], weights: LossWeights) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum (eq. 6) and its parts.

    Args:
        features: `images`, `addresses` and `captions` as unit vectors (N, D), `scale`, `positions` (N, 2), and the numbers
            of the texts `address_names` and `caption_names` (N,); what weighs nothing may be absent.
    """
    images, scale = features["images"], features["scale"]
    parts = {}
    if weights.address:
        parts["address"] = contrastive_loss(images, features["addresses"], scale, features["address_names"])
    if weights.caption and "captions" in features:
        parts["caption"] = contrastive_loss(images, features["captions"], scale, features["caption_names"])
    if weights.geography:
        parts["geography"] = geography_loss(images, features["positions"])
    total = sum((getattr(weights, name) * loss for name, loss in parts.items()), torch.zeros_like(scale).sum())
    return total, parts


class _Gather(torch.autograd.Function):
    """All workers' rows in the order of their ranks.

    Every worker computes the same loss of the same rows, so the gradient of its own rows is a slice of what it has already and
    needs no exchange. It is multiplied by the number of workers because gradients of weights are averaged over them later.
    """

    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor) -> torch.Tensor:
        ctx.first, ctx.count = dist.get_rank() * len(mine), len(mine)
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(found, mine.contiguous())
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0][ctx.first : ctx.first + ctx.count] * dist.get_world_size()


def all_gather_features(features: Mapping[str, torch.Tensor], shared: Sequence[str] = ("scale",)) -> dict[str, torch.Tensor]:
    """The features of all workers' photos, so that each is the others' negative; `shared` are the same on every worker.

    With weights averaged over workers, as DistributedDataParallel does, gradients are those of the joint batch on one worker.
    Workers must bring equally many photos.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return dict(features)
    return {name: value if name in shared else _Gather.apply(value) for name, value in features.items()}


USE = """from pathlib import Path

from PIL import Image

from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.answers.address_distribution import Beliefs
from addressvlm.baselines.dual_encoder import Candidates
from addressvlm.baselines.dual_encoder import open_encoder

folder = Path("<this folder>")
city = Gazetteer.load(folder / "gazetteer.geojson")
scores = Candidates(open_encoder(folder), city.addresses).scores([Image.open("photo.jpg").convert("RGB")])
print(Beliefs(city.addresses, scores[0]).ranked(3))"""


def clip_licence(config: Config, rival: AddressClipConfig) -> str | None:
    """The licence of the model that it was made of, as its own card says."""
    base = rival.base or config.model.base
    return base_licence(config.model_copy(update={"model": config.model.model_copy(update={"base": base})}))


def clip_card(config: Config, rival: AddressClipConfig, steps: int, parameters: int) -> str:
    """The card's text."""
    run = Run(config)
    gazetteer, base = Gazetteer.load(run.gazetteer), rival.base or config.model.base
    city = gazetteer.city or config.name
    head = {"library_name": "transformers", "base_model": base, "tags": ["addressvlm", "image-geolocation", "addressclip"]}
    trained = " and ".join(name for name, on in (("image", rival.train_image), ("text", rival.train_text)) if on) or "neither"
    weights = ", ".join(f"{name} {weight:g}" for name, weight in rival.weights.model_dump().items())
    lines = [
        front_matter(head, clip_licence(config, rival)),
        f"# {city}: a photo and its address as neighbouring vectors",
        f"`{base}`, taught {city} by AddressCLIP's losses ({weights}; captions: {rival.captions}). It compares a photo with "
        f"the texts of the {len(gazetteer.addresses):,} addresses that it is given. It knows no other city.",
        "## Data",
        f"{tables.count_rows(run.photos, 'train'):,} photos. {attributed(gazetteer.attribution)}",
        "## Training",
        f"{steps:,} steps of {rival.batch_size * config.train.workers:,} photos, encoders trained: {trained}, learning rate "
        f"{rival.learning_rate:g}, of new projections {rival.projection_learning_rate:g}; {parameters:,} numbers learnt, seed "
        f"{config.training_seed}. All settings are in `_done.json`.",
        "## Metrics",
        no_metrics_section("compare"),
        "## Use",
        f"```python\n{USE}\n```",
        f"{ELSEWHERE}. {PEOPLE}",
    ]
    return "\n\n".join(lines) + "\n"


BETAS = (0.9, 0.98)  # paper 002, App. B
STAGE = "contrast"
TRAINED_FILE = "learnt.json"


class DualEncoderTowers(nn.Module):
    """A step's features. What a frozen encoder makes of a photo or a text is computed once and kept."""

    def __init__(self, encoder: DualEncoder, rival: AddressClipConfig, lessons: ClipData) -> None:
        super().__init__()
        self.encoder, self.rival, self.lessons = encoder, rival, lessons
        self.of_photos: dict[int, torch.Tensor] = {}
        self.of_texts: dict[str, torch.Tensor] = {}
        self.tokens = 0  # of texts, encoded at the last step

    def forward(self, batch: ClipBatch) -> Tensors:
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
        names = torch.tensor([text_number(text) for text in texts], device=self.encoder.device)
        return {f"{kind}es" if kind == "address" else f"{kind}s": vectors, f"{kind}_names": names}

    def _photo_states(self, batch: ClipBatch) -> torch.Tensor:
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


class ClipLearner(Ddp):
    """What learns, and its optimizer; see `training.strategy.Strategy`."""

    def __init__(self, towers: DualEncoderTowers, first: ClipBatch, clip: float, context: Any) -> None:
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
        freeze_batchnorm(encoder)
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
        self.learning = trainable_params(encoder)
        if not self.learning:
            raise InputError(
                f"{rival.name}: nothing learns: switch on train_image or train_text, and give one of its losses a weight "
                "above 0."
            )
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=BETAS)
        self.alone = not is_distributed()
        self.module = towers if self.alone else DistributedDataParallel(towers)

    def weights(self) -> Tensors:
        return {name: weights.detach().cpu().clone() for name, weights in self.learning.items()}


def clip_stage(config: Config, rival: AddressClipConfig, schedule: Schedule) -> trainer.Stage:
    """The training as a stage."""
    settings = StageConfig(
        data="photos", epochs=rival.epochs, max_steps=rival.max_steps, batch_size=rival.batch_size,
        learning_rate=rival.learning_rate, warmup_ratio=rival.warmup_ratio, weight_decay=rival.weight_decay,
    )  # fmt: skip
    steps = count_steps(len(schedule.rows), schedule.per_step, rival.epochs, rival.max_steps)
    return trainer.Stage(STAGE, settings, schedule, steps, schedule.seed)


def train_addressclip(
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
    encoder = build_dual_encoder(
        rival.base, config.model.base, config.model.dtype, config.training_seed, config.model.trust_remote_code
    )
    encoder = to_device(encoder, device)
    captions, seed = caption_texts(run, rival.captions), config.training_seed * 101
    lessons = ClipData(
        TableRows(run.photos, "train", COLUMNS), rival.batch_size * config.train.workers, seed, captions, encoder
    )
    stage = clip_stage(config, rival, lessons)
    context = autocast(device, torch.float32, config.train.precision)
    towers = DualEncoderTowers(encoder, rival, lessons)
    learner = ClipLearner(towers, lessons.batch(0, rank, world, most=2), stage.config.max_grad_norm, context)
    start = 0
    if checkpoint:
        found = TrainingCheckpoint.read(checkpoint)
        start = found.step
        encoder.load_state_dict(found.adapter, strict=False)
        learner.restore(found.moments)
    rejects = SkippedRows(run.rejects / f"train-{slug(rival.name)}.parquet", resumed=start > 0)
    account = (run.training_dir(rival.name), rival.name, start, stage.steps, config.train.loggers, config.name)
    journal = MetricsLogger(*account) if rank == 0 else None
    if journal and captions.missing:
        print(f"train: {rival.name}: {captions.missing:,} photos without an explanation: their address alone", flush=True)

    for number, batch in lessons.batches(start, stage.steps, rank, world):
        progress = clip_step(learner, stage, number, batch, (rank, world), context)
        if journal:
            journal.note(progress)
        last = progress.step == stage.steps
        if progress.step % config.train.checkpoint_every and not last:
            continue
        rejects.write([stage])
        if journal:
            journal.keep()
        snapshot = TrainingCheckpoint(0, progress.step, learner.weights(), learner.moments()) if rank == 0 else None
        report(progress.as_dict(), snapshot)
    left_out = rejects.write([stage])
    if rank == 0:
        if left_out:
            print(f"train: {rival.name}: {left_out:,} photos were left out: see {rejects.file}", flush=True)
        parameters = sum(weights.numel() for weights in learner.learning.values())
        save_dual_encoder(
            config, rival, encoder, {"parameters": parameters, "steps": stage.steps, "without_caption": captions.missing}
        )


def clip_step(
    learner: ClipLearner, stage: trainer.Stage, number: int, batch: ClipBatch, of: tuple[int, int], context: Any
) -> trainer.StepMetrics:
    """One optimizer step of all workers."""
    began = time.perf_counter()
    torch.manual_seed((stage.seed * 1_000_003 + number) * 1_009 + of[0])
    with context:
        features = learner.module(batch)
    loss, parts = total_loss(all_gather_features(features), learner.towers.rival.weights)
    learner.backward(loss, last=True)
    rate = learning_rate(number, stage.steps, stage.config.learning_rate, stage.config.warmup_ratio)
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
    return trainer.StepMetrics(
        STAGE, number + 1, stage.steps, mean, rate, norm, stage.schedule.per_step / took, tokens, tokens / took, None,
        memory_gib(features["images"].device), kinds, len(stage.schedule.rejected),
    )  # fmt: skip


def save_dual_encoder(config: Config, rival: AddressClipConfig, encoder: DualEncoder, learnt: dict[str, int]) -> None:
    """Write the model's folder: the encoder, the city's gazetteer, the card, and how much was `learnt` from what."""
    run = Run(config)
    with atomic_replace_dir(run.model_dir(rival.name)) as partial:
        encoder.save(partial)
        Gazetteer.load(run.gazetteer).save(partial / GAZETTEER_FILE)
        (partial / TRAINED_FILE).write_text(json.dumps(learnt))
        (partial / "README.md").write_text(clip_card(config, rival, learnt["steps"], learnt["parameters"]), encoding="utf-8")


def trained_parameters(folder: AnyPath) -> dict[str, int]:
    """`parameters`, `steps` and photos `without_caption` of a folder that `save_dual_encoder` wrote."""
    found: dict[str, int] = json.loads((folder / TRAINED_FILE).read_text(encoding="utf-8"))
    return found
