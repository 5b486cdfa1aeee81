"""AddressCLIP (paper 002): train a dual encoder on a city's photos, addresses and captions.

Under torch.distributed each worker runs `train_addressclip` on its share of every step, and the photos of all workers are each
other's negatives.
"""

import json
import logging
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
from addressvlm.models.loading import autocast, to_device
from addressvlm.models.lora import freeze_batchnorm, trainable_params
from addressvlm.storage import tables
from addressvlm.storage.files import atomic_replace_dir
from addressvlm.storage.remote_path import AnyPath
from addressvlm.storage.run_dir import Run, slug
from addressvlm.training.checkpoint import TrainingCheckpoint
from addressvlm.training.dataset import Schedule, TableRows, count_steps
from addressvlm.training.metrics_logger import MetricsLogger, StepClock, StepMetrics, memory_gib
from addressvlm.training.optim import learning_rate
from addressvlm.training.stages import RejectedRows, Stage
from addressvlm.training.strategy import Ddp, is_distributed
from addressvlm.training.trainer import Report


def contrastive_loss(images_ND: torch.Tensor, texts_ND: torch.Tensor, scale: torch.Tensor, names_N: torch.Tensor) -> Any:  # noqa: N803
    """Image-text contrastive loss of unit vectors (N, D) in both directions (eqs. 1 and 2), a scalar.

    In the paper every other photo of the batch is a negative, also one of the same address, so that the same pair of vectors
    is pulled together and pushed apart. Here all photos with the same text are positives in equal parts; where no two texts
    are equal this is the paper's loss.

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
    """Image-geography matching loss (eqs. 3 to 5): the cosine similarity of two photos follows their distance D.

    As printed, eq. 5 draws the similarity towards D itself, so that photos of opposite ends of the city become alike and
    neighbours differ, the opposite of its purpose in Sec. 4.3. Here the target is 1 - D/2: 1 for photos of one place, 0 for
    opposite corners. It is the mean of two triangular kernels, 1 - |east| and 1 - |north|, so unit vectors with exactly these
    similarities exist.

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
            of the texts `address_names` and `caption_names` (N,); those of a loss with weight 0 may be absent.
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

    Every worker computes the same loss of the same rows, so the gradient of its own rows is a slice of the gradient that it
    has and needs no exchange. It is multiplied by the number of workers because gradients of weights are averaged later.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.first, ctx.count = dist.get_rank() * len(rows), len(rows)
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0][ctx.first : ctx.first + ctx.count] * dist.get_world_size()


def all_gather_features(features: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The features of all workers' photos, so that they are each other's negatives; `scale` is equal on all workers.

    With gradients averaged over workers, as DistributedDataParallel does, they are those of the joint batch on one worker.
    Workers must have equally many photos.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return dict(features)
    return {name: value if name == "scale" else _Gather.apply(value) for name, value in features.items()}


messages = logging.getLogger(__name__)

BETAS = (0.9, 0.98)  # paper 002, App. B
STAGE = "contrast"
CHECKPOINT_STEPS = 50  # where train.checkpoint_every does not say
TRAINED_FILE = "trained.json"


class DualEncoderTowers(nn.Module):
    """Computes a step's features; a frozen encoder's output is computed once for each photo or text and cached."""

    def __init__(self, encoder: DualEncoder, system: AddressClipConfig, data: ClipData) -> None:
        super().__init__()
        self.encoder, self.system, self.data = encoder, system, data
        self.photo_states: dict[int, torch.Tensor] = {}
        self.text_states: dict[str, torch.Tensor] = {}
        self.tokens = 0  # of texts, encoded in the last step

    def forward(self, batch: ClipBatch) -> Tensors:
        """The features that `total_loss` takes."""
        self.tokens = 0
        samples, encoder, weights = batch.samples, self.encoder, self.system.weights
        features = {
            "images": encoder.project_images(self._encode_photos(batch)),
            "scale": encoder.scale.float(),
            "positions": batch.positions.to(encoder.device),
        }
        if weights.address:
            texts = [sample.address for sample in samples]
            features["addresses"], features["address_names"] = self._text_features(texts)
        if weights.caption and samples[0].caption is not None:
            texts = [sample.caption or sample.address for sample in samples]
            features["captions"], features["caption_names"] = self._text_features(texts)
        return features

    def _text_features(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors (N, D), each distinct text encoded once, and the texts' numbers (N,)."""
        distinct = list(dict.fromkeys(texts))
        row = {text: number for number, text in enumerate(distinct)}
        if self.system.train_text:
            states = self._encode_texts(distinct)
        else:
            if new := [text for text in distinct if text not in self.text_states]:
                with torch.no_grad():
                    self.text_states |= zip(new, self._encode_texts(new), strict=True)
            states = torch.stack([self.text_states[text] for text in distinct])
        vectors = self.encoder.project_texts(states)[[row[text] for text in texts]]
        return vectors, torch.tensor([text_number(text) for text in texts], device=self.encoder.device)

    def _encode_photos(self, batch: ClipBatch) -> torch.Tensor:
        pixels = batch.pixels and {name: value.to(self.encoder.device) for name, value in batch.pixels.items()}
        if self.system.train_image and pixels:
            return self.encoder.image_states(pixels)
        if pixels:
            with torch.no_grad():
                states = self.encoder.image_states(pixels)
            new = [sample for sample in batch.samples if sample.image is not None]
            for sample, state in zip(new, states, strict=True):
                self.photo_states[sample.index] = state
                self.data.drop_image(sample)
        return torch.stack([self.photo_states[sample.index] for sample in batch.samples])

    def _encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        tokens = self.encoder.tokens(texts)
        self.tokens += int(tokens.get("attention_mask", tokens["input_ids"]).count_nonzero())
        return self.encoder.text_states({name: value.to(self.encoder.device) for name, value in tokens.items()})


class ClipLearner(Ddp):
    """The trainable weights and their optimizer; see `training.strategy.Strategy`."""

    def __init__(self, towers: DualEncoderTowers, batch: ClipBatch, max_grad_norm: float, context: Any) -> None:
        """Weights that get no gradient from a first `batch` stay frozen."""
        encoder, system = towers.encoder, towers.system
        pretrained, new = encoder.trainable(system.train_image, system.train_text)
        encoder.requires_grad_(False)
        for weights in (*pretrained, *new):
            weights.requires_grad = True
        encoder.train()
        frozen = [] if system.train_image else encoder.encoder_modules("image")
        for module in frozen if system.train_text else [*frozen, *encoder.encoder_modules("text")]:
            module.eval()
        freeze_batchnorm(encoder)
        with context:
            loss, _ = total_loss(towers(batch), system.weights)
        if loss.requires_grad:
            loss.backward()
        for weights in (*pretrained, *new):
            weights.requires_grad, weights.grad = weights.grad is not None, None
        groups = [
            {"params": [w for w in pretrained if w.requires_grad], "share": 1.0, "weight_decay": system.weight_decay},
            {
                "params": [w for w in new if w.requires_grad],
                "share": system.projection_learning_rate / system.learning_rate,
                "weight_decay": 0.0,
            },
        ]
        self.model, self.towers, self.max_grad_norm = encoder, towers, max_grad_norm
        self.trainable = trainable_params(encoder)
        if not self.trainable:
            raise InputError(
                f"{system.name}: nothing learns: switch on train_image or train_text, and give one of its losses a weight "
                "above 0."
            )
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=BETAS)
        self.single = not is_distributed()
        self.module = towers if self.single else DistributedDataParallel(towers)

    def weights(self) -> Tensors:
        return {name: weights.detach().cpu().clone() for name, weights in self.trainable.items()}


def clip_stage(config: Config, system: AddressClipConfig, schedule: Schedule) -> Stage:
    """The training as a stage of `training.trainer`."""
    settings = StageConfig(
        data="photos", epochs=system.epochs, max_steps=system.max_steps, batch_size=system.batch_size,
        learning_rate=system.learning_rate, warmup_ratio=system.warmup_ratio, weight_decay=system.weight_decay,
    )  # fmt: skip
    steps = count_steps(len(schedule.rows), schedule.per_step, system.epochs, system.max_steps)
    return Stage(STAGE, settings, schedule, steps, schedule.seed)


def train_addressclip(
    config: Config, system: AddressClipConfig, checkpoint: Path | None, report: Report, device: str | torch.device = "cpu"
) -> None:
    """Train from the beginning or from a checkpoint and save; every worker of the process group calls it.

    Args:
        checkpoint: folder of an earlier run's checkpoint.
        report: called by all workers together, by the first with a checkpoint.

    Raises:
        InputError: the model or the captions are missing, nothing can learn, or the loss is not finite.
    """
    run, device = Run(config), torch.device(device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    encoder = build_dual_encoder(
        system.base, config.model.base, config.model.dtype, config.training_seed, config.model.trust_remote_code
    )
    encoder = to_device(encoder, device)
    captions, seed = caption_texts(run, system.captions), config.training_seed * 101
    data = ClipData(TableRows(run.photos, "train", COLUMNS), system.batch_size * config.train.workers, seed, captions, encoder)
    stage = clip_stage(config, system, data)
    context = autocast(device, torch.float32, config.train.precision)
    towers = DualEncoderTowers(encoder, system, data)
    learner = ClipLearner(towers, data.batch(0, rank, world, most=2), stage.config.max_grad_norm, context)
    start = 0
    if checkpoint:
        saved = TrainingCheckpoint.read(checkpoint)
        start = saved.step
        encoder.load_state_dict(saved.adapter, strict=False)
        learner.load_optimizer_state(saved.optimizer_state)
    rejects = RejectedRows(run.rejects / f"train-{slug(system.name)}.parquet", resumed=start > 0)
    logger = None
    if rank == 0:
        folder = run.training_dir(system.name)
        logger = MetricsLogger(folder, system.name, start, stage.steps, config.train.loggers, config.name)
        if captions.missing:
            messages.info(f"{system.name}: {captions.missing:,} photos without an explanation: their address alone")

    batches, clock = data.batches(start, stage.steps, rank, world), StepClock(device)
    for _ in range(start, stage.steps):
        with clock.waiting("data"):
            number, batch = next(batches)
        progress = clip_step(learner, stage, number, batch, (rank, world), context, clock)
        if logger:
            logger.log_step(progress)
        last = progress.step == stage.steps
        if progress.step % (config.train.checkpoint_every or CHECKPOINT_STEPS) and not last:
            continue
        with clock.waiting("checkpoints"):
            rejects.write([stage])
            if logger:
                logger.sync()
            state = (learner.weights(), learner.optimizer_state()) if rank == 0 else None
            report(progress.as_dict(), TrainingCheckpoint(0, progress.step, *state) if state else None)
    left_out = rejects.write([stage])
    if rank == 0:
        if left_out:
            messages.info(f"{system.name}: {left_out:,} photos were left out: see {rejects.file}")
        parameters = sum(weights.numel() for weights in learner.trainable.values())
        trained = {"parameters": parameters, "steps": stage.steps, "without_caption": captions.missing}
        save_dual_encoder(config, system, encoder, trained)


def clip_step(
    learner: ClipLearner,
    stage: Stage,
    number: int,
    batch: ClipBatch,
    worker: tuple[int, int],
    context: Any,
    clock: StepClock,
) -> StepMetrics:
    """One optimizer step of all workers; `worker` is this one's rank and their number."""
    rank, world = worker
    torch.manual_seed((stage.seed * 1_000_003 + number) * 1_009 + rank)
    with context:
        features = learner.module(batch)
    loss, parts = total_loss(all_gather_features(features), learner.towers.system.weights)
    learner.backward(loss, last=True)
    rate = learning_rate(number, stage.steps, stage.config.learning_rate, stage.config.warmup_ratio)
    norm = float(learner.step(rate))
    mean = float(loss.detach())
    if not (mean - mean == 0 and norm - norm == 0):
        raise InputError(
            f"the loss is {mean} and the gradient's norm {norm} at step {number + 1}: lower learning_rate "
            f"({stage.config.learning_rate:g}) of the system; the last good checkpoint is kept."
        )
    took, waits = clock.lap()
    kinds = {name: float(part.detach()) for name, part in parts.items()}
    tokens = learner.towers.tokens * world
    return StepMetrics(
        STAGE, number + 1, stage.steps, mean, rate, norm, stage.schedule.per_step / took, tokens, tokens / took, None,
        memory_gib(features["images"].device), kinds, len(stage.schedule.rejected), took, waits,
    )  # fmt: skip


def save_dual_encoder(config: Config, system: AddressClipConfig, encoder: DualEncoder, trained: dict[str, int]) -> None:
    """Write the model's folder: the encoder, the city's gazetteer, the card, and the numbers of `trained_parameters`."""
    run = Run(config)
    with atomic_replace_dir(run.model_dir(system.name)) as partial:
        encoder.save(partial)
        Gazetteer.load(run.gazetteer).save(partial / GAZETTEER_FILE)
        (partial / TRAINED_FILE).write_text(json.dumps(trained))
        (partial / "README.md").write_text(clip_card(config, system, trained["steps"], trained["parameters"]), encoding="utf-8")


def trained_parameters(folder: AnyPath) -> dict[str, int]:
    """`parameters`, `steps` and photos `without_caption` of a folder that `save_dual_encoder` wrote."""
    return json.loads((folder / TRAINED_FILE).read_text(encoding="utf-8"))


USE = """from pathlib import Path

from PIL import Image

from addressvlm.answers.address_distribution import AddressDistribution
from addressvlm.baselines.dual_encoder import AddressIndex, open_encoder
from addressvlm.gazetteer.gazetteer import Gazetteer

folder = Path("<this folder>")
city = Gazetteer.load(folder / "gazetteer.geojson")
scores = AddressIndex(open_encoder(folder), city.addresses).scores([Image.open("photo.jpg").convert("RGB")])
print(AddressDistribution(city.addresses, scores[0]).ranked(3))"""


def clip_licence(config: Config, system: AddressClipConfig) -> str | None:
    """The licence of the base model, as its card says."""
    base = system.base or config.model.base
    return base_licence(config.model_copy(update={"model": config.model.model_copy(update={"base": base})}))


def clip_card(config: Config, system: AddressClipConfig, steps: int, parameters: int) -> str:
    """The model card."""
    run = Run(config)
    gazetteer, base = Gazetteer.load(run.gazetteer), system.base or config.model.base
    city = gazetteer.city or config.name
    head = {"library_name": "transformers", "base_model": base, "tags": ["addressvlm", "image-geolocation", "addressclip"]}
    trained = " and ".join(name for name in ("image", "text") if getattr(system, f"train_{name}")) or "neither"
    weights = ", ".join(f"{name} {weight:g}" for name, weight in system.weights.model_dump().items())
    lines = [
        front_matter(head, clip_licence(config, system)),
        f"# {city}: a photo and its address as neighbouring vectors",
        f"`{base}`, trained on {city} with AddressCLIP's losses ({weights}; captions: {system.captions}). It compares a photo "
        f"with the texts of the city's {len(gazetteer.addresses):,} addresses. It knows no other city.",
        "## Data",
        f"{tables.count_rows(run.photos, 'train'):,} photos. {attributed(gazetteer.attribution)}",
        "## Training",
        f"{steps:,} steps of {system.batch_size * config.train.workers:,} photos, encoders trained: {trained}, learning rate "
        f"{system.learning_rate:g}, of new projections {system.projection_learning_rate:g}; {parameters:,} weights trained, "
        f"seed {config.training_seed}. All settings are in `_done.json`.",
        "## Metrics",
        no_metrics_section("compare"),
        "## Use",
        f"```python\n{USE}\n```",
        f"{ELSEWHERE}. {PEOPLE}",
    ]
    return "\n\n".join(lines) + "\n"
